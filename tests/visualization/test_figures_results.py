"""Figures of results: what is drawn is what the files say, and other files are refused with the command that helps."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from featsharp.errors import ConfigError, DataError
from featsharp.visualization.figures.cka import Matrix, draw_cka, read_cka
from featsharp.visualization.figures.cost import draw_cost, read_cost
from featsharp.visualization.figures.miou import draw_miou, read_miou
from featsharp.visualization.figures.pareto import Point, draw_pareto, read_points
from featsharp.visualization.figures.pr import draw_pr, read_pr
from featsharp.visualization.figures.throughput import draw_throughput, read_throughput
from featsharp.visualization.results import Number, axis_name, entries, number, read_result
from featsharp.visualization.style import (
    COLOURS,
    amount_axis,
    check_output,
    error_bars,
    legend_beside,
    line_handle,
    line_style,
    new_figure,
    save,
    wrap,
)


def result_file(folder, name, task, **content):
    path = folder / name
    path.write_text(json.dumps({"task": task, **content}))
    return path


def encoder(upsampler, factor, result, backbone="toy-vit"):
    key = f"{upsampler} {factor}"
    return {"upsampler": upsampler, "factor": factor, "backbone": backbone, "key": key, "result": result}


def segmentation(value, size=64):
    interval = {"value": value, "low": value - 0.02, "high": value + 0.03}
    return {"miou": interval, "pixel_accuracy": 0.9, "iou": {"sky": 0.5, "sea": None}, "low_res_size": [size, size]}


# files


def test_missing_and_foreign_files_say_what_is_needed_and_how_it_is_made(tmp_path):
    with pytest.raises(DataError, match=r"none\.json: No such file.*featsharp eval segmentation \.\.\. --json"):
        read_result(tmp_path / "none.json", "segmentation")
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(DataError, match=r"text\.json is no JSON.*result of cka.*featsharp eval cka"):
        read_result(tmp_path / "text.json", "cka")
    for content in ("[]", "{}", '{"task": 3}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(DataError, match=r"other\.json holds no result.*featsharp eval boundaries"):
            read_result(tmp_path / "other.json", "boundaries")
    fidelity = result_file(tmp_path, "fidelity.json", "fidelity")
    with pytest.raises(
        DataError, match=r"fidelity\.json is the result of fidelity.*of flops or throughput.*eval flops"
    ):
        read_result(fidelity, "flops", "throughput")
    with pytest.raises(DataError, match=r"needs the result of a-new-task, made with: featsharp eval a-new-task \.\.\."):
        read_result(fidelity, "a-new-task")
    assert read_result(fidelity)["task"] == "fidelity"


def test_incomplete_encoders_are_refused(tmp_path):
    for encoders, problem in (({}, "names no encoder"), ({"sharp": {"factor": 2}}, "'sharp' is incomplete")):
        content = read_result(result_file(tmp_path, "x.json", "zoom", encoders=encoders))
        with pytest.raises(DataError, match=f"x.json.*{problem}"):
            list(entries(content))


def test_numbers_are_found_at_any_depth_and_listed_when_missing(tmp_path):
    encoders = {"a": encoder("tile", 2, segmentation(0.5))}
    (entry,) = entries(read_result(result_file(tmp_path, "x.json", "segmentation", encoders=encoders)))
    assert number(entry, "miou", "x.json") == pytest.approx((0.5, 0.48, 0.53))
    assert number(entry, "iou/sky", "x.json") == (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match=r"'a' has no 'pck'\. Available: miou, pixel_accuracy, iou/sky"):
        number(entry, "pck", "x.json")


# mIoU


def miou_file(folder, name="seg.json", size=64, labels=("tile-1x", "tile-2x", "last"), upsamplers=None):
    values = [0.25, 0.5, 0.625]
    upsamplers = upsamplers or ("tile", "tile", "featsharp")
    found = {
        label: encoder(upsampler, factor, segmentation(value, size))
        for label, upsampler, factor, value in zip(labels, upsamplers, (1, 2, 2), values, strict=True)
    }
    return read_result(result_file(folder, name, "segmentation", encoders=found), "segmentation")


def test_miou_lines_hold_the_numbers_of_the_files(tmp_path):
    contents = [miou_file(tmp_path, "b.json", 96), miou_file(tmp_path, "a.json", 64)]
    figure = draw_miou(read_miou(contents))
    assert [axes.get_title() for axes in figure.axes] == ["input 64 x 64", "input 96 x 96"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["tile", "featsharp"]
    for axes in figure.axes:
        tile, sharp = axes.containers
        assert np.allclose(tile.lines[0].get_xydata(), [(1, 25), (2, 50)])
        assert np.allclose(sharp.lines[0].get_xydata(), [(2, 62.5)])
        (bar,) = sharp.lines[2][0].get_segments()
        assert np.allclose(bar, [(2, 60.5), (2, 65.5)])
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1x", "2x"]


def test_lines_without_a_point_at_factor_1_start_at_the_backbone_itself(tmp_path):
    content = miou_file(tmp_path, upsamplers=("identity", "tile", "featsharp"))
    content["encoders"]["tile-1x"] = encoder("tile", 1, segmentation(0.125))
    content["encoders"]["other"] = encoder("bilinear", 2, segmentation(0.375), backbone="toy-cnn")
    content["encoders"] = {"none": content["encoders"].pop("tile-1x")} | content["encoders"] | {
        "identity": encoder("identity", 1, segmentation(0.25))
    }  # fmt: skip
    (axes,) = draw_miou(read_miou([content])).axes
    colours = dict(zip(("tile", "featsharp", "bilinear", "identity"), COLOURS, strict=False))
    starts = {line.get_color(): line.get_xydata().tolist() for line in axes.lines if line.get_marker() == ""}
    # Not tile, which has a point of its own, nor bilinear, which is of another backbone.
    assert starts == {colours["featsharp"]: [[1, 25], [2, 62.5]]}


def test_miou_may_draw_another_number(tmp_path):
    content = miou_file(tmp_path)
    (axes,) = draw_miou(read_miou([content], "pixel_accuracy"), "pixel_accuracy").axes
    assert axes.get_ylabel() == "pixel accuracy (%)"
    assert axes.containers[0].lines[0].get_ydata() == pytest.approx([90, 90])


def test_encoders_of_one_upsampler_and_factor_go_by_their_labels(tmp_path):
    upsamplers, labels = ("bilinear", "featsharp", "featsharp"), ("low", "mine", "theirs")
    content = miou_file(tmp_path, upsamplers=upsamplers, labels=labels)
    lines = [(point.line, point.factor) for point in read_miou([content])]
    assert lines == [("bilinear", 1), ("mine", 2), ("theirs", 2)]
    with pytest.raises(DataError, match="two results for 'low' at 1x and 64x64"):
        read_miou([content, content])


def test_miou_without_its_size_is_refused(tmp_path):
    encoders = {"a": encoder("tile", 2, {"miou": 0.5})}
    content = read_result(result_file(tmp_path, "old.json", "segmentation", encoders=encoders))
    with pytest.raises(DataError, match=r"old\.json: 'a' does not say its low_res_size"):
        read_miou([content])


# CKA


def test_cka_cells_hold_the_values_and_read_well(tmp_path):
    matrix = [[1.0, 0.2], [0.2, 1.0]]
    encoders = {f"e{i}": encoder("tile", 2, {"sizes": [56, 112], "matrix": matrix}) for i in range(5)}
    found = read_cka([read_result(result_file(tmp_path, "cka.json", "cka", encoders=encoders), "cka")])
    figure = draw_cka(found)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == [f"e{i}" for i in range(5)]
    for axes in panels:
        assert np.array_equal(axes.images[0].get_array(), matrix)
        assert axes.images[0].get_clim() == (0, 1)
        texts = {text.get_position(): text.get_text() for text in axes.texts}
        assert texts == {(0, 0): "1.00", (1, 0): "0.20", (0, 1): "0.20", (1, 1): "1.00"}
        assert [label.get_text() for label in axes.get_yticklabels()] == ["56", "112"]
        for text in axes.texts:
            column, row = text.get_position()
            paper = np.array(axes.images[0].cmap(matrix[row][column])[:3])
            assert abs(luminance(to_rgb(text.get_color())) - luminance(paper)) > 0.3


@pytest.mark.parametrize("count", [1, 4, 5, 7, 9])
def test_cka_panels_stand_in_even_lines_under_titles_of_their_width(count):
    matrices = [Matrix(f"FeatSharp 2x, {n} steps of recipe A", ["56", "112"], np.eye(2)) for n in range(count)]
    figure = draw_cka(matrices)
    figure.draw_without_rendering()
    panels = [axes for axes in figure.axes if axes.images]
    lines = {}
    for axes in panels:
        lines.setdefault(round(axes.bbox.y0), []).append(axes)
    assert sorted(map(len, lines.values())) == {1: [1], 4: [4], 5: [2, 3], 7: [3, 4], 9: [3, 3, 3]}[count]
    titles = [axes.title.get_window_extent() for axes in panels]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[i + 1 :])


def luminance(colour):
    return float(np.dot(colour, (0.2126, 0.7152, 0.0722)))


@pytest.mark.parametrize("result", [{"cka": 0.5}, {"sizes": [56, 112, 224], "matrix": [[1.0]]}])
def test_cka_without_its_matrix_is_refused(tmp_path, result):
    content = read_result(result_file(tmp_path, "cka.json", "cka", encoders={"a": encoder("tile", 2, result)}))
    with pytest.raises(DataError, match=r"cka\.json: 'a' has"):
        read_cka([content])


# throughput and cost


def throughput_rows():
    return [
        {
            "curve": curve,
            "factor": factor,
            "key": None if curve == "direct" else f"{curve} {factor}",
            "cells": 64 * factor**2,
            "time": {"median": 2 * ms, "low": 2 * ms - 1, "high": 2 * ms + 2, "runs": 5},
            "ms_per_image": ms,
            "us_per_token": 1000 * ms / (64 * factor**2),
            "backbone_ms_per_image": ms - {"direct": 0, "tile": 3 * factor - 4}[curve],
            "linear_ms_per_image": 8.0 * factor**2,
            "peak_bytes": 2**20 * ms,
            "total": 10**9 * ms,
        }
        for curve, factor, ms in (("direct", 1, 8), ("direct", 2, 40), ("tile", 1, 9), ("tile", 2, 36))
    ]


def throughput_file(folder, task="throughput"):
    result = {
        "backbone": "toy-vit",
        "native_size": [64, 64],
        "batch_size": 2,
        "autocast": None,
        "attention": ["scaled_dot_product_flash_attention_for_cpu"],
        "rows": throughput_rows(),
    }
    machine = {"device": "cpu", "processor": "Some CPU"}
    return read_result(result_file(folder, f"{task}.json", task, machine=machine, result=result), task)


def test_throughput_draws_the_three_quantities_of_the_file(tmp_path):
    figure = draw_throughput(*read_throughput(throughput_file(tmp_path)))
    per_token, per_image, memory = figure.axes
    assert np.allclose(per_token.lines[0].get_xydata(), [(1, 8000 / 64), (2, 40000 / 256)])
    assert np.allclose(per_token.lines[1].get_xydata(), [(1, 9000 / 64), (2, 36000 / 256)])
    assert np.allclose(per_image.lines[0].get_xydata(), [(1, 8), (2, 40)])
    # Of a batch of two: quartiles of 2 ms - 1 and 2 ms + 2.
    assert np.allclose(per_image.containers[1].lines[2][0].get_segments()[1], [(2, 35.5), (2, 37)])
    assert np.allclose(memory.lines[1].get_xydata(), [(1, 9), (2, 36)])
    assert figure.get_suptitle() == "toy-vit, Some CPU, float32, batch 2, flash attention for cpu"
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == ["direct", "tile", "upsampler alone", "linear"]


def test_linear_times_are_a_parabola_and_a_level(tmp_path):
    figure = draw_throughput(*read_throughput(throughput_file(tmp_path)))
    per_token, per_image, _ = ([line for line in axes.lines if line.get_label() == "linear"] for axes in figure.axes)
    factors, times = per_image[0].get_xydata().T
    assert len(factors) > 50
    assert (factors[0], factors[-1]) == pytest.approx((1, 2))
    assert np.allclose(times, 8 * factors**2)
    assert np.allclose(per_token[0].get_xydata(), [(1, 125), (2, 125)])


def test_the_upsampler_alone_is_what_its_passes_leave(tmp_path):
    figure = draw_throughput(*read_throughput(throughput_file(tmp_path)))
    alone = {
        line.get_label(): line.get_xydata().tolist() for line in figure.axes[1].lines if "alone" in line.get_label()
    }
    # 3 f - 4 ms: below 0 at factor 1, and the backbone leaves nothing of itself.
    assert alone == {"direct alone": [], "tile alone": [[2, 2]]}


def test_few_runs_are_hollow_and_have_no_quartiles(tmp_path):
    content = throughput_file(tmp_path)
    content["result"]["rows"][3]["time"]["runs"] = 4  # tile 2x
    figure = draw_throughput(*read_throughput(content))
    for axes in figure.axes[:2]:
        hollow = [line.get_xdata().tolist() for line in axes.lines if line.get_markerfacecolor() == "white"]
        assert hollow == [[2]]
    bars = [[segment[0][0] for segment in c.lines[2][0].get_segments()] for c in figure.axes[1].containers]
    assert bars == [[1, 2], [1]]
    assert figure.legends[0].get_texts()[-1].get_text() == "fewer than 5 runs"


@pytest.mark.parametrize("change", [{"rows": []}, {"rows": [{"curve": "direct"}]}, {"rows": None}])
def test_throughput_files_that_lack_times_are_refused(tmp_path, change):
    content = throughput_file(tmp_path)
    content["result"] |= change
    with pytest.raises(DataError, match=r"throughput\.json .*measure anew: featsharp eval throughput"):
        read_throughput(content)


@pytest.mark.parametrize(("task", "costs"), [("flops", [9, 36]), ("throughput", [9, 36])])
def test_cost_joins_files_by_the_content_of_encoders(tmp_path, task, costs):
    encoders = {
        "two": encoder("tile", 2, {"pck@0.1": {"value": 0.6, "low": 0.5, "high": 0.65}}),
        "one": encoder("tile", 1, {"pck@0.1": {"value": 0.4, "low": 0.3, "high": 0.5}}),
    }
    quality = read_result(result_file(tmp_path, "spair.json", "correspondence", encoders=encoders))
    trades, title = read_cost([throughput_file(tmp_path, task)], [quality], "pck@0.1")
    assert {"flops": "GFLOP", "throughput": "milliseconds"}[task] in title
    figure = draw_cost(trades, title, "pck@0.1")
    (axes,) = figure.axes
    assert np.allclose(axes.containers[0].lines[0].get_xydata(), list(zip(costs, [40, 60], strict=True)))
    assert [(note.xy, note.get_text()) for note in axes.texts] == [((9.0, 40.0), "1x"), ((36.0, 60.0), "2x")]
    assert axes.get_ylabel() == "PCK@0.1 (%)"


def test_the_cost_of_other_weights_is_never_drawn(tmp_path):
    """Of an encoder of the same upsampler and factor, and for results that do not say what they are of."""
    mine = encoder("tile", 2, {"x": 0.5}) | {"key": "other weights"}
    quality = read_result(result_file(tmp_path, "q.json", "zoom", encoders={"mine": mine}))
    with pytest.raises(DataError, match=r"no file holds the cost of 'mine' of .*q\.json, with these weights"):
        read_cost([throughput_file(tmp_path)], [quality], "x")
    del mine["key"]
    quality = read_result(result_file(tmp_path, "q.json", "zoom", encoders={"mine": mine}))
    with pytest.raises(DataError, match=r"q\.json does not say which weights 'mine' has.*featsharp eval zoom"):
        read_cost([throughput_file(tmp_path)], [quality], "x")


def test_small_costs_are_in_millions(tmp_path):
    content = throughput_file(tmp_path, "flops")
    for row in content["result"]["rows"]:
        row["total"] /= 1000
    quality = read_result(result_file(tmp_path, "q.json", "zoom", encoders={"a": encoder("tile", 2, {"x": 0.5})}))
    trades, title = read_cost([content], [quality], "x")
    assert (trades[0].cost, title) == (36, "cost (MFLOP per image)")


def test_the_front_of_each_measure_is_drawn(tmp_path):
    def result(passes, zoom, pck):
        numbers = {"zoom": zoom, "PCK@0.1": pck}
        intervals = {name: {"value": x, "low": x - 0.1, "high": x + 0.2} for name, x in numbers.items() if x}
        return {"passes": passes, "seconds": passes / 10, **intervals}

    some = {"b": result(5.0, 0.6, 0.2), "a": result(1.0, 0.5, 0.4)}
    more = {"c": result(8.0, 0.8, None)}
    files = [
        result_file(tmp_path, f"{number}.json", "pareto", encoders={k: encoder("x", 2, v) for k, v in one.items()})
        for number, one in enumerate((some, more))
    ]
    contents = [read_result(file, "pareto") for file in files]
    points = read_points(contents, "passes")
    assert [(point.label, point.cost) for point in points] == [("a", 1.0), ("b", 5.0), ("c", 8.0)]
    assert [point.cost for point in read_points(contents, "seconds")] == pytest.approx([0.1, 0.5, 0.8])
    zoom, pck = draw_pareto(points, "passes").axes
    assert zoom.get_title() == "zoom"
    assert pck.get_title() == "PCK@0.1 (%)"
    assert np.allclose(zoom.lines[0].get_xydata(), [(1, 0.5), (5, 0.6), (8, 0.8)])
    assert np.allclose(pck.lines[0].get_xydata(), [(1, 40)])  # the other has cost more and is worse
    assert [len(axes.containers) for axes in (zoom, pck)] == [3, 2]
    five = Point("d", 1.0, dict.fromkeys(("fidelity", "zoom", "PCK@0.1", "room@10", "boundary F"), Number(1, 1, 1)))
    assert sum(axes.axison for axes in draw_pareto([five], "passes").axes) == 5  # of eight panels
    del some["a"]["passes"]
    bare = result_file(tmp_path, "bare.json", "pareto", encoders={"a": encoder("x", 2, some["a"])})
    with pytest.raises(DataError, match=r"bare\.json: 'a' has no passes"):
        read_points([read_result(bare)], "passes")


@pytest.mark.parametrize("place", ["result", "settings"])
def test_costs_and_qualities_of_different_sizes_cannot_be_joined(tmp_path, place):
    size = {"low_res_size": [128, 96]}
    encoders = {"two": encoder("tile", 2, {"x": 1.0, **(size if place == "result" else {})})}
    settings = size if place == "settings" else {"low_res_size": None}
    quality = read_result(result_file(tmp_path, "q.json", "zoom", settings=settings, encoders=encoders))
    with pytest.raises(
        DataError, match=r"q\.json: 'two' was measured at 128x96 pixels.* of toy-vit, 64x64; evaluate at"
    ):
        read_cost([throughput_file(tmp_path)], [quality], "x")


def test_of_two_encoders_with_one_label_and_factor_none_is_drawn(tmp_path):
    encoders = {"two": encoder("tile", 2, {"x": 1.0, "low_res_size": [64, 64]})}
    quality = read_result(result_file(tmp_path, "q.json", "zoom", encoders=encoders))
    with pytest.raises(DataError, match=r"two results for 'two' at 2x; .*LABEL="):
        read_cost([throughput_file(tmp_path)], [quality, quality], "x")
    other = {**quality, "encoders": {"mine": encoders["two"]}}
    trades, _ = read_cost([throughput_file(tmp_path)], [quality, other], "x")
    assert [trade.line for trade in trades] == ["two", "mine"]


@pytest.mark.parametrize(
    ("metric", "name", "scale"),
    [
        ("pck@0.05_pairs", "PCK@0.05 pairs (%)", 100),
        ("miou", "mIoU (%)", 100),
        ("iou/sky", "IoU, sky (%)", 100),
        ("ods_f", "ODS F (%)", 100),
        ("accuracy_small", "accuracy small (%)", 100),
        ("zoom_cosine", "zoom cosine", 1),
        ("delta_m", "delta m", 1),
    ],
)
def test_axes_of_shares_are_in_percent(metric, name, scale):
    assert axis_name(metric) == (name, scale)


def test_unknown_costs_say_how_to_measure_them(tmp_path):
    encoders = {"mine": encoder("featsharp", 4, {"x": 1.0})}
    quality = read_result(result_file(tmp_path, "q.json", "zoom", encoders=encoders))
    command = r"--backbone toy-vit --checkpoint FILE.*--upsampler featsharp --factors 4"
    with pytest.raises(DataError, match=rf"'mine' of .*q\.json.*{command}"):
        read_cost([throughput_file(tmp_path, "flops")], [quality], "x")
    both = [throughput_file(tmp_path, "flops"), throughput_file(tmp_path)]
    with pytest.raises(ConfigError, match="flops and throughput cannot share"):
        read_cost(both, [quality], "x")


# precision and recall


def pr_result(ods, curve):
    numbers = {"ods_f": {"value": ods, "low": ods, "high": ods}, "ods_precision": 0.7, "ods_recall": 0.6}
    return {**numbers, "curve": [{"threshold": t, "precision": p, "recall": r} for t, p, r in curve]}


def test_pr_curves_are_those_of_the_file_best_first(tmp_path):
    encoders = {
        "weak": encoder("bilinear", 2, pr_result(0.3, [(0.1, 0.2, 0.9), (0.5, 0.6, 0.2)])),
        "good": encoder("tile", 2, pr_result(0.65, [(0.1, 0.5, 0.8), (0.3, 0.7, 0.6), (0.9, 0.0, 0.0)])),
    }
    contents = [read_result(result_file(tmp_path, "b.json", "boundaries", encoders=encoders), "boundaries")]
    figure = draw_pr(read_pr(contents))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert np.allclose(lines["good"].get_xydata(), [(0.8, 0.5), (0.6, 0.7)])  # nothing found is no point
    assert np.allclose(lines["weak"].get_xydata(), [(0.9, 0.2), (0.2, 0.6)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["good, F 0.650", "weak, F 0.300"]
    marked = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert np.allclose([line.get_xydata()[0] for line in marked], [(0.6, 0.7), (0.6, 0.7)])
    # Grey lines: F = 2 p r / (p + r) is the same all along.
    for f, line in zip((0.2, 0.4, 0.6, 0.8), axes.lines, strict=False):
        recall, precision = line.get_xydata().T
        assert np.allclose(2 * precision * recall / (precision + recall), f)


def test_an_encoder_that_finds_nothing_stays_in_the_legend(tmp_path):
    found = {"ods_f": 0.0, "ods_precision": 0.0, "ods_recall": 0.0, "curve": pr_result(0, [(0.1, 0, 0)])["curve"]}
    encoders = {"good": encoder("tile", 2, pr_result(0.65, [(0.3, 0.7, 0.6)])), "zero": encoder("tile", 2, found)}
    figure = draw_pr(read_pr([read_result(result_file(tmp_path, "b.json", "boundaries", encoders=encoders))]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["good, F 0.650", "zero, F 0.000 (nothing found)"]
    assert [line.get_marker() for line in legend.get_lines()] == ["o", "s"]
    best = figure.axes[0].lines[-1]
    assert best.get_xydata().tolist() == [[0, 0]]
    assert not best.get_clip_on()  # all of a marker on the border is seen


def test_pr_without_its_curve_is_refused(tmp_path):
    content = read_result(
        result_file(tmp_path, "b.json", "boundaries", encoders={"a": encoder("tile", 2, {"ods_f": 1})})
    )
    with pytest.raises(DataError, match=r"b\.json: 'a' has no curve"):
        read_pr([content])


# style


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_files_are_what_their_suffix_says_and_the_same_every_time(tmp_path, suffix, head):
    for name in ("a", "b"):
        figure = new_figure(2, 1)
        figure.subplots().plot([0, 1], [0, 1])
        save(figure, tmp_path / f"{name}.{suffix}")
    first = (tmp_path / f"a.{suffix}").read_bytes()
    assert first.startswith(head)
    assert first == (tmp_path / f"b.{suffix}").read_bytes()
    if suffix == "png":
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.width == pytest.approx(400, abs=20)
            assert picture.height == pytest.approx(200, abs=20)


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"\.png, \.pdf or \.svg.*'x\.jpg'"):
        check_output(tmp_path / "x.jpg")


def test_lines_differ_by_colour_and_marker_then_by_dashes():
    styles = [line_style(n) for n in range(4 * len(COLOURS))]
    assert len({(style["color"], style["marker"], style["linestyle"]) for style in styles}) == len(styles)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.004, 0.045), ["0.005", "0.01", "0.02"]),
        ((3, 60), ["5", "10", "20", "50"]),
        ((10, 13), ["10", "11", "12", "13"]),
    ],
)
def test_amounts_have_plain_ticks(values, ticks):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot(values, (0, 1))
    amount_axis(axes, values)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    shown = [t.get_text() for t, at in zip(axes.get_xticklabels(), axes.get_xticks(), strict=True) if low <= at <= high]
    assert [tick for tick in ticks if tick in shown] == ticks


def test_legends_fit_the_figure_and_leave_panels_their_width():
    widths = []
    for labels in (["a", "b"], [f"FeatSharp with recipe number {n} and many more steps" for n in range(6)]):
        figure = new_figure(3.3, 3)
        axes = figure.subplots()
        legend_beside(figure, [line_handle(label, **line_style(n)) for n, label in enumerate(labels)])
        figure.draw_without_rendering()
        box = figure.legends[0].get_window_extent()
        assert axes.bbox.x1 <= box.x0
        assert box.x1 <= figure.bbox.x1
        widths.append(axes.bbox.width)
    assert widths[0] == pytest.approx(widths[1], rel=0.03)


def test_wrapped_text_is_as_wide_as_asked():
    text = "FeatSharp without a bias buffer, 450 steps on CPU, a_name_without_any_space_that_is_longer_than_a_line"
    figure = new_figure(8, 3)
    wrapped = wrap(text, 2.0, 10)
    assert wrapped.replace("\n", "").replace(" ", "") == text.replace(" ", "")
    assert figure.text(0, 0, wrapped, fontsize=10).get_window_extent().width <= 2.0 * figure.dpi
    assert wrap("tile 2x", 2.0, 10) == "tile 2x"


def test_error_bars_are_never_negative():
    assert error_bars([(0.5, 0.6, 0.4), (0.5, 0.25, 1.0)], 100) == [[0, 25], [0, 50]]
    assert error_bars([(0.5, float("nan"), float("nan"))]) == [[0], [0]]  # an estimate without interval
