"""The fixed validation samples of a training run: the same images and views every time.

It is above training/, which takes it as an argument: it scores with evaluation/ and draws with visualization/, which
are on the level of training/.
"""

import hashlib
import math
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from featsharp.data.entries import parse_data_dir
from featsharp.data.images import image_to_tensor
from featsharp.data.streams import ShardStream, first_images
from featsharp.evaluation.features import centre_crop
from featsharp.evaluation.fidelity import SEED, VIEWS, FidelityMeter, default_eval_size
from featsharp.evaluation.images import ImageSet
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.training.objectives import Objective
from featsharp.training.trainer import Validation
from featsharp.visualization.learned import bias_picture, kernel_picture, middle_range, uncertainty_picture
from featsharp.visualization.panels import panel
from featsharp.visualization.pca import FeaturePCA

# Side of one picture of a panel, and of a mosaic of kernels, in pixels.
CELL = 224
MOSAIC = 4 * CELL


class Sample(NamedTuple):
    """A validation image and its features in normalised space."""

    image: Tensor  # [3, height, width] in [0, 1]
    low_res: Tensor  # [1, C, h, w]
    high_res: Tensor  # [1, C, f*h, f*w]


class ValidationSamples:
    """Scores and pictures of the first images of ``val_data_dir`` by name (of streamed shards: in their order).

    Args:
        data_dir: As ``val_data_dir`` in the configuration; of several sources the first is used.
        count: Number of images.

    Attributes:
        tag: Hash of the images and of the choice of views.
    """

    def __init__(self, data_dir: object, count: int) -> None:
        path = parse_data_dir(data_dir)[0].path
        if isinstance(path, str):
            self.images = [image for _, image in first_images(ShardStream(path), count)]
        else:
            self.images = [image for _, image in ImageSet(path, limit=count)]
        digest = hashlib.sha256(f"{VIEWS} views, seed {SEED}".encode())
        for image in self.images:
            digest.update(f"{image.size}".encode() + image.tobytes())
        self.tag = digest.hexdigest()[:16]

    def __call__(self, encoder: SharpEncoder, objective: Objective) -> Validation:
        """Compute fidelity over the samples (that of area pooling selects the best checkpoint), and draw pictures.

        ``val/features_N`` is a PCA panel of each sample; where there is one, ``val/bias`` is the bias buffer,
        ``val/kernel`` and ``val/kernels`` are kernels of the downsampler, ``val/log_variance`` the uncertainty, whose
        darkest and brightest values are scalars.
        """
        learned = {} if objective.downsampler is None else {"own": objective.downsampler}
        meter = FidelityMeter(encoder, downsamplers=learned)
        pictures: dict[str, Tensor] = {}
        uncertain: list[tuple[Tensor, Tensor]] = []
        for number, image in enumerate(self.images):
            meter.add(image)
            sample = encode_sample(encoder, image)
            pictures[f"val/features_{number}"] = feature_panel(sample)
            if number == 0:
                pictures |= kernel_pictures(objective, sample, encoder.factor)
            if objective.uncertainty is not None:
                uncertain.append((sample.image, log_variance(objective, sample)))
        result = meter.result()
        scalars = {f"val/fidelity_{name}": result[name].value for name in ("area", *learned)}
        scalars["val/cosine"] = result["cosine"].value
        if encoder.bias_buffer is not None and encoder.bias_buffer.buffer.abs().max() > 0:
            pictures["val/bias"] = bias_picture(encoder.bias_buffer.buffer, (CELL, CELL))
        if uncertain:
            low, high = middle_range([values for _, values in uncertain])
            scalars |= {"val/log_variance_low": low, "val/log_variance_high": high}
            pictures["val/log_variance"] = uncertainty_picture(uncertain, (low, high), (CELL, CELL))
        return Validation(result["area"].value, scalars, pictures, self.tag)


@torch.no_grad()
def encode_sample(encoder: SharpEncoder, image: Image) -> Sample:
    """Encode a picture, cropped to the size that fidelity is measured at."""
    crop = image_to_tensor(centre_crop(image, default_eval_size(encoder)))
    whitened = encoder.input_conditioner(crop[None].to(encoder.device))
    out = encoder(whitened, low_res_size=encoder.backbone.input_size)
    return Sample(crop, out.low_res, out.high_res)


def feature_panel(sample: Sample) -> Tensor:
    """Draw image, low-resolution, bilinear and sharp features in a row, in one PCA basis: [3, CELL, 4 * CELL]."""
    colours = FeaturePCA(sample.low_res)
    bilinear = resize(sample.low_res, size_of(sample.high_res))
    maps = [colours(x)[0] for x in (sample.low_res, bilinear, sample.high_res)]
    return panel([sample.image, *maps], (CELL, CELL))


@torch.no_grad()
def kernel_pictures(objective: Objective, sample: Sample, factor: float) -> dict[str, Tensor]:
    """Draw the downsampler's kernel, [3, about CELL, about CELL]; where every token has one, their mean, and all."""
    rows, cols = size_of(sample.low_res)
    whole = math.ceil(factor)  # the objective's maps are this many times as large as the backbone's
    kernels = None
    if objective.downsampler is not None:
        kernels = objective.downsampler.kernels(resize(sample.high_res, (whole * rows, whole * cols)))
    if kernels is None:
        return {}
    pictures = {"val/kernel": kernel_picture(kernels[0].mean((0, 1), keepdim=True), CELL)}
    if kernels[0, ..., 0, 0].numel() > 1:
        pictures["val/kernels"] = kernel_picture(kernels[0], MOSAIC)
    return pictures


@torch.no_grad()
def log_variance(objective: Objective, sample: Sample) -> Tensor:
    """Predict the log variance of every cell of the sharp map, [f*h, f*w] on the CPU."""
    assert objective.uncertainty is not None
    return objective.uncertainty(sample.high_res)[0, 0].float().cpu()
