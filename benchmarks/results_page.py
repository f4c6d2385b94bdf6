"""Fill the tables of docs/results.md, and featsharp/bench/pareto.json, from the files of `featsharp eval --json`.

    python benchmarks/results_page.py            rewrite the tables
    python benchmarks/results_page.py --check    fail where the page differs from the files

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES. The files lie in
benchmarks/results/eval: TASK@WHAT.json, those of one task in one table. Below each table stand its commands. Between
`<!-- papers -->` and `<!-- end -->` stand the tables of papers, apart from ours.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from featsharp.bench.choice import MEASURED
from featsharp.evaluation.measures import COLUMNS
from featsharp.evaluation.papers import PAPERS, PaperTable

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results" / "eval"


class Table(NamedTuple):
    """Metrics of a task and their format."""

    task: str
    columns: dict[str, str]  # metric in the file -> heading
    scale: float = 1.0  # 100 for percent
    digits: int = 3
    formats: Mapping[str, tuple[float, int]] = {}  # scale and digits of other metrics


# Of `featsharp eval pareto`: metric -> heading, and its format.
PARETO = {"passes": "passes", "seconds": "ms"} | {name: name for name in COLUMNS if name != "mIoU"}
FORMATS = {"passes": (1, 1), "seconds": (1000, 0)} | {name: (one.scale, one.digits) for name, one in COLUMNS.items()}
AP = {"ap": "AP", "ap50": "AP50", "ap_small": "small", "ap_medium": "medium", "ap_large": "large"}
PCK = {"pck@0.1": "PCK@0.1", "pck@0.05": "PCK@0.05", "pck@0.01": "PCK@0.01"}
PROTOCOL = {
    "miou": "mIoU, features upsampled",
    "miou_probabilities": "mIoU, class probabilities upsampled",
    "pixel_accuracy": "pixel accuracy, features",
    "pixel_accuracy_probabilities": "pixel accuracy, probabilities",
}
TABLES = {
    "fidelity": Table("fidelity", {"fidelity_area": "fidelity, area pooling", "cosine": "cosine"}),
    "zoom": Table("zoom", {"zoom_cosine": "zoom cosine"}),
    "segmentation": Table("segmentation", {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}, 100, 1),
    "segmentation-112": Table("segmentation-112", {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}, 100, 1),
    "no-retraining": Table("segmentation-low-res", {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}, 100, 1),
    "correspondence": Table("correspondence", PCK, 100, 1),
    "boundaries": Table("boundaries", {"ods_f": "best F (ODS)", "ois_f": "F, best per image (OIS)"}),
    "cka": Table("cka", {"cka": "mean", **{f"cka_{size}": f"{size} and others" for size in (56, 112, 168, 224)}}),
    "video": Table("video", {"j_and_f": "J&F", "j": "J", "f": "F"}, 100, 1),
    "pareto": Table("pareto", PARETO, formats=FORMATS),
    "protocol": Table("protocol", PROTOCOL, 100, 1),
    "detection": Table("detection", AP, 100, 1),
    "protocol-100": Table("protocol-100", {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}, 100, 1),
    "reference": Table("reference", {"cosine": "cosine", "error": "error / variance", "cka": "linear CKA"}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = PAGE.read_text(encoding="utf-8")
    after = fill(before, RESULTS)
    if check:
        if (before, MEASURED.read_text(encoding="utf-8")) != (after, measured(RESULTS)):
            print(
                f"{PAGE.name} does not match the result files; run python benchmarks/results_page.py", file=sys.stderr
            )
            return 1
        return 0
    MEASURED.write_text(measured(RESULTS), encoding="utf-8")
    PAGE.write_text(after, encoding="utf-8")
    return 0


def fill(page: str, results: Path) -> str:
    """Return the page with every table rendered anew."""

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise SystemExit(f"there is no table {match[1]!r}; these are: {', '.join(TABLES)}")
        return f"<!-- table {match[1]} -->\n{render(TABLES[match[1]], results)}\n<!-- end -->"

    page = re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)
    papers = "\n\n".join(map(render_paper, PAPERS))
    return re.sub(
        r"<!-- papers -->\n.*?<!-- end -->", f"<!-- papers -->\n{papers}\n<!-- end -->", page, flags=re.DOTALL
    )


def render(table: Table, results: Path) -> str:
    """The table and its commands as Markdown."""
    files = [json.loads(path.read_text()) for path in sorted(results.glob(f"{table.task}@*.json"))]
    if not files:
        raise SystemExit(f"no file {table.task}@*.json in {results}")
    columns = table.columns
    lines = [f"| encoder | {' | '.join(columns.values())} |", f"|{'---|' * (len(columns) + 1)}"]
    for content in files:
        for label, encoder in content["encoders"].items():
            formats = {metric: table.formats.get(metric, (table.scale, table.digits)) for metric in columns}
            cells = [cell(encoder["result"].get(metric), *formats[metric]) for metric in columns]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    sources = []
    for content in files:
        counts = {len(encoder["items"]) for encoder in content["encoders"].values()}
        skipped = sum(len(encoder["skipped"]) for encoder in content["encoders"].values())
        sources.append(f"- `{content['command']}` ({'/'.join(map(str, sorted(counts)))} items, {skipped} skipped)")
    return "\n".join([*lines, "", *sources, *(f"- {text}" for text in sorted({machine(content) for content in files}))])


def render_paper(table: PaperTable) -> str:
    """The table of a paper as Markdown, under its source."""
    lines = [f"Theirs: {table.source}; {table.about}.", ""]
    lines += [f"| method | {' | '.join(table.columns)} |", f"|{'---|' * (len(table.columns) + 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in table.cells()]
    return "\n".join(lines)


def machine(content: dict[str, Any]) -> str:
    """Machine, torch version and backbone type of a measurement."""
    about = content["machine"]
    types = sorted({str(encoder["backbone_autocast"] or "float32") for encoder in content["encoders"].values()})
    passes = f"backbone passes in {', '.join(types)}"
    return f"{about['processor']}, {about['device']}, torch {about['torch']}, {passes}"


def cell(value: Any, scale: float, digits: int) -> str:
    """A number with its interval, where it has one."""
    if value is None:
        return ""
    if isinstance(value, dict):
        low, high = (f"{scale * value[key]:.{digits}f}" for key in ("low", "high"))
        return f"{scale * value['value']:.{digits}f} [{low}, {high}]"
    return f"{scale * value:.{digits}f}"


def measured(results: Path) -> str:
    """The part of the results of `featsharp eval pareto` that the package has, for bench/choice.py."""
    known = {}
    for path in sorted(results.glob("pareto@*.json")):
        for label, one in json.loads(path.read_text())["encoders"].items():
            result, names = one["result"], [name for name in COLUMNS if name in one["result"]]
            known[label] = {
                "backbone": one["backbone"],
                "factor": one["factor"],
                **{name: round(result[name], 4) for name in ("passes", "seconds")},
                "measures": {name: round(result[name]["value"], 4) for name in names},
            }
    return json.dumps(known, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
