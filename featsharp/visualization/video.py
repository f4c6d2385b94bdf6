"""Videos of features: each frame beside its low-resolution and sharp features, in one PCA basis over all of time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.errors import ConfigError, DataError
from featsharp.extraction.sources import open_pictures
from featsharp.extraction.video import Frame, decode_frames, import_av, open_video
from featsharp.files import cannot_write, replacing
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.visualization.panels import compare_maps
from featsharp.visualization.pca import FeaturePCA

# Formats of FFmpeg by ending; and frames to which the basis is fitted.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
BASIS_FRAMES = 16
# Ticks per second, a multiple of all common frame rates; and the rate of a video that does not say its own.
TICKS, USUAL_RATE = 90_000, 25


class VideoReport(NamedTuple):
    """Counts of a video that was written: ``broken`` has the reasons of frames that are not in it."""

    frames: int
    broken: list[str]
    basis_frames: int


def write_comparison_video(
    encoder: SharpEncoder,
    source: Path,
    target: Path,
    *,
    every: int = 1,
    limit: int | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 4,
    on_frame: Callable[[str], object] = lambda text: None,
) -> VideoReport:
    """Write a video of frames beside their features; memory does not grow with its length.

    Frames are turned upright and keep their times, so the video is as long as the source, whatever its frame rate.
    There is no sound.

    Args:
        encoder: On its device.
        source: The video.
        target: A file that ends in one of :data:`CONTAINERS`; H.264.
        every: Takes every n-th frame only.
        limit: Takes the first so many of these only.
        size: As for :meth:`SharpEncoder.encode_image`.
        batch: Frames per pass of the backbone.
        on_frame: Called after each frame with the number of broken ones so far, as text.

    Raises:
        ConfigError: For another ending.
        DataError: For a source that is no video, or has no frame that can be decoded.
        FeatSharpError: When the file cannot be written.
    """
    if target.suffix.lower() not in CONTAINERS:
        raise ConfigError(f"a video of features ends in {', '.join(CONTAINERS)}; got {target.name!r}")
    basis, basis_frames = _fit_basis(encoder, source, every, limit, size)
    broken: list[str] = []
    try:
        with ExitStack() as block:
            container = open_video(source, source.name, block)
            frames = _keep_readable(islice(decode_frames(container), 0, None, every), limit, broken)
            writer = block.enter_context(
                _Writer(block.enter_context(replacing(target, sync=True)), target, container.streams.video[0])
            )
            while some := list(islice(frames, batch)):
                outs = encoder.encode_image([frame.picture for frame in some], size=size)
                for frame, out in zip(some, outs, strict=True):
                    image = image_to_tensor(frame.picture)
                    writer.add(compare_maps(image, out.low_res, out.high_res, basis, encoder.caption), frame.time)
                    on_frame(f"{len(broken)} broken" if broken else "")
    except OSError as error:
        raise cannot_write(target, error) from error
    return VideoReport(writer.count, broken, basis_frames)


def _keep_readable(frames: Iterable[Frame | str], limit: int | None, broken: list[str]) -> Iterator[Frame]:
    """Yield the frames among the first ``limit``; what was wrong with the others goes to ``broken``."""
    for frame in islice(frames, limit):
        if isinstance(frame, str):
            broken.append(frame)
        else:
            yield frame


def _fit_basis(
    encoder: SharpEncoder, source: Path, every: int, limit: int | None, size: tuple[int, int] | None
) -> tuple[FeaturePCA, int]:
    """Fit a basis to the low-resolution features of frames that are spread over the video; returns their number too."""
    pictures = open_pictures(source, every, limit)
    count, maps, reason = len(pictures), [], ""
    for index in sorted({number * count // BASIS_FRAMES for number in range(BASIS_FRAMES)}):
        try:
            maps.append(encoder.encode_image(pictures.picture(index), size=size).low_res)
        except DataError as error:
            reason = str(error)
    if not maps:
        raise DataError(f"{source}: none of {min(count, BASIS_FRAMES)} frames can be decoded; the last: {reason}")
    # As one map of one row, since a stream may change its size.
    return FeaturePCA(torch.cat([one.flatten(2) for one in maps], 2)[:, :, None]), len(maps)


class _Writer:
    """A file of H.264 to which pictures [3, H, W] in [0, 1] are added with their times; the first gives the size."""

    def __init__(self, file: IO[bytes], target: Path, source: Any) -> None:
        self._av, self.count = import_av(), 0
        self._container = self._av.open(file, "w", format=CONTAINERS[target.suffix.lower()])
        self._rate = Fraction(source.average_rate or source.guessed_rate or USUAL_RATE)
        self._stream: Any = None
        self._first: Fraction | None = None
        self._last = -1

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is not None and error[0] is None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def add(self, picture: Tensor, time: Fraction | None) -> None:
        pixels = F.pad(picture, (0, picture.shape[2] % 2, 0, picture.shape[1] % 2), value=1.0)  # H.264 takes even sides
        if self._stream is None:
            self._stream = self._container.add_stream("h264", rate=self._rate, options={"crf": "18"})
            self._stream.height, self._stream.width = size_of(pixels)
            self._stream.pix_fmt = "yuv420p"
            self._stream.time_base = self._stream.codec_context.time_base = Fraction(1, TICKS)
        pixels = resize(pixels[None], (self._stream.height, self._stream.width))[0]
        array = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
        frame = self._av.VideoFrame.from_ndarray(array, format="rgb24")
        if time is None:
            ticks = self._last + round(TICKS / self._rate) if self.count else 0
        else:
            self._first = time if self._first is None else self._first
            ticks = round((time - self._first) * TICKS)
        self._last = max(ticks, self._last + 1)  # times of damaged files may go back
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))
        self.count += 1
