"""A checkpoint as one small file for use: no training state, the upsampler in half precision.

    featsharp export last.pth -o sharp.safetensors
    featsharp upsample photo.jpg --checkpoint sharp.safetensors

It loads like the checkpoint. The weights of the backbone are in neither; their hash is.
"""

import argparse
from pathlib import Path

from featsharp.cli.arguments import add_backbone, check_inputs, check_result
from featsharp.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.safetensors")
    add_backbone(parser)


def run(arguments: argparse.Namespace) -> None:
    check_inputs([], [arguments.checkpoint])
    check_result(arguments.output)
    from featsharp.builder import load_from_file, save_weights

    encoder = load_from_file(
        arguments.checkpoint, featurizer=arguments.backbone, allow_functions=arguments.allow_functions
    )
    save_weights(encoder, arguments.output)
    say(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB")
