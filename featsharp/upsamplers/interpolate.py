"""Upsamplers without parameters: the identity and bilinear interpolation, the baselines of every table."""

from torch import Tensor

from featsharp.ops.resize import enlarge
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("identity", "the low-resolution features as they are (factor 1)")
class Identity(ChunkedGuidedUpsampler):
    """The low-resolution map itself; with a bias buffer it is a pure de-biaser."""

    factors = "one"
    needs = "nothing"

    def __init__(self, embed_dim: int, factor: float = 1) -> None:
        super().__init__(embed_dim, factor)

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        return lambda box: low_res if box.covers(size) else box.cut(low_res)


@register_upsampler("bilinear", "bilinear interpolation of the low-resolution features")
class Bilinear(ChunkedGuidedUpsampler):
    """``F.interpolate(features, size, mode="bilinear", align_corners=False)``."""

    needs = "nothing"

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        return lambda box: enlarge(low_res, size, box)
