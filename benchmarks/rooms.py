"""Count the files of the package that a call walks through, and how often it climbs to a higher level.

    python benchmarks/rooms.py                  load_from_file and the set-up of a training run
    python benchmarks/rooms.py -v               with every file and every climb

Two counts of files and climbs, after everything is imported and the call was made once before:

- *entered*: all files of ``featsharp/`` of which a function runs, whoever calls it.
- *walked*, a part of them: files entered by calls, where the constructor of an object (``__init__``,
  ``__post_init__``) counts for the file that constructs it, and a method of a ``torch.nn.Module`` or a registration
  hook of one for the file that has it. Generator expressions and comprehensions belong to their function.

A *climb* is a call from a file of a lower level into a file of a higher one; levels are those of ``LEVELS`` in
``tests/test_architecture.py``. A call that comes through a library (a callback) counts as one of the file that called
the library.
"""

import argparse
import ast
import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import featsharp

PACKAGE = Path(featsharp.__file__).parent
LEVELS_FILE = Path(__file__).resolve().parents[1] / "tests" / "test_architecture.py"
CONSTRUCTORS = ("__init__", "__post_init__", "__new__")
PARTS_OF_FUNCTIONS = ("<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<lambda>")
# The most that tests/test_rooms.py allows: files entered and climbs on the way, files walked and climbs.
LIMITS = {"load_from_file": ((15, 3), (7, 0)), "training set-up": ((51, 12), (25, 0))}
GOALS = {"load_from_file": (7, 3), "training set-up": (25, 12)}


@dataclass
class Walk:
    """The files that a call went through.

    Attributes:
        entered: All files, in the order of their first call.
        climbs_entered: Calls (from file, to file, function) among them, each once.
        walked: Those that a reader has to open.
        climbs: The same among these.
    """

    entered: dict[str, None] = field(default_factory=dict)
    climbs_entered: dict[tuple[str, str, str], None] = field(default_factory=dict)
    walked: dict[str, None] = field(default_factory=dict)
    climbs: dict[tuple[str, str, str], None] = field(default_factory=dict)


def record(call: Callable[[], object], until: str = "") -> Walk:
    """Run ``call`` and note down its walk.

    Args:
        call: A function without arguments.
        until: Qualified name of a function at whose start recording ends.
    """
    levels, walk = read_levels(), Walk()
    # Walked file of each running frame, None inside calls that are not walked; and the file itself.
    files: dict[FrameType, tuple[str | None, str]] = {}

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "return":
            files.pop(frame, None)
        if event != "call":
            return
        code = frame.f_code
        caller = frame.f_back
        before, last = files.get(caller, ("", "")) if caller is not None else ("", "")
        file = _file_of_package(code.co_filename)
        if file is None or code.co_name == "<module>":
            files[frame] = before, last
            return
        if until and code.co_qualname == until:
            sys.setprofile(None)
            return
        walk.entered.setdefault(file)
        if code.co_name in PARTS_OF_FUNCTIONS:
            files[frame] = before, file
            return
        if last and levels[unit_of(last)] < levels[unit_of(file)]:
            walk.climbs_entered.setdefault((last, file, code.co_qualname))
        if before is None or code.co_name in CONSTRUCTORS or _is_method_of_module(frame):
            files[frame] = None, file
        else:
            files[frame] = file, file
            walk.walked.setdefault(file)
            if before and levels[unit_of(before)] < levels[unit_of(file)]:
                walk.climbs.setdefault((before, file, code.co_qualname))

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return walk


@functools.cache  # asked at every call
def _file_of_package(name: str) -> str | None:
    path = Path(name)
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None


def read_levels() -> dict[str, int]:
    """Level of every unit of the package, from below."""
    for node in ast.parse(LEVELS_FILE.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LEVELS":
            levels = enumerate(ast.literal_eval(node.value))
            return {"__init__": 99, **{unit: level for level, units in levels for unit in units}}
    raise LookupError(f"no LEVELS in {LEVELS_FILE}")


def unit_of(file: str) -> str:
    """The package or module directly in ``featsharp/``."""
    return file.split("/")[0].removesuffix(".py")


def _is_method_of_module(frame: FrameType) -> bool:
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return bool(names) and names[0] == "self" and isinstance(frame.f_locals.get("self"), torch.nn.Module)


def walk_of_loading(name: str = "vits14-focus/featsharp-2x") -> Walk:
    """Walk of ``load_from_file`` on shipped weights."""
    featsharp.load_from_file(name)  # imports what it needs
    return record(lambda: featsharp.load_from_file(name))


def walk_of_training() -> Walk:
    """Walk of a training run of ``toy-vit`` on three pictures, from its arguments to its first step."""
    from featsharp.configs.compose import compose
    from featsharp.train import train

    def set_up(folder: Path, **settings: Any) -> None:
        options = {"train_data_dir": folder, "normalizer.num_samples": 2, "num_workers": 0, "batch_size": 1, **settings}
        names = ["+model=toy-vit", "+upsampler=featsharp-2x", "viz.type=none", "normalizer.cache=false"]
        train(compose([*names, "progress=false", *(f"{key}={value}" for key, value in options.items())]))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_pictures(folder / "pictures")
        set_up(folder / "pictures", num_training_steps=1, output_base=folder / "first")  # imports what it needs
        return record(
            lambda: set_up(folder / "pictures", num_training_steps=1, output_base=folder / "second"),
            until="Loop.run",
        )


def _write_pictures(folder: Path) -> None:
    from PIL import Image

    folder.mkdir()
    for number in range(3):
        pixels = torch.randint(0, 256, (96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Files that a call walks through, and climbs to a higher level.")
    parser.add_argument("-v", "--verbose", action="store_true", help="list files and climbs")
    verbose = parser.parse_args().verbose
    print(f"{'':17}  {'entered':>7}  {'climbs':>6}  {'walked':>6}  {'climbs':>6}  goal for each")
    for name, walk in (("load_from_file", walk_of_loading()), ("training set-up", walk_of_training())):
        counts = f"{len(walk.entered):7}  {len(walk.climbs_entered):6}  {len(walk.walked):6}  {len(walk.climbs):6}"
        print(f"{name:17}  {counts}  at most {GOALS[name][0]} files, {GOALS[name][1]} climbs")
        if verbose:
            for file in walk.entered:
                print(f"    {'walked ' if file in walk.walked else '       '} {file}")
            for below, above, function in walk.climbs_entered:
                print(f"    climb   {below} -> {above} ({function})")


if __name__ == "__main__":
    main()
