"""LayerNorm over the channels of each token, as FeatUp (arXiv 2403.10516) has it.

Shapes: B batch, C channels, (H, W) token grid.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featsharp.normalizers.base import NORMALIZERS, Normalizer


@NORMALIZERS.register("layernorm", "LayerNorm over channels with affine weights, FeatUp's choice; no inverse")
class ChannelLayerNorm(Normalizer):
    """LayerNorm over the channels of each token, with ``weight`` and ``bias`` [C]. Has no inverse."""

    name = "layernorm"
    invertible = False

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        self.weight = nn.Parameter(torch.ones(embed_dim, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(embed_dim, dtype=torch.float32))

    def _normalize(self, features: Tensor) -> Tensor:
        weight, bias = self.weight.to(features.dtype), self.bias.to(features.dtype)
        return F.layer_norm(features.movedim(1, -1), (self.embed_dim,), weight, bias).movedim(-1, 1)
