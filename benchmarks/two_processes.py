"""Run trainings in two processes again and again and count failures.

    nice python benchmarks/two_processes.py --runs 200 --output benchmarks/results/two-processes.md

A run is the training of ``test_two_processes_equal_one_with_twice_the_batch`` in two processes that talk through gloo:
a linear fit, three steps, checkpoint and validation. A server that has imported everything forks the processes, so that
most of a run is the group: joining, talking, leaving. ``--start torchrun`` starts them as users do, which takes longer;
with ``--start bare`` they join, gather a number, the first one waits a little, and they leave: thousands of runs.
Each run is noted in a file beside the output, and the same command goes on after the last one. The aborts that are
looked for are those of gloo's threads (SIGABRT; pytorch issue 188266), which need a busy machine: ``--busy`` adds load.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from faults import photos

from featsharp.bench.measure import describe_machine
from featsharp.train import main as train
from featsharp.training.distributed import gather_objects, start_world, stop_world

SETTINGS = [
    *("+model=toy-vit", "+upsampler=featsharp-2x", "batch_size=1", "num_workers=0", "num_training_steps=3"),
    *("normalizer=phi-s-onlyalpha", "normalizer.num_samples=8", "normalizer.batch_size=4", "linear_fit.samples=4"),
    *("viz.type=none", "viz.num_images=1", "progress=false", "model.dtype=float32", "upsampler.dtype=float32"),
]
PROCESSES = 2
STARTS = {"fork": "a fork server", "torchrun": "torchrun", "bare": "a fork server, joining and leaving only"}
# Seconds after which a run hangs.
LIMIT = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--busy", type=int, default=0, help="processes that only keep the processors busy")
    parser.add_argument("--start", choices=STARTS, default="fork", help="how the processes start, and what they do")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    noted = arguments.output.with_suffix(".jsonl")
    runs = [json.loads(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    with tempfile.TemporaryDirectory() as folder, busy(arguments.busy):
        data = photos(Path(folder, "photos"), count=4)
        while sum(run["start"] == arguments.start for run in runs) < arguments.runs:
            one = run(Path(folder, "run"), data, arguments.start)
            runs.append(one)
            with noted.open("a") as file:
                file.write(json.dumps(one) + "\n")
            print(len(runs), one["start"], one["status"], f"{one['seconds']:.1f} s", one["log"][-300:], flush=True)
    arguments.output.write_text(report(runs))
    return 1 if any(any(run["status"]) for run in runs) else 0


def run(folder: Path, data: Path, how: str) -> dict[str, Any]:
    """Run one training; returns status of each process (negative: a signal), seconds, load, and the log on failure."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [*SETTINGS, f"train_data_dir={data}", f"output_root={folder / 'out'}"]
    start = time.perf_counter()
    status = started_by_torchrun(folder, command) if how == "torchrun" else forked(folder, command, how)
    if not any(status) and how != "bare" and not (folder / "out" / "last.pth").exists():
        status = [1]
    logs = "\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("log*")))
    return {
        "status": status,
        "start": how,
        "seconds": round(time.perf_counter() - start, 2),
        "load": round(os.getloadavg()[0], 1),
        "log": logs if any(status) else "",
    }


def forked(folder: Path, command: list[str], how: str) -> list[int]:
    """Fork the processes, with the store in this process, as under torchrun; returns their exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "featsharp.train"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = [
        context.Process(target=join, args=(rank, store.port, str(folder), command, how)) for rank in range(PROCESSES)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode or 0 for process in started]


def join(rank: int, port: int, folder: str, command: list[str], how: str) -> None:
    """Run one of the processes with the environment that torchrun gives it."""
    with open(Path(folder, f"log{rank}"), "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "FEATSHARP_CACHE": str(Path(folder, "cache")),
    }
    torch.set_num_threads(1)
    if how == "bare":
        world = start_world("cpu", LIMIT)
        gather_objects(rank, world)
        time.sleep(0.02 * (rank == 0))  # as the main process validates when the other one leaves
        stop_world()
        sys.exit(0)
    sys.exit(train(command))


def started_by_torchrun(folder: Path, command: list[str]) -> list[int]:
    """Start the processes as users do; returns the one status of them all."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={PROCESSES}", "--standalone", "-m", "featsharp.train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FEATSHARP_CACHE": str(folder / "cache")}
    with (folder / "log").open("w") as log, contextlib.suppress(subprocess.TimeoutExpired):
        return [
            subprocess.run(
                [sys.executable, *launcher, *command], stdout=log, stderr=log, env=environment, timeout=LIMIT
            ).returncode
        ]
    return [-signal.SIGKILL]


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep ``count`` processors busy within this context."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()


def report(runs: list[dict[str, Any]]) -> str:
    """A page on all runs that were noted."""
    machine = describe_machine(torch.device("cpu"))
    lines = [
        "# Trainings in two processes",
        "",
        "Made by `benchmarks/two_processes.py`, which describes a run. The bound is the largest rate of failure",
        "that would still give so few with 5 % probability (without failures 3 / runs, the rule of three).",
        "",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}.",
        "",
        "| started by | runs | failed | signals | bound | seconds a run | load of the machine |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for how, name in STARTS.items():
        some = [run for run in runs if run["start"] == how]
        if not some:
            continue
        failed = [run for run in some if any(run["status"])]
        signals = sorted({signal.Signals(-code).name for run in failed for code in run["status"] if code < 0})
        seconds = sorted(run["seconds"] for run in some)
        load = sorted(run["load"] for run in some)
        lines.append(
            f"| {name} | {len(some)} | {len(failed)} | "
            f"{', '.join(signals) or 'none'} | {upper_bound(len(failed), len(some)):.1%} | "
            f"{seconds[len(seconds) // 2]:.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f}) | {load[0]} to {load[-1]} |"
        )
    return "\n".join(lines) + "\n"


def upper_bound(failed: int, runs: int) -> float:
    """The one-sided 95 % bound of Clopper and Pearson."""
    from scipy.stats import beta

    return float(beta.ppf(0.95, failed + 1, runs - failed)) if failed < runs else 1.0


if __name__ == "__main__":
    sys.exit(main())
