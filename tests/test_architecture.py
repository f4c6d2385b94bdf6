"""The house rules, read from the syntax tree: imports point downward, siblings keep apart, there are no back doors."""

import ast
import functools
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.no_cover  # reads the package without running it

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
    ("card",),
    ("builder",),
    ("published", "testing", "extraction", "export"),
    ("training", "evaluation", "bench"),
    ("implicit",),
    ("visualization",),
    ("configs", "validation", "adapt"),
    ("train", "distill"),
    ("cli",),
)
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

# Units that whoever wants only tensors in, tensors out imports with torch alone.
TORCH_ONLY = {"ops", "layers", "normalizers", "backbones"}

# The only modules that import an optional package when they are imported themselves. In turn, others import these
# inside functions only.
OWNERS = {
    "ops/local_attention/triton_kernel.py": {"triton"},
}


class Import(NamedTuple):
    line: int
    target: str  # dotted; for `from a import b` it is a.b
    relative: bool
    at_import: bool  # runs when the module is imported: outside functions and TYPE_CHECKING blocks


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


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

    yield from walk(parse(path), True)


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def unit_of(package: Path, path: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def layering_problems(package: Path) -> list[str]:
    """Relative imports, imports of a unit that is not below, and units that nobody has given a level."""
    problems = []
    for path in sources(package):
        unit = unit_of(package, path)
        if unit in ("__init__", "__main__"):
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


# Modules of upsamplers/ that the methods may import; all else there is a method, and methods are siblings.
UPSAMPLER_BASES = {"base", "chunked", "registration"}

MOST_LINES = 500  # of a module
MOST_REPLACEMENTS = 25  # of things in place, by all tests together
PATCHERS = ("setattr", "setitem", "delattr", "delitem", "patch", "object")
PATCHES = re.compile(r"monkeypatch\.\w+|(unittest\.)?mock\.patch|patch\.object")
MODULE_MAKERS = ("import_module", "module_from_spec", "importorskip")

# Words that no docstring opens with, as they make a riddle of it; a verb or a noun of the field is what to write.
OPENINGS = re.compile(r"(What|Whose|Told|Found|Which|Where|How|Whether)\b")


def sibling_problems(package: Path) -> list[str]:
    """Upsamplers that import another one instead of a layer, an op or the registry."""
    problems = []
    for path in sorted((package / "upsamplers").glob("*.py")):
        if path.stem == "__init__":
            continue
        for line, target, _, _ in read_imports(path):
            parts = target.split(".")
            if parts[:2] == ["featsharp", "upsamplers"] and len(parts) > 2 and parts[2] not in UPSAMPLER_BASES:
                problems.append(f"upsamplers/{path.name}:{line}: imports its sibling {parts[2]}")
    return problems


def back_door_problems(package: Path) -> list[str]:
    """Signatures that are inspected, methods replaced or kept, functions kept to be swapped, silenced assignments."""
    trees = {path: parse(path) for path in sources(package)}
    methods = method_names(trees.values())
    all_functions = set().union(*map(own_functions, trees.values()))
    problems = []
    for path, tree in trees.items():
        where = path.relative_to(package).as_posix()
        functions = own_functions(tree) | {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("featsharp.")
            for alias in node.names
            if alias.name in all_functions
        }
        for node in ast.walk(tree):
            if inspects_signature(node):
                problems.append(f"{where}:{node.lineno}: inspects a signature")
            for target in assigned(node):
                if target.attr in methods:
                    problems.append(f"{where}:{target.lineno}: replaces the method {ast.unparse(target)}")
                elif (name := passed_method(node.value, methods)) is not None:
                    problems.append(f"{where}:{target.lineno}: keeps the method {name} in {ast.unparse(target)}")
                elif getattr(node.value, "id", None) in functions:
                    problems.append(
                        f"{where}:{target.lineno}: keeps a function in {ast.unparse(target)}, to be swapped"
                    )
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setattr" and len(node.args) == 3:
                name = getattr(node.args[1], "value", None)
                if name in methods:
                    problems.append(f"{where}:{node.lineno}: replaces the method {name}")
        problems += [f"{where}:{line}: silences {text}" for line, text in comments(path) if "method-assign" in text]
    return problems


def own_functions(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def method_names(trees: Iterable[ast.Module]) -> set[str]:
    """Names of methods that no other class uses for an attribute."""
    methods, attributes = {"forward", "train", "eval"}, set()
    for tree in trees:
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            own = {part.name for part in node.body if is_method(part)}
            fields = {part.name for part in node.body if isinstance(part, ast.FunctionDef)} - own
            for part in node.body:
                fields |= {target.id for target in getattr(part, "targets", []) if isinstance(target, ast.Name)}
                fields |= {part.target.id} if isinstance(part, ast.AnnAssign) else set()
            for part in ast.walk(node):
                fields |= {target.attr for target in assigned(part) if getattr(target.value, "id", "") == "self"}
            methods |= own
            attributes |= fields - own
    return methods - attributes


def inspects_signature(node: ast.AST) -> bool:
    names = {"signature", "getfullargspec"}
    if isinstance(node, ast.ImportFrom):
        return node.module == "inspect" and any(alias.name in names for alias in node.names)
    return isinstance(node, ast.Attribute) and node.attr in names and getattr(node.value, "id", "") == "inspect"


def is_method(node: ast.AST) -> bool:
    """Whether a part of a class is a method that is called as one: properties are set like attributes."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return not any(text == "property" or text.endswith((".setter", "cached_property")) for text in decorators)


def assigned(node: ast.AST) -> list[ast.Attribute]:
    """The attributes that a statement assigns a value to."""
    if isinstance(node, ast.Assign):
        targets = [part for target in node.targets for part in getattr(target, "elts", [target])]
    else:
        targets = [node.target] if isinstance(node, ast.AnnAssign) and node.value is not None else []
    return [target for target in targets if isinstance(target, ast.Attribute)]


def passed_method(value: ast.AST, methods: set[str]) -> str | None:
    """The first method of another object that is an argument of a call, as in ``wrap(module.forward)``."""
    for call in ast.walk(value):
        for argument in [*call.args, *(k.value for k in call.keywords)] if isinstance(call, ast.Call) else ():
            is_method = isinstance(argument, ast.Attribute) and argument.attr in methods
            if is_method and ast.unparse(argument) != f"self.{argument.attr}":  # which may be called back
                return ast.unparse(argument)
    return None


def comments(path: Path) -> list[tuple[int, str]]:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    return [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def concrete_upsampler_problems(package: Path) -> list[str]:
    """Classes of upsamplers that training names: it talks to them through their contract."""
    concrete = set()
    for path in sorted((package / "upsamplers").glob("*.py")):
        for node in ast.walk(parse(path)):
            decorators = getattr(node, "decorator_list", [])
            if isinstance(node, ast.ClassDef) and any("register_upsampler" in ast.unparse(d) for d in decorators):
                concrete.add(node.name)
    problems = []
    for path in [*sorted((package / "training").rglob("*.py")), package / "train.py"]:
        for node in ast.walk(parse(path)) if path.exists() else ():
            name = getattr(node, "id", getattr(node, "attr", None))
            if isinstance(node, ast.Name | ast.Attribute) and name in concrete:
                problems.append(f"{path.relative_to(package).as_posix()}:{node.lineno}: knows the upsampler {name}")
    return problems


def replacements(path: Path, methods: set[str]) -> list[int]:
    """Lines of a test that replace something in place: by monkeypatch or mock, in a module, or a method of ours."""
    nodes = list(ast.walk(parse(path)))
    modules = {alias.asname or alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        called = getattr(node, "value", None) if isinstance(node, ast.Assign) else None
        if isinstance(called, ast.Call) and getattr(called.func, "attr", "") in MODULE_MAKERS:
            modules |= {ast.unparse(target) for target in node.targets}
    lines = [n.lineno for n in nodes if getattr(n, "attr", "") in PATCHERS and PATCHES.fullmatch(ast.unparse(n))]
    for target in (target for node in nodes for target in assigned(node)):
        owner = ast.unparse(target.value)
        if owner in modules or (target.attr in methods and owner != "self"):
            lines.append(target.lineno)
    return lines


def docstring_problems(package: Path) -> list[str]:
    """Docstrings that open like a riddle."""
    problems = []
    for path in sources(package):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if OPENINGS.match(text):
                    line = getattr(node, "lineno", 1)
                    problems.append(f"{path.relative_to(package).as_posix()}:{line}: opens with {text.split()[0]}")
    return problems


def test_imports_are_absolute_and_point_downward():
    assert layering_problems(PACKAGE) == []


def test_contributing_shows_the_levels():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    start = block.index("the command featsharp")  # the column of explanations
    shown = [set(line[:start].split()) for line in block.splitlines()]
    assert shown == [set(units) for units in reversed(LEVELS)]


def test_optional_packages_are_imported_when_used():
    assert optional_import_problems(PACKAGE, hard_dependencies()) == []


def test_no_name_hides_a_known_module():
    assert shadowing_problems(PACKAGE, installed_names()) == []


def test_upsamplers_share_layers_and_ops_not_each_other():
    assert sibling_problems(PACKAGE) == []


def test_no_back_doors():
    assert back_door_problems(PACKAGE) == []


def test_training_knows_no_upsampler_by_its_class():
    assert concrete_upsampler_problems(PACKAGE) == []


def test_docstrings_do_not_open_with_a_question_word():
    assert docstring_problems(PACKAGE) == []


def test_no_module_is_longer_than_a_few_screens():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(PACKAGE)}
    assert [f"{path.relative_to(PACKAGE)}: {n} lines" for path, n in lengths.items() if n > MOST_LINES] == []
    assert lengths[PACKAGE / "train.py"] < 100


def test_tests_replace_little_in_place():
    methods = method_names(map(parse, sources(PACKAGE)))
    found = {path.relative_to(ROOT).as_posix(): replacements(path, methods) for path in sources(ROOT / "tests")}
    assert sum(map(len, found.values())) <= MOST_REPLACEMENTS, {path: lines for path, lines in found.items() if lines}


# The checkers themselves: each kind of violation is planted and found.

TRITON = "featsharp.ops.local_attention.triton_kernel"


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
        ("ops/local_attention/triton_kernel.py", "import triton\nimport triton.language as tl\n"),
        ("cli/main.py", "from featsharp import train\n"),
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
        ("training/trainer.py", "import matplotlib.pyplot as plt\n", "matplotlib"),
        ("train.py", "from omegaconf import OmegaConf\n", "omegaconf"),
        ("model.py", "class A:\n    import torchvision\n", "torchvision"),
        ("ops/resize.py", "from featsharp.ops.local_attention import triton_kernel\n", TRITON),
        ("ops/resize.py", f"from {TRITON} import forward\n", f"{TRITON}.forward"),
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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("from featsharp.upsamplers.tile import tile_map\n", "imports its sibling tile"),
        ("from featsharp.upsamplers import tile\n", "imports its sibling tile"),
        ("def f():\n    import featsharp.upsamplers.tile\n", "imports its sibling tile"),
    ],
)
def test_sibling_imports_are_found(tmp_path, text, problem):
    (message,) = sibling_problems(plant(tmp_path, {"upsamplers/s2.py": text}))
    assert problem in message


def test_bases_of_upsamplers_may_be_imported(tmp_path):
    text = "from featsharp.upsamplers.base import Upsampler\nfrom featsharp.upsamplers import registration\n"
    assert sibling_problems(plant(tmp_path, {"upsamplers/s2.py": text})) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("from inspect import signature\n", "inspects a signature"),
        ("import inspect\nx = inspect.signature(print)\n", "inspects a signature"),
        ("class A:\n    def extract(self): ...\ndef f(a, g):\n    a.extract = g\n", "replaces the method a.extract"),
        ("def f(module, g):\n    module.forward, x = g, 1\n", "replaces the method module.forward"),
        ("def f(module, g):\n    setattr(module, 'forward', g)\n", "replaces the method forward"),
        ("def g(): ...\nclass A:\n    def f(self):\n        self._call = g\n", "keeps a function in self._call"),
        (
            "from featsharp.ops import g\nclass A:\n    def f(self):\n        self._call = g\n",
            "keeps a function in self._call",
        ),
        (
            "class A:\n    def f(self, obj, g):\n        self.x = g(obj.forward)\n",
            "keeps the method obj.forward in self.x",
        ),
        (
            "class A:\n    def f(self, obj, g):\n        self.x: B = g(1, h(k=self.y.f))\n",
            "keeps the method self.y.f in self.x",
        ),
        ("x = 1  # type: ignore[method-assign]\n", "silences"),
    ],
)
def test_back_doors_are_found(tmp_path, text, problem):
    (message,) = back_door_problems(plant(tmp_path, {"model.py": text, "ops/__init__.py": "def g(): ...\n"}))
    assert problem in message


def test_properties_and_plain_attributes_are_no_back_doors(tmp_path):
    text = (
        "class A:\n    @property\n    def limit(self): ...\n    @limit.setter\n    def limit(self, x): ...\n"
        "def f(a):\n    a.limit = 1\n    a.name = 'x'\n"
    )
    assert back_door_problems(plant(tmp_path, {"model.py": text})) == []


def test_concrete_upsamplers_in_training_are_found(tmp_path):
    files = {
        "upsamplers/tile.py": "@register_upsampler('tile', 'tiles')\nclass Tile: ...\n",
        "training/trainer.py": "def f(x):\n    return isinstance(x, Tile)\n",
    }
    (message,) = concrete_upsampler_problems(plant(tmp_path, files))
    assert message == "training/trainer.py:2: knows the upsampler Tile"


@pytest.mark.parametrize("opening", ["What a backbone says.", "Whose place it is.", "Whether it is so."])
def test_riddles_are_found(tmp_path, opening):
    (message,) = docstring_problems(plant(tmp_path, {"model.py": f'def f():\n    """{opening}"""\n'}))
    assert "opens with" in message


@pytest.mark.parametrize(
    "line",
    [
        "monkeypatch.setattr(os, 'fsync', f)",
        "monkeypatch.delitem(sys.modules, 'x')",
        "mock.patch.object(os, 'fsync')",
        "os.fsync = f",
        "script.DATA = 'x'",
        "encoder.encode = f",
    ],
)
def test_replacements_are_found(tmp_path, line):
    text = f"import os\nscript = importlib.import_module('x')\nx.value = 1\n{line}\n"
    (tmp_path / "test_x.py").write_text(text)
    assert replacements(tmp_path / "test_x.py", {"encode"}) == [4]
