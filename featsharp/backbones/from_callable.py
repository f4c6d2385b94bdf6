"""Any module as a backbone: ``from_callable(module)`` measures its patch size, prefix tokens, layout and grid order.

Shapes:
    BCHW features [B, C, h, w], or BNC tokens [B, P + h * w, C] with P prefix tokens first, patches row by row.

Tokens of an HxW and an Hx2W image number ``P + n`` and ``P + 2 * n``, so both are known, and ``n = (H / p) * (W / p)``.
The order of the grid shows when single patches of an image are changed: the tokens there have to answer most.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from featsharp.backbones.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Backbone,
    BackboneOutput,
    embeds_patches,
)
from featsharp.backbones.options import Options
from featsharp.errors import ConfigError, first_line
from featsharp.layers.input_conditioner import check_whitening
from featsharp.ops.resize import check_size

Layout = Literal["BCHW", "BNC"]

FEATURE_KEYS = ("x_norm_patchtokens", "last_hidden_state", "features")
SUMMARY_KEYS = ("x_norm_clstoken", "pooler_output", "summary")
MAX_GUESSED_PREFIX = 16  # at one size only, patch sizes that would leave more prefix tokens than this are not believed
MIN_PROBE_GRID = 6  # rows and columns for the order test to tell places apart

_logger = logging.getLogger(__name__)


class Facts(NamedTuple):
    """Measured facts about a module."""

    patch_size: int
    embed_dim: int
    num_prefix_tokens: int
    layout: Layout
    flexible: bool

    def output_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of what the module has to give for one image of ``size``."""
        rows, columns = size[0] // self.patch_size, size[1] // self.patch_size
        if self.layout == "BCHW":
            return (1, self.embed_dim, rows, columns)
        return (1, self.num_prefix_tokens + rows * columns, self.embed_dim)


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
        mean: Of the whitening that the module expects, three values, for pixels in [0, 1].
        std: Its standard deviation, above 0.
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
        InputError: For an ``input_size`` that is not two whole numbers.

    >>> trunk = nn.Conv2d(3, 12, kernel_size=16, stride=16)
    >>> from_callable(trunk, name="mine").patch_size
    16
    """
    if layout not in (None, "BCHW", "BNC"):
        raise ConfigError(f"layout is 'BCHW', 'BNC' or None; got {layout!r}")
    if not callable(module):
        raise ConfigError(f"from_callable takes a module or function of images; got {type(module).__name__}")
    input_size = check_size("input_size", input_size, "pixels")
    mean, std = check_whitening(mean, std, f"backbone {name!r}")
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


def wrap_unknown(name: str, module: Callable[[Tensor], Any], options: Options, **facts: Any) -> Backbone:
    """Wrap a module that belongs to no family.

    Args:
        name: The name of ``create_backbone``.
        module: A module or its method, as for :func:`from_callable`.
        options: Of the name.
        facts: Native size and whitening, as for :func:`from_callable`.

    Raises:
        ConfigError: For options about the insides of the model, and as :func:`from_callable`.
    """
    if options.inner or options.project or options.summary != "default":
        raise ConfigError(
            f"the insides of {name!r} ({type(owner_of(module)).__name__}) are not known; leave out layer, facet, "
            f"project and summary, or wrap the part that you want with featsharp.backbones.from_callable"
        )
    return from_callable(module, name=name, **facts)


class Probe:
    """Runs a module on a seeded noise image, on its own device and in its own dtype."""

    def __init__(
        self,
        module: Callable[[Tensor], Any],
        name: str,
        input_size: tuple[int, int],
        output: Callable[[Any], Tensor] | None,
    ) -> None:
        self.module, self.name, self.input_size, self.output = module, name, input_size, output
        owner = owner_of(module)
        if owner is not None:
            owner.eval()
        floating = [p for p in owner.parameters() if p.is_floating_point()] if owner is not None else []
        self.like = floating[0] if floating else torch.empty(0, dtype=torch.float32, device="cpu")

    def images(self, size: tuple[int, int]) -> Tensor:
        """[1, 3, h, w] of noise on blocks of 4 pixels: random, yet with colours that survive pooling."""
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(
            1, 3, -(-size[0] // 4), -(-size[1] // 4), generator=generator, dtype=torch.float32, device="cpu"
        )
        blocks = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., : size[0], : size[1]]
        return blocks.to(self.like.device, self.like.dtype)

    @torch.no_grad()
    def run(self, size: tuple[int, int]) -> Any:
        """Run the module on one image."""
        try:
            return self.module(self.images(size))
        except Exception as error:  # whatever a foreign module raises, the message has to say what was tried
            raise ConfigError(
                f"{self.name!r} fails on whitened images [1, 3, {size[0]}, {size[1]}]: {first_line(error)}; "
                f"pass the input_size=(h, w) that it was made for"
            ) from error

    def shape_of(self, raw: Any) -> torch.Size:
        """Shape of the features in what the module returned for one image."""
        shape = pick_features(raw, self.output).shape
        if len(shape) not in (3, 4):
            raise ConfigError(
                f"{self.name!r} gives {shape_text(shape)}, neither BCHW nor BNC; pass the part before pooling (such as "
                f"model.forward_features) or pick it with output="
            )
        if shape[0] != 1:
            raise ConfigError(
                f"{self.name!r} gives {shape_text(shape)} for one image: the first axis is not the batch; "
                f"permute it with output="
            )
        return shape

    def shape_elsewhere(self, size: tuple[int, int], native: torch.Size) -> torch.Size | None:
        """Shape of the features at another size; None where the module fails there or resizes its input."""
        try:
            shape = self.shape_of(self.run(size))
        except ConfigError as error:
            _logger.info("%r is taken as fixed to %s: %s", self.name, size_text(self.input_size), error)
            return None
        return None if shape == native else shape


def solve_facts(
    name: str,
    size: tuple[int, int],
    native: torch.Size,
    wide: torch.Size | None,
    patch_size: int | None,
    num_prefix_tokens: int | None,
) -> Facts:
    """The facts behind the shapes at ``size`` and, for a flexible module, at twice the width."""
    if wide is not None:
        grown = [axis for axis in range(len(native)) if len(wide) != len(native) or wide[axis] != native[axis]]
        if grown != [3 if len(native) == 4 else 1]:
            wanted = "BCHW (or transpose its rows and columns)" if len(native) == 4 else "BNC"
            raise ConfigError(
                f"{name!r} gives {shape_text(native)} at {size_text(size)} pixels and {shape_text(wide)} at twice "
                f"the width: the axes are in another order; permute them to {wanted} with output="
            )
    if len(native) == 4:
        sides = native[2:]
        if any(pixels % tokens for pixels, tokens in zip(size, sides, strict=True)) or (
            size[0] * sides[1] != size[1] * sides[0]
        ):
            raise ConfigError(
                f"{name!r} gives {shape_text(native)} at {size_text(size)} pixels, which as BCHW is no grid of whole "
                f"square patches; pass an input_size= of whole patches, or permute to BCHW with output="
            )
        return Facts(size[0] // sides[0], native[1], 0, "BCHW", wide is not None)
    length = native[1]
    if wide is not None:
        patch = _patch_of(size, wide[1] - length)
    elif patch_size is not None:
        patch = patch_size
    elif num_prefix_tokens is not None:
        patch = _patch_of(size, length - num_prefix_tokens)
    else:
        divisors = [p for p in range(2, min(size) + 1) if size[0] % p == 0 and size[1] % p == 0]
        likely = [p for p in divisors if 0 <= length - _num_patches(size, p) <= MAX_GUESSED_PREFIX]
        if len(likely) > 1:
            raise ConfigError(
                f"{name!r} works at {size_text(size)} pixels only, where {length} tokens fit patch sizes "
                f"{', '.join(map(str, likely))}; pass patch_size="
            )
        patch = likely[0] if likely else None
    if patch is None or length < _num_patches(size, patch) or size[0] % patch or size[1] % patch:
        raise ConfigError(
            f"{name!r} gives {shape_text(native)} at {size_text(size)} pixels, which as BNC fits no grid of whole "
            f"square patches after prefix tokens; pass patch_size= and num_prefix_tokens=, or pick tokens with output="
        )
    return Facts(patch, native[2], length - _num_patches(size, patch), "BNC", wide is not None)


@torch.no_grad()
def check_grid_order(backbone: Backbone, image: Tensor) -> None:
    """Change single patches of ``image`` [1, 3, H, W]; raise ConfigError unless the tokens there answer most.

    A large stride centres tokens up to half a patch away, so a neighbour may answer. Tokens that answer to every change
    (the artefact tokens of large ViTs) are discounted, and a majority decides.
    """
    rows, columns = backbone.grid_size((image.shape[2], image.shape[3]))
    # Places far from where they land when rows and columns are swapped.
    fractions = ((0.2, 0.7), (0.75, 0.3), (0.35, 0.85), (0.8, 0.55))
    places = sorted({(int(rows * y), int(columns * x)) for y, x in fractions})
    p = backbone.patch_size
    images = image.repeat(1 + len(places), 1, 1, 1)
    for index, (y, x) in enumerate(places, start=1):
        images[index, :, y * p : (y + 1) * p, x * p : (x + 1) * p] *= -2
    features = backbone(images).features.float()
    wanted = (len(images), backbone.embed_dim, rows, columns)
    if features.shape != wanted:
        raise ConfigError(
            f"{backbone.name!r} gives features {shape_text(features.shape)} for a batch of {len(images)} at "
            f"{size_text(image.shape[2:])} pixels, expected {shape_text(wanted)}; it has to take batches"
        )
    if not features.isfinite().all():
        raise ConfigError(
            f"{backbone.name!r} gives NaN or infinite features for whitened noise; check its weights and their dtype"
        )
    change = (features[1:] - features[:1]).norm(dim=1)  # [places, h, w]
    change = change - (change.sum(0) - change) / max(1, len(places) - 1)
    peaks = [divmod(int(k), columns) for k in change.flatten(1).argmax(1)]
    hits = sum(_near(peak, place) for peak, place in zip(peaks, places, strict=True))
    if 2 * hits > len(places):
        return
    swapped = [divmod(y + x * rows, columns) for y, x in places]
    transposed = 2 * sum(_near(peak, place) for peak, place in zip(peaks, swapped, strict=True)) > len(places)
    looks = "the grid looks transposed (tokens run down columns)" if transposed else "the grid runs in another order"
    raise ConfigError(
        f"{backbone.name!r}: a change of patch {places[0]} (row, column) of {rows}x{columns} shows at token "
        f"{peaks[0]}: {looks}; reorder it with output= so that tokens run row by row, after the prefix tokens"
    )


def owner_of(call: Callable[[Tensor], Any]) -> nn.Module | None:
    """The module that ``call`` is or is a method of."""
    owner = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def pick_features(raw: Any, output: Callable[[Any], Tensor] | None) -> Tensor:
    """Features in what a module returned."""
    if output is not None:
        raw = output(raw)
    if isinstance(raw, Tensor):
        return raw
    named = _named(raw, FEATURE_KEYS)
    if named is not None:
        return named
    dense = [value for value in raw if _is_tensor(value, 3, 4)] if isinstance(raw, (tuple, list)) else []
    if len(dense) == 1:
        return dense[0]
    what = f"a mapping with {', '.join(map(str, raw))}" if isinstance(raw, Mapping) else f"a {type(raw).__name__}"
    raise ConfigError(f"the module returns {what}, and no part is plainly the features; pick it with output=")


def pick_summary(raw: Any, summary: Callable[[Any], Tensor] | None) -> Tensor | None:
    """Summary in what a module returned, None when there is none or it is not plain which part it is."""
    if summary is not None:
        return summary(raw)
    if isinstance(raw, Tensor):
        return None
    named = _named(raw, SUMMARY_KEYS)
    if named is not None:
        return named
    pooled = [value for value in raw if _is_tensor(value, 2)] if isinstance(raw, (tuple, list)) else []
    return pooled[0] if len(pooled) == 1 else None


def shape_text(shape: Any) -> str:
    """Write a shape as "[1, 3, 64, 64]"."""
    return f"[{', '.join(map(str, shape))}]"


def size_text(size: Any) -> str:
    """Write an (h, w) as "64x96"."""
    return f"{size[0]}x{size[1]}"


def _num_patches(size: tuple[int, int], patch_size: int) -> int:
    return (size[0] // patch_size) * (size[1] // patch_size)


def _patch_of(size: tuple[int, int], num_patches: int) -> int | None:
    """The patch size that cuts ``size`` into ``num_patches``, None when there is none."""
    if num_patches < 1:
        return None
    patch_size = math.isqrt(size[0] * size[1] // num_patches)
    return patch_size if patch_size > 0 and _num_patches(size, patch_size) == num_patches else None


def _near(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= 1


def _named(raw: Any, keys: tuple[str, ...]) -> Tensor | None:
    """The first of ``keys`` that is a tensor in a mapping or an attribute of an object."""
    for key in keys:
        value = raw.get(key) if isinstance(raw, Mapping) else getattr(raw, key, None)
        if isinstance(value, Tensor):
            return value
    return None


def _is_tensor(value: Any, *dims: int) -> bool:
    return isinstance(value, Tensor) and value.ndim in dims
