"""A training that is killed again and again ends as if nothing had happened; benchmarks/faults.py does the killing."""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from featsharp.checkpoint import read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks are not part of this copy")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # processes that are started find it there, too
    return importlib.import_module("faults")


MANY = [pytest.mark.full, pytest.mark.timeout(1500)]


@pytest.mark.parametrize(
    ("kills", "streams"),
    [
        pytest.param(2, False, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=MANY) for case in ((50, False), (20, True))),
    ],
)
def test_a_killed_training_ends_with_the_very_checkpoints_of_an_undisturbed_one(faults, tmp_path, kills, streams):
    """Model, optimiser, best score, place in streams and best checkpoint, bit for bit, and no file is left behind."""
    series = faults.kill_series(tmp_path, kills, streams=streams)
    assert sum(series.moments.values()) == kills
    assert series.different == []
    assert series.leftovers == []


def test_the_comparison_finds_a_single_bit(faults):
    a, b = ({"x": [torch.ones(3)], "y": {"z": 1.0}} for _ in range(2))
    assert list(faults.differences(a, b)) == []
    b["x"][0][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    b["y"]["w"] = 2
    assert list(faults.differences(a, b)) == ["x.0", "y.w"]


SOME = ("a tar that was cut short", "a full disk", "another configuration", "a flipped bit in the checkpoint")


@pytest.mark.parametrize(
    "chosen", [pytest.param(SOME, marks=pytest.mark.slow, id="some"), pytest.param(None, marks=MANY, id="all")]
)
def test_faults_of_files_and_disks(faults, tmp_path, chosen):
    outcomes = {}
    for number, case in enumerate(faults.CASES):
        if chosen is None or case.fault in chosen:
            (tmp_path / str(number)).mkdir()
            outcomes[case.fault] = case.check(tmp_path / str(number))
    assert len(outcomes) == len(chosen or faults.CASES)
    assert {fault: wrong for fault, wrong in outcomes.items() if wrong} == {}


# SIGTERM and failing processes


def start(folder: Path, *overrides: str, processes: int = 1) -> subprocess.Popen[str]:
    """The command of a training below ``folder``, under torchrun if there are several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone", "featsharp/train.py"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m", "featsharp.train"])]
    settings = [
        *("+model=toy-vit", "+upsampler=featup-2x", "batch_size=1", "accumulation_steps=2", "num_workers=1"),
        *("normalizer.num_samples=8", "normalizer.batch_size=4", "viz.type=none", "viz.num_images=1"),
        *("progress=false", "val_frequency=0", "checkpoint_frequency=0"),
    ]
    if not any(override.startswith("train_data_dir=") for override in overrides):
        settings.append(f"train_data_dir={folder / 'photos'}")
    return subprocess.Popen(
        [*command, *settings, *overrides],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FEATSHARP_CACHE": str(folder / "cache")},
    )


def finish(process: subprocess.Popen[str]) -> str:
    """What a process printed until its end."""
    return process.communicate(timeout=240)[1]  # less than pytest's; two that import torch on a busy machine take long


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_and_the_run_goes_on_from_there(faults, tmp_path, processes):
    faults.photos(tmp_path / "photos")
    steps = ("num_training_steps=120", "checkpoint_frequency=10")
    process = start(tmp_path, *steps, f"output_root={tmp_path / 'stopped'}", processes=processes)
    last = tmp_path / "stopped" / "last.pth"
    wait_for(last, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    step = read_checkpoint(last)["training"]["step"]
    assert 0 < step < 120
    assert said.count(f"stopped by SIGTERM after step {step}, which is saved") == processes
    if processes == 1:
        assert process.returncode == 143
        assert "Traceback" not in said
    again = start(tmp_path, *steps, f"output_root={tmp_path / 'stopped'}", processes=processes)
    assert f"at step {step}" in finish(again)
    assert again.returncode == 0
    whole = start(tmp_path, *steps, f"output_root={tmp_path / 'whole'}", processes=processes)
    finish(whole)
    a, b = (read_checkpoint(tmp_path / name / "last.pth") for name in ("whole", "stopped"))
    assert list(faults.differences(a["model"], b["model"])) == []
    assert list(faults.differences(a["training"], b["training"])) == []


NOTING = """
import multiprocessing, os

def note(image, name):
    if "many.tar" in name and multiprocessing.parent_process() is not None:
        with open(f"{os.environ['NOTES']}/{os.environ['RANK']}-{os.getpid()}", "a") as file:
            print(name.rpartition("/")[2], file=file)
    return True
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_shard_serves_two_processes_of_two_workers_with_different_images(faults, tmp_path, monkeypatch):
    """Fewer shards than ranks, and than readers: nobody waits, and together they take each image once."""
    photos = faults.photos(tmp_path / "photos")
    names = [f"{number:02d}.png" for number in range(24)]
    faults.tar_of(tmp_path / "many.tar", {name: faults.picture(number) for number, name in enumerate(names)})
    (tmp_path / "noting.py").write_text(NOTING)
    (tmp_path / "notes").mkdir()
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    data = f"train_data_dir='pipe:cat {tmp_path}/many.tar'"
    others = (f"{key}={photos}" for key in ("val_data_dir", "dist_train_data_dir"))
    settings = ("num_workers=2", "num_training_steps=6", "data.filter=noting:note", f"output_root={tmp_path / 'out'}")
    process = start(tmp_path, *settings, data, *others, processes=2)
    said = finish(process)
    assert process.returncode == 0, said
    notes = sorted((tmp_path / "notes").iterdir())
    assert [path.name[0] for path in notes] == ["0", "0", "1", "1"]
    # Two batches of one image per step and process, half of them by each worker; what follows was read ahead.
    used = [name for path in notes for name in path.read_text().split()[:6]]
    assert sorted(used) == names


# An upsampler that fails in the fifth call of the second process.
FAILING = """
import os
import re
import torch.nn.functional as F
from featsharp.errors import InputError

calls = 0

def upsample(image, features, size):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 5:
        raise {error}
    return F.interpolate(features, size)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "said"),
    [
        ('RuntimeError("its device is broken")', "RuntimeError: its device is broken"),
        ('InputError("its image is too small")', "featsharp train: process 1 of 2: its image is too small"),
    ],
)
def test_a_step_that_fails_in_one_process_ends_the_training_with_its_error(faults, tmp_path, monkeypatch, error, said):
    """Workers and an unfinished collective of the other process do not hold it up."""
    faults.photos(tmp_path / "photos")
    (tmp_path / "failing.py").write_text(FAILING.format(error=error))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    options = ["upsampler.name=custom", "upsampler.options.function=failing:upsample", "bias_buffer=true"]
    process = start(tmp_path, f"output_root={tmp_path / 'out'}", *options, processes=2)
    log = finish(process)  # an unfinished collective would wait for half an hour
    assert process.returncode != 0
    assert said in log
    if "InputError" in error:
        assert "process 0 of 2: lost another process of this run" in log or re.search(r"exitcode *: -15", log)
    assert not (tmp_path / "out" / "last.pth").exists()
