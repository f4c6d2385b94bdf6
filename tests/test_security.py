"""Files from anywhere run no code here, and a configuration imports code through its documented keys only."""

import ast
import dataclasses
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.builder import load_from_file
from featsharp.configs.compose import compose
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.train import main
from featsharp.training.config import flatten

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "featsharp"
# Keys whose value may name a function of the user's: see the comments of base_config.yaml and docs/training-data.md.
MAY_IMPORT = {"data.filter", "upsampler.options", "viz.type"}


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


# Unpickling


def risky_calls(source: str) -> list[str]:
    """Calls that can run code from a file: unpickling in all its forms, and running text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unpickles = (
            (name.endswith("torch.load") and arguments.get("weights_only") != "True")
            or name.startswith(("pickle.load", "pickle.Unpickler", "joblib.", "dill.", "shelve.", "marshal."))
            or arguments.get("allow_pickle", "False") != "False"
            or last in ("read_pickle", "load_state_dict_from_url")
        )
        if unpickles or name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if (
            last == "extractall"
            or name in ("tar.extract", "zip.extract", "archive.extract")
            or arguments.get("shell") == "True"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(p)",
        "torch.load(p, weights_only=False)",
        "pickle.loads(b)",
        "np.load(p, allow_pickle=True)",
        "tar.extractall('.')",
        "eval(text)",
        "subprocess.run(c, shell=True)",
        "yaml.load(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(source):
    assert len(risky_calls(source)) >= 1


def test_the_search_lets_safe_forms_pass():
    safe = "torch.load(p, weights_only=True); np.load(p, allow_pickle=False); np.load(p); yaml.safe_load(t); x.eval()"
    assert risky_calls(safe) == []


def test_nothing_in_the_package_unpickles_or_runs_what_it_reads():
    found = {
        path.relative_to(PACKAGE).as_posix(): risky
        for path in sorted(PACKAGE.rglob("*.py"))
        if (risky := risky_calls(path.read_text(encoding="utf-8")))
    }
    # The one command that is run is the user's own: pipe: entries of the data settings.
    assert list(found) == ["data/_fetch.py"]
    (line,) = found["data/_fetch.py"]
    assert "subprocess.Popen(command, shell=True" in line


# Malicious files


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


def arguments(photos: Path) -> list[str]:
    small = ["batch_size=1", "num_workers=0", "num_training_steps=1", "normalizer.num_samples=2", "viz.num_images=1"]
    return ["+model=toy-vit", "+upsampler=featup-2x", f"train_data_dir={photos}", *small, "progress=false"]


def test_a_malicious_checkpoint_is_refused_where_users_meet_it(photos, tmp_path, capsys):
    """By loading, and by a run that would resume from it."""
    trace = tmp_path / "trace"
    evil = {"format": "featsharp", "version": 1, "encoder": {}, "model": {"w": Trap(trace)}, "config": None}
    last = tmp_path / "outputs" / "toy-vit" / "64" / "last.pth"
    last.parent.mkdir(parents=True)
    torch.save(evil, last)
    with pytest.raises(FeatSharpError, match="could run code"):
        load_from_file(last)
    assert main(arguments(photos)) == 1
    assert "could run code" in capsys.readouterr().err
    assert not trace.exists()


def test_a_malicious_cache_is_not_opened(photos, tmp_path):
    """Every file of the cache folders of a run is replaced by a pickle; the run computes them anew or refuses."""
    trace = tmp_path / "trace"
    options = ["feature_cache.samples=2", f"feature_cache.folder={tmp_path / 'features'}", "viz.type=none"]
    assert main([*arguments(photos), *options, "output_base=first"]) == 0
    replaced = [path for folder in ("cache", "features") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {path.relative_to(tmp_path).parts[0] for path in replaced} == {"cache", "features"}
    for write in (lambda path: torch.save(Trap(trace), path), lambda path: path.write_bytes(pickle.dumps(Trap(trace)))):
        for path in replaced:
            write(path)
        main([*arguments(photos), *options, "output_base=second"])
        assert not trace.exists()


# Configuration


def test_keys_that_hydra_and_others_give_a_meaning_do_not_exist():
    base = ["+model=toy-vit", "+upsampler=bilinear-2x", "train_data_dir=x"]
    for key in ("_target_", "+_target_", "model._target_", "+model._target_", "hydra.searchpath", "+hydra.callbacks.x"):
        with pytest.raises(ConfigError, match="unknown configuration key"):
            compose([*base, f"{key}=os.system"])
    for key in ("hydra/launcher", "hydra/job_logging", "~hydra"):
        with pytest.raises(ConfigError):
            compose([*base, f"{key}=evil"])


def text_keys() -> list[str]:
    """All keys of a run whose value is text or may be anything."""
    config = compose(["+model=toy-vit", "+upsampler=featup-2x", "train_data_dir=x"])
    values = flatten(dataclasses.asdict(config))
    return sorted(key for key, value in values.items() if value is None or isinstance(value, str))


@pytest.fixture
def evil_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module ``evil_module`` that could be imported, and the folder that it makes when it is."""
    trace = tmp_path / "imported"
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(trace)!r})\ndef run(*args): return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield trace
    sys.modules.pop("evil_module", None)


QUICK_KEYS = ("output_root", "viz.project")  # a folder and a name


@pytest.mark.parametrize(
    "key",
    [
        key if key in QUICK_KEYS else pytest.param(key, marks=pytest.mark.slow)
        for key in sorted(set(text_keys()) - MAY_IMPORT)
    ],
)
def test_other_keys_import_nothing(key, photos, evil_module):
    """Refused, or taken for a name or a folder."""
    for value in ("evil_module:run", "evil_module.run"):
        main([*arguments(photos), "viz.type=none", f"{key}={value}"])
        assert not evil_module.exists()


def test_options_of_an_upsampler_that_takes_no_function_import_nothing(photos, evil_module):
    for option in ("_target_", "function", "enlarge"):
        assert main([*arguments(photos), f"upsampler.options.{option}='evil_module:run'"]) == 1
        assert not evil_module.exists()


def test_the_documented_key_does_import(photos, evil_module):
    """Without which the tests above would prove nothing."""
    assert main([*arguments(photos), "viz.type=none", "data.filter='evil_module:run'"]) == 0
    assert evil_module.exists()
