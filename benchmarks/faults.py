"""Test trainings against faults: being killed again and again, a full disk, damaged files and images.

    python benchmarks/faults.py --kills 50 --output benchmarks/results/faults.md

One training is killed with SIGKILL at random moments and started again with the same command each time; in the end its
checkpoints must equal those of a training that nobody disturbed, bit for bit. A second one, killed a fifth as often,
reads shards from commands, most of whose images are left out. Then follow the cases of `CASES`, a run of the
command each. Everything runs on the CPU with a toy backbone and pictures that are made here.
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from checkout import commit
from PIL import Image
from torch import Tensor

from featsharp.bench.measure import describe_machine
from featsharp.checkpoint import read_checkpoint
from featsharp.train import main as train

COMMON = [
    *("+model=toy-vit", "+upsampler=featsharp-linear-2x", "batch_size=2", "num_workers=0", "log_frequency=0"),
    *("normalizer.num_samples=8", "normalizer.batch_size=4", "viz.type=none", "viz.num_images=1", "progress=false"),
]
# All that has a memory or draws random numbers: a fit before the first step, stored features, dropout, the best score.
KILLED = [
    *("linear_fit.samples=12", "objective.downsampler=attention"),
    *("objective.uncertainty=true", "checkpoint_frequency=2", "val_frequency=7"),
]
CACHED = ["feature_cache.samples=40"]
# Readers that are ahead of the training, and use more images than it has samples.
STREAMED = ["num_workers=2", "data.shuffle_buffer=5", "data.min_size=100"]
SHORT = ["linear_fit.samples=0", "num_training_steps=2"]
BEFORE_FIRST, STARTING, WRITING, STEPPING = (
    "before the first checkpoint",
    "while it started again",
    "while a checkpoint was written",
    "between checkpoints",
)


class KillSeries(NamedTuple):
    """Outcome of one killed training."""

    moments: Counter[str]  # number of kills by moment
    steps: int
    different: list[str]  # keys of its checkpoints that differ from those of the undisturbed run
    leftovers: list[str]  # files that the undisturbed run does not have


class Case(NamedTuple):
    """A fault, the expected outcome, and a check that returns an empty text or the actual outcome."""

    fault: str
    expected: str
    check: Callable[[Path], str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    source, start = commit(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        series = [kill_series(Path(folder, "local"), arguments.kills, arguments.seed)]
        print(series[0], flush=True)
        series.append(kill_series(Path(folder, "streams"), max(1, arguments.kills // 5), arguments.seed, streams=True))
        print(series[1], flush=True)
    seconds = time.perf_counter() - start
    outcomes = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes.append(case.check(Path(folder)))
        print(f"{case.fault}: {outcomes[-1] or 'as expected'}", flush=True)
    arguments.output.write_text(report(series, seconds, outcomes, source))
    return 1 if any(one.different or one.leftovers for one in series) or any(outcomes) else 0


# The kill series


def kill_series(folder: Path, kills: int, seed: int = 0, *, streams: bool = False) -> KillSeries:
    """Train twice below ``folder``, once undisturbed and once killed ``kills`` times, and compare.

    The data are photos, read by no worker or one in turn, or ``streams`` beside them, read by two workers.
    Half of the kills come after a random time from the start of the process, the others after a random time from its
    first checkpoint on. The first tenth comes within the time to the first checkpoint: in the fits before it.
    """
    settings = [*KILLED, *(STREAMED if streams else CACHED), f"train_data_dir={photos(folder / 'photos')}"]
    if streams:
        command = shards(folder / "shards")
        settings[-1] = f"train_data_dir=[['{command}', 2], '{folder / 'photos'}']"
        settings += [f"{key}={folder / 'photos'}" for key in ("val_data_dir", "dist_train_data_dir")]
    steps = max(64, 8 * kills)  # enough that none ends before its kill, however the load of the machine changes
    whole, killed = (Life(folder, name, steps, settings) for name in ("whole", "killed"))
    whole.start("dry_run=true").join()  # imports all; how long the next ones take is what is measured
    start = time.perf_counter()
    process = whole.start()
    whole.wait_for_checkpoint(process)
    until_first = time.perf_counter() - start
    process.join()
    per_step = (time.perf_counter() - start - until_first) / steps
    if process.exitcode != 0:
        raise RuntimeError(f"the undisturbed training failed:\n{whole.log.read_text()}")

    draw = random.Random(seed)
    moments: Counter[str] = Counter()
    for number in range(kills):
        before = killed.last_change()
        process = killed.start(*([] if streams else [f"num_workers={number % 2}"]))
        if number <= kills // 10:
            time.sleep(draw.uniform(0, until_first))
        elif number % 2:
            time.sleep(draw.uniform(0, 1.3 * until_first))
        else:
            killed.wait_for_checkpoint(process)
            time.sleep(draw.uniform(0, 6 * per_step))
        process.kill()
        process.join()
        if process.exitcode != -9:
            raise RuntimeError(f"ended before kill {number + 1} with {process.exitcode}:\n{killed.log.read_text()}")
        moments[killed.moment(before)] += 1
    process = killed.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the last life failed:\n{killed.log.read_text()}")
    different = [
        f"{name}: {key}"
        for name in ("last.pth", "best.pth")
        for key in differences(whole.content(name), killed.content(name))
    ]
    leftovers = {path.name for path in killed.folder.iterdir()} - {path.name for path in whole.folder.iterdir()}
    return KillSeries(moments, steps, different, sorted(leftovers))


class Life:
    """The command of one training, to be started any number of times."""

    def __init__(self, folder: Path, name: str, steps: int, settings: list[str]) -> None:
        self.folder = folder / name
        self.last, self.log, self.cache = self.folder / "last.pth", folder / f"{name}.log", folder / f"{name}-cache"
        self.arguments = [
            *(*COMMON, *settings, f"num_training_steps={steps}"),
            *(f"output_root={self.folder}", f"feature_cache.folder={folder / name}-features"),
        ]

    def start(self, *overrides: str) -> BaseProcess:
        """Start it in a new process, forked at once by a server that has imported everything."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", "featsharp.train"])
        arguments = [*self.arguments, *overrides]
        process = context.Process(target=run_training, args=(arguments, str(self.log), str(self.cache)))
        process.start()
        return process

    def last_change(self) -> int:
        """Time of the last checkpoint in nanoseconds; 0: none was written."""
        return self.last.stat().st_mtime_ns if self.last.exists() else 0

    def wait_for_checkpoint(self, process: BaseProcess) -> None:
        """Wait until the process has written a checkpoint or ended."""
        before = self.last_change()
        while self.last_change() == before and process.is_alive():
            time.sleep(0.002)

    def moment(self, before: int) -> str:
        """Name the moment it was killed at, given the time of its last checkpoint ``before`` it was started."""
        if any(self.folder.glob(".*.pth.*.tmp")):
            return WRITING
        if self.last_change() == 0:
            return BEFORE_FIRST
        return STARTING if self.last_change() == before else STEPPING

    def content(self, name: str) -> dict[str, Any]:
        """Content of a checkpoint without paths and the number of workers."""
        content = read_checkpoint(self.folder / name)
        ignored = {"output_root", "num_workers", "feature_cache"}
        return {**content, "config": {k: v for k, v in content["config"].items() if k not in ignored}}


