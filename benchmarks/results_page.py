"""Fill the tables of docs/results.md, and featsharp/bench/pareto.json, from the files of `featsharp eval --json`.

    python benchmarks/results_page.py            rewrite the tables
    python benchmarks/results_page.py --check    fail where the page differs from the files

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES. The files lie in
benchmarks/results/eval: TASK@WHAT.json, those of one task in one table. Files of one label and several seeds are one
row. Below each table stand its commands. Between `<!-- papers -->` and `<!-- end -->` stand the tables of papers, apart
from ours; between `<!-- students -->` and `<!-- end -->` table 2 of FeatSharp, of the files students@WHAT.json of
several tasks.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from featsharp.bench.choice import MEASURED
from featsharp.evaluation.estimates import bootstrap_draws, estimate_from
from featsharp.evaluation.measures import COLUMNS
from featsharp.evaluation.papers import PAPERS, PaperTable
from featsharp.evaluation.table_2 import TASKS, collect_scores, table_2
from featsharp.evaluation.tables import find_reference, pool_seeds, read_result

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results" / "eval"
NOTHING = "No result here yet."


class Table(NamedTuple):
    """Metrics of a task and their format."""

    task: str
    columns: dict[str, str]  # metric in the file -> heading
    scale: float = 1.0  # 100 for percent
    digits: int = 3
    formats: Mapping[str, tuple[float, int]] = {}  # scale and digits of other metrics
    gains: Sequence[str] = ()  # metrics that have a column of gains over the backbone itself
    constant: str = ""  # what stands before the metrics of a row without any encoder


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
DEPTH = {"rmse": "RMSE, m", "abs_rel": "AbsRel", "d1": "d1", "d2": "d2"}
DEPTH |= {f"free_{name}": f"{text}, free" for name, text in DEPTH.items() if name != "d2"}
CORLOC = {"corloc_tokencut": "TokenCut", "corloc_lost": "LOST", "corloc_whole": "whole picture"}
CAM = {
    "average_drop": "average drop",
    "average_increase": "average increase",
    "deletion": "deletion",
    "insertion": "insertion",
    "pointing": "pointing",
    "pointing_chance": "by chance",
    "classifier_map": "classifier's mAP, held out",
    "classifier_map_seen": "seen",
}
FLICKER = {"feature_change": "change of features", "pixel_change": "of pixels", "flicker": "flicker"}
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
    "detection": Table("detection", AP, 100, 1, gains=("ap", "ap_small")),
    "depth": Table("depth", DEPTH, gains=("d1", "free_d1"), constant="constant_"),
    "discovery": Table("discovery", CORLOC, 100, 1, gains=("corloc_tokencut", "corloc_lost")),
    "cam": Table("cam", CAM, 100, 1, gains=("insertion", "pointing")),
    "flicker": Table("flicker", FLICKER, gains=("flicker",)),
    "neighbours": Table("neighbours", {"knn": "nearest neighbours", "map": "retrieval, mAP"}, 100, 1, gains=("knn",)),
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
    parts = {"papers": "\n\n".join(map(render_paper, PAPERS)), "students": render_students(results)}
    for name, text in parts.items():
        page = re.sub(
            rf"<!-- {name} -->\n.*?<!-- end -->", f"<!-- {name} -->\n{text}\n<!-- end -->", page, flags=re.DOTALL
        )
    return page


def render(table: Table, results: Path) -> str:
    """The table and its commands as Markdown."""
    files = read_files(table.task, results)
    if not files:
        return NOTHING
    runs = collect_runs(files)
    headings = [*table.columns.values(), *(f"gain, {table.columns[metric]}" for metric in table.gains)]
    lines = [f"| encoder | {' | '.join(headings)} |", f"|{'---|' * (len(headings) + 1)}"]
    formats = {metric: table.formats.get(metric, (table.scale, table.digits)) for metric in table.columns}
    if table.constant:
        result = next(iter(runs.values()))[0]["result"]
        cells = [cell(result.get(table.constant + metric), *formats[metric]) for metric in table.columns]
        lines.append(f"| a constant | {' | '.join([*cells, *[''] * len(table.gains)])} |")
    references = set()
    for label, own in runs.items():
        of_backbone = {one: some for one, some in runs.items() if some[0]["backbone"] == own[0]["backbone"]}
        reference = find_reference({one: some[0]["factor"] for one, some in of_backbone.items()})
        cells = [cell(pool(own, metric), *formats[metric]) for metric in table.columns]
        gains = [pool(own, metric, runs[reference]) if label != reference else None for metric in table.gains]
        cells += [cell(one, *formats[metric], "+") for one, metric in zip(gains, table.gains, strict=True)]
        references.add(reference)
        seeds = f", {len(own)} seeds" if len(own) > 1 else ""
        lines.append(f"| {label}{seeds} | {' | '.join(cells)} |")
    lines.append("")
    if table.gains:
        lines.append(f"- gains are over {', '.join(sorted(references))}")
    return "\n".join([*lines, *sources(files)])


def read_files(task: str, results: Path) -> list[dict[str, Any]]:
    """Read the files of a task."""
    return [json.loads(path.read_text()) for path in sorted(results.glob(f"{task}@*.json"))]


def sources(files: Sequence[dict[str, Any]]) -> list[str]:
    """Commands and machines of files, as a list."""
    lines = []
    for content in files:
        measured = [encoder for encoder in content["encoders"].values() if "result" in encoder]
        counts = {len(encoder["items"]) for encoder in measured}
        skipped = sum(len(encoder["skipped"]) for encoder in measured)
        lines.append(f"- `{content['command']}` ({'/'.join(map(str, sorted(counts)))} items, {skipped} skipped)")
    return [*lines, *(f"- {text}" for text in sorted({machine(content) for content in files}))]


def collect_runs(files: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Collect what was measured of each encoder, once for each seed."""
    runs: dict[str, list[dict[str, Any]]] = {}
    seeds = set()
    for content in files:
        seed = content["settings"].get("seed")
        for label, encoder in content["encoders"].items():
            if "result" not in encoder:
                continue
            if (label, seed) in seeds:
                raise SystemExit(
                    f"{content['task']}: {label!r} is in two files with the seed {seed}; name one otherwise"
                )
            seeds.add((label, seed))
            runs.setdefault(label, []).append(encoder)
    return runs


