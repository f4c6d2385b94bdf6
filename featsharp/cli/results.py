"""Files of features of a picture, as the sub-commands write them."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.evaluation.features import check_finite
from featsharp.extraction.mapped import MappedFeatures
from featsharp.ops.resize import resize
from featsharp.visualization.panels import panel, save_picture
from featsharp.visualization.pca import FeaturePCA

# Longer side of one picture of the PNG, in pixels.
PICTURE_SIDE = 448


def metadata_of(image: Image.Image) -> dict[str, str]:
    """Make the metadata of a file of features."""
    return {"image_size": f"{image.height}x{image.width}", "layout": "CHW"}


def save_features(path: Path, image: Image.Image, low_res: Tensor, high_res: Tensor) -> None:
    """Write [1, C, h, w] and [1, C, H, W] as low_res [C, h, w] and high_res [C, H, W], float32, safetensors."""
    check_finite(high_res)
    # Copied once, into the file: safetensors ends the process where memory for its own copy lacks.
    with MappedFeatures(path, metadata_of(image)) as file:
        file.allocate(low_res.float(), tuple(high_res.shape), torch.float32).copy_(high_res)


def save_comparison(path: Path, image: Image.Image, low_res: Tensor, high_res: Tensor, label: str) -> None:
    """Write image, low-resolution and sharp features side by side as PNG, in the PCA basis of the first map.

    Of several maps stacked on the channel axis (S2) the last one, of the largest scale, is drawn.

    Args:
        path: Of the PNG.
        image: The picture.
        low_res: [1, C, h, w].
        high_res: [1, n * C, H, W].
        label: Caption of the sharp features, beside their size.

    Raises:
        InputError: For too few features for a PCA.
    """
    scale = PICTURE_SIDE / max(image.size)
    shape = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
    colours = FeaturePCA(low_res)
    photo = resize(image_to_tensor(image)[None], shape)[0]
    # Cells that the picture has no room for are left out first: a map with a cell per pixel may exceed the memory.
    down, right = (max(1, cells // side) for cells, side in zip(high_res.shape[2:], shape, strict=True))
    shown = high_res[:, -low_res.shape[1] :, down // 2 :: down, right // 2 :: right]
    pictures = [photo, colours(low_res)[0], colours(shown)[0]]
    captions = ["image", f"low resolution {size_text(low_res)}", f"{label} {size_text(high_res)}"]
    save_picture(panel(pictures, shape, captions), path)


def size_text(features: Tensor) -> str:
    """Format the size of a map [..., h, w] as ``hxw``."""
    return "x".join(map(str, features.shape[-2:]))
