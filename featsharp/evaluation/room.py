"""Room: do points of a real scene find themselves in another view of it?

Two frames of an RGB-D camera with known poses give correspondences without any annotation: a pixel of the first is
moved into space by its depth and projected into the second. Its feature is compared with those of 64 x 64 cells of the
second picture (see ``matching``), and the centre of the most similar one is the match:

    room@10, room@20     share of points that are matched nearer than 10 and 20 pixels, of a picture 640 pixels wide

Points. For each pair 400 pixels are drawn, off the border; those count that have a depth of 0.3 to 4 metres, and are
seen by the second frame, off its border and at the depth that they should have there to 4 centimetres, so that nothing
stands before them. Pairs of fewer than 30 points are skipped. Frames are paired with the next and the one after.

The depths are those of integer pixel positions, of which intrinsics speak; features are read at the pixels' centres. So
a target lies half a pixel up and left of where a match of the source's centre would be, and its depth is read in the
pixel that it is rounded down to: kept, so that numbers stay comparable with earlier ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from featsharp.errors import DataError
from featsharp.evaluation.estimates import estimate_ratio
from featsharp.evaluation.features import find_low_res_size
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.layouts.rgbd import (
    INTRINSICS,
    RgbdFrame,
    find_frames,
    read_depth,
    read_intrinsics,
    read_pose,
)
from featsharp.evaluation.matching import NearestCell
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task
from featsharp.model import SharpEncoder
from featsharp.settings import setting

# Distances between the frames of a pair, in frames.
GAPS = (1, 2)
# Pixels drawn for a pair, the seed of all pairs' numbers, and the fewest points of a pair.
DRAWN, SEED, FEWEST = 400, 0, 30
# Allowed distances in pixels, and the width of the picture that these are of.
PIXELS, WIDTH = (10, 20), 640
# Pixels to the border, of points in the source and in the target.
SOURCE_BORDER, TARGET_BORDER = 8, 4
# Metres: depths of source points, the least depth in the target, and how well it must agree.
NEAREST, FARTHEST, TARGET_NEAREST, TOLERANCE = 0.3, 4.0, 0.2, 0.04


class FramePair(NamedTuple):
    """Two frames, and pixels [DRAWN] of the first, rows v and columns u."""

    source: RgbdFrame
    target: RgbdFrame
    v: np.ndarray
    u: np.ndarray


class SeenPoints(NamedTuple):
    """Points that both frames see: [K, 2] each, (x, y) in pixels, integers in the source."""

    source: np.ndarray
    target: np.ndarray
    frame_size: tuple[int, int]  # (h, w) in pixels


@dataclass
class RoomTask(Task):
    """Correspondence between real views of a room, from depth and camera poses."""

    name: ClassVar[str] = "room"

    data: Path = setting(Path("."), "folder of RGB-D frames", type=Path, metavar="DIR", required=True)
    every: int = setting(4, "only every N-th frame", type="count", metavar="N")
    low_res_size: tuple[int, int] | None = setting(
        None, "size of the low-resolution pass; default: the backbone's native one", type="size", metavar="HxW"
    )
    limit: int | None = setting(None, "only N pairs, spread evenly over their list", type="count", metavar="N")
    seed: int = setting(SEED, "of the points", type=int, metavar="N")

    def items(self) -> list[Item]:
        frames = find_frames(self.data)[:: self.every]
        height, width = self._size(frames)
        rng = np.random.default_rng(self.seed)
        pairs: dict[tuple[int, int], FramePair] = {}
        for gap in GAPS:
            for first in range(len(frames) - gap):
                v, u = (rng.integers(SOURCE_BORDER, side - SOURCE_BORDER, DRAWN) for side in (height, width))
                pairs[first, gap] = FramePair(frames[first], frames[first + gap], v, u)
        # Pairs of the same frames together, which then are encoded once.
        chosen = spread([pairs[key] for key in sorted(pairs)], self.limit)
        return [Item(f"{pair.source.color.name}-{pair.target.color.name}", pair) for pair in chosen]

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> NearestCell:
        return NearestCell(encoder, find_low_res_size(encoder, self.low_res_size), from_grid=True)

    def measure(self, encoder: SharpEncoder, item: Item, head: NearestCell) -> Row:
        pair: FramePair = item.data
        points = find_common_points(pair, self._intrinsics)
        frame = Frame("its depth", points.frame_size)
        source, target = (head.encode(one.color, frame) for one in (pair.source, pair.target))
        matched = head.match(source, target, points.source + 0.5)
        distances = np.linalg.norm(matched - points.target, axis=1) * (WIDTH / points.frame_size[1])
        return {"points": len(distances), "hits": [int((distances < pixels).sum()) for pixels in PIXELS]}

    def score(self, rows: Sequence[Row], head: NearestCell) -> Summary:
        counts = [row["points"] for row in rows]
        scores = {
            f"room@{pixels}": estimate_ratio([row["hits"][number] for row in rows], counts)
            for number, pixels in enumerate(PIXELS)
        }
        return {**scores, "points": sum(counts), "pairs": len(rows)}

    def item_key(self, item: Item) -> object:
        files = [path for frame in item.data[:2] for path in frame] + [self.data / INTRINSICS]
        return [file_key(path.parent, path.name) for path in files]

    @cached_property
    def _intrinsics(self) -> np.ndarray:
        return read_intrinsics(self.data)

    def _size(self, frames: Sequence[RgbdFrame]) -> tuple[int, int]:
        """Return (h, w) of the first frame whose depth can be read; all must have it."""
        problem: DataError | None = None
        for frame in frames:
            try:
                height, width = read_depth(frame.depth).shape
            except DataError as error:
                problem = problem or error
            else:
                if min(height, width) <= 2 * SOURCE_BORDER:
                    raise DataError(
                        f"{frame.depth}: {height}x{width} pixels are too few; more than {2 * SOURCE_BORDER}"
                    )
                return height, width
        assert problem is not None
        raise problem


def find_common_points(pair: FramePair, intrinsics: np.ndarray) -> SeenPoints:
    """Project the pixels of a pair from its source into its target, and keep those that both see.

    Raises:
        DataError: For files that are missing or damaged, frames of different sizes, and fewer than 30 points.
    """
    depths = [read_depth(frame.depth) for frame in (pair.source, pair.target)]
    poses = [read_pose(frame.pose) for frame in (pair.source, pair.target)]
    height, width = depths[0].shape
    if depths[1].shape != depths[0].shape or max(pair.v) >= height or max(pair.u) >= width:
        raise DataError(f"{pair.target.depth}: all frames of a folder have one size; this one differs")
    z = depths[0][pair.v, pair.u]
    measured = (z > NEAREST) & (z < FARTHEST)
    v, u, z = pair.v[measured], pair.u[measured], z[measured]
    (fx, _, cx), (_, fy, cy) = intrinsics[:2]
    space = np.stack([(u - cx) / fx * z, (v - cy) / fy * z, z, np.ones_like(z)])
    x, y, depth, _ = np.linalg.inv(poses[1]) @ poses[0] @ space
    ahead = np.maximum(depth, 1e-3)
    x, y = x / ahead * fx + cx, y / ahead * fy + cy
    seen = (x > TARGET_BORDER) & (x < width - TARGET_BORDER) & (y > TARGET_BORDER) & (y < height - TARGET_BORDER)
    seen &= depth > TARGET_NEAREST
    seen[seen] = np.abs(depths[1][y[seen].astype(int), x[seen].astype(int)] - depth[seen]) < TOLERANCE
    if seen.sum() < FEWEST:
        raise DataError(f"both frames see {seen.sum()} of {DRAWN} points; {FEWEST} are needed")
    return SeenPoints(np.stack([u, v], 1)[seen], np.stack([x, y], 1)[seen], (height, width))
