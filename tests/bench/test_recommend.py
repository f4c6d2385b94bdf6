"""The helper that says which upsampler: planted candidates, real ones, and limits."""

import json
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from featsharp.bench.recommend import RecommendTask, rank
from featsharp.bench.workloads import shipped_weights
from featsharp.builder import create_encoder, save_checkpoint
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.ops.boxes import whole
from featsharp.ops.resize import resize
from featsharp.upsamplers import UPSAMPLERS, register_upsampler
from featsharp.upsamplers.base import GuidedUpsampler
from featsharp.upsamplers.chunked import ChunkedGuidedUpsampler

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
        return hungry_chunk(features, whole(size), size)


def hungry_chunk(low_res, box, size):
    cells = box.size[0] * box.size[1]
    scratch = low_res.new_ones(cells * SCRATCH_PER_CELL)
    return box.cut(resize(low_res, size)) * scratch[0]


class Patient(ChunkedGuidedUpsampler):
    """As hungry, but chunk by chunk."""

    def prepare_chunks(self, low_res, image, size):
        return lambda box: hungry_chunk(low_res, box, size)


PLANTED = {kind.__name__.lower(): kind for kind in (Sleeper, Learner, Hungry, Patient)}
# Two are no candidates: identity at 2x, custom without function.
COMPARED = ("bilinear", "tile", "sapa", "identity", "custom", *PLANTED)


@pytest.fixture
def planted():
    """Four planted upsamplers beside the real ones."""
    for name, kind in PLANTED.items():
        register_upsampler(name, "planted")(kind)
    yield
    for name in PLANTED:
        del UPSAMPLERS[name]


@pytest.fixture
def photos(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "photo.png")
    return tmp_path


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


@pytest.mark.slow
def test_by_time_where_no_quality_is_known(planted):
    task = RecommendTask("toy-vit", upsampler=COMPARED, repeat=3)
    result = task.run(CPU, None, progress=False)
    assert set(names(result)) == {"bilinear", "tile", "sleeper", "hungry", "patient", "learner", "sapa"}
    times = [row["time"]["median"] for row in result["ranked"][:-2]]
    assert times == sorted(times)
    assert row_of(result, "sleeper")["time"]["median"] >= 60
    assert [row["rank"] for row in result["ranked"]] == [1, 2, 3, 4, 5, None, None]
    assert result["size"] == [128, 128]
    assert result["low_res_size"] == [64, 64]
    assert "ranked by time" in task.table(result)[1]
    assert result["out"] == []
    json.dumps(result)


def test_who_is_out_is_told_why_and_who_is_no_candidate_is_not_there(planted):
    task = RecommendTask("toy-vit", upsampler=["bilinear", "custom", "identity", "sapa"], factor=1.5, repeat=2)
    result = task.run(CPU, None, progress=False)
    assert names(result, "out") == ["sapa"]
    assert "factors that are whole; got 1.5" in reason(result, "sapa")
    assert any(line.startswith("out: sapa: SAPA takes factors") for line in task.table(result))
    assert not any("identity" in line or "custom" in line for line in task.table(result))
    assert "identity" in names(
        RecommendTask("toy-vit", upsampler=["bilinear", "identity"], factor=1, repeat=2).run(CPU, None, progress=False)
    )


def test_upsamplers_to_be_trained_pay_for_their_normalizer(planted):
    normalizers = []

    class Watch(Learner):
        def forward(self, image, encode, *sizes):
            normalizers.append(encode.__self__.normalizer.name)
            return super().forward(image, encode, *sizes)

    UPSAMPLERS["learner"] = replace(UPSAMPLERS["learner"], factory=Watch)
    RecommendTask("toy-vit", upsampler=["bilinear", "learner"], repeat=2).run(CPU, None, progress=False)
    assert set(normalizers) == {"phi-s"}


