"""Sharp features of images.

    featsharp upsample photo.jpg
    featsharp upsample photo.jpg --backbone dinov2-s --checkpoint "views-2x?passes=16"
    featsharp upsample photos --checkpoint last.pth -o features

Without --checkpoint it takes what is known to be best for the backbone (`featsharp eval pareto`) at a cost of at most
five passes through it; for other backbones views-2x?passes=4. For better features at more cost: 8 or 16 passes; in less
time: 2 passes, or bilinear-2x; `featsharp eval recommend` compares what there is.

For each image NAME, writes NAME.png (image, low-resolution and sharp features in one PCA basis) and NAME.safetensors
with low_res [C, h, w] and high_res [C, H, W], float32, in the backbone's own space (in normalised space where the
normalizer has no inverse). Both cover the whole image: cell (y, x) of an (H, W) map is centred at pixel
((y + 0.5) / H, (x + 0.5) / W) of the image's height and width.

An image of any size and shape is scaled as a whole, never cropped, so that the low-resolution pass has about as many
tokens as at the backbone's native size; the line printed for each image says how many, and how many cells the sharp map
has. For more tokens and cells give --size: the image's size in pixels keeps every detail. --output-size changes the
cells alone: "pixels" makes one for each pixel of the image, chunk by chunk into the file (4 bytes per channel and
pixel), within 2GiB or --max-memory.

With a backbone of open_clip, --text "a photo of a dog" adds a row to the picture: how similar each feature is to it.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featsharp.cli.arguments import (
    DEFAULT_BACKBONE,
    add_backbone,
    add_device,
    check_inputs,
    parse_size,
    protect_files,
)
from featsharp.errors import DataError, FeatSharpError, InputError, explain, out_of_memory
from featsharp.files import check_writable, free_name
from featsharp.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from featsharp.model import OutputSize, SharpEncoder

# Limit for a cell per pixel: of 384 channels, the map of a 12-megapixel picture has 18 GiB.
PIXELS_MEMORY = "2GiB"
_FEATURES = ".safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument(
        "--checkpoint",
        help="a trained file; shipped weights; or NAME-FACTORx?OPTION=VALUE with --backbone; default: the best of at "
        "most five passes",
    )
    add_backbone(parser, f"default: the checkpoint's own, else {DEFAULT_BACKBONE}")
    parser.add_argument("-o", "--output", type=Path, default=Path("features"), metavar="DIR", help="default: features")
    parser.add_argument(
        "--size", type=parse_size, metavar="HxW", help="pixels to scale images to, for more tokens and cells"
    )
    parser.add_argument(
        "--output-size",
        type=lambda text: text if text == "pixels" else parse_size(text),
        metavar="HxW",
        help="cells of the sharp map, or 'pixels' for one per pixel of the image; default: by the factor",
    )
    parser.add_argument(
        "--max-memory",
        metavar="AMOUNT",
        help=f"most memory to encode in, for example 2GiB; features go straight to disk; for pixels: {PIXELS_MEMORY}",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="a row of the picture with the similarity to this text, for backbones of open_clip; may be repeated",
    )
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    check_inputs(arguments.images, filter(None, [arguments.checkpoint]))
    check_writable(arguments.output)
    from featsharp.backbones.open_clip_text import project_to_text
    from featsharp.cli.loading import embed_texts, load_encoder
    from featsharp.memory import keep_freed_memory
    from featsharp.upsamplers.chunked import works_in_chunks

    if arguments.max_memory is None:
        keep_freed_memory()
    if arguments.text and arguments.backbone is not None:
        arguments.backbone = project_to_text(arguments.backbone)
    encoder = load_encoder(arguments, "upsample", max_memory=arguments.max_memory)
    texts = dict(zip(arguments.text, embed_texts(encoder, arguments.text), strict=True)) if arguments.text else None
    if arguments.output_size == "pixels" and encoder.max_memory is None and works_in_chunks(encoder.upsampler):
        encoder.max_memory = PIXELS_MEMORY
    problems: list[tuple[str, str]] = []
    jobs = list(_jobs(arguments.images, arguments.output, problems))
    for name, reason in problems:
        say(f"featsharp upsample: {name}: {reason}", error=True)
    if not jobs:
        raise DataError(f"no image in {', '.join(map(str, arguments.images))}")
    protect_files((_results(target) for _, target in jobs), (source for source, _ in jobs))
    written = 0
    hint = "  (for more: --size HxW)" if arguments.size is None else ""
    for number, (source, target) in enumerate(jobs):
        try:
            grids = upsample_file(
                encoder, source, target, size=arguments.size, output_size=arguments.output_size, texts=texts
            )
        except (DataError, InputError) as error:
            # One bad image never ends the work on the others.
            say(f"featsharp upsample: {source}: {str(error).removeprefix(f'{source}: ')}", error=True)
        except (MemoryError, RuntimeError) as error:  # one that is too large for the memory does not either
            if not out_of_memory(error):
                raise
            say(f"featsharp upsample: {source}: {explain(error)}", error=True)
        except FeatSharpError as error:
            rest = f"{written} of {len(jobs)} images are written, {len(jobs) - number} not"
            raise FeatSharpError(f"{error}; {rest}" if len(jobs) > 1 else str(error)) from error
        else:
            say(f"{target}.safetensors  {grids}{hint}")
            written, hint = written + 1, ""
    if written == len(jobs) and not problems:
        return 0
    if len(jobs) + len(problems) > 1:
        unread = f"; {len(problems)} folders or files could not be looked into" if problems else ""
        failed = len(jobs) - written
        say(f"featsharp upsample: {written} of {len(jobs)} images written, {failed} failed{unread}", error=True)
    return 1


def upsample_file(
    encoder: "SharpEncoder",
    source: Path,
    target: Path,
    *,
    size: tuple[int, int] | None = None,
    output_size: "OutputSize | None" = None,
    texts: "Mapping[str, Tensor] | None" = None,
) -> str:
    """Write ``target``.safetensors and ``target``.png for one image file; returns the sizes of image and maps."""
    from featsharp.cli.results import metadata_of, save_comparison, save_features
    from featsharp.data.images import decode_image
    from featsharp.evaluation.features import check_finite
    from featsharp.extraction.mapped import MappedFeatures
    from featsharp.visualization.panels import size_text

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
        save_comparison(picture_file, image, low_res, out.high_res, encoder.caption, texts)
    except InputError as error:
        raise InputError(f"{features_file} is written, but there is no picture: {error}") from error
    return f"{image.height}x{image.width} pixels -> {size_text(out.low_res)} tokens -> {size_text(out.high_res)} cells"


def _jobs(paths: list[Path], output: Path, problems: list[tuple[str, str]]) -> Iterator[tuple[Path, Path]]:
    """Yield image files with the stems of their results; folders keep their structure.

    ``problems`` takes (path, reason) of what cannot be read.
    """
    from featsharp.data.sources import list_images

    taken: set[str] = set()
    seen: set[Path] = set()
    for path in paths:
        if path.is_dir():
            names = list_images(path, problems)
            if not names and not problems:
                raise DataError(f"{path} holds no image; it should contain .jpg, .png or other pictures")
            pairs = [(path / name, output / name) for name in names]
        else:
            pairs = [(path, output / path.name)]
        for source, target in pairs:
            if source not in seen:
                seen.add(source)
                yield source, free_name(target, taken, _FEATURES)


def _results(target: Path) -> tuple[Path, Path]:
    """Name the files of picture and features of a job."""
    return target.with_name(target.name + ".png"), target.with_name(target.name + _FEATURES)
