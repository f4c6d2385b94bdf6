"""Models of libraries as backbones: vision transformers (:class:`TokenBackbone`) and networks of stages.

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first, then registers), then patches row by row.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput, embeds_patches
from featsharp.backbones.options import Options
from featsharp.errors import ConfigError
from featsharp.ops.resize import size_of

FACETS = ("query", "key", "value")


class ModelBackbone(Backbone):
    """A model of a library, with a summary of a kind that ``options`` choose. Subclasses implement :meth:`encode`.

    Args:
        name: The name of ``create_backbone``, or a label.
        model: The module with the weights.
        options: Of these summary here, layer, facet and project in the subclasses.
        summaries: Channels by kind of summary, the default first. "mean", that of the features unless the model has its
            own, and "none" are everyone's; the default of a model without summaries is "none".
        step: Sides of images are its multiples; None: those of the patch size.
        facts: Patch size, width, native size, whitening and flexibility, as for :class:`Backbone`.

    Raises:
        ConfigError: For a summary that the model does not have.
    """

    holder = "model"  # name of the attribute with the model, and so of the weights
    model: Any
    visual: Any

    def __init__(
        self,
        name: str,
        model: nn.Module,
        options: Options,
        *,
        summaries: Mapping[str, int | None],
        step: int | None = None,
        **facts: Any,
    ) -> None:
        super().__init__(name, **facts)
        self.add_module(self.holder, model)
        self.options = options
        self.step = step or self.patch_size
        self.summary_kind = choose_summary(name, options.summary, summaries)
        self.summary_dim = {"none": None, "mean": self.embed_dim, **summaries}[self.summary_kind]
        # Whether the end of the model makes the summary; a mean of the features and none do not need it.
        self.needs_end = self.summary_kind in summaries and self.summary_kind != "none"
        self.freeze()

    def encode(self, images: Tensor) -> tuple[Tensor, Any, Any]:
        """Features [B, C, h, w], and for :meth:`summarise` the end of the model, unless it stopped early, and more."""
        raise NotImplementedError

    def summarise(self, kind: str, end: Any, output: Any) -> Tensor:
        """The summary [B, C_s] of what :meth:`encode` gave beside the features."""
        raise NotImplementedError

    def end_map(self, end: Any, grid: tuple[int, int]) -> Tensor:
        """The end of the model as a map [B, C, h, w], of which a model that has a mean of its own takes it."""
        raise NotImplementedError

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """The nearest (h, w) in multiples of ``step``, or ``input_size`` for a fixed model."""
        fitted = super().fit_size(height, width)
        if not self.flexible:
            return fitted
        return max(1, round(height / self.step)) * self.step, max(1, round(width / self.step)) * self.step

    def extract(self, images: Tensor) -> BackboneOutput:
        features, end, output = self.encode(images)
        if self.summary_kind == "none":
            return BackboneOutput(features, None)
        if self.summary_kind == "mean":
            averaged = self.end_map(end, self.grid_size(size_of(images))) if self.needs_end else features
            return BackboneOutput(features, averaged.mean((2, 3)))
        return BackboneOutput(features, self.summarise(self.summary_kind, end, output))


class TokenBackbone(ModelBackbone):
    """A vision transformer: the patch tokens of its end, or of chosen blocks after its final norm, or their facets.

    A family of models says in a subclass how its transformer runs (:meth:`run`), and where that differs from the usual:
    the final norm, the layer that makes a facet, the head into the space of text, the summaries.

    Args:
        blocks: The blocks of the transformer.
        width: Channels of its tokens.
        head_width: Channels of projected tokens.
        name, model, options, facts: As for :class:`ModelBackbone`.

    Raises:
        ConfigError: For a block, facet or summary that the model does not have.
    """

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
        head_width: int = 0,
        **facts: Any,
    ) -> None:
        self.layers = choose_blocks(blocks, options.layer, name)
        super().__init__(name, model, options, embed_dim=width, **facts)
        self.width = width
        self._order = sorted(set(self.layers))
        self._blocks = [blocks[layer] for layer in self._order] if options.inner or not self.has_end else []
        facet = options.facet != "token"
        self._sources = [self.source(block) if facet else block for block in self._blocks]
        widths = dict.fromkeys(self.layers, head_width if options.project else width)
        if facet and not options.project:
            widths = {n: self.facet_width(block) for n, block in zip(self._order, self._blocks, strict=True)}
        self.embed_dim = sum(widths[layer] for layer in self.layers)
        if self.summary_kind == "mean" and not self.needs_end:
            self.summary_dim = self.embed_dim
        self.embeds_patches = any(embeds_patches(layer, self.patch_size) for layer in model.modules())

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
        return self.width

    def take(self, block: Any, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens from what ``block``, or the layer that makes its facet, gave."""
        return tensor

    def project(self, tokens: Tensor) -> Tensor:
        """Patch tokens [B, h * w, C] into the space of text."""
        raise NotImplementedError

    def end_map(self, end: Any, grid: tuple[int, int]) -> Tensor:
        return to_map(end[:, -grid[0] * grid[1] :], grid)

    def encode(self, images: Tensor) -> tuple[Tensor, Any, Any]:
        grid = self.grid_size(size_of(images))
        facet, project = self.options.facet != "token", self.options.project
        end: Any = None
        output = None
        stop = bool(self._sources) and not self.needs_end
        with captured(self._sources, inputs=facet and self.facet_from_inputs, then_stop=stop) as taken:
            end, output = self.run(images)
        tokens = dict.fromkeys(self._order, end)
        if self._blocks:
            for layer, block, tensor in zip(self._order, self._blocks, taken, strict=True):
                part = self.take(block, tensor, grid)
                tokens[layer] = part if facet and not project else self.norm(part)
        parts = [tokens[layer][:, -grid[0] * grid[1] :] for layer in self.layers]
        parts = [self.project(patches) for patches in parts] if project else parts
        return to_map(parts[0] if len(parts) == 1 else torch.cat(parts, 2), grid), end, output


