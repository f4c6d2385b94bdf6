"""Filter of images that are useless for training; they are skipped and counted like damaged ones."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from featsharp.data.skips import REJECTED, TOO_SMALL, UNIFORM
from featsharp.errors import ConfigError
from featsharp.registry import load_function

MIN_SIZE = 8  # pixels

# (RGB image, name) -> whether to keep it
Predicate = Callable[[Image.Image, str], bool]


@dataclass(frozen=True)
class ImageFilter:
    """Filter by size, colour and a function of the user.

    Uniform images, in which no channel spans more than one level, are always left out.

    Attributes:
        min_size: Least length of the shorter side in pixels.
        predicate: Called with the RGB picture and its name; true keeps it. Or text that names such a function,
            ``"module:function"`` (which also works in workers that are not forked). It is called in the workers, maybe
            repeatedly, and has to depend on the picture and the name alone, or runs cannot be repeated.

    Raises:
        ConfigError: Where there is no such function.
    """

    min_size: int = MIN_SIZE
    predicate: Predicate | str | None = None

    def __post_init__(self) -> None:
        if self.predicate is not None:
            load_function(self.predicate, "data.filter")

    def __call__(self, image: Image.Image, name: str) -> str:
        """Return the reason to leave an image out, or "" to keep it; ConfigError where the predicate fails."""
        if min(image.size) < self.min_size:
            return f"{TOO_SMALL} ({image.width} x {image.height} pixels, the shorter side below {self.min_size})"
        ranges = [int(high) - int(low) for low, high in image.getextrema()]  # type: ignore[misc]
        if max(ranges) <= 1:
            return UNIFORM
        return "" if self.predicate is None or self._keeps(image, name) else REJECTED

    def _keeps(self, image: Image.Image, name: str) -> bool:
        try:
            keep = load_function(self.predicate, "data.filter")(image, name)
        except Exception as error:  # an error in the user's code is no property of the image
            raise ConfigError(
                f"data.filter={self.predicate!r} failed on {name} ({type(error).__name__}: {error}); "
                "it is called with an RGB PIL image and its name"
            ) from error
        if not isinstance(keep, bool | np.bool_):
            raise ConfigError(f"data.filter={self.predicate!r} has to return True or False; got {keep!r} for {name}")
        return bool(keep)
