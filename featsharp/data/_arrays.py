"""Arrays and tensors of the pixels of one picture."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from featsharp.errors import InputError
from featsharp.names import dtype_name

BACKGROUND = (128, 128, 128)
TAKEN = (
    "a picture is a path, the bytes of an image file, a file opened with 'rb', a PIL image, or an array or tensor of "
    "H x W, H x W x 1, 3 or 4, or 1, 3 or 4 x H x W: uint8, uint16, bool, or floating point from 0 to 1"
)


def check_array(data: NDArray[Any] | Tensor) -> NDArray[Any]:
    """Check the pixels of a picture, and return them as [H, W, c] of grey, RGB or RGBA, in native byte order."""
    given = f"{describe(data)} is no picture"
    if isinstance(data, Tensor):
        nowhere = InputError(f"{given}: it has no pixels in memory; {TAKEN}")
        if data.layout != torch.strided or data.is_meta or data.is_quantized or data.is_nested:
            raise nowhere
        try:
            data = (data.float() if data.is_floating_point() else data).numpy(force=True)
        except RuntimeError as error:  # a tensor of a trace
            raise nowhere from error
    if np.ma.is_masked(data):
        raise InputError(f"{given}: some of its pixels are masked; give them a value with filled(...)")
    data = np.asarray(data)
    kind = data.dtype.kind
    if kind not in "bf" and (kind != "u" or data.dtype.itemsize > 2):
        raise InputError(f"{given}: pixels of this type have no known range; {TAKEN}")
    if data.ndim == 4:
        raise InputError(f"{given} but a batch; give a list of its pictures, or whitened images to encoder(images)")
    if data.ndim not in (2, 3) or not data.size:
        raise InputError(f"{given}; {TAKEN}")
    if data.ndim == 2:
        data = data[..., None]
    else:
        first, last = data.shape[0] in (1, 3, 4), data.shape[2] in (1, 3, 4)
        if first and last:
            raise InputError(
                f"{given}: channels may be first or last; give a PIL image, or more than 4 rows and columns"
            )
        if not first and not last:
            raise InputError(f"{given}: no side has 1, 3 or 4 channels; {TAKEN}")
        data = data if last else np.moveaxis(data, 0, -1)
    if kind == "f":
        low, high = float(data.min()), float(data.max())
        if not -1e-4 <= low <= high <= 1 + 1e-4:  # false for NaN, too; resizing rounds past the ends
            raise InputError(
                f"{given}: floats have to lie in 0..1, and these are {low:.4g}..{high:.4g}; divide levels by 255 "
                "or make them uint8, and give whitened images to encoder(images)"
            )
    return np.ascontiguousarray(data, data.dtype.newbyteorder("="))


def composite(array: NDArray[Any]) -> NDArray[np.float32]:
    """Composite floating-point pixels [H, W, c] to RGB [H, W, 3]."""
    pixels = array.astype(np.float32).clip(0, 1)
    colour, alpha = pixels[..., :3], pixels[..., 3:]
    if alpha.size:
        colour = colour * alpha + np.float32(BACKGROUND[0] / 255) * (1 - alpha)
    return np.repeat(colour, 3, -1) if colour.shape[-1] == 1 else colour


def array_to_image(array: NDArray[Any]) -> Image.Image:
    """Make an 8-bit Pillow image of checked pixels [H, W, c]."""
    if array.dtype.kind == "f":
        array = (composite(array) * 255).round().astype(np.uint8)
    elif array.dtype == np.uint16:
        array = to_8_bits(array, 65535)
    elif array.dtype == bool:
        array = array * np.uint8(255)
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def describe(data: object) -> str:
    """Name what was given instead of a picture."""
    if isinstance(data, np.ndarray):
        return f"an array of shape {data.shape} and type {data.dtype}"
    if isinstance(data, Tensor) and not data.is_nested:
        return f"a tensor of shape {tuple(data.shape)} and type {dtype_name(data.dtype)}"
    return "None" if data is None else f"an object of type {type(data).__name__}"


def to_8_bits(levels: NDArray[np.generic], top: int) -> NDArray[np.uint8]:
    """Scale whole levels 0..``top`` to 0..255, rounded."""
    return ((levels.astype(np.int32) * 255 + top // 2) // top).astype(np.uint8)
