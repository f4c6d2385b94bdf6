"""Write the images of a folder to webdataset shards.

featsharp pack photos shards
"""

import argparse
from pathlib import Path

from featsharp.cli.arguments import check_inputs, parse_count
from featsharp.terminal import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", help="folder of images, nested as you like")
    parser.add_argument("out", help="folder for the shards")
    parser.add_argument("--images-per-shard", type=parse_count, default=1000)
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in the folder")


def run(arguments: argparse.Namespace) -> None:
    check_inputs([Path(arguments.images)])
    from featsharp.data.pack import pack_images

    report = pack_images(
        arguments.images, arguments.out, images_per_shard=arguments.images_per_shard, overwrite=arguments.overwrite
    )
    damage = f", damage in the input: {len(report.problems)}" if report.problems else ""
    say(f"{report.written} images in {report.shards} shards, {len(report.skipped)} skipped{damage}")
