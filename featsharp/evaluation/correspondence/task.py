"""Semantic correspondence, as PCK: the share of keypoints whose partner is found near where annotators put it.

Protocol: that of LiFT (arXiv 2403.14625) on SPair-71k. Both images are letter-boxed to one size (centred, Lanczos, mean
colour around), the feature at a keypoint of the source is compared with that of every pixel of the target image, the
padding left out, and the most similar one is the answer (see ``matching``). It is right when it lies nearer to the
annotated point than alpha times a size of the target, both in pixels of the target's file:

    box        larger side of the object's box         customary for SPair-71k
    keypoints  larger side of the keypoints' box       customary for PF-WILLOW
    image      larger side of the image                customary for PF-PASCAL; the box is used there too, so say which

Three ways of pooling are in use and all are given: ``pck@A`` over all keypoints, ``pck@A_pairs`` the mean over pairs,
``pck@A_categories`` the mean over categories of the first (LiFT). Intervals resample pairs as if they were independent;
pairs share images, so the truth is somewhat wider.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.correspondence.matching import FITS, EncodedImages, match
from featsharp.evaluation.correspondence.pairs import Entry, Pair, check_points
from featsharp.evaluation.correspondence.readers import LAYOUTS, SPLITS, find_layout, list_pairs
from featsharp.evaluation.identity import digest, file_key
from featsharp.evaluation.samples import Estimate, bootstrap, predict_raw
from featsharp.evaluation.sizes import find_low_res_size, shown_size
from featsharp.evaluation.task import Item, Row, Subject, Summary, Task
from featsharp.model import SharpEncoder
from featsharp.settings import setting

# What alpha is a share of, where --normalize-by does not say.
CUSTOMARY = {"spair": "box", "pf-pascal": "image", "pf-willow": "keypoints"}


class State(NamedTuple):
    """What measuring one encoder needs."""

    images: EncodedImages
    low_res_size: tuple[int, int]
    normalize_by: str


@dataclass
class CorrespondenceTask(Task):
    """PCK of semantic keypoints: SPair-71k, PF-PASCAL, PF-WILLOW."""

    name: ClassVar[str] = "correspondence"
    title: ClassVar[str] = "does a keypoint find the same part of another object?"

    data: Path = setting(Path("."), "the data set's folder", type=Path, metavar="DIR", required=True)
    layout: str = setting("auto", "of the data set", choices=("auto", *LAYOUTS))
    split: str = setting("test", "of the data set", choices=SPLITS)
    pair_list: Path | None = setting(None, "list of pairs; default: the data set's own", type=Path, metavar="F")
    alphas: Sequence[float] = setting((0.1, 0.05, 0.01), "allowed error", type=float, nargs="+", metavar="A")
    normalize_by: str = setting(
        "auto", "what alpha is a share of; auto: customary", choices=("auto", "box", "keypoints", "image")
    )
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
    limit: int | None = setting(None, "only the first N pairs", type="count", metavar="N")
    seed: int = setting(0, "of the draw", type=int, metavar="N")

    def __post_init__(self) -> None:
        if not self.alphas or any(not 0 < alpha < math.inf for alpha in self.alphas):
            raise ConfigError(f"alphas are positive shares such as 0.1; got {list(self.alphas)}")
        if len(set(self.alphas)) != len(self.alphas):
            raise ConfigError(f"one of the alphas {list(self.alphas)} is there twice")

    def items(self) -> list[Item]:
        entries = list_pairs(self.data, self.layout, split=self.split, pair_list=self.pair_list)
        if self.pairs_per_category is not None:
            entries = draw_pairs(entries, self.pairs_per_category, self.seed)
        return [Item(entry.name, entry) for entry in _unique(entries[: self.limit])]

    def begin(self, encoder: SharpEncoder, subject: Subject) -> State:
        low_res = find_low_res_size(encoder, self.low_res_size)
        images = EncodedImages(
            lambda canvas: predict_raw(encoder, canvas, low_res, positional=False),
            encoder.input_conditioner,
            shown_size(encoder, low_res),
            self.fit,
            encoder.device,
        )
        layout = find_layout(self.data) if self.layout == "auto" else self.layout
        return State(images, low_res, CUSTOMARY[layout] if self.normalize_by == "auto" else self.normalize_by)

    def measure(self, encoder: SharpEncoder, item: Item, number: int, state: State) -> Row:
        pair: Pair = item.data.read()
        source, target = state.images.get(pair.source), state.images.get(pair.target)
        check_points(pair.source_points, source.placement.image_size, pair.source)
        check_points(pair.target_points, target.placement.image_size, pair.target)
        size = target_size(pair, target.placement.image_size, state.normalize_by)
        errors = np.linalg.norm(match(source, target, pair.source_points) - pair.target_points, axis=1)
        return {
            "category": pair.category,
            "keypoints": len(errors),
            "hits": [int((errors < alpha * size).sum()) for alpha in self.alphas],
        }

    def stamp(self, item: Item) -> str:
        try:
            pair: Pair = item.data.read()
        except DataError:
            return ""
        files = [file_key(path.parent, path.name) for path in (pair.source, pair.target)]
        return digest(files, pair.source_points.tolist(), pair.target_points.tolist(), pair.target_box)

    def summarize(self, rows: Sequence[Row], state: State) -> Summary:
        found: Summary = {"pairs": len(rows), "keypoints": sum(row["keypoints"] for row in rows)}
        for number, alpha in enumerate(self.alphas):
            pooled = pool_pck([(row["hits"][number], row["keypoints"], row["category"]) for row in rows])
            found[f"pck@{alpha:g}"] = pooled.pop("keypoints")
            found |= {f"pck@{alpha:g}_{way}": estimate for way, estimate in pooled.items()}
        categories: dict[str, Any] = {}
        for category in sorted({row["category"] for row in rows}):
            own = [row for row in rows if row["category"] == category]
            categories[category] = {"pairs": len(own)}
            for number, alpha in enumerate(self.alphas):
                pooled = pool_pck([(row["hits"][number], row["keypoints"], category) for row in own])
                categories[category][f"pck@{alpha:g}"] = pooled["keypoints"]
        return found | {
            "categories": categories,
            "normalize_by": state.normalize_by,
            "low_res_size": list(state.low_res_size),
            "image_size": list(state.images.canvas_size),
        }


def target_size(pair: Pair, image_size: tuple[int, int], normalize_by: str) -> float:
    """What alpha is a share of, in pixels of the target's file.

    Raises:
        DataError: For a pair that has no such size.
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
    """PCK by way of pooling ("keypoints", "pairs", "categories") from (hits, keypoints, category) of every pair."""
    names = sorted({category for _, _, category in rows})
    numbers = [(hits, count, names.index(category)) for hits, count, category in rows]

    def over_categories(r: np.ndarray) -> float:
        category = r[:, 2].astype(int)
        hits, counts = np.bincount(category, r[:, 0]), np.bincount(category, r[:, 1])
        return float((hits[counts > 0] / counts[counts > 0]).mean())

    return {
        "keypoints": bootstrap(numbers, lambda r: float(r[:, 0].sum() / r[:, 1].sum())),
        "pairs": bootstrap(numbers, lambda r: float((r[:, 0] / r[:, 1]).mean())),
        "categories": bootstrap(numbers, over_categories),
    }


def draw_pairs(entries: Sequence[Entry], count: int, seed: int) -> list[Entry]:
    """``count`` pairs of each category, with replacement."""
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry.category].append(entry)
    rng = np.random.default_rng(seed)
    return [groups[name][i] for name in sorted(groups) for i in rng.integers(len(groups[name]), size=count)]


def _unique(entries: Sequence[Entry]) -> Iterator[Entry]:
    """A pair that was drawn again gets a name of its own."""
    seen: Counter[str] = Counter()
    for entry in entries:
        seen[entry.name] += 1
        yield entry if seen[entry.name] == 1 else entry._replace(name=f"{entry.name} ({seen[entry.name]})")
