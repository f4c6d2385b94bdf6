"""The upsampler contract.

An upsampler sees an image and a function ``encode`` that turns whitened images into normalised, de-biased backbone
features; it never sees a backbone. *Guided* upsamplers need one pass of ``encode`` and the image; *re-encoding* ones
call it again on tiles.

Convention:
    ``low_res`` is [B, C, h, w] and ``high_res`` [B, C, factor * h, factor * w]; both cover exactly the whole image, so
    cell (y, x) of an (h, w) map is centred at pixel ``((y + 0.5) * H / h, (x + 0.5) * W / w)`` of an H x W image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from featsharp.errors import ConfigError
from featsharp.ops.boxes import Box
from featsharp.ops.resize import resize

# [N, 3, h*p, w*p] whitened -> (features [N, C, h, w], summary [N, C_s] or None)
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class UpsampleFeatures(NamedTuple):
    """What a sharp encoder returns; the summary is the backbone's own, from the low-resolution pass."""

    low_res: Tensor  # [B, C, h, w]
    high_res: Tensor  # [B, C, factor * h, factor * w]
    summary: Tensor | None = None  # [B, C_s]


class Upsampler(nn.Module):
    """Base of all upsamplers.

    Attributes:
        embed_dim: Channels C of the features.
        factor: Gain f in each direction.
        input_upsample_factor: How much larger than the low-resolution pass the image should be to be of use: f for
            upsamplers that look at tiles, 1 for guided ones.
        trainable: Whether there is anything to learn.
        needs: What the upsampler uses besides features, for ``featsharp ls upsamplers``.
        by_parts: Whether ``upsample_part`` is implemented (``prepare`` where needed, ``write_tiles`` with tiles),
            so that a map can be made piece by piece where memory is scarce (:mod:`featsharp.upsamplers.bounded`).
        halo: How many cells of the tile map around its own, in each direction, a cell of the result depends on; None
            for an upsampler that looks at no tiles.
    """

    trainable: bool = False
    needs: str = "image"
    by_parts: bool = False
    halo: int | None = None

    def __init__(self, embed_dim: int, factor: int) -> None:
        super().__init__()
        if not isinstance(factor, int) or factor < 1:
            raise ConfigError(f"the upsampling factor must be a whole number of at least 1; got {factor!r}")
        self.embed_dim = embed_dim
        self.factor = factor

    @property
    def input_upsample_factor(self) -> int:
        return 1

    def forward(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> UpsampleFeatures:
        """Sharpen what ``encode`` says about an image.

        Args:
            image: [B, 3, H, W], whitened, any size.
            encode: See :data:`Encode`.
            low_res_size: (h, w) in pixels of the low-resolution pass, a size that the backbone takes.
        """
        raise NotImplementedError

    def write_tiles(
        self, out: Tensor, image: Tensor, encode: Encode, low_res_size: tuple[int, int], max_tile_batch: int
    ) -> None:
        """Encode the tiles of one image, at most ``max_tile_batch`` at a time, into the map ``out`` [1, C, fh, fw]."""
        raise NotImplementedError

    def prepare(self, low_res: Tensor, image: Tensor) -> Any:
        """What all parts need from the image, made once and held: nothing, or tensors in lists, tuples or dicts."""
        return None

    def upsample_part(self, low_res: Tensor, guide: Any, tiles: Tensor | None, box: Box) -> Tensor:
        """The cells ``box`` of the result, as :meth:`forward` computes them: [B, C, *box.size].

        Args:
            low_res: [B, C, h, w].
            guide: From :meth:`prepare`.
            tiles: The tile map of ``box`` and ``halo`` cells around it, as far as they exist; None without tiles.
            box: Cells of the high-resolution map.
        """
        raise NotImplementedError

    def high_res_grid(self, features: Tensor) -> tuple[int, int]:
        """(h, w) of the output for low-resolution features."""
        return features.shape[-2] * self.factor, features.shape[-1] * self.factor

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, factor={self.factor}"


class GuidedUpsampler(Upsampler):
    """An upsampler that needs the low-resolution features and the image only; subclasses implement ``upsample``."""

    def forward(self, image: Tensor, encode: Encode, low_res_size: tuple[int, int]) -> UpsampleFeatures:
        low_res, summary = encode(resize(image, low_res_size))
        return UpsampleFeatures(low_res, self.upsample(low_res, image), summary)

    def upsample(self, features: Tensor, image: Tensor) -> Tensor:
        """Features [B, C, h, w] and an image of any size [B, 3, H, W] to [B, C, factor * h, factor * w]."""
        raise NotImplementedError


def prime_factors(factor: int) -> list[int]:
    """Prime factors in ascending order: 12 -> [2, 2, 3]; 1 -> []."""
    primes = []
    divisor = 2
    while factor > 1:
        while factor % divisor == 0:
            primes.append(divisor)
            factor //= divisor
        divisor += 1
    return primes