@pytest.mark.slow
def test_by_quality_where_it_is_known(planted):
    task = RecommendTask("toy-vit", upsampler=COMPARED, repeat=2)
    measured = []

    def note(encoder):
        measured.append(type(encoder.upsampler).__name__)
        return quality(encoder)

    result = task.run(CPU, None, progress=False, quality=note)
    assert names(result)[0] == "sleeper"
    assert names(result)[-3] == "tile"
    assert set(names(result)[-2:]) == {"learner", "sapa"}
    assert "Learner" not in measured  # untrained, its quality would say nothing
    assert row_of(result, "tile")["note"] == "no quality: cannot be compared"
    lines = task.table(result)
    assert lines[1] == "ranked by zoom_cosine, then time; quality is measured at the native size, 64x64"
    assert [line.split()[:4] for line in lines[3:4]] == [["sleeper", "1", "0.9000", "1.2500"]]
    assert any(line.startswith("learner") and line.endswith("needs training") for line in lines)
    assert "tile: no quality: cannot be compared" in lines


@pytest.mark.slow
def test_a_limit_on_memory_is_kept_in_chunks_or_not_at_all(planted):
    task = RecommendTask("toy-vit", upsampler=["bilinear", "hungry", "patient"], memory="100MiB", repeat=2)
    result = task.run(CPU, None, progress=False)
    assert result["memory"] == 100 * MIB
    assert "of 100MiB and cannot work in chunks" in reason(result, "hungry")
    patient = row_of(result, "patient")
    assert patient["in_parts"]
    assert patient["peak_bytes"] <= 100 * MIB
    assert not row_of(result, "bilinear")["in_parts"]
    assert all(row["peak_bytes"] <= 100 * MIB for row in result["ranked"])
    assert any(line.startswith("patient") and line.endswith("in chunks") for line in task.table(result))


def test_a_limit_that_parts_do_not_keep_either(planted):
    result = RecommendTask("toy-vit", upsampler=["bilinear", "patient"], memory="18MiB", repeat=2).run(
        CPU, None, progress=False
    )
    assert "too little" in reason(result, "patient")
    assert "bilinear" in names(result)


def test_the_users_size_is_the_one_that_is_measured(planted):
    result = RecommendTask("toy-vit", upsampler=["bilinear"], size=(192, 96), repeat=2).run(CPU, None, progress=False)
    assert (result["size"], result["low_res_size"]) == ([192, 96], [96, 48])
    result = RecommendTask("toy-vit-fixed", upsampler=["bilinear"], factor=1.5, repeat=2).run(CPU, None, progress=False)
    assert (result["size"], result["low_res_size"]) == ([96, 96], [64, 64])
    with pytest.raises(InputError, match="smaller than one 8-pixel patch"):
        RecommendTask("toy-vit", upsampler=COMPARED, size=(8, 8)).run(CPU, None, progress=False)


def test_checkpoints_take_part(planted, tmp_path):
    for factor in (2, 4):
        save_checkpoint(create_encoder("toy-vit", "learner", factor), tmp_path / f"{factor}x.pth")
    save_checkpoint(create_encoder("toy-cnn", "learner", 2), tmp_path / "cnn.pth")
    files = [str(tmp_path / name) for name in ("2x.pth", "4x.pth", "cnn.pth", "none.pth")]
    files[2] = f"other={files[2]}"
    result = RecommendTask("toy-vit", upsampler=["bilinear"], checkpoint=files, repeat=2).run(
        CPU, None, False, quality=quality
    )
    trained = row_of(result, "2x")
    assert trained["kind"] == "checkpoint"
    assert trained["quality"] == {"zoom_cosine": 0.5, "fidelity": 1.25}
    assert isinstance(trained["rank"], int)
    assert reason(result, "4x") == "has factor 4, not 2"
    assert "was trained for backbone 'toy-cnn'" in reason(result, "other")
    assert "does not exist" in reason(result, "none")


def test_two_checkpoints_of_one_name_both_take_part(planted, tmp_path):
    files = [tmp_path / run / "checkpoints" / "last.pth" for run in ("one", "two")]
    for file in files:
        file.parent.mkdir(parents=True)
        save_checkpoint(create_encoder("toy-vit", "learner", 2), file)
    result = RecommendTask("toy-vit", upsampler=["bilinear"], checkpoint=list(map(str, files)), repeat=2).run(
        CPU, None, False
    )
    assert {row["name"] for row in result["ranked"] if row["kind"] == "checkpoint"} == {
        "one/checkpoints/last",
        "two/checkpoints/last",
    }


