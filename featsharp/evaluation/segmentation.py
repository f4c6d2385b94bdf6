"""Semantic segmentation with a linear probe.

The protocol, the same for every encoder of a table (FeatSharp, arXiv 2502.16025, figure 3, without augmentation):

- Every picture is scaled to max(2, ceil(factor)) times the size of the low-resolution pass, without its aspect ratio,
  so that encoders get the same picture.
- A head (see :mod:`featsharp.evaluation.head`) is trained on the features of the training split, by cross-entropy
  without void pixels. Its logits are scaled to the labels, by default of four times the low-resolution grid; labels are
  sampled at the centres of their cells.
- On the validation split logits are scaled to the size of each label file. Void pixels are ignored. mIoU is the mean
  over the classes that occur in the truth or the prediction, from the counts of all images together.

The protocol "quick" trains three heads for 24 rounds each (see :mod:`featsharp.evaluation.quick_head`) on labels of
90 x 120, and reports the mean of their scores. Pictures are scaled by Pillow's bicubic filter there.

With ``head="low-res"`` the head is trained on the encoder's low-resolution map and applied to the sharp one, which
shows whether an upsampler fits existing heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.estimates import bootstrap_sums
from featsharp.evaluation.features import find_low_res_size, shown_size, stretched_picture, whitened_picture
from featsharp.evaluation.head import FeatureReader, Head, MapName, Schedule, TrainingData, fit_probe, train_head
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.labels import VOID, FolderOptions, LabelCode, LabelledImage
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.layouts.segmentation import LAYOUTS, SegmentationData, open_segmentation
from featsharp.evaluation.protocol import QUICK, check_protocol, protocol_setting
from featsharp.evaluation.quick_head import LABEL_SIZE, QuickSchedule, fit_heads
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task
from featsharp.memory import parse_memory
from featsharp.model import SharpEncoder
from featsharp.ops.boxes import Box
from featsharp.ops.resize import enlarge, resize
from featsharp.settings import setting

# Logits that are held at a time when they are scaled to a label: 256 MiB with temporary memory.
MAX_LOGITS = 2**26 // 3


@dataclass
class SegmentationTask(Task):
    """Semantic segmentation: a linear probe on frozen features, by mean intersection over union."""

    name: ClassVar[str] = "segmentation"

    data: Path = setting(Path("."), "folder of the data set", type=Path, metavar="DIR", required=True)
    layout: str = setting("auto", "how it lies on disk", choices=("auto", *LAYOUTS))
    low_res_size: tuple[int, int] | None = setting(
        None, "pixels of the low-resolution pass; default: the backbone's native size", type="size", metavar="HxW"
    )
    protocol: str = protocol_setting("three heads of 24 rounds")
    head: str = setting(
        "own", "features that the head is trained on: the sharp ones, or the low-res ones", choices=("own", "low-res")
    )
    steps: int = setting(Schedule.steps, "updates of the head", type="count", metavar="N")
    batch: int = setting(Schedule.batch, "images per update", type="count", metavar="N")
    learning_rate: float = setting(Schedule.learning_rate, "peak of the head's learning rate", type=float, metavar="X")
    label_size: tuple[int, int] | None = setting(
        None,
        "labels in training; default: four times the low-resolution grid, of the quick protocol "
        f"{LABEL_SIZE[0]}x{LABEL_SIZE[1]}",
        type="size",
        metavar="HxW",
    )
    train_limit: int | None = setting(
        None, "only N training images, spread evenly over their list", type="count", metavar="N"
    )
    limit: int | None = setting(
        None, "only N validation images, spread evenly over their list", type="count", metavar="N"
    )
    seed: int = setting(0, "of the order of training images", type=int, metavar="N")
    cache_dir: Path | None = setting(
        None,
        "keep features and heads there for later runs; default: until the result is written",
        type=Path,
        metavar="DIR",
    )
    cache_limit: str = setting("4GiB", "most room for features on disk; others are computed again", metavar="SIZE")
    classes: int | None = setting(
        None,
        "classes of the layout folder without classes.txt, the void one included or not; default: as many as its "
        "training labels show",
        type="count",
        metavar="N",
    )
    ignore_index: int | None = setting(
        None,
        "number of void pixels in the layout folder, -1 for none; default: 255, unless labels are masks of 0 and 255",
        type=int,
        metavar="N",
    )

    def __post_init__(self) -> None:
        check_protocol(self, "steps", "batch", "learning_rate")

    # The data

    @cached_property
    def dataset(self) -> SegmentationData:
        """Pairs of both splits, and the meaning of their labels."""
        return open_segmentation(self.data, self.layout, FolderOptions(self.classes, self.ignore_index))

    def items(self) -> list[Item]:
        return [Item(pair.image, pair) for pair in spread(self.dataset.val, self.limit)]

    def training_data(self, label_size: tuple[int, int]) -> TrainingData:
        """Choose pictures to train the head on, at most as many as its steps take."""
        pairs, code = self.dataset.train, self.dataset.code
        return TrainingData(
            spread(pairs, self.train_limit, None if self.protocol == QUICK else self.steps * self.batch),
            partial(_sample_labels, code=code, size=label_size),
            lambda logits, labels: F.cross_entropy(logits, labels.long(), ignore_index=VOID),
            len(code.classes),
            (code.classes, list(code.codes.items()), label_size),
        )

    # The head

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> Head:
        low_res = find_low_res_size(encoder, self.low_res_size)
        quick = self.protocol == QUICK
        return train_head(
            FeatureReader(
                encoder, shown_size(encoder, low_res), low_res, stretched_picture if quick else whitened_picture
            ),
            self._map_name(encoder),
            self.training_data(self._label_size(encoder, low_res)),
            QuickSchedule(self.seed) if quick else Schedule(self.steps, self.batch, self.learning_rate, self.seed),
            fit_heads if quick else fit_probe,
            cache_dir=self.cache_dir,
            cache_limit=parse_memory(self.cache_limit),
            scratch=run.scratch,
            progress=run.progress,
        )

    def _map_name(self, encoder: SharpEncoder) -> MapName:
        if self.head == "own":
            return "high_res"
        if self.head != "low-res":
            raise ConfigError(f"head is own or low-res; got {self.head!r}")
        if encoder.upsampler.num_maps > 1:
            raise ConfigError(
                f"{type(encoder.upsampler).__name__} returns {encoder.upsampler.num_maps} maps at once, which a head "
                "trained on one cannot take; use --head own"
            )
        return "low_res"

    def _label_size(self, encoder: SharpEncoder, low_res: tuple[int, int]) -> tuple[int, int]:
        height, width = encoder.backbone.grid_size(low_res)
        return self.label_size or (LABEL_SIZE if self.protocol == QUICK else (4 * height, 4 * width))

    # The score

    def measure(self, encoder: SharpEncoder, item: Item, head: Head) -> Row:
        pair: LabelledImage = item.data
        truth, frame = self.dataset.code.read(pair.root / pair.label, pair.label)
        image = pair.decode(frame)
        if (truth == VOID).all():
            raise DataError(f"{pair.label}: all pixels are void")
        classes = len(self.dataset.code.classes)
        predictions = [predict(logits, truth.shape) for logits in head(image).split(classes, 1)]
        return score_image(*(confusion(truth, prediction, classes) for prediction in predictions))

    def score(self, rows: Sequence[Row], head: Head) -> Summary:
        reader = head.reader
        code = self.dataset.code
        classes = code.classes
        occurring = {classes[c % len(classes)] for row in rows for c, _, true, _ in row["_counts"] if true}
        if len(occurring) < 2:
            raise DataError(
                f"the {len(rows)} labels that were measured show one class, {occurring.pop()!r}, which any prediction "
                f"fits; numbers with a meaning are {code.allowed}. Measure more of them (--limit)"
            )
        return {
            **pool_rows(rows, classes, len(head.probe.classify.weight) // len(classes)),
            "labels": code.allowed,
            "train_images": head.images,
            "train_skipped": [list(entry) for entry in head.skipped],
            "layout": self.dataset.layout,
            "factor": float(reader.encoder.factor),
            "low_res_size": list(reader.low_res_size),
            "image_size": list(reader.image_size),
            "label_size": list(self._label_size(reader.encoder, reader.low_res_size)),
        }

    # Cache keys

    def item_key(self, item: Item) -> object:
        return item.data.keys()

    def head_key(self, head: Head) -> str:
        return head.key


def predict(logits: Tensor, size: Sequence[int], max_logits: int = MAX_LOGITS) -> np.ndarray:
    """Predict the class of every pixel, [H, W] int64, from logits [1, K, h, w] scaled to ``size`` (H, W).

    Works in chunks of rows of at most ``max_logits`` numbers, so that 150 classes of a large picture fit into memory.
    """
    height, width = size
    if height < logits.shape[-2] or width < logits.shape[-1]:
        scaled = resize(logits, (height, width)).argmax(1)[0]
    else:
        rows = max(1, max_logits // (logits.shape[1] * width))
        boxes = [Box(top, min(height, top + rows), 0, width) for top in range(0, height, rows)]
        scaled = torch.cat([enlarge(logits, (height, width), box).argmax(1)[0] for box in boxes])
    return scaled.cpu().numpy()


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int) -> np.ndarray:
    """Count pixels by true and predicted class, [classes, classes] integers; void pixels of ``truth`` are ignored."""
    labelled = truth != VOID
    cells = truth[labelled].astype(np.int64) * classes + prediction[labelled]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def iou(counts: np.ndarray) -> np.ndarray:
    """Compute the intersection over union by class, [..., K]; NaN for one that is neither in the truth nor predicted.

    ``counts`` [3, ..., K] are the numbers of correctly predicted, true and predicted pixels of each class.
    """
    hit, true, predicted = counts
    union = true + predicted - hit
    return np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)


def score_image(*matrices: np.ndarray) -> Row:
    """Score an image by the :func:`confusion` of each head: the means over heads.

    "_counts" are [class, hit, true, predicted] per class that occurs; classes of K go on from K for the second head.
    """
    counts = np.stack([[matrix.diagonal(), matrix.sum(1), matrix.sum(0)] for matrix in matrices], 1)  # [3, heads, K]
    flat = counts.reshape(3, -1)
    return {
        "miou": _mean_iou(counts),
        "pixel_accuracy": float(counts[0].sum() / counts[1].sum()),
        "_counts": [[int(c), *map(int, flat[:, c])] for c in np.flatnonzero(flat.any(0))],
    }


def pool_rows(rows: Sequence[Row], classes: Sequence[str], heads: int = 1) -> Summary:
    """Score a split by the counts of all images together, with intervals over images.

    Args:
        rows: Of :func:`score_image`.
        classes: Their names.
        heads: Number of heads, of which the scores are means.

    Returns:
        "miou" and "pixel_accuracy" with intervals; "iou" by class name, None for a class that is neither in the truth
        nor predicted. Such classes are left out of the mean, and out of a resample's mean where it has none.
    """
    flat = np.zeros((len(rows), 3, heads * len(classes)))
    for number, row in enumerate(rows):
        for c, *numbers in row["_counts"]:
            flat[number, :, c] = numbers
    counts = flat.reshape(len(rows), 3, heads, len(classes))
    by_class = [_mean_of_known(of_heads) for of_heads in iou(counts.sum(0)).T]
    return {
        "miou": bootstrap_sums(counts, _mean_iou),
        "pixel_accuracy": bootstrap_sums(counts, lambda pooled: float(pooled[0].sum() / pooled[1].sum())),
        "iou": {name: None if np.isnan(value) else value for name, value in zip(classes, by_class, strict=True)},
    }


def _mean_iou(counts: np.ndarray) -> float:
    """Average over classes, then over heads, from counts [3, heads, K]."""
    return float(np.nanmean(iou(counts), axis=-1).mean())


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _sample_labels(pair: LabelledImage, code: LabelCode, size: tuple[int, int]) -> tuple[Tensor, Frame]:
    """Sample labels [h, w] int16 at the centres of the cells; also return the pixels that the file lies on."""
    labels, frame = code.read(pair.root / pair.label, pair.label)
    rows, columns = (((np.arange(n) + 0.5) * (m / n)).astype(int) for n, m in zip(size, labels.shape, strict=True))
    sampled = torch.from_numpy(labels[rows[:, None], columns])
    if (sampled == VOID).all():
        raise DataError(f"{pair.label}: all pixels are void, or too few are not")
    return sampled, frame
