"""A keypoint's partner in another image: the pixel whose feature is most like its own.

Features are L2-normalised per cell and interpolated bilinearly to every pixel of the image as the encoder saw it; what
is compared is the cosine. Interpolation is linear, so the similarities of the cells are interpolated instead of the C
channels, and divided by the length of the interpolated feature, of which there is one map per image: the same numbers.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.data.images import decode_image, image_to_tensor
from featsharp.errors import InputError
from featsharp.ops.boxes import Box
from featsharp.ops.resize import resize

FITS = ("letterbox", "stretch")

# Numbers of interpolated similarities that are there at a time.
PORTION = 1 << 24
# Bytes of features that are kept for other pairs with the same image.
CACHE_BYTES = 1 << 30


class Placement(NamedTuple):
    """Where an image lies on the canvas that the encoder sees. Points are (x, y), pixel centres at half-integers."""

    image_size: tuple[int, int]  # (h, w) of the file
    canvas_size: tuple[int, int]  # (h, w)
    box: Box  # of the image on the canvas; the rest is padding

    def to_canvas(self, points: np.ndarray) -> np.ndarray:
        """Points [K, 2] of the image file, on the canvas."""
        return points * self._scale + (self.box.left, self.box.top)

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_canvas`."""
        return (points - (self.box.left, self.box.top)) / self._scale

    @property
    def _scale(self) -> np.ndarray:
        return np.array([self.box.size[1] / self.image_size[1], self.box.size[0] / self.image_size[0]])


class Encoded(NamedTuple):
    """An image as matching needs it."""

    placement: Placement
    features: Tensor  # [1, C, h, w] float32 over the canvas, every cell of length 1
    lengths: Tensor  # [*placement.box.size]: of the features interpolated to the pixels of the image


def place(image_size: tuple[int, int], canvas_size: tuple[int, int], fit: str) -> Placement:
    """Where an image of ``image_size`` (h, w) goes: "letterbox", centred with its aspect ratio, or "stretch"."""
    (h, w), (height, width) = image_size, canvas_size
    if fit == "stretch":
        return Placement(image_size, canvas_size, Box(0, height, 0, width))
    scale = min(height / h, width / w)
    rows, columns = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    return Placement(image_size, canvas_size, Box(top, top + rows, left, left + columns))


def draw(image: Image.Image, placement: Placement, whiten: Callable[[Tensor], Tensor]) -> Tensor:
    """[1, 3, H, W] whitened: the RGB image where it belongs, by Lanczos resampling, and the mean colour elsewhere."""
    box = placement.box
    scaled = image.resize((box.size[1], box.size[0]), Image.Resampling.LANCZOS)
    canvas = torch.zeros(1, 3, *placement.canvas_size)
    box.cut(canvas).copy_(whiten(image_to_tensor(scaled)[None]))
    return canvas


def prepare(features: Tensor, placement: Placement) -> Encoded:
    """The features [1, C, h, w] of a canvas, made ready for matching."""
    if not torch.isfinite(features).all():
        raise InputError("the features hold NaN or infinite values")
    cells = F.normalize(features.float(), dim=1)
    lengths = interpolated_lengths(cells[0], placement.canvas_size)
    return Encoded(placement, cells, placement.box.cut(lengths))


