"""Depth from one picture with a linear probe on frozen features.

The head (see :mod:`featsharp.evaluation.head`) is a 1x1 convolution, trained by the scale-invariant error of logarithms
(Eigen et al., arXiv 1406.2283): the root of var(g) + 0.15 mean(g)^2, with g the difference of log depths.

    linear    one output, the logarithm of depth
    bins      256 outputs, the weights of as many depths, evenly from 1 mm to the farthest: softplus of each over their
              sum (DINOv2, arXiv 2304.07193, has ReLU, which does not learn from the zeros that this head starts with,
              and adds a loss of gradients)

Scores are of each picture, over its pixels with a depth, then the mean over pictures: RMSE in metres, AbsRel, and d1 to
d3, the shares of pixels that are wrong by less than a factor of 1.25, 1.25^2 and 1.25^3. Those named "free" are the
same after the scale and the shift that fit the picture best in least squares, as in Probe3D (arXiv 2404.08636): they
judge the shape of a scene alone. Those named "constant" are of one depth for every pixel, the median of the training
pictures, which knows nothing of a picture: what a head adds is the difference. Intervals are over pictures; where all
are frames of one camera in one room, they say nothing about other rooms.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import DataError
from featsharp.evaluation.estimates import estimate_mean
from featsharp.evaluation.features import find_low_res_size, shown_size
from featsharp.evaluation.head import FeatureReader, Head, Schedule, TrainingData, train_head
from featsharp.evaluation.layouts.depth import LAYOUTS, DepthData, open_depth
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task
from featsharp.memory import parse_memory
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.settings import setting
from featsharp.terminal import align

BINS = 256
# Training pictures that the constant is the median of.
CONSTANT_PICTURES = 100
NEAREST = 1e-3  # metres
# Weight of the squared mean in the error.
_MEAN = 0.15


@dataclass
class DepthTask(Task):
    """Depth: a linear probe on frozen features, by RMSE, AbsRel and shares of pixels within 1.25."""

    name: ClassVar[str] = "depth"

    data: Path = setting(Path("."), "folder of the data set", type=Path, metavar="DIR", required=True)
    layout: str = setting("auto", "how it lies on disk", choices=("auto", *LAYOUTS))
    head: str = setting("bins", "weights of 256 depths, or the logarithm itself", choices=("bins", "linear"))
    low_res_size: tuple[int, int] | None = setting(
        None, "pixels of the low-resolution pass; default: the backbone's native size", type="size", metavar="HxW"
    )
    steps: int = setting(2000, "updates of the head", type="count", metavar="N")
    batch: int = setting(Schedule.batch, "pictures per update", type="count", metavar="N")
    learning_rate: float = setting(Schedule.learning_rate, "peak of the head's learning rate", type=float, metavar="X")
    train_limit: int | None = setting(
        None, "only N training pictures, spread evenly over their list", type="count", metavar="N"
    )
    limit: int | None = setting(
        None, "only N validation pictures, spread evenly over their list", type="count", metavar="N"
    )
    seed: int = setting(0, "of the order of training pictures", type=int, metavar="N")
    cache_dir: Path | None = setting(
        None,
        "keep features and heads there for later runs; default: until the result is written",
        type=Path,
        metavar="DIR",
    )
    cache_limit: str = setting("4GiB", "most room for features on disk; others are computed again", metavar="SIZE")

    @cached_property
    def dataset(self) -> DepthData:
        """Pictures of both splits."""
        return open_depth(self.data, self.layout)

    def items(self) -> list[Item]:
        return [Item(picture.image, picture) for picture in spread(self.dataset.val, self.limit)]

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> Head:
        low_res = find_low_res_size(encoder, self.low_res_size)
        size, train, farthest = self._label_size(encoder), self.dataset.train, self.dataset.farthest
        data = TrainingData(
            spread(train, self.train_limit, self.steps * self.batch),
            partial(_sample_depth, data=self.dataset, size=size),
            lambda output, truth: log_error(to_depth(output, farthest), truth),
            1 if self.head == "linear" else BINS,
            ("depth", self.head, farthest, size),
        )
        return train_head(
            FeatureReader(encoder, shown_size(encoder, low_res), low_res),
            "high_res",
            data,
            Schedule(self.steps, self.batch, self.learning_rate, self.seed),
            cache_dir=self.cache_dir,
            cache_limit=parse_memory(self.cache_limit),
            scratch=run.scratch,
            progress=run.progress,
        )

    def measure(self, encoder: SharpEncoder, item: Item, head: Head) -> Row:
        truth = _read_depth(item.data, self.dataset)
        picture = item.data.decode(Frame("its depth", truth.shape))
        box = self.dataset.scored
        if box is not None and truth.shape == (480, 640):
            outside = np.ones(truth.shape, dtype=bool)
            outside[box.top : box.bottom, box.left : box.right] = False
            truth[outside] = 0
        depth = to_depth(resize(head(picture), self._label_size(encoder)), self.dataset.farthest)
        predicted = resize(depth, truth.shape)[0, 0].cpu().numpy()
        valid = truth > 0
        predicted, truth = predicted[valid].astype(np.float64), truth[valid]
        constant = np.full_like(truth, self.constant)
        shown = {
            "": predicted,
            "free_": fit_scale(predicted, truth),
            "constant_": constant,
            "constant_free_": fit_scale(constant, truth),
        }
        return {
            prefix + name: value
            for prefix, one in shown.items()
            for name, value in depth_scores(np.clip(one, NEAREST, self.dataset.farthest), truth).items()
        }

    def score(self, rows: Sequence[Row], head: Head) -> Summary:
        return {
            **{name: estimate_mean([row[name] for row in rows]) for name in rows[0]},
            "constant": self.constant,
            "layout": self.dataset.layout,
            "train_images": head.images,
            "train_skipped": [list(entry) for entry in head.skipped],
        }

    def item_key(self, item: Item) -> object:
        return item.data.keys()

    def head_key(self, head: Head) -> object:
        return [head.key, self.constant]

    def table(self, encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Format the scores of the constant and of the encoders, and say how far their intervals reach."""
        results = {label: one["result"] for label, one in encoders.items() if "result" in one}
        first = next(iter(results.values()))
        named = {f"constant, {first['constant']:.2f} m": ("constant_", first)}
        named |= {label: ("", result) for label, result in results.items()}
        columns = [free + name for free in ("", "free_") for name in ("rmse", "abs_rel", "d1")]
        rows = [
            [label, *(f"{result[prefix + name]['value']:.3f}" for name in columns)]
            for label, (prefix, result) in named.items()
        ]
        note = ["intervals are over frames of one scene, not over scenes"] if first["layout"] == "rgbd" else []
        return [*align(["depth", *columns], rows), *note]

    @cached_property
    def constant(self) -> float:
        """Median depth in metres of the training pictures, of at most 100 that are spread over their list."""
        depths = []
        for picture in spread(self.dataset.train, self.train_limit, CONSTANT_PICTURES):
            try:
                depth = _read_depth(picture, self.dataset)
            except DataError:
                continue  # said where it is trained on
            depths.append(depth[depth > 0].astype(np.float32))
        if not depths:
            raise DataError(f"{self.data}: no training picture has a depth")
        return float(np.median(np.concatenate(depths)))

    def _label_size(self, encoder: SharpEncoder) -> tuple[int, int]:
        height, width = encoder.backbone.grid_size(find_low_res_size(encoder, self.low_res_size))
        return 4 * height, 4 * width


