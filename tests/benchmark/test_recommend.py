"""The helper that says which upsampler: planted candidates, real ones, and limits."""

import json
import time

import pytest
import torch

from featsharp.benchmark.recommend import RecommendTask, rank
from featsharp.builder import create_encoder, save_checkpoint
from featsharp.errors import ConfigError, InputError
from featsharp.ops.boxes import whole
from featsharp.ops.resize import resize
from featsharp.upsamplers import UPSAMPLERS, register_upsampler
from featsharp.upsamplers.base import GuidedUpsampler

CPU = torch.device("cpu")
MIB = 2**20
# Of the picture of 128 x 128 pixels: 16 x 16 cells at 2x.
SCRATCH_PER_CELL = 160 * MIB // 4 // 256


class Sleeper(GuidedUpsampler):
    """Takes 60 ms."""

    def upsample_to(self, features, image, size):
        time.sleep(0.06)
        return resize(features, size)


class Learner(GuidedUpsampler):
    """Has something to learn."""

    trainable = True

    def upsample_to(self, features, image, size):
        return resize(features, size)


class Hungry(GuidedUpsampler):
    """Takes 160 MiB for the whole map."""

    def upsample_to(self, features, image, size):
        return self.upsample_part(features, None, None, whole(size), size)

    def upsample_part(self, low_res, guide, tiles, box, size):
        cells = box.size[0] * box.size[1]
        scratch = low_res.new_ones(cells * SCRATCH_PER_CELL)
        return box.cut(resize(low_res, size)) * scratch[0]


class Patient(Hungry):
    """As hungry, but part by part."""

    by_parts = True


@pytest.fixture
def planted(monkeypatch):
    """Four planted upsamplers beside four real ones, of which identity has no factor 2 and custom no function."""
    real = ("bilinear", "tile", "identity", "custom")
    monkeypatch.setattr("featsharp.benchmark.measure.CASE_SECONDS", 0.5)
    monkeypatch.setattr(UPSAMPLERS, "_entries", {name: UPSAMPLERS[name] for name in real})
    for kind in (Sleeper, Learner, Hungry, Patient):
        register_upsampler(kind.__name__.lower(), "planted")(kind)


def names(result, part="ranked"):
    return [row["name"] for row in result[part]]


def row_of(result, name):
    return next(row for row in result["ranked"] if row["name"] == name)


def reason(result, name):
    return next(entry["reason"] for entry in result["out"] if entry["name"] == name)


def quality(encoder):
    """Best for the slow one; none for tiles."""
    if type(encoder.upsampler).__name__ == "Tile":
        raise InputError("cannot be compared")
    return {"zoom_cosine": 0.9 if isinstance(encoder.upsampler, Sleeper) else 0.5, "fidelity": 1.25}


def test_by_time_where_no_quality_is_known(planted):
    task = RecommendTask("toy-vit", repeat=3)
    result = task.run(CPU, None, progress=False)
    assert set(names(result)) == {"bilinear", "tile", "sleeper", "hungry", "patient", "learner"}
    times = [row["time"]["median"] for row in result["ranked"][:-1]]
    assert times == sorted(times)
    assert row_of(result, "sleeper")["time"]["median"] >= 60 > row_of(result, "bilinear")["time"]["median"]
    assert [row["rank"] for row in result["ranked"]] == [1, 2, 3, 4, 5, None]
    assert result["size"] == [128, 128]
    assert result["low_res_size"] == [64, 64]
    assert "ranked by time" in task.table(result)[1]
    # Who is out is told why.
    assert set(names(result, "out")) == {"identity", "custom"}
    assert "factor 1; got 2" in reason(result, "identity")
    assert "function" in reason(result, "custom")
    assert any(line.startswith("out: identity: Identity has factor 1") for line in task.table(result))
    json.dumps(result)


def test_by_quality_where_it_is_known(planted):
    task = RecommendTask("toy-vit", repeat=2)
    measured = []

    def note(encoder):
        measured.append(type(encoder.upsampler).__name__)
        return quality(encoder)

    result = task.run(CPU, None, progress=False, quality=note)
    assert names(result)[0] == "sleeper"
    assert names(result)[-2:] == ["tile", "learner"]
    assert "Learner" not in measured  # untrained, its quality would say nothing
    assert row_of(result, "tile")["note"] == "no quality: cannot be compared"
    lines = task.table(result)
    assert lines[1] == "ranked by zoom_cosine, then time"
    assert [line.split()[:4] for line in lines[3:4]] == [["sleeper", "1", "0.9000", "1.2500"]]
    assert any(line.startswith("learner") and line.endswith("needs training") for line in lines)
    assert "tile: no quality: cannot be compared" in lines


