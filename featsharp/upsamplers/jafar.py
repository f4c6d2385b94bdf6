"""JAFAR: every high-resolution cell attends to the low-resolution features, guided by the image.

JAFAR (arXiv 2506.11136). Queries are computed from the image at the output's grid, keys from the image and the features
at the low-resolution grid; the values are the raw features, so the output stays in their convex hull. The branch beside
tiles in the published FeatSharp configurations. Projections of the original that never reach the output are left out.

Queries and keys are normalised (RMS) before their projections; that order, the epsilon of the normalisation (that of
the dtype) and the padding of the 3 x 3 query convolution are not stated in the paper and could not be checked against
the authors' results.

Shapes: B images, C channels, (h, w) low-resolution grid, (H, W) output grid, d = 128 query and key channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.layers.cross_attention import (
    DIM,
    GROUPS,
    AxialRope,
    PaddedConv2d,
    Padding,
    RMSNorm,
    attend_in_chunks,
    build_encoder,
)
from featsharp.layers.guidance import check_guidance_scale, shrink_guidance
from featsharp.ops.boxes import Box
from featsharp.ops.resize import average, size_of
from featsharp.upsamplers.base import check_whole
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler, ComputeChunk
from featsharp.upsamplers.registration import register_upsampler


@register_upsampler("jafar", "JAFAR: global cross-attention from image queries to the low-resolution features")
class JAFAR(ChunkedGuidedUpsampler):
    """Cross-attention upsampling with raw features as values.

    Under a limit on memory only the attention works in chunks: the encoder of the image normalises over all of it, and
    needs several times the memory of the output.

    Args:
        embed_dim: Channels C.
        factor: In each direction.
        image_kernel: Side of the first convolution on the image, odd: 3 in FeatSharp's copy, 1 in the published JAFAR.
        guidance_scale: An image larger than this many times the output grid is shrunk to that before it is encoded,
            which bounds memory: 2 in FeatSharp's copy; None takes it as it is, as the published JAFAR does.
        query_padding: Of the 3 x 3 convolution of the queries, "zeros" or "reflect".
    """

    trainable = True
    needs = "image"
    paper = "JAFAR, arXiv 2506.11136"
    options = ("image_kernel", "guidance_scale", "query_padding")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        image_kernel: int = 3,
        guidance_scale: float | None = 2.0,
        query_padding: Padding = "zeros",
    ) -> None:
        super().__init__(embed_dim, factor)
        if check_whole("image_kernel", image_kernel, 1) % 2 == 0:
            raise ConfigError(f"image_kernel must be odd; got {image_kernel}, use 1 (published JAFAR) or 3 (FeatSharp)")
        self.guidance_scale = check_guidance_scale(guidance_scale)
        self.image_encoder = build_encoder(3, kernel_size=image_kernel)
        self.rope = AxialRope()
        self.query_encoder = build_encoder(DIM)
        self.query_conv = PaddedConv2d(DIM, DIM, 3, query_padding)
        self.key_encoder = build_encoder(DIM)
        self.feature_encoder = build_encoder(embed_dim)
        self.gamma, self.beta = (nn.Conv2d(DIM, DIM, 1, bias=False) for _ in range(2))
        self.query_norm, self.key_norm = (RMSNorm(DIM) for _ in range(2))
        self.query_proj, self.key_proj = (nn.Linear(DIM, DIM) for _ in range(2))

    def prepare_chunks(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> ComputeChunk:
        query, key = self.project(low_res, image, size)
        value = low_res.flatten(2).transpose(1, 2)

        def compute(box: Box) -> Tensor:
            out = attend_in_chunks(box.cut_channels_last(query).flatten(1, 2), key, value)
            return out.transpose(1, 2).unflatten(2, box.size)

        return compute

    def project(self, low_res: Tensor, image: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Compute queries [B, H, W, d] and keys [B, h w, d]; group normalisation needs the whole image."""
        encoded = self.rope(self.image_encoder(shrink_guidance(image, size, self.guidance_scale)))
        query = F.group_norm(average(self.query_encoder(encoded), size), GROUPS)
        query = self.query_conv(query)
        key = F.group_norm(average(self.key_encoder(encoded), size_of(low_res)), GROUPS)
        # In float32: the epsilon of normalize is zero in float16.
        modulation = self.feature_encoder(F.normalize(low_res.float(), dim=1).to(low_res.dtype))
        key = self.gamma(modulation) * key + self.beta(modulation)
        # Autocast leaves normalisation alone, which has no fused kernel for two dtypes.
        dtype = self.query_norm.weight.dtype
        query = self.query_proj(self.query_norm(query.permute(0, 2, 3, 1).to(dtype)))
        return query, self.key_proj(self.key_norm(key.flatten(2).transpose(1, 2).to(dtype)))
