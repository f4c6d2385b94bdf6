"""Files of features of a picture, as the sub-commands write them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.evaluation.features import check_finite
from featsharp.extraction.mapped import MappedFeatures
from featsharp.visualization.panels import compare_maps, save_picture
from featsharp.visualization.pca import FeaturePCA
from featsharp.visualization.similarity import cosine_map, similarity_picture


def metadata_of(image: Image.Image) -> dict[str, str]:
    """Make the metadata of a file of features."""
    return {"image_size": f"{image.height}x{image.width}", "layout": "CHW"}


def save_features(path: Path, image: Image.Image, low_res: Tensor, high_res: Tensor) -> None:
    """Write [1, C, h, w] and [1, C, H, W] as low_res [C, h, w] and high_res [C, H, W], float32, safetensors."""
    check_finite(high_res)
    # Copied once, into the file: safetensors ends the process where memory for its own copy lacks.
    with MappedFeatures(path, metadata_of(image)) as file:
        file.allocate(low_res.float(), tuple(high_res.shape), torch.float32).copy_(high_res)


def save_comparison(
    path: Path,
    image: Image.Image,
    low_res: Tensor,
    high_res: Tensor,
    label: str,
    texts: Mapping[str, Tensor] | None = None,
) -> None:
    """Write image, low-resolution and sharp features side by side as PNG, in the PCA basis of the first map.

    A row for each text shows how similar both are to it, from the least to the most similar low-resolution feature.

    Args:
        path: Of the PNG.
        image: The picture.
        low_res: [1, C, h, w].
        high_res: [1, n * C, H, W].
        label: Caption of the sharp features, beside their size.
        texts: Embeddings [C] of texts in the space of the features.

    Raises:
        InputError: For too few features for a PCA.
    """
    photo = image_to_tensor(image)
    rows = [compare_maps(photo, low_res, high_res, FeaturePCA(low_res), label)]
    for text, vector in (texts or {}).items():
        at_low_res = cosine_map(low_res, vector[None])
        least, most = at_low_res.min().item(), at_low_res.max().item()

        def colour(features: Tensor, vector: Tensor = vector, limits: tuple[float, float] = (least, most)) -> Tensor:
            return similarity_picture(cosine_map(features, vector[None])[0, 0], limits)[None]

        rows.append(compare_maps(photo, low_res, high_res, colour, label, f"{text} ({least:.2f} to {most:.2f})"))
    save_picture(torch.cat(rows, 1), path)
