"""Semantic correspondence, as PCK: the fraction of keypoints that are matched close to their annotation.

Protocol: that of LiFT (arXiv 2403.14625) on SPair-71k. Both images are letter-boxed to one size (centred, Lanczos, mean
colour around), the feature at a keypoint of the source is compared with that of every pixel of the target image, the
padding left out, and the most similar one is the match. It is right when it lies nearer to the annotated point than
alpha times a size of the target, both in pixels of the target's file:

    box        larger side of the object's box         customary for SPair-71k
    keypoints  larger side of the keypoints' box       customary for PF-WILLOW
    image      larger side of the image                customary for PF-PASCAL, as is the box: state which one

There are three ways of pooling: ``pck@A`` over all keypoints, ``pck@A_pairs`` the mean over pairs, and
``pck@A_categories`` the mean over categories of the first (LiFT). Intervals resample pairs as if they were independent;
pairs share images, so the true intervals are somewhat wider.

The protocol "quick" stretches images instead and looks for the most similar of 64 x 64 cells (see
:mod:`featsharp.evaluation.matching`). It takes the coordinates in the files for positions from the corner of an image,
as much published code does, which is half a pixel off.

Features are L2-normalised per cell, interpolated bilinearly to every pixel of the encoder's input image, and compared
by cosine. Interpolation is linear, so the similarities of the cells are interpolated instead of the C channels, and
divided by the length of the interpolated feature, of which there is one map per image: the same numbers.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.data.images import image_to_tensor
from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.estimates import Estimate, bootstrap, estimate_mean, estimate_ratio
from featsharp.evaluation.features import check_finite, find_low_res_size, predict_raw
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.keypoints import SPLITS, Entry, Pair, PairOptions, check_points
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.layouts.pairs import LAYOUTS, find_layout, list_pairs
from featsharp.evaluation.matching import CACHE_BYTES, NearestCell, PointMatcher, sample_points
from featsharp.evaluation.protocol import QUICK, check_protocol, protocol_setting
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task
from featsharp.model import SharpEncoder
from featsharp.ops.boxes import Box
from featsharp.ops.resize import find_neighbours, resize
from featsharp.settings import setting

# Size that alpha is a fraction of, by layout, for --normalize-by auto.
CUSTOMARY = {"spair": "box", "pf-pascal": "image", "pf-willow": "keypoints"}

# Pixels to add to points for the numbers in the files of a layout, which the quick protocol takes for positions.
AS_STORED = {"spair": -0.5, "pf-pascal": 0.5, "pf-willow": 0.5}

FITS = ("letterbox", "stretch")

# Interpolated similarities that are held at a time.
MAX_SIMILARITIES = 1 << 24


@dataclass
class CorrespondenceTask(Task):
    """PCK of semantic keypoints: SPair-71k, PF-PASCAL, PF-WILLOW."""

    name: ClassVar[str] = "correspondence"

    data: Path = setting(Path("."), "the data set's folder", type=Path, metavar="DIR", required=True)
    layout: str = setting("auto", "of the data set", choices=("auto", *LAYOUTS))
    split: str = setting("test", "of the data set", choices=SPLITS)
    pair_list: Path | None = setting(None, "list of pairs; default: the data set's own", type=Path, metavar="F")
    alphas: Sequence[float] = setting((0.1, 0.05, 0.01), "allowed error", type=float, nargs="+", metavar="A")
    normalize_by: str = setting(
        "auto", "what alpha is a share of; auto: customary", choices=("auto", "box", "keypoints", "image")
    )
    protocol: str = protocol_setting("nearest of 64 x 64 cells of the stretched picture")
    fit: str = setting("letterbox", "how images are brought to one size", choices=FITS)
    low_res_size: tuple[int, int] | None = setting(
        None, "size of the low-resolution pass; default: the backbone's native one", type="size", metavar="HxW"
    )
    pairs_per_category: int | None = setting(
        None,
        "draw so many of each category, with replacement (LiFT: 100); default: all pairs",
        type="count",
        metavar="N",
    )
    limit: int | None = setting(None, "only N pairs, spread evenly over their list", type="count", metavar="N")
    seed: int = setting(0, "of the draw", type=int, metavar="N")

    def __post_init__(self) -> None:
        if not self.alphas or any(not 0 < alpha < math.inf for alpha in self.alphas):
            raise ConfigError(f"alphas are positive shares such as 0.1; got {list(self.alphas)}")
        if len(set(self.alphas)) != len(self.alphas):
            raise ConfigError(f"one of the alphas {list(self.alphas)} is there twice")
        check_protocol(self, "fit")

    # The data

    def items(self) -> list[Item]:
        entries = list_pairs(self.data, self.layout, PairOptions(self.split, self.pair_list))
        if self.pairs_per_category is not None:
            entries = draw_pairs(entries, self.pairs_per_category, self.seed)
        return [Item(entry.name, entry) for entry in _unique(spread(entries, self.limit))]

    # The rule

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> PointMatcher[Any]:
        low_res = find_low_res_size(encoder, self.low_res_size)
        return NearestCell(encoder, low_res) if self.protocol == QUICK else NearestPixel(encoder, low_res, self.fit)

    # The score

    def measure(self, encoder: SharpEncoder, item: Item, head: PointMatcher[Any]) -> Row:
        pair: Pair = item.data.read()
        source, target = head.encode(pair.source), head.encode(pair.target)
        check_points(pair.source_points, source.image_size, pair.source)
        check_points(pair.target_points, target.image_size, pair.target)
        size = target_size(pair, target.image_size, self._share_of)
        shift = AS_STORED[self._layout] if self.protocol == QUICK else 0
        matched = head.match(source, target, pair.source_points + shift)
        errors = np.linalg.norm(matched - (pair.target_points + shift), axis=1)
        return {
            "category": pair.category,
            "keypoints": len(errors),
            "hits": [int((errors < alpha * size).sum()) for alpha in self.alphas],
        }

    def score(self, rows: Sequence[Row], head: PointMatcher[Any]) -> Summary:
        summary: Summary = {"pairs": len(rows), "keypoints": sum(row["keypoints"] for row in rows)}
        categories: dict[str, Any] = {}
        for name in sorted({row["category"] for row in rows}):
            of_category = [row for row in rows if row["category"] == name]
            counts = [row["keypoints"] for row in of_category]
            categories[name] = {"pairs": len(of_category)} | {
                f"pck@{alpha:g}": estimate_ratio([row["hits"][number] for row in of_category], counts)
                for number, alpha in enumerate(self.alphas)
            }
        for number, alpha in enumerate(self.alphas):
            pooled = pool_pck([(row["hits"][number], row["keypoints"], row["category"]) for row in rows])
            for way, estimate in pooled.items():
                summary[f"pck@{alpha:g}" + ("" if way == "keypoints" else f"_{way}")] = estimate
        return summary | {
            "categories": categories,
            "normalize_by": self._share_of,
            "low_res_size": list(head.low_res_size),
            "image_size": list(head.canvas_size),
        }

    @cached_property
    def _share_of(self) -> str:
        return CUSTOMARY[self._layout] if self.normalize_by == "auto" else self.normalize_by

    @cached_property
    def _layout(self) -> str:
        return find_layout(self.data, self.layout)

    # Cache keys

    def item_key(self, item: Item) -> object:
        try:
            pair: Pair = item.data.read()
        except DataError:
            return ""
        files = [file_key(path.parent, path.name) for path in (pair.source, pair.target)]
        return [files, pair.source_points.tolist(), pair.target_points.tolist(), pair.target_box]


def target_size(pair: Pair, image_size: tuple[int, int], normalize_by: str) -> float:
    """Return the size that alpha is a fraction of, in pixels of the target's file.

    Raises:
        DataError: For a pair without that size.
    """
    if normalize_by == "image":
        return float(max(image_size))
    if normalize_by == "keypoints":
        size = float(np.ptp(pair.target_points, axis=0).max())
        if size == 0:
            raise DataError(f"{pair.target}: all keypoints lie at one point, so their box has no size")
        return size
    if pair.target_box is None:
        raise DataError(f"{pair.target}: the data set has no box for it; choose --normalize-by keypoints or image")
    return pair.target_box


def pool_pck(rows: Sequence[tuple[int, int, str]]) -> dict[str, Estimate]:
    """Compute PCK pooled over "keypoints", "pairs" and "categories" from (hits, keypoints, category) of every pair."""
    names = sorted({category for _, _, category in rows})
    numbers = [(hits, count, names.index(category)) for hits, count, category in rows]

    def over_categories(r: np.ndarray) -> float:
        category = r[:, 2].astype(int)
        hits, counts = np.bincount(category, r[:, 0]), np.bincount(category, r[:, 1])
        return float((hits[counts > 0] / counts[counts > 0]).mean())

    hits, counts, _ = np.transpose(numbers)
    return {
        "keypoints": estimate_ratio(hits, counts),
        "pairs": estimate_mean(hits / counts),
        "categories": bootstrap(numbers, over_categories),
    }


def draw_pairs(entries: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """Draw ``count`` pairs of each category, with replacement."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.category].append(entry)
    rng = np.random.default_rng(seed)
    return [groups[name][i] for name in sorted(groups) for i in rng.integers(len(groups[name]), size=count)]


