"""Imports point downward, are absolute, shadow nothing, and leave optional packages alone until they are used."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "featsharp"

# Lowest first. A unit (a package or module directly in featsharp/) may import itself and units of lower levels only,
# so two units of one level never import each other. featsharp/__init__.py, the public face, stands above all.
LEVELS = (
    ("errors", "_moved"),
    ("urls", "names", "device", "files", "memory"),
    ("registry", "checkpoint", "settings", "terminal", "weights"),
    ("ops",),
    ("layers", "normalizers"),
    ("backbones", "upsamplers", "data"),
    ("model",),
    ("builder",),
    ("published", "testing"),
    ("training", "evaluation", "bench", "extraction"),
    ("visualization",),
    ("configs", "validation", "implicit"),
    ("train",),
    ("cli",),
)
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

# Units that whoever wants only tensors in, tensors out imports with torch alone.
TORCH_ONLY = {"ops", "layers", "normalizers", "backbones"}

# The only modules that import an optional package when they are imported themselves. In turn, others import these
# inside functions only.
OWNERS = {
    "train.py": {"hydra", "omegaconf"},
    "ops/local_attention/triton_kernel.py": {"triton"},
}


class Import(NamedTuple):
    line: int
    target: str  # dotted; for `from a import b` it is a.b
    relative: bool
    at_import: bool  # runs when the module is imported: outside functions and TYPE_CHECKING blocks


def read_imports(path: Path) -> Iterator[Import]:
    """All imports of a source file, those inside functions too."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, False, at_import)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                target = f"{node.module}.{alias.name}" if node.module else alias.name
                yield Import(node.lineno, target, node.level > 0, at_import)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, at_import)
        else:
            inner = at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inner)

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), True)


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def unit_of(package: Path, path: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def layering_problems(package: Path) -> list[str]:
    """Relative imports, imports of a unit that is not below, and units that nobody has given a level."""
    problems = []
    for path in sources(package):
        unit = unit_of(package, path)
        if unit == "__init__":
            continue
        where = path.relative_to(package.parent).as_posix()
        if unit not in LEVEL_OF:
            problems.append(f"{where}: {unit} has no level; add it to LEVELS")
            continue
        for line, target, relative, _ in read_imports(path):
            parts = target.split(".")
            if relative:
                problems.append(f"{where}:{line}: relative import of {target}; write featsharp.{target}")
            if relative or parts[0] != "featsharp" or target == "featsharp.__version__":
                continue
            other = parts[1] if len(parts) > 1 else "featsharp"
            if other not in LEVEL_OF:
                problems.append(f"{where}:{line}: imports {target}, which is no unit below {unit}")
            elif other != unit and LEVEL_OF[other] >= LEVEL_OF[unit]:
                problems.append(f"{where}:{line}: {unit} imports {other}, which is not below it")
    return problems


def optional_import_problems(package: Path, hard: set[str]) -> list[str]:
    """Packages other than the ``hard`` dependencies that are imported as soon as a module of ours is."""
    problems = []
    owners = ["featsharp." + name.removesuffix(".py").replace("/", ".") for name in OWNERS]
    for path in sources(package):
        inside = path.relative_to(package).as_posix()
        allowed = {"torch"} if unit_of(package, path) in TORCH_ONLY else hard
        allowed = allowed | {"featsharp"} | OWNERS.get(inside, set())
        for line, target, relative, at_import in read_imports(path):
            name = target.split(".")[0]
            if at_import and any(f"{target}.".startswith(f"{owner}.") for owner in owners):
                name = target  # brings its optional package along
            if target.startswith("torch.utils.tensorboard"):  # torch's, but it imports the package tensorboard
                name = "tensorboard"
            if at_import and not relative and name not in allowed | sys.stdlib_module_names:
                problems.append(f"{package.name}/{inside}:{line}: imports {name} at once; import it where it is used")
    return problems


def shadowing_problems(package: Path, installed: set[str]) -> list[str]:
    """Names directly in the package that hide a known module.

    `torchrun featsharp/train.py` puts featsharp/ itself first on the path, so `featsharp/types.py` would be `types`.
    """
    units = {path.stem for path in package.iterdir() if path.suffix == ".py" or path.is_dir()}
    units -= {"__init__", "__main__", "__pycache__"}
    known = set(sys.stdlib_module_names) | installed
    return [f"{package.name}/{unit} hides the module {unit}" for unit in sorted(units & known)]


def hard_dependencies() -> set[str]:
    """Import names of the dependencies that every installation has."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in declared}
    return {{"pillow": "PIL"}.get(name, name) for name in names}


def installed_names() -> set[str]:
    return {name for name, owners in packages_distributions().items() if set(owners) != {"featsharp"}}


def test_imports_are_absolute_and_point_downward():
    assert layering_problems(PACKAGE) == []


def test_optional_packages_are_imported_when_used():
    assert optional_import_problems(PACKAGE, hard_dependencies()) == []


def test_no_name_hides_a_known_module():
    assert shadowing_problems(PACKAGE, installed_names()) == []


# The checkers themselves: each kind of violation is planted and found.


def plant(tmp_path: Path, files: dict[str, str]) -> Path:
    package = tmp_path / "featsharp"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "ops/warp.py",
            "import torch\nfrom featsharp.ops.resize import resize\nfrom featsharp.errors import InputError\n",
        ),
        ("backbones/timm.py", "from featsharp import registry\nfrom featsharp.layers import mlp\n"),
        ("model.py", "import featsharp.backbones.base\n"),
        ("builder.py", "from featsharp import __version__\nfrom featsharp.model import SharpEncoder\n"),
        ("cli/main.py", "def main():\n    from featsharp.train import run\n"),
        ("__init__.py", "from featsharp.builder import load_from_file\n"),
    ],
)
def test_layering_accepts_imports_from_below(tmp_path, name, text):
    assert layering_problems(plant(tmp_path, {name: text})) == []


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("ops/warp.py", "from featsharp.model import SharpEncoder\n", "ops imports model"),
        ("ops/warp.py", "import featsharp.backbones.base as base\n", "ops imports backbones"),
        ("ops/warp.py", "from featsharp import layers\n", "ops imports layers"),
        ("backbones/toy.py", "def f():\n    from featsharp.builder import g\n", "backbones imports builder"),
        ("upsamplers/tile.py", "from featsharp.backbones.base import Backbone\n", "upsamplers imports backbones"),
        ("normalizers/phi_s.py", "from featsharp.layers import mlp\n", "normalizers imports layers"),
        ("evaluation/fidelity.py", "from featsharp.training import losses\n", "evaluation imports training"),
        ("evaluation/task.py", "from featsharp.visualization import pca\n", "evaluation imports visualization"),
        ("model.py", "if TYPE_CHECKING:\n    from featsharp.builder import f\n", "model imports builder"),
        ("model.py", "from featsharp import load_from_file\n", "imports featsharp.load_from_file"),
        ("model.py", "import featsharp\n", "imports featsharp, which is no unit"),
        ("data/views.py", "from .sources import f\n", "relative import"),
        ("data/views.py", "from .. import ops\n", "relative import"),
        ("helpers.py", "", "helpers has no level"),
    ],
)
def test_layering_finds_planted_violations(tmp_path, name, text, found):
    (problem,) = layering_problems(plant(tmp_path, {name: text}))
    assert found in problem
    assert f"featsharp/{name}" in problem


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("backbones/hub.py", "def build():\n    import timm\n"),
        ("backbones/hub.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import timm\n"),
        ("data/images.py", "import numpy as np\nfrom PIL import Image\n"),
        ("train.py", "import hydra\nfrom omegaconf import OmegaConf\n"),
        ("cli/main.py", "from featsharp import training\n"),
    ],
)
def test_optional_imports_accepted(tmp_path, name, text):
    assert optional_import_problems(plant(tmp_path, {name: text}), hard_dependencies()) == []


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("backbones/hub.py", "import timm\n", "timm"),
        ("backbones/hub.py", "try:\n    from onnx import load\nexcept ImportError:\n    load = None\n", "onnx"),
        ("ops/resize.py", "import numpy as np\n", "numpy"),
        ("training/trainer.py", "from tqdm import tqdm\n", "tqdm"),
        ("training/loggers.py", "from torch.utils.tensorboard import SummaryWriter\n", "tensorboard"),
        ("training/trainer.py", "from omegaconf import OmegaConf\n", "omegaconf"),
        ("train.py", "import matplotlib.pyplot as plt\n", "matplotlib"),
        ("model.py", "class A:\n    import torchvision\n", "torchvision"),
        ("cli/main.py", "from featsharp import train\n", "featsharp.train"),
        ("cli/main.py", "from featsharp.train import main\n", "featsharp.train.main"),
    ],
)
def test_optional_imports_found(tmp_path, name, text, found):
    (problem,) = optional_import_problems(plant(tmp_path, {name: text}), hard_dependencies())
    assert f"imports {found} at once" in problem


def test_shadowing_is_found(tmp_path):
    package = plant(
        tmp_path, {"types.py": "", "timm/__init__.py": "", "einops.py": "", "model.py": "", "__init__.py": ""}
    )
    problems = shadowing_problems(package, {"timm", "einops"})
    assert [problem.split()[0] for problem in problems] == ["featsharp/einops", "featsharp/timm", "featsharp/types"]


def test_installed_names_are_import_names():
    assert {"torch", "PIL", "pytest"} <= installed_names()
    assert "featsharp" not in installed_names()
    assert hard_dependencies() == {"torch", "numpy", "PIL", "safetensors"}
