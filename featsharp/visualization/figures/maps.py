"""What figures of feature maps draw: one image through several encoders of one backbone."""

from collections.abc import Mapping

import torch
from PIL.Image import Image
from torch import Tensor, nn

from featsharp.data.images import image_to_tensor
from featsharp.errors import ConfigError
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize

LOW_RES = "low resolution"


@torch.inference_mode()
def feature_maps(
    image: Image, encoders: Mapping[str, SharpEncoder], *, real: bool = False, factor: float | None = None
) -> dict[str, Tensor]:
    """Feature maps of one image by caption, all in one space: low resolution, real, then the encoders.

    The space is the backbone's own, or that of the first encoder whose normalizer has no inverse (LayerNorm).

    All encoders share the low-resolution pass, which has the image's aspect ratio and about the area of the backbone's
    native size (exactly that size for a backbone that takes no other), and see the image at the largest factor.

    Args:
        image: RGB picture.
        encoders: By caption, all with one backbone.
        real: Whether to add "real Nx": the backbone itself on the enlarged image. Left out where it takes one size.
        factor: Of the enlarged image; None: the largest of the encoders.

    Returns:
        [1, C, h, w] each, float32, at their own resolution.

    Raises:
        ConfigError: For no encoders.
    """
    if not encoders:
        raise ConfigError("nothing to draw; give at least one encoder")
    first = next(iter(encoders.values()))
    backbone = first.backbone
    factor = factor or max(encoder.factor for encoder in encoders.values())
    low_res_size = first.native_low_res_size((image.height, image.width))
    size = (round(factor * low_res_size[0]), round(factor * low_res_size[1]))
    whitened = first.input_conditioner(resize(image_to_tensor(image)[None], size).to(first.device))
    to_space = next((e.normalizer for e in encoders.values() if not e.normalizer.invertible), nn.Identity())
    maps = {LOW_RES: to_space(backbone(resize(whitened, low_res_size)).features.float())}
    if real and backbone.flexible:
        enlarged = resize(whitened, backbone.fit_size(*size))
        maps[real_caption(factor)] = to_space(backbone(enlarged).features.float())
    for caption, encoder in encoders.items():
        invertible = encoder.normalizer.invertible
        out = encoder(whitened, denormalize=invertible, low_res_size=low_res_size)
        # Of several maps (S2) the last one, of the largest scale.
        features = out.high_res[:, -encoder.embed_dim :].float()
        maps[caption] = to_space(features) if invertible else features
    return maps


def real_caption(factor: float) -> str:
    """What the map of the backbone itself on the enlarged image is called."""
    return f"real {factor:g}x"
