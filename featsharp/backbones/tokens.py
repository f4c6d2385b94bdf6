"""Vision transformers of any library as backbones: blocks, facets and summaries in one class.

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first, then registers), then patches row by row.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.backbones.options import Options
from featsharp.errors import ConfigError
from featsharp.ops.resize import size_of

FACETS = ("query", "key", "value")


class TokenBackbone(Backbone):
    """A vision transformer: the patch tokens of its end, or of chosen blocks after its final norm, or their facets.

    A family of models says in a subclass how its transformer runs (:meth:`run`), and where that differs from the usual:
    the final norm, the layer that makes a facet, the head into the space of text, the summaries.

    Args:
        name: The name of ``create_backbone``, or a label.
        model: The module with the weights.
        options: Of these layer, facet, project and summary.
        blocks: The blocks of the transformer.
        width: Channels of its tokens.
        summaries: Channels by kind of summary, the default first. "mean", that of the features unless the model has its
            own, and "none" are everyone's; the default of a model without summaries is "none".
        head_width: Channels of projected tokens.
        facts: Patch size, native size, whitening and flexibility, as for :class:`Backbone`.

    Raises:
        ConfigError: For a block, facet or summary that the model does not have.
    """

    holder = "model"  # name of the attribute with the model, and so of the weights
    model: Any
    visual: Any
    facet_from_inputs = False  # whether :meth:`source` is watched for what it is given, not for what it returns
    has_end = True  # whether the model ends with the last block and the norm

    def __init__(
        self,
        name: str,
        model: nn.Module,
        options: Options,
        blocks: Sequence[Any],
        *,
        width: int,
        summaries: Mapping[str, int | None],
        head_width: int = 0,
        **facts: Any,
    ) -> None:
        layers = chosen_blocks(blocks, options.layer, name)
        super().__init__(name, embed_dim=width, **facts)
        self.add_module(self.holder, model)
        self.options, self.layers = options, layers
        self._order = sorted(set(self.layers))
        self._blocks = [blocks[layer] for layer in self._order] if options.inner or not self.has_end else []
        facet = options.facet != "token"
        self._sources = [self.source(block) if facet else block for block in self._blocks]
        widths = dict.fromkeys(self.layers, head_width if options.project else width)
        if facet and not options.project:
            widths = {n: self.facet_width(block) for n, block in zip(self._order, self._blocks, strict=True)}
        self.embed_dim = sum(widths[layer] for layer in self.layers)
        self._own_mean = "mean" in summaries
        self.summary_kind = chosen_summary(name, options.summary, summaries)
        self.summary_dim = {"none": None, "mean": self.embed_dim, **summaries}[self.summary_kind]
        self.freeze()

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        """All tokens as the model ends, after the final norm, and what :meth:`summarise` needs beside them."""
        raise NotImplementedError

    def norm(self, tokens: Tensor) -> Tensor:
        """Tokens of a block as the model would end with them."""
        raise NotImplementedError

    def source(self, block: Any) -> nn.Module:
        """The layer of ``block`` that makes the facet; ConfigError without one."""
        raise NotImplementedError

    def facet_width(self, block: Any) -> int:
        """Channels of the facet."""
        raise NotImplementedError

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens from what ``block``, or the layer that makes its facet, gave."""
        return tensor

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, h * w, C] into the space of text."""
        raise NotImplementedError

    def summarise(self, kind: str, tokens: Tensor, output: Any, num_patches: int) -> Tensor:
        """The summary [B, C_s] of what :meth:`run` gave."""
        return tokens[:, 0]

    def extract(self, images: Tensor) -> BackboneOutput:
        grid = self.grid_size(size_of(images))
        num_patches = grid[0] * grid[1]
        facet, project = self.options.facet != "token", self.options.project
        by_end = self.summary_kind not in ("mean", "none") or (self.summary_kind == "mean" and self._own_mean)
        tokens = output = None
        inputs = facet and self.facet_from_inputs
        with captured(self._sources, inputs=inputs, then_stop=bool(self._sources) and not by_end) as taken:
            tokens, output = self.run(images)
        if self._blocks:
            found = {}
            for layer, block, tensor in zip(self._order, self._blocks, taken, strict=True):
                part = self.take(block, tensor, grid)
                found[layer] = self._ended(part if facet and not project else self.norm(part), num_patches)
            parts = [found[layer] for layer in self.layers]
        else:
            assert tokens is not None
            parts = [self._ended(tokens, num_patches)]
        features = to_map(parts[0] if len(parts) == 1 else torch.cat(parts, 2), grid)
        if self.summary_kind == "none":
            return BackboneOutput(features, None)
        if not by_end:
            return BackboneOutput(features, features.mean((2, 3)))
        assert tokens is not None
        return BackboneOutput(features, self.summarise(self.summary_kind, tokens, output, num_patches))

    def _ended(self, tokens: Tensor, num_patches: int) -> Tensor:
        patches = tokens[:, -num_patches:]
        return self.project(patches) if self.options.project else patches


def to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h * w, C] to [B, C, h, w], a view."""
    return patches.transpose(1, 2).unflatten(2, grid)


