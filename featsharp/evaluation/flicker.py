"""Flicker: do the features of a video change where the video does not?

Frames follow each other; a dense flow (iterative Lucas-Kanade, of scikit-image) says where each place of one is in the
next. With f(t) the sharp map of a frame and u the flow, over the cells where it can be trusted:

    feature_change     sum of |f(t+1, x + u) - f(t, x)|^2 / (2 x sum of the variance of f(t) over its cells): 0 where
                       features move with the picture, 1 for frames that have nothing to do with each other
    pixel_change       the same of the colours of the picture that the encoder is given
    flicker            their ratio: how much more the features change than the picture does

Intervals are over clips, whose pairs of frames are much alike; of one clip there are none.

The flow is trusted where it comes back: forward and then backward it ends less than a pixel from where it began.
``motion="none"`` is for cameras that stand still: then no flow is needed, and places are compared with themselves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from featsharp.data.images import decode_image
from featsharp.errors import DataError, MissingDependencyError
from featsharp.evaluation.estimates import bootstrap
from featsharp.evaluation.features import find_low_res_size, predict_raw, shown_size, whitened_picture
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.davis import find_clips
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.matching import sample_points
from featsharp.evaluation.runner import Item, Row, Summary, Task
from featsharp.memory import parse_memory
from featsharp.model import SharpEncoder
from featsharp.ops.resize import average, size_of
from featsharp.settings import setting
from featsharp.terminal import align

# Pixels that the flow may miss its beginning by, forward and backward.
TRUSTED = 1.0


RATIOS = ("feature_change", "pixel_change", "flicker")


class _Frame(NamedTuple):
    colours: Tensor  # [1, 3, H, W], as the encoder is given them
    features: Tensor  # [1, C, h, w]


class _Motion(NamedTuple):
    """Places of a frame in the next: [H, W, 2] float32 (x, y) in parts of the picture, and whether to trust it."""

    places: np.ndarray
    trusted: np.ndarray

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return self.places.nbytes + self.trusted.nbytes


@dataclass
class FlickerTask(Task):
    """Change of features along the motion of a video, against the change of its pixels."""

    name: ClassVar[str] = "flicker"

    data: Path = setting(Path("."), "folder of DAVIS, or folders of frames", type=Path, metavar="DIR", required=True)
    low_res_size: tuple[int, int] | None = setting(
        None,
        "size of the low-resolution pass; default: of the backbone's native area and the frame's aspect ratio",
        type="size",
        metavar="HxW",
    )
    motion: str = setting(
        "flow", "how places are followed: by optical flow, or not at all, for still cameras", choices=("flow", "none")
    )
    every: int = setting(1, "only every N-th pair of frames of each clip", type="count", metavar="N")
    limit: int | None = setting(None, "only N pairs, spread evenly over their list", type="count", metavar="N")
    flow_limit: str = setting("1GiB", "memory for flows that the next encoder uses again", metavar="SIZE")
    _motions: dict[Any, _Motion] = field(default_factory=dict, init=False, repr=False)

    def items(self) -> list[Item]:
        pairs = [
            Item(f"{clip.name}/{first.stem}-{second.stem}", (first, second))
            for clip in find_clips(self.data)
            for first, second in list(zip(clip.frames, clip.frames[1:], strict=False))[:: self.every]
        ]
        return spread(pairs, self.limit)

    def prepare(self, encoder: SharpEncoder, subject: Any, run: Any) -> dict[Path, _Frame]:
        return {}  # the last frames

    def measure(self, encoder: SharpEncoder, item: Item, head: dict[Path, _Frame]) -> Row:
        first, second = (self._encode(encoder, path, head) for path in item.data)
        if first.colours.shape != second.colours.shape:
            raise DataError("the frames have different sizes")
        motion = self._find_motion(item.data, first.colours, second.colours)
        of_features, of_colours = (
            _change(a, b, motion) for a, b in ((first.features, second.features), (first.colours, second.colours))
        )
        return {
            "clip": item.name.rpartition("/")[0],
            "feature_change": of_features[0] / max(of_features[1], 1e-12),
            "pixel_change": of_colours[0] / max(of_colours[1], 1e-12),
            "trusted": float(motion.trusted.mean()),
            "_sums": [*of_features, *of_colours],
        }

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        clips = list(dict.fromkeys(row["clip"] for row in rows))
        sums = {clip: np.sum([row["_sums"] for row in rows if row["clip"] == clip], axis=0) for clip in clips}
        pooled = np.array(list(sums.values()))
        many = len(clips) > 1
        return {
            **{
                name: bootstrap(pooled, partial(_pool_clips, name=name)) if many else value
                for name, value in _ratios(pooled.sum(0)).items()
                if np.isfinite(value)
            },
            "by_clip": {clip: {k: v for k, v in _ratios(one).items() if np.isfinite(v)} for clip, one in sums.items()},
            "trusted": float(np.mean([row["trusted"] for row in rows])),
            "clips": len(clips),
            "pairs": len(rows),
        }

    def table(self, encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Format each clip, where there are several."""
        results = {label: one["result"]["by_clip"] for label, one in encoders.items() if "result" in one}
        rows = [
            [label, clip, *(f"{ratios[name]:.4f}" if name in ratios else "-" for name in RATIOS)]
            for label, clips in results.items()
            for clip, ratios in clips.items()
        ]
        return align(["encoder", "clip", *RATIOS], rows) if len(rows) > len(results) else []

    def item_key(self, item: Item) -> object:
        return [file_key(path.parent, path.name) for path in item.data]

    def _encode(self, encoder: SharpEncoder, path: Path, last: dict[Path, _Frame]) -> _Frame:
        if path not in last:
            picture = decode_image(path)
            wanted = self.low_res_size or encoder.native_low_res_size((picture.height, picture.width))
            low_res = find_low_res_size(encoder, wanted)
            colours = whitened_picture(encoder, picture, shown_size(encoder, low_res))
            for old in list(last)[:-1]:
                del last[old]
            last[path] = _Frame(colours, predict_raw(encoder, colours, low_res, positional=False))
        return last[path]

    def _find_motion(self, paths: tuple[Path, Path], first: Tensor, second: Tensor) -> _Motion:
        key = (paths, size_of(first))  # one flow for all encoders
        if key not in self._motions:
            frames = [x[0].mean(0).cpu().numpy() for x in (first, second)]
            motion = still(size_of(first)) if self.motion == "none" else follow(*frames)
            if sum(one.bytes for one in self._motions.values()) + motion.bytes > parse_memory(self.flow_limit):
                return motion
            self._motions[key] = motion
        return self._motions[key]


