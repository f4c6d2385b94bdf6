"""Sharp features of one image, by a small network that is fitted to it (FeatUp's implicit upsampler).

    featsharp fit photo.jpg --backbone vits14-focus -o fits
    featsharp fit photo.jpg --backbone vits14-focus -o fits --steps 1200 --query 448x672

Needs no training, but minutes for every image: the backbone looks at --views crops of it, then the network is fitted in
--steps steps. Writes NAME.pth, the fit, also while it grows: the same command goes on after an interruption, and more
--steps continue it. Then NAME.safetensors with low_res [C, h, w] and high_res [C, H, W], float32, in the backbone's own
space, and NAME.png (image, low-resolution and sharp features in one PCA basis), both as `featsharp upsample` does. In
Python, featsharp.implicit.load_fit("DIR/NAME.pth").features((H, W)) gives any other size.

Prints how well the map, and a bilinear one of the same size, explain views that the fit has not seen.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from featsharp.cli.arguments import add_device, check_inputs, parse_count, parse_size, protect_files
from featsharp.errors import ConfigError, InputError
from featsharp.files import check_writable, fit_name
from featsharp.terminal import say, with_progress

if TYPE_CHECKING:
    from featsharp.implicit.objective import Reconstruction

HELD_OUT_VIEWS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Defaults are those of featsharp.implicit.FitConfig, whose module imports torch.
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--backbone", required=True, help="name of the backbone (see featsharp ls backbones)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=parse_count, default=400, help="of the fit (%(default)s; published: 1200)")
    parser.add_argument("--views", type=parse_count, default=150, help="crops (%(default)s; published: 3000)")
    parser.add_argument("--dim", type=parse_count, default=128, help="principal components (%(default)s)")
    parser.add_argument("--render", type=parse_count, default=4, help="cells per token (%(default)s)")
    parser.add_argument("--downsampler", default="simple", help="simple, attention (published, slow) or area")
    parser.add_argument("--frequencies", default="resolved", help="resolved or published")
    parser.add_argument("--start", default="bilinear", help="bilinear, or nothing (published)")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="scale the image to this many pixels first")
    parser.add_argument("--query", type=parse_size, metavar="HxW", help="cells of high_res (one per pixel fitted)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add_device(parser)


def run(arguments: argparse.Namespace) -> None:
    if arguments.seed < 0:
        raise ConfigError(f"--seed must be at least 0; got {arguments.seed}")
    check_inputs([arguments.image])
    check_writable(arguments.output)
    from featsharp.backbones import create_backbone
    from featsharp.cli.results import save_comparison, save_features
    from featsharp.data.images import decode_image
    from featsharp.device import find_device
    from featsharp.implicit.fit import FitConfig, Fitter
    from featsharp.implicit.objective import score_reconstruction
    from featsharp.memory import keep_freed_memory
    from featsharp.ops.resize import resize

    keep_freed_memory()
    config = FitConfig(
        **{
            key: getattr(arguments, key)
            for key in ("views", "dim", "render", "downsampler", "frequencies", "start", "seed")
        }
    )
    stem = fit_name(arguments.image.stem, ".safetensors").removesuffix(".safetensors")
    file, features_file, picture_file = (arguments.output / (stem + end) for end in (".pth", ".safetensors", ".png"))
    image = decode_image(arguments.image)
    protect_files([(features_file, file), (picture_file, file)], [arguments.image])
    fitter = Fitter(
        create_backbone(arguments.backbone).to(find_device(arguments.device)),
        image,
        config,
        size=arguments.size,
        resume=file if file.exists() else None,
        progress=with_progress,
    )
    fitter.run(arguments.steps, file)
    low_res, high_res = fitter.low_res(), fitter.fitted.features(arguments.query)
    save_features(features_file, image, low_res, high_res)
    try:
        save_comparison(picture_file, image, low_res, high_res, "fitted")
    except InputError as error:
        raise InputError(f"{features_file} is written, but there is no picture: {error}") from error
    say(str(features_file))
    targets, views = fitter.held_out_views(HELD_OUT_VIEWS)
    maps = {"fitted": fitter.fitted.features(fitter.render_size), "bilinear": resize(low_res, fitter.render_size)}
    say(
        f"on {HELD_OUT_VIEWS} other views: "
        + "; ".join(_line(label, score_reconstruction(features, targets, views)) for label, features in maps.items())
    )


def _line(label: str, score: "Reconstruction") -> str:
    return f"{label} fidelity {score.fidelity:.3f}, cosine {score.cosine:.4f}"
