"""The ``featsharp`` command: one module per sub-command, each with ``add_arguments`` and ``run``."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from featsharp import __version__
from featsharp.errors import FeatSharpError

# Sub-command -> its line in the help. Modules are imported when used, so that help is instant.
COMMANDS = {
    "upsample": "sharp features of images: PCA pictures and raw features",
    "fit": "sharp features of one image by a network fitted to it (FeatUp's implicit upsampler)",
    "train": "train an upsampler (arguments as for python -m featsharp.train)",
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
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where "module:function" is looked for last, as python -m does first
    if arguments and arguments[0] == "train":
        from featsharp.train import main as train

        return train(arguments[1:])
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    parser = _Parser(prog="featsharp", description="Sharp feature maps of vision foundation models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = arguments[0] if arguments else ""
    for name, line in COMMANDS.items():
        sub = commands.add_parser(name, help=line, description=line)
        if name == chosen:
            sub.set_defaults(argv=arguments)
            module = importlib.import_module(f"featsharp.cli.{name}")
            sub.description, sub.formatter_class = module.__doc__, argparse.RawDescriptionHelpFormatter
            module.add_arguments(sub)
    parsed = parser.parse_args(arguments)
    try:
        return int(importlib.import_module(f"featsharp.cli.{parsed.command}").run(parsed) or 0)
    except FeatSharpError as error:
        print(f"featsharp {parsed.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print(f"featsharp {parsed.command}: stopped", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; ``--help`` gives the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


if __name__ == "__main__":
    sys.exit(main())