def still(size: tuple[int, int]) -> _Motion:
    """Return places (h, w) that are where they were."""
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    return _Motion(np.stack([x / width, y / height], -1).astype(np.float32), np.ones(size, dtype=bool))


def follow(first: np.ndarray, second: np.ndarray) -> _Motion:
    """Find where the places of one grey picture [H, W] are in another; MissingDependencyError without scikit-image."""
    try:
        from skimage.registration import optical_flow_ilk
    except ImportError as error:
        raise MissingDependencyError(
            'optical flow needs the package scikit-image; run: pip install "featsharp[eval]", or give --motion none'
        ) from error
    forward, backward = (
        np.stack(optical_flow_ilk(a, b)[::-1], -1) for a, b in ((first, second), (second, first))
    )  # [H, W, 2], (x, y) in pixels
    size = np.array(first.shape[::-1])
    places = still(first.shape).places + forward / size
    back = sample_points(torch.from_numpy(backward).permute(2, 0, 1)[None].float(), places.reshape(-1, 2))
    missed = np.linalg.norm(forward + back.view(backward.shape).numpy(), axis=-1)
    return _Motion(places.astype(np.float32), (missed < TRUSTED) & ((places > 0) & (places < 1)).all(-1))


def _pool_clips(sums: np.ndarray, name: str) -> float:
    """Compute one of :data:`RATIOS` from the sums of clips [clips, 4]."""
    return _ratios(sums.sum(0))[name]


def _ratios(sums: np.ndarray) -> dict[str, float]:
    """Compute :data:`RATIOS` from the sums of both changes and variances [4]; NaN where nothing varies."""
    change, variance, pixels, contrast = sums
    features = change / variance if variance else math.nan
    picture = pixels / contrast if contrast else math.nan
    return dict(zip(RATIOS, map(float, (features, picture, features / picture if picture else math.nan)), strict=True))


def _change(first: Tensor, second: Tensor, motion: _Motion) -> tuple[float, float]:
    """Sum the squared change of a map [1, C, h, w] along the motion, and twice its variance, over trusted cells."""
    size = size_of(first)
    places = torch.from_numpy(np.concatenate([motion.places, motion.trusted[..., None]], -1)).permute(2, 0, 1)
    at = average(places[None].float(), size)[0].flatten(1).T.numpy()  # [hw, 3]
    trusted = torch.from_numpy(at[:, 2] > 0.5).to(first.device)
    here = first[0].flatten(1).T
    change = (sample_points(second, at[:, :2]) - here).square().sum(1)[trusted].sum()
    variance = (here - here.mean(0)).square().sum(1).mean() * trusted.sum()
    return float(change), float(2 * variance)
