"""Sharp features of a video.

    featsharp video clip.mp4 -o features.mp4
    featsharp video clip.mp4 -o features.mp4 --backbone dinov2-s --upsampler "views-2x?passes=4" --every 2 --limit 500
    featsharp video clip.mp4 --features DIR --backbone dinov2-s

-o writes a video (H.264, no sound): each frame beside its low-resolution and sharp features, in the colours of one PCA
basis for all of it, fitted to 16 frames that are spread over the video. Frames are turned upright and keep their times,
also those of a variable frame rate. --features writes the sharp features of every frame to a store instead, as
`featsharp extract` does, which has more options; both work frame by frame, in the same memory for any length. A frame
that cannot be decoded is left out and counted.
"""

import argparse
from pathlib import Path

from featsharp.cli.arguments import (
    DEFAULT_BACKBONE,
    add_backbone,
    add_device,
    check_inputs,
    check_result,
    parse_count,
    parse_size,
    protect_files,
)
from featsharp.terminal import progress_bar, say

SHOWN = 5  # reasons of broken frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, metavar="VIDEO")
    result = parser.add_mutually_exclusive_group(required=True)
    result.add_argument("-o", "--output", type=Path, metavar="FILE", help="the video to write: .mp4, .mov or .mkv")
    result.add_argument("--features", type=Path, metavar="DIR", help="the store of features to write instead")
    parser.add_argument(
        "--upsampler",
        "--checkpoint",
        dest="checkpoint",
        metavar="NAME",
        help="an upsampler (bilinear-2x), shipped weights or a checkpoint; default: the best of at most five passes",
    )
    add_backbone(parser, f"default: the checkpoint's own, else {DEFAULT_BACKBONE}")
    parser.add_argument("--every", type=parse_count, default=1, metavar="N", help="every N-th frame only")
    parser.add_argument("--limit", type=parse_count, metavar="N", help="the first N of these only")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="pixels to scale frames to, for more cells")
    parser.add_argument("--batch", type=parse_count, default=4, metavar="N", help="frames per pass (%(default)s)")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    check_inputs([arguments.video])
    if arguments.output is not None:
        check_result(arguments.output)
        protect_files([(arguments.output, arguments.output)], [arguments.video])
    from featsharp.cli.loading import load_encoder
    from featsharp.memory import keep_freed_memory

    keep_freed_memory()
    encoder = load_encoder(arguments, "video")
    if arguments.features is not None:
        from featsharp.extraction import Options, extract

        store = extract(
            encoder,
            arguments.video,
            arguments.features,
            Options(size=arguments.size, every=arguments.every, limit=arguments.limit),
            batch=arguments.batch,
        )
        frames, broken = len(store), [reason for _, reason in store.skipped]
        say(f"{arguments.features}  features of {frames} frames, {len(broken)} broken")
    else:
        from featsharp.visualization.video import write_comparison_video

        with progress_bar("video", arguments.limit, unit="frame") as advance:
            report = write_comparison_video(
                encoder,
                arguments.video,
                arguments.output,
                every=arguments.every,
                limit=arguments.limit,
                size=arguments.size,
                batch=arguments.batch,
                on_frame=advance,
            )
        frames, broken = report.frames, report.broken
        say(
            f"{arguments.output}  {frames} frames, {len(broken)} broken; "
            f"one PCA basis, fitted to {report.basis_frames} frames"
        )
    for reason in broken[:SHOWN]:
        say(f"featsharp video: {reason}", error=True)
    return 0 if frames else 1
