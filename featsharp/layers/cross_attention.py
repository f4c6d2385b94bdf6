"""Cross-attention from an encoded image to low-resolution features, the core of JAFAR and AnyUp.

JAFAR: arXiv 2506.11136, AnyUp: arXiv 2510.12764. Shapes: d = 128 channels of queries and keys, 4 heads
whose attention weights are averaged, so that values stay raw features.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featsharp.errors import ConfigError
from featsharp.ops.padding import pad_border
from featsharp.ops.recording import is_tracing, split_length
from featsharp.ops.resize import size_of

DIM = 128
NUM_HEADS = 4
GROUPS = 8
# Scores that are held at once: 64 MiB in float32.
MAX_SCORES = 2**24

Padding = Literal["reflect", "zeros"]


class AxialRope(nn.Module):
    """Rotary position embedding of a map [B, d, H, W] with learned frequencies.

    Convention:
        Coordinates run from 0 to 1 over the cells, both ends included; the first half of the channels rotates with the
        row, the second with the column, and channel i is paired with channel i + d / 2 as in the original.
    """

    def __init__(self) -> None:
        super().__init__()
        frequencies = 2 * math.pi * 100 ** torch.linspace(0, -1, DIM // 4)
        half = torch.cat([frequencies, frequencies])
        self.frequencies = nn.Parameter(
            torch.stack([torch.cat([half, torch.zeros_like(half)]), torch.cat([torch.zeros_like(half), half])])
        )

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        rows = _unit_steps(height, x.device)[:, None, None] * self.frequencies[0].float()
        cols = _unit_steps(width, x.device)[None, :, None] * self.frequencies[1].float()
        return rotate_halves(x, (rows + cols).permute(2, 0, 1)).to(x.dtype)


def rotate_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate channel i of [..., d, H, W] with channel i + d / 2 by an ``angle`` [d, H, W], in the wider type."""
    first, second = x.chunk(2, -3)
    rotated = torch.cat([-second, first], -3)
    return x * angle.cos() + rotated * angle.sin()


def _unit_steps(count: int, device: torch.device) -> Tensor:
    """So many steps from 0 to 1."""
    if torch.compiler.is_compiling():  # linspace would fix their number in a graph; it rounds in another way
        return torch.arange(count, dtype=torch.float32, device=device) / max(count - 1, 1)
    return torch.linspace(0, 1, count, dtype=torch.float32, device=device)


def build_encoder(channels: int, *, kernel_size: int = 1) -> nn.Sequential:
    """Build an encoder of maps [B, channels, H, W] to [B, d, H, W]: a convolution and two residual blocks."""
    return nn.Sequential(PaddedConv2d(channels, DIM, kernel_size), _ResidualBlock(), _ResidualBlock())


class PaddedConv2d(nn.Conv2d):
    """A convolution that keeps the size; beyond the border the map is mirrored, or zeros."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: Padding = "reflect",
        *,
        bias: bool = False,
    ) -> None:
        if padding not in ("reflect", "zeros"):
            raise ConfigError(f"unknown query_padding {padding!r}; use 'reflect' or 'zeros'")
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, padding_mode=padding, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        side = self.kernel_size[0] // 2
        # A map that is too small to be mirrored gets zeros.
        if self.padding_mode == "reflect" and 0 < side < min(size_of(x)):
            return F.conv2d(pad_border(x, (side,) * 4, "reflect"), self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, padding=side)


class RMSNorm(nn.RMSNorm):
    """Division by the root mean square over the last axis, with a weight."""

    def forward(self, x: Tensor) -> Tensor:
        if is_tracing():  # ONNX has no operator for it
            return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt() * self.weight
        return super().forward(x)


class _ResidualBlock(nn.Module):
    """x + Conv1x1(SiLU(GN(Conv1x1(SiLU(GN(x))))))."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            GroupNorm(GROUPS, DIM), nn.SiLU(), nn.Conv2d(DIM, DIM, 1, bias=False),
            GroupNorm(GROUPS, DIM), nn.SiLU(), nn.Conv2d(DIM, DIM, 1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class GroupNorm(nn.GroupNorm):
    """A group norm that takes maps more precise than its weights; the result has the type of the weights."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize <= self.weight.dtype.itemsize:
            return super().forward(x)
        out = F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return out.to(self.weight.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attend with weights that are averaged over heads.

    Args:
        query: [B, Q, d].
        key: [B, K, d].
        value: [B, K, C].
        allowed: [Q, K], True where a query sees a key, at least one each; None: it sees all.

    Returns:
        [B, Q, C] in the dtype of ``value``.
    """
    query, key = (x.unflatten(-1, (NUM_HEADS, -1)).transpose(1, 2) for x in (query, key))
    scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    return scores.softmax(-1).mean(1).to(value.dtype) @ value


def attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, *, max_scores: int = MAX_SCORES) -> Tensor:
    """:func:`attend` of all queries to all keys, with at most ``max_scores`` scores (or one query's) held at once."""
    pieces = split_length(query.shape[1], query.shape[0], NUM_HEADS * key.shape[1], max_scores)
    if len(pieces) == 1:
        return attend(query, key, value)
    return torch.cat([recompute(attend, query[:, piece], key, value) for piece in pieces], 1)


def recompute(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Compute ``function(*arguments)``, and again in a backward pass instead of holding intermediate results."""
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False)
