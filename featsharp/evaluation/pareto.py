"""Quality against cost: all measures of ``featsharp eval all``, with what a picture costs, for every upsampler.

An encoder is on the front of a measure where no other costs less and is as good, or costs as much and is better.
"""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from featsharp.data.sources import ImageSource
from featsharp.errors import DataError
from featsharp.evaluation.layouts.layout import spread
from featsharp.evaluation.measures import COLUMNS, AllTask, PhotoTask
from featsharp.evaluation.runner import Item, Row, Run, Subject, Summary, Task, from_json
from featsharp.model import SharpEncoder
from featsharp.settings import setting
from featsharp.terminal import align

# Photographs that come with packages: the package that must be there -> files in its folder.
PHOTOGRAPHS = {
    "skimage": (
        "data/chelsea.png",
        "data/coffee.png",
        "data/astronaut.png",
        "data/rocket.jpg",
        "data/motorcycle_left.png",
    ),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
}
COSTS = ("passes", "seconds")


@dataclass
class PackagePhotoTask(PhotoTask):
    """Fidelity and zoom cosine on the photographs of installed packages."""

    def items(self) -> Iterator[Item]:
        sources = [
            (ImageSource.of_files(Path(spec.origin).parent, names), names)
            for package, names in PHOTOGRAPHS.items()
            if (spec := importlib.util.find_spec(package)) is not None and spec.origin is not None
        ]
        found = [(source, index) for source, names in sources for index in range(len(names))]
        if not found:
            raise DataError("no package with photographs is installed; give --data, or pip install scikit-image")
        for number, (source, index) in enumerate(spread(found[self.skip :: self.every], self.limit)):
            yield Item(source.name(index), (source, index, number))


@dataclass
class ParetoTask(AllTask):
    """Quality per pass and per second of all upsamplers that need no training, and of the weights that ship.

    The measures are those of `featsharp eval all`; a star marks what is best for its passes, a plus for its seconds.
    Passes are the operations of all passes for a picture, in units of those of one at the backbone's native size.
    Without DATA the photographs of installed packages (scikit-image, scikit-learn) serve for fidelity and zoom.
    """

    name: ClassVar[str] = "pareto"

    data: Path | None = setting(None, "folder of the data sets; default: package photographs", type=Path, metavar="DIR")  # type: ignore[assignment]

    @cached_property
    def parts(self) -> dict[str, Task]:
        if self.data is None:
            return {"photos": PackagePhotoTask(skip=self.skip, every=self.every, limit=self.limit)}
        return super().parts

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> dict[str, Any]:
        return {"cost": subject.measure_cost(encoder), **super().prepare(encoder, subject, run)}

    def score(self, rows: Sequence[Row], head: dict[str, Any]) -> Summary:
        return {**head["cost"], **super().score(rows, head)}

    def table(self, encoders: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Format one line for each encoder, by passes."""
        results = {label: content["result"] for label, content in encoders.items() if "result" in content}
        results = dict(sorted(results.items(), key=lambda item: item[1].get("passes", 0)))
        columns = {name: column for name, column in COLUMNS.items() if any(name in one for one in results.values())}
        values = {
            name: {label: from_json(one[name]).value for label, one in results.items() if name in one}
            for name in columns
        }
        fronts = {
            (name, cost): find_front({label: (results[label].get(cost, 0), value) for label, value in some.items()})
            for name, some in values.items()
            for cost in COSTS
        }
        rows = []
        for label, one in results.items():
            row = [label, f"{one.get('passes', 0):.1f}", f"{1000 * one.get('seconds', 0):.0f}"]
            for name, column in columns.items():
                marks = "*" * (label in fronts[name, "passes"]) + "+" * (label in fronts[name, "seconds"])
                value = values[name].get(label)
                row.append("-" if value is None else f"{column.scale * value:.{column.digits}f}{marks}")
            rows.append(row)
        return align(["encoder", "passes", "ms", *columns], rows)


def find_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Find the points (cost, value) by name that no other is better than at the same or a lower cost."""
    return {
        name
        for name, (cost, value) in points.items()
        if not any(c <= cost and v >= value and (c, v) != (cost, value) for c, v in points.values())
    }
