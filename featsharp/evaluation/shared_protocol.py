"""The protocol that upsamplers share from JAFAR (arXiv 2506.11136) on: a linear head on sharp features.

- A picture is scaled until it just covers 448 x 448, of which the centre is taken; so are its labels, of the nearest
  pixels. The backbone sees it whole (``--low-res-size`` lets it see a smaller one).
- A method's map, of its factor, is brought to 448 x 448 bilinearly; a factor of 14 makes that size of 32 x 32 tokens.
- The head is a 1 x 1 convolution on batch-normalised features (see :mod:`featsharp.evaluation.protocol_head`), trained
  by AdamW at a constant learning rate of 5e-4, weight decay 1e-5, two pictures a step, 20 rounds.
- Segmentation: cross-entropy without void pixels; mean intersection over union of all pictures together, of those that
  occur. Depth (NYUv2): 256 bins from 0.001 to 10 m, of which the mean is taken (DINOv2's linear head), trained by the
  scale-invariant logarithmic loss; share of pixels within a factor of 1.25, and RMSE in metres, means over pictures.

Unlike in the kit, pictures are not flipped at random, so that features can be kept, and a copy of the kit that we saw
moves the learning rate up and down within 40 steps and has no batch normalisation (``--no-batch-norm``).

A second head is trained on the low-resolution features, and its class probabilities are upsampled by the same method
instead of the features: "probabilities" in the result. A method that was trained for features of one width, and one
that has no map of the class probabilities, has none.
"""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.backbones.base import BackboneOutput
from featsharp.backbones.wrapped import WrappedBackbone
from featsharp.builder import create_encoder
from featsharp.errors import DataError, unknown_name
from featsharp.evaluation.correspondence import CorrespondenceTask
from featsharp.evaluation.depth import depth_scores, log_error
from featsharp.evaluation.estimates import Estimate, estimate_mean
from featsharp.evaluation.features import find_low_res_size, whitened_crop
from featsharp.evaluation.head import FeatureCache, FeatureReader, MapName
from featsharp.evaluation.keys import file_key
from featsharp.evaluation.layouts.depth import DepthData, open_depth
from featsharp.evaluation.layouts.frames import Frame, decode_labelled
from featsharp.evaluation.layouts.labels import VOID, LabelCode, LabelledImage
from featsharp.evaluation.layouts.layout import Sample, spread
from featsharp.evaluation.layouts.segmentation import open_segmentation
from featsharp.evaluation.papers import papers_of
from featsharp.evaluation.protocol_head import KitHead, KitSchedule, Training, read_target, train_kit_head
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task, from_json
from featsharp.evaluation.segmentation import confusion, pool_rows, score_image
from featsharp.evaluation.video import VideoTask
from featsharp.memory import parse_memory
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.settings import setting
from featsharp.terminal import align
from featsharp.upsamplers import create_upsampler
from featsharp.upsamplers.base import Upsampler

NYU, SPAIR, DAVIS = "nyu-depth", "spair", "davis"
# Layouts of segmentation by the names of sets.
SEGMENTATION = {
    "voc": "voc",
    "coco-stuff": "coco-stuff-27",
    "ade20k": "ade20k",
    "cityscapes": "cityscapes",
    "camvid": "camvid",
}
SETS = (*SEGMENTATION, NYU, SPAIR, DAVIS)
# Pictures to train and to measure on, as papers have them.
COUNTS = {
    "voc": (1464, 1449),
    "ade20k": (20210, 2000),
    "cityscapes": (2975, 500),
    NYU: (795, 654),
}

# Features are kept where their map has at most this share of the cells of the labels.
KEPT_SHARE = 1 / 4
# Metres of the first and of the last bin; depth beyond is not measured.
DEPTH_RANGE = (1e-3, 10.0)
BINS = 256


class SetData(NamedTuple):
    """A data set of the protocol."""

    train: list[Sample]
    val: list[Sample]
    classes: tuple[str, ...]  # none for depth
    key: object  # JSON values that change with the meaning of labels


class MapReader(NamedTuple):
    """Maps of an encoder, and the sizes that they are enlarged to."""

    reader: FeatureReader
    map_name: MapName
    sizes: list[tuple[int, int]]
    kept: bool  # whether they are small enough to be kept on disk

    def read(self, image: Image) -> Tensor:
        """Compute the map [1, C, h, w] of a picture."""
        return self.reader.read(image, self.map_name)


class Heads(NamedTuple):
    """Heads of one encoder."""

    maps: MapReader
    head: KitHead
    low_res_size: tuple[int, int]
    small: KitHead | None  # of the low-resolution features
    probabilities: FeatureReader | None  # of its upsampled class probabilities, and channels of zeros


