"""The bias buffer: a learned map that cancels the fixed pattern which position embeddings leave in the features.

FeatSharp (arXiv 2502.16025), figure 11. It is added, in normalised space, to all features of the backbone: the
low-resolution map, every tile and every training target.
"""

import torch
from torch import Tensor, nn

from featsharp.ops.resize import resize, size_of


class BiasBuffer(nn.Module):
    """Learned [1, C, h, w] map, zero at the start, that is resized to the grid of the features and added to them.

    Its grid is that of the backbone's native size. Its spatial mean is subtracted: a constant would cancel in training,
    between prediction and target, and only shift the output.
    """

    def __init__(self, embed_dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.buffer = nn.Parameter(torch.zeros(1, embed_dim, *grid, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """[B, C, h, w] to the same shape and dtype."""
        return features + self.at(size_of(features)).to(features.dtype)

    def at(self, grid: tuple[int, int]) -> Tensor:
        """Resize the map to a grid of (h, w) tokens: [1, C, h, w]."""
        return resize(self.buffer - self.buffer.mean((2, 3), keepdim=True), grid)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.buffer.shape)}"
