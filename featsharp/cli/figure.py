"""Pictures for papers and docs, as PNG, PDF or SVG by the suffix of -o.

Of features, from images and encoders:

    featsharp figure pca a.jpg b.jpg --upsampler bilinear-2x tile-2x --checkpoint FeatSharp=last.pth -o panel.png
    featsharp figure similarity photo.jpg --checkpoint FeatSharp=last.pth --at 0.4,0.6 -o similarity.png
    featsharp figure bias --checkpoint last.pth --backbone vits14-focus -o bias.png

Of results, from JSON files of featsharp eval:

    featsharp figure miou seg-224.json seg-448.json -o miou.pdf
    featsharp figure pr boundaries.json -o pr.pdf
    featsharp figure cka cka.json -o cka.pdf
    featsharp figure throughput throughput.json -o throughput.pdf
    featsharp figure pareto pareto.json -o pareto.png
    featsharp figure cost flops.json --accuracy spair.json --metric pck@0.1 -o cost.pdf
"""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from featsharp.cli.arguments import check_inputs, check_result, protect_files
from featsharp.names import split_label
from featsharp.terminal import say
from featsharp.visualization.style import check_output, save

# Figure -> its line in the help. Each is a module of featsharp.visualization.figures; only the chosen one is imported.
FIGURES = {
    "pca": "feature maps as PCA pictures, one basis for all maps of a row",
    "similarity": "how alike all features are to the one at a point",
    "bias": "position biases, learned and measured, the strongest first",
    "miou": "segmentation quality by upsampling factor",
    "pr": "precision against recall of boundaries",
    "cka": "similarity of features between input sizes",
    "throughput": "time per token, time per image, memory by factor",
    "pareto": "all measures against passes or seconds",
    "cost": "a quality number against operations or time",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="figure", required=True, metavar="NAME")
    chosen = next((word for word in parser.get_default("argv") if word in FIGURES), None)
    for name, line in FIGURES.items():
        sub = kinds.add_parser(name, help=line, description=line)
        if name == chosen:
            _module(name).add_arguments(sub)
            sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg")


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    check_result(arguments.output)
    inputs = (*_files(arguments), *map(Path, _encoders(arguments)))
    protect_files([(arguments.output, arguments.output)], inputs)  # an earlier figure may be replaced
    if "checkpoint" in arguments:  # a figure of features; those of results say how a missing file is made
        check_inputs(_files(arguments), _encoders(arguments))
        from featsharp.memory import keep_freed_memory

        keep_freed_memory()
    save(_module(arguments.figure).make_figure(arguments), arguments.output)
    say(str(arguments.output))


def _module(name: str) -> Any:
    return importlib.import_module(f"featsharp.visualization.figures.{name}")


def _files(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield the images and results that a command reads."""
    for name, value in vars(arguments).items():
        values = value if isinstance(value, list) else [value]
        yield from (path for path in values if isinstance(path, Path) and name != "output")


def _encoders(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the encoders that a command names, without their labels."""
    for name in ("checkpoint", "upsampler"):
        yield from (split_label(text)[1] for text in getattr(arguments, name, None) or [])