@dataclass
class ProtocolTask(Task):
    """The protocol that JAFAR, AnyUp, NAF and UPLiFT share: a linear head on features at 448 x 448."""

    name: ClassVar[str] = "protocol"

    set: str = setting("", "data set; coco-stuff has its 27 groups for classes", choices=SETS, required=True)
    data: Path = setting(Path("."), "its folder", type=Path, metavar="DIR", required=True)
    image_size: tuple[int, int] = setting(
        (448, 448), "pixels of the picture and of the labels", type="size", metavar="HxW"
    )
    low_res_size: tuple[int, int] | None = setting(
        None, "pixels of the low-resolution pass; default: those of the picture", type="size", metavar="HxW"
    )
    epochs: int = setting(KitSchedule.epochs, "rounds of training of a head", type="count", metavar="N")
    learning_rate: float = setting(KitSchedule.learning_rate, "of the head, constant", type=float, metavar="X")
    batch_norm: bool = setting(True, "batch normalisation before the convolution")
    probabilities: bool = setting(True, "upsample class probabilities, too, where the method can")
    train_limit: int | None = setting(
        None, "only N training pictures, spread evenly over their list", type="count", metavar="N"
    )
    limit: int | None = setting(
        None, "only N pictures to measure on, spread evenly over their list", type="count", metavar="N"
    )
    seed: int = setting(0, "of the heads and of the order of training pictures", type=int, metavar="N")
    cache_dir: Path | None = setting(
        None,
        "keep features and heads there for later runs, which train further from them; default: until the result is "
        "written",
        type=Path,
        metavar="DIR",
    )
    cache_limit: str = setting("4GiB", "most room for features on disk; others are computed again", metavar="SIZE")

    def __post_init__(self) -> None:
        if self.set not in SETS:
            raise unknown_name("set", self.set, SETS)

    # The data

    @cached_property
    def dataset(self) -> SetData:
        """Both splits of the data set."""
        if self.set == NYU:
            depth = open_depth(self.data)
            if not depth.layout.startswith("nyu"):
                raise DataError(f"{self.data} has frames of layout {depth.layout!r}; set {NYU} is NYU Depth v2")
            train, val = ([_depth_sample(entry, depth) for entry in split] for split in (depth.train, depth.val))
            return SetData(train, val, (), DEPTH_RANGE)
        content = open_segmentation(self.data, SEGMENTATION[self.set])
        train, val = ([_labelled_sample(pair, content.code) for pair in pairs] for pairs in content[2:])
        return SetData(train, val, content.code.classes, list(content.code.codes.items()))

    def items(self) -> list[Item]:
        if self._other is not None:
            return list(self._other.items())
        return [Item(sample.name, sample) for sample in spread(self.dataset.val, self.limit)]

    @cached_property
    def _other(self) -> Task | None:
        """The task of a set that is measured without a head; None for other sets."""
        if self.set == SPAIR:
            return CorrespondenceTask(self.data, layout=SPAIR, low_res_size=self._low_res_size, limit=self.limit)
        if self.set == DAVIS:
            return VideoTask(self.data, low_res_size=self.low_res_size, limit=self.limit)
        return None

    @property
    def _low_res_size(self) -> tuple[int, int]:
        return self.low_res_size or self.image_size

    # The heads

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> Any:
        if self._other is not None:
            return self._other.prepare(encoder, subject, run)
        low_res = find_low_res_size(encoder, self._low_res_size)
        coarse = _coarse_encoder(encoder)
        with ExitStack() as stack:
            folder = self.cache_dir or run.scratch
            folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="featsharp-")))
            train = partial(self._train, folder=folder, run=run)
            maps = self._maps(encoder, coarse, low_res)
            head = train(maps)
            small, reader = None, None
            classes = len(self.dataset.classes)
            upsampler = class_upsampler(encoder, classes) if self.probabilities and classes else None
            if upsampler is not None:
                small = train(self._maps(coarse, coarse, low_res))
                upsampled = create_encoder(ClassBackbone(coarse, small, upsampler.embed_dim), upsampler)
                reader = FeatureReader(upsampled.to(encoder.device), self.image_size, low_res, whitened_crop)
            if self.cache_dir is None:
                shutil.rmtree(folder / "features", ignore_errors=True)  # the limit is for each encoder
        return Heads(maps, head, low_res, small, reader)

    def _maps(self, encoder: SharpEncoder, coarse: SharpEncoder, low_res: tuple[int, int]) -> MapReader:
        """Choose the smallest map whose bilinear enlargement is the method's result at the size of the labels."""
        grid = torch.empty(1, 1, *encoder.backbone.grid_size(low_res), device="meta")
        result = encoder.upsampler.high_res_grid(grid)
        # What needs neither picture nor training enlarges bilinearly, if at all: the head is applied before.
        linear = encoder.upsampler.needs == "nothing" and not encoder.upsampler.trainable
        sizes = [result, self.image_size] if linear else [self.image_size]
        stored = size_of(grid) if linear else result
        reader = FeatureReader(coarse if linear else encoder, self.image_size, low_res, whitened_crop)
        return MapReader(reader, "high_res", sizes, math.prod(stored) <= KEPT_SHARE * math.prod(self.image_size))

    def _train(self, maps: MapReader, folder: Path, run: Run) -> KitHead:
        cache = FeatureCache(maps.reader, maps.map_name, folder / "features", parse_memory(self.cache_limit))

        def features(sample: Sample) -> Tensor:
            if maps.kept:
                return cache.read([sample.key], sample.read_image)
            return maps.read(sample.read_image())[0]

        classes = len(self.dataset.classes)
        training = Training(
            spread(self.dataset.train, self.train_limit),
            features,
            maps.sizes,
            classes or BINS,
            class_loss if classes else depth_loss,
            [cache.key, self.set, self.dataset.key],
        )
        schedule = KitSchedule(
            self.epochs, learning_rate=self.learning_rate, seed=self.seed, batch_norm=self.batch_norm
        )
        device = maps.reader.encoder.device
        return train_kit_head(training, schedule, device, folder / "heads", progress=run.progress)

    # The score

    def measure(self, encoder: SharpEncoder, item: Item, head: Any) -> Row:
        if self._other is not None:
            return self._other.measure(encoder, item, head)
        sample: Sample = item.data
        truth = read_target(sample, self.image_size).numpy()
        if not (truth != VOID if self.dataset.classes else _measurable(truth)).any():
            raise DataError(
                f"{sample.name}: no pixel of its centre has a {'class' if self.dataset.classes else 'depth'}"
            )
        image = sample.read_image()
        output = head.head(head.maps.read(image))
        if not self.dataset.classes:
            return score_depth(expected_depth(output)[0].cpu().numpy(), truth)
        classes = len(self.dataset.classes)
        row = score_image(confusion(truth, output.argmax(1)[0].cpu().numpy(), classes))
        if head.probabilities is not None:
            shares = head.probabilities.read(image, "high_res")[:, :classes]
            chosen = resize(shares, self.image_size).argmax(1)[0].cpu().numpy()
            row["_probabilities"] = score_image(confusion(truth, chosen, classes))
        return row

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        if self._other is not None:
            return self._other.score(rows, head)
        summary: Summary = {}
        if self.dataset.classes:
            pooled = pool_rows(rows, self.dataset.classes)
            summary |= {name: pooled[name] for name in ("miou", "pixel_accuracy")}
            if head.probabilities is not None:
                of_classes = pool_rows([row["_probabilities"] for row in rows], self.dataset.classes)
                summary |= {f"{name}_probabilities": of_classes[name] for name in ("miou", "pixel_accuracy")}
            summary["iou"] = pooled["iou"]
        else:
            summary |= {name: estimate_mean([row[name] for row in rows]) for name in ("d1", "rmse")}
        return summary | {
            "train_images": head.head.images,
            "train_skipped": [list(entry) for entry in head.head.skipped],
            "low_res_size": list(head.low_res_size),
            "map_size": list(head.maps.sizes[0]),
            "counts_of_papers": list(COUNTS.get(self.set, ())),
        }

    def table(self, encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Format ours, then the tables of papers, which are marked as theirs."""
        columns = {
            "miou": ("mIoU", 100), "miou_probabilities": ("mIoU, probabilities", 100), "d1": ("d1", 100),
            "rmse": ("RMSE", 1), "pck@0.1": ("PCK@0.1", 100), "j_and_f": ("J&F", 100), "j": ("J", 100), "f": ("F", 100),
        }  # fmt: skip
        results = {label: content.get("result", {}) for label, content in encoders.items()}
        shown = [name for name in columns if any(name in result for result in results.values())]
        rows = []
        for label, result in results.items():
            values = [from_json(result.get(name)) for name in shown]
            cells = [
                f"{columns[name][1] * value.value:.2f}" if isinstance(value, Estimate) else "-"
                for name, value in zip(shown, values, strict=True)
            ]
            rows.append([label, *cells])
        how = "" if self._other is not None else f", heads of {self.epochs} epochs"
        lines = [f"ours, {self.set}{how}:", *align(("encoder", *(columns[n][0] for n in shown)), rows)]
        for paper in papers_of(self.set):
            lines += ["", *paper.lines()]
        return lines

    # Cache keys

    def item_key(self, item: Item) -> object:
        return item.data.key if self._other is None else self._other.item_key(item)

    def head_key(self, head: Any) -> object:
        if self._other is not None:
            return self._other.head_key(head)
        return [head.head.key, head.small and head.small.key]


class ClassBackbone(WrappedBackbone):
    """Class probabilities in place of the features of an encoder, whose low-resolution map a head was trained on.

    Args:
        coarse: The encoder, of factor 1.
        head: Of its features.
        embed_dim: Channels: the classes, and zeros.
    """

    def __init__(self, coarse: SharpEncoder, head: KitHead, embed_dim: int) -> None:
        super().__init__(coarse.backbone)
        self.embed_dim = embed_dim
        self.summary_dim = None
        self.embeds_patches = False
        self.coarse, self.probe = coarse, head.probe
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        features = self.coarse(
            images, low_res_size=size_of(images), denormalize=self.coarse.normalizer.invertible
        ).high_res
        shares = self.probe(features).softmax(1)
        return BackboneOutput(F.pad(shares, (0, 0, 0, 0, 0, self.embed_dim - shares.shape[1])), None)


def class_upsampler(encoder: SharpEncoder, classes: int) -> Upsampler | None:
    """Build the upsampler of an encoder for class probabilities; None where its weights are for features alone.

    Args:
        encoder: Built from names.
        classes: Their number; channels of zeros follow, as heads of attention divide the channels.
    """
    recipe, upsampler = encoder.recipe, encoder.upsampler
    name = recipe.get("upsampler")
    # Probabilities have no patches that may overlap.
    if name is None or upsampler.num_maps > 1 or upsampler.needs.startswith("backbone"):
        return None
    backbone = WrappedBackbone(encoder.backbone)
    backbone.embed_dim = -(-classes // 4) * 4
    built = create_upsampler(name, backbone, recipe["factor"], options=recipe["options"])
    given, wanted = ({key: x.shape for key, x in one.state_dict().items()} for one in (upsampler, built))
    if given != wanted:
        return None
    built.load_state_dict(upsampler.state_dict())
    return built


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy over pixels that are not void, of which there may be none."""
    total = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="sum")
    return total / (labels != VOID).sum().clamp(min=1)


