"""Images of no use are left out for a stated reason, and a mistake in the user's own filter stops the run."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featsharp.data.filters import ImageFilter
from featsharp.data.loader import StepSampler, ViewDataset, load_batches
from featsharp.data.mixture import ImageMixture
from featsharp.data.skips import SkipLog
from featsharp.data.sources import open_source
from featsharp.data.views import ViewConfig
from featsharp.errors import ConfigError, DataError
from featsharp.train import main

MODULE = """
def dark(image, name):
    return image.convert("L").getextrema()[1] < 100

def not_cats(image, name):
    return "cat" not in name

def forgets(image, name):
    pass

def breaks(image, name):
    return image.no_such_thing
"""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of 16, 24, 32 and 40 pixels, two of them of cats; a module ``own_filters`` can be imported."""
    (tmp_path / "own_filters.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, side, top in (("cat-a", 16, 90), ("cat-b", 24, 255), ("dog-a", 32, 255), ("dog-b", 40, 90)):
        pixels = np.random.default_rng(side).integers(0, top, (side, side + 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def used_and_kinds(folder: Path, keep: ImageFilter) -> tuple[set[str], dict[str, int]]:
    mixture = ImageMixture.from_data_dir(str(folder), keep=keep)
    log = SkipLog()
    used = set()
    for n in range(8):
        loaded = mixture.load(n)
        used.add(Path(loaded.name).stem)
        assert log.add(loaded.skipped) == []  # as the user wants it: nothing to warn of
    return used, {kind: len(names) for kind, names in log.examples.items()}


@pytest.mark.parametrize(
    ("keep", "used", "kinds"),
    [
        ({}, {"cat-a", "cat-b", "dog-a", "dog-b"}, {}),
        ({"min_size": 24}, {"cat-b", "dog-a", "dog-b"}, {"too small": 1}),
        ({"min_size": 25}, {"dog-a", "dog-b"}, {"too small": 2}),
        ({"predicate": "own_filters:not_cats"}, {"dog-a", "dog-b"}, {"rejected by data.filter": 2}),
        ({"min_size": 17, "predicate": "own_filters:dark"}, {"dog-b"}, {"too small": 1, "rejected by data.filter": 2}),
        ({"predicate": lambda image, name: image.width > 40}, {"dog-b"}, {"rejected by data.filter": 3}),
    ],
)
def test_filtered_images_are_kinds_of_their_own(
    photos: Path, keep: dict[str, Any], used: set[str], kinds: dict[str, int]
) -> None:
    assert used_and_kinds(photos, ImageFilter(**keep)) == (used, kinds)


def test_the_shorter_side_counts() -> None:
    image = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(10, 20, 3))
    assert ImageFilter(10)(image, "x") == ""
    assert ImageFilter(11)(image, "x") == "too small (20 x 10 pixels, the shorter side below 11)"


@pytest.mark.parametrize(("first", "second", "uniform"), [((9, 9, 9), (9, 9, 9), True), ((9, 9, 9), (10, 8, 9), False)])
def test_a_range_of_one_level_is_uniform(first: tuple[int, ...], second: tuple[int, ...], uniform: bool) -> None:
    """Per channel, (9, 9, 9) and (10, 8, 9) span one level; a third colour two levels away makes the difference."""
    image = Image.new("RGB", (8, 8), first)
    image.putpixel((3, 3), second)
    assert ImageFilter()(image, "x") == "uniform colour"
    if not uniform:
        image.putpixel((4, 4), (11, 8, 9))
        assert ImageFilter()(image, "x") == ""


def test_a_filter_that_keeps_nothing_is_an_error_before_the_training(photos: Path) -> None:
    with pytest.raises(DataError, match=r"photos: no usable image found \(4 too small\); the first, "):
        ImageMixture.from_data_dir(str(photos), keep=ImageFilter(min_size=41))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("function", "said"),
    [("forgets", r"has to return True or False; got None for .*png"), ("breaks", r"failed on .*png .AttributeError: ")],
)
def test_a_mistake_in_the_filter_is_no_property_of_the_images(
    photos: Path, function: str, said: str, workers: int
) -> None:
    mixture = ImageMixture([open_source(photos)], keep=ImageFilter(predicate=f"own_filters:{function}"))
    with pytest.raises(ConfigError, match=rf"data\.filter='own_filters:{function}' {said}"):
        list(load_batches(ViewDataset(mixture, (16, 16), ViewConfig(num_views=1), 0), StepSampler(0, 1, 2), workers))


@pytest.mark.parametrize("name", ["own_filters:absent", "absent_module:keep", "own_filters", "own_filters:"])
def test_names_that_lead_to_no_function(photos: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"option data\.filter"):
        ImageFilter(predicate=name)


def test_training_with_filters(photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("FEATSHARP_CACHE", "cache")
    common = ["+model=toy-vit", "+upsampler=featup-2x", f"train_data_dir={photos}", "batch_size=2", "viz.type=none"]
    common += [
        "num_workers=1",
        "num_training_steps=6",
        "normalizer.num_samples=4",
        "viz.num_images=1",
        "progress=false",
    ]
    assert main([*common, "data.min_size=20", "data.filter=own_filters:not_cats"]) == 0
    (said,) = (message for message in caplog.messages if message.startswith("images skipped"))
    assert re.fullmatch(
        r"images skipped \d+ times: "
        r"(\d+ too small \(\S+cat-a.png\), \d+ rejected by data.filter \(\S+cat-b.png\)|"
        r"\d+ rejected by data.filter \(\S+cat-b.png\), \d+ too small \(\S+cat-a.png\))",
        said,
    )
    assert not any(message.startswith("skipped ") for message in caplog.messages)
    assert main([*common, "data.min_size=100", "output_base=none"]) == 1
    assert not Path("none/toy-vit/64/last.pth").exists()
