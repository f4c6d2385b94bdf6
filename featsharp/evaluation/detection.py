"""Detection: a small detector on frozen features, by COCO's average precision (FeatSharp, arXiv 2502.16025, table 1).

The protocol, the same for every encoder of a table:

- Every picture is scaled to max(2, ceil(factor)) times the size of the low-resolution pass, without its aspect ratio,
  so that encoders get the same picture, and its features are computed once.
- A detector (see :mod:`featsharp.evaluation.detector`) of three levels, of 4, 2 and 1 cells per low-resolution token
  and side, is trained on the features of the training split, without augmentation. It has the same layers and weights
  whatever the factor is.
- Average precision on the validation split is that of faster-coco-eval, its intervals are over pictures.

The paper trains by Detectron2 on COCO 2017 (118,000 pictures), on features of RADIOv2.5-L and SigLIP2; numbers compare
within a table only.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from featsharp.errors import DataError, FeatSharpError, MissingDependencyError
from featsharp.evaluation.average_precision import score_detections
from featsharp.evaluation.detector import MASK_CELLS, Detector, Objects, crop, detect, fit_detector
from featsharp.evaluation.features import find_low_res_size, shown_size
from featsharp.evaluation.head import FeatureCache, FeatureReader, Schedule, read_kept, read_skipped, read_targets
from featsharp.evaluation.keys import digest, file_key
from featsharp.evaluation.layouts.detection import LAYOUTS, DetectionData, DetectionSplit, open_detection
from featsharp.evaluation.layouts.frames import Frame, decode_labelled
from featsharp.evaluation.layouts.labels import LabelledImage
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.layouts.outlines import ObjectBox
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task
from featsharp.evaluation.tables import detection_table
from featsharp.files import write_file
from featsharp.memory import parse_memory
from featsharp.model import SharpEncoder
from featsharp.settings import setting

logger = logging.getLogger(__name__)

# Samples per cell and side of a mask's target, whose mean is the share that the object covers.
_SAMPLES = 4


@dataclass(frozen=True)
class DetectionHead:
    """A detector trained for one encoder.

    Attributes:
        cache: Of features.
        grid: (h, w) of the low-resolution map.
        detector: In eval mode.
        categories: Number of each class in the data set.
        images: Number of training images.
        skipped: Name and reason of training images that could not be used.
        key: Digest of what decides the weights.
    """

    cache: FeatureCache
    grid: tuple[int, int]
    detector: Detector
    categories: list[int]
    images: int
    skipped: list[tuple[str, str]]
    key: str


@dataclass
class DetectionTask(Task):
    """Detection: a dense head on frozen features, by COCO's average precision; with masks where asked for."""

    name: ClassVar[str] = "detection"

    data: Path = setting(Path("."), "folder of the data set", type=Path, metavar="DIR", required=True)
    layout: str = setting("auto", "how it lies on disk", choices=("auto", *LAYOUTS))
    masks: bool = setting(False, "find masks as well, by a head on the boxes")
    measure_on: str = setting("val", "split to measure on", choices=("val", "train"))
    low_res_size: tuple[int, int] | None = setting(
        None, "pixels of the low-resolution pass; default: the backbone's native size", type="size", metavar="HxW"
    )
    steps: int = setting(400, "updates of the detector", type="count", metavar="N")
    batch: int = setting(8, "images per update", type="count", metavar="N")
    learning_rate: float = setting(2e-3, "peak of the detector's learning rate", type=float, metavar="X")
    train_limit: int | None = setting(
        None, "only N training images, spread evenly over their list", type="count", metavar="N"
    )
    limit: int | None = setting(
        None, "only N images to measure on, spread evenly over their list", type="count", metavar="N"
    )
    seed: int = setting(0, "of the detector's weights and of the order of images", type=int, metavar="N")
    cache_dir: Path | None = setting(
        None,
        "keep features and detectors there for later runs; default: until the result is written",
        type=Path,
        metavar="DIR",
    )
    cache_limit: str = setting("4GiB", "most room for features on disk; others are computed again", metavar="SIZE")

    # The data

    @cached_property
    def dataset(self) -> DetectionData:
        """Pictures of both splits, and their objects."""
        return open_detection(self.data, self.layout)

    @property
    def training_pairs(self) -> list[LabelledImage]:
        """Pictures to train on, at most as many as the steps take."""
        pairs = self.dataset.train.pairs
        return spread(pairs, self.train_limit, self.steps * self.batch)

    @property
    def measured(self) -> DetectionSplit:
        """The split to measure on."""
        if self.measure_on == "train":
            return DetectionSplit(self.training_pairs, self.dataset.train.labels)
        return self.dataset.val

    def items(self) -> list[Item]:
        return [Item(pair.image, pair) for pair in spread(self.measured.pairs, self.limit)]

    # The head

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> DetectionHead:
        low_res = find_low_res_size(encoder, self.low_res_size)
        reader = FeatureReader(encoder, shown_size(encoder, low_res), low_res)
        grid = encoder.backbone.grid_size(low_res)
        schedule = Schedule(self.steps, self.batch, self.learning_rate, self.seed)
        pairs = self.training_pairs
        with ExitStack() as stack:
            folder = self.cache_dir or run.scratch
            folder = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="featsharp-")))
            cache = FeatureCache(reader, "high_res", folder / "features", parse_memory(self.cache_limit))
            files = [[file_key(pair.root, pair.image), file_key(pair.root, pair.label)] for pair in pairs]
            key = digest("detector 2", cache.key, files, asdict(schedule), self.masks)
            path = folder / "heads" / f"{key}.safetensors"
            loaded = _load(path, encoder, self.masks)
            if loaded is not None:
                detector, (categories, images, skipped) = loaded
            else:
                pairs, frames, objects, skipped = read_targets(cache, pairs, self._read_objects, run.progress)
                categories = sorted({one.category for of_image in objects for one in of_image[0]})
                targets = [_make_target(of_image, size, categories, self.masks) for of_image, size in objects]
                if not categories:
                    raise DataError(f"none of {len(pairs)} training pictures has an object; there is nothing to learn")
                channels = len(cache.get(pairs[0], frames[0]))
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed)
                    detector = Detector(channels, len(categories), masks=self.masks)
                fit_detector(
                    lambda number: cache.get(pairs[number], frames[number]),
                    targets,
                    detector,
                    grid,
                    schedule,
                    encoder.device,
                    progress=run.progress,
                )
                images = len(pairs)
                state = {name: value.cpu().contiguous() for name, value in detector.state_dict().items()}
                try:
                    write_file(path, save(state, {"about": json.dumps([categories, images, skipped])}))
                except FeatSharpError as error:
                    logger.warning("the detector is not kept, a stopped evaluation will train it again: %s", error)
            if self.cache_dir is None:
                shutil.rmtree(cache.folder, ignore_errors=True)  # the limit is for each encoder
        return DetectionHead(cache, grid, detector, categories, images, skipped, key)

    def _read_objects(self, pair: LabelledImage) -> tuple[tuple[list[ObjectBox], tuple[int, int]], Frame]:
        """Read the objects of a training picture that can be learnt, and its size."""
        labels = self.dataset.train.labels
        frame = labels.frame(pair.image)
        image = decode_labelled(pair.root / pair.image, pair.image, frame)
        size = image.height, image.width
        objects = [one for one in labels.boxes(pair.image, size) if not one.crowd]
        return ([one for one in objects if one.box[0] < one.box[2] and one.box[1] < one.box[3]], size), frame

    # The score

    def measure(self, encoder: SharpEncoder, item: Item, head: DetectionHead) -> Row:
        pair: LabelledImage = item.data
        labels = self.measured.labels
        frame = labels.frame(pair.image)
        image = decode_labelled(pair.root / pair.image, pair.image, frame)
        size = image.height, image.width
        truth = labels.boxes(pair.image, size)
        if self.cache_dir is None:
            features = head.cache.reader.read(image, "high_res")[0]
        else:
            features = head.cache.get(pair, frame).to(encoder.device)
        found = detect(head.detector, features, head.grid)
        pixels = found.boxes.cpu().double() * torch.tensor([size[1], size[0]] * 2)
        masks = [None] * len(pixels) if found.masks is None else found.masks
        return {
            "objects": sum(not one.crowd for one in truth),
            "size": list(size),
            "_truth": [
                _annotation(one.category, one.box, one.mask() if self.masks else None)
                | {"area": one.area, "iscrowd": int(one.crowd)}
                for one in truth
            ],
            "_found": [
                _annotation(head.categories[name], box, None if mask is None else _paste(mask, box, size))
                | {"score": round(score, 6)}
                for name, score, box, mask in zip(
                    found.classes.tolist(), found.scores.tolist(), pixels.tolist(), masks, strict=True
                )
            ],
        }

    def score(self, rows: Sequence[Row], head: DetectionHead) -> Summary:
        summary = score_detections(rows, self.dataset.names)
        if self.masks:
            of_masks = score_detections(rows, self.dataset.names, kind="segm")
            summary |= {f"mask_{name}": value for name, value in of_masks.items()}
        return {
            **summary,
            "layout": self.dataset.layout,
            "train_images": head.images,
            "train_skipped": [list(entry) for entry in head.skipped],
            "factor": float(head.cache.reader.encoder.factor),
            "low_res_size": list(head.cache.reader.low_res_size),
            "image_size": list(head.cache.reader.image_size),
        }

    def table(self, encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Format average precision by size, and the gain over the backbone itself."""
        return detection_table({label: [one["result"]] for label, one in encoders.items() if "result" in one})

    # Cache keys

    def item_key(self, item: Item) -> object:
        pair: LabelledImage = item.data
        return [file_key(pair.root, pair.image), self.measured.labels.key(pair.image)]

    def head_key(self, head: DetectionHead) -> str:
        return head.key


def _make_target(
    objects: Sequence[ObjectBox], size: tuple[int, int], categories: Sequence[int], masks: bool
) -> Objects:
    """Make the target of a training picture of ``size`` (H, W)."""
    pixels = torch.tensor([one.box for one in objects], dtype=torch.float32).view(-1, 4)
    boxes = pixels / torch.tensor([size[1], size[0]] * 2)
    classes = torch.tensor([categories.index(one.category) for one in objects], dtype=torch.long)
    if not masks:
        return Objects(boxes, classes)
    cells = 2 * MASK_CELLS
    shares = [
        F.avg_pool2d(crop(torch.from_numpy(one.mask())[None].float(), box[None], cells * _SAMPLES)[0], _SAMPLES)
        for one, box in zip(objects, boxes, strict=True)
    ]
    return Objects(boxes, classes, torch.cat(shares) if shares else torch.empty(0, cells, cells))


def _paste(mask: Tensor, box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Enlarge a mask [28, 28] to its box in pixels of a picture of ``size`` (H, W): [H, W] bool."""
    left, top, right, bottom = box
    cells = mask.new_tensor([len(mask) / max(right - left, 1e-6), len(mask) / max(bottom - top, 1e-6)])
    x0, y0, x1, y1 = int(left), int(top), min(size[1], -int(-right // 1)), min(size[0], -int(-bottom // 1))
    x = (torch.arange(x0, x1, device=mask.device) + 0.5 - left) * cells[0] / len(mask) * 2 - 1
    y = (torch.arange(y0, y1, device=mask.device) + 0.5 - top) * cells[1] / len(mask) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None].to(mask)
    shown = np.zeros(size, dtype=bool)
    if grid.numel():
        inside = F.grid_sample(mask[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
        shown[y0:y1, x0:x1] = (inside >= 0.5).cpu().numpy()
    return shown


def _annotation(category: int, box: Sequence[float], mask: np.ndarray | None) -> dict[str, Any]:
    """Make an annotation of COCO from a box in pixels and, where there is one, a mask."""
    left, top, right, bottom = box
    annotation: dict[str, Any] = {
        "category_id": category,
        "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
    }
    if mask is not None:
        try:
            from faster_coco_eval.core.mask import encode
        except ImportError as error:
            raise MissingDependencyError(
                "masks need the package faster-coco-eval: pip install 'featsharp[eval]'"
            ) from error
        runs = encode(np.asfortranarray(mask.astype(np.uint8)))
        annotation["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    return annotation


def _load(
    path: Path, encoder: SharpEncoder, masks: bool
) -> tuple[Detector, tuple[list[int], int, list[tuple[str, str]]]] | None:
    """Load a trained detector, its categories, the number of its images and those left out; None without a file."""

    def build(state: dict[str, Tensor], about: Any) -> tuple[Detector, tuple[list[int], int, list[tuple[str, str]]]]:
        categories, images, skipped = about
        detector = Detector(len(state["mean"]), len(categories), masks=masks)
        detector.load_state_dict(state)
        return detector.to(encoder.device).eval().requires_grad_(False), (categories, images, read_skipped(skipped))

    return read_kept(path, build)
