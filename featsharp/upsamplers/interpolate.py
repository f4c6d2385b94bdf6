"""Upsamplers that learn nothing: the identity and bilinear interpolation, the baselines of every table."""

from torch import Tensor

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box
from featsharp.ops.resize import enlarge, resize
from featsharp.upsamplers.base import GuidedUpsampler
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("identity", "the low-resolution features as they are (factor 1)")
class Identity(GuidedUpsampler):
    """Returns the low-resolution map; with a bias buffer it is a pure de-biaser."""

    needs = "nothing"
    by_parts = True

    def __init__(self, embed_dim: int, factor: int = 1) -> None:
        super().__init__(embed_dim, factor)
        if factor != 1:
            raise ConfigError(f"identity has factor 1; got {factor}. Use 'bilinear' for an untrained factor {factor}")

    def upsample(self, features: Tensor, image: Tensor) -> Tensor:
        return features

    def upsample_part(self, low_res: Tensor, guide: None, tiles: Tensor | None, box: Box) -> Tensor:
        return box.cut(low_res)


@register_upsampler("bilinear", "bilinear interpolation of the low-resolution features")
class Bilinear(GuidedUpsampler):
    """``F.interpolate(features, scale_factor=factor, mode="bilinear", align_corners=False)``."""

    needs = "nothing"
    by_parts = True

    def upsample(self, features: Tensor, image: Tensor) -> Tensor:
        return resize(features, self.high_res_grid(features))

    def upsample_part(self, low_res: Tensor, guide: None, tiles: Tensor | None, box: Box) -> Tensor:
        return enlarge(low_res, self.factor, box)
