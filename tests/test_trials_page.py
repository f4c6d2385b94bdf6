"""What docs/trials.md shows holds as it is written there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "trials.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "wandb", "hydra")), reason="needs extras"
)
def test_the_snippets_of_the_page_hold(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 15
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "FEATSHARP_CACHE": str(tmp_path / "cache"), "WANDB_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_report_has_a_row_and_a_snippet():
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \| [\w.-]+/[\w.-]+#\d+[, |]", PAGE, re.MULTILINE)]
    headings = " ".join(re.findall(r"^([\d, and]+):$", PAGE, re.MULTILINE))
    shown = [int(number) for number in re.findall(r"\d+", headings)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert sorted(shown) == numbers
