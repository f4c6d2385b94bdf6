"""The ``featsharp`` command: one module per sub-command, each with ``add_arguments`` and ``run``.

A module imports no large package before ``run``: help is instant, and a missing file is reported at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from featsharp import __version__
from featsharp.errors import explain
from featsharp.terminal import add_verbosity, flush_output, say, set_up_terminal, verbosity_of

# Sub-command -> its line in the help.
COMMANDS = {
    "upsample": "sharp features of images: PCA pictures and raw features",
    "extract": "features of many pictures, in files with random access",
    "video": "sharp features of a video: PCA side by side, or features in files",
    "demo": "a page on this machine: upload a picture, look at its features",
    "fit": "sharp features of one image by a network fitted to it (FeatUp's implicit upsampler)",
    "adapt": "fit a linear student to a backbone in minutes, and say what it gains",
    "train": "train an upsampler (arguments as for python -m featsharp.train)",
    "distill": "distil teachers with sharp features into a small student (arguments as for train)",
    "export": "a checkpoint as one small safetensors file for use",
    "pack": "an image folder to webdataset shards",
    "eval": "measure encoders by the tasks on which the field compares upsamplers",
    "figure": "pictures for papers and docs: PCA panels, biases, similarity, curves",
    "bench": "speed and memory on this machine",
    "doctor": "which fast implementations can run here, and why not the others; what a backbone is like",
    "ls": "what exists: backbones, upsamplers, normalizers, configurations",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; returns the exit status."""
    set_up_terminal()
    try:
        status = _run(list(sys.argv[1:] if arguments is None else arguments))
    finally:  # argparse exits after its help
        lost = flush_output()
    if lost is not None:
        say(f"featsharp: cannot write to standard output: {lost.strerror or lost}", error=True)
    return status or int(lost is not None)


def _run(arguments: list[str]) -> int:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for "module:function"; last, so that it hides no installed module
    parser = _Parser(prog="featsharp", description="Sharp feature maps of vision foundation models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in arguments if not word.startswith("-")), "")
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line)
        if name == chosen:
            sub.set_defaults(argv=arguments)
            module = importlib.import_module(f"featsharp.cli.{name}")
            sub.description, sub.formatter_class = module.__doc__, argparse.RawDescriptionHelpFormatter
            module.add_arguments(sub)
    if any("\0" in word for word in arguments):
        parser.error("an argument holds a null character, which no name of a file can have")
    parsed, others = parser.parse_known_args(arguments)
    if others and parsed.command not in ("train", "distill"):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    set_up_terminal(verbosity_of(parsed))
    try:
        return int(importlib.import_module(f"featsharp.cli.{parsed.command}").run(parsed) or 0)
    except KeyboardInterrupt:
        say(f"featsharp {parsed.command}: stopped", error=True)
        return 130
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        say(f"featsharp {parsed.command}: {reason}", error=True)
        return 1


class _Parser(argparse.ArgumentParser):
    """Parser with -v and -q, and errors of one line; ``--help`` gives the usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        add_verbosity(self)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


if __name__ == "__main__":
    sys.exit(main())
