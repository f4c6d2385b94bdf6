"""What docs/export.md and docs/hub.md show works as it is written there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnxscript", "onnxruntime")),
    reason='needs pip install "featsharp[onnx]"',
)
def test_the_snippets_hold(tmp_path):
    blocks = []
    for page in ("export.md", "hub.md"):
        found = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
        assert found
        blocks += found
    script = "\n".join(blocks).replace('torch.hub.load("."', f"torch.hub.load({str(ROOT)!r}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "sharp.onnx").is_file()
    assert (tmp_path / "sharp" / "model.safetensors").is_file()


def test_the_table_of_the_metadata_is_complete():
    from featsharp.builder import create_encoder
    from featsharp.export import describe

    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = " ".join(line for line in page.splitlines() if line.startswith("| `"))
    encoder = create_encoder("toy-vit", "bilinear", 2)
    for form in ("onnx", "torch-export"):
        assert {f"`{key}`" for key in describe(encoder, form, None)} <= set(re.findall(r"`[\w]+`", rows))
