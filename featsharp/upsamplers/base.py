"""The upsampler contract.

An upsampler sees an image and a function ``encode`` that turns whitened images into normalised, de-biased backbone
features; it never sees a backbone. *Guided* upsamplers need one pass of ``encode`` and the image; *re-encoding* ones
call it again, on tiles or on a larger image.

Convention:
    ``low_res`` is [B, C, h, w] and ``high_res`` [B, C, H, W]; both cover exactly the whole image, so cell (y, x) of an
    (h, w) map is centred at pixel ``((y + 0.5) * height / h, (x + 0.5) * width / w)`` of the image.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from torch.utils.data._utils.collate import default_collate_fn_map

from featsharp.device import check_autocast
from featsharp.errors import ConfigError, InputError
from featsharp.ops.resize import check_size, resize, size_of
from featsharp.ops.warp import sample

# Factors that the mathematics of a method allows.
Factors = Literal["any", "whole", "powers of two", "one"]


class Encode(Protocol):
    """A function from images to features, such as ``SharpEncoder.encode``.

    Args:
        images: [N, 3, H, W], whitened, whole patches of p pixels.
        patch_stride: Pixels from token to token, for the upsampler "stride"; None: the patch size.

    Returns:
        Features [N, C, h, w], with ``1 + (H - p) // patch_stride`` tokens along an axis of H pixels, and the summary
        [N, C_s], or None where the backbone has none.
    """

    def __call__(self, images: Tensor, /, *, patch_stride: int | None = None) -> tuple[Tensor, Tensor | None]: ...


class _Features(NamedTuple):
    low_res: Tensor  # [B, C, h, w]
    high_res: Tensor  # [B, C, H, W]: factor * h, factor * w, or the requested size
    summary: Tensor | None = None  # [B, C_s]


class UpsampleFeatures(_Features):
    """Features of a sharp encoder, a tuple of three: ``low_res``, ``high_res`` and ``summary``.

    The summary is the backbone's, from the low-resolution pass, unchanged.

    Attributes:
        image_size: (h, w) in pixels of the picture that both maps cover, before it was scaled for the backbone; None
            where it is not known, as after functions of torch that build named tuples anew. It may be set.
    """

    # No fourth field, since callers unpack three; and no __new__, which torch.compile does not follow.
    image_size: tuple[int, int] | None = None

    def of_picture(self, image_size: tuple[int, int] | None) -> Self:
        """Set :attr:`image_size`; returns these features."""
        self.image_size = image_size
        return self

    def at(self, xy: Tensor | Sequence[Any]) -> Tensor:
        """Read ``high_res`` at points of the picture, bilinearly between the centres of its cells.

        Args:
            xy: Points (x, y), x to the right and y down, in pixels of the picture as it was given (an EXIF orientation
                applied), of which pixel (column i, row j) is centred at (i + 0.5, j + 0.5): one [2], the same [N, 2]
                for all pictures of the batch, or [B, N, 2]; a tensor, an array or numbers. Beyond the centres of the
                outermost cells features stay as they are there.

        Returns:
            [B, C], or [B, N, C], of the type and on the device of ``high_res``, with gradients to it and to ``xy``.

        Raises:
            InputError: For points outside of the picture (x from 0 to its width and y from 0 to its height are
                inside), points of another shape, and features without :attr:`image_size`.
        """
        if self.image_size is None:
            raise InputError("these features do not know the size of their picture; set image_size = (height, width)")
        (height, width), batch = self.image_size, len(self.high_res)
        exact = torch.promote_types(self.high_res.dtype, torch.float32)
        points = torch.as_tensor(xy, device=self.high_res.device).to(exact)
        last = points.new_tensor((width, height))
        if points.shape[-1:] != (2,) or points.ndim > 3 or (points.ndim == 3 and len(points) != batch):
            raise InputError(
                f"points are (x, y): [2], [N, 2] or, for this batch, [{batch}, N, 2]; got {tuple(points.shape)}"
            )
        inside = ((points >= 0) & (points <= last)).all(-1)
        if not inside.all():
            x, y = points[~inside][0].tolist()
            raise InputError(
                f"the point (x, y) = ({x:g}, {y:g}) lies outside of the picture: x is from 0 to {width}, y from 0 to "
                f"{height}"
            )
        grid = torch.atleast_2d(2 * points / last - 1).expand(batch, -1, 2)
        read = sample(self.high_res, grid[:, None], padding_mode="border")[:, :, 0].mT
        return read[:, 0] if points.ndim == 1 else read

    def _replace(self, **fields: Any) -> Self:
        return super()._replace(**fields).of_picture(self.image_size)


# Versions of torch up to 2.5 know named tuples without subclasses only.
register_pytree_node(
    UpsampleFeatures,
    lambda features: (list(features), features.image_size),
    lambda parts, image_size: UpsampleFeatures(*parts).of_picture(image_size),
    serialized_type_name="featsharp.UpsampleFeatures",
)


def join_features(batch: Sequence[UpsampleFeatures], **unused: object) -> UpsampleFeatures:
    """Join features of one size to one batch, for the items of a ``DataLoader``, whose default does the same.

    ``image_size`` is that of all pictures, None where they have several.

    Raises:
        InputError: For maps of several sizes.
    """
    sizes = {(*size_of(one.low_res), *size_of(one.high_res)) for one in batch}
    if len(sizes) > 1:
        maps = " and ".join(f"{h}x{w} tokens with {height}x{width} cells" for h, w, height, width in sorted(sizes)[:2])
        raise InputError(
            f"features of several sizes are no batch: {maps}; give encode_image one size=(height, width), or the "
            "DataLoader batch_size=None or a collate_fn of yours"
        )
    low_res, high_res = (torch.cat([one[part] for one in batch]) for part in (0, 1))  # type: ignore[misc]
    summaries = [one.summary for one in batch if one.summary is not None]
    joined = UpsampleFeatures(low_res, high_res, torch.cat(summaries) if len(summaries) == len(batch) else None)
    pictures = {one.image_size for one in batch}
    return joined.of_picture(pictures.pop() if len(pictures) == 1 else None)


# As torch documents it for types of one's own; theirs refuses a tuple with a None, a missing summary.
default_collate_fn_map[UpsampleFeatures] = join_features


class Upsampler(nn.Module):
    """Base of all upsamplers.

    Attributes:
        embed_dim: Channels C of the features.
        factor: f, size of the result over that of the low-resolution map in each direction; an int where it is whole.
        factors: Those that the method allows: "any" from 1 upwards (and any output size), "whole", "powers of two" or
            "one".
        input_upsample_factor: Size of the image over that of the low-resolution pass beyond which it adds no detail: f
            for upsamplers that encode tiles or larger images, 1 for guided ones.
        trainable: Whether there are parameters to train.
        needs: Inputs besides features, for ``featsharp ls upsamplers``.
        keeps_space: Whether the result stays in the feature space of the backbone, so that a head trained on
            low-resolution features still works: "yes" for weighted means of features, "nearly" where something learned
            is added, "no" where the result is regressed.
        paper: Source of the method.
        num_maps: Number of maps of C channels in the result, one after the other on the channel axis.
        options: Keyword arguments of the class, for messages.
        backbone_facts: Further ones, "mean", "std", "patch_size" or "flexible", that :func:`create_upsampler` fills in
            from the backbone's attributes of these names.
        function_options: Options that may name code to be imported, as "module:function".
        presets: Options worth comparing, as names are written with them ("passes=4"), the defaults ("") among them.
        window: Side in cells of the largest window of the method; None without one.
    """

    factors: Factors = "any"
    trainable: bool = False
    needs: str = "image"
    keeps_space: Literal["yes", "nearly", "no"] = "yes"
    paper: str = ""
    num_maps: int = 1
    options: tuple[str, ...] = ()
    backbone_facts: tuple[str, ...] = ()
    function_options: tuple[str, ...] = ()
    presets: tuple[str, ...] = ("",)
    window: int | None = None

    def __init__(self, embed_dim: int, factor: float) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        self.factor = check_factor(factor, self.factors, type(self).__name__)

    @property
    def input_upsample_factor(self) -> float:
        """Size of the image that is of use, in sizes of the low-resolution pass: f for tiles, 1 for guided methods."""
        return 1

    @property
    def variant(self) -> str:
        """Word beside the method's name where options make it a much simpler one, such as "linear"; "" otherwise."""
        return ""

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        """Sharpen the features of images.

        Args:
            image: [B, 3, height, width], whitened, any size.
            encode: See :class:`Encode`.
            low_res_size: (h, w) in pixels of the low-resolution pass, a size that the backbone takes.
            output_size: (H, W) of the result in cells; None: ``factor`` times the low-resolution grid.
        """
        raise NotImplementedError

    def high_res_grid(self, features: Tensor, output_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Compute (H, W) of the output for low-resolution features [B, C, h, w].

        Raises:
            InputError: For an ``output_size`` that the method cannot make of them; it names the nearest valid one.
        """
        grid = size_of(features)
        natural = scale_length(grid[0], self.factor), scale_length(grid[1], self.factor)
        if output_size is None:
            return natural
        height, width = check_size("output_size", output_size, "cells")
        name = type(self).__name__
        if self.factors != "any" and (height, width) != natural:
            raise InputError(
                f"{name} makes {natural[0]}x{natural[1]} of a {grid[0]}x{grid[1]} grid (factor {self.factor}, and no "
                f"other size); got output_size={height}x{width}. Resize the result, or take another method"
            )
        if height < grid[0] or width < grid[1]:
            raise InputError(
                f"an upsampler cannot make less than the {grid[0]}x{grid[1]} grid that it is given; got output_size="
                f"{height}x{width}, the nearest is {max(height, grid[0])}x{max(width, grid[1])}"
            )
        return height, width

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the group that sets their learning rate in training; those in no group belong to "main".

        Names that training knows: "main" and "jbu" (``optim.jbu_learning_rate``).
        """
        return {"main": list(self.parameters())}

    def spectral_modules(self) -> list[nn.Module]:
        """Modules whose linear layers are trained under spectral reparametrisation: see ``layers.spectral``."""
        return []

    @property
    def linear_weight(self) -> Tensor | None:
        """Parameter [C, D] that mixes :meth:`linear_maps` linearly, for a fit in closed form; None without one."""
        return None

    def linear_maps(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> Tensor:
        """Compute the maps [B, D, H, W] that :attr:`linear_weight` is applied to."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, factor={self.factor}" + (f", {self.variant}" if self.variant else "")


class GuidedUpsampler(Upsampler):
    """An upsampler that needs the low-resolution features and the image only; subclasses implement ``upsample_to``."""

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        low_res, summary = encode(resize(image, low_res_size))
        return UpsampleFeatures(low_res, self.upsample(low_res, image, output_size), summary)

    def upsample(self, features: Tensor, image: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Sharpen given features.

        Args:
            features: [B, C, h, w].
            image: [B, 3, height, width], whitened, any size; the image of the features.
            output_size: (H, W); None: ``factor`` times the grid of the features.

        Returns:
            [B, C, H, W] in the dtype of the weights; of the features, where there are none.

        Raises:
            InputError: When features and image do not fit together or are integers, or for a size that the method
                cannot make.
        """
        for name, x in (("features", features), ("image", image)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                given = getattr(x, "dtype", type(x).__name__)
                raise InputError(f"the {name} must be a floating-point tensor (images whitened); got {given}")
        if features.ndim != 4 or features.shape[1] != self.embed_dim or 0 in features.shape:
            raise InputError(
                f"this {type(self).__name__} takes features [B, {self.embed_dim}, h, w], none of them 0; got "
                f"{tuple(features.shape)}"
            )
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[0] != features.shape[0] or 0 in image.shape[2:]:
            raise InputError(
                f"the image must be [B, 3, height, width] with the batch of the features, {features.shape[0]}; got "
                f"{tuple(image.shape)}"
            )
        dtype = weight_dtype(self) or features.dtype
        check_autocast(dtype, image, f"this {type(self).__name__}")
        size = self.high_res_grid(features, output_size)
        low_res, guide = (differentiable(x.to(dtype)) for x in (features, image))
        return self.upsample_to(low_res, guide, size).to(dtype)

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Sharpen features [B, C, h, w] by an image [B, 3, height, width] of any size: [B, C, *size]."""
        raise NotImplementedError


def weight_dtype(module: nn.Module) -> torch.dtype | None:
    """Type of the first floating-point parameter of a module; None for a module without any."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def differentiable(x: Tensor) -> Tensor:
    """Return ``x``, or a copy of a tensor made in inference mode, which could not be saved for a backward pass."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # torch.compile cannot ask a tensor for it
        return x
    return x.clone() if x.is_inference() else x


def check_factor(factor: float, allowed: Factors, name: str) -> float:
    """Check a factor, and return it as an int where it is whole.

    Args:
        factor: In each direction.
        allowed: See :attr:`Upsampler.factors`.
        name: Of the method, for the message.

    Raises:
        ConfigError: For a factor that is not allowed, with the nearest that is.
    """
    # NumPy's numbers are Real, too.
    if type(factor) is bool or not issubclass(type(factor), numbers.Real) or not math.isfinite(factor) or factor < 1:
        raise ConfigError(f"the upsampling factor must be a number of at least 1; got {factor!r}")
    lower = {
        "any": factor,
        "whole": math.floor(factor),
        "powers of two": 2 ** int(math.log2(factor)),
        "one": 1,
    }[allowed]
    if factor == lower:
        return int(factor) if factor == int(factor) else float(factor)
    if allowed == "one":
        raise ConfigError(f"{name} has factor 1; got {factor}. Use 'bilinear' for an untrained factor {factor}")
    higher = lower + 1 if allowed == "whole" else 2 * lower
    raise ConfigError(f"{name} takes factors that are {allowed}; got {factor}, use {lower} or {higher}")


def check_whole(name: str, value: int, least: int) -> int:
    """Return ``value``; raise ConfigError unless it is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}; got {value!r}")
    return value


def check_tile_batch(limit: int | None) -> int | None:
    """Return ``limit``; raise ConfigError unless it is None or a whole number of at least 1."""
    return None if limit is None else check_whole("max_tile_batch", limit, 1)


def name_function(function: Callable[..., Any]) -> str:
    """Name a function for a message."""
    return getattr(function, "__qualname__", type(function).__name__)


def scale_length(length: int, factor: float) -> int:
    """Multiply a length by a factor; halves are rounded up: 1.5 times 3 cells are 5."""
    if isinstance(factor, int):
        return length * factor  # keeps symbolic lengths of compiled graphs whole
    return math.floor(length * factor + 0.5)


def level_factors(factor: float) -> list[int]:
    """Factors of the levels of a stack: the prime factors, ascending, of the factor or of the next whole number."""
    return prime_factors(math.ceil(factor))


def level_sizes(grid: tuple[int, int], factors: list[int], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Compute the grid after each level: whole multiples, the last one ``size``, none larger than that."""
    sizes, total = [], 1
    for factor in factors:
        total *= factor
        sizes.append((min(grid[0] * total, size[0]), min(grid[1] * total, size[1])))
    return [*sizes[:-1], size]


def prime_factors(factor: int) -> list[int]:
    """Compute prime factors in ascending order: 12 -> [2, 2, 3]; 1 -> []."""
    primes = []
    divisor = 2
    while factor > 1:
        while factor % divisor == 0:
            primes.append(divisor)
            factor //= divisor
        divisor += 1
    return primes