def expected_depth(logits: Tensor) -> Tensor:
    """Compute depth [B, H, W] in metres of logits [B, BINS, H, W]: the mean of the bins, weighted by relu + 0.1."""
    weights = F.relu(logits) + 0.1
    bins = torch.linspace(*DEPTH_RANGE, logits.shape[1], device=logits.device)
    return torch.einsum("bkhw,k->bhw", weights, bins) / weights.sum(1)


def depth_loss(logits: Tensor, depth: Tensor) -> Tensor:
    """Compute the scale-invariant error of logits against depth [B, H, W], of which nothing may be known."""
    known = torch.where(_measurable(depth), depth, 0)
    return log_error(expected_depth(logits)[:, None], known) if known.any() else logits.sum() * 0


def score_depth(prediction: np.ndarray, truth: np.ndarray) -> Row:
    """Score depth [H, W] in metres: "d1", the share of pixels within a factor of 1.25, and "rmse" in metres."""
    valid = _measurable(truth)
    scores = depth_scores(prediction[valid].astype(np.float64), truth[valid].astype(np.float64))
    return {"d1": scores["d1"], "rmse": scores["rmse"]}


def _measurable(depth: Any) -> Any:
    return (depth > DEPTH_RANGE[0]) & (depth < DEPTH_RANGE[1])


