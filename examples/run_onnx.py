"""Run an exported encoder with onnxruntime, numpy and pillow alone: python run_onnx.py sharp.onnx photo.jpg out.npy"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

program, photo, result = sys.argv[1:]
session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
about = session.get_modelmeta().custom_metadata_map  # what featsharp wrote into the file
mean, std, size, step = (json.loads(about[key]) for key in ("mean", "std", "input_size", "size_step"))
image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")  # upright, as it is shown
if step:  # sides are open: about the native area in the aspect ratio of the picture
    scale = (size[0] * size[1] / (image.width * image.height)) ** 0.5
    size = [max(3, round(side * scale / step)) * step for side in (image.height, image.width)]
pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), np.float32) / 255
images = ((pixels - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
low_res, high_res = session.run(["low_res", "high_res"], {about["input"]: images})
np.save(result, high_res[0])
print(f"{about['upsampler']} on {about['backbone']}: {low_res.shape[1:]} -> {high_res.shape[1:]} in {result}")
