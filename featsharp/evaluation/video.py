"""Video: do the objects of the first frame stay with their pixels when they are handed on by the features alone?

Label propagation as in DINO (arXiv 2104.14294, after arXiv 2006.14613): each cell of a frame takes the mean of the
labels of the most similar cells in the first frame and in the last ones, weighted by the softmax of cosine similarity
over a temperature. Nothing is trained. Scores are those of DAVIS (arXiv 1704.00675), of an object over the frames
between the first and the last, then over all objects:

    j      intersection over union
    f      F-measure of boundaries, found within 0.008 of the diagonal
    j_and_f    their mean; recall is the share of frames above one half

A neighbourhood is given as a part of the picture's height, so that maps of any size look equally far: DINO's 12 of 60
cells are 0.2. Labels are sampled at the centres of cells; the probabilities of each object are stretched to 0..1, as
there, before the largest decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import DataError, MissingDependencyError
from featsharp.evaluation.estimates import estimate_ratio
from featsharp.evaluation.features import sharp_features
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.davis import VOID, Clip, find_masked_clips, read_objects
from featsharp.evaluation.layouts.frames import decode_labelled
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.runner import Item, Row, Summary, Task
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.settings import setting

# Of the diagonal: how far boundaries may be apart.
TOLERANCE = 0.008


@dataclass
class VideoTask(Task):
    """DAVIS: objects of the first frame handed on by features alone, by region (J) and boundary (F)."""

    name: ClassVar[str] = "video"

    data: Path = setting(Path("."), "folder of DAVIS 2016 or 2017", type=Path, metavar="DIR", required=True)
    low_res_size: tuple[int, int] | None = setting(
        None,
        "size of the low-resolution pass; default: of the backbone's native area and the frame's aspect ratio",
        type="size",
        metavar="HxW",
    )
    queue: int = setting(7, "frames before this one that labels come from, beside the first", type="count", metavar="N")
    neighbourhood: float = setting(
        0.2, "how far labels may come from, in parts of the picture's height", type=float, metavar="X"
    )
    top: int = setting(5, "most similar cells that labels come from", type="count", metavar="N")
    temperature: float = setting(0.1, "of the softmax of cosine similarity", type=float, metavar="X")
    frames: int | None = setting(None, "only the first N frames of each clip", type="count", metavar="N")
    limit: int | None = setting(None, "only N clips, spread evenly over their list", type="count", metavar="N")

    def items(self) -> list[Item]:
        clips = spread(find_masked_clips(self.data), self.limit)
        return [Item(clip.name, clip._replace(frames=clip.frames[: self.frames])) for clip in clips]

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        clip: Clip = item.data
        if len(clip.frames) < 3:
            raise DataError(f"{clip.name} has {len(clip.frames)} frames; the score is of those between first and last")
        first, _ = read_objects(clip.mask(0))
        objects = [number for number in np.unique(first).tolist() if number] or [VOID]
        objects = [number for number in objects if number != VOID] or objects
        if not (first == objects[0]).any():
            raise DataError(f"{clip.name}: there is no object in its first mask, {clip.mask(0).name}")
        kept: list[tuple[Tensor, Tensor]] = []  # features [C, n] of length 1 and labels [K, n] of earlier frames
        regions, boundaries = [], []
        for number, path in enumerate(clip.frames):
            truth, frame = read_objects(clip.mask(number))
            if truth.shape != first.shape:
                raise DataError(f"{clip.mask(number)}: all frames of a clip have one size; this one differs")
            picture = decode_labelled(path, f"{clip.name}/{path.name}", frame)
            size = self.low_res_size or encoder.native_low_res_size((picture.height, picture.width))
            features = F.normalize(sharp_features(encoder, picture, size)[0], dim=0)
            cells = size_of(features)
            features = features.flatten(1)
            if number == 0:
                labels = _sample_objects(truth, objects, cells).to(features)
                reach = self.neighbourhood * cells[0], self.neighbourhood * cells[1] * truth.shape[0] / truth.shape[1]
                near = neighbours(cells, reach).to(features.device)
            else:
                labels = propagate([kept[0], *kept[1:][-self.queue :]], features, near, self.top, self.temperature)
                predicted = decide(labels.view(-1, *cells), truth.shape)
                if number < len(clip.frames) - 1:
                    pairs = [(predicted == index + 1, truth == one) for index, one in enumerate(objects)]
                    regions.append([region_score(*pair) for pair in pairs])
                    boundaries.append([boundary_score(*pair) for pair in pairs])
            kept = [*kept[:1], *kept[1:][-self.queue :], (features, labels)]
        j, f = np.array(regions), np.array(boundaries)  # [frames, objects]
        return {
            "objects": len(objects),
            "j": float(j.mean()),
            "f": float(f.mean()),
            "j_recall": float((j > 0.5).mean()),
            "f_recall": float((f > 0.5).mean()),
        }

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        objects = np.array([row["objects"] for row in rows], dtype=float)
        parts = {name: objects * [row[name] for row in rows] for name in ("j", "f", "j_recall", "f_recall")}
        parts = {"j_and_f": (parts["j"] + parts["f"]) / 2, **parts}
        return {
            **{name: estimate_ratio(values, objects) for name, values in parts.items()},
            "objects": int(objects.sum()),
            "clips": len(rows),
        }

    def item_key(self, item: Item) -> object:
        clip: Clip = item.data
        files = [*clip.frames, *(clip.mask(number) for number in range(len(clip.frames)))]
        return [file_key(path.parent, path.name) for path in files]


def neighbours(cells: tuple[int, int], reach: tuple[float, float]) -> Tensor:
    """Mark the pairs of cells of a map (h, w) that are at most ``reach`` (rows, columns) apart: [hw, hw] bool."""
    rows, columns = (
        (torch.arange(n)[:, None] - torch.arange(n)).abs() <= most for n, most in zip(cells, reach, strict=True)
    )
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(math.prod(cells), -1)


def propagate(
    earlier: Sequence[tuple[Tensor, Tensor]], features: Tensor, near: Tensor, top: int, temperature: float
) -> Tensor:
    """Hand labels on to a frame.

    Args:
        earlier: Features [C, n] of length 1 and labels [K, n] of frames.
        features: [C, n] of the frame, of length 1.
        near: [n, n], which cells of an earlier frame a cell may take labels from; its own at least.
        top: Number of cells, of all frames together, that it takes them from.
        temperature: Of the softmax of cosine similarity.

    Returns:
        [K, n].
    """
    values, labels = [], []
    for known, label in earlier:
        cosine = (features.T @ known).masked_fill_(~near, -math.inf)
        best, index = cosine.topk(min(top, len(near)), dim=1)
        values.append(best)
        labels.append(label[:, index])  # [K, n, top]
    best, index = torch.cat(values, 1).topk(min(top, len(near)), dim=1)
    chosen = torch.cat(labels, 2).gather(2, index.expand(len(labels[0]), -1, -1))
    return (chosen * (best / temperature).softmax(1)).sum(2)


def decide(labels: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Decide the object of each pixel, [H, W], from labels [K, h, w]; each is scaled to ``size`` and to 0..1 before."""
    scaled = resize(labels[None], size)[0].flatten(1)
    low, high = scaled.aminmax(dim=1, keepdim=True)
    stretched = torch.where(high > 0, (scaled - low) / (high - low).clamp(min=1e-12), scaled)
    return stretched.argmax(0).view(size).cpu().numpy()


