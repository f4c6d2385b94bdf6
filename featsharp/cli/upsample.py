"""Sharp features of images.

    featsharp upsample photo.jpg                        with the weights that come with the package
    featsharp upsample photo.jpg --checkpoint last.pth -o features
    featsharp upsample photos --checkpoint tile-2x --backbone vits14-focus -o features

For each image NAME, writes NAME.png (image, low-resolution and sharp features in one PCA basis) and NAME.safetensors
with low_res [C, h, w] and high_res [C, H, W], float32, in the backbone's own space (in normalised space where the
normalizer has no inverse). Both cover the whole image: cell (y, x) of an (H, W) map is centred at pixel
((y + 0.5) / H, (x + 0.5) / W) of the image's height and width.

An image of any size and shape is scaled as a whole, never cropped, so that the low-resolution pass has about as many
tokens as at the backbone's native size; the line printed for each image says how many, and how many cells the sharp map
has. For more tokens and cells give --size: the image's size in pixels keeps every detail. --output-size changes the
cells alone.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featsharp.cli.arguments import add_backbone, add_device, check_inputs, parse_size, protect_files
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.weights import DEFAULT

if TYPE_CHECKING:
    from featsharp.model import SharpEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument(
        "--checkpoint",
        default=DEFAULT,
        help=f"a trained file; shipped weights; or NAME-FACTORx with --backbone; default: {DEFAULT}",
    )
    add_backbone(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("features"), metavar="DIR", help="default: features")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="pixels to scale images to, for more tokens and cells"
    )
    parser.add_argument(
        "--output-size", type=parse_size, metavar="HxW", help="cells of the sharp map; default: by the factor"
    )
    parser.add_argument(
        "--max-memory",
        metavar="AMOUNT",
        help="most memory to encode in, for example 2GiB; features go straight to disk",
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    check_inputs(arguments.images, [arguments.checkpoint])
    from featsharp.builder import load_from_file
    from featsharp.device import find_device
    from featsharp.memory import keep_freed_memory

    if arguments.max_memory is None:
        keep_freed_memory()
    encoder = load_from_file(
        arguments.checkpoint,
        featurizer=arguments.backbone,
        max_memory=arguments.max_memory,
        allow_functions=arguments.allow_functions,
    ).to(find_device(arguments.device))
    jobs = list(_jobs(arguments.images, arguments.output))
    if not jobs:
        raise DataError(f"no image in {', '.join(map(str, arguments.images))}")
    protect_files((_results(target) for _, target in jobs), (source for source, _ in jobs))
    failed = 0
    hint = "  (for more: --size HxW)" if arguments.size is None else ""
    for source, target in jobs:
        try:
            grids = upsample_file(encoder, source, target, size=arguments.size, output_size=arguments.output_size)
        except (DataError, InputError) as error:
            # One bad image never ends the work on the others.
            print(f"featsharp upsample: {source}: {str(error).removeprefix(f'{source}: ')}", file=sys.stderr)
            failed += 1
        else:
            print(f"{target}.safetensors  {grids}{hint}", flush=True)
            hint = ""
    return 1 if failed else 0


def upsample_file(
    encoder: "SharpEncoder",
    source: Path,
    target: Path,
    *,
    size: tuple[int, int] | None = None,
    output_size: tuple[int, int] | None = None,
) -> str:
    """Write ``target``.safetensors and ``target``.png for one image file; returns the sizes of image and maps."""
    from featsharp.cli.results import metadata_of, save_comparison, save_features, size_text
    from featsharp.data.images import decode_image
    from featsharp.evaluation.features import check_finite
    from featsharp.extraction.mapped import MappedFeatures

    image = decode_image(source)
    picture_file, features_file = _results(target)
    if encoder.max_memory is None:
        out = encoder.encode_image(image, size=size, output_size=output_size)
        save_features(features_file, image, out.low_res, out.high_res)
    else:
        with MappedFeatures(features_file, metadata_of(image)) as file:
            out = encoder.encode_image(image, size=size, output_size=output_size, allocate=file.allocate)
            check_finite(out.high_res)
    try:
        low_res = out.low_res.to(out.high_res.device)  # a file is mapped on the CPU
        save_comparison(picture_file, image, low_res, out.high_res, encoder.caption)
    except InputError as error:
        raise InputError(f"{features_file} is written, but there is no picture: {error}") from error
    return f"{image.height}x{image.width} pixels -> {size_text(out.low_res)} tokens -> {size_text(out.high_res)} cells"


def _jobs(paths: list[Path], output: Path) -> Iterator[tuple[Path, Path]]:
    """Yield image files with the stems of their results; folders keep their structure, without hidden files."""
    from featsharp.data.images import is_image_name
    from featsharp.data.sources import walk_files

    taken: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            names = sorted(filter(is_image_name, walk_files(path, [])))
            if not names:
                raise DataError(f"{path} holds no image; it should contain .jpg, .png or other pictures")
            pairs = [(path / name, output / name) for name in names]
        else:
            pairs = [(path, output / path.name)]
        for source, target in pairs:
            # photo.jpg and photo.png must not share a result.
            short = target.with_suffix("")
            result = short if taken.setdefault(short, source) == source else target
            if result is target and taken.setdefault(target, source) != source:
                raise ConfigError(f"{source} and {taken[target]} would write the same result; use two output folders")
            yield source, result


def _results(target: Path) -> tuple[Path, Path]:
    """Name the files of picture and features of a job."""
    return target.with_name(target.name + ".png"), target.with_name(target.name + ".safetensors")
