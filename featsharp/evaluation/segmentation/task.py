"""Semantic segmentation with a linear probe: how much do sharp features help a head that is as simple as it gets?

The protocol, the same for every encoder of a table (FeatSharp, arXiv 2502.16025, figure 3, without augmentation):

- Every picture is scaled to max(2, ceil(factor)) times the size of the low-resolution pass, so that encoders see the
  same picture, and its shape is not kept.
- A head (see :mod:`featsharp.evaluation.segmentation.probe`) is trained on the features of the training split. Its
  logits are scaled to the labels, by default of four times the low-resolution grid; labels are sampled at the centres
  of their cells.
- On the validation split logits are scaled to the size of each label file. Void pixels do not count. mIoU is the mean
  over the classes that occur in the truth or the prediction, from the counts of all images together.

With ``head="low-res"`` the head is trained on the encoder's own low-resolution map and applied to the sharp one: does
an upsampler fit heads that exist already?
"""

import hashlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from featsharp.data.images import decode_image
from featsharp.errors import ConfigError, DataError, FeatSharpError, InputError
from featsharp.evaluation.identity import digest, file_key
from featsharp.evaluation.segmentation.features import FeatureCache, FeatureReader
from featsharp.evaluation.segmentation.labels import VOID, LabelCode
from featsharp.evaluation.segmentation.probe import LinearProbe, Schedule, fit_probe, load_probe, save_probe
from featsharp.evaluation.segmentation.readers import (
    LAYOUTS,
    FolderOptions,
    Pair,
    SegmentationData,
    open_segmentation,
)
from featsharp.evaluation.segmentation.scores import confusion, image_row, pool_rows
from featsharp.evaluation.sizes import find_low_res_size, shown_size
from featsharp.evaluation.task import Item, Row, Subject, Summary, Task
from featsharp.memory import parse_memory
from featsharp.model import SharpEncoder
from featsharp.ops.boxes import Box
from featsharp.ops.resize import enlarge, resize
from featsharp.settings import setting

logger = logging.getLogger(__name__)

# Logits that are held at a time when they are scaled to a label: 256 MiB with what scaling takes.
_MAX_LOGITS = 2**26 // 3


class Trained(NamedTuple):
    """A head for one encoder, and what became of the training images."""

    reader: FeatureReader
    probe: LinearProbe
    label_size: tuple[int, int]
    images: int
    skipped: list[tuple[str, str]]


