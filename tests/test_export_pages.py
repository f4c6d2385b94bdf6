"""The table of docs/export.md names what a file holds; tests/test_documentation.py runs the page."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_the_metadata_is_complete():
    from featsharp.builder import create_encoder
    from featsharp.export import describe

    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = " ".join(line for line in page.splitlines() if line.startswith("| `"))
    encoder = create_encoder("toy-vit", "bilinear", 2)
    for form in ("onnx", "torch-export"):
        assert {f"`{key}`" for key in describe(encoder, form, None)} <= set(re.findall(r"`[\w]+`", rows))