def pool(runs: Sequence[dict[str, Any]], metric: str, reference: Sequence[dict[str, Any]] = ()) -> Any:
    """A number as it is in the file of one run; the mean of several with its spread; the gain over a reference."""
    if any(metric not in run["result"] for run in (*runs, *reference)):
        return None
    if len(runs) == 1 and not reference:
        return runs[0]["result"][metric]
    values = [value_of(run["result"][metric]) for run in runs]
    difference = fmean(values) - (fmean(value_of(run["result"][metric]) for run in reference) if reference else 0)
    spread = {"spread": stdev(values)} if len(runs) > 1 and not reference else {}
    draws = [draws_of(some, metric) for some in (runs, reference) if some]
    same = all(list(run["items"]) == list(runs[0]["items"]) for run in reference)
    if not same or any(one is None for one in draws):
        return {"value": difference, **spread}
    return estimate_from(difference, draws[0] - draws[1] if reference else draws[0])._asdict() | spread


def draws_of(runs: Sequence[dict[str, Any]], metric: str) -> np.ndarray | None:
    """Draws of a metric, the mean over seeds: those of the file, or of a mean over items; None where it is neither."""
    if all(metric in run["result"].get("draws", {}) for run in runs):
        return pool_seeds([run["result"] for run in runs])[metric][1]
    rows = [list(run["items"].values()) for run in runs]
    if len({len(one) for one in rows}) > 1 or not all(metric in row for one in rows for row in one):
        return None
    items = np.array([[row[metric] for row in one] for one in rows]).mean(0)
    if not np.isclose(items.mean(), fmean(value_of(run["result"][metric]) for run in runs)):
        return None
    return bootstrap_draws(len(items), lambda chosen: [items[chosen].mean()])[:, 0]


def value_of(value: Any) -> float:
    """The number itself, of an estimate or not."""
    return value["value"] if isinstance(value, dict) else value


def render_students(results: Path) -> str:
    """Table 2 of FeatSharp with our rows, from files of its tasks: text, and its commands."""
    paths = sorted(results.glob("students@*.json"))
    if not paths:
        return NOTHING
    lines = table_2(collect_scores(read_result(path, *TASKS) for path in paths))
    ours = next(number for number, line in enumerate(lines) if line.startswith("ours"))
    return "\n".join(["```text", *lines[ours:], "```", "", *sources(read_files("students", results))])


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


def cell(value: Any, scale: float, digits: int, sign: str = "") -> str:
    """A number with its spread over seeds and its interval, where it has them."""
    if value is None:
        return ""
    of = value if isinstance(value, dict) else {"value": value}
    shown = {key: f"{scale * number:{sign}.{digits}f}" for key, number in of.items()}
    spread = f" ±{scale * of['spread']:.{digits}f}" if "spread" in of else ""
    interval = f" [{shown['low']}, {shown['high']}]" if "low" in of else ""
    return shown["value"] + spread + interval


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