class StageBackbone(ModelBackbone):
    """A network whose stages make maps: its last map, or that of one stage, whose stride is the patch size.

    Args:
        stage: The module of the stage that ``options.layer`` names.
        name, model, options, facts: As for :class:`ModelBackbone`.
    """

    def __init__(self, name: str, model: nn.Module, options: Options, stage: nn.Module, **facts: Any) -> None:
        super().__init__(name, model, options, **facts)
        self._sources = [] if options.layer is None else [stage]

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        """The last map, and what :meth:`summarise` needs beside it."""
        raise NotImplementedError

    def take(self, tensor: Any) -> Tensor:
        """The map [B, C, h, w] of what a stage, or the network, gave."""
        return tensor

    def project(self, features: Tensor) -> Tensor:
        """A map [B, C, h, w] into the space of text, place by place."""
        raise NotImplementedError

    def end_map(self, end: Any, grid: tuple[int, int]) -> Tensor:
        return self.take(end)

    def encode(self, images: Tensor) -> tuple[Tensor, Any, Any]:
        end: Any = None
        output = None
        with captured(self._sources, then_stop=bool(self._sources) and not self.needs_end) as taken:
            end, output = self.run(images)
        features = self.take(taken[0] if taken else end)
        return self.project(features) if self.options.project else features, end, output


def to_map(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, h * w, C] to [B, C, h, w], a view."""
    return patches.transpose(1, 2).unflatten(2, grid)


def choose_blocks(blocks: Sequence[Any], layers: tuple[int, ...] | None, name: str) -> list[int]:
    """Numbers from 0 of the blocks that ``layers`` means, the last for None; ConfigError for one that is not there."""
    count = len(blocks)
    for layer in layers or ():
        if not -count <= layer < count:
            raise ConfigError(f"backbone {name!r} has {count} blocks, 0 to {count - 1}; got layer={layer}")
    return [count - 1] if layers is None else [layer % count for layer in layers]


def choose_stage(stages: Sequence[Any], options: Options, name: str) -> int:
    """Number of the one stage of a convolutional network that ``options`` mean.

    Raises:
        ConfigError: For a facet, a stage that is not there, or several, whose strides differ.
    """
    if options.facet != "token":
        raise ConfigError(
            f"backbone {name!r} is convolutional, without attention: it has no {options.facet}; leave out facet"
        )
    chosen = choose_blocks(stages, options.layer, name)
    if len(chosen) > 1:
        raise ConfigError(
            f"the stages of backbone {name!r} have different strides and cannot be concatenated; name one layer, 0 to "
            f"{len(stages) - 1}"
        )
    return chosen[0]


def choose_summary(name: str, asked: str, summaries: Mapping[str, Any]) -> str:
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

    hooks = []
    try:
        for module in modules:
            if inputs:
                hooks.append(module.register_forward_pre_hook(lambda module, given: keep(given[0])))
            else:
                hooks.append(module.register_forward_hook(lambda module, given, output: keep(output)))
        yield kept
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _this_thread() -> int | None:
    """A number of the calling thread; none while torch.compile traces, which cannot follow it and is one thread."""
    return None if torch.compiler.is_compiling() else threading.get_ident()
