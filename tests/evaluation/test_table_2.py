"""Table 2: the paper's own means, and ours from results of several tasks and seeds."""

import json
from pathlib import Path

import pytest

from featsharp.cli.main import main
from featsharp.errors import DataError
from featsharp.evaluation.delta_m import delta_m
from featsharp.evaluation.table_2 import TABLE_2, Benchmark, changes_of, collect_scores

PRINTED = {"RADIOv2.5-L": -0.21, "baseline": 0, "tile": -0.27, "S2": 0.03, "FeatUp": -0.13, "FeatSharp": 0.39}


def write(path: Path, task: str, label: str, **numbers: object) -> Path:
    result = {name: {"value": x, "low": x, "high": x} if isinstance(x, float) else x for name, x in numbers.items()}
    content = {"task": task, "encoders": {label: {"backbone": "toy", "result": result}}}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_the_means_of_the_paper_follow_from_its_columns():
    """E17, E18."""
    assert {name: round(delta_m(row), 2) for name, row in TABLE_2.items()} == PRINTED


def test_columns_seeds_and_directions(tmp_path, capsys):
    files = [
        write(tmp_path / "1", "neighbours", "baseline", knn=0.4, map=0.2),
        write(tmp_path / "2", "neighbours", "baseline", knn=0.6, map=0.2),
        write(tmp_path / "3", "neighbours", "sharp", knn=0.55, map=0.3),
        write(tmp_path / "4", "neighbours", "sharp", knn=0.65, map=0.3),
        write(tmp_path / "5", "segmentation", "baseline", miou=0.5, layout="camvid"),
        write(tmp_path / "6", "segmentation", "sharp", miou=0.55, layout="camvid"),
        write(tmp_path / "7", "segmentation", "baseline", miou=0.4, layout="context60"),
        write(tmp_path / "8", "segmentation", "sharp", miou=0.3, layout="context60"),
        write(tmp_path / "9", "depth", "baseline", rmse=0.5, d1=0.8, layout="nyu"),
        write(tmp_path / "10", "depth", "sharp", rmse=0.4, d1=0.9, layout="nyu"),
        write(tmp_path / "11", "depth", "baseline", rmse=0.5, d1=0.8, layout="rgbd"),
        write(tmp_path / "12", "depth", "sharp", rmse=0.5, d1=0.84, layout="rgbd"),
        write(tmp_path / "13", "room", "baseline", **{"room@20": 0.5}),
        write(tmp_path / "14", "room", "sharp", **{"room@20": 0.55}),
        write(tmp_path / "15", "room", "partly", **{"room@20": 0.5}),
    ]
    assert main(["eval", "tables", "--table", "2", "--results", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    ours = {line.split()[0]: line.split()[1:] for line in lines[lines.index("") + 8 :] if line}
    # Two seeds at 10 and 30 %, both of one score at 10 %, d1 5 % and correspondence 10 %, retrieval 50 %.
    assert ours["sharp"][:3] == ["+20.00", "±14.14", "+10.00"]
    assert ours["sharp"][3:7] == ["+7.50", "+50.00", "±0.00", "-25.00"]
    assert ours["sharp"][7:] == ["+20.00", "-", f"{(10 + 10 + 7.5 + 50 - 25 + 20) / 6:+.2f}"]  # of the first seed
    assert ours["partly"] == ["-", "-", "-", "-", "-", "-", "-", "-"]


def test_only_whole_groups_count():
    d1, room = Benchmark("Probe3D", "depth", "d1"), Benchmark("Probe3D", "room", "room@20")
    assert changes_of({d1: [0.9]}, {d1: [0.8], room: [0.5]}) == {}
    assert changes_of({d1: [0.9], room: [0.5]}, {d1: [0.75], room: [0.5]})["Probe3D"] == pytest.approx([10])


def test_data_sets_are_no_seeds_of_each_other():
    results = [
        ("segmentation", {"baseline": {"result": {"miou": {"value": value}, "layout": layout}}})
        for value, layout in ((0.5, "camvid"), (0.3, "ade20k"), (0.4, "context"), (0.2, "context60"), (0.6, "camvid"))
    ]
    scores = collect_scores(results)["baseline"]
    assert {(b.group, b.data): values for b, values in scores.items()} == {
        ("Dense", "camvid"): [0.5, 0.6],
        ("Dense", "ade20k"): [0.3],
        ("Pascal Context", "context"): [0.4],
        ("Pascal Context", "context60"): [0.2],
    }


def test_results_need_a_baseline_and_numbers(tmp_path):
    with pytest.raises(DataError, match=r"only sharp; name the encoder .* baseline=identity-1x"):
        collect_scores([("room", {"sharp": {"result": {"room@20": {"value": 0.5}}}})])
    with pytest.raises(DataError, match="'sharp' of room has no number 'room@20'"):
        collect_scores([("room", {"sharp": {"result": {}}}), ("room", {"bad": {"failed": "no memory"}})])
    assert collect_scores([("room", {"bad": {"failed": "no memory"}})]) == {}
