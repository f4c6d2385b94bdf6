"""Time against the upsampling factor: the curves of figure 14 of FeatSharp."""

import copy
import json
import time

import pytest
import torch

from featsharp.backbones import create_backbone
from featsharp.backbones.toy import ToyViT
from featsharp.bench.measure import find_failure
from featsharp.bench.throughput import ThroughputTask
from featsharp.bench.workloads import list_workloads
from featsharp.errors import ConfigError, InputError
from featsharp.settings import settings_of

CPU = torch.device("cpu")
SLEEP_MS = 40


def slow(image, features, size):
    """An upsampler of the user's that takes its time."""
    time.sleep(SLEEP_MS / 1000)
    return torch.nn.functional.interpolate(features, size)


SLOW = f"{__name__}:slow"


@pytest.fixture(scope="module")
def found():
    task = ThroughputTask("toy-vit", ("tile", "bilinear", "sapa", SLOW), (1.5, 2), batch_size=2, repeat=6)
    return task, task.run(CPU, None, progress=False)


def rows_of(result, curve):
    return {row["factor"]: row for row in result["rows"] if row["curve"] == curve}


@pytest.mark.slow
def test_every_curve_has_a_point_per_factor_and_factor_one_is_always_there(found):
    _, result = found
    for curve in ("direct", "passes", "tile", "bilinear", SLOW):
        rows = rows_of(result, curve)
        assert list(rows) == [1, 1.5, 2]
        # 8 x 8 tokens at the native size
        assert [row["cells"] for row in rows.values()] == [64, 144, 256]
    assert list(rows_of(result, "sapa")) == [1, 2]
    json.dumps(result)


@pytest.mark.slow
def test_what_cannot_be_is_listed_with_its_reason(found):
    task, result = found
    (skipped,) = result["skipped"]
    assert (skipped["curve"], skipped["factor"]) == ("sapa", 1.5)
    assert "whole" in skipped["reason"]
    assert any(line.startswith("not measured: sapa 1.5x: SAPA") for line in task.table(result))


@pytest.mark.slow
def test_a_backbone_of_one_size_has_no_larger_images_but_tiles():
    task = ThroughputTask("toy-vit-fixed", ("tile",), (2,), repeat=2)
    result = task.run(CPU, None, progress=False)
    assert list(rows_of(result, "direct")) == [1]
    assert list(rows_of(result, "passes")) == [1, 2]
    (skipped,) = result["skipped"]
    assert "takes 64x64 pixels only, not 128x128" in skipped["reason"]


@pytest.mark.slow
def test_the_linear_curve_has_one_time_per_token(found):
    _, result = found
    base = rows_of(result, "direct")[1]
    for row in result["rows"]:
        assert row["linear_ms_per_image"] / row["cells"] == pytest.approx(base["ms_per_image"] / base["cells"])
    assert base["linear_ms_per_image"] == pytest.approx(base["ms_per_image"])


@pytest.mark.slow
def test_times_are_per_image_and_token_with_quartiles(found):
    _, result = found
    for row in result["rows"]:
        timing = row["time"]
        assert 0 < timing["low"] <= timing["median"] <= timing["high"]
        assert 5 <= timing["runs"] <= 6
        assert row["ms_per_image"] == timing["median"] / 2  # a batch of two
        assert row["us_per_token"] == pytest.approx(1000 * timing["median"] / 2 / row["cells"])
        assert row["peak_bytes"] >= 0


@pytest.mark.slow
def test_an_upsampler_that_sleeps_shows_in_its_time_and_not_in_that_of_its_passes(found):
    _, result = found
    for row in rows_of(result, SLOW).values():
        assert row["time"]["median"] >= SLEEP_MS
        # The same work as the backbone at its native size, timed once for both.
        assert row["backbone_ms_per_image"] == rows_of(result, "direct")[1]["ms_per_image"]


@pytest.mark.slow
def test_passes_through_the_backbone(found):
    """1 + f^2 for tiles; a single tile is the image itself; 1.5x takes 2 x 2 tiles that overlap."""
    _, result = found
    for curve, passes in (("direct", [1, 1, 1]), ("passes", [1, 5, 5]), ("tile", [1, 5, 5]), ("bilinear", [1, 1, 1])):
        assert [row["passes"] for row in rows_of(result, curve).values()] == passes
    # Tiles at a whole factor go through at once: the same work as the curve "passes".
    assert rows_of(result, "tile")[2]["backbone_ms_per_image"] == rows_of(result, "passes")[2]["ms_per_image"]


@pytest.mark.slow
def test_more_pixels_take_longer():
    task = ThroughputTask("toy-vit", ("bilinear",), (4, 8), repeat=3)
    result = task.run(CPU, None, progress=False)
    times = [row["ms_per_image"] for row in rows_of(result, "direct").values()]
    assert times == sorted(times)
    # 4 x as many tokens, of which each attends to all: more than 4 x as long.
    assert times[2] > 4 * times[1]