def interpolated_lengths(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """The lengths [H, W] of vectors [C, h, w] interpolated bilinearly to ``size``, none of which is made.

    Between neighbours a and b, |a + t (b - a)|^2 = (1 - t) |a|^2 + t |b|^2 - t (1 - t) |b - a|^2: what is needed are
    the squared lengths of the cells and of the steps from one to the next. Here along x, then along y.
    """
    rows, columns = (_positions(cells.shape[dim], size[dim - 1], cells.device) for dim in (1, 2))
    down = _step(cells, 1)
    of_rows = _between(_square(cells), _square(_step(cells, 2)), columns)  # [h, W]
    of_steps = _between(_square(down), _square(_step(down, 2)), columns)
    return _between(of_rows.T, of_steps.T, rows).T.clamp(min=0).sqrt().float()


def match(source: Encoded, target: Encoded, points: np.ndarray) -> np.ndarray:
    """For points [K, 2] of the source's file the centres of the most similar pixels [K, 2], in the target's file."""
    queries = sample(source, points)
    height, width = target.placement.canvas_size
    box = target.placement.box
    found = []
    for part in queries.split(max(1, PORTION // (height * width))):
        similar = resize(torch.einsum("kc,chw->khw", part, target.features[0])[None], (height, width))[0]
        best = (box.cut(similar) / target.lengths.clamp(min=1e-12)).flatten(1).argmax(dim=1).cpu().numpy()
        y, x = np.divmod(best, box.size[1])
        found.append(np.stack([box.left + x + 0.5, box.top + y + 0.5], axis=1))
    return target.placement.to_image(np.concatenate(found))


def sample(image: Encoded, points: np.ndarray) -> Tensor:
    """The features [K, C] at points [K, 2] of the image's file; their lengths do not matter to :func:`match`."""
    height, width = image.placement.canvas_size
    places = image.placement.to_canvas(points) / (width, height) * 2 - 1
    grid = torch.as_tensor(places, dtype=torch.float32, device=image.features.device)[None, None]
    return F.grid_sample(image.features, grid, padding_mode="border", align_corners=False)[0, :, 0].T


class EncodedImages:
    """Images by file, ready for matching; those used last are kept, for an image occurs in many pairs.

    Args:
        encode: Whitened canvas [1, 3, H, W] to features [1, C, h, w].
        whiten: Pixels in [0, 1] to what ``encode`` takes.
        canvas_size: (H, W) in pixels.
        fit: One of :data:`FITS`.
        device: Where ``encode`` wants its input.
        cache_bytes: How many bytes to keep.
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        whiten: Callable[[Tensor], Tensor],
        canvas_size: tuple[int, int],
        fit: str,
        device: torch.device,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.encode, self.whiten, self.canvas_size, self.fit = encode, whiten, canvas_size, fit
        self.device, self.cache_bytes = device, cache_bytes
        self._kept: OrderedDict[Path, Encoded] = OrderedDict()
        self._bytes = 0

    def get(self, path: Path) -> Encoded:
        """One image; raises DataError when it cannot be decoded."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        image = decode_image(path, name=str(path), upright=False)
        placement = place((image.height, image.width), self.canvas_size, self.fit)
        canvas = draw(image, placement, self.whiten)
        found = prepare(self.encode(canvas.to(self.device)), placement)
        self._kept[path] = found
        self._bytes += _bytes_of(found)
        while self._bytes > self.cache_bytes and len(self._kept) > 1:
            self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        return found


def _bytes_of(image: Encoded) -> int:
    return sum(x.numel() * x.itemsize for x in (image.features, image.lengths))


def _positions(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each of ``target`` pixels along a line of ``source`` cells: the cell before it, and how far to the next."""
    place = ((torch.arange(target, device=device) + 0.5) * (source / target) - 0.5).clamp(min=0)
    before = place.long().clamp(max=source - 1)
    return before, (place - before).double()


def _between(square: Tensor, step: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Squared lengths [..., N] along vectors whose squared lengths, and those of their steps, are [..., n]."""
    before, t = positions
    after = (before + 1).clamp(max=square.shape[-1] - 1)
    return torch.lerp(square[..., before], square[..., after], t) - t * (1 - t) * step[..., before]


def _step(cells: Tensor, dim: int) -> Tensor:
    """From each cell to the next along an axis; 0 from the last."""
    last = cells.narrow(dim, -1, 1)
    return torch.diff(cells, dim=dim, append=last)


def _square(cells: Tensor) -> Tensor:
    """Squared lengths [h, w] of [C, h, w], in float64: what is left after the subtraction may be little."""
    return cells.square().sum(0, dtype=torch.float64)
