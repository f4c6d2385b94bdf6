"""Upsamplers that learn nothing: the identity and bilinear interpolation, the baselines of every table."""

from torch import Tensor

from featsharp.ops.boxes import Box
from featsharp.ops.resize import enlarge, resize
from featsharp.upsamplers.base import GuidedUpsampler
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("identity", "the low-resolution features as they are (factor 1)")
class Identity(GuidedUpsampler):
    """Returns the low-resolution map; with a bias buffer it is a pure de-biaser."""

    factors = "one"
    needs = "nothing"
    by_parts = True

    def __init__(self, embed_dim: int, factor: float = 1) -> None:
        super().__init__(embed_dim, factor)

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return features

    def upsample_part(
        self, low_res: Tensor, guide: None, tiles: Tensor | None, box: Box, size: tuple[int, int]
    ) -> Tensor:
        return box.cut(low_res)


@register_upsampler("bilinear", "bilinear interpolation of the low-resolution features")
class Bilinear(GuidedUpsampler):
    """``F.interpolate(features, size, mode="bilinear", align_corners=False)``."""

    needs = "nothing"
    by_parts = True

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return resize(features, size)

    def upsample_part(
        self, low_res: Tensor, guide: None, tiles: Tensor | None, box: Box, size: tuple[int, int]
    ) -> Tensor:
        return enlarge(low_res, size, box)
