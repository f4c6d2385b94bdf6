"""docs/results.md says what the result files say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "results_page.py"


pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not part of this copy")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_files_say(module):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page.count("<!-- table ") == len(module.TABLES)
    assert page.count("<!-- students -->") == page.count("<!-- papers -->") == 1
    assert module.fill(page, module.RESULTS) == page
    assert module.MEASURED.read_text(encoding="utf-8") == module.measured(module.RESULTS)


def write(path: Path, task: str, seed: int, encoders: dict[str, dict]) -> None:
    machine = {"processor": "p", "device": "cpu", "torch": "t"}
    content = {"task": task, "command": f"featsharp {seed}", "settings": {"seed": seed}, "machine": machine}
    shared = {"backbone": "toy", "backbone_autocast": None, "skipped": []}
    path.write_text(
        json.dumps(content | {"encoders": {name: shared | one for name, one in encoders.items()}}), encoding="utf-8"
    )


def of_items(factor: int, *values: float) -> dict:
    mean = {"value": sum(values) / len(values), "low": 0.0, "high": 1.0}
    return {
        "factor": factor,
        "items": {str(number): {"d1": value} for number, value in enumerate(values)},
        "result": {"d1": mean, "constant_d1": mean},
    }


def test_seeds_are_one_row_and_gains_are_paired(module, tmp_path):
    table = module.Table("depth", {"d1": "d1", "rmse": "RMSE"}, 100, 1, gains=("d1",), constant="constant_")
    assert module.render(table, tmp_path) == module.NOTHING
    low = of_items(1, 0.1, 0.5, 0.9)
    write(tmp_path / "depth@0.json", "depth", 0, {"sharp": of_items(2, 0.2, 0.6, 1.0), "identity-1x": low})
    write(tmp_path / "depth@1.json", "depth", 1, {"sharp": of_items(2, 0.4, 0.8, 1.2)})
    assert module.render(table, tmp_path).splitlines() == [
        "| encoder | d1 | RMSE | gain, d1 |",
        "|---|---|---|---|",
        "| a constant | 60.0 [0.0, 100.0] |  |  |",
        # Two seeds, .6 and .8; above the low-resolution map by .2 in every picture.
        "| sharp, 2 seeds | 70.0 ±14.1 [30.0, 110.0] |  | +20.0 [+20.0, +20.0] |",
        "| identity-1x | 50.0 [0.0, 100.0] |  |  |",
        "",
        "- gains are over identity-1x",
        "- `featsharp 0` (3 items, 0 skipped)",
        "- `featsharp 1` (3 items, 0 skipped)",
        "- p, cpu, torch t, backbone passes in float32",
    ]
    write(tmp_path / "depth@2.json", "depth", 1, {"sharp": low})
    with pytest.raises(SystemExit, match="'sharp' is in two files with the seed 1"):
        module.render(table, tmp_path)


def test_a_ratio_over_pictures_has_a_gain_without_interval(module, tmp_path):
    """The mean over items is another number, so that its resamples say nothing."""
    sharp = of_items(2, 0.2, 0.6)
    sharp["result"]["d1"] = {"value": 0.7, "low": 0.6, "high": 0.8}
    write(tmp_path / "depth@0.json", "depth", 0, {"identity-1x": of_items(1, 0.1, 0.5), "sharp": sharp})
    line = module.render(module.Table("depth", {"d1": "d1"}, gains=("d1",)), tmp_path).splitlines()[3]
    assert line == "| sharp | 0.700 [0.600, 0.800] | +0.400 |"


def test_students_are_a_table_of_their_own(module, tmp_path):
    assert module.render_students(tmp_path) == module.NOTHING
    for label, value in (("baseline", 0.5), ("views", 0.6)):
        result = {"miou": {"value": value}, "layout": "camvid"}
        one = {label: {"factor": 1, "items": {"a": {}}, "result": result}}
        write(tmp_path / f"students@{label}.json", "segmentation", 0, one)
    text = module.render_students(tmp_path)
    assert text.startswith("```text\nours: proxies")
    assert "views" in text
    assert "+20.00" in text
    assert "RADIO" not in text
