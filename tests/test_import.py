"""Importing featsharp is quick and starts nothing; its public names are those of its modules."""

import subprocess
import sys
from pathlib import Path

import pytest

import featsharp

ROOT = Path(__file__).resolve().parents[1]
# Prints which packages come with featsharp, beyond Python's own.
IMPORT = """
import sys, threading, time
before = set(sys.modules)
import featsharp
seconds = time.process_time()
print(*{name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))
assert threading.active_count() == 1
assert seconds < 2, seconds
"""


def test_import_starts_nothing_and_takes_under_two_seconds(clean_environment):
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["featsharp"], "")


# Prints what else comes with the modules that use optional packages.
LIGHT = """
import sys
import featsharp.backbones
print({"timm", "onnx", "torchvision", "transformers", "PIL"} & set(sys.modules))
import featsharp.training.loggers
print({"wandb", "tensorboard", "omegaconf"} & set(sys.modules))
"""


def test_backbones_and_writers_import_no_library_before_it_is_used():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


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