@pytest.mark.slow
def test_the_table_says_what_the_figures_depend_on(found):
    task, result = found
    lines = task.table(result)
    assert "toy-vit, native size 64x64, batch 2, float32, attention: scaled_dot_product" in lines[0]
    assert len([line for line in lines if line.startswith(("direct", "passes", "tile", "bilinear"))]) == 12
    assert result["attention"] == ["scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.slow
def test_every_case_runs_five_times():
    result = ThroughputTask("toy-vit", ("tile",), (2,), repeat=2).run(CPU, None, progress=False)
    assert {row["time"]["runs"] for row in result["rows"]} == {5}


@pytest.mark.slow
def test_a_share_is_never_more_than_all(found):
    """The medians of passes and whole are of different runs."""
    task, result = found
    planted = copy.deepcopy(result)
    for row, share in zip(planted["rows"], (0.4, 1.0, 1.03), strict=False):
        row["backbone_ms_per_image"] = share * row["ms_per_image"]
    lines = task.table(planted)
    assert [line.split()[-2] for line in lines[3:6]] == ["40%", "100%", "~100%"]
    assert "~100% where those alone took longer" in lines[1]


@pytest.mark.slow
def test_a_noisy_machine_is_pointed_out(found):
    task, result = found
    planted = copy.deepcopy(result)
    for row in planted["rows"]:
        row["time"] |= {"low": 10.0, "median": 10.0, "high": 10.5}
    assert not any("noisy" in line for line in task.table(planted))
    planted["rows"][0]["time"]["high"] = 13.0
    (line,) = (line for line in task.table(planted) if "noisy" in line)
    assert line.endswith(": direct 1x")


@pytest.mark.slow
def test_a_function_of_the_users_that_fails_is_skipped_with_its_reason():
    result = ThroughputTask("toy-vit", ("json:dumps",), (2,)).run(CPU, None, progress=False)
    (skipped,) = (entry for entry in result["skipped"] if entry["factor"] == 2)
    assert skipped["curve"] == "json:dumps"
    assert skipped["reason"].startswith("TypeError: dumps() takes 1 positional argument")


@pytest.mark.slow
def test_rows_name_normalizer_and_options(found):
    _, result = found
    assert {row["normalizer"] for row in result["rows"] if row["curve"] == "sapa"} == {"phi-s"}
    assert rows_of(result, "tile")[2]["normalizer"] == "none"
    assert rows_of(result, SLOW)[2]["options"] == {"function": SLOW}
    assert rows_of(result, "passes")[2]["options"] is rows_of(result, "passes")[2]["normalizer"] is None


def test_the_autocast_type_is_that_of_the_backbone():
    result = ThroughputTask("toy-vit", (), (1,), repeat=2).run(CPU, torch.bfloat16, progress=False)
    assert result["autocast"] == "bfloat16"
    assert ThroughputTask("toy-cnn", (), (1,), repeat=2).run(CPU, None, progress=False)["attention"] == []


def test_unknown_names_and_factors_below_one_are_refused_at_once():
    with pytest.raises(ConfigError, match="did you mean 'bilinear'"):
        ThroughputTask("toy-vit", ("bilinar",)).run(CPU, None, progress=False)
    with pytest.raises(ConfigError, match=r"at least 1; got 0\.5"):
        ThroughputTask("toy-vit", ("bilinear",), (0.5,)).run(CPU, None, progress=False)


class Cramped(ToyViT):
    """A backbone whose device has memory for images of ``largest`` pixels a side."""

    largest = 128

    def extract(self, images):
        if images.shape[-1] > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().extract(images)


@pytest.mark.slow
def test_points_that_do_not_fit_in_memory_are_listed_and_without_a_base_there_is_no_curve():
    backbone = Cramped("cramped")
    task = ThroughputTask(backbone, (), (2, 4), repeat=2)
    result = task.run(CPU, None, progress=False)
    assert list(rows_of(result, "direct")) == [1, 2]
    assert list(rows_of(result, "passes")) == [1, 2, 4]
    assert result["skipped"] == [{"curve": "direct", "factor": 4, "reason": "out of memory"}]
    backbone.largest = 32
    with pytest.raises(ConfigError, match="cannot be measured at its native size: out of memory"):
        task.run(CPU, None, progress=False)


def test_settings_are_plain():
    assert json.loads(json.dumps(settings_of(ThroughputTask())))["upsampler"] == ["featsharp", "tile", "bilinear"]


def test_workloads_share_one_backbone_and_give_maps_of_the_size_they_say():
    backbone = create_backbone("toy-vit")
    workloads, skipped = list_workloads(backbone, ("direct", "passes", "tile", "bilinear"), (1.5, 3), CPU)
    assert not skipped
    for workload in workloads:
        assert workload.backbone is backbone
        if workload.curve != "passes":
            out = workload.module(torch.zeros(workload.input_shape))
            features = out.features if workload.module is backbone else out.high_res
            assert features.shape[-2] * features.shape[-1] == workload.cells


def raising(error):
    def call():
        raise error

    return call


def test_failures_that_belong_to_the_measurement():
    assert find_failure(lambda: None) is None
    assert find_failure(raising(InputError("too small"))) == "too small"
    assert find_failure(raising(torch.OutOfMemoryError("CUDA out of memory. Tried"))) == "out of memory"
    assert find_failure(lambda: torch.empty(2**50)) == "out of memory"
    with pytest.raises(RuntimeError, match="a defect"):
        find_failure(raising(RuntimeError("a defect")))
    with pytest.raises(TypeError, match="a defect"):
        find_failure(raising(TypeError("a defect")))
    assert find_failure(raising(TypeError("of the user's")), foreign=True) == "TypeError: of the user's"
    with pytest.raises(KeyboardInterrupt):
        find_failure(raising(KeyboardInterrupt()), foreign=True)
