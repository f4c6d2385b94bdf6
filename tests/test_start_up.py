"""Commands start at once: help and messages about missing files come before anything large is imported."""

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest

from featsharp.cli import fit
from featsharp.cli.eval import STALE, TASKS, collect_flags, read_flags
from featsharp.cli.figure import FIGURES
from featsharp.cli.main import COMMANDS
from featsharp.implicit import FitConfig

# Imported by no command before it has something to do.
LARGE = ("torch", "numpy", "PIL", "timm", "torchvision", "hydra", "omegaconf", "matplotlib", "transformers", "tqdm")

# Runs commands one after the other: the status of each, its CPU seconds, the large packages that it left imported.
RUN_ALL = f"""
import json, sys, time
from featsharp.cli.main import main

results = []
for arguments in json.loads(sys.argv[1]):
    start = time.process_time()
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    large = [name for name in {LARGE!r} if name in sys.modules]
    results.append([status, time.process_time() - start, large])
print("\\n" + json.dumps({{"results": results, "total": time.process_time()}}))
"""


def run_all(commands: list[list[str]]) -> tuple[list[tuple[int, float, list[str]]], float, str]:
    """Results of all commands, the CPU seconds of their one process from its start, and what they printed."""
    done = subprocess.run([sys.executable, "-c", RUN_ALL, json.dumps(commands)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    content = json.loads(last)
    return content["results"], content["total"], "\n".join(printed) + done.stderr


@pytest.mark.parametrize(
    "names",
    [[*COMMANDS, *(f"figure {name}" for name in FIGURES)], [f"eval {name}" for name in TASKS]],
    ids=["commands", "tasks"],
)
def test_help_imports_nothing_large_and_takes_under_half_a_second(names):
    commands = [["--help"], ["train"], *([*name.split(), "--help"] for name in names)]
    for _ in range(3):  # on a busy machine CPU time grows, too
        results, total, printed = run_all(commands)
        if total < 0.5:
            break
    assert [(command, status, large) for command, (status, _, large) in zip(commands, results, strict=True)] == [
        (command, 0, []) for command in commands
    ]
    assert total < 0.5
    for name in names:
        assert f"usage: featsharp {name}" in printed
    assert "python -m featsharp.train +model=" in printed  # the help of the module, also shown without arguments


def test_missing_files_are_noticed_before_anything_large_is_imported(tmp_path):
    photo = tmp_path / "photo.jpg"
    photo.touch()
    commands = [
        ["upsample", "none.jpg"],
        ["upsample", str(photo), "--checkpoint", "none.pth"],
        ["fit", "none.jpg", "--backbone", "toy-vit", "-o", "out"],
        ["export", "none.pth", "-o", "out.safetensors"],
        ["pack", "none", "out"],
        ["figure", "pca", "none.jpg", "-o", "out.png"],
        ["figure", "pca", str(photo), "--checkpoint", "mine=none.pth", "-o", "out.png"],
        ["figure", "miou", "none.json", "-o", "out.png"],
    ]
    *results, listing = run_all([*commands, ["ls", "backbones"]])[0]
    assert [(command, status, large) for command, (status, _, large) in zip(commands, results, strict=True)] == [
        (command, 1, []) for command in commands
    ]
    # Nor does a look at which weights are on this machine need the libraries of their models.
    assert (listing[0], set(listing[2]) & {"timm", "torchvision", "transformers"}) == (0, set())


def test_flags_of_tasks_are_their_settings():
    assert read_flags() == json.loads(json.dumps(collect_flags())), STALE


def test_defaults_of_fit_are_those_of_its_configuration():
    """Its help names them without importing their module."""
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    given = vars(parser.parse_args(["photo.jpg", "--backbone", "toy-vit", "-o", "out"]))
    names = given.keys() & {field.name for field in dataclasses.fields(FitConfig)}
    assert len(names) == 7
    assert {name: given[name] for name in names} == {name: getattr(FitConfig(), name) for name in names}
