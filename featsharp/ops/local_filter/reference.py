"""The local filter as its formula reads: a sum over the window of shifted maps. Plain differentiable PyTorch."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from featsharp.ops.windows import border_cells


def forward(weights: Tensor, value: Tensor, border: str) -> Tensor:
    """[B, fH, fW, N, E], one window entry after the other; where a gradient is needed, they are computed again."""
    compute = torch.promote_types(value.dtype, torch.float32)
    out = weights.new_zeros(*weights.shape[:4], value.shape[4], dtype=compute)
    for i in range(weights.shape[4]):
        for j in range(weights.shape[5]):
            if torch.is_grad_enabled():
                out = out + checkpoint(_entry, weights, value, i, j, border, use_reentrant=False)
            else:
                out += _entry(weights, value, i, j, border)
    return out.to(value.dtype)


def _entry(weights: Tensor, value: Tensor, i: int, j: int, border: str) -> Tensor:
    """The term of entry (i, j) of the windows."""
    factor, halo = weights.shape[1] // value.shape[1], weights.shape[4] // 2
    rows = torch.arange(weights.shape[1], device=value.device) // factor + i - halo
    cols = torch.arange(weights.shape[2], device=value.device) // factor + j - halo
    rows, row_real = border_cells(rows, value.shape[1], border)
    cols, col_real = border_cells(cols, value.shape[2], border)
    real = (row_real[:, None] & col_real)[..., None, None]
    compute = torch.promote_types(value.dtype, torch.float32)
    return (weights[..., i, j, None].to(compute) * real) * value[:, rows[:, None], cols].to(compute)
