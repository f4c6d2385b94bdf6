"""Maps cut into square blocks and their surroundings, so that local operations become matrix products.

A block of S x S key cells has a window of P x P cells, P = S + K - 1: all that its queries may see. Windows overlap, so
they are copied out of the map, and gradients are added back into it. Blocks are processed in chunks small enough for
the caches, in scratch memory that is used again: fresh memory costs more than the arithmetic on it.

Shapes: B images of a chunk, Y x X blocks of a chunk, f queries per cell and axis, Q = S f, N heads, C channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from featsharp.ops.windows import border_cells

# Queries along a side of a block.
SIDE = 4
# Numbers in the scratch memory of a chunk: 8 MiB in float32; less costs calls, more leaves the caches.
CHUNK_NUMBERS = 2**21
# Factor on it on a GPU, which only large products keep busy.
GPU_CHUNK = 16
# Stands for minus infinity: far below any score, and still finite when a score is added to it.
MASKED = -1e38

_limit: ContextVar[int | None] = ContextVar("limit", default=None)


@contextmanager
def limit_chunks(numbers: int) -> Iterator[None]:
    """Limit the numbers that local operations of this context hold at once: less memory, more and smaller calls."""
    token = _limit.set(numbers)
    try:
        yield
    finally:
        _limit.reset(token)


def chunk_numbers(default: int) -> int:
    """Numbers that a chunk may hold: of :func:`limit_chunks`, or a default."""
    limit = _limit.get()
    return default if limit is None else limit


class Scratch:
    """Named buffers that grow when needed and are used again."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised contiguous tensor; it shares its memory with all others of this name."""
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)


class Axis:
    """Some consecutive blocks of one axis of the map, and the slab of cells that their windows cover."""

    def __init__(self, length: int, first: int, count: int, cells: int, window: int, border: str) -> None:
        halo = window // 2
        start = first * cells - halo  # of the slab, in cells of the map
        self.first, self.count = first, count
        self.length = count * cells + window - 1
        # The cells of the slab that lie on the map.
        self.inner = slice(max(0, -start), min(self.length, length - start))
        self.on_map = slice(self.inner.start + start, self.inner.stop + start)
        # Cells beyond the border that a query of the map can see, and the cells of the slab that they mirror.
        self.mirrored: list[tuple[int, int]] = []
        if border in ("reflect", "replicate"):
            outside = [i for i in range(self.length) if not self.inner.start <= i < self.inner.stop]
            seen = [i for i in outside if i + start < length + halo]
            source, _ = border_cells(torch.tensor(seen, dtype=torch.long) + start, length, border)
            self.mirrored = list(zip(seen, (source - start).tolist(), strict=True))
        # Under "shift", where anything is beyond the border: of every cell of the slab the cell of the map that it
        # stands for, and the cells of the slab that stand for none.
        self.shifted: list[int] = []
        self.absent: list[int] = []
        if border == "shift" and self.inner != slice(0, self.length):
            cells_of, real = border_cells(torch.arange(self.length) + start, length, border, window)
            self.shifted = cells_of.tolist()
            self.absent = [i for i, counts in enumerate(real.tolist()) if not counts]
        # Blocks with cells beyond the border in their windows: (block, cells before the map, cells after it).
        self.edges = []
        for block in range(count):
            before = max(0, self.inner.start - block * cells)
            after = max(0, block * cells + cells + window - 1 - self.inner.stop)
            if before or after:
                self.edges.append((block, before, after))


@dataclass(frozen=True)
class Chunk:
    """Some blocks of some images."""

    images: slice
    rows: Axis
    cols: Axis

    @property
    def blocks(self) -> int:
        return (self.images.stop - self.images.start) * self.rows.count * self.cols.count


