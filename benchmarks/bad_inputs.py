"""Try malformed pictures, tars, configurations, label maps, files of tensors and command lines.

    python benchmarks/bad_inputs.py --count 10000
    python benchmarks/bad_inputs.py --only picture:417 --keep kept

Input n of a kind follows from the seed, the kind and n alone. A process that has imported everything forks a child for
each, under limits of time and memory. Untouched neighbours of an input, in its batch, archive or data set, must come
out as without it, byte for byte, and no file that was there before may change. A run that was stopped goes on, and
tries again what failed. Counts are inputs of all kinds together.
"""

import argparse
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from checkout import commit
from malformed.kinds import KINDS, Damage, Kind

from featsharp.bench.measure import describe_machine
from featsharp.errors import FeatSharpError

SECONDS = 20  # of processor time; the wall clock may take ten times as long on a busy machine
MEMORY = 3 << 30  # bytes beside what the server has; Pillow's largest picture is 1 GiB as float32
COMMIT = commit()
SHARE = 0.3  # least share that gets past the header
OUTCOMES = ("refused", "processed", "crashed", "hung", "over memory")
OUT_OF_MEMORY = ("MemoryError", "allocate memory", "out of memory", "bad_alloc")


class Try(NamedTuple):
    """Outcome of an input."""

    kind: str
    number: int
    outcome: str
    header: bool  # whether it got past it
    change: str
    said: str  # the error, or the end of the traceback
    damage: str  # what else changed; empty for nothing
    seconds: float
    memory: int  # MiB beside the server's
    commit: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="try this one and show what it says; or KIND: that kind")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the folders of inputs that fail there")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bad-inputs.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kind, _, number = (arguments.only or "").partition(":")
    wanted = [(kind or list(KINDS)[n % len(KINDS)], n if kind else n // len(KINDS)) for n in range(arguments.count)]
    with tempfile.TemporaryDirectory() as folder:
        bases = {name: Base(Path(folder, name), KINDS[name]) for name in ([kind] if kind else KINDS)}
        options = (arguments.seed, Path(folder), arguments.keep)
        if number:
            one = try_input(bases[kind], kind, int(number), *options)
            print(json.dumps(one._asdict(), indent=1))
            return int(failed(one))
        gc.collect()
        gc.freeze()  # children that collect would copy every page
        noted = arguments.output.with_suffix(".rows.jsonl")
        done = read_rows(noted, arguments.seed)
        # What failed may have been mended since.
        rest = [pair for pair in wanted if pair not in done or failed(done[pair])]
        start = time.monotonic()
        workers = [
            fork(work, bases, rest[n :: arguments.processes], noted, *options) for n in range(arguments.processes)
        ]
        status = [os.waitpid(worker, 0)[1] for worker in workers]
    if any(status):
        raise RuntimeError(f"a process of this benchmark failed: {status}")
    done = read_rows(noted, arguments.seed)
    content = summarize([done[pair] for pair in wanted], arguments, time.monotonic() - start)
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(report(content))
    if content["goals_met"]:
        noted.unlink()
    print(report(content))
    return 0 if content["goals_met"] else 1


class Base:
    """The folder that trials of a kind start from, made once; a trial gets a copy."""

    def __init__(self, folder: Path, kind: type[Kind]) -> None:
        self.kind, self.folder, self.expected = kind, folder / "work", folder / "expected"
        self.folder.mkdir(parents=True)
        self.expected.mkdir()
        if os.waitpid(fork(self._fill), 0)[1]:
            raise RuntimeError(f"no base for {kind.__name__}: {(folder / 'log').read_text()[-3000:]}")
        # What commands import when they run would be imported again by each trial, most of its time.
        for name in (folder / "modules").read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)

    def _fill(self) -> None:
        enter(self.folder, self.folder.parent / "log")
        self.kind(self.expected).prepare()
        (self.folder.parent / "modules").write_text("\n".join(sorted(sys.modules)))


def fork(function: Callable[..., object], *arguments: Any) -> int:
    """Call a function in a child process; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def enter(folder: Path, log: Path) -> None:
    """Make this process work in a folder, with its output in a file."""
    os.chdir(folder)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with open(os.devnull, encoding="utf-8") as file:
        os.dup2(file.fileno(), 0)
    os.environ |= {"LOG": str(log), "HOME": str(folder), "FEATSHARP_CACHE": str(folder.parent / "cache")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TORCH_HOME": str(folder)}


def work(bases: dict[str, Base], pairs: list[tuple[str, int]], noted: Path, *options: Any) -> None:
    """Try inputs one after the other, and note each."""
    with noted.open("a", encoding="utf-8", buffering=1) as file:
        for kind, number in pairs:
            file.write(json.dumps(try_input(bases[kind], kind, number, *options)) + "\n")


def try_input(base: Base, kind: str, number: int, seed: int, scratch: Path, keep: Path | None) -> Try:
    """Try one input in a child process."""
    folder = scratch / f"{os.getpid()}" / "work"
    shutil.copytree(base.folder, folder)
    reading, writing = os.pipe()
    start = time.monotonic()
    child = fork(child_main, base, folder, Random(f"{seed} {kind} {number}"), reading, writing)
    os.close(writing)
    said, ended = b"", True
    while ended and (
        ended := bool(select.select([reading], [], [], max(0, start + 10 * SECONDS - time.monotonic()))[0])
    ):
        if not (part := os.read(reading, 1 << 16)):
            break
        said += part
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # workers that it left, too
    _, status, usage = os.wait4(child, 0)
    os.close(reading)
    lines = [json.loads(line) for line in said.decode().splitlines() if line.endswith("}")]
    fields = {"outcome": "crashed", "header": False, "change": "", "said": "", "damage": "", "memory": 0}
    for line in lines:
        fields |= line
    memory = max(0, usage.ru_maxrss * 1024 - fields.pop("start", usage.ru_maxrss * 1024)) >> 20
    if not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        fields["outcome"] = "hung"
    elif not fields.pop("ended", False):
        fields |= {"outcome": "crashed", "said": f"ended with {status}: {_tail(folder.parent / 'log')}"}
    elif memory > MEMORY >> 20 or any(text in fields["said"] for text in OUT_OF_MEMORY):
        fields["outcome"] = "over memory"
    fields.pop("ended", None)
    seconds = round(usage.ru_utime + usage.ru_stime, 2)
    one = Try(kind, number, **{**fields, "seconds": seconds, "memory": memory, "commit": COMMIT})
    if keep is not None and failed(one):
        shutil.rmtree(keep / f"{kind}-{number}", ignore_errors=True)
        shutil.copytree(folder.parent, keep / f"{kind}-{number}")
    shutil.rmtree(folder.parent)
    return one


def _tail(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-500:] if path.exists() else ""


def child_main(base: Base, folder: Path, draw: Random, reading: int, writing: int) -> None:
    """Make an input, try it within limits, compare, and write what happened as lines of JSON."""
    os.setpgid(0, 0)
    os.close(reading)
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    size, resident = (int(number) * resource.getpagesize() for number in pages[:2])
    enter(folder, folder.parent / "log")

    def tell(**fields: Any) -> None:
        os.write(writing, json.dumps(fields).encode() + b"\n")

    warnings.simplefilter("ignore")
    before = {}
    try:
        kind = base.kind(base.expected)
        kind.make(draw)
        arguments = shlex.join(getattr(kind, "arguments", []))
        tell(start=resident, change=f"{kind.change}  {arguments}"[:600].strip())
        before = hashes(folder)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY, size + 2 * MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))  # SIGXCPU; the hard limit is SIGKILL
        tell(header=kind.parses())
        outcome, said = kind.attempt()
        tell(outcome=outcome, said=said[-500:])
    except Exception as error:
        where = "; ".join(f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-6:])
        found = isinstance(error, Damage)
        ours = isinstance(error, FeatSharpError)
        text = f"{type(error).__name__}: {str(error)[:400]}"
        tell(outcome="refused" if ours else "crashed", said="" if found else f"{text} [{'' if ours else where}]")
        if found:
            tell(outcome="processed", damage=str(error)[:400])
    if hasattr(kind, "reached"):
        tell(header=kind.reached)
    after = hashes(folder)
    changed = [name for name in before if before[name] != after.get(name) and name not in kind.written]
    if changed:
        tell(damage=f"changed: {', '.join(changed[:5])}")
    tell(ended=True)


def hashes(folder: Path) -> dict[str, int]:
    """Hash all files of a folder, by relative path."""
    return {str(path.relative_to(folder)): hash(path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def failed(one: Try) -> bool:
    return one.outcome not in ("refused", "processed") or bool(one.damage)


def read_rows(path: Path, seed: int) -> dict[tuple[str, int], Try]:
    """Read what was noted with this seed, the last of each input; begins a new file for another seed."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines or lines[0] != str(seed):
        path.write_text(f"{seed}\n", encoding="utf-8")
        return {}
    tries = [Try(*json.loads(line)) for line in lines[1:] if line.endswith("]")]
    return {(one.kind, one.number): one for one in tries}


def summarize(tries: list[Try], arguments: argparse.Namespace, seconds: float) -> dict[str, Any]:
    kinds = {}
    for name, kind in KINDS.items():
        some = [one for one in tries if one.kind == name]
        if some:
            kinds[name] = {
                "tried": len(some),
                "past_header": sum(one.header for one in some) / len(some),
                **{outcome: sum(one.outcome == outcome for one in some) for outcome in OUTCOMES},
                "damaged": sum(bool(one.damage) for one in some),
                "most_seconds": max(one.seconds for one in some),
                "most_mib": max(one.memory for one in some),
                "header": kind.header,
            }
    failures = [one._asdict() for one in tries if failed(one)]
    return {
        "command": f"python benchmarks/bad_inputs.py --count {arguments.count} --seed {arguments.seed}",
        "commits": dict(Counter(one.commit for one in tries)),
        "machine": describe_machine(torch.device("cpu")) | versions(),
        "seed": arguments.seed,
        "limits": {"cpu_seconds": SECONDS, "memory_bytes": MEMORY},
        "seconds": round(seconds),
        "goals_met": not failures and all(row["past_header"] >= SHARE for row in kinds.values()),
        "kinds": kinds,
        "failures": failures,
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("pillow", "numpy", "hydra-core", "omegaconf", "safetensors")}


def report(content: dict[str, Any]) -> str:
    """The page of a result."""
    lines = [
        "# Bad inputs",
        "",
        "Malformed inputs by seeded mutation, each tried in a process of its own. Damaged: an untouched neighbour came",
        "out differently, or a file that was there changed. Crashed: a signal, or an exception that is not ours.",
        "",
        "| kind | tried | past the header | " + " | ".join(OUTCOMES) + " | damaged | most seconds | most MiB |",
        "|---|" + "---:|" * (len(OUTCOMES) + 5),
    ]
    for name, row in content["kinds"].items():
        counts = " | ".join(str(row[outcome]) for outcome in OUTCOMES)
        lines.append(
            f"| {name} | {row['tried']} | {row['past_header']:.0%} | {counts} | {row['damaged']} | "
            f"{row['most_seconds']:.1f} | {row['most_mib']} |"
        )
    lines += ["", "Past the header:", ""]
    lines += [f"- {name}: {row['header']}" for name, row in content["kinds"].items()]
    if content["failures"]:
        lines += ["", "Failures:", ""]
        lines += [f"- {f['kind']}:{f['number']} {f['outcome']} {f['damage']}" for f in content["failures"]]
    machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    limits = content["limits"]
    commits = ", ".join(f"{count} {name}" for name, count in content["commits"].items())
    lines += [
        "",
        f"Limits: {limits['cpu_seconds']} s of processor time, {limits['memory_bytes'] >> 30} GiB beside the server's.",
        f"Command: `{content['command']}`; its last part took {content['seconds']} s.",
        f"Machine: {machine}. Inputs by commit: {commits}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
