"""An encoder as one file for use: its weights, or a program that runs without this package.

    featsharp export last.pth -o sharp.safetensors
    featsharp export bilinear-2x --backbone vits14-focus --dynamic -o sharp.onnx
    featsharp export tile-2x --backbone toy-vit --size 448x672 -o tile.pt2

safetensors   what featsharp upsample --checkpoint loads: no training state, the upsampler in half precision. The
              weights of the backbone are not in it; their hash is.
onnx          backbone and upsampler for ONNX Runtime and its like; examples/run_onnx.py runs it without torch
torch-export  the same for torch.export.load

Programs take whitened images and say mean, std, patch size, the space of the features and names of inputs and outputs
in their metadata. The batch is open; --dynamic opens height and width, too. A program that fixes one of them, or
computes anything else than the encoder on other images than it was recorded with, is not written.
"""

import argparse
from pathlib import Path

from featsharp.cli.arguments import add_backbone, check_inputs, check_result, parse_size
from featsharp.errors import ConfigError
from featsharp.terminal import say

FORMATS = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("encoder", metavar="ENCODER", help="a checkpoint, weights by name, or an upsampler: tile-2x")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of FILE")
    parser.add_argument("--dynamic", action="store_true", help="programs: leave height and width open")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="programs: the one size; default: native")
    add_backbone(parser)


def run(arguments: argparse.Namespace) -> None:
    form = _find_format(arguments)
    check_inputs([], [arguments.encoder])
    check_result(arguments.output)
    from featsharp.builder import load_from_file, save_weights

    encoder = load_from_file(
        arguments.encoder, featurizer=arguments.backbone, allow_functions=arguments.allow_functions
    )
    if form == "safetensors":
        save_weights(encoder, arguments.output)
        details = ""
    else:
        from featsharp.export import export_encoder

        about = export_encoder(encoder, arguments.output, form, dynamic=arguments.dynamic, size=arguments.size)
        details = f", opset {about['opset']}" if form == "onnx" else f", torch {about['torch']}"
        details += "; any batch, "
        if arguments.dynamic:
            details += f"sides in steps of {about['size_step']} pixels"
        else:
            details += "{}x{} pixels".format(*about["input_size"])
        if about["error"] is None:
            details += "; not run, as onnxruntime is not installed"
        else:
            others = "batches and sizes" if arguments.dynamic else "batches"
            details += f"; largest error {about['error']:.1e} standard deviations of the map, on other {others}"
    say(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB{details}")


def _find_format(arguments: argparse.Namespace) -> str:
    """Choose the format by flag and ending, which have to agree."""
    by_ending = {ending: form for form, ending in FORMATS.items()}
    ending = arguments.output.suffix
    form: str | None = arguments.format or by_ending.get(ending)
    if form is None or ending != FORMATS[form]:
        wanted = " or ".join(by_ending) if form is None else FORMATS[form]
        raise ConfigError(f"the file{f' of {form}' if form else ''} ends in {wanted}; got {arguments.output.name}")
    if form == "safetensors" and (arguments.dynamic or arguments.size):
        raise ConfigError("--dynamic and --size are for onnx and torch-export; weights take any size")
    if arguments.dynamic and arguments.size:
        raise ConfigError("--size is for a program of one size, --dynamic for one of any; leave out one of them")
    return form
