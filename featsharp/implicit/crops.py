"""Crops of one picture: mirrored margin, zoom, shift, flip.

As in FeatUp (arXiv 2403.10516, section 3); its code swaps x and y, which works for square images only.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.ops.views import View


@dataclass(frozen=True)
class CropConfig:
    """Ranges that crops are drawn from; the defaults are the published numbers.

    Attributes:
        pad: Mirrored margin around the picture, as a fraction of its side (published: 30 of 224 pixels).
        zoom: Largest zoom; drawn uniformly from 1 up.
        zoom_probability: Probability that a view is zoomed.
        flip_probability: Probability that a view is mirrored left to right.
    """

    pad: float = 30 / 224
    zoom: float = 1.8
    zoom_probability: float = 0.5
    flip_probability: float = 0.5


def sample_crops(count: int, config: CropConfig, rng: np.random.Generator) -> View:
    """Draw ``count`` views of a picture."""
    return View(torch.cat([_sample_crop(config, rng).to_base for _ in range(count)]))


class Canvas:
    """A picture with its mirrored margin, from which views are cut.

    Views are resampled from the picture itself, with antialias: where it has more pixels than the fitted image, a
    zoomed view has more detail (the published views are enlarged from the small image).

    Args:
        picture: RGB.
        pad: As in :class:`CropConfig`.
    """

    def __init__(self, picture: Image.Image, pad: float = CropConfig.pad) -> None:
        self.size = picture.height, picture.width
        self.margin = math.ceil(pad * picture.height), math.ceil(pad * picture.width)
        pixels = np.pad(np.asarray(picture), [(n, n) for n in self.margin] + [(0, 0)], mode="symmetric")
        self.padded = Image.fromarray(pixels)

    def render(self, views: View, size: tuple[int, int]) -> Tensor:
        """Cut out views without rotation: [n, 3, h, w] in [0, 1]."""
        return torch.stack([self._cut(homography.tolist(), size) for homography in views.to_base])

    def _cut(self, homography: list[list[float]], size: tuple[int, int]) -> Tensor:
        (x_scale, _, x_shift), (_, y_scale, y_shift), _ = homography
        left, right = self._span(x_shift, abs(x_scale), axis=1)
        top, bottom = self._span(y_shift, abs(y_scale), axis=0)
        view = self.padded.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(left, top, right, bottom))
        pixels = image_to_tensor(view)
        return pixels.flip(-1) if x_scale < 0 else pixels

    def _span(self, centre: float, half: float, axis: int) -> tuple[float, float]:
        """Compute start and end of a view along an axis, in pixels of the padded picture."""
        length, margin = self.size[axis], self.margin[axis]
        start, end = ((centre + side * half + 1) / 2 * length + margin for side in (-1, 1))
        return max(start, 0.0), min(end, float(length + 2 * margin))  # float32 may end a hair outside


def _sample_crop(config: CropConfig, rng: np.random.Generator) -> View:
    zoom = rng.uniform(1, config.zoom) if rng.uniform() < config.zoom_probability else 1.0
    flip = rng.uniform() < config.flip_probability
    # The padded picture spans -1 - 2 pad to 1 + 2 pad, a view 2 / zoom of it.
    room = 1 + 2 * config.pad - 1 / zoom
    x_shift, y_shift = rng.uniform(-room, room, size=2)
    return View.crop(zoom, (x_shift, y_shift), flip=flip)