def test_two_candidates_of_one_name():
    with pytest.raises(ConfigError, match="two candidates are called 'bilinear'; name the checkpoint: LABEL=a"):
        RecommendTask("toy-vit", checkpoint=["bilinear=a"]).run(CPU, None, progress=False)


@pytest.mark.slow
def test_weights_that_come_with_the_package_take_part():
    task = RecommendTask("vits14-focus", upsampler=["bilinear"], size=(56, 56), repeat=2)
    result = task.run(CPU, None, progress=False, quality=quality)
    shipped = row_of(result, "vits14-focus/featsharp-2x")
    assert (shipped["kind"], shipped["quality"]["zoom_cosine"]) == ("shipped", 0.5)
    assert isinstance(shipped["rank"], int)
    assert any(line.startswith("vits14-focus/featsharp-2x") and line.endswith("shipped") for line in task.table(result))
    assert "vits14-focus/featsharp-2x" in shipped_weights("vits14-focus", 2.0)
    assert shipped_weights("vits14-focus", 1.5) == shipped_weights("toy-vit", 2) == []


def test_mistakes_show_at_once(planted, tmp_path):
    with pytest.raises(ConfigError, match="cannot read 'much' as an amount of memory"):
        RecommendTask("toy-vit", upsampler=COMPARED, memory="much").run(CPU, None, progress=False)
    with pytest.raises(DataError, match="no such file or folder"):
        RecommendTask("toy-vit", upsampler=COMPARED, data=tmp_path / "absent").run(CPU, None, False, quality=quality)
    with pytest.raises(DataError, match="image"):
        RecommendTask("toy-vit", upsampler=COMPARED, data=tmp_path).run(CPU, None, False, quality=quality)
    for factor in (0.5, float("nan")):
        with pytest.raises(ConfigError, match="factor must be a number of at least 1"):
            RecommendTask("toy-vit", upsampler=COMPARED, factor=factor).run(CPU, None, progress=False)


def test_images_need_the_function_that_measures(photos):
    with pytest.raises(ConfigError, match="hand in the function"):
        RecommendTask("toy-vit", upsampler=COMPARED, data=photos).run(CPU, None, progress=False)
    assert RecommendTask(data=photos, limit=3).quality_images == (photos, 3)
    assert RecommendTask(limit=3).quality_images is None


@pytest.mark.slow
def test_where_nothing_can_be_ranked_the_first_reasons_are_given(planted):
    with pytest.raises(ConfigError, match=r"can be ranked: bilinear: takes .*; hungry: takes .*; and 4 more"):
        RecommendTask("toy-vit", upsampler=COMPARED, memory="1KiB").run(CPU, None, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("why", ["refused", "undefined"])
def test_where_no_candidate_gets_a_score_the_first_reasons_are_given(planted, photos, why):
    def measure(encoder):
        if why == "refused":
            raise InputError("too dark")
        return {"zoom_cosine": float("nan")}

    said = {"refused": "no quality: too dark", "undefined": "got {'zoom_cosine': nan}"}[why]
    with pytest.raises(ConfigError, match=rf"no candidate got a score on .*: bilinear: .*{said}.*; and 2 more"):
        RecommendTask("toy-vit", upsampler=COMPARED, data=photos, repeat=2).run(CPU, None, False, quality=measure)


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


@pytest.mark.slow
def test_the_registered_upsamplers_are_all_there():
    """Untouched registry, real methods, a small picture."""
    result = RecommendTask("toy-vit", size=(32, 32), repeat=2).run(CPU, None, progress=False)
    no_candidates = {"custom", "super-resolution", "identity", "s2-pooled"}
    assert set(names(result)) | set(names(result, "out")) == set(UPSAMPLERS.names()) - no_candidates
    kinds = {row["name"]: row["kind"] for row in result["ranked"]}
    assert kinds["bilinear"] == "ready"
    assert kinds["featsharp"] == "needs training"
