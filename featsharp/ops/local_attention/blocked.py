"""Local attention by matrix products of blocks of queries with the windows of keys around them.

Most products of a block lie outside of the windows of its queries and are masked; a matrix product is still several
times faster than gathering each window. The backward pass computes the weights again, so nothing of their size is kept.
A value that is not finite reaches, as NaN, all queries of the blocks that see it: zero times infinity is NaN.
"""

import torch
from torch import Tensor

from featsharp.ops.blocks import BlockCall, BlockGrid, Chunk, block_grid, max_blocks


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
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; those that are not ``needed`` are zero."""
    query_too, key_too, value_too, bias_too = needed
    call = _Call(query, key, value, bias, window, border)
    grad = call.grid.pad_queries(grad)
    d_query = call.new_queries(query) if query_too else call.new_queries(query).zero_()
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
            if mean is not None:
                mean.add_(weights, alpha=1 / call.heads)
            elif value_too:
                call.add_windows(d_values, chunk, head, call.product(weights.transpose(1, 2), d_out, "d window"))
            if not (query_too or key_too or bias_too):
                continue
            d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, call.compute)
            if mean is not None:
                d_scores /= call.heads
            if bias_too:
                d_bias[head] += call.grid.diagonals(d_scores).sum((0, 1, 2, 3, 4))
            if query_too:
                call.put(d_query, chunk, head, call.product(d_scores, k, "o"))
            if key_too:
                call.add_windows(d_keys, chunk, head, call.product(d_scores.transpose(1, 2), q, "d window"))
        if mean is not None and value_too:
            call.add_windows(d_values, chunk, 0, call.product(mean.transpose(1, 2), d_out, "d window"))
        if key_too:
            call.grid.add_slab(d_key, chunk, d_keys)
        if value_too:
            call.grid.add_slab(d_value, chunk, d_values)
    d_query = call.crop(d_query, query)
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype), d_bias.to(bias.dtype)


def scratch_bytes(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> int:
    """Bytes that :func:`forward` takes for itself beside its result."""
    grid = block_grid(query, key, window, border)
    block_numbers = _block_numbers(grid, query.shape[4] + value.shape[4])
    cells, blocks = grid.largest_chunk(query.shape[0], max_blocks(block_numbers, query.device))
    numbers = cells * (key[0, 0, 0].numel() + value[0, 0, 0].numel()) + blocks * block_numbers
    if value.shape[3] < query.shape[3]:
        numbers += blocks * grid.side**2 * grid.span**2
    numbers += len(bias) * grid.side**2 * grid.span**2
    scratch = numbers * torch.promote_types(value.dtype, torch.float32).itemsize
    per_query = query[0, 0, 0].numel() * query.itemsize + value[0, 0, 0].numel() * value.itemsize
    return scratch + grid.padding(query) * per_query


def _block_numbers(grid: BlockGrid, dims: int) -> int:
    """Numbers in scratch memory for one block and head."""
    queries, keys = grid.side**2, grid.span**2
    return queries * (dims + keys) + keys * dims


class _Call(BlockCall):
    """Tensors that the chunks of one call share, with the spread bias."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int, border: str) -> None:
        grid = block_grid(query, key, window, border)
        super().__init__(grid, query, value.dtype, _block_numbers(grid, query.shape[4] + value.shape[4]))
        self.query = grid.pad_queries(query)
        self.heads = query.shape[3]
        self.averages = value.shape[3] < self.heads
        self.bias = grid.spread_bias(bias.to(self.compute))

    def zero_scores(self, chunk: Chunk) -> Tensor:
        return self.scratch("mean", chunk.blocks, self.num_queries, self.num_keys).zero_()

    def weigh(self, q: Tensor, k: Tensor, chunk: Chunk, head: int) -> Tensor:
        """Softmax weights [blocks, Q Q, P P], zero outside of the windows."""
        scores = self.product(q, k.transpose(1, 2), "scores").add_(self.bias[head])
        if self.grid.border in ("clip", "shift"):
            self.grid.mask_outside(scores, chunk)
        return torch.softmax(scores, -1, out=scores)