def _unique(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Rename pairs that were drawn repeatedly."""
    times: Counter[str] = Counter()
    for entry in entries:
        times[entry.name] += 1
        yield entry if times[entry.name] == 1 else entry._replace(name=f"{entry.name} ({times[entry.name]})")


class NearestPixel(PointMatcher["Encoded"]):
    """Matching of a keypoint to the pixel with the most similar feature.

    Args:
        encoder: As in :class:`PointMatcher`.
        low_res_size: As in :class:`PointMatcher`.
        fit: One of :data:`FITS`.
        cache_bytes: As in :class:`PointMatcher`.
    """

    def __init__(
        self, encoder: SharpEncoder, low_res_size: tuple[int, int], fit: str, cache_bytes: int = CACHE_BYTES
    ) -> None:
        super().__init__(encoder, low_res_size, cache_bytes)
        self.fit = fit

    def encode_image(self, image: Image.Image) -> "Encoded":
        """Encode an RGB picture on its canvas; raises InputError for NaN."""
        placement = place((image.height, image.width), self.canvas_size, self.fit)
        canvas = draw(image, placement, self.encoder.input_conditioner).to(self.encoder.device)
        return prepare(predict_raw(self.encoder, canvas, self.low_res_size, positional=False), placement)

    def match(self, source: "Encoded", target: "Encoded", points: np.ndarray) -> np.ndarray:
        """Match points by :func:`match`."""
        return match(source, target, points)


class Placement(NamedTuple):
    """Position of an image on the canvas that is encoded. Points are (x, y), pixel centres at half-integers."""

    image_size: tuple[int, int]  # (h, w) of the file
    canvas_size: tuple[int, int]  # (h, w)
    box: Box  # of the image on the canvas; the rest is padding

    def to_canvas(self, points: np.ndarray) -> np.ndarray:
        """Map points [K, 2] of the image file to the canvas."""
        return points * self._scale + (self.box.left, self.box.top)

    def to_image(self, points: np.ndarray) -> np.ndarray:
        """Invert :meth:`to_canvas`."""
        return (points - (self.box.left, self.box.top)) / self._scale

    @property
    def _scale(self) -> np.ndarray:
        return np.array([self.box.size[1] / self.image_size[1], self.box.size[0] / self.image_size[0]])


class Encoded(NamedTuple):
    """Features of an image, ready for matching."""

    placement: Placement
    features: Tensor  # [1, C, h, w] float32 over the canvas, every cell of length 1
    lengths: Tensor  # [*placement.box.size]: of the features interpolated to the pixels of the image

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of the image's file."""
        return self.placement.image_size

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return sum(x.numel() * x.itemsize for x in (self.features, self.lengths))


def place(image_size: tuple[int, int], canvas_size: tuple[int, int], fit: str) -> Placement:
    """Place an image of ``image_size`` (h, w): "letterbox", centred with its aspect ratio, or "stretch"."""
    (h, w), (height, width) = image_size, canvas_size
    if fit == "stretch":
        return Placement(image_size, canvas_size, Box(0, height, 0, width))
    scale = min(height / h, width / w)
    rows, columns = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = (height - rows) // 2, (width - columns) // 2
    return Placement(image_size, canvas_size, Box(top, top + rows, left, left + columns))


def draw(image: Image.Image, placement: Placement, whiten: Callable[[Tensor], Tensor]) -> Tensor:
    """Draw an RGB image on its canvas by Lanczos resampling, the mean colour elsewhere: [1, 3, H, W], whitened."""
    box = placement.box
    scaled = image.resize((box.size[1], box.size[0]), Image.Resampling.LANCZOS)
    canvas = torch.zeros(1, 3, *placement.canvas_size, dtype=torch.float32, device="cpu")
    box.cut(canvas).copy_(whiten(image_to_tensor(scaled)[None]))
    return canvas


def prepare(features: Tensor, placement: Placement) -> Encoded:
    """Normalise the features [1, C, h, w] of a canvas; raises InputError for NaN."""
    check_finite(features)
    cells = F.normalize(features.float(), dim=1)
    lengths = interpolated_lengths(cells[0], placement.canvas_size)
    return Encoded(placement, cells, placement.box.cut(lengths))


def interpolated_lengths(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute the lengths [H, W] of vectors [C, h, w] interpolated bilinearly to ``size``, without these vectors.

    Between neighbours a and b, |a + t (b - a)|^2 = (1 - t) |a|^2 + t |b|^2 - t (1 - t) |b - a|^2, which takes the
    squared lengths of the cells and of the steps from one to the next. Here along x, then along y.
    """
    down = _step(cells, 1)
    of_rows = _between(_square(cells), _square(_step(cells, 2)), size[1])  # [h, W]
    of_steps = _between(_square(down), _square(_step(down, 2)), size[1])
    return _between(of_rows.T, of_steps.T, size[0]).T.clamp(min=0).sqrt().float()


def match(source: Encoded, target: Encoded, points: np.ndarray) -> np.ndarray:
    """Match points [K, 2] of the source's file with the centres of the most similar pixels [K, 2] of the target's."""
    queries = sample(source, points)
    height, width = target.placement.canvas_size
    box = target.placement.box
    matched = []
    for chunk in queries.split(max(1, MAX_SIMILARITIES // (height * width))):
        similar = resize(torch.einsum("kc,chw->khw", chunk, target.features[0])[None], (height, width))[0]
        best = (box.cut(similar) / target.lengths.clamp(min=1e-12)).flatten(1).argmax(dim=1).cpu().numpy()
        y, x = np.divmod(best, box.size[1])
        matched.append(np.stack([box.left + x + 0.5, box.top + y + 0.5], axis=1))
    return target.placement.to_image(np.concatenate(matched))


def sample(image: Encoded, points: np.ndarray) -> Tensor:
    """Sample the features [K, C] at points [K, 2] of the image's file; :func:`match` needs no unit length."""
    height, width = image.placement.canvas_size
    return sample_points(image.features, image.placement.to_canvas(points) / (width, height))


def _between(square: Tensor, step: Tensor, length: int) -> Tensor:
    """Interpolate squared lengths [..., N] from those of vectors and of the steps between them, [..., n] each."""
    before, after, t = find_neighbours(square.shape[-1], length, range(length), square.device)
    t = t.double()
    return torch.lerp(square[..., before], square[..., after], t) - t * (1 - t) * step[..., before]


def _step(cells: Tensor, dim: int) -> Tensor:
    """Compute the differences of neighbouring cells along an axis; 0 for the last."""
    last = cells.narrow(dim, -1, 1)
    return torch.diff(cells, dim=dim, append=last)


def _square(cells: Tensor) -> Tensor:
    """Compute squared lengths [h, w] of [C, h, w], in float64, as the later subtraction may cancel."""
    return cells.square().sum(0, dtype=torch.float64)
