"""Pictures that compare feature maps, all columns in one PCA basis.

    featsharp panel pca photo.jpg --checkpoint last.pth -o panel.png
    featsharp panel pca a.jpg b.jpg --checkpoint featup.pth --checkpoint featsharp.pth --real -o panel.png

Columns: the image, the backbone's low resolution, bilinear and tile at the checkpoints' factor, and every checkpoint;
with --real also the backbone run on the enlarged image, where it takes other sizes than its own.
"""

import argparse
from pathlib import Path

from featsharp.builder import create_encoder, load_from_file
from featsharp.cli.results import add_backbone
from featsharp.data.images import decode_image
from featsharp.errors import ConfigError
from featsharp.ops.memory import keep_freed_memory
from featsharp.visualization.compare import compare_encoders
from featsharp.visualization.panels import save_figure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=["pca"])
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--checkpoint", action="append", required=True, help="may be given several times")
    add_backbone(parser)
    parser.add_argument("--real", action="store_true", help="add the backbone run on the enlarged image")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG")


def run(arguments: argparse.Namespace) -> None:
    keep_freed_memory()
    trained = {}
    for path in arguments.checkpoint:
        encoder = load_from_file(path, featurizer=arguments.backbone, allow_functions=arguments.allow_functions)
        label = encoder.recipe["upsampler"]
        trained[label if label not in trained else f"{label} ({Path(path).stem})"] = encoder
    first = next(iter(trained.values()))
    if any(encoder.backbone.name != first.backbone.name for encoder in trained.values()):
        raise ConfigError("the checkpoints belong to different backbones; draw one panel for each")
    encoders = {name: create_encoder(first.backbone, name, first.factor) for name in ("bilinear", "tile")}
    encoders |= trained
    save_figure(
        [compare_encoders(decode_image(path), encoders, real=arguments.real) for path in arguments.images],
        arguments.output,
    )
    print(arguments.output)