def _depth_sample(entry: Any, data: DepthData) -> Sample:
    def depth() -> np.ndarray:
        metres: np.ndarray = data.read(entry).astype(np.float32)
        return metres

    return Sample(entry.image, entry.keys(), lambda: entry.decode(Frame("its depth")), depth)


def _labelled_sample(pair: LabelledImage, code: LabelCode) -> Sample:
    def read_image() -> Image:
        frame = code.read(pair.root / pair.label, pair.label).frame
        return decode_labelled(pair.root / pair.image, pair.image, frame)

    key = [file_key(pair.root, pair.image), file_key(pair.root, pair.label)]
    return Sample(pair.image, key, read_image, lambda: code.read(pair.root / pair.label, pair.label).classes)


def _coarse_encoder(encoder: SharpEncoder) -> SharpEncoder:
    """Build an encoder of the low-resolution features of another, which shares its parts."""
    identity = create_upsampler("identity", encoder.backbone, 1)
    coarse = SharpEncoder(encoder.backbone, identity, encoder.normalizer, encoder.bias_buffer)
    buffer = encoder.bias_buffer is not None
    coarse.recipe = {"upsampler": "identity", "factor": 1, "options": {}, "bias_buffer": buffer}
    coarse.recipe["normalizer"] = encoder.recipe.get("normalizer")
    return coarse.to(encoder.device).eval()
