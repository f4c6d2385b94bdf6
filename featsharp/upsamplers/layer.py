"""A guided upsampler as a layer of a network that is trained end to end."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featsharp.errors import ConfigError
from featsharp.upsamplers.base import GuidedUpsampler, Upsampler
from featsharp.upsamplers.registration import build_upsampler, resolve_upsampler


class UpsampleLayer(nn.Module):
    """Upsampling inside a network, with gradients to weights, features and image.

    Args:
        upsampler: Name of a guided upsampler (one that needs no tiles: "featup", "jafar", "resize-conv" ...), also with
            its factor as "featup-4x", or an object, for example the ``upsampler`` of a trained encoder.
        embed_dim: Channels C of the features; only with a name.
        factor: In each direction; only with a name. None: that of the name, else 2 (1 for methods that have no other).
        options: Keyword arguments of the upsampler's class; only with a name.
        recompute: Whether to checkpoint activations: less memory for one more forward pass; the gradients are the same.
            (Running statistics of batch norm, which LiFT has, then advance twice per step.)

    Raises:
        ConfigError: For an upsampler that is not guided, or arguments that do not go together.

    Example:
        >>> layer = UpsampleLayer("featup", 64, 4)
        >>> layer(torch.randn(1, 64, 8, 12), torch.randn(1, 3, 128, 192)).shape
        torch.Size([1, 64, 32, 48])
    """

    def __init__(
        self,
        upsampler: str | GuidedUpsampler,
        embed_dim: int | None = None,
        factor: float | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(upsampler, str):
            if embed_dim is None:
                raise ConfigError(f"how many channels? For example UpsampleLayer({upsampler!r}, 384)")
            name, factor, options = resolve_upsampler(upsampler, factor, options)
            built: Upsampler = build_upsampler(name, embed_dim, factor, options)
        else:
            if (embed_dim, factor, options) != (None, None, None):
                raise ConfigError("an upsampler object brings its own channels, factor and options; leave them out")
            built = upsampler
        if not isinstance(built, GuidedUpsampler):
            raise ConfigError(
                f"{type(built).__name__} needs a backbone (it looks at {built.needs}) and cannot be a layer; take a "
                "guided upsampler such as 'featup' or 'jafar', or a SharpEncoder"
            )
        self.upsampler = built
        self.recompute = recompute

    def forward(self, features: Tensor, image: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """Sharpen features; arguments, result and errors as for :meth:`GuidedUpsampler.upsample`."""
        if self.recompute and self.training and torch.is_grad_enabled():
            # For mypy, which has no type for the result of checkpoint.
            out: Tensor = checkpoint(self.upsampler.upsample, features, image, output_size, use_reentrant=False)
            return out
        return self.upsampler.upsample(features, image, output_size)

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}"
