"""Files of features of a picture, as the sub-commands write them."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.evaluation.features import check_finite
from featsharp.extraction.mapped import MappedFeatures
from featsharp.visualization.panels import compare_maps, save_picture
from featsharp.visualization.pca import FeaturePCA


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

    Args:
        path: Of the PNG.
        image: The picture.
        low_res: [1, C, h, w].
        high_res: [1, n * C, H, W].
        label: Caption of the sharp features, beside their size.

    Raises:
        InputError: For too few features for a PCA.
    """
    picture = compare_maps(image_to_tensor(image), low_res, high_res, FeaturePCA(low_res), label)
    save_picture(picture, path)
