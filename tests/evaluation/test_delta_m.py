"""Delta_m: the published table comes out of its own columns, and raw scores give changes worked out by hand."""

import json
from pathlib import Path

import pytest

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.delta_m import DeltaMTask, delta_m, group_changes, read_scores, relative_change

# Table 2 of arXiv 2502.16025: changes in classification, dense, Probe3D, retrieval, Pascal Context, NYUDv2, VILA.
PUBLISHED = {
    "RADIOv2.5-L": ((-0.47, -0.09, -1.05, -0.45, 0.62, -2.26, 2.24), "-0.21"),
    "baseline": ((0, 0, 0, 0, 0, 0, 0), "0.00"),
    "tile": ((-0.03, 0.30, -0.08, -0.23, -0.02, 1.33, -3.17), "-0.27"),
    "S2": ((-0.05, 0.15, -0.03, -0.44, 0.13, 1.33, -0.89), "0.03"),
    "FeatUp": ((-0.07, 0.14, 0.23, -0.07, 0.14, 0.32, -1.58), "-0.13"),
    "FeatSharp": ((0.06, 0.16, 0.83, 0.13, 0.17, 0.93, 0.43), "0.39"),
}

CSV = """model,   knn,            ade20k, voc,   rmse
group,   classification, dense,  dense, depth
better,  higher,         ,       ,      lower
plain,   80,             40,     50,    0.5
sharp,   82,             44,     49,    0.4
blurred, 80,             38,     50,    0.6
"""
# By hand: knn 100 * 2 / 80; dense the mean of 100 * 4 / 40 and 100 * -1 / 50; depth 100 * 0.1 / 0.5.
SHARP = {"classification": 2.5, "dense": 4.0, "depth": 20.0}
BLURRED = {"classification": 0.0, "dense": -2.5, "depth": -20.0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_come_out_of_their_columns(name):
    """E17."""
    changes, printed = PUBLISHED[name]
    assert f"{delta_m(changes):.2f}" == printed


def test_relative_changes_are_signed_by_direction():
    assert relative_change(44, 40, "higher") == pytest.approx(10)
    assert relative_change(44, 40, "lower") == pytest.approx(-10)
    assert relative_change(-3, -4, "higher") == pytest.approx(25)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "scores.csv"
    path.write_text(CSV)
    return path


def test_groups_weigh_the_same_however_many_benchmarks_they_have(table):
    scores = read_scores(table)
    assert group_changes(scores, "sharp", "plain") == pytest.approx(SHARP)
    assert delta_m(group_changes(scores, "sharp", "plain").values()) == pytest.approx(26.5 / 3)
    assert delta_m(group_changes(scores, "plain", "plain").values()) == 0


def test_the_table_is_ranked(table):
    task = DeltaMTask(data=table, baseline="plain")
    result = task.run()
    assert list(result) == ["sharp", "plain", "blurred"]
    assert result["blurred"]["changes"] == pytest.approx(BLURRED)
    assert json.loads(json.dumps(result)) == result
    lines = task.table(result)
    assert [line.split()[:2] for line in lines[1:]] == [["sharp", "+8.83"], ["plain", "+0.00"], ["blurred", "-7.50"]]
    assert lines[0].split() == ["candidate", "Delta_m", "%", "classification", "dense", "depth"]
    assert len({len(line) for line in lines}) == 1


def test_json_says_the_same(table, tmp_path):
    path = tmp_path / "scores.json"
    about = {
        "knn": {"group": "classification"},
        "ade20k": {"group": "dense"},
        "voc": {"group": "dense"},
        "rmse": {"group": "depth", "better": "lower"},
    }
    rows = {"plain": (80, 40, 50, 0.5), "sharp": (82, 44, 49, 0.4), "blurred": (80, 38, 50, 0.6)}
    scores = {name: dict(zip(about, row, strict=True)) for name, row in rows.items()}
    path.write_text(json.dumps({"benchmarks": about, "scores": scores}))
    assert read_scores(path) == read_scores(table)


def test_a_benchmark_without_a_group_is_its_own(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("\ufeff,a,b\nbase,1,2\nother,2,1\n")  # as spreadsheets save it
    assert group_changes(read_scores(path), "other", "base") == pytest.approx({"a": 100, "b": -50})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "scores.csv is empty; expected CSV"),
        (",a\n", "scores.csv holds no scores"),
        (",a\nbase,1\nother,\n", "scores.csv, candidate 'other': a score is missing"),
        (",a\nbase,x\n", "scores.csv, candidate 'base': a score is missing or no number"),
        (",a\nbase,nan\n", "scores.csv, candidate 'base': a score is not finite"),
        (",a,b\nbase,1\n", "scores.csv, row 'base': 1 cells for 2 benchmarks"),
        (",a\nbase,1\nbase,2\n", "scores.csv: 'base' is there twice"),
        (",a,a\nbase,1,2\n", "scores.csv: a benchmark is named twice"),
        (",a\nbetter,up\nbase,1\n", "scores.csv, benchmark 'a': better is 'higher' or 'lower', got 'up'"),
    ],
)
def test_bad_tables_are_named(tmp_path, content, message):
    path = tmp_path / "scores.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_scores(path)


@pytest.mark.parametrize("content", ["{", "[]", '{"scores": [1]}', '{"benchmarks": {}}'])
def test_bad_json_is_named(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"scores\.json is no table of scores"):
        read_scores(path)


def test_what_cannot_be_compared(table, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'plain'"):
        DeltaMTask(data=table, baseline="plane").run()
    with pytest.raises(ConfigError, match="got none"):
        delta_m([])
    zero = tmp_path / "zero.csv"
    zero.write_text(",a\nbase,0\nother,1\n")
    with pytest.raises(ConfigError, match="baseline of 0"):
        DeltaMTask(data=zero, baseline="base").run()
    with pytest.raises(DataError, match=r"missing\.csv"):
        read_scores(tmp_path / "missing.csv")
