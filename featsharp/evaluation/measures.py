"""All measures of an upsampler in one table: the command ``featsharp eval all``.

ROOT/photos          fidelity and zoom cosine (tasks ``fidelity`` and ``zoom``), from one sharp map of each picture
ROOT/pf_willow       keypoints of PF-WILLOW (``correspondence``, quick protocol)
ROOT/room_depth      real views of a room (``room``)
ROOT/bsds            human boundaries, the first 24 pictures (``boundaries``, quick protocol)
ROOT/camvid          CamVid (``segmentation``, quick protocol), where it is asked for

Each folder has a layout of its task, and may be a link. A measure has the numbers that its task alone has.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from PIL.Image import Image

from featsharp.errors import ConfigError, DataError, unknown_name
from featsharp.evaluation.boundaries import BoundaryTask
from featsharp.evaluation.correspondence import CorrespondenceTask
from featsharp.evaluation.estimates import Estimate, estimate_mean
from featsharp.evaluation.features import encode_crop
from featsharp.evaluation.fidelity import FidelityMeter, pool_fidelity
from featsharp.evaluation.images import ImageTask
from featsharp.evaluation.layouts.boundaries import Picture
from featsharp.evaluation.protocol import QUICK
from featsharp.evaluation.room import RoomTask
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task, from_json
from featsharp.evaluation.segmentation import SegmentationTask
from featsharp.evaluation.zoom import ZoomMeter
from featsharp.model import SharpEncoder
from featsharp.settings import setting
from featsharp.terminal import align

FOLDERS = {
    "photos": "photos",
    "correspondence": "pf_willow",
    "room": "room_depth",
    "boundaries": "bsds",
    "segmentation": "camvid",
}
BOUNDARY_PICTURES = 24


class Column(NamedTuple):
    """A number of the table: where it is from, and its format."""

    part: str
    metric: str
    scale: int  # 100 for percent
    digits: int


COLUMNS = {
    "fidelity": Column("photos", "fidelity", 1, 2),
    "zoom": Column("photos", "zoom_cosine", 1, 3),
    "PCK@0.05": Column("correspondence", "pck@0.05", 100, 1),
    "PCK@0.1": Column("correspondence", "pck@0.1", 100, 1),
    "room@10": Column("room", "room@10", 100, 1),
    "room@20": Column("room", "room@20", 100, 1),
    "boundary F": Column("boundaries", "ods_f", 1, 3),
    "mIoU": Column("segmentation", "miou", 100, 2),
}


@dataclass
class PhotoTask(ImageTask):
    """Multi-view fidelity by area pooling and zoom cosine, from one sharp map of each picture."""

    name: ClassVar[str] = "photos"

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> tuple[FidelityMeter, ZoomMeter]:
        return FidelityMeter(encoder), ZoomMeter(encoder)

    def measure_image(
        self, encoder: SharpEncoder, image: Image, number: int, head: tuple[FidelityMeter, ZoomMeter]
    ) -> Row:
        fidelity, zoom = head
        crop = encode_crop(encoder, image, fidelity.size)
        # Of factors above 2 fidelity takes a larger picture.
        closer = crop if zoom.size == fidelity.size else encode_crop(encoder, image, zoom.size)
        return fidelity.measure_crop(crop, number) | {"zoom_cosine": zoom.measure_crop(closer, number)}

    def score(self, rows: Sequence[Row], head: Any) -> Summary:
        scores = pool_fidelity(rows)
        return {
            "fidelity": scores["area"],
            "cosine": scores["cosine"],
            "zoom_cosine": estimate_mean([row["zoom_cosine"] for row in rows]),
        }


@dataclass
class FirstBoundaryTask(BoundaryTask):
    """Boundaries of the first 24 pictures."""

    def find_pictures(self) -> list[Picture]:
        return super().find_pictures()[:BOUNDARY_PICTURES]


@dataclass
class AllTask(Task):
    """Fidelity, zoom cosine, keypoints, real views, boundaries and segmentation, in one table of all encoders.

    DATA has a folder, or a link to one, for each: photos, pf_willow, room_depth, bsds and camvid.
    """

    name: ClassVar[str] = "all"

    data: Path = setting(Path("."), "folder of the data sets", type=Path, metavar="DIR", required=True)
    measures: Sequence[str] = setting(
        tuple(name for name in FOLDERS if name != "segmentation"),
        "photos are fidelity and zoom; segmentation takes longest",
        nargs="+",
        choices=tuple(FOLDERS),
    )
    skip: int = setting(0, "without the first N of photos", type="count", metavar="N")
    every: int = setting(1, "of the other photos only every N-th, from the first on", type="count", metavar="N")
    limit: int | None = setting(
        None, "only N items of each measure, spread evenly over their list", type="count", metavar="N"
    )

    def __post_init__(self) -> None:
        for name in self.measures:
            if name not in FOLDERS:
                raise unknown_name("measure", name, FOLDERS)
        if not self.measures:
            raise ConfigError(f"which measures? There are {', '.join(FOLDERS)}")

    @cached_property
    def parts(self) -> dict[str, Task]:
        """Tasks of the chosen measures, in the order of the table."""
        for name in self.measures:
            if not (self.data / FOLDERS[name]).is_dir():
                raise DataError(
                    f"{self.data} has no folder {FOLDERS[name]}, which {name} is measured on; put it or a link to it "
                    "there, or choose others (--measures)"
                )
        root, limit = self.data, self.limit
        tasks: dict[str, Task] = {
            "photos": PhotoTask(root / "photos", skip=self.skip, every=self.every, limit=limit),
            "correspondence": CorrespondenceTask(root / "pf_willow", protocol=QUICK, alphas=(0.05, 0.1), limit=limit),
            "room": RoomTask(root / "room_depth", limit=limit),
            "boundaries": FirstBoundaryTask(root / "bsds", protocol=QUICK, limit=limit),
            "segmentation": SegmentationTask(root / "camvid", protocol=QUICK, limit=limit),
        }
        return {name: task for name, task in tasks.items() if name in self.measures}

    def items(self) -> Iterator[Item]:
        for part, task in self.parts.items():
            for item in task.items():
                yield Item(f"{part}: {item.name}", (part, item))

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> dict[str, Any]:
        return {part: task.prepare(encoder, subject, run) for part, task in self.parts.items()}

    def measure(self, encoder: SharpEncoder, item: Item, head: dict[str, Any]) -> Row:
        part, inner = item.data
        return {"_part": part, **self.parts[part].measure(encoder, inner, head[part])}

    def score(self, rows: Sequence[Row], head: dict[str, Any]) -> Summary:
        of_parts = {part: [row for row in rows if row["_part"] == part] for part in self.parts}
        scores = {part: self.parts[part].score(of_part, head[part]) for part, of_part in of_parts.items() if of_part}
        shown = {name: scores[column.part][column.metric] for name, column in COLUMNS.items() if column.part in scores}
        return {**shown, "parts": scores}

    def table(self, encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Format one line for each encoder, its numbers without intervals."""
        chosen = {name: column for name, column in COLUMNS.items() if column.part in self.measures}
        rows = []
        for label, content in encoders.items():
            values = [from_json(content.get("result", {}).get(name)) for name in chosen]
            cells = [
                f"{column.scale * value.value:.{column.digits}f}" if isinstance(value, Estimate) else "-"
                for value, column in zip(values, chosen.values(), strict=True)
            ]
            rows.append([label, *cells])
        return align(["encoder", *chosen], rows)

    def item_key(self, item: Item) -> object:
        part, inner = item.data
        return self.parts[part].item_key(inner)

    def head_key(self, head: dict[str, Any]) -> object:
        return {part: task.head_key(head[part]) for part, task in self.parts.items()}
