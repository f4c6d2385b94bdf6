"""The page gpu.md from the files of gpu.py: what holds, what is how fast, and which kernels are not worth it."""

from collections.abc import Iterable, Mapping
from typing import Any

from gpu_stages import COMPILED, WAYS

Row = dict[str, Any]
REHEARSAL = "**A rehearsal on {device}: its times say nothing about a GPU.**"


def make_page(stages: Mapping[str, Row]) -> str:
    """Render the stages that are there, in Markdown."""
    sections = ["# On a GPU"]
    for stage, content in stages.items():
        machine = content["machine"]
        sections.append(f"## {stage}")
        if content["rehearsal"]:
            sections.append(REHEARSAL.format(device=machine["device"]))
        versions = f"Python {machine['python']}, torch {machine['torch']}, featsharp {machine['featsharp']}"
        sections.append(
            f"Command: `{content['command']}`. Machine: {machine['device']}, {machine['processor']}. {versions}, "
            f"commit {content['commit']}, weights {content['weights'][:12]}."
        )
        rows = [row for row in content["rows"] if not {"error", "impossible"} & row.keys()]
        sections.append(TABLES[stage](rows) if rows else "Nothing was measured.")
        sections.extend(_failures(content))
    return "\n\n".join(sections) + "\n"


def _failures(content: Row) -> list[str]:
    """What went wrong, and what is left to measure."""
    lines = [
        f"- {row['name']}: {_line(row.get('error') or row['impossible'])}"
        for row in content["rows"]
        if {"error", "impossible"} & row.keys()
    ]
    lines += [f"- not measured yet: {name}" for name in content["left"]]
    return ["\n".join(lines)] if lines else []


def table_of_checks(rows: list[Row]) -> str:
    wrong = [row for row in rows if not row["holds"]]
    lines = [f"{len(rows) - len(wrong)} of {len(rows)} hold."]
    lines += [f"- does not hold: {row['name']}: {_line(row['reason'])}" for row in wrong]
    return "\n".join(lines)


def table_of_ops(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for name, one in row["backends"].items():
            share = one["roofline_share"]
            lines.append(
                [
                    *(row["op"], str(row["side"]), row["dtype"], name),
                    *(_times(one["forward"]), f"{share['forward']:.1%}", _mebibytes(one["peak_bytes"])),
                    *(_times(one["training_step"]), f"{share['training_step']:.1%}"),
                    _mebibytes(one["training_peak_bytes"]),
                ]
            )
        lines += [
            [row["op"], str(row["side"]), row["dtype"], name, f"failed: {_line(reason)}", *[""] * 5]
            for name, reason in row["failed"].items()
        ]
    header = ["operation", "pixels", "dtype", "backend", "forward ms", "of roofline", "memory"]
    verdicts = [verdict(row, name) for row in rows for name in row["backends"] if name == "triton"]
    return "\n\n".join(
        [
            "Of roofline: the time of reading inputs and writing outputs once, at "
            f"{rows[0]['bytes_per_second'] / 1e9:,.0f} GB/s as a large copy runs here, over the time that was taken; "
            "maps that fit the cache may exceed 100 %.",
            _table([*header, "forward and backward ms", "of roofline", "memory"], lines),
            *(["Kernels beside the compiled reference:\n\n" + "\n".join(verdicts)] if verdicts else []),
        ]
    )


def verdict(row: Row, name: str) -> str:
    """Say by how much a kernel is faster than the compiled reference; one that is not faster has no place."""
    where = f"- {name}, {row['op']}, {row['side']} px, {row['dtype']}: "
    if COMPILED not in row["backends"]:
        return f"{where}the compiled reference failed"
    kernel, compiled = row["backends"][name], row["backends"][COMPILED]
    quotients = {way: compiled[way]["median"] / kernel[way]["median"] for way in WAYS}
    slow = {way: "" if quotient > 1 else " (**not faster**)" for way, quotient in quotients.items()}
    texts = [f"{way.replace('_', ' ')} {quotients[way]:.2f}x{slow[way]}" for way in WAYS]
    return where + ", ".join(texts)


def table_of_encoders(rows: list[Row]) -> str:
    lines = [
        [
            *(row["upsampler"], f"{row['factor']:g}x", str(row["side"]), row["variant"], str(row["passes"])),
            *(_number(row["backbone"]["median"]), _times(row["encode"])),
            f"{row['encode']['median'] / row['backbone']['median']:.3f}",
            _mebibytes(row["peak_bytes"]),
            f"{row['cosine_to_float32']:.4f}" if "cosine_to_float32" in row else "",
        ]
        for row in rows
    ]
    header = ["", "factor", "pixels", "variant", "passes", "passes alone ms", "encode ms", "ratio", "memory"]
    return _table([*header, "cosine to float32"], lines)


def table_of_curve(rows: list[Row]) -> str:
    points = {
        (one["curve"], row["batch_size"], one["factor"]): [
            *(one["curve"], str(row["batch_size"]), f"{one['factor']:g}x", str(one["cells"]), str(one["passes"])),
            *(f"{one['ms_per_image']:.3g}", f"{one['us_per_token']:.3g}", f"{one['linear_ms_per_image']:.3g}"),
            f"{one['ms_per_image'] / one['linear_ms_per_image']:.2f}x",
            _mebibytes(one["peak_bytes"]),
        ]
        for row in rows
        for one in row["rows"]
    }
    header = ["", "batch", "factor", "tokens", "passes", "ms per image", "us per token", "linear ms", "of linear"]
    return _table([*header, "memory"], [points[key] for key in sorted(points)])


def table_of_training(rows: list[Row]) -> str:
    lines = [
        [
            *(f"{row['upsampler']} {row['factor']}x", row["dtype"], row["backend"] or "default"),
            *(str(row["batch_size"]), str(row["passes"]), _number(row["backbone"]["median"]), _times(row["step"])),
            f"{1 - row['backbone']['median'] / row['step']['median']:.1%}",
            _mebibytes(row["peak_bytes"]),
        ]
        for row in rows
    ]
    header = ["", "dtype", "backend", "batch", "passes", "passes alone ms", "step ms", "all but the backbone", "memory"]
    return _table(header, lines)


TABLES = {
    "checks": table_of_checks,
    "kernels": table_of_checks,
    "ops": table_of_ops,
    "encoders": table_of_encoders,
    "curve": table_of_curve,
    "training": table_of_training,
}


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _number(milliseconds: float) -> str:
    return f"{milliseconds:.3f}" if milliseconds < 10 else f"{milliseconds:,.1f}"


def _times(timing: Row) -> str:
    """Median and quartiles."""
    return f"{_number(timing['median'])} ({_number(timing['low'])} to {_number(timing['high'])})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _line(text: str) -> str:
    """The first line of a message."""
    return (text.strip() or "no message").splitlines()[0]
