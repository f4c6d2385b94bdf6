"""Attention of every pixel over the small window around it: the one operation that JBU and FeatSharp share.

    out[i] = sum_p softmax_p( scale * <query[i], key[i + p]> + bias[p] ) * value[i + p],   p in a K x K window

JBU is the case of tied query and key, one head, a Gaussian bias and a mirrored border (FeatUp, arXiv 2403.10516; its
exp-product form equals this softmax). FeatSharp uses 16 heads, a distance bias and clipped windows (arXiv 2502.16025).

The map is cut into square blocks; the queries of a block attend to the block and a halo of K // 2 pixels by two matrix
products, and what lies outside each query's own window is masked. Memory stays bounded: block rows are processed in
bands, and where gradients are needed a band is recomputed in the backward pass instead of being kept.

Shapes: B batch, H x W map, N heads, D channels of query and key per head, E channels of value per head, K window.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from featsharp.errors import ConfigError, InputError

# Side of a block: 64 queries see (8 + K - 1)^2 keys, a good size for matrix products on CPUs and GPUs alike.
BLOCK = 8
# Numbers that one band may hold, scores or gathered values: 64 MiB in float32.
MAX_BAND_SCORES = 2**24

Border = Literal["clip", "reflect"]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    border: Border = "clip",
    max_band_scores: int = MAX_BAND_SCORES,
) -> Tensor:
    """Attend from every pixel to the ``window x window`` pixels around it.

    Args:
        query: [B, H, W, N, D].
        key: [B, H, W, N, D].
        value: [B, H, W, N, E].
        window: K, odd.
        bias: [N, K, K], added to the scaled scores; entry (dy, dx) belongs to the key at offset (dy - K//2, dx - K//2).
        scale: Factor on the scores, a number or a tensor of one element (it may need a gradient).
        border: "clip" leaves out keys beyond the edge of the map; "reflect" mirrors the map there, edge not repeated.
        max_band_scores: Scores, or gathered keys and values, held at once; smaller bounds memory more tightly. The
            result does not depend on it.

    Returns:
        [B, H, W, N, E] in the dtype of ``value``. The softmax is computed in float32 (float64 for float64 input).

    Raises:
        InputError: When shapes do not fit together.
        ConfigError: For an even window or an unknown border.

    Example:
        >>> x = torch.randn(1, 5, 7, 2, 4)
        >>> local_attention(x, x, torch.ones(1, 5, 7, 2, 3), window=3).shape
        torch.Size([1, 5, 7, 2, 3])
    """
    _check(query, key, value, window, bias, border)
    height, width = query.shape[1:3]
    halo = window // 2
    rows, cols = _Axis(height, halo, border, query.device), _Axis(width, halo, border, query.device)
    index, in_window = _window_index(window, query.device)
    table = query.new_zeros(query.shape[3], window * window) if bias is None else bias.flatten(1)
    block_bias = table[:, index].to(_softmax_dtype(value.dtype))  # [N, BLOCK^2, (BLOCK + 2 halo)^2]

    def attend(band: Tensor) -> Tensor:
        """Outputs of the block rows in ``band``: [B, len(band) * BLOCK, cols.blocks * BLOCK, N, E]."""
        q = _cut(query, rows.block[band], cols.block) * scale
        k = _cut(key, rows.window[band], cols.window)
        v = _cut(value, rows.window[band], cols.window)
        allowed = in_window
        if border == "clip":
            valid = rows.valid[band][:, None, :, None] & cols.valid[None, :, None, :]
            allowed = in_window & valid.flatten(2)[:, :, None, None, :]  # [bands, blocks, 1, queries, keys]
        scores = (q @ k.transpose(-1, -2)).to(block_bias.dtype) + block_bias
        # The lowest finite value rather than -inf: a padding query without any key must not breed NaN.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
        out = scores.softmax(-1).to(v.dtype) @ v  # [B, bands, blocks, N, BLOCK^2, E]
        out = out.unflatten(4, (BLOCK, BLOCK)).permute(0, 1, 4, 2, 5, 3, 6)
        return out.flatten(3, 4).flatten(1, 2)

    gathered = in_window.shape[1] * query.shape[3] * (query.shape[4] + value.shape[4])
    per_row = query.shape[0] * cols.blocks * max(block_bias.numel(), gathered)
    band_rows = max(1, max_band_scores // per_row)
    bands = torch.arange(rows.blocks, device=query.device).split(band_rows)
    if len(bands) == 1:
        out = attend(bands[0])
    elif torch.is_grad_enabled():
        out = torch.cat([checkpoint(attend, band, use_reentrant=False) for band in bands], 1)
    else:
        out = torch.cat([attend(band) for band in bands], 1)
    return out[:, :height, :width]


def check_window(window: int) -> None:
    """Raise ConfigError for a window that has no centre."""
    if window < 1 or window % 2 == 0:
        raise ConfigError(
            f"the window of local attention must be odd; got {window}, use {max(1, window - 1)} or {window + 1}"
        )


class _Axis:
    """One axis of the map cut into blocks: which pixels belong to each block, and which to its window."""

    def __init__(self, length: int, halo: int, border: Border, device: torch.device) -> None:
        self.blocks = -(-length // BLOCK)
        starts = torch.arange(self.blocks, device=device)[:, None] * BLOCK
        # The last block may run past the map: its surplus queries are computed and dropped.
        self.block = (starts + torch.arange(BLOCK, device=device)).clamp(max=length - 1)
        position = starts + torch.arange(-halo, BLOCK + halo, device=device)
        self.valid = (position >= 0) & (position < length)
        self.window = _reflect(position, length) if border == "reflect" else position.clamp(0, length - 1)


def _reflect(position: Tensor, length: int) -> Tensor:
    """Mirror positions into [0, length) without repeating the edge, however far out they are."""
    if length == 1:
        return torch.zeros_like(position)
    period = 2 * (length - 1)
    position = position.remainder(period)
    return torch.minimum(position, period - position)


def _cut(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Gather pieces of a map: [B, H, W, N, D] -> [B, row pieces, column pieces, N, pixels of a piece, D]."""
    x = x.index_select(1, rows.flatten()).index_select(2, cols.flatten())
    x = x.unflatten(2, tuple(cols.shape)).unflatten(1, tuple(rows.shape))
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


def _window_index(window: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For query and key pixels of a block: the entry of the bias table, and whether the key is in the window."""
    offset = torch.arange(BLOCK + window - 1, device=device)[None] - torch.arange(BLOCK, device=device)[:, None]
    in_axis = (offset >= 0) & (offset < window)
    offset = offset.clamp(0, window - 1)
    index = offset[:, None, :, None] * window + offset[None, :, None, :]
    in_window = in_axis[:, None, :, None] & in_axis[None, :, None, :]
    return index.flatten(2).flatten(0, 1), in_window.flatten(2).flatten(0, 1)


def _softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(query: Tensor, key: Tensor, value: Tensor, window: int, bias: Tensor | None, border: str) -> None:
    check_window(window)
    if border not in ("clip", "reflect"):
        raise ConfigError(f"unknown border {border!r}; use 'clip' or 'reflect'")
    if query.ndim != 5 or query.shape != key.shape or query.shape[:4] != value.shape[:4] or value.ndim != 5:
        raise InputError(
            "local_attention takes query and key [B, H, W, N, D] and value [B, H, W, N, E]; got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (query.shape[3], window, window):
        raise InputError(f"the bias must be [N, K, K] = {(query.shape[3], window, window)}; got {tuple(bias.shape)}")
