"""A linear student of the views for any backbone, in minutes, without steps of training or labels.

    featsharp adapt --backbone dinov2-s --data photos/ -o dinov2-s.safetensors
    featsharp upsample photo.jpg --checkpoint dinov2-s.safetensors

The map of sixteen passes is learned by a linear mix of five, in closed form; the fidelity of both, of bilinear and of
fewer passes is measured on photographs held back. Where the student gains nothing there, no file is written: use
--upsampler views then, which needs none.
"""

import argparse
from pathlib import Path

from featsharp.cli.arguments import add_device, check_inputs, check_result
from featsharp.errors import ConfigError
from featsharp.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", required=True, help="its name; 'featsharp ls backbones' lists them")
    parser.add_argument("--data", type=Path, required=True, metavar="PHOTOS", help="a folder or tar, best 100")
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="about so long (10)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="F.safetensors")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    check_inputs([arguments.data])
    check_result(arguments.output)
    if not 0 < arguments.minutes < 1e6:
        raise ConfigError(f"--minutes must be above 0; got {arguments.minutes:g}")
    from featsharp.adapt import adapt
    from featsharp.backbones import create_backbone
    from featsharp.builder import save_weights
    from featsharp.device import find_device

    backbone = create_backbone(arguments.backbone).eval().to(find_device(arguments.device))
    result = adapt(backbone, arguments.data, minutes=arguments.minutes)
    say(f"fitted to {result.photographs[0]} photographs, measured on {result.photographs[1]} others")
    for name, reason in result.skipped:
        say(f"skipped {name}: {reason}")
    say("fidelity, with its 95 % interval over photographs:")
    for name, estimate in result.fidelity.items():
        say(f"  {name:<17} {estimate.value:6.3f}  [{estimate.low:.3f}, {estimate.high:.3f}]")
    prior, windows = result.chosen
    say(f"views(16) predict best with prior={prior:g} and windows={windows:g}: upsampler_options of 'views'")
    for name, ratio in result.gain.items():
        say(f"the student has {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}] times the fidelity of {name}")
    if not result.gained:
        say("nothing gained beyond the interval: no file is written; use --upsampler views, which needs none")
        return
    save_weights(result.student, arguments.output)
    say(f"{arguments.output}: {arguments.output.stat().st_size / 2**20:.1f} MiB; load it with load_from_file")