@dataclass
class SegmentationTask(Task):
    """Semantic segmentation: a linear probe on frozen features, by mean intersection over union."""

    name: ClassVar[str] = "segmentation"
    title: ClassVar[str] = "how much do sharp features help a linear segmentation head?"

    data: Path = setting(Path("."), "folder of the data set", type=Path, metavar="DIR", required=True)
    layout: str = setting("auto", "how it lies on disk", choices=("auto", *LAYOUTS))
    low_res_size: tuple[int, int] | None = setting(
        None, "pixels of the low-resolution pass; default: the backbone's native size", type="size", metavar="HxW"
    )
    head: str = setting(
        "own", "features that the head is trained on: the sharp ones, or the low-res ones", choices=("own", "low-res")
    )
    steps: int = setting(Schedule.steps, "updates of the head", type="count", metavar="N")
    batch: int = setting(Schedule.batch, "images per update", type="count", metavar="N")
    learning_rate: float = setting(Schedule.learning_rate, "peak of the head's learning rate", type=float, metavar="X")
    label_size: tuple[int, int] | None = setting(
        None, "labels in training; default: four times the low-resolution grid", type="size", metavar="HxW"
    )
    train_limit: int | None = setting(
        None, "only N training images, spread evenly over their list", type="count", metavar="N"
    )
    limit: int | None = setting(None, "only the first N validation images", type="count", metavar="N")
    seed: int = setting(0, "of the order of training images", type=int, metavar="N")
    cache_dir: Path | None = setting(
        None,
        "keep features and heads there for later runs; default: features in a temporary folder",
        type=Path,
        metavar="DIR",
    )
    cache_limit: str = setting("4GiB", "most room for features on disk; others are computed again", metavar="SIZE")
    classes: int | None = setting(
        None,
        "classes of the layout folder without classes.txt; default: as many as its training labels show",
        type="count",
        metavar="N",
    )
    ignore_index: int = setting(255, "label of void pixels in the layout folder", type=int, metavar="N")

    def items(self) -> Iterator[Item]:
        for pair in self.dataset.val[: self.limit]:
            yield Item(pair.image, pair)

    def begin(self, encoder: SharpEncoder, subject: Subject) -> Trained:
        low_res = find_low_res_size(encoder, self.low_res_size)
        reader = FeatureReader(encoder, shown_size(encoder, low_res), low_res)
        grid = encoder.backbone.grid_size(low_res)
        label_size = self.label_size or (4 * grid[0], 4 * grid[1])
        part = self._part(encoder)
        with self._folder() as folder:
            cache = FeatureCache(reader, part, folder / "features", parse_memory(self.cache_limit))
            heads = (self.cache_dir or self.scratch or folder) / "heads"
            place = heads / f"{self._head_key(cache.key, label_size)}.safetensors"
            found = load_probe(place, encoder.device)
            if found is not None:
                probe, (images, skipped) = found
                return Trained(reader, probe, label_size, images, [(name, why) for name, why in skipped])
            pairs, labels, skipped = self._prepare(cache, label_size)
            logger.info("%s: training a head on %d images", subject.label, len(pairs))
            probe = fit_probe(
                lambda number: cache.get(pairs[number]).map,
                labels,
                len(self.dataset.code.classes),
                self._schedule,
                encoder.device,
            )
            try:
                save_probe(probe, place, [len(pairs), skipped])
            except FeatSharpError as error:
                logger.warning("the head is not kept, a stopped evaluation will train it again: %s", error)
        return Trained(reader, probe, label_size, len(pairs), skipped)

    def measure(self, encoder: SharpEncoder, item: Item, number: int, state: Trained) -> Row:
        pair: Pair = item.data
        truth = self.dataset.code.read(pair.root / pair.label, pair.label)
        image = decode_image(pair.root / pair.image, name=pair.image, upright=False)
        check_sizes(pair, (image.height, image.width), truth)
        if (truth == VOID).all():
            raise DataError(f"{pair.label}: all pixels are void")
        logits = state.probe(state.reader.read(image, "high_res"))
        return image_row(confusion(truth, predict(logits, truth.shape), len(self.dataset.code.classes)))

    def stamp(self, item: Item) -> str:
        pair: Pair = item.data
        return digest(file_key(pair.root, pair.image), file_key(pair.root, pair.label))

    def state_key(self, state: Trained) -> str:
        return hashlib.sha256(state.probe.classify.weight.cpu().numpy().tobytes()).hexdigest()

    def summarize(self, rows: Sequence[Row], state: Trained) -> Summary:
        reader = state.reader
        return {
            **pool_rows(rows, self.dataset.code.classes),
            "train_images": state.images,
            "train_skipped": [list(entry) for entry in state.skipped],
            "layout": self.dataset.layout,
            "factor": float(reader.encoder.factor),
            "low_res_size": list(reader.low_res_size),
            "image_size": list(reader.image_size),
            "label_size": list(state.label_size),
        }

    @cached_property
    def dataset(self) -> SegmentationData:
        """What there is to train and to measure on."""
        return open_segmentation(self.data, self.layout, FolderOptions(self.classes, self.ignore_index))

    @cached_property
    def _train_pairs(self) -> list[Pair]:
        pairs = self.dataset.train
        # No more than the head will see.
        count = min(self.train_limit or len(pairs), len(pairs), self.steps * self.batch)
        return [pairs[number * len(pairs) // count] for number in range(count)]

    @property
    def _schedule(self) -> Schedule:
        return Schedule(self.steps, self.batch, self.learning_rate, self.seed)

    def _part(self, encoder: SharpEncoder) -> Literal["high_res", "low_res"]:
        """The map that the head is trained on."""
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

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """Where features and heads are kept: the user's, or one that lives as long as the training."""
        if self.cache_dir is not None:
            yield self.cache_dir
            return
        with tempfile.TemporaryDirectory(prefix="featsharp-") as name:
            yield Path(name)

    def _head_key(self, features: str, label_size: tuple[int, int]) -> str:
        """Changes when the trained head would."""
        files = [[file_key(pair.root, pair.image), file_key(pair.root, pair.label)] for pair in self._train_pairs]
        code = self.dataset.code
        return digest(features, files, code.classes, list(code.codes.items()), label_size, asdict(self._schedule))

    def _prepare(
        self, cache: FeatureCache, label_size: tuple[int, int]
    ) -> tuple[list[Pair], Tensor, list[tuple[str, str]]]:
        """Training pairs that can be used, their labels [N, h, w], and (name, reason) of the others."""
        pairs: list[Pair] = []
        skipped = []
        labels = torch.empty(len(self._train_pairs), *label_size, dtype=torch.int16)
        for pair in self._train_pairs:
            try:
                labels[len(pairs)] = _training_labels(cache, pair, self.dataset.code, label_size)
                pairs.append(pair)
            except (DataError, InputError) as error:
                reason = str(error).removeprefix(f"{pair.image}: ")
                logger.warning("training without %s: %s", pair.image, reason)
                skipped.append((pair.image, reason))
        if not pairs:
            raise DataError(
                f"{self.data}: none of {len(skipped)} training images can be used; the first, {skipped[0][0]}: "
                f"{skipped[0][1]}"
            )
        return pairs, labels[: len(pairs)], skipped


def predict(logits: Tensor, size: Sequence[int]) -> np.ndarray:
    """Most likely class of every pixel, [H, W] int64, of logits [1, K, h, w] scaled to ``size`` (H, W).

    Works in bands of rows, so that 150 classes of a large picture fit into memory.
    """
    height, width = size
    if height < logits.shape[-2] or width < logits.shape[-1]:
        scaled = resize(logits, (height, width)).argmax(1)[0]
    else:
        band = max(1, _MAX_LOGITS // (logits.shape[1] * width))
        boxes = [Box(top, min(height, top + band), 0, width) for top in range(0, height, band)]
        scaled = torch.cat([enlarge(logits, (height, width), box).argmax(1)[0] for box in boxes])
    return scaled.cpu().numpy()


def check_sizes(pair: Pair, picture_size: tuple[int, int], labels: np.ndarray) -> None:
    """Raise DataError unless an image and its labels have as many pixels."""
    if picture_size != labels.shape:
        (height, width), (h, w) = picture_size, labels.shape
        raise DataError(f"{pair.label}: the labels are {h}x{w} pixels, the image {pair.image} is {height}x{width}")


def _training_labels(cache: FeatureCache, pair: Pair, code: LabelCode, size: tuple[int, int]) -> Tensor:
    """Labels [h, w] int16 at the centres of the cells, of a pair that can be trained on."""
    labels = code.read(pair.root / pair.label, pair.label)
    check_sizes(pair, cache.get(pair).picture_size, labels)
    rows, columns = (((np.arange(n) + 0.5) * (m / n)).astype(int) for n, m in zip(size, labels.shape, strict=True))
    sampled = torch.from_numpy(labels[rows[:, None], columns])
    if (sampled == VOID).all():
        raise DataError(f"{pair.label}: all pixels are void, or too few are not")
    return sampled
