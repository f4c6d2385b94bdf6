"""The backbone contract: a frozen vision encoder, whitened image in, coarse feature map out.

Convention:
    Sizes are (h, w) in pixels for images and in tokens for features. Token (y, x) covers the pixels
    ``[y * patch_size, (y + 1) * patch_size) x [x * patch_size, (x + 1) * patch_size)``.
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from featsharp.device import check_autocast, check_weights, use_one_thread_after_forks
from featsharp.errors import ConfigError, InputError
from featsharp.layers.input_conditioner import IMAGENET_MEAN as IMAGENET_MEAN
from featsharp.layers.input_conditioner import IMAGENET_STD as IMAGENET_STD
from featsharp.layers.input_conditioner import check_whitening
from featsharp.ops.resize import size_of


class BackboneOutput(NamedTuple):
    """Output of a backbone for a batch of images."""

    features: Tensor  # [B, C, H / patch_size, W / patch_size]
    summary: Tensor | None  # [B, C_s], or None for a backbone without one


class Backbone(nn.Module):
    """A frozen vision encoder. Subclasses implement :meth:`extract` and call ``freeze()`` once built.

    Args:
        name: The name of ``create_backbone``, or a label.
        patch_size: Pixels per token along each axis.
        embed_dim: Channels C of the spatial features.
        input_size: Native (h, w) in pixels, at which the weights were trained.
        mean, std: Whitening for pixels in [0, 1], three values each.
        summary_dim: Channels of the summary, None when the backbone has none.
        flexible: Whether sizes other than ``input_size`` (multiples of the patch size) are taken.

    ``embeds_patches``: whether a token starts as a function of the pixels of its own patch, as in a vision transformer.

    Types: images are cast to the type of the weights, in which the features come back. A caller's ``torch.autocast`` is
    respected; ``autocast_dtype`` (None, torch.bfloat16 or torch.float16) is one of the backbone's own, within it alone.
    """

    autocast_dtype: torch.dtype | None = None
    embeds_patches: bool = False
    # Options (layer, facet, project, summary) that choose other features of the same weights.
    feature_options: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        name: str,
        *,
        patch_size: int,
        embed_dim: int,
        input_size: tuple[int, int],
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        summary_dim: int | None = None,
        flexible: bool = True,
    ) -> None:
        super().__init__()
        use_one_thread_after_forks()
        self.name = name
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.input_size = input_size
        self.mean, self.std = check_whitening(mean, std, f"backbone {name!r}")
        self.summary_dim = summary_dim
        self.flexible = flexible
        self._hash: tuple[object, str] | None = None

    def extract(self, images: Tensor) -> BackboneOutput:
        """Features and summary of whitened images of a size that was already checked."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> BackboneOutput:
        """Encode whitened images.

        Args:
            images: [B, 3, H, W], floating point, whitened with ``mean`` and ``std``, of a size of :meth:`fit_size`.

        Returns:
            Features [B, C, H / patch_size, W / patch_size] and summary [B, C_s] or None, in the type of the weights
            (that of the images for a function without weights), under autocast too.

        Raises:
            InputError: For another shape or type, a size that this backbone does not take, weights of a type that only
                stores (float8), or an autocast of the caller to another half type than that of the weights.
        """
        self.check_size(images)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), images.dtype)
        wish = None if images.is_meta else self.autocast_dtype
        check_weights(dtype, f"backbone {self.name!r}")
        if wish is None:
            check_autocast(dtype, images, f"backbone {self.name!r}")
        with contextlib.ExitStack() as contexts:
            if wish is not None:
                contexts.enter_context(torch.autocast(images.device.type, wish))
            # Models of libraries create tensors where torch does by default.
            usual = ("cpu", images.device.type)
            if not torch.compiler.is_compiling() and torch.get_default_device().type not in usual:
                contexts.enter_context(images.device)
            features, summary = self.extract(images.to(dtype))
        return BackboneOutput(features.to(dtype), None if summary is None else summary.to(dtype))

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """The nearest (h, w) that the backbone takes: whole patches, or ``input_size`` for a fixed one.

        Raises:
            InputError: When a side is smaller than one patch.
        """
        if height < self.patch_size or width < self.patch_size:
            raise InputError(
                f"{height:g}x{width:g} pixels are smaller than one {self.patch_size}-pixel patch of backbone "
                f"{self.name!r}; enlarge the image first"
            )
        if not self.flexible:
            return self.input_size
        p = self.patch_size
        return max(1, round(height / p)) * p, max(1, round(width / p)) * p

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (h, w) of an image of ``size`` pixels."""
        return size[0] // self.patch_size, size[1] // self.patch_size

    def with_patch_stride(self, stride: int) -> "OverlappingPatches":
        """Return a view of this backbone with a token every ``stride`` pixels, on the same weights.

        Args:
            stride: From 1 to the patch size, where the features are those of the backbone itself.

        Raises:
            ConfigError: For another stride, or a backbone whose patches cannot overlap: one that does not start from
                patches, or that takes one size only.
        """
        if isinstance(stride, bool) or not isinstance(stride, int) or not 1 <= stride <= self.patch_size:
            raise ConfigError(
                f"the patch stride of backbone {self.name!r} is a whole number from 1 to its patch size, "
                f"{self.patch_size}; got {stride!r}"
            )
        if stride < self.patch_size:
            if not self.embeds_patches:
                raise ConfigError(
                    f"the patches of backbone {self.name!r} ({type(self).__name__}) cannot overlap: it does not start "
                    f"from patches of which each becomes one token. Vision transformers do: timm:MODEL, vits14-focus, "
                    f"toy-vit, and modules of transformers or torch.hub in from_callable"
                )
            if not self.flexible:
                raise ConfigError(
                    f"the patches of backbone {self.name!r} cannot overlap: it takes {self.input_size[0]}x"
                    f"{self.input_size[1]} pixels only, and they make more tokens than that. Let it take other sizes "
                    f"(timm: dynamic_img_size=True, transformers: interpolate_pos_encoding=True), or use the "
                    f"upsampler 'tile'"
                )
        return OverlappingPatches(self, stride)

    def check_size(self, images: Tensor) -> None:
        """Raise InputError unless ``images`` is floating point [B, 3, H, W] of a size that the backbone takes."""
        if not images.is_floating_point():
            raise InputError(
                f"backbone {self.name!r} takes whitened images, floating point; got {images.dtype}. Divide pixels by "
                f"255, subtract its mean and divide by its std"
            )
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"backbone {self.name!r} takes images [B, 3, H, W]; got {tuple(images.shape)}")
        height, width = size_of(images)
        allowed = self.fit_size(height, width)
        if (height, width) != allowed:
            why = f"multiples of {self.patch_size}" if self.flexible else "a fixed size"
            raise InputError(
                f"backbone {self.name!r} takes {why}; got {height}x{width}, the nearest is "
                f"{allowed[0]}x{allowed[1]} (a SharpEncoder resizes for you)"
            )

    def freeze(self) -> None:
        """Stop all gradients to the weights and switch to eval mode for good."""
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode whatever the module around does: a frozen encoder has no training mode."""
        return super().train(False)

    def weights_hash(self) -> str:
        """Compute SHA-256 over names, shapes and float32 bytes of all weights, by which checkpoints know a backbone.

        A cast of the whole backbone to half precision keeps the hash of the weights that were cast.

        Raises:
            ConfigError: Without weights, on the device meta.
        """
        if any(value.is_meta for value in self.state_dict().values()):
            raise ConfigError(
                f"backbone {self.name!r} has no weights (device meta), so no file can know it by them; load them first"
            )
        # Hashing copies all weights, and every checkpoint asks.
        version = self._weights_version()
        if self._hash is None or self._hash[0] != version:
            digest = hashlib.sha256()
            for key, value in sorted(self.state_dict().items()):
                digest.update(f"{key}{tuple(value.shape)}".encode())
                digest.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
            self._hash = (version, digest.hexdigest())
        return self._hash[1]

    def _weights_version(self) -> tuple[tuple[int, int], ...]:
        """Changes when a weight does: it then has another place or version (inference tensors count none)."""
        return tuple(
            (value.data_ptr(), -1 if value.is_inference() else value._version)
            for _, value in sorted(self.state_dict().items())
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        """Move or cast, as ``to()`` and its kin do."""
        casts = fn(torch.empty(0, dtype=torch.float32, device="cpu")).dtype != torch.float32
        wanted = (casts or self._hash is not None) and not any(p.is_meta for p in self.parameters())
        known = self.weights_hash() if wanted else None
        super()._apply(fn, recurse)
        if known is not None:
            self._hash = (self._weights_version(), known)
        return self

    def describe(self) -> dict[str, Any]:
        """Return what rebuilds this backbone or recognises it, as a checkpoint keeps it."""
        return {
            "name": self.name,
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "features": dict(self.feature_options),
            "weights_sha256": self.weights_hash(),
        }

    def extra_repr(self) -> str:
        return f"name={self.name!r}, patch_size={self.patch_size}, embed_dim={self.embed_dim}, flexible={self.flexible}"


def embeds_patches(layer: object, patch_size: int) -> bool:
    """Tell whether a layer is a patch embedding: a convolution that cuts an image into patches."""
    size = (patch_size, patch_size)
    return isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.kernel_size == layer.stride == size


@dataclass(frozen=True)
class OverlappingPatches:
    """A backbone on patches that overlap, from :meth:`Backbone.with_patch_stride`.

    Patch (y, x) of p pixels is centred at pixel ``(y * stride + p / 2, x * stride + p / 2)``, so the map does not cover
    the image as a backbone's does: its last centres are up to ``p / 2 + stride`` pixels from the border.

    This is the smaller stride of the patch embedding of "Deep ViT Features as Dense Visual Descriptors" (arXiv
    2112.05814). The patches are laid side by side as an image of their own, which a vision transformer cuts into these
    very patches: no layer is touched, and positions are resampled as the model does it for as many patches.
    """

    backbone: Backbone
    stride: int

    def __call__(self, images: Tensor) -> BackboneOutput:
        """Whitened images [B, 3, H, W] of a size that the backbone takes to features [B, C, *grid_size((H, W))]."""
        self.backbone.check_size(images)
        return self.backbone(self._side_by_side(images))

    def grid_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Tokens (h, w) of an image of ``size`` pixels."""
        p = self.backbone.patch_size
        return 1 + (size[0] - p) // self.stride, 1 + (size[1] - p) // self.stride

    def _side_by_side(self, images: Tensor) -> Tensor:
        p = self.backbone.patch_size
        patches = images.unfold(2, p, self.stride).unfold(3, p, self.stride)  # [B, 3, h, w, p, p], a view
        return patches.transpose(3, 4).flatten(4, 5).flatten(2, 3)
