"""Features of a larger image in one pass: of the image itself at more pixels, or after super-resolution.

Both are baselines of figure 5 of FeatSharp (arXiv 2502.16025). The first is strong for backbones that give an object
the same features at any scale; those trained at a single size, such as SigLIP, fail at it. Attention over f * f times
the tokens makes the pass cost from f ** 2 to f ** 4 of a low-resolution one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from featsharp.errors import ConfigError, InputError
from featsharp.layers.input_conditioner import IMAGENET_MEAN, IMAGENET_STD, check_whitening
from featsharp.ops.recording import has_values
from featsharp.ops.resize import resize, size_of
from featsharp.registry import load_function
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler, name_function
from featsharp.upsamplers.registration import register_upsampler


class _OnePass(Upsampler):
    """Base of upsamplers whose high-resolution map is one pass of the image of :meth:`enlarge_image`."""

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        low_res, summary = encode(resize(image, low_res_size))
        grid, size = size_of(low_res), self.high_res_grid(low_res, output_size)
        patch = low_res_size[0] // grid[0], low_res_size[1] // grid[1]
        large = resize(self.enlarge_image(image, low_res_size), (patch[0] * size[0], patch[1] * size[1]))
        try:
            high_res, _ = encode(large)
        except InputError as error:  # the low-resolution image was accepted, so it is the size
            raise ConfigError(
                f"{type(self).__name__} needs a backbone that takes larger images; {error}. The upsampler 'tile' "
                f"encodes the same pixels in pieces of {low_res_size[0]}x{low_res_size[1]}"
            ) from error
        return UpsampleFeatures(low_res, resize(high_res, size), summary)

    def enlarge_image(self, image: Tensor, low_res_size: tuple[int, int]) -> Tensor:
        """Make the image [B, 3, height, width] to encode, of any size."""
        raise NotImplementedError


@register_upsampler("native-highres", "the image at factor x the size in one pass, no upsampling")
class NativeHighRes(_OnePass):
    """Features of the larger image: p * H by p * W pixels for H x W cells and patches of p pixels.

    Raises:
        ConfigError: When used with a backbone that takes one size only.
    """

    needs = "larger image"
    keeps_space = "nearly"
    paper = "FeatSharp, arXiv 2502.16025, figure 5"

    @property
    def input_upsample_factor(self) -> float:
        return self.factor

    def enlarge_image(self, image: Tensor, low_res_size: tuple[int, int]) -> Tensor:
        return image


@register_upsampler("super-resolution", "the image enlarged by your super-resolution function, then one pass")
class SuperResolution(_OnePass):
    """Super-resolution first, then the backbone.

    This baseline shows how far invented detail replaces real detail, so the function never gets more pixels than the
    low-resolution pass: a larger image is shrunk to that size first. Its result is clamped to [0, 1] and resized to p
    pixels per cell. A module is registered as a submodule, frozen, and always in eval mode.

    Args:
        embed_dim: Channels C.
        factor: In each direction.
        enlarge: Takes images [B, 3, h, w] in [0, 1] and returns them in at least that size, of any factor; or text that
            names such a function, ``"module:function"``.
        mean, std: Whitening of the backbone, three values each, which is undone for the call.

    Raises:
        ConfigError: For options out of range; when used with a backbone that takes one size only.
        InputError: When the function is called and returns something else than larger images.
    """

    needs = "image, a super-resolution function of yours"
    keeps_space = "nearly"
    function_options = ("enlarge",)
    paper = "FeatSharp, arXiv 2502.16025, figure 5"
    options = ("enlarge",)
    backbone_facts = ("mean", "std")

    def __init__(
        self,
        embed_dim: int,
        factor: float,
        *,
        enlarge: Callable[[Tensor], Tensor] | str | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(embed_dim, factor)
        self.enlarge = load_function(enlarge, "enlarge")
        if isinstance(self.enlarge, nn.Module):
            self.enlarge.requires_grad_(False).eval()
        self.mean, self.std = check_whitening(mean, std)

    def train(self, mode: bool = True) -> "SuperResolution":
        super().train(mode)
        if isinstance(self.enlarge, nn.Module):
            self.enlarge.eval()
        return self

    @torch.no_grad()
    def enlarge_image(self, image: Tensor, low_res_size: tuple[int, int]) -> Tensor:
        seen = min(image.shape[2], low_res_size[0]), min(image.shape[3], low_res_size[1])
        mean, std = (image.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        pixels = (resize(image, seen) * std + mean).clamp(0, 1)
        large = self.enlarge(pixels)
        self._check(large, pixels)
        return (large.to(image.dtype).clamp(0, 1) - mean) / std

    def _check(self, large: object, pixels: Tensor) -> None:
        name = name_function(self.enlarge)
        wanted = f"images [{pixels.shape[0]}, 3, >={pixels.shape[2]}, >={pixels.shape[3]}]"
        if not isinstance(large, Tensor):
            raise InputError(f"{name} has to return {wanted}; got a {type(large).__name__}")
        enough = large.ndim == 4 and large.shape[2] >= pixels.shape[2] and large.shape[3] >= pixels.shape[3]
        if not enough or large.shape[:2] != pixels.shape[:2] or not large.is_floating_point():
            raise InputError(f"{name} has to return floating point {wanted}; got {large.dtype} {tuple(large.shape)}")
        if large.device != pixels.device:
            raise InputError(f"{name} was given images on {pixels.device} and returned some on {large.device}")
        if has_values(large) and not large.isfinite().all() and pixels.isfinite().all():
            raise InputError(f"{name} returned NaN or infinite pixels")
