"""What is recorded: seeded runs of upsamplers, backbones, normalizers, training and evaluation, by public names only.

A case gets an empty folder and returns tensors, numbers and texts by name. ``record.py`` writes them down,
``test_golden.py`` compares. Weights are drawn by the name of the parameter, so neither the order in which a module
makes its layers nor a library's initialisation has a say in the results.
"""

import functools
import math
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

Values = dict[str, Tensor | float | str]

MAPS = 1e-4  # of the largest absolute value of the recorded sample
TRAINED = 1e-3  # the same, after a few steps of Adam, which turns rounding of tiny gradients into steps
FITTED = 1e-2  # the same, after a fit from a random start; processors with AVX2 and AVX512 differ by .005
HEADS = 2e-2  # scores of heads that are trained for the measurement
COUNTS = 1e-2  # operations: what counts as one is a convention of the counter


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        run: Gets an empty folder.
        tolerance: Of every value, relative.
        exact: Whether the same machine and libraries must give the same bits.
        slow: Whether it is left out of the quick tests.
    """

    run: Callable[[Path], Values]
    tolerance: float = MAPS
    exact: bool = True
    slow: bool = False


CASES: dict[str, Case] = {}


def add(name: str, run: Callable[..., Values], *arguments: Any, **settings: Any) -> None:
    assert name not in CASES, name
    CASES[name] = Case(functools.partial(run, *arguments), **settings)


def run_case(name: str, folder: Path) -> Values:
    """Run a case in an empty folder: one thread, fixed seeds, caches inside of the folder."""
    with _alone(folder):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (third parties draw from the global generator)
        torch.manual_seed(0)
        return CASES[name].run(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    threads, cache = torch.get_num_threads(), os.environ.get("FEATSHARP_CACHE")
    torch.set_num_threads(1)
    os.environ["FEATSHARP_CACHE"] = str(folder / "cache")
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        del os.environ["FEATSHARP_CACHE"]
        if cache is not None:
            os.environ["FEATSHARP_CACHE"] = cache


# Inputs and weights


def drawn(name: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the name only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def smooth_images(height: int, width: int, count: int = 1) -> Tensor:
    """Whitened images with content at several scales."""
    coarse = F.interpolate(drawn("coarse", count, 3, 5, 7), (height, width), mode="bicubic")
    return coarse + 0.3 * drawn("fine", count, 3, height, width)


def fill(module: nn.Module) -> None:
    """Draw all weights by name, widely enough that no part of the module is without effect."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            noise = drawn(name, *weight.shape)
            if "pos" in name or "token" in name:
                weight.copy_(0.5 * noise)
            elif weight.ndim > 1:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
            elif name.endswith("weight"):
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.add_(0.2 * noise)


def disturb(module: nn.Module) -> None:
    """Move all weights from where they start, by name."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            scale = 0.5 / math.sqrt(weight[0].numel()) if weight.ndim > 1 else 0.1
            weight.add_(scale * drawn(name, *weight.shape))


def picture(number: int, size: tuple[int, int] = (120, 160)) -> Image.Image:
    """A smooth picture with a few rectangles."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = np.array(image)
    for _ in range(4):
        top, left = rng.integers(0, size[0] - 24), rng.integers(0, size[1] - 24)
        pixels[top : top + rng.integers(8, 24), left : left + rng.integers(8, 24)] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def save_pictures(folder: Path, count: int = 3, size: tuple[int, int] = (120, 160)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number, size).save(folder / f"{number}.png")
    return folder


def state_of(state: Mapping[str, Any]) -> Values:
    """All tensors of a state dict as one vector, in the order of their names."""
    names = sorted(state)
    flat = [state[name].double().flatten() for name in names]
    return {
        "names": " ".join(f"{name}:{'x'.join(map(str, state[name].shape))}" for name in names),
        "weights": torch.cat(flat) if flat else torch.zeros(0),
    }
