"""Local attention as its formula reads: gather every query's window, softmax, sum. Plain differentiable PyTorch."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from featsharp.device import without_autocast
from featsharp.ops.blocks import chunk_numbers
from featsharp.ops.recording import split_length
from featsharp.ops.windows import border_cells

# Numbers that one chunk of query rows may gather: 64 MiB in float32.
CHUNK_NUMBERS = 2**24


def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> Tensor:
    """[B, fH, fW, N or 1, E], chunk by chunk; where a gradient is needed, chunks are recomputed instead of kept."""
    chunks = []
    with without_autocast(value):  # sums are float32 whatever is around
        for rows in _chunks(query, value, window):
            arguments = (query[:, rows], key, value, bias, window, border, rows.start)
            chunks.append(
                checkpoint(attend, *arguments, use_reentrant=False) if torch.is_grad_enabled() else attend(*arguments)
            )
    return torch.cat(chunks, 1)


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str, first_row: int = 0
) -> Tensor:
    """Attend from R rows of queries, the first of which is ``first_row``: [B, R, fW, N or 1, E]."""
    factor = query.shape[2] // key.shape[2]
    offset = torch.arange(window, device=query.device) - window // 2
    rows = (first_row + torch.arange(query.shape[1], device=query.device)) // factor
    cols = torch.arange(query.shape[2], device=query.device) // factor
    rows, row_counts = border_cells(rows[:, None] + offset, key.shape[1], border, window)
    cols, col_counts = border_cells(cols[:, None] + offset, key.shape[2], border, window)
    counts = row_counts[:, None, :, None] & col_counts[None, :, None, :]  # [R, fW, K, K]

    compute = torch.promote_types(value.dtype, torch.float32)
    # [B, R, fW, K, K, N, D and E]
    keys = key[:, rows[:, None, :, None], cols[None, :, None, :]].to(compute)
    values = value[:, rows[:, None, :, None], cols[None, :, None, :]].to(compute)
    if border == "zeros":
        keys, values = keys * counts[..., None, None], values * counts[..., None, None]
    scores = torch.einsum("brcnd,brcijnd->brcnij", query.to(compute), keys) + bias.to(compute)
    if border in ("clip", "shift"):
        scores = scores.masked_fill(~counts[:, :, None], -torch.inf)
    weights = scores.flatten(-2).softmax(-1).unflatten(-1, (window, window))
    if value.shape[3] == 1:
        weights = weights.mean(3, keepdim=True)
    return torch.einsum("brcnij,brcijnd->brcnd", weights, values).to(value.dtype)


def _chunks(query: Tensor, value: Tensor, window: int) -> list[slice]:
    """Slices of query rows that gather at most CHUNK_NUMBERS each, or one row."""
    batch, rows, cols, heads, dim = query.shape
    per_row = cols * window**2 * (heads * (dim + 2) + value.shape[3] * value.shape[4])
    return split_length(rows, batch, per_row, chunk_numbers(CHUNK_NUMBERS))
