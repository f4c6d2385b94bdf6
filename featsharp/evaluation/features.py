"""Features that tasks compare: crops, sizes and feature spaces."""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.errors import ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize

# Scales a whole picture to a size, whitened: :func:`whitened_picture` or :func:`stretched_picture`.
ScalePicture: TypeAlias = Callable[[SharpEncoder, Image, tuple[int, int]], Tensor]


def find_low_res_size(encoder: SharpEncoder, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """Return (h, w) in pixels of the low-resolution pass: the wanted one, or the backbone's native size.

    Raises:
        ConfigError: For a size that the backbone does not take, with the nearest that it does.
    """
    backbone = encoder.backbone
    if wanted is None:
        return backbone.input_size
    fitting = backbone.fit_size(*(max(side, backbone.patch_size) for side in wanted))
    if fitting != tuple(wanted):
        raise ConfigError(
            f"low_res_size {wanted[0]}x{wanted[1]} is no size that backbone {backbone.name!r} takes; the nearest is "
            f"{fitting[0]}x{fitting[1]}"
        )
    return fitting


def shown_size(encoder: SharpEncoder, low_res: tuple[int, int]) -> tuple[int, int]:
    """Return (h, w) in pixels of the picture: the low-resolution pass times the factor rounded up, at least 2.

    Encoders of factors up to 2 get the same picture.
    """
    times = max(2, math.ceil(encoder.factor))
    return low_res[0] * times, low_res[1] * times


def whitened_picture(encoder: SharpEncoder, image: Image, size: tuple[int, int]) -> Tensor:
    """Scale a whole RGB picture of any aspect ratio to ``size`` (h, w): [1, 3, h, w], whitened."""
    return encoder.input_conditioner(resize(image_to_tensor(image)[None].to(encoder.device), size))


def stretched_picture(encoder: SharpEncoder, image: Image, size: tuple[int, int]) -> Tensor:
    """:func:`whitened_picture` by Pillow's bicubic filter, which rounds to 8 bits."""
    return _whiten(encoder, image.resize((size[1], size[0]), Resampling.BICUBIC))


def whitened_crop(encoder: SharpEncoder, image: Image, size: tuple[int, int]) -> Tensor:
    """:func:`centre_crop` of an RGB picture, whitened: [1, 3, h, w]."""
    return _whiten(encoder, centre_crop(image, size))


def centre_crop(image: Image, size: tuple[int, int]) -> Image:
    """Cut the centre out of a picture scaled to just cover ``size`` (h, w)."""
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    return image.resize(covering, Resampling.BICUBIC).crop((left, top, left + width, top + height))


class EncodedCrop(NamedTuple):
    """The centre of a picture, and its sharp features."""

    image: Tensor  # [1, 3, h, w], whitened
    high_res: Tensor  # [1, C, H, W] float32, in the backbone's space


def encode_crop(encoder: SharpEncoder, image: Image, size: tuple[int, int]) -> EncodedCrop:
    """Encode the centre of an RGB picture, ``size`` (h, w); the low-resolution pass has the backbone's native size."""
    whitened = whitened_crop(encoder, image, size)
    return EncodedCrop(whitened, predict_raw(encoder, whitened, encoder.backbone.input_size))


def encode_raw(encoder: SharpEncoder, images: Tensor) -> Tensor:
    """Compute the backbone's features of whitened images, [B, C, h, w] float32, in the backbone's space.

    Where the normalizer has no inverse (LayerNorm), here and in :func:`predict_raw`: in normalised space.

    Raises:
        InputError: For features that are NaN or infinite.
    """
    features = encoder.backbone(images).features.float()
    check_finite(features, f"backbone {encoder.backbone.name!r}")
    return features if encoder.normalizer.invertible else encoder.normalizer(features)


def predict_raw(
    encoder: SharpEncoder, images: Tensor, low_res_size: tuple[int, int], *, positional: bool = True
) -> Tensor:
    """Compute high-resolution features of whitened images in the backbone's space, [B, C, H, W], float32.

    Args:
        encoder: In eval mode.
        images: [B, 3, h, w].
        low_res_size: (h, w) in pixels of the low-resolution pass.
        positional: Whether to restore the positional pattern that a bias buffer has learned to remove: encoders with
            and without one are then compared with the same target, the backbone's features. False gives the features
            that users get.

    Raises:
        ConfigError: For an upsampler that returns several maps.
        InputError: For features that are NaN or infinite.
    """
    if encoder.upsampler.num_maps > 1:
        raise ConfigError(
            f"{type(encoder.upsampler).__name__} returns {encoder.upsampler.num_maps} maps at once, which cannot be "
            "compared with the backbone's one; measure it in a task with a head of its own"
        )
    high_res = encoder(images, low_res_size=low_res_size).high_res.float()
    if encoder.bias_buffer is not None and positional:
        high_res = high_res - encoder.bias_buffer.at((high_res.shape[-2], high_res.shape[-1]))
    raw = encoder.normalizer.denormalize(high_res) if encoder.normalizer.invertible else high_res
    check_finite(raw)
    return raw


def sharp_features(
    encoder: SharpEncoder,
    image: Image,
    low_res_size: tuple[int, int] | None = None,
    scale: ScalePicture = whitened_picture,
) -> Tensor:
    """Compute high-resolution features of a whole RGB picture as users get them, [1, C, H, W] float32.

    The picture is scaled to :func:`shown_size`.

    Args:
        encoder: In eval mode.
        image: Of mode RGB.
        low_res_size: (h, w) in pixels; None: the backbone's native size.
        scale: Scales and whitens the picture.

    Raises:
        ConfigError: For a size that the backbone does not take, and an upsampler that returns several maps.
        InputError: For features that are NaN or infinite.
    """
    low_res = find_low_res_size(encoder, low_res_size)
    return predict_raw(encoder, scale(encoder, image, shown_size(encoder, low_res)), low_res, positional=False)


def check_finite(features: Tensor, origin: str = "the encoder") -> None:
    """Raise InputError for features [B, ...] that are NaN or infinite; ``origin`` is the subject of its message."""
    # The extremes, which are NaN where any value is: they take no memory, and the map may be larger than that.
    if not torch.stack(features.aminmax()).isfinite().all():
        raise InputError(
            f"{origin} returned NaN or infinite features for {len(features)} image(s); is the checkpoint damaged, "
            "or half precision too narrow for this backbone?"
        )


def _whiten(encoder: SharpEncoder, image: Image) -> Tensor:
    return encoder.input_conditioner(image_to_tensor(image)[None].to(encoder.device))
