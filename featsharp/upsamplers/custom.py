"""Custom upsamplers: any function of image, features and size.

Training, benches and evaluation treat them like the upsamplers of the package.
"""

from collections.abc import Callable

from torch import Tensor

from featsharp.errors import InputError
from featsharp.ops.recording import has_values
from featsharp.registry import load_function
from featsharp.upsamplers.base import GuidedUpsampler, name_function
from featsharp.upsamplers.registration import HasEmbedDim, register_upsampler

# (whitened image [B, 3, height, width], features [B, C, h, w], (H, W)) -> [B, C, H, W]
UpsampleFunction = Callable[[Tensor, Tensor, tuple[int, int]], Tensor]


@register_upsampler("custom", "your own function of image, features and size, as 'module:function'")
class FromFunction(GuidedUpsampler):
    """An upsampler made of a function.

    The function's result is checked, and cast to the dtype of the features. A module is registered as a submodule: it
    moves, casts, trains and switches to eval mode with the encoder, and its weights are saved with it.

    Args:
        embed_dim: Channels C.
        factor: In each direction; the function is called with the size that results.
        function: Called with the whitened image [B, 3, height, width] (any size), the features [B, C, h, w] and the
            size (H, W); returns [B, C, H, W]. Or text that names one, ``"module:function"``.

    Raises:
        ConfigError: Where there is no such function.
        InputError: When the function is called and returns another shape or type, or NaN.
    """

    needs = "a function of yours"
    function_options = ("function",)
    keeps_space = "no"  # unknown
    options = ("function",)

    def __init__(self, embed_dim: int, factor: float, *, function: UpsampleFunction | str | None = None) -> None:
        super().__init__(embed_dim, factor)
        self.function = load_function(function, "function")
        self.trainable = any(parameter.requires_grad for parameter in self.parameters())

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        name = name_function(self.function)
        result = self.function(image, features, size)
        wanted = (*features.shape[:2], *size)
        if not isinstance(result, Tensor):
            raise InputError(f"{name} has to return a tensor {wanted}; got a {type(result).__name__}")
        if result.shape != wanted:
            raise InputError(
                f"{name} was asked for {wanted}, features {tuple(features.shape)} at {size[0]}x{size[1]} cells; it "
                f"returned {tuple(result.shape)}"
            )
        if not result.is_floating_point():
            raise InputError(
                f"{name} has to return floating point features such as {features.dtype}; got {result.dtype}"
            )
        if result.device != features.device:
            raise InputError(f"{name} was given features on {features.device} and returned some on {result.device}")
        # A graph cannot look at values, and NaN in the features is not the fault of the function.
        if has_values(result) and not result.isfinite().all() and features.isfinite().all():
            raise InputError(f"{name} returned NaN or infinite values for finite features")
        return result.to(features.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, function={name_function(self.function)}"


def from_function(function: UpsampleFunction | str, backbone: HasEmbedDim | int, factor: float) -> FromFunction:
    """Make an upsampler from a function, for ``create_encoder`` or to be called directly.

    Args:
        function: See :class:`FromFunction`.
        backbone: Anything with ``embed_dim``, or the number of channels.
        factor: In each direction, at least 1.

    >>> nearest = from_function(lambda image, features, size: torch.nn.functional.interpolate(features, size), 8, 2)
    >>> nearest.upsample(torch.zeros(1, 8, 3, 4), torch.zeros(1, 3, 24, 32)).shape
    torch.Size([1, 8, 6, 8])
    """
    return FromFunction(backbone if isinstance(backbone, int) else backbone.embed_dim, factor, function=function)
