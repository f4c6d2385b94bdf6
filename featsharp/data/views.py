"""Jittered views of an image, each with the homography that maps it to the base view.

FeatSharp (arXiv 2502.16025), after FeatUp (arXiv 2403.10516). A sample is a *canvas*: the base view with a margin of
real pixels around it, already at the resolution of the views, so that the base view is its centre, unresampled, and
every jitter is one projective warp of it. Views are rendered in one batch on the device of training.

Convention:
    Homographies map view to base in normalised coordinates, -1 and 1 at the outer pixel edges (see ``ops.warp``).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.ops.resize import resize
from featsharp.ops.views import View
from featsharp.ops.warp import grid_inside, sample
from featsharp.settings import key

# Margin of the canvas beyond each side of the base view, as a fraction of the view size.
MARGIN = 0.125


@dataclass
class ViewConfig:
    """Ranges that views are drawn from.

    Attributes:
        num_views: Jitters per image, besides the base view.
        zoom: Range of the base view's zoom: 1 is the largest crop of the right shape, 2 half of its side.
        jitter_zoom: Range of the further zoom of a jitter, drawn log-uniformly.
        perspective: Range of the scale s of the perspective jitter: corners move by s * N(0, 1) of the side.
        rotation: Largest rotation in degrees, either way.
        shift: Largest shift in units of half the side, either way.
        flip: Probability that a jitter is mirrored left to right.
    """

    num_views: int = key(5, least=1)
    zoom: list[float] = key([1.0, 2.0], least_low=1.0)
    jitter_zoom: list[float] = key([0.95, 2.0], least_low=0.1)
    perspective: list[float] = key([0.01, 0.05], least_low=0.0)
    rotation: float = key(5.0, least=0, most=180)
    shift: float = key(0.08, least=0, most=1)
    flip: float = key(0.0, least=0, most=1)


class Views(NamedTuple):
    """A batch of canvases and the views to be rendered from them."""

    canvas: Tensor  # [B, 3, H + 2 my, W + 2 mx], pixels in [0, 1], black where there is no image
    mask: Tensor  # [B, 1, ...] as the canvas, 1 where there is image
    homographies: Tensor  # [B, n, 3, 3], view to base

    def to(self, device: torch.device) -> "Views":
        """The same views on another device."""
        return Views(*(x.to(device) for x in self))

    @property
    def jitters(self) -> View:
        """The B * n views, ordered (image, view)."""
        return View(self.homographies.flatten(0, 1))


def sample_views(image: Image.Image, size: tuple[int, int], config: ViewConfig, rng: np.random.Generator) -> Views:
    """Draw a base crop and its jitters.

    Args:
        image: RGB picture of any size; enlarged where it is smaller than the view.
        size: (h, w) of the base view in pixels.
        config: Ranges of all random numbers.
        rng: Their source.

    Returns:
        Views without the batch axis: canvas [3, ...], mask [1, ...], homographies [n, 3, 3].
    """
    canvas, mask = cut_canvas(image, size, *draw_crop(config, rng))
    homographies = np.stack([sample_homography(size, config, rng) for _ in range(config.num_views)])
    return Views(canvas, mask, torch.from_numpy(homographies).float())


def draw_crop(config: ViewConfig, rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
    """Draw the zoom and the offset of a base view, the first numbers that :func:`sample_views` draws."""
    zoom = _uniform(rng, config.zoom)
    row, column = rng.uniform(size=2)
    return zoom, (float(row), float(column))


def cut_values(values: np.ndarray, size: tuple[int, int], zoom: float, offset: tuple[float, float]) -> np.ndarray:
    """Crop the base view of :func:`cut_canvas` out of values [H, W] of a picture's pixels, the nearest: [h, w]."""
    scale = min(given / wanted for given, wanted in zip(values.shape, size, strict=True)) / zoom
    rows, columns = (
        ((np.arange(wanted) + 0.5) * scale + place * (given - scale * wanted)).astype(int).clip(0, given - 1)
        for given, wanted, place in zip(values.shape, size, offset, strict=True)
    )
    return values[rows[:, None], columns]


