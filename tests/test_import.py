"""Importing featsharp is quick, starts nothing and needs nothing optional."""

import subprocess
import sys
from pathlib import Path

import pytest

import featsharp

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("timm", "torchvision", "hydra", "omegaconf", "tensorboard", "matplotlib", "onnx", "tqdm", "webdataset")
OPTIONAL += ("kornia", "sklearn", "skimage", "transformers", "scipy", "wandb")

BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by this test", name=name)

sys.meta_path.insert(0, Block())
"""

USE_TOY = """
import torch
import featsharp

encoder = featsharp.create_encoder("toy-vit", "bilinear", 2)
height, width = (int(side) for side in encoder.input_size)
with torch.no_grad():
    out = encoder(encoder.input_conditioner(torch.rand(2, 3, height, width)))
b, c, h, w = out.low_res.shape
assert (b, c) == (2, encoder.embed_dim), out.low_res.shape
assert out.high_res.shape == (2, c, 2 * h, 2 * w), out.high_res.shape
assert out.high_res.isfinite().all()
assert out.summary is None
"""


def run(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_import_starts_nothing_and_takes_under_two_seconds(clean_environment):
    done = run(
        "import sys, threading, time\nbefore = set(sys.modules)\nimport featsharp\nseconds = time.process_time()\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
        "assert threading.active_count() == 1\nassert seconds < 2, seconds",
        clean_environment,
    )
    assert done.stdout.split() == ["featsharp"]
    assert done.stderr == ""


def test_public_names_load_without_side_effects(clean_environment):
    code = f"""
import sys
import torch
before = set(sys.modules)  # torch imports tqdm where it is installed
import featsharp
for name in featsharp.__all__:
    getattr(featsharp, name)
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32
loaded = (set(sys.modules) - before) & set({OPTIONAL!r})
assert not loaded, loaded
"""
    assert run(code, clean_environment).stdout == ""


def test_works_without_optional_packages(clean_environment):
    check = "try:\n    import tqdm.auto\nexcept ImportError as error:\n    print(error)"
    done = run(BLOCK + check + USE_TOY, clean_environment)
    assert "blocked by this test" in done.stdout


def test_public_names():
    assert set(featsharp.__all__) <= set(dir(featsharp))
    assert featsharp._HOMES.keys() == set(featsharp.__all__) - {"__version__"}
    for name in featsharp.__all__:
        assert getattr(featsharp, name) is getattr(featsharp, name)


def test_public_names_are_those_of_their_modules():
    from featsharp.builder import load_from_file
    from featsharp.upsamplers.base import UpsampleFeatures

    assert featsharp.load_from_file is load_from_file
    assert featsharp.UpsampleFeatures is UpsampleFeatures


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'featsharp' has no attribute 'load_form_file'"):
        _ = featsharp.load_form_file
