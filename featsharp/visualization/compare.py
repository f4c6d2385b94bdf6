"""One image through several encoders, drawn in one PCA basis so that colours mean the same in every column."""

from collections.abc import Mapping

import torch
from PIL.Image import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.errors import ConfigError
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.visualization.pca import FeaturePCA


@torch.inference_mode()
def compare_encoders(image: Image, encoders: Mapping[str, SharpEncoder], *, real: bool = False) -> dict[str, Tensor]:
    """Pictures by caption: "image", "low resolution", then one per encoder.

    Args:
        image: RGB picture.
        encoders: By caption, all with one backbone; features are compared in the backbone's own space.
        real: Whether to add "real Nx", the backbone run on the enlarged image, where it takes other sizes than its own.

    Returns:
        RGB pictures [3, h, w] in [0, 1]; feature maps at their own resolution.
    """
    if not encoders:
        raise ConfigError("nothing to compare; give at least one encoder")
    first = next(iter(encoders.values()))
    backbone = first.backbone
    low_res_size = first.native_low_res_size((image.height, image.width))
    factor = max(encoder.factor for encoder in encoders.values())
    size = (round(factor * low_res_size[0]), round(factor * low_res_size[1]))
    pixels = resize(image_to_tensor(image)[None], size)
    whitened = first.input_conditioner(pixels.to(first.device))
    maps = {}
    low_res = backbone(resize(whitened, low_res_size)).features
    if real and backbone.flexible:
        maps[f"real {factor:g}x"] = backbone(resize(whitened, backbone.fit_size(*size))).features
    for caption, encoder in encoders.items():
        out = encoder(whitened, denormalize=encoder.normalizer.invertible, low_res_size=low_res_size)
        # Of several maps (S2) the last one, of the largest scale.
        maps[caption] = out.high_res[:, -encoder.embed_dim :]
    colours = FeaturePCA(low_res)
    return {
        "image": pixels[0],
        "low resolution": colours(low_res)[0],
        **{caption: colours(features)[0] for caption, features in maps.items()},
    }