def cut_canvas(
    image: Image.Image, size: tuple[int, int], zoom: float = 1.0, offset: tuple[float, float] = (0.5, 0.5)
) -> tuple[Tensor, Tensor]:
    """Crop a base view and its margin out of a picture, with one antialiased resampling.

    Args:
        image: RGB picture.
        size: (h, w) of the base view in pixels.
        zoom: 1 for the largest crop of that shape, more for a smaller one.
        offset: Position of the crop within the picture, (row, column) in [0, 1].

    Returns:
        The canvas [3, h + 2 my, w + 2 mx] in [0, 1] and its mask [1, ...].
    """
    height, width = size
    scale = min(image.height / height, image.width / width) / zoom  # picture pixels per view pixel
    top = offset[0] * (image.height - scale * height)
    left = offset[1] * (image.width - scale * width)
    margin = canvas_margin(size)
    # Whole canvas pixels that the picture can fill on each side of the base view.
    up, start = (min(m, int((at + 1e-6) / scale)) for m, at in zip(margin, (top, left), strict=True))
    down = min(margin[0], int((image.height - top - scale * height + 1e-6) / scale))
    end = min(margin[1], int((image.width - left - scale * width + 1e-6) / scale))
    box = (left - start * scale, top - up * scale, left + (width + end) * scale, top + (height + down) * scale)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], image.width), min(box[3], image.height))
    crop = image.resize((start + width + end, up + height + down), Image.Resampling.BICUBIC, box=box)
    canvas = torch.zeros(3, height + 2 * margin[0], width + 2 * margin[1], dtype=torch.float32, device="cpu")
    mask = torch.zeros_like(canvas[:1])
    rows = slice(margin[0] - up, margin[0] + height + down)
    cols = slice(margin[1] - start, margin[1] + width + end)
    canvas[:, rows, cols] = image_to_tensor(crop)
    mask[:, rows, cols] = 1
    return canvas, mask


def canvas_margin(size: tuple[int, int]) -> tuple[int, int]:
    """Compute the margin (my, mx) in pixels around a base view of (h, w)."""
    return round(size[0] * MARGIN), round(size[1] * MARGIN)


def sample_homography(size: tuple[int, int], config: ViewConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw one jitter: [3, 3] float64, view to base."""
    zoom = np.exp(_uniform(rng, np.log(config.jitter_zoom)))
    angle = np.deg2rad(rng.uniform(-config.rotation, config.rotation))
    # A zoomed view may lie anywhere within the base view.
    room = config.shift + max(0.0, 1 - 1 / zoom)
    shift = rng.uniform(-room, room, size=2)
    flip = -1.0 if rng.uniform() < config.flip else 1.0
    corners = np.clip(_uniform(rng, config.perspective) * rng.standard_normal((4, 2)), -0.45, 0.45)
    return similarity(size, 1 / zoom, angle, shift) @ np.diag([flip, 1.0, 1.0]) @ corner_homography(2 * corners)


def similarity(size: tuple[int, int], scale: float, angle: float, shift: np.ndarray) -> np.ndarray:
    """Compose scale, rotation (in pixels: right angles stay right on non-square views) and a (x, y) shift."""
    aspect = np.diag([size[1], size[0], 1.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    matrix = np.linalg.inv(aspect) @ rotation @ aspect @ np.diag([scale, scale, 1.0])
    matrix[:2, 2] = shift
    return matrix


def corner_homography(moves: np.ndarray) -> np.ndarray:
    """Compute the projective map that moves the corners (-1,-1), (1,-1), (1,1), (-1,1) by ``moves`` [4, 2]."""
    corners = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, corners + moves, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def base_view(views: Views) -> tuple[Tensor, Tensor]:
    """Cut out the base images [B, 3, h, w] and masks [B, 1, h, w]: the centre of the canvases, unresampled."""
    my, mx = _margin_of(views.canvas)
    inner = (..., slice(my, views.canvas.shape[-2] - my), slice(mx, views.canvas.shape[-1] - mx))
    return views.canvas[inner], views.mask[inner]


def render_views(views: Views, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Render all jitters: images [B*n, 3, h, w] and masks [B*n, 1, h, w] (1 where a pixel shows image).

    They are warped at the resolution of the base view and then shrunk with antialias to ``size``.
    """
    count = views.homographies.shape[1]
    my, mx = _margin_of(views.canvas)
    full = (views.canvas.shape[-2] - 2 * my, views.canvas.shape[-1] - 2 * mx)
    scale = [full[1] / views.canvas.shape[-1], full[0] / views.canvas.shape[-2], 1.0]
    to_canvas = torch.diag(torch.tensor(scale, dtype=torch.float32, device=views.canvas.device))
    # At full size a view's grid costs more than its sampling: one grid for colours, mask and border.
    grid = View((to_canvas @ views.homographies).flatten(0, 1)).grid(full)
    content = torch.cat([views.canvas, views.mask], 1).repeat_interleave(count, 0)
    images, masks = sample(content, grid, padding_mode="zeros").split([3, 1], 1)
    # A pixel counts as image only where all pixels that it is shrunk from do.
    masks = (resize(masks * grid_inside(grid), size) > 0.99).to(images)
    return resize(images, size), masks


def _margin_of(canvas: Tensor) -> tuple[int, int]:
    """Compute the margin of a canvas from its size: n + 2 * round(n * MARGIN) determines n."""
    margins = []
    for length in canvas.shape[-2:]:
        inner = round(length / (1 + 2 * MARGIN))
        margins.append(
            next((length - n) // 2 for n in range(inner - 2, inner + 3) if n + 2 * round(n * MARGIN) == length)
        )
    return margins[0], margins[1]


def _uniform(rng: np.random.Generator, limits: Sequence[float] | np.ndarray) -> float:
    return rng.uniform(limits[0], limits[1])
