"""Features from inside of a model: which blocks, and what they return."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from featsharp.errors import ConfigError


def chosen_blocks(blocks: Sequence[nn.Module], layers: tuple[int, ...] | None, name: str) -> list[int]:
    """Numbers from 0 of the blocks that ``layers`` means, the last for None; ConfigError for one that is not there."""
    count = len(blocks)
    for layer in layers or ():
        if not -count <= layer < count:
            raise ConfigError(f"backbone {name!r} has {count} blocks, 0 to {count - 1}; got layer={layer}")
    return [count - 1] if layers is None else [layer % count for layer in layers]


@contextmanager
def captured(modules: Sequence[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Within this context, the output of each of ``modules`` is put into the list, in the order in which they run.

    A hook sees the calls of all threads; only those of the thread that entered the context are kept, so that several
    can use one model at a time. The context works inside of what torch.compile compiles.

    Args:
        modules: The modules to watch.
        inputs: Keep the first positional argument of each in place of its output.
    """
    kept: list[Tensor] = []
    here = _this_thread()

    def keep(tensor: Tensor) -> None:
        if here is None or _this_thread() in (here, None):
            kept.append(tensor)

    if inputs:
        hooks = [module.register_forward_pre_hook(lambda module, given: keep(given[0])) for module in modules]
    else:
        hooks = [module.register_forward_hook(lambda module, given, output: keep(output)) for module in modules]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _this_thread() -> int | None:
    """A number of the calling thread; none while torch.compile traces, which cannot follow it and is one thread."""
    return None if torch.compiler.is_compiling() else threading.get_ident()
