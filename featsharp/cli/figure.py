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
    featsharp figure cost flops.json --accuracy spair.json --metric pck@0.1 -o cost.pdf
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from featsharp.cli.arguments import add_device, check_inputs, parse_count
from featsharp.errors import ConfigError
from featsharp.names import split_label
from featsharp.visualization.style import check_output, save

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from featsharp.backbones.base import Backbone
    from featsharp.model import SharpEncoder
    from featsharp.visualization.figures.bias import Pattern

DEFAULT_BACKBONE = "vits14-focus"
# Encoders by label, those of one backbone together.
Encoders = dict[str, "SharpEncoder"]


class Kind(NamedTuple):
    """A figure: its line in the help, its flags, and how it is drawn."""

    help: str
    add: Callable[[argparse.ArgumentParser], None]
    draw: Callable[[argparse.Namespace], "Figure"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="figure", required=True, metavar="NAME")
    for name, kind in FIGURES.items():
        sub = kinds.add_parser(name, help=kind.help, description=kind.help)
        kind.add(sub)
        sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".png, .pdf or .svg")


def run(arguments: argparse.Namespace) -> None:
    check_output(arguments.output)
    protect_inputs(arguments)
    check_inputs(_files(arguments), _encoders(arguments))
    from featsharp.memory import keep_freed_memory

    keep_freed_memory()
    save(FIGURES[arguments.figure].draw(arguments), arguments.output)
    print(arguments.output)


def protect_inputs(arguments: argparse.Namespace) -> None:
    """Refuse to write the figure over a file that it is made from.

    Raises:
        ConfigError: When the output is one of the images, results or checkpoints.
    """
    target = arguments.output.resolve()
    for path in (*_files(arguments), *map(Path, _encoders(arguments))):
        if path.resolve() == target:
            raise ConfigError(f"the figure would overwrite its input {path}; choose another file with -o")


