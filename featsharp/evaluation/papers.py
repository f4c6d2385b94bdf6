"""Tables of papers by the protocol of ``featsharp eval protocol``, with the numbers that they state.

Baselines of one name differ by a point and more between papers: two tables are not comparable, nor are ours.
"""

from collections.abc import Iterator
from typing import NamedTuple

from featsharp.terminal import align

# Of the columns: mIoU in per cent of the sets of that name, milliseconds, and of NYUv2 the share within 1.25 and RMSE.
SETS = ("coco-stuff", "voc", "ade20k", "cityscapes")


class PaperTable(NamedTuple):
    """A table of a paper.

    Attributes:
        source: Paper and arXiv number.
        about: Differences to the protocol, and what else has to be known.
        columns: Their names.
        rows: Numbers by method, in the order of the columns.
    """

    source: str
    about: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float, ...]]

    def lines(self) -> list[str]:
        """Format the table under its source."""
        return [f"theirs, {self.source}: {self.about}", *align(("method", *self.columns), self.cells())]

    def cells(self) -> list[list[str]]:
        """Format the rows, with the decimals of the paper."""
        digits = [1 if column == "ms" else 2 for column in self.columns]
        return [
            [name, *(f"{number:.{n}f}" for number, n in zip(numbers, digits, strict=True))]
            for name, numbers in self.rows.items()
        ]


PAPERS = (
    PaperTable(
        "UPLiFT (arXiv 2601.17950)",
        "DINOv2-S/14, 448 in and out",
        (*SETS, "ms", "nyu-depth d1", "nyu-depth rmse"),
        {
            "bilinear": (59.41, 81.62, 40.43, 59.71, 2.8, 58.83, 0.68),
            "LiFT": (57.42, 80.97, 38.95, 61.98, 51.9, 55.07, 0.73),
            "FeatUp": (61.77, 83.52, 42.07, 60.50, 109.6, 60.01, 0.66),
            "LoftUp": (62.19, 84.63, 42.16, 62.09, 223.5, 58.69, 0.68),
            "JAFAR": (61.71, 84.38, 41.96, 61.89, 111.7, 60.59, 0.65),
            "AnyUp": (62.08, 84.33, 42.25, 61.33, 146.7, 61.32, 0.63),
            "UPLiFT": (62.55, 85.21, 42.97, 65.38, 79.4, 61.16, 0.63),
        },
    ),
    PaperTable(
        "JAFAR (arXiv 2506.11136)",
        "DINOv2-S/14, 448 in and out",
        SETS,
        {
            "bilinear": (59.03, 80.70, 39.23, 59.37),
            "FeatUp": (60.10, 81.08, 38.82, 56.06),
            "LiFT": (58.18, 78.06, 38.73, 58.75),
            "JAFAR": (60.78, 84.44, 40.49, 61.47),
        },
    ),
    PaperTable(
        "Upsample Anything (arXiv 2511.16301)",
        "heads of 100 epochs; on Cityscapes all are about 57.9",
        SETS[:3],
        {
            "bilinear": (60.43, 81.27, 41.48),
            "AnyUp": (61.25, 82.18, 42.02),
            "Upsample Anything, features": (61.41, 82.22, 42.95),
            "Upsample Anything, class probabilities": (63.40, 84.57, 44.29),
        },
    ),
)


def papers_of(name: str) -> Iterator[PaperTable]:
    """Iterate over the tables that have a data set, of that name in the columns."""
    return (table for table in PAPERS if any(column.startswith(name) for column in table.columns))
