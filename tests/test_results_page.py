"""docs/results.md says what the result files say."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "results_page.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="benchmarks are not part of this copy")
def test_the_page_is_what_the_files_say():
    spec = importlib.util.spec_from_file_location("results_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page.count("<!-- table ") == len(module.TABLES)
    assert module.fill(page, module.RESULTS) == page
    assert module.MEASURED.read_text(encoding="utf-8") == module.measured(module.RESULTS)