def _files(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yield the images and results that a command reads."""
    for name, value in vars(arguments).items():
        values = value if isinstance(value, list) else [value]
        yield from (path for path in values if isinstance(path, Path) and name != "output")


def _encoders(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the encoders that a command names, without their labels."""
    for name in ("checkpoint", "upsampler"):
        yield from (split_label(text)[1] for text in getattr(arguments, name, None) or [])


def load_encoders(arguments: argparse.Namespace) -> dict[str, Encoders]:
    """The encoders that a command asks for, by backbone: training-free ones, then checkpoints.

    Training-free upsamplers are built for every --backbone, or for those of the checkpoints. One label may stand for
    checkpoints of several backbones: they share a column.
    """
    from featsharp.backbones import create_backbone
    from featsharp.builder import load_from_file
    from featsharp.device import find_device

    backbones: list[str] = arguments.backbone or []
    wanted = backbones[0] if len(backbones) == 1 else None
    device = find_device(arguments.device)
    loaded: dict[str, Backbone] = {}
    trained: defaultdict[str, Encoders] = defaultdict(dict)
    for text in arguments.checkpoint or []:
        label, path = split_label(text)
        encoder = load_from_file(path, featurizer=wanted, allow_functions=arguments.allow_functions)
        encoder.backbone = loaded.setdefault(encoder.backbone.name, encoder.backbone)
        _add(trained[encoder.backbone.name], label or _caption(encoder), encoder)
    found: dict[str, Encoders] = {}
    for name in dict.fromkeys([*backbones, *trained] or [DEFAULT_BACKBONE]):
        backbone = loaded.get(name) or create_backbone(name)
        found[name] = {}
        for text in arguments.upsampler or []:
            label, path = split_label(text)
            encoder = load_from_file(path, featurizer=backbone)
            _add(found[name], label or _caption(encoder), encoder)
        for label, encoder in trained.get(name, {}).items():
            _add(found[name], label, encoder)
        if not found[name]:
            raise ConfigError(f"nothing to draw for backbone {name}; give --checkpoint FILE or --upsampler bilinear-2x")
    for encoders in found.values():
        for encoder in encoders.values():
            encoder.to(device)
    return found


def _pca(arguments: argparse.Namespace) -> "Figure":
    from featsharp.data.images import decode_image
    from featsharp.visualization.figures.pca import draw_pca, pca_row

    by_backbone = load_encoders(arguments)
    return draw_pca(
        [
            pca_row(decode_image(path), encoders, real=arguments.real, label=name if len(by_backbone) > 1 else "")
            for path in arguments.images
            for name, encoders in by_backbone.items()
        ]
    )


def _similarity(arguments: argparse.Namespace) -> "Figure":
    from featsharp.data.images import decode_image, image_to_tensor
    from featsharp.visualization.figures.maps import feature_maps
    from featsharp.visualization.figures.similarity import CENTRE, draw_similarity

    by_backbone = load_encoders(arguments)
    if len(by_backbone) > 1:
        raise ConfigError(f"a similarity figure is about one backbone; got {', '.join(by_backbone)}")
    (encoders,) = by_backbone.values()
    image = decode_image(arguments.image)
    maps = feature_maps(image, encoders, real=arguments.real)
    return draw_similarity(image_to_tensor(image), maps, at=arguments.at or CENTRE, colour_map=arguments.colours)


def _bias(arguments: argparse.Namespace) -> "Figure":
    from featsharp.backbones import create_backbone
    from featsharp.builder import load_from_file
    from featsharp.device import find_device
    from featsharp.visualization.figures.bias import Pattern, draw_bias, learned_pattern

    device = find_device(arguments.device)
    learned: list[Pattern] = []
    measured: dict[str, Pattern] = {}
    for text in arguments.checkpoint or []:
        label, path = split_label(text)
        encoder = load_from_file(path, allow_functions=arguments.allow_functions).to(device)
        name = encoder.backbone.name
        features = _random_features(encoder.backbone, arguments.images, device)
        measured[name] = _measured_pattern(name, features)
        pattern, strength = learned_pattern(encoder, features)
        strengths = {"strength": strength, **measured[name].strengths}
        learned.append(Pattern(label or f"{name}, {Path(path).stem}", pattern, strengths))
    for name in arguments.backbone or []:
        if name not in measured:
            features = _random_features(create_backbone(name).to(device), arguments.images, device)
            measured[name] = _measured_pattern(name, features)
    if not measured:
        raise ConfigError("whose bias? Give --checkpoint FILE ... or --backbone NAME ..., or both")
    average = f"mean features of {arguments.images} random images"
    return draw_bias({"learned bias buffers": learned, average: list(measured.values())})


def _random_features(backbone: "Backbone", count: int, device: "torch.device") -> "torch.Tensor":
    """Compute the features of random images of a backbone's native size, [n, C, h, w] on the CPU."""
    import torch

    from featsharp.evaluation.position_bias import random_images
    from featsharp.model import InputConditioner

    images = InputConditioner(backbone.mean, backbone.std)(random_images(count, backbone.input_size))
    with torch.inference_mode():
        return torch.cat([backbone(image[None].to(device)).features.float().cpu() for image in images])


def _measured_pattern(name: str, features: "torch.Tensor") -> "Pattern":
    from featsharp.evaluation.position_bias import explained_by_position
    from featsharp.visualization.figures.bias import Pattern, mean_pattern

    return Pattern(name, mean_pattern(features), {"position bias": explained_by_position(features)})


def _miou(arguments: argparse.Namespace) -> "Figure":
    from featsharp.visualization.figures.miou import draw_miou, read_miou
    from featsharp.visualization.figures.results import read_result

    results = [read_result(path, "segmentation") for path in arguments.results]
    return draw_miou(read_miou(results, arguments.metric), arguments.metric)


def _pr(arguments: argparse.Namespace) -> "Figure":
    from featsharp.visualization.figures.pr import draw_pr, read_pr
    from featsharp.visualization.figures.results import read_result

    return draw_pr(read_pr([read_result(path, "boundaries") for path in arguments.results]))


def _cka(arguments: argparse.Namespace) -> "Figure":
    from featsharp.visualization.figures.cka import draw_cka, read_cka
    from featsharp.visualization.figures.results import read_result

    return draw_cka(read_cka([read_result(path, "cka") for path in arguments.results]))


def _throughput(arguments: argparse.Namespace) -> "Figure":
    from featsharp.visualization.figures.results import read_result
    from featsharp.visualization.figures.throughput import draw_throughput, read_throughput

    return draw_throughput(*read_throughput(read_result(arguments.result, "throughput")))


def _cost(arguments: argparse.Namespace) -> "Figure":
    from featsharp.visualization.figures.cost import draw_cost, read_cost
    from featsharp.visualization.figures.results import read_result

    costs = [read_result(path, "flops", "throughput") for path in arguments.results]
    quality = [read_result(path) for path in arguments.accuracy]
    return draw_cost(*read_cost(costs, quality, arguments.metric), arguments.metric)


def _caption(encoder: "SharpEncoder") -> str:
    return f"{encoder.recipe['upsampler']} {encoder.factor:g}x"


def _add(encoders: Encoders, label: str, encoder: "SharpEncoder") -> None:
    if label in encoders:
        raise ConfigError(f"two encoders are called {label!r}; name them: LABEL=FILE")
    encoders[label] = encoder


def _add_encoders(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--upsampler", nargs="+", metavar="[LABEL=]NAME-FACTORx", help="training-free upsamplers, such as bilinear-2x"
    )
    parser.add_argument("--checkpoint", nargs="+", metavar="[LABEL=]FILE", help="trained files")
    parser.add_argument(
        "--backbone", nargs="+", metavar="NAME", help=f"default: those of the checkpoints, else {DEFAULT_BACKBONE}"
    )
    parser.add_argument(
        "--real",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add the backbone run on the enlarged image, where it takes other sizes than its own",
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-functions",
        action="store_true",
        help="let a checkpoint import functions that it names; runs their code",
    )
    add_device(parser)


def _add_pca(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    _add_encoders(parser)


def _add_similarity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--at", type=_parse_point, metavar="Y,X", help="the point, from 0 to 1; default: the centre")
    parser.add_argument("--colours", choices=("viridis", "gray"), default="viridis")
    _add_encoders(parser)


def _add_bias(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", nargs="+", metavar="[LABEL=]FILE", help="trained files with a bias buffer")
    parser.add_argument("--backbone", nargs="+", metavar="NAME", help="backbones whose pattern is measured")
    parser.add_argument("--images", type=parse_count, default=16, metavar="N", help="random images to measure on")
    _add_common(parser)


def _add_miou(parser: argparse.ArgumentParser) -> None:
    _add_results(parser, "segmentation")
    parser.add_argument("--metric", default="miou", help="name of the number to draw; default: miou")


def _add_pr(parser: argparse.ArgumentParser) -> None:
    _add_results(parser, "boundaries")


def _add_cka(parser: argparse.ArgumentParser) -> None:
    _add_results(parser, "cka")


def _add_throughput(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, metavar="JSON", help="of featsharp eval throughput")


def _add_cost(parser: argparse.ArgumentParser) -> None:
    _add_results(parser, "flops or featsharp eval throughput")
    parser.add_argument("--accuracy", nargs="+", type=Path, required=True, metavar="JSON", help="of any other task")
    parser.add_argument("--metric", required=True, metavar="NAME", help="name of its number to draw, such as pck@0.1")


def _add_results(parser: argparse.ArgumentParser, task: str) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help=f"of featsharp eval {task}")


def _parse_point(text: str) -> tuple[float, float]:
    """``0.4,0.6`` to (0.4, 0.6), for argparse."""
    try:
        y, x = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no point; write Y,X from 0 to 1, for example 0.4,0.6") from error
    return y, x


FIGURES = {
    "pca": Kind("feature maps as PCA pictures, one basis for all maps of a row", _add_pca, _pca),
    "similarity": Kind("how alike all features are to the one at a point", _add_similarity, _similarity),
    "bias": Kind("position biases, learned and measured, the strongest first", _add_bias, _bias),
    "miou": Kind("segmentation quality by upsampling factor", _add_miou, _miou),
    "pr": Kind("precision against recall of boundaries", _add_pr, _pr),
    "cka": Kind("similarity of features between input sizes", _add_cka, _cka),
    "throughput": Kind("time per token, time per image, memory by factor", _add_throughput, _throughput),
    "cost": Kind("a quality number against operations or time", _add_cost, _cost),
}