def test_a_limit_on_memory_is_kept_in_parts_or_not_at_all(planted):
    task = RecommendTask("toy-vit", memory="100MiB", repeat=2)
    result = task.run(CPU, None, progress=False)
    assert result["memory"] == 100 * MIB
    assert "of 100MiB and cannot work in parts" in reason(result, "hungry")
    patient = row_of(result, "patient")
    assert patient["in_parts"]
    assert patient["peak_bytes"] <= 100 * MIB
    assert not row_of(result, "bilinear")["in_parts"]
    assert all(row["peak_bytes"] <= 100 * MIB for row in result["ranked"])
    assert any(line.startswith("patient") and line.endswith("in parts") for line in task.table(result))


def test_a_limit_that_parts_do_not_keep_either(planted):
    result = RecommendTask("toy-vit", memory="18MiB", repeat=2).run(CPU, None, progress=False)
    assert "too little" in reason(result, "patient")
    assert "bilinear" in names(result)


def test_the_users_size_is_the_one_that_is_measured(planted):
    result = RecommendTask("toy-vit", size=(192, 96), repeat=2).run(CPU, None, progress=False)
    assert (result["size"], result["low_res_size"]) == ([192, 96], [96, 48])
    result = RecommendTask("toy-vit-fixed", factor=1.5, repeat=2).run(CPU, None, progress=False)
    assert (result["size"], result["low_res_size"]) == ([96, 96], [64, 64])
    with pytest.raises(InputError, match="smaller than one 8-pixel patch"):
        RecommendTask("toy-vit", size=(8, 8)).run(CPU, None, progress=False)


def test_checkpoints_take_part(planted, tmp_path):
    for factor in (2, 4):
        save_checkpoint(create_encoder("toy-vit", "learner", factor), tmp_path / f"{factor}x.pth")
    save_checkpoint(create_encoder("toy-cnn", "learner", 2), tmp_path / "cnn.pth")
    files = [str(tmp_path / name) for name in ("2x.pth", "4x.pth", "cnn.pth", "none.pth")]
    result = RecommendTask("toy-vit", checkpoints=files, repeat=2).run(CPU, None, False, quality=quality)
    folder = tmp_path.name
    trained = row_of(result, f"{folder}/2x.pth")
    assert trained["kind"] == "checkpoint"
    assert trained["quality"] == {"zoom_cosine": 0.5, "fidelity": 1.25}
    assert isinstance(trained["rank"], int)
    assert reason(result, f"{folder}/4x.pth") == "has factor 4, not 2"
    assert "was trained for backbone 'toy-cnn'" in reason(result, f"{folder}/cnn.pth")
    assert "does not exist" in reason(result, f"{folder}/none.pth")


def test_mistakes_show_at_once(planted, tmp_path):
    with pytest.raises(ConfigError, match="cannot read 'much' as an amount of memory"):
        RecommendTask("toy-vit", memory="much").run(CPU, None, progress=False)
    with pytest.raises(ConfigError, match="need the function"):
        RecommendTask("toy-vit", images=tmp_path).run(CPU, None, progress=False)


def test_rank():
    def row(name, score, median, kind="ready"):
        scores = None if score is None else {"zoom": score, "other": -score}
        return {"name": name, "kind": kind, "quality": scores, "time": {"median": median}}

    rows = [
        row("unknown", None, 1.0),
        row("untrained", None, 0.5, "needs training"),
        row("negative", -0.5, 1.0),
        row("slow", 0.5, 3.0),
        row("undefined", float("nan"), 2.0),
        row("fast", 0.5, 2.0),
        row("trained", 0.7, 9.0, "checkpoint"),
    ]
    ranked = rank(rows)
    expected = ["trained", "fast", "slow", "negative", "unknown", "undefined", "untrained"]
    assert [row["name"] for row in ranked] == expected
    assert [row["rank"] for row in ranked] == [1, 2, 3, 4, 5, 6, None]


def test_the_registered_upsamplers_are_all_there():
    """Untouched registry, real methods, a small picture."""
    result = RecommendTask("toy-vit", size=(32, 32), repeat=2).run(CPU, None, progress=False)
    assert set(names(result)) | set(names(result, "out")) == set(UPSAMPLERS.names())
    kinds = {row["name"]: row["kind"] for row in result["ranked"]}
    assert kinds["bilinear"] == "ready"
    assert kinds["featsharp"] == "needs training"