def region_score(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Compute J, the intersection over union of two masks [H, W] bool; 1 where both are empty."""
    union = np.count_nonzero(predicted | truth)
    return np.count_nonzero(predicted & truth) / union if union else 1.0


def boundary_score(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Compute F, the F-measure of the boundaries of two masks [H, W] bool; 1 where both have none.

    A boundary pixel is found where one of the other mask is within ``TOLERANCE`` of the diagonal, rounded up.

    Raises:
        MissingDependencyError: Without scipy.
    """
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise MissingDependencyError('boundaries need the package scipy; run: pip install "featsharp[eval]"') from error
    reach = math.ceil(TOLERANCE * math.hypot(*truth.shape))
    edges = [_outline(mask) for mask in (predicted, truth)]
    if not all(edge.any() for edge in edges):
        return float(not any(edge.any() for edge in edges))
    precision, recall = (
        float((distance_transform_edt(~other) <= reach)[edge].mean()) for edge, other in (edges, edges[::-1])
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _outline(mask: np.ndarray) -> np.ndarray:
    """Mark the pixels that differ from the next one to the right, below, or both."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    here = padded[:-1, :-1]
    return (here ^ padded[:-1, 1:]) | (here ^ padded[1:, :-1]) | (here ^ padded[1:, 1:])


def _sample_objects(truth: np.ndarray, objects: Sequence[int], cells: tuple[int, int]) -> Tensor:
    """Sample background and objects at the centres of cells: [1 + objects, hw], 0 or 1."""
    rows, columns = (((np.arange(n) + 0.5) * (m / n)).astype(int) for n, m in zip(cells, truth.shape, strict=True))
    sampled = truth[rows[:, None], columns].reshape(-1)
    of_objects = [sampled == number for number in objects]
    return torch.from_numpy(np.stack([~np.any(of_objects, axis=0), *of_objects]))
