"""Every report of docs/trials.md has its row and its snippet; tests/test_documentation.py runs them."""

import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "trials.md").read_text(encoding="utf-8")


def test_every_report_has_a_row_and_a_snippet():
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \| [\w.-]+/[\w.-]+#\d+[, |]", PAGE, re.MULTILINE)]
    headings = " ".join(re.findall(r"^([\d, and]+):$", PAGE, re.MULTILINE))
    shown = [int(number) for number in re.findall(r"\d+", headings)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert sorted(shown) == numbers
