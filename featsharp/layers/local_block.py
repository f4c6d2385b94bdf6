"""The FeatSharp block: local attention and SwiGLU over concatenated maps, of which the first C channels are kept.

    x1  = x + gamma1 * Attention(LN(x))         x: [B, H, W, D], D channels in
    out = x1[..., :C] + gamma2 * SwiGLU(LN(x1)) out: [B, H, W, C]

FeatSharp (arXiv 2502.16025), figure 2. 16 heads with a 7 x 7 window clipped at the borders and an ALiBi-like bias: even
heads are penalised by row distance, odd ones by column distance, with slopes 1/2, 1/4 ... 1/256 for each pair.
Rotary embeddings can take the place of that bias, an option of the published code: RoPE (arXiv 2104.09864), xPos (arXiv
2212.10554).
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.ops.local_attention import local_attention
from featsharp.ops.recording import is_recording
from featsharp.ops.windows import check_window

NUM_HEADS = 16
# Cells that are processed at a time where no gradient is needed: 350 MiB for ViT-S. But not fewer than so many rows:
# those at the edges of a chunk are computed twice.
CHUNK_CELLS, MIN_CHUNK_ROWS = 2**14, 16
ROPE_BASE, XPOS_BASE = 50000.0, 512.0

# Position encoding of keys: a bias on the scores, a rotation of queries and keys, or none.
Position = Literal["alibi", "rope", "xpos", "none"]


class LocalBlock(nn.Module):
    """One pre-norm block from ``in_dim`` to ``out_dim`` channels, channels last.

    Args:
        in_dim: D, channels of the concatenated maps; a multiple of 16.
        out_dim: C <= D, channels kept.
        window: Side of the attention window, odd.
        published_widths: Pad the head dim to a power of two and use a SwiGLU of 8 C, as the published code does,
            instead of the exact head dim and 4 C (before the usual factor 2/3).
        layer_norm: Whether the inputs of attention and SwiGLU are normalised.
        attention, mlp: Whether the block has attention and SwiGLU; at least one.
        position: See :data:`Position`.
        layer_scale: Start value of gamma1 and gamma2; None for a block without them.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        window: int = 7,
        layer_norm: bool = True,
        published_widths: bool = False,
        attention: bool = True,
        mlp: bool = True,
        position: Position = "alibi",
        layer_scale: float | None = 0.1,
    ) -> None:
        super().__init__()
        if not (attention or mlp):
            raise ConfigError("a local block needs attention or SwiGLU; without both it would be a linear layer")
        self.out_dim = out_dim
        # Without SwiGLU, attention need not compute channels that are cut off.
        attended_dim = in_dim if mlp else out_dim
        # The published code doubles the SwiGLU by mistake, but only beside attention.
        hidden = 4 * in_dim if published_widths and attention else 4 * out_dim
        self.attention = self.mlp = self.scale1 = self.scale2 = None
        if attention:
            self.norm1 = nn.LayerNorm(in_dim) if layer_norm else nn.Identity()
            self.attention = LocalSelfAttention(
                in_dim, attended_dim, window=window, pad_heads=published_widths, position=position
            )
            if layer_scale is not None:
                self.scale1 = nn.Parameter(torch.full((attended_dim,), layer_scale))
        if mlp:
            self.norm2 = nn.LayerNorm(in_dim) if layer_norm else nn.Identity()
            self.mlp = SwiGLU(in_dim, swiglu_width(hidden), out_dim)
            if layer_scale is not None:
                self.scale2 = nn.Parameter(torch.full((out_dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, D] to [B, H, W, C]; without gradients, large maps are processed in chunks of rows."""
        batch, height, width, _ = x.shape
        if not (torch.compiler.is_compiling() or is_recording() or self._needs_grad(x)):
            rows = max(MIN_CHUNK_ROWS, CHUNK_CELLS // (batch * width))
            if height > rows:
                return self.compute_rows(x, rows)
        return self.compute_chunk(x, whole((height, width)))

    def compute_rows(self, x: Tensor, rows: int) -> Tensor:
        """As :meth:`forward`, ``rows`` rows of the result at a time."""
        batch, height, width, _ = x.shape
        out = None
        for start in range(0, height, rows):
            box = Box(start, min(height, start + rows), 0, width)
            seen = box.grow(self.halo, (height, width))
            chunk = self.compute_chunk(seen.cut_channels_last(x), box.relative_to(seen))
            if out is None:
                out = chunk.new_empty(batch, height, width, self.out_dim)
            out[:, box.top : box.bottom] = chunk
        assert out is not None
        return out

    @property
    def halo(self) -> int:
        """Number of cells in each direction that a cell of the result depends on."""
        return 0 if self.attention is None else self.attention.window // 2

    def compute_chunk(self, x: Tensor, box: Box) -> Tensor:
        """Compute the cells ``box`` of the result for [B, H, W, D]: [B, *box.size, C]."""
        out = box.cut_channels_last(x)
        if self.attention is not None:
            attended = _gated(self.attention(self.norm1(x), box), self.scale1)
            out = out[..., : attended.shape[-1]] + attended
        if self.mlp is not None:
            out = out[..., : self.out_dim] + _gated(self.mlp(self.norm2(out)), self.scale2)
        return out

    def _needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))


class LocalSelfAttention(nn.Module):
    """Multi-head self-attention over a clipped window, from ``dim`` to ``out_dim`` channels (None: the same).

    ``pad_heads`` rounds the projected head dim up to a power of two; the score scale and the output keep the true head
    dim, so part of the value rows is unused, as in the published weights.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        window: int = 7,
        pad_heads: bool = False,
        position: Position = "alibi",
    ) -> None:
        super().__init__()
        check_window(window)
        if position not in get_args(Position):
            raise ConfigError(f"unknown position {position!r}; use {' or '.join(map(repr, get_args(Position)))}")
        if dim % NUM_HEADS:
            raise ConfigError(
                f"local attention has {NUM_HEADS} heads and needs a multiple of {NUM_HEADS} channels; got {dim}"
            )
        self.window = window
        self.head_dim = dim // NUM_HEADS
        self.padded_dim = 1 << (self.head_dim - 1).bit_length() if pad_heads else self.head_dim
        self.qkv = StackedLinear(dim, NUM_HEADS * self.padded_dim, 3, bias=False)
        self.proj = nn.Linear(dim, out_dim or dim)
        self.position = position

    def forward(self, x: Tensor, box: Box | None = None) -> Tensor:
        """[B, H, W, D] to [B, H, W, out_dim], or to the cells ``box`` of it."""
        qkv = self.qkv(x).unflatten(-1, (3, NUM_HEADS, self.padded_dim))
        query, key, value = qkv.unbind(3)
        if self.position in ("rope", "xpos"):
            decay = self.position == "xpos"
            query, key = rotate(query, 1 if decay else 0), rotate(key, -1 if decay else 0)
        out = local_attention(
            query,
            key,
            value[..., : self.head_dim],
            window=self.window,
            bias=distance_bias(self.window, x.device) if self.position == "alibi" else None,
            scale=self.head_dim**-0.5,
            border="clip",
        )
        return self.proj((out if box is None else box.cut_channels_last(out)).flatten(3))

    def extra_repr(self) -> str:
        return (
            f"window={self.window}, head_dim={self.head_dim}, padded_dim={self.padded_dim}, position={self.position!r}"
        )


class SwiGLU(nn.Module):
    """Linear(D -> 2 h), SiLU of one half times the other, Linear(h -> C)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.gate_up = StackedLinear(in_dim, hidden_dim, 2)
        self.down = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class StackedLinear(nn.Linear):
    """Several linear layers of the same input, computed as one; each has a learned spectral norm."""

    def __init__(self, in_dim: int, out_dim: int, parts: int, *, bias: bool = True) -> None:
        super().__init__(in_dim, parts * out_dim, bias=bias)
        self.spectral_parts = parts


def swiglu_width(hidden_dim: int) -> int:
    """Two thirds of the width asked for, rounded up to a multiple of 8."""
    return 8 * -(-int(hidden_dim * 2 / 3) // 8)


def distance_bias(window: int, device: torch.device | None = None) -> Tensor:
    """[16, K, K] float32: minus slope times row distance (even heads) or column distance (odd heads)."""
    distance = (torch.arange(window, device=device) - window // 2).abs().float().expand(window, window)
    slopes = 2.0 ** -(torch.arange(NUM_HEADS, device=device) // 2 + 1).float()
    return -slopes[:, None, None] * torch.stack([distance.T, distance]).repeat(NUM_HEADS // 2, 1, 1)


def rotate(x: Tensor, decay: int = 0) -> Tensor:
    """Rotate queries or keys by their position, so that products of two depend on their distance only.

    The N * P channels are taken together: the first half rotates with the row, the second with the column, neighbouring
    channels are pairs, frequencies fall from 1 to 1 / 50000.

    Args:
        x: [B, H, W, N, P].
        decay: xPos: 1 for queries and -1 for keys makes products of distant ones fade on one side and grow on the
            other; 0 for none.
    """
    by_row, by_col = x.flatten(3).float().chunk(2, -1)
    by_row = _rotate_along(by_row.transpose(1, 2), decay).transpose(1, 2)
    rotated = torch.cat([by_row, _rotate_along(by_col, decay)], -1)
    return rotated.to(x.dtype).unflatten(3, x.shape[3:])


def _rotate_along(x: Tensor, decay: int) -> Tensor:
    """Rotate [..., L, E], E even, by the position along L, counted from the middle, where xPos is neutral."""
    length, channels = x.shape[-2:]
    position = torch.arange(length, dtype=torch.float32, device=x.device) - length // 2
    channel = torch.arange(0, channels, 2, dtype=torch.float32, device=x.device) / channels
    angle = position[:, None] * ROPE_BASE**-channel
    fade = ((channel + 0.4) / 1.4) ** (decay * position[:, None] / XPOS_BASE)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = fade * angle.cos(), fade * angle.sin()
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


def _gated(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else scale * x