class BlockGrid:
    """Division of the maps of one call into blocks.

    Args:
        key_size: (H, W) of keys and values.
        factor: f.
        window: K.
        border: See :data:`featsharp.ops.windows.Border`.
        cells: S.
    """

    def __init__(self, key_size: tuple[int, int], factor: int, window: int, border: str, cells: int) -> None:
        self.key_size, self.factor, self.window, self.border, self.cells = key_size, factor, window, border, cells
        self.blocks = (-(-key_size[0] // cells), -(-key_size[1] // cells))
        self.side = cells * factor  # Q
        self.span = cells + window - 1  # P

    def chunks(self, images: int, max_blocks: int) -> Iterator[Chunk]:
        """All blocks, at most ``max_blocks`` at a time: whole rows of blocks where that allows, whole images too."""
        b, y, x = self.chunk_size(images, max_blocks)
        for top in range(0, self.blocks[0], y):
            rows = self._axis(0, top, y)
            for left in range(0, self.blocks[1], x):
                cols = self._axis(1, left, x)
                for image in range(0, images, b):
                    yield Chunk(slice(image, min(image + b, images)), rows, cols)

    def chunk_size(self, images: int, max_blocks: int) -> tuple[int, int, int]:
        """Images, rows and columns of blocks of the largest chunk."""
        x = min(self.blocks[1], max(1, max_blocks))
        y = min(self.blocks[0], max(1, max_blocks // x))
        return min(images, max(1, max_blocks // (x * y))), y, x

    def largest_chunk(self, images: int, max_blocks: int) -> tuple[int, int]:
        """Cells of the slab and number of blocks of the largest chunk, all its images together."""
        b, y, x = self.chunk_size(images, max_blocks)
        halo = self.window - 1
        return b * (y * self.cells + halo) * (x * self.cells + halo), b * y * x

    def _axis(self, axis: int, first: int, count: int) -> Axis:
        count = min(count, self.blocks[axis] - first)
        return Axis(self.key_size[axis], first, count, self.cells, self.window, self.border)

    def pad_queries(self, x: Tensor) -> Tensor:
        """[B, fH, fW, ...] with zeros at the end up to whole blocks; ``x`` itself where it is whole."""
        size = (self.blocks[0] * self.side, self.blocks[1] * self.side)
        if x.shape[1:3] == size:
            return x
        padded = x.new_zeros(x.shape[0], *size, *x.shape[3:])
        padded[:, : x.shape[1], : x.shape[2]] = x
        return padded

    def padding(self, x: Tensor) -> int:
        """Count the padded queries that :meth:`pad_queries` makes of ``x``; 0 where it makes no copy."""
        size = (self.blocks[0] * self.side, self.blocks[1] * self.side)
        return 0 if x.shape[1:3] == size else x.shape[0] * size[0] * size[1]

    def queries(self, x: Tensor, chunk: Chunk, head: int) -> Tensor:
        """A view of padded queries of one head: [B, Y, X, Q, Q, C]."""
        x = x[
            chunk.images,
            chunk.rows.first * self.side : (chunk.rows.first + chunk.rows.count) * self.side,
            chunk.cols.first * self.side : (chunk.cols.first + chunk.cols.count) * self.side,
            head,
        ]
        x = x.unflatten(2, (-1, self.side)).unflatten(1, (-1, self.side))
        return x.transpose(2, 3)

    def cut_slab(self, x: Tensor, chunk: Chunk, slab: Tensor) -> Tensor:
        """Fill ``slab`` [B, cells, cells, N, C] with all that the windows of the chunk cover."""
        rows, cols = chunk.rows, chunk.cols
        if rows.shifted or cols.shifted:
            columns = cols.shifted or range(cols.on_map.start, cols.on_map.stop)
            index = torch.tensor(list(columns), device=x.device)
            for cell, row in enumerate(rows.shifted or range(rows.on_map.start, rows.on_map.stop)):
                slab[:, cell] = x[chunk.images, row].index_select(1, index)
            return _zero_absent(slab, chunk)
        if rows.edges or cols.edges:
            slab.zero_()
        slab[:, rows.inner, cols.inner] = x[chunk.images, rows.on_map, cols.on_map]
        for cell, source in cols.mirrored:
            slab[:, rows.inner, cell] = slab[:, rows.inner, source]
        for cell, source in rows.mirrored:
            slab[:, cell] = slab[:, source]
        return slab

    def add_slab(self, x: Tensor, chunk: Chunk, slab: Tensor) -> None:
        """The adjoint of :meth:`cut_slab`: add ``slab`` to the map ``x``; overwrites cells of ``slab``."""
        rows, cols = chunk.rows, chunk.cols
        if rows.shifted or cols.shifted:
            _zero_absent(slab, chunk)
            columns = cols.shifted or range(cols.on_map.start, cols.on_map.stop)
            index = torch.tensor(list(columns), device=x.device)
            for cell, row in enumerate(rows.shifted or range(rows.on_map.start, rows.on_map.stop)):
                x[chunk.images, row].index_add_(1, index, slab[:, cell])
            return
        for cell, source in rows.mirrored:
            slab[:, source].add_(slab[:, cell])
        for cell, source in cols.mirrored:
            slab[:, :, source].add_(slab[:, :, cell])
        x[chunk.images, rows.on_map, cols.on_map].add_(slab[:, rows.inner, cols.inner])

    def windows(self, slab: Tensor, head: int) -> Tensor:
        """A view of overlapping windows: [B, Y, X, P, P, C]."""
        windows = slab[:, :, :, head].unfold(1, self.span, self.cells).unfold(2, self.span, self.cells)
        return windows.permute(0, 1, 2, 4, 5, 3)

    def add_windows(self, slab: Tensor, head: int, windows: Tensor) -> None:
        """The adjoint of :meth:`windows`: add [B, Y, X, P, P, C] to where they were cut from."""
        target = self.windows(slab, head)
        step = -(-self.span // self.cells)  # blocks so far apart have windows that do not overlap
        for y in range(min(step, target.shape[1])):
            for x in range(min(step, target.shape[2])):
                target[:, y::step, x::step].add_(windows[:, y::step, x::step])

    def diagonals(self, x: Tensor) -> Tensor:
        """The window entries in [blocks, Q Q, P P], contiguous: a view [blocks, S, f, S, f, K, K]."""
        q, p, f, s, k = self.side, self.span, self.factor, self.cells, self.window
        keys = p * p
        stride = (q * q * keys, f * q * keys + p, q * keys, f * keys + 1, keys, p, 1)
        return x.as_strided((x.shape[0], s, f, s, f, k, k), stride, x.storage_offset())

    def spread_bias(self, bias: Tensor) -> Tensor:
        """[N, K, K] to [N, Q Q, P P]: a query's bias of each key of its block's window, MASKED outside of its own."""
        spread = bias.new_full((len(bias), self.side**2, self.span**2), MASKED)
        self.diagonals(spread).copy_(bias[:, None, None, None, None])
        return spread

    def mask_outside(self, scores: Tensor, chunk: Chunk) -> None:
        """Mask the keys beyond the border in ``scores`` [blocks, Q Q, P P]."""
        view = scores.view(-1, chunk.rows.count, chunk.cols.count, scores.shape[1], self.span, self.span)
        if self.border == "shift":
            for block, cell in self._absent(chunk.rows):
                view[:, block, :, :, cell] = MASKED
            for block, cell in self._absent(chunk.cols):
                view[:, :, block, :, :, cell] = MASKED
            return
        for block, before, after in chunk.rows.edges:
            view[:, block, :, :, :before] = MASKED
            view[:, block, :, :, self.span - after :] = MASKED
        for block, before, after in chunk.cols.edges:
            view[:, :, block, :, :, :before] = MASKED
            view[:, :, block, :, :, self.span - after :] = MASKED

    def _absent(self, axis: Axis) -> list[tuple[int, int]]:
        """Cells of windows that stand for none of the map: (block, cell of its window)."""
        starts = [(block, block * self.cells) for block in range(axis.count)]
        return [(b, cell - start) for b, start in starts for cell in axis.absent if 0 <= cell - start < self.span]


def _zero_absent(slab: Tensor, chunk: Chunk) -> Tensor:
    """Set the cells of a slab that stand for none of the map to zero, in place."""
    for cell in chunk.rows.absent:
        slab[:, cell] = 0
    for cell in chunk.cols.absent:
        slab[:, :, cell] = 0
    return slab


def block_grid(query: Tensor, key: Tensor, window: int, border: str) -> BlockGrid:
    """The grid for queries [B, fH, fW, ...] and keys [B, H, W, ...]."""
    factor = query.shape[1] // key.shape[1]
    return BlockGrid((key.shape[1], key.shape[2]), factor, window, border, max(1, SIDE // factor))


def max_blocks(block_numbers: int, device: torch.device) -> int:
    """Blocks of a chunk, each of which takes ``block_numbers`` of scratch memory."""
    return chunk_numbers(CHUNK_NUMBERS * (1 if device.type == "cpu" else GPU_CHUNK)) // block_numbers


class BlockCall:
    """One call of an operation that works in chunks of blocks: the grid, and scratch memory by name.

    Args:
        grid: How the maps are cut.
        query: [B, fH, fW, N, ...], for the number of queries.
        dtype: Of the values; what is summed is at least float32.
        block_numbers: Numbers in scratch memory for one block and head.
    """

    def __init__(self, grid: BlockGrid, query: Tensor, dtype: torch.dtype, block_numbers: int) -> None:
        self.grid = grid
        self.compute = torch.promote_types(dtype, torch.float32)
        self.scratch = Scratch(query.new_empty(0, dtype=self.compute))
        self.num_queries, self.num_keys = grid.side**2, grid.span**2
        self._size = (query.shape[0], *(blocks * grid.side for blocks in grid.blocks))
        self._max_blocks = max_blocks(block_numbers, query.device)

    def chunks(self) -> Iterator[Chunk]:
        return self.grid.chunks(self._size[0], self._max_blocks)

    def new_queries(self, like: Tensor) -> Tensor:
        """Uninitialised values of all padded queries, with the heads and channels of ``like``."""
        return like.new_empty(*self._size, *like.shape[3:])

    def crop(self, x: Tensor, query: Tensor) -> Tensor:
        """Crop padded queries to those of ``query``."""
        return x[:, : query.shape[1], : query.shape[2]].contiguous()

    def cut(self, x: Tensor, chunk: Chunk, name: str) -> Tensor:
        """Cut the cells that the chunk sees out of a map: [B, cells, cells, N, C]."""
        images = chunk.images.stop - chunk.images.start
        slab = self.scratch(name, images, chunk.rows.length, chunk.cols.length, *x.shape[3:])
        return self.grid.cut_slab(x, chunk, slab)

    def zero_slab(self, like: Tensor, name: str) -> Tensor:
        return self.scratch(name, *like.shape).zero_()

    def queries(self, x: Tensor, chunk: Chunk, head: int, name: str) -> Tensor:
        """[blocks, Q Q, C] of one head."""
        view = self.grid.queries(x, chunk, head)
        self.scratch(name, *view.shape).copy_(view)
        return self.scratch(name, chunk.blocks, self.num_queries, view.shape[-1])

    def windows(self, slab: Tensor, chunk: Chunk, head: int, name: str) -> Tensor:
        """[blocks, P P, C] of one head."""
        view = self.grid.windows(slab, head)
        self.scratch(name, *view.shape).copy_(view)
        return self.scratch(name, chunk.blocks, self.num_keys, view.shape[-1])

    def product(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        return torch.bmm(a, b, out=self.scratch(name, len(a), a.shape[1], b.shape[2]))

    def put(self, target: Tensor, chunk: Chunk, head: int, x: Tensor) -> None:
        """Write [blocks, Q Q, C] where the queries of the chunk are."""
        view = self.grid.queries(target, chunk, head)
        view.copy_(x.view(view.shape))

    def add_windows(self, slab: Tensor, chunk: Chunk, head: int, x: Tensor) -> None:
        """Add [blocks, P P, C] where the windows of the chunk are."""
        self.grid.add_windows(slab, head, x.view(self.grid.windows(slab, head).shape))
