"""Malformed inputs end in an error of ours, within time and memory; benchmarks/bad_inputs.py tries them."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks are not part of this copy")


@pytest.fixture
def bad_inputs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bad_inputs")


def run(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bad_inputs.py"), "--output", str(output), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_hundred_bad_inputs(tmp_path):
    done = run(tmp_path / "result.json", "--count", "300")
    assert (tmp_path / "result.json").exists(), done.stderr
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["failures"] == []
    assert {name: row["tried"] for name, row in content["kinds"].items()} == dict.fromkeys(content["kinds"], 50)
    assert all(row["past_header"] >= 0.3 for row in content["kinds"].values())
    assert all(row["refused"] + row["processed"] == 50 for row in content["kinds"].values())
    assert done.returncode == 0


@pytest.mark.slow
def test_what_should_not_happen_is_noticed(bad_inputs, tmp_path, monkeypatch):
    """Every outcome that is no goal, by an attempt that has it."""
    kinds = importlib.import_module("malformed.kinds")

    def take_memory() -> None:
        held = []
        while True:
            held.append(bytearray(b"1") * (64 << 20))

    def spin() -> None:
        while True:
            pass

    attempts = {
        "crashed": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "crashed ": lambda: {}["raw"],
        "hung": spin,
        "over memory": take_memory,
        "processed": lambda: Path("photos/1.png").write_bytes(b"damaged"),
        "processed ": lambda: kinds.check_same(tmp_path),
        "refused": lambda: kinds.read_checkpoint("missing.pth"),
    }
    (tmp_path / "neighbour").write_bytes(b"not there")
    monkeypatch.setattr(bad_inputs, "SECONDS", 2)
    monkeypatch.setattr(bad_inputs, "MEMORY", 256 << 20)
    for number, (expected, act) in enumerate(attempts.items()):

        class Staged(kinds.Kind):
            def make(self, draw: Random) -> None:
                self.change = "staged"

            def parses(self) -> bool:
                return True

            def attempt(self, act=act) -> tuple[str, str]:
                act()
                return "processed", ""

        base = bad_inputs.Base(tmp_path / f"base-{number}", Staged)
        one = bad_inputs.try_input(base, "staged", 0, 0, tmp_path / f"scratch-{number}", None)
        assert one.outcome == expected.strip(), one
        assert bool(one.damage) == expected.startswith("processed"), one
        assert bad_inputs.failed(one) == (expected != "refused")
        assert one.header


def test_an_input_follows_from_seed_kind_and_number(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    files, commands = importlib.import_module("malformed.files"), importlib.import_module("malformed.commands")
    for make in (files.picture, files.tar, commands.command, commands.configuration):
        made = [make(Random(f"{seed} 7")) for seed in (0, 0, 1)]
        assert made[0] == made[1] != made[2]
