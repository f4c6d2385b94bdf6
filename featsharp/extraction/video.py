"""Videos, frame by frame: upright pictures with their times; what cannot be decoded is a reason, never the end.

Frames are decoded one after the other, so memory does not grow with the length. Sound is not read.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple, TypeAlias

from PIL import Image

from featsharp.errors import DataError, MissingDependencyError

# A path, or what opens the file.
VideoFile: TypeAlias = Path | Callable[[], IO[bytes]]
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}  # counter-clockwise, as are the degrees of FFmpeg


class Frame(NamedTuple):
    """A frame: an upright RGB picture, and when it is shown, in seconds from an arbitrary zero; None: not known."""

    picture: Image.Image
    time: Fraction | None


def import_av() -> Any:
    """Import PyAV; raises MissingDependencyError with the command that installs it."""
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError('videos need: pip install "featsharp[video]"') from error
    return av


def open_video(file: VideoFile, name: str, block: ExitStack) -> Any:
    """Open a video until the end of the block: a container of PyAV with at least one stream of pictures.

    Raises:
        DataError: For a file that is no video.
        MissingDependencyError: Without PyAV.
    """
    av = import_av()
    source: str | IO[bytes] = str(file) if isinstance(file, Path) else block.enter_context(file())
    try:
        container = block.enter_context(av.open(source))
    except Exception as error:
        raise DataError(f"{name}: cannot be opened as a video ({type(error).__name__}: {error})") from error
    if not container.streams.video:
        raise DataError(f"{name}: has no pictures, only {len(container.streams)} other streams")
    return container


def decode_frames(container: Any) -> Iterator[Frame | str]:
    """Decode the frames of a video in the order in which they are shown; a reason in place of one that is broken."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    packets, missing = container.demux(stream), 0
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            break
        except Exception as error:  # what comes after it cannot be found
            yield f"the file cannot be read on ({type(error).__name__}: {error})"
            break
        missing += packet.size > 0
        try:
            frames = packet.decode()
        except EOFError:  # the decoder is empty: the packet that asked for it is the last one
            break
        except Exception as error:
            missing -= 1
            yield f"cannot be decoded ({type(error).__name__}: {error})"
            continue
        for frame in frames:
            missing -= 1
            yield "the frame is damaged" if frame.is_corrupt else Frame(_upright(frame), _time_of(frame))
    for _ in range(missing):  # decoders with threads end without a word about the last ones
        yield "cannot be decoded"


class Video:
    """Frames of a video as pictures by number: reading them in order costs one decoding each.

    Keys are ``clip.mp4/000123``.
    """

    KEPT = 64  # frames that were passed on the way to a later one, for threads that come a little late

    def __init__(self, name: str, source: VideoFile) -> None:
        self.name, self._source = name, source
        self.skipped: list[tuple[str, str]] = []
        self._lock = Lock()
        self._frames: Iterator[Frame | str] = iter(())
        self._next = 0
        self._passed: dict[int, Frame | str] = {}
        self._block = ExitStack()
        self._count = self._count_frames()

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        return f"{self.name}/{index:06d}"

    def size(self, index: int) -> int:
        return self._source.stat().st_size if isinstance(self._source, Path) else -1

    def picture(self, index: int) -> Image.Image:
        with self._lock:
            frame = self._passed.pop(index, None) or self._decode(index)
        if isinstance(frame, str):
            raise DataError(f"{self.key(index)}: {frame}")
        return frame.picture

    def _decode(self, index: int) -> Frame | str:
        if index < self._next or not self._next:
            self._block.close()
            self._frames, self._next = decode_frames(open_video(self._source, self.name, self._block)), 0
            self._passed.clear()
        for frame in self._frames:
            self._next += 1
            if self._next > index:
                return frame
            if index - self._next < self.KEPT:
                self._passed[self._next - 1] = frame
            while len(self._passed) > self.KEPT:
                del self._passed[min(self._passed)]
        return "the video ends before it"

    def _count_frames(self) -> int:
        with ExitStack() as block:
            container = open_video(self._source, self.name, block)
            try:
                count = sum(packet.size > 0 for packet in container.demux(video=0))
            except Exception as error:
                raise DataError(f"{self.name}: cannot be read ({type(error).__name__}: {error})") from error
        if not count:
            raise DataError(f"{self.name}: a video without a frame")
        return count


def _upright(frame: Any) -> Image.Image:
    """Convert to RGB, turned as the file says that it is shown."""
    image: Image.Image = frame.to_image()
    turn = _TURNS.get(round(frame.rotation / 90) * 90 % 360)
    return image if turn is None else image.transpose(turn)


def _time_of(frame: Any) -> Fraction | None:
    return None if frame.pts is None or frame.time_base is None else frame.pts * Fraction(frame.time_base)
