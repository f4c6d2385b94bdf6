"""benchmarks/training_step.py times the trainer's own step, and docs/performance-training.md says what it found."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks are not part of this copy")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("training_step")


def test_parts_do_not_count_twice(script):
    """A part within another one, one within itself, and what is left of the step."""
    ticks = iter(range(100))
    clock = script.PartClock(lambda: next(ticks))
    for part in ("step", "upsampler", "backbone"):
        clock.begin(part)  # at 0, 1, 2
    clock.end()  # at 3
    clock.begin("upsampler")
    for _ in range(3):
        clock.end()  # at 5, 6, 7
    assert clock.steps == [{"step": 2, "upsampler": 4, "backbone": 1}]
    assert clock.within == []


@pytest.mark.slow
def test_the_command_times_a_real_training_and_leaves_it_as_it_was(script, tmp_path, monkeypatch, capsys):
    backward, threads = torch.Tensor.backward, torch.get_num_threads()
    cases = ["--case", "plain=", "--case", "from disk=feature_cache.samples=4"]
    sizes = ["--steps", "2", "--rounds", "1", "--threads", str(threads), "--output", str(tmp_path / "step.md")]
    small = ["model=toy-vit", "batch_size=2", "num_workers=0", "device=cpu"]
    monkeypatch.setattr(script, "keep_freed_memory", lambda: None)  # which cannot be undone
    script.main([*cases, *sizes, *small])
    assert torch.Tensor.backward is backward
    content = json.loads((tmp_path / "step.json").read_text())
    for case in content["cases"]:
        assert case["step"]["runs"] == 2
        parts = {name: part["milliseconds"] for name, part in case["parts"].items()}
        assert parts.keys() == set(script.PARTS)
        assert all(time > 0 for name, time in parts.items() if name != "gradients averaged over processes")
        # Medians of two steps are means, and those of parts add up to that of the step.
        assert sum(parts.values()) == pytest.approx(case["step"]["median"])
        assert 0 < case["backbone_share"] < 1
        assert case["decode_milliseconds"] > 0
    page = (tmp_path / "step.md").read_text()
    assert "| **all but the backbone** |" in page
    assert "- from disk: `feature_cache.samples=4`" in page
    assert "model=toy-vit" in page
    assert "upsampler, backward" in capsys.readouterr().out


def test_the_page_shows_the_result(script):
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- measured -->") == page.count("<!-- end -->") == 1
    content = json.loads(script.RESULT.with_suffix(".json").read_text(encoding="utf-8"))
    assert script.fill(page, content) == page
    assert script.report(content) in script.RESULT.read_text(encoding="utf-8")
