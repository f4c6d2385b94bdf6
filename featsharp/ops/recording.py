"""Graphs that torch.export, torch.jit.trace or an ONNX exporter records to run elsewhere, on other batches and sizes.

Python runs once, while the graph is recorded. What it decides from a shape that the graph leaves open would hold for
that one shape only; these are the decisions that are left out then.
"""

import torch


def is_recording() -> bool:
    """Return whether such a graph is being recorded; not for torch.compile, which compiles anew."""
    return getattr(torch.compiler, "is_exporting", bool)() or is_tracing()  # unknown to torch 2.4: False


def is_tracing() -> bool:
    """Return whether torch.jit.trace records, by which the older ONNX exporter works: sizes are then fixed."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined]


def has_values(x: torch.Tensor) -> bool:
    """Return whether the values of a tensor can decide anything: not in a graph, nor on the device meta."""
    return not (x.is_meta or torch.compiler.is_compiling() or is_recording())


def is_open(*lengths: int) -> bool:
    """Return whether any of some lengths is one that the graph being recorded leaves open."""
    return is_recording() and any(isinstance(length, torch.SymInt) for length in lengths)


def is_same(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether two sizes are equal whatever lengths the graph being recorded leaves open; it is not narrowed."""
    if not is_open(*size, *other):
        return tuple(size) == tuple(other)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(size, other, strict=True))


def is_multiple(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Return whether a size is a multiple of another whatever lengths the graph being recorded leaves open."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a % b == 0) for a, b in zip(size, other, strict=True))


def split_length(length: int, images: int, numbers: int, limit: int) -> list[slice]:
    """Split items so that a piece holds at most ``limit`` numbers.

    Loops over pieces are unrolled in a recorded graph: it is split as for one image, and not at all at open sizes.

    Args:
        length: All items.
        images: Images of the batch, of which each has these items.
        numbers: Held per item and image.
        limit: Most numbers at a time, if not those of one item.

    Returns:
        Slices of the items, in order.
    """
    if is_open(length, numbers):
        return [slice(0, length)]
    step = max(1, limit // (numbers if is_recording() else images * numbers))
    if step >= length:
        return [slice(0, length)]
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