def chosen_blocks(blocks: Sequence[Any], layers: tuple[int, ...] | None, name: str) -> list[int]:
    """Numbers from 0 of the blocks that ``layers`` means, the last for None; ConfigError for one that is not there."""
    count = len(blocks)
    for layer in layers or ():
        if not -count <= layer < count:
            raise ConfigError(f"backbone {name!r} has {count} blocks, 0 to {count - 1}; got layer={layer}")
    return [count - 1] if layers is None else [layer % count for layer in layers]


def chosen_stage(stages: Sequence[Any], options: Options, name: str) -> int:
    """Number of the one stage of a convolutional network that ``options`` mean.

    Raises:
        ConfigError: For a facet, a stage that is not there, or several, whose strides differ.
    """
    if options.facet != "token":
        raise ConfigError(
            f"backbone {name!r} is convolutional, without attention: it has no {options.facet}; leave out facet"
        )
    chosen = chosen_blocks(stages, options.layer, name)
    if len(chosen) > 1:
        raise ConfigError(
            f"the stages of backbone {name!r} have different strides and cannot be concatenated; name one layer, 0 to "
            f"{len(stages) - 1}"
        )
    return chosen[0]


def chosen_summary(name: str, asked: str, summaries: Mapping[str, Any]) -> str:
    """The kind of summary that is asked for; "default" is the first, without any "none"."""
    kinds = list(dict.fromkeys([*summaries, "mean", "none"]))
    if asked == "default":
        return next(iter(summaries), "none")
    if asked not in kinds:
        raise ConfigError(f"backbone {name!r} has no summary {asked!r}; it has {', '.join(kinds)}")
    return asked


class _Stop(Exception):
    """Everything that was wanted is there."""


@contextmanager
def captured(modules: Sequence[nn.Module], *, inputs: bool = False, then_stop: bool = False) -> Iterator[list[Tensor]]:
    """Within this context, the output of each of ``modules`` is put into the list, in the order in which they run.

    A hook sees the calls of all threads; only those of the thread that entered the context are kept, so that several
    can use one model at a time. The context works inside of what torch.compile compiles.

    Args:
        modules: The modules to watch.
        inputs: Keep the first positional argument of each in place of its output.
        then_stop: End the body of the context once all have run; what comes after them is not computed.
    """
    kept: list[Tensor] = []
    here = _this_thread()

    def keep(tensor: Tensor) -> None:
        if here is None or _this_thread() in (here, None):
            kept.append(tensor)
            if then_stop and here is not None and len(kept) == len(modules):
                raise _Stop

    if inputs:
        hooks = [module.register_forward_pre_hook(lambda module, given: keep(given[0])) for module in modules]
    else:
        hooks = [module.register_forward_hook(lambda module, given, output: keep(output)) for module in modules]
    try:
        yield kept
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _this_thread() -> int | None:
    """A number of the calling thread; none while torch.compile traces, which cannot follow it and is one thread."""
    return None if torch.compiler.is_compiling() else threading.get_ident()
