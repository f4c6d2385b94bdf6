"""The local filter as its formula reads: a sum over the window of shifted maps. Plain differentiable PyTorch."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from featsharp.ops.windows import border_cells


def forward(weights: Tensor, value: Tensor, border: str) -> Tensor:
    """[B, fH, fW, N, E], one window entry after the other; where a gradient is needed, they are computed again."""
    out = None
    for i in range(weights.shape[4]):
        for j in range(weights.shape[5]):
            if torch.is_grad_enabled():
                entry = checkpoint(_entry, weights, value, i, j, border, use_reentrant=False)
                out = entry if out is None else out + entry
            else:
                entry = _entry(weights, value, i, j, border)
                out = entry if out is None else out.add_(entry)
    assert out is not None
    return out.to(value.dtype)


def _entry(weights: Tensor, value: Tensor, i: int, j: int, border: str) -> Tensor:
    """The term of entry (i, j) of the windows."""
    factor, window = weights.shape[1] // value.shape[1], weights.shape[4]
    rows = torch.arange(weights.shape[1], device=value.device) // factor + i - window // 2
    cols = torch.arange(weights.shape[2], device=value.device) // factor + j - window // 2
    rows, row_real = border_cells(rows, value.shape[1], border, window)
    cols, col_real = border_cells(cols, value.shape[2], border, window)
    real = (row_real[:, None] & col_real)[..., None, None]
    compute = torch.promote_types(value.dtype, torch.float32)
    return (weights[..., i, j, None].to(compute) * real) * value[:, rows[:, None], cols].to(compute)