def to_depth(output: Tensor, farthest: float) -> Tensor:
    """Turn the outputs of a head [B, K, h, w] into depth in metres [B, 1, h, w]: of one a logarithm, of more bins."""
    if output.shape[1] == 1:
        return output.exp()
    depths = torch.linspace(NEAREST, farthest, output.shape[1], device=output.device)
    weights = F.softplus(output)
    return (weights * depths[:, None, None]).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def log_error(depth: Tensor, truth: Tensor) -> Tensor:
    """Compute the scale-invariant error of depth [B, 1, h, w] against truth [B, h, w], without its zeros.

    It is sqrt(var + 0.15 mean^2) of the difference of logarithms (DINOv2, arXiv 2304.07193).
    """
    known = truth > 0
    g = depth[:, 0][known].log() - truth[known].log()
    return (g.var(correction=0) + _MEAN * g.mean().square()).clamp(min=1e-12).sqrt()


def fit_scale(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Scale and shift depths [n] so that they are nearest to the truth [n] in least squares."""
    deviation = predicted - predicted.mean()
    variance = (deviation**2).mean()
    # Of a constant any scale will do.
    scale = (deviation * truth).mean() / variance if variance > 1e-12 else 0.0
    fitted: np.ndarray = truth.mean() + scale * deviation
    return fitted


def depth_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Score depths [n] against the truth [n], both in metres and positive."""
    ratio = np.maximum(predicted / truth, truth / predicted)
    return {
        "rmse": math.sqrt(((predicted - truth) ** 2).mean()),
        "abs_rel": float((np.abs(predicted - truth) / truth).mean()),
        **{f"d{power}": float((ratio < 1.25**power).mean()) for power in (1, 2, 3)},
    }


def _read_depth(picture: Any, data: DepthData) -> np.ndarray:
    """Read depth [H, W], 0 where there is none, or it is out of range; DataError where that is everywhere."""
    depth = data.read(picture)
    depth = np.where((depth >= NEAREST) & (depth <= data.farthest), depth, 0)
    if not depth.any():
        raise DataError(f"no pixel has a depth of {NEAREST:g} to {data.farthest:g} metres")
    return depth


def _sample_depth(picture: Any, data: DepthData, size: tuple[int, int]) -> tuple[Tensor, Frame]:
    """Sample depth [h, w] float32 at the centres of cells; also return the pixels that it lies on."""
    depth = _read_depth(picture, data)
    rows, columns = (((np.arange(n) + 0.5) * (m / n)).astype(int) for n, m in zip(size, depth.shape, strict=True))
    sampled = torch.from_numpy(depth[rows[:, None], columns]).float()
    if not (sampled > 0).any():
        raise DataError("too few pixels have a depth")
    return sampled, Frame("its depth", depth.shape)
