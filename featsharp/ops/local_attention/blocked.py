"""Local attention by matrix products of blocks of queries with the windows of keys around them.

Most products of a block lie outside of the windows of its queries and are masked; a matrix product is still several
times faster than gathering each window. The backward pass computes the weights again, so nothing of their size is kept.
"""

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from featsharp.ops.blocks import BlockGrid, Chunk, Scratch

# Queries along a side of a block.
SIDE = 4
# Numbers in the scratch memory of a chunk: 8 MiB in float32; less costs calls, more leaves the caches.
MAX_CHUNK_NUMBERS = 2**21
# How much more a GPU gets at a time: it is busy only with large products.
GPU_CHUNK = 16


def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> Tensor:
    """[B, fH, fW, N or 1, E]."""
    call = _Call(query, key, value, bias, window, border)
    out = call.new_queries(value)
    for chunk in call.chunks():
        keys, values = call.cut(key, chunk, "keys"), call.cut(value, chunk, "values")
        mean = call.zero_scores(chunk) if call.averages else None
        for head in range(call.heads):
            weights = call.weigh(
                call.queries(call.query, chunk, head, "q"), call.windows(keys, chunk, head, "k"), chunk, head
            )
            if mean is None:
                call.put(out, chunk, head, call.product(weights, call.windows(values, chunk, head, "v"), "o"))
            else:
                mean.add_(weights, alpha=1 / call.heads)
        if mean is not None:
            call.put(out, chunk, 0, call.product(mean, call.windows(values, chunk, 0, "v"), "o"))
    return call.crop(out, query)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    out: Tensor,
    window: int,
    border: str,
    bias_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; the last is zero unless ``bias_too``."""
    call = _Call(query, key, value, bias, window, border)
    grad = call.grid.pad_queries(grad)
    d_query = call.new_queries(query)
    # Sums over chunks, so not in half precision.
    d_key, d_value, d_bias = (torch.zeros_like(x, dtype=call.compute) for x in (key, value, bias))
    for chunk in call.chunks():
        keys, values = call.cut(key, chunk, "keys"), call.cut(value, chunk, "values")
        d_keys, d_values = call.zero_slab(keys, "d keys"), call.zero_slab(values, "d values")
        mean = call.zero_scores(chunk) if call.averages else None
        for head in range(call.heads):
            q, k = call.queries(call.query, chunk, head, "q"), call.windows(keys, chunk, head, "k")
            weights = call.weigh(q, k, chunk, head)
            if mean is None or head == 0:
                d_out = call.queries(grad, chunk, head, "d out")
                v = call.windows(values, chunk, head, "v")
                d_weights = call.product(d_out, v.transpose(1, 2), "d weights")
            if mean is None:
                call.add_windows(d_values, chunk, head, call.product(weights.transpose(1, 2), d_out, "d window"))
            else:
                mean.add_(weights, alpha=1 / call.heads)
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, call.compute)
            if mean is not None:
                d_scores /= call.heads
            if bias_too:
                d_bias[head] += call.grid.diagonals(d_scores).sum((0, 1, 2, 3, 4))
            call.put(d_query, chunk, head, call.product(d_scores, k, "o"))
            call.add_windows(d_keys, chunk, head, call.product(d_scores.transpose(1, 2), q, "d window"))
        if mean is not None:
            call.add_windows(d_values, chunk, 0, call.product(mean.transpose(1, 2), d_out, "d window"))
        call.grid.add_slab(d_key, chunk, d_keys)
        call.grid.add_slab(d_value, chunk, d_values)
    d_query = call.crop(d_query, query)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_bias.to(bias.dtype)


def scratch_bytes(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> int:
    """What :func:`forward` takes for itself beside its result."""
    size, factor = (key.shape[1], key.shape[2]), query.shape[1] // key.shape[1]
    grid = BlockGrid(size, factor, window, border, max(1, SIDE // factor))
    dims = query.shape[4] + value.shape[4]
    images, rows, cols = grid.chunk_size(len(query), _chunk_blocks(grid, dims, query.device))
    slab = images * (rows * grid.cells + window - 1) * (cols * grid.cells + window - 1)
    numbers = slab * (key[0, 0, 0].numel() + value[0, 0, 0].numel())
    numbers += images * rows * cols * _block_numbers(grid, dims)
    if value.shape[3] < query.shape[3]:
        numbers += images * rows * cols * grid.side**2 * grid.span**2
    numbers += len(bias) * grid.side**2 * grid.span**2
    scratch = numbers * torch.promote_types(value.dtype, torch.float32).itemsize
    padded = len(query) * prod(blocks * grid.side for blocks in grid.blocks)
    if padded > query[..., 0, 0].numel():
        scratch += padded * (query[0, 0, 0].numel() * query.itemsize + value[0, 0, 0].numel() * value.itemsize)
    return scratch


def _block_numbers(grid: BlockGrid, dims: int) -> int:
    """Numbers in scratch memory for one block and head."""
    queries, keys = grid.side**2, grid.span**2
    return queries * (dims + keys) + keys * dims


def _chunk_blocks(grid: BlockGrid, dims: int, device: torch.device) -> int:
    """Blocks of a chunk."""
    return MAX_CHUNK_NUMBERS * (1 if device.type == "cpu" else GPU_CHUNK) // _block_numbers(grid, dims)


class _Call:
    """What the chunks of one call share: the grid, the spread bias, and scratch memory by name."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> None:
        factor = query.shape[1] // key.shape[1]
        self.grid = BlockGrid((key.shape[1], key.shape[2]), factor, window, border, max(1, SIDE // factor))
        self.query = self.grid.pad_queries(query)
        self.heads = query.shape[3]
        self.averages = value.shape[3] < self.heads
        self.compute = torch.promote_types(value.dtype, torch.float32)
        self.bias = self.grid.spread_bias(bias.to(self.compute))
        self._scratch = Scratch(value.new_empty(0, dtype=self.compute))
        self._num_queries, self._num_keys = self.grid.side**2, self.grid.span**2
        self._dims = query.shape[4] + value.shape[4]

    def chunks(self) -> Iterator[Chunk]:
        return self.grid.chunks(len(self.query), _chunk_blocks(self.grid, self._dims, self.query.device))

    def new_queries(self, like: Tensor) -> Tensor:
        """Room for something of every padded query, with the heads and channels of ``like``."""
        return like.new_empty(*self.query.shape[:3], *like.shape[3:])

    def crop(self, x: Tensor, query: Tensor) -> Tensor:
        """Padded queries back to those of ``query``."""
        return x[:, : query.shape[1], : query.shape[2]].contiguous()

    def cut(self, x: Tensor, chunk: Chunk, name: str) -> Tensor:
        """The part of a map that the chunk sees: [B, cells, cells, N, C]."""
        images = chunk.images.stop - chunk.images.start
        slab = self._scratch(name, images, chunk.rows.length, chunk.cols.length, *x.shape[3:])
        return self.grid.cut_slab(x, chunk, slab)

    def zero_slab(self, like: Tensor, name: str) -> Tensor:
        return self._scratch(name, *like.shape).zero_()

    def zero_scores(self, chunk: Chunk) -> Tensor:
        return self._scratch("mean", chunk.blocks, self._num_queries, self._num_keys).zero_()

    def queries(self, x: Tensor, chunk: Chunk, head: int, name: str) -> Tensor:
        """[blocks, Q Q, C] of one head."""
        view = self.grid.queries(x, chunk, head)
        self._scratch(name, *view.shape).copy_(view)
        return self._scratch(name, chunk.blocks, self._num_queries, view.shape[-1])

    def windows(self, slab: Tensor, chunk: Chunk, head: int, name: str) -> Tensor:
        """[blocks, P P, C] of one head."""
        view = self.grid.windows(slab, head)
        self._scratch(name, *view.shape).copy_(view)
        return self._scratch(name, chunk.blocks, self._num_keys, view.shape[-1])

    def weigh(self, q: Tensor, k: Tensor, chunk: Chunk, head: int) -> Tensor:
        """Softmax weights [blocks, Q Q, P P], zero outside of the windows."""
        scores = self.product(q, k.transpose(1, 2), "scores").add_(self.bias[head])
        if self.grid.border == "clip":
            self.grid.mask_outside(scores, chunk)
        return torch.softmax(scores, -1, out=scores)

    def product(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        return torch.bmm(a, b, out=self._scratch(name, len(a), a.shape[1], b.shape[2]))

    def put(self, target: Tensor, chunk: Chunk, head: int, x: Tensor) -> None:
        """Write [blocks, Q Q, C] where the queries of the chunk are."""
        view = self.grid.queries(target, chunk, head)
        view.copy_(x.view(view.shape))

    def add_windows(self, slab: Tensor, chunk: Chunk, head: int, x: Tensor) -> None:
        """Add [blocks, P P, C] where the windows of the chunk are."""
        self.grid.add_windows(slab, head, x.view(self.grid.windows(slab, head).shape))
