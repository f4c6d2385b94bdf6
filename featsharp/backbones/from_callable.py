"""Any module as a backbone: ``from_callable(module)`` finds out its patch size, prefix tokens, layout and grid order.

Shapes:
    BCHW features [B, C, h, w], or BNC tokens [B, P + h * w, C] with P prefix tokens first, patches row by row.
"""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from featsharp.backbones._probing import (
    MIN_PROBE_GRID,
    Facts,
    Layout,
    Probe,
    check_grid_order,
    owner_of,
    pick_features,
    pick_summary,
    shape_text,
    size_text,
    solve_facts,
)
from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneOutput, embeds_patches
from featsharp.errors import ConfigError

_logger = logging.getLogger(__name__)


class CallableBackbone(Backbone):
    """A module or function as a backbone, from :func:`from_callable`.

    ``call`` maps whitened images to whatever ``output`` picks features from.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Any],
        name: str,
        *,
        facts: Facts,
        summary_dim: int | None,
        input_size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        output: Callable[[Any], Tensor] | None,
        summary: Callable[[Any], Tensor] | None,
    ) -> None:
        super().__init__(
            name,
            patch_size=facts.patch_size,
            embed_dim=facts.embed_dim,
            input_size=input_size,
            mean=mean,
            std=std,
            summary_dim=summary_dim,
            flexible=facts.flexible,
        )
        self.call = call  # registered as a submodule when it is one
        self.owner = None if isinstance(call, nn.Module) else owner_of(call)  # the module that a method belongs to
        self.layout: Layout = facts.layout
        self.num_prefix_tokens = facts.num_prefix_tokens
        self._output, self._summary = output, summary
        layers = [] if (owner := owner_of(call)) is None else owner.modules()
        self.embeds_patches = sum(embeds_patches(layer, facts.patch_size) for layer in layers) == 1
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        raw = self.call(images)
        features = pick_features(raw, self._output)
        if self.layout == "BNC":
            height, width = images.shape[-2:]
            patches = features[:, self.num_prefix_tokens :]
            features = patches.transpose(1, 2).unflatten(2, self.grid_size((height, width)))
        return BackboneOutput(features, pick_summary(raw, self._summary))


def from_callable(
    module: Callable[[Tensor], Any],
    *,
    name: str = "callable",
    patch_size: int | None = None,
    embed_dim: int | None = None,
    num_prefix_tokens: int | None = None,
    layout: Layout | None = None,
    input_size: tuple[int, int] = (224, 224),
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    summary: Callable[[Any], Tensor] | None = None,
    flexible: bool = True,
    output: Callable[[Any], Tensor] | None = None,
) -> Backbone:
    """Wrap a module or function that maps whitened images [B, 3, H, W] to features; frozen and switched to eval mode.

    Facts that are not given are measured by running it on a few images, given ones are checked. A module, or a
    method of one such as ``vit.forward_features``, moves and hashes with the backbone; the weights behind a plain
    function or lambda are invisible to ``to()``, ``freeze()`` and ``weights_hash()``.

    Args:
        module: Called with images only.
        name: A label; it goes into checkpoints.
        patch_size: Pixels per token along each axis.
        embed_dim: Channels of the features.
        num_prefix_tokens: Tokens before the patches (class token, registers) of a BNC output.
        layout: "BCHW" or "BNC".
        input_size: Native (h, w) in pixels, whole patches.
        mean, std: The whitening that the module expects.
        summary: Takes what the module returns, gives [B, C_s]. None: ``x_norm_clstoken``, ``pooler_output`` or
            ``summary`` if the output has one, the [B, C_s] part of a pair, else no summary.
        flexible: False when only ``input_size`` works; other sizes are then not tried. A module that fails the trial at
            other sizes becomes a fixed one by itself.
        output: Takes what the module returns, gives the features. None: a tensor itself; ``x_norm_patchtokens``,
            ``last_hidden_state`` or ``features`` of a mapping or object; the maps or tokens of a (summary, features)
            pair.

    Raises:
        ConfigError: When the module cannot be run or understood, when a given fact is wrong, or when its grid runs in
            another order; the message says which argument to pass.

    >>> trunk = nn.Conv2d(3, 12, kernel_size=16, stride=16)
    >>> from_callable(trunk, name="mine").patch_size
    16
    """
    if layout not in (None, "BCHW", "BNC"):
        raise ConfigError(f"layout is 'BCHW', 'BNC' or None; got {layout!r}")
    if not callable(module):
        raise ConfigError(f"from_callable takes a module or function of images; got {type(module).__name__}")
    probe = Probe(module, name, input_size, output)
    raw = probe.run(input_size)
    native = probe.shape_of(raw)
    wide = probe.shape_elsewhere((input_size[0], 2 * input_size[1]), native) if flexible else None
    facts = solve_facts(name, input_size, native, wide, patch_size, num_prefix_tokens)
    for fact, given, measured in (
        ("patch_size", patch_size, facts.patch_size),
        ("embed_dim", embed_dim, facts.embed_dim),
        ("num_prefix_tokens", num_prefix_tokens, facts.num_prefix_tokens),
        ("layout", layout, facts.layout),
    ):
        if given is not None and given != measured:
            raise ConfigError(
                f"{name!r} was given {fact}={given!r}, but from its output {shape_text(native)} "
                f"at {size_text(input_size)} pixels it is {measured!r}; drop the argument or pick another output="
            )
    test_size = input_size
    if facts.flexible:
        rows, columns = (max(MIN_PROBE_GRID, side // facts.patch_size) for side in input_size)
        odd_size = rows * facts.patch_size, (columns + 1) * facts.patch_size
        if probe.shape_elsewhere(odd_size, native) == facts.output_shape(odd_size):
            test_size = odd_size
        else:
            _logger.info("%r is taken as fixed to %s: not every number of patches works", name, size_text(input_size))
            facts = facts._replace(flexible=False)
    pooled = pick_summary(raw, summary)
    if pooled is not None and pooled.ndim != 2:
        raise ConfigError(f"the summary of {name!r} has to be [B, C]; summary= gave {shape_text(pooled.shape)}")
    backbone = CallableBackbone(
        module,
        name,
        facts=facts,
        summary_dim=None if pooled is None else pooled.shape[1],
        input_size=input_size,
        mean=mean,
        std=std,
        output=output,
        summary=summary,
    )
    check_grid_order(backbone, probe.images(test_size))
    return backbone
