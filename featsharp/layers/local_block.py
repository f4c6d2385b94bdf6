"""The FeatSharp block: local attention and SwiGLU over concatenated maps, of which the first C channels are kept.

    x1  = x + gamma1 * Attention(LN(x))         x: [B, H, W, D], D channels in
    out = x1[..., :C] + gamma2 * SwiGLU(LN(x1)) out: [B, H, W, C]

FeatSharp (arXiv 2502.16025), figure 2. 16 heads with a 7 x 7 window clipped at the borders and an ALiBi-like bias: even
heads are penalised by row distance, odd ones by column distance, with slopes 1/2, 1/4 ... 1/256 for each pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box, whole
from featsharp.ops.local_attention import local_attention
from featsharp.ops.windows import check_window

NUM_HEADS = 16
# Cells that are processed at a time where no gradient is needed: 350 MiB for ViT-S. But not fewer than so many rows:
# those at the edges of a band are computed twice.
BAND_CELLS, MIN_BAND_ROWS = 2**14, 16


class LocalBlock(nn.Module):
    """One pre-norm block from ``in_dim`` to ``out_dim`` channels, channels last.

    Args:
        in_dim: D, channels of the concatenated maps; a multiple of 16.
        out_dim: C <= D, channels kept.
        window: Side of the attention window, odd.
        published_widths: Pad the head dim to a power of two and use a SwiGLU of 8 C, as the published code does,
            instead of the exact head dim and 4 C (before the usual factor 2/3).
        layer_norm: Whether the inputs of attention and SwiGLU are normalised.
        layer_scale: Start value of gamma1 and gamma2.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        window: int = 7,
        layer_norm: bool = True,
        published_widths: bool = False,
        layer_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.norm1 = nn.LayerNorm(in_dim) if layer_norm else nn.Identity()
        self.attention = LocalSelfAttention(in_dim, window=window, pad_heads=published_widths)
        self.scale1 = nn.Parameter(torch.full((in_dim,), layer_scale))
        self.norm2 = nn.LayerNorm(in_dim) if layer_norm else nn.Identity()
        self.mlp = SwiGLU(in_dim, swiglu_width(4 * in_dim if published_widths else 4 * out_dim), out_dim)
        self.scale2 = nn.Parameter(torch.full((out_dim,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, D] to [B, H, W, C]; without gradients, large maps are processed in bands of rows."""
        batch, height, width, _ = x.shape
        rows = max(MIN_BAND_ROWS, BAND_CELLS // (batch * width))
        if height <= rows or torch.compiler.is_compiling() or self._needs_grad(x):
            return self.part(x, whole((height, width)))
        out = None
        for start in range(0, height, rows):
            box = Box(start, min(height, start + rows), 0, width)
            seen = box.grow(self.halo, (height, width))
            band = self.part(seen.cut_channels_last(x), box.relative_to(seen))
            if out is None:
                out = band.new_empty(batch, height, width, self.out_dim)
            out[:, box.top : box.bottom] = band
        assert out is not None
        return out

    @property
    def halo(self) -> int:
        """How many cells around it, in each direction, a cell of the result depends on."""
        return self.attention.window // 2

    def part(self, x: Tensor, box: Box) -> Tensor:
        """The cells ``box`` of the result for [B, H, W, D]: [B, *box.size, C]."""
        attended = self.attention(self.norm1(x), box)
        x = box.cut_channels_last(x) + self.scale1 * attended
        return x[..., : self.out_dim] + self.scale2 * self.mlp(self.norm2(x))

    def _needs_grad(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))


class LocalSelfAttention(nn.Module):
    """Multi-head self-attention over a clipped window with a fixed distance bias.

    ``pad_heads`` rounds the projected head dim up to a power of two; the score scale and the output keep the true head
    dim, so part of the value rows is unused, as in the published weights.
    """

    bias: Tensor

    def __init__(self, dim: int, *, window: int = 7, pad_heads: bool = False) -> None:
        super().__init__()
        check_window(window)
        if dim % NUM_HEADS:
            raise ConfigError(
                f"local attention has {NUM_HEADS} heads and needs a multiple of {NUM_HEADS} channels; got {dim}"
            )
        self.window = window
        self.head_dim = dim // NUM_HEADS
        self.padded_dim = 1 << (self.head_dim - 1).bit_length() if pad_heads else self.head_dim
        self.qkv = StackedLinear(dim, NUM_HEADS * self.padded_dim, 3, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.register_buffer("bias", distance_bias(window), persistent=False)

    def forward(self, x: Tensor, box: Box | None = None) -> Tensor:
        """[B, H, W, D] to the same shape, or to the cells ``box`` of it."""
        qkv = self.qkv(x).unflatten(-1, (3, NUM_HEADS, self.padded_dim))
        query, key, value = qkv.unbind(3)
        out = local_attention(
            query,
            key,
            value[..., : self.head_dim],
            window=self.window,
            bias=self.bias,
            scale=self.head_dim**-0.5,
            border="clip",
        )
        return self.proj((out if box is None else box.cut_channels_last(out)).flatten(3))

    def extra_repr(self) -> str:
        return f"window={self.window}, head_dim={self.head_dim}, padded_dim={self.padded_dim}"


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
    """Several linear layers of the same input, computed as one; their spectral norms are learned one by one."""

    def __init__(self, in_dim: int, out_dim: int, parts: int, *, bias: bool = True) -> None:
        super().__init__(in_dim, parts * out_dim, bias=bias)
        self.spectral_parts = parts


def swiglu_width(hidden_dim: int) -> int:
    """Two thirds of the width asked for, rounded up to a multiple of 8."""
    return 8 * -(-int(hidden_dim * 2 / 3) // 8)


def distance_bias(window: int) -> Tensor:
    """[16, K, K]: minus slope times row distance (even heads) or column distance (odd heads)."""
    offset = (torch.arange(window) - window // 2).abs().float()
    slopes = 2.0 ** -(torch.arange(NUM_HEADS) // 2 + 1).float()
    by_row, by_col = offset[:, None].expand(window, window), offset[None].expand(window, window)
    return torch.stack([-slope * (by_col if head % 2 else by_row) for head, slope in enumerate(slopes)])
