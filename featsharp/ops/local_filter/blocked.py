"""The local filter by matrix products of the spread weights of blocks with the windows of values around them."""

import torch
from torch import Tensor

from featsharp.ops.blocks import BlockCall, BlockGrid, Chunk, block_grid, max_blocks


def forward(weights: Tensor, value: Tensor, border: str) -> Tensor:
    """[B, fH, fW, N, E]."""
    call = _Call(weights, value, border)
    out = call.new_queries(value)
    for chunk in call.chunks():
        values = call.cut(value, chunk, "values")
        for head in range(value.shape[3]):
            spread = call.spread_weights(chunk, head)
            call.put(out, chunk, head, call.product(spread, call.windows(values, chunk, head, "v"), "o"))
    return call.crop(out, weights)


def backward(grad: Tensor, weights: Tensor, value: Tensor, border: str) -> tuple[Tensor, Tensor]:
    """Gradients of weights and value."""
    call = _Call(weights, value, border)
    grad = call.grid.pad_queries(grad)
    d_weights = call.new_queries(weights.flatten(4))
    d_value = torch.zeros_like(value, dtype=call.compute)  # sums over chunks, so not in half precision
    for chunk in call.chunks():
        values = call.cut(value, chunk, "values")
        d_values = call.zero_slab(values, "d values")
        for head in range(value.shape[3]):
            spread = call.spread_weights(chunk, head)
            d_out = call.queries(grad, chunk, head, "d out")
            call.add_windows(d_values, chunk, head, call.product(spread.transpose(1, 2), d_out, "d window"))
            v = call.windows(values, chunk, head, "v")
            d_spread = call.product(d_out, v.transpose(1, 2), "d weights")
            call.put(d_weights, chunk, head, call.gather_weights(d_spread))
        call.grid.add_slab(d_value, chunk, d_values)
    return call.crop(d_weights, weights).view(weights.shape), d_value.to(value.dtype)


class _Call(BlockCall):
    """Tensors that the chunks of one call share, with the padded weights."""

    def __init__(self, weights: Tensor, value: Tensor, border: str) -> None:
        grid = block_grid(weights, value, weights.shape[-1], border)
        super().__init__(grid, weights, value.dtype, _block_numbers(grid, value.shape[4]))
        self._weights = grid.pad_queries(weights.flatten(4))

    def spread_weights(self, chunk: Chunk, head: int) -> Tensor:
        """[blocks, Q Q, P P], zero outside of the windows."""
        weights = self.queries(self._weights, chunk, head, "w")
        spread = self.scratch("spread", chunk.blocks, self.num_queries, self.num_keys).zero_()
        diagonals = self.grid.diagonals(spread)
        diagonals.copy_(weights.view(diagonals.shape))
        return spread

    def gather_weights(self, spread: Tensor) -> Tensor:
        """The adjoint of spreading: [blocks, Q Q, K K]."""
        diagonals = self.grid.diagonals(spread)
        gathered = self.scratch("w", *diagonals.shape)
        gathered.copy_(diagonals)
        return gathered.view(len(spread), self.num_queries, -1)


def scratch_bytes(weights: Tensor, value: Tensor, border: str) -> int:
    """Bytes that :func:`forward` takes for itself beside its result."""
    grid = block_grid(weights, value, weights.shape[-1], border)
    numbers = _block_numbers(grid, value.shape[4])
    cells, blocks = grid.largest_chunk(weights.shape[0], max_blocks(numbers, value.device))
    total = cells * value[0, 0, 0].numel() + blocks * numbers
    per_query = weights[0, 0, 0].numel() * weights.itemsize + value[0, 0, 0].numel() * value.itemsize
    return total * torch.promote_types(value.dtype, torch.float32).itemsize + grid.padding(weights) * per_query


def _block_numbers(grid: BlockGrid, channels: int) -> int:
    """Numbers in scratch memory for one block and head."""
    queries, keys = grid.side**2, grid.span**2
    return queries * (channels + keys + grid.window**2) + keys * channels
