"""The implicit network: a function of position and colour that is fitted to one image.

FeatUp (arXiv 2403.10516, section 3.2): Fourier features of (row, column, R, G, B), then three 1x1 layers. It has no
grid, so it can be evaluated at any resolution.

Shapes: N points, I inputs per point (5, or 2 without colour), 30 frequencies, K channels of the result.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.errors import InputError, unknown_name

FREQUENCY_KINDS = ("resolved", "published")
FREQUENCY_COUNT = 30
HIDDEN_DIM = 128
DROPOUT = 0.2
LOWEST, PUBLISHED_HIGHEST = math.exp(-2), math.exp(10)

# A colour spans one unit in 255 steps, and the shortest wave has two steps per period.
COLOUR_HIGHEST = math.pi * 255


class ImplicitNetwork(nn.Module):
    """(row, column) and (R, G, B) to K channels.

    Args:
        dim: K.
        frequencies: [I, 30] angular frequencies, one row per input (see :func:`frequency_table`). Two rows leave the
            colours out.
        colour_range: [2, 3] lowest and highest value of each colour of the image; they become -0.5 and 0.5. The
            published network takes them from its input image, so that they change with its size.

    With five inputs and K = 128 it has 73,098 parameters.
    """

    frequencies: Tensor
    colour_range: Tensor

    def __init__(self, dim: int, frequencies: Tensor, colour_range: Tensor) -> None:
        super().__init__()
        self.register_buffer("frequencies", frequencies.clone())
        self.register_buffer("colour_range", colour_range.clone())
        self.phases = nn.Parameter(torch.randn(2, *frequencies.shape, dtype=torch.float32))  # of sine and cosine
        inputs = 2 * frequencies.numel() + (3 if self.sees_colour else 0)
        self.norm_in = nn.LayerNorm(inputs)
        self.layer_in = nn.Linear(inputs, HIDDEN_DIM)
        self.norm = nn.LayerNorm(HIDDEN_DIM)
        self.layer = nn.Linear(HIDDEN_DIM, HIDDEN_DIM)
        self.layer_out = nn.Linear(HIDDEN_DIM, dim)

    @property
    def sees_colour(self) -> bool:
        """Return whether the colours are inputs."""
        return len(self.frequencies) == 5

    def forward(self, image: Tensor, top: int = 0, height: int | None = None) -> Tensor:
        """Evaluate the map of an image, or of some rows of it.

        Args:
            image: [1, 3, h, W] in [0, 1].
            top: Row of the whole image that the first one is.
            height: Rows of the whole image; None: ``image`` is all of it.

        Returns:
            [1, K, h, W].
        """
        rows, width = image.shape[-2:]
        points = cell_centres((height or rows, width))[top : top + rows].to(image)
        out = self.at(points.flatten(0, 1), image[0].flatten(1).T)
        return out.T.unflatten(1, (rows, width))[None]

    def at(self, points: Tensor, colours: Tensor) -> Tensor:
        """Evaluate points [N, 2], (row, column), -1 and 1 at the edges of the image, to [N, K].

        ``colours`` [N, 3] are those of the image there, in [0, 1].
        """
        x = self.norm_in(self.fourier_features(points, colours))
        x = F.relu(self.layer_in(self._drop_channels(x)))
        x = self.norm(self._drop_channels(x))
        return self.layer_out(F.relu(self.layer(x)))

    def fourier_features(self, points: Tensor, colours: Tensor) -> Tensor:
        """Compute sines of all inputs at all frequencies, cosines, and the scaled colours: [N, 303], or [N, 120]."""
        if not self.sees_colour:
            return self._waves(points)
        low, high = self.colour_range
        # An image without contrast in a colour gives 0 there, despite rounding of the resizing.
        scaled = torch.where(high > low, (colours - low) / (high - low).clamp(min=1e-6) - 0.5, 0.0)
        return torch.cat([self._waves(torch.cat([points, scaled], 1)), scaled], 1)

    def _waves(self, inputs: Tensor) -> Tensor:
        angles = inputs[:, :, None] * self.frequencies
        waves = [torch.sin(angles + self.phases[0]), torch.cos(angles + self.phases[1])]
        return torch.cat([wave.flatten(1) for wave in waves], 1)

    def _drop_channels(self, x: Tensor) -> Tensor:
        """Drop whole channels, the same at all points, as the published Dropout2d does."""
        return x * F.dropout(x.new_ones(x.shape[1]), DROPOUT, self.training)


def frequency_table(kind: str, size: tuple[int, int], *, colour: bool = True) -> Tensor:
    """Compute the angular frequencies of the inputs, [5, 30], or [2, 30] without colour; geometric, from e^-2 up.

    Args:
        kind: "resolved" ends, for each coordinate, at two pixels per period, and for colours at two steps of 8-bit
            ones. "published" ends at e^10 for all, finer than any pixel: such waves differ from cell to cell like
            noise, so that maps of different sizes agree less.
        size: (h, w) of the fitted image in pixels.
        colour: Whether colours are inputs.
    """
    if kind not in FREQUENCY_KINDS:
        raise unknown_name("kind of frequencies", kind, FREQUENCY_KINDS)
    highest = [side * math.pi / 2 for side in size] + 3 * [COLOUR_HIGHEST]
    if kind == "published":
        highest = 5 * [PUBLISHED_HIGHEST]
    # From float64, so that the table is that of the formula.
    rows = [
        torch.linspace(math.log(LOWEST), math.log(top), FREQUENCY_COUNT, dtype=torch.float64).exp() for top in highest
    ]
    return torch.stack(rows[: 5 if colour else 2]).float()


def colour_range(image: Tensor) -> Tensor:
    """Compute the lowest and highest value of each colour of an image [3, H, W]: [2, 3]."""
    if image.ndim != 3 or len(image) != 3:
        raise InputError(f"an image is [3, H, W]; got {tuple(image.shape)}")
    return torch.stack([image.amin((1, 2)), image.amax((1, 2))])


def cell_centres(size: tuple[int, int]) -> Tensor:
    """Compute the centres of h x w cells: [h, w, 2], (row, column), -1 and 1 at the outer edges."""
    rows, columns = ((2 * torch.arange(n, dtype=torch.float32) + 1) / n - 1 for n in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
