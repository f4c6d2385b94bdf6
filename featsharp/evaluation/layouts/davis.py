"""Video clips: DAVIS 2016 and 2017, or folders of frames.

ROOT/JPEGImages/480p/CLIP/NNNNN.jpg        or 1080p, Full-Resolution; the smallest is taken
ROOT/Annotations/480p/CLIP/NNNNN.png       0 background; object numbers, or 255 for the one object of 2016
ROOT/ImageSets/2017/val.txt                names of clips, also below 2016; without it all folders of frames are clips
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from featsharp.data.images import is_image_name
from featsharp.errors import DataError
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.label_files import read_label_file
from featsharp.files import list_files, read_lines

LAYOUT = "expected JPEGImages/480p/CLIP/NNNNN.jpg and Annotations/480p/CLIP/NNNNN.png"
_RESOLUTIONS = ("480p", "1080p", "Full-Resolution")
_LISTS = ("2017", "2016")
# The only object of DAVIS 2016; beside others, pixels that no object has.
VOID = 255


class Clip(NamedTuple):
    """A clip: its name, its frames in order, and the folder of their masks."""

    name: str
    frames: list[Path]
    masks: Path

    def mask(self, number: int) -> Path:
        """Return the file of the objects of a frame."""
        return self.masks / f"{self.frames[number].stem}.png"


def find_masked_clips(root: Path) -> list[Clip]:
    """List the clips of DAVIS, those of its list "val" where it has one; no file of a frame is opened.

    Raises:
        DataError: When the folder has another layout, and for a list that names no clip.
    """
    for resolution in _RESOLUTIONS:
        frames, masks = root / "JPEGImages" / resolution, root / "Annotations" / resolution
        if frames.is_dir() and masks.is_dir():
            break
    else:
        raise DataError(f"{root} has no clips with masks; {LAYOUT}")
    lists = [path for year in _LISTS if (path := root / "ImageSets" / year / "val.txt").is_file()]
    if lists:
        # Those of 2016 name clips by lines, or files: /JPEGImages/480p/CLIP/NNNNN.jpg
        names = [Path(line.split()[0]) for line in read_lines(lists[0]) if line]
        wanted = list(dict.fromkeys(path.parent.name if path.suffix else path.name for path in names))
    else:
        wanted = sorted(path.name for path in frames.iterdir() if path.is_dir())
    if not wanted:
        raise DataError(f"{lists[0] if lists else frames} has no clip; {LAYOUT}")
    return [Clip(name, _frames(frames / name), masks / name) for name in wanted]


def find_clips(root: Path) -> list[Clip]:
    """List the clips of DAVIS, or of folders of frames; DataError where there is none."""
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {LAYOUT}, or folders of frames")
    if (root / "JPEGImages").is_dir():
        return find_masked_clips(root)
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
    clips = [Clip(folder.name, frames, folder) for folder in folders if (frames := _frames(folder))]
    if not clips:
        raise DataError(f"{root} has no frames; {LAYOUT}, or folders of frames")
    return clips


def read_objects(path: Path) -> tuple[np.ndarray, Frame]:
    """Read the object number of each pixel [H, W], 0 for none, and the pixels of the frame that they lie on.

    Raises:
        DataError: When it is missing or damaged.
    """
    values, frame, _ = read_label_file(path, f"{path.parent.name}/{path.name}")
    if values.max(initial=0) > VOID:
        raise DataError(f"{path.parent.name}/{path.name}: objects are numbers up to {VOID}, got {values.max()}")
    return values, frame


def _frames(folder: Path) -> list[Path]:
    names = list_files(folder, deep=False) if folder.is_dir() else []
    return [folder / name for name in names if is_image_name(name)]