def run_training(arguments: list[str], log: str, cache: str) -> None:
    """Run the command in this process and append its output to ``log``."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["FEATSHARP_CACHE"] = cache
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # its workers, too, are there at once
    sys.exit(train(arguments))


def differences(a: object, b: object, name: str = "") -> Iterator[str]:
    """Yield the dotted names of all values that differ, to the last bit, between two nested contents."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}, key=str):
            if key in a and key in b:
                yield from differences(a[key], b[key], f"{name}.{key}".strip("."))
            else:
                yield f"{name}.{key}"
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for n, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{name}.{n}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b):
            yield name
    elif a != b:
        yield name


# Faults of disks and files


def photos(folder: Path, count: int = 6) -> Path:
    """Pictures of coloured patches."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def shards(folder: Path) -> str:
    """Three tars of pictures, of which two of three are small and one is none; the setting that reads them."""
    for shard in range(3):
        numbers = range(12 * shard, 12 * (shard + 1))
        members = {f"{number}.png": picture(number, 1 if number % 3 == 0 else 3) for number in numbers}
        tar_of(folder / f"{shard}.tar", {**members, "none.png": b"no picture"})
    return f"pipe:cat {folder}/{{0..2}}.tar"


def picture(seed: int, shrink: int = 1) -> bytes:
    """A PNG of 160 x 120 pixels, or smaller by a factor."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    size = (160 // shrink, 120 // shrink)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few kilobytes that would become 1.2 GB of pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def run(folder: Path, *overrides: str) -> tuple[int, str]:
    """Run the command in a new process; returns the exit status and its output."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    arguments = [*COMMON, *SHORT, f"train_data_dir={folder / 'data'}", f"output_root={folder / 'out'}"]
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=run_training, args=([*arguments, *overrides], str(log), str(folder / "cache")))
    process.start()
    process.join()
    return process.exitcode or 0, log.read_text()


def skipped(make: Callable[[Path], None], reason: str) -> Callable[[Path], str]:
    """Return a check that files made beside good pictures are counted under ``reason`` and training goes on."""

    def check(folder: Path) -> str:
        photos(folder / "data", count=2)
        make(folder / "data")
        status, text = run(folder, "batch_size=4")
        account = next((line for line in text.splitlines() if "images skipped" in line), "")
        good = status == 0 and reason in account and "Traceback" not in text
        return "" if good and (folder / "out" / "last.pth").exists() else f"status {status}: {text[-500:]}"

    return check


def refused(make: Callable[[Path], None], message: str) -> Callable[[Path], str]:
    """Return a check that data from ``make`` are refused in one line that has ``message``, before any training."""

    def check(folder: Path) -> str:
        (folder / "data").mkdir()
        make(folder / "data")
        status, text = run(folder)
        good = status == 1 and message in text and "Traceback" not in text
        return "" if good and not list(folder.rglob("*.pth")) else f"status {status}: {text[-500:]}"

    return check


def kept(damage: Callable[[Path], object], message: str, *overrides: str, intact: bool = True) -> Callable[[Path], str]:
    """Return a check that a second run, after ``damage`` to the folder of the first, fails with ``message``.

    It must not change the checkpoint (``intact``: nor may ``damage``).
    """

    def check(folder: Path) -> str:
        photos(folder / "data", count=2)
        status, text = run(folder)
        last = folder / "out" / "last.pth"
        written = last.read_bytes() if status == 0 else b""
        damage(folder)
        present = last.read_bytes()
        status, text = run(folder, "num_training_steps=4", *overrides)
        good = status == 1 and message in text and "Traceback" not in text and last.read_bytes() == present
        return "" if good and (not intact or present == written) else f"status {status}: {text[-500:]}"

    return check


def full_disk(folder: Path) -> str:
    """A write that fails in the middle of a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    photos(folder / "data", count=2)
    run(folder)
    last = folder / "out" / "last.pth"
    written = last.read_bytes()
    # In this process: the server that forks the others does not share its limits.
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(written) // 2, limits[1]))
        try:
            folders = [f"train_data_dir={folder / 'data'}", f"output_root={folder / 'out'}"]
            status = train([*COMMON, *SHORT, *folders, "num_training_steps=4"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    good = status == 1 and "cannot write checkpoint" in errors.getvalue() and last.read_bytes() == written
    return "" if good else f"status {status}: {errors.getvalue()[-500:]}"


def flip_bit(folder: Path) -> None:
    path = folder / "out" / "last.pth"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def malicious(folder: Path) -> str:
    def plant(folder: Path) -> None:
        torch.save({"format": "featsharp", "model": Malicious(folder / "trace")}, folder / "out" / "last.pth")

    outcome = kept(plant, "could run code; it was not loaded", intact=False)(folder)
    return "its code ran" if (folder / "trace").exists() else outcome


def cut_tar(folder: Path) -> None:
    tar_of(folder / "cut.tar", {f"{n}.png": picture(n) for n in range(4)})
    whole = (folder / "cut.tar").read_bytes()
    (folder / "cut.tar").write_bytes(whole[: len(whole) // 3])


def hostile_tar(folder: Path) -> None:
    names = ("a.pyd", "a.pickle", "a.pth", "a.json", "../../escaped.txt", "/absolute.txt")
    tar_of(folder / "hostile.tar", {**dict.fromkeys(names, b"\x80\x04."), "b.png": b"no picture"})


def write(name: str, content: bytes) -> Callable[[Path], None]:
    """Return a function that writes one file into the data."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return make


COUNTED, REFUSED = "counted, trains on", "one line, nothing trained"
KEPT = "one line, checkpoint as it was"
CASES = [
    Case("a file of no bytes", COUNTED, skipped(write("x.png", b""), "the file is empty (")),
    Case("a picture cut in half", COUNTED, skipped(write("x.png", picture(9)[:900]), "cannot be decoded (")),
    Case("text named .jpg", COUNTED, skipped(write("x.jpg", b"no picture"), "not an image that can be read (")),
    Case("a decompression bomb", COUNTED, skipped(write("x.png", bomb()), "too many pixels (")),
    Case("a tar that was cut short", COUNTED, skipped(cut_tar, "1 cut short")),
    Case(
        "a tar of pickles, paths upwards and one bad picture",
        COUNTED,
        skipped(hostile_tar, "path that leads outside the tar ("),
    ),
    Case("a folder without pictures", REFUSED, refused(write("notes.txt", b"x"), "no images found")),
    Case("only damaged pictures", REFUSED, refused(write("x.png", b"no picture"), "")),
    Case("a tar that is none", REFUSED, refused(write("x.tar", b"no tar" * 500), "no images found")),
    Case("a full disk", KEPT, full_disk),
    Case("another configuration", KEPT, kept(lambda folder: None, "seed 1 instead of 0", "seed=1")),
    Case("another backbone", KEPT, kept(lambda folder: None, "toy-cnn", "model=toy-cnn")),
    Case("a flipped bit in the checkpoint", KEPT, kept(flip_bit, "checkpoint", intact=False)),
    Case(
        "a checkpoint that was cut short",
        KEPT,
        kept(lambda folder: os.truncate(folder / "out" / "last.pth", 5000), "truncated or damaged", intact=False),
    ),
    Case("a checkpoint with code in it", KEPT, malicious),
    Case(
        "the images are gone",
        KEPT,
        kept(lambda folder: shutil.rmtree(folder / "data"), "no such file"),
    ),
]


# The report


def report(series: list[KillSeries], seconds: float, outcomes: list[str], source: str) -> str:
    """The page in Markdown."""
    machine = describe_machine(torch.device("cpu"))
    moments = Counter(dict.fromkeys((BEFORE_FIRST, STARTING, WRITING, STEPPING), 0))
    for one in series:
        moments.update(one.moments)
    rows = [f"| {moment} | {' | '.join(str(one.moments[moment]) for one in series)} |" for moment in moments]
    cases = [
        f"| {case.fault} | {case.expected} | {'yes' if not wrong else 'no: ' + wrong.replace(chr(10), ' ')} |"
        for case, wrong in zip(CASES, outcomes, strict=True)
    ]
    return "\n".join(
        [
            "# Faults",
            "",
            *(
                describe(one, data)
                for one, data in zip(series, ("files, stored features", "streams, most of it left out"), strict=True)
            ),
            f"Both took {seconds:.0f} seconds.",
            "",
            "| killed | times, files | times, streams |",
            "|---|---|---|",
            *rows,
            "",
            "| fault | expected | so it was |",
            "|---|---|---|",
            *cases,
            "",
            f"Command: `python benchmarks/faults.py {' '.join(sys.argv[1:])}`; settings of the trainings: "
            f"`{' '.join([*COMMON, *KILLED])}` with `{' '.join(CACHED)}`, or with `{' '.join(STREAMED)}`",
            "",
            f"Machine: {machine['processor']}, {machine['cores']} cores, no GPU used. Versions: Python "
            f"{machine['python']}, torch {machine['torch']}, featsharp {machine['featsharp']}. Commit: {source}.",
            "",
        ]
    )


def describe(series: KillSeries, data: str) -> str:
    """A paragraph on one training."""
    equal = f"differ: {', '.join(series.different)}" if series.different else "equal those of the undisturbed training"
    return (
        f"One training of {series.steps} steps ({data}), killed {sum(series.moments.values())} times with SIGKILL and "
        f"started again with the same command: all tensors and values of `last.pth` and `best.pth` (model, optimiser, "
        f"best score) {equal}, bit for bit. Files left behind: {', '.join(series.leftovers) or 'none'}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
