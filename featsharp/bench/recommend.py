"""Ranking of the upsamplers on the user's backbone, picture size, memory and machine, by measurement.

Candidates are the registered upsamplers that have the factor, the weights that come with the package for this backbone
and factor, and the user's checkpoints, but not upsamplers that need a function of the user.

Quality is measured by the caller's function, on the user's images. Without it, that of ``featsharp eval pareto`` is
taken for the backbones that it was run with; else the candidates are ranked by time.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone
from featsharp.bench.choice import read_measured
from featsharp.bench.measure import describe_noise, find_failure, measure_memory, noise, time_interleaved
from featsharp.bench.workloads import build_encoder, needs_function, needs_training, shipped_weights
from featsharp.builder import load_from_file
from featsharp.data import open_source
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.memory import format_memory, parse_memory
from featsharp.model import SharpEncoder
from featsharp.names import dtype_name, label_encoders, parse_upsampler
from featsharp.settings import PlainTask, Quality, setting
from featsharp.terminal import align, with_progress
from featsharp.upsamplers import UPSAMPLERS
from featsharp.upsamplers.base import UpsampleFeatures, check_factor, scale_length
from featsharp.upsamplers.chunked import works_in_chunks
from featsharp.upsamplers.registration import default_factor, resolve_upsampler

READY, SHIPPED, CHECKPOINT, NEEDS_TRAINING = "ready", "shipped", "checkpoint", "needs training"
# The score of what was measured before, see `read_measured`.
GAIN = "gain over bilinear"
# Most reasons in an error.
SHOWN_REASONS = 3


@dataclass
class RecommendTask(PlainTask):
    """Rank the upsamplers for a backbone, a size of picture and an amount of memory, by measurement on this machine.

    All candidates get the same picture and make a map of the same size: their low-resolution pass has 1/factor of the
    picture's size (a backbone of one size: that size). Those that take more memory than the limit work in chunks where
    they can. Upsamplers that need training are measured untrained, and shown without a rank. Quality is measured at the
    native size of the backbone.
    """

    name: ClassVar[str] = "recommend"

    backbone: str = setting("vits14-focus", "name of the backbone")
    factor: float = setting(2.0, "upsampling factor", type=float, metavar="F")
    upsampler: Sequence[str] | None = setting(None, "names to compare; default: all", nargs="+", metavar="NAME")
    size: tuple[int, int] | None = setting(
        None, "size of the picture in pixels; default: factor x the backbone's native size", type="size", metavar="HxW"
    )
    memory: str | None = setting(None, "most that one picture may take, such as 2GiB; default: no limit", metavar="M")
    checkpoint: Sequence[str] | None = setting(None, "trained files to compare", nargs="+", metavar="[LABEL=]FILE")
    data: Path | None = setting(None, "images to measure quality on: a folder or tars", type=Path, metavar="DIR")
    limit: int = setting(8, "only N images, spread evenly over their list", type="count", metavar="N")
    repeat: int = setting(10, "most runs of a candidate; slow ones get fewer, at least 2", type="count", metavar="N")

    @property
    def quality_images(self) -> tuple[Path, int] | None:
        return None if self.data is None else (self.data, self.limit)

    def run(
        self, device: torch.device, dtype: torch.dtype | None, progress: bool, quality: Quality | None = None
    ) -> dict[str, Any]:
        """Measure and rank.

        Args:
            device: To measure on.
            dtype: Autocast type of backbone passes; None: float32.
            progress: Whether to show bars on stderr.
            quality: Measures an encoder on ``data``; required with it. Encoders for which it raises a FeatSharpError
                come after those that have a score.

        Returns:
            "ranked", best first: name, "kind" (:data:`READY` and others), "rank" (None for those that need training,
            which come last), "quality" (scores by name, or None), "time" (milliseconds of one picture), "peak_bytes"
            beside weights and input, "in_parts" (whether it worked within the limit in chunks only), "note". "out",
            name and reason of those that do not fit. And the settings of the measurement.

        Raises:
            ConfigError: For a factor below 1, text that is no amount of memory, two candidates of one name, images
                without ``quality``; when no candidate can be ranked; and when ``quality`` fails for all of them.
            DataError: When there are no images in ``data``.
        """
        check_factor(self.factor, "any", "a recommendation")
        limit = None if self.memory is None else parse_memory(self.memory)
        if self.data is not None:
            open_source(self.data)
            if quality is None:
                raise ConfigError("images are there to measure quality on; hand in the function that does: quality=")
        backbone = create_backbone(self.backbone).to(device)
        backbone.autocast_dtype = dtype
        candidates = self._candidates(backbone)
        size, low_res_size = self._sizes(backbone)
        images = noise((1, 3, *size), device)
        out: list[dict[str, Any]] = []
        calls: dict[str, Callable[[], UpsampleFeatures]] = {}
        rows: dict[str, dict[str, Any]] = {}
        encoders: dict[str, SharpEncoder] = {}
        for name, (kind, build) in with_progress(list(candidates.items()), "memory", progress):
            try:
                encoder = build().to(device)
                if encoder.factor != self.factor:
                    raise ConfigError(f"has factor {encoder.factor:g}, not {self.factor:g}")
                call = torch.no_grad()(partial(encoder, images, low_res_size=low_res_size))
                rows[name] = {"name": name, "kind": kind, **_fit(encoder, call, limit, device)}
            except FeatSharpError as error:
                out.append({"name": name, "kind": kind, "reason": str(error)})
            else:
                encoders[name], calls[name] = encoder, call
        if all(row["kind"] == NEEDS_TRAINING for row in rows.values()):
            raise ConfigError(f"no candidate that needs no training can be ranked: {_reasons(out, 'reason')}")
        timings = time_interleaved(calls, device, repeat=self.repeat, progress=progress)
        known = read_measured(self.backbone, self.factor)
        for name in with_progress(list(rows), "quality", progress and quality is not None):
            rows[name] |= {"time": asdict(timings[name]), **_measure_quality(rows[name], encoders[name], quality)}
            measured = known.get(name) or known.get(f"{name}-{self.factor:g}x")
            if quality is None and measured and rows[name]["kind"] in (READY, SHIPPED):
                rows[name]["quality"] = {GAIN: measured["gain"]}
        if quality is not None and not any(map(_is_scored, rows.values())):
            noted = [row for row in rows.values() if row["note"]]
            raise ConfigError(f"no candidate got a score on {self.data or 'the images'}: {_reasons(noted, 'note')}")
        return {
            "backbone": self.backbone,
            "factor": self.factor,
            "size": list(size),
            "low_res_size": list(low_res_size),
            "memory": limit,
            "autocast": dtype and dtype_name(dtype),
            "native_size": list(backbone.input_size),
            "images": None if self.data is None else self.data.name,
            "ranked": rank(list(rows.values())),
            "out": out,
        }

    def table(self, result: dict[str, Any]) -> list[str]:
        """Format the ranking as lines of text."""
        ranked = result["ranked"]
        scores = list(dict.fromkeys(name for row in ranked for name in row["quality"] or ()))
        height, width = result["size"]
        low = result["low_res_size"]
        native = "x".join(map(str, result["native_size"]))
        limit = "no limit on memory" if result["memory"] is None else f"at most {format_memory(result['memory'])}"
        notes = [f"{row['name']}: {row['note']}" for row in ranked if row["note"]]
        return [
            f"{result['backbone']}, {result['factor']:g}x, picture {height}x{width}, low-resolution pass "
            f"{low[0]}x{low[1]}, {result['autocast'] or 'float32'}, {limit}",
            f"ranked by {scores[0]}, then time; quality is measured at the native size, {native}"
            if scores
            else "ranked by time; images (--data) would add quality",
            *align(
                ("upsampler", "rank", *scores, "ms", "quartiles", "memory", ""), [_cells(row, scores) for row in ranked]
            ),
            *describe_noise({row["name"]: row["time"] for row in ranked}),
            *notes,
            *(f"out: {entry['name']}: {entry['reason']}" for entry in result["out"]),
        ]

    def _sizes(self, backbone: Backbone) -> tuple[tuple[int, int], tuple[int, int]]:
        """Compute (h, w) in pixels of the picture and of the low-resolution pass."""
        if self.size is None:
            grid, patch = backbone.grid_size(backbone.input_size), backbone.patch_size
            size = patch * scale_length(grid[0], self.factor), patch * scale_length(grid[1], self.factor)
            return size, backbone.input_size
        return self.size, backbone.fit_size(self.size[0] / self.factor, self.size[1] / self.factor)

    def _candidates(self, backbone: Backbone) -> dict[str, tuple[str, Callable[[], SharpEncoder]]]:
        """List kind and builder by name: upsamplers, shipped weights, checkpoints."""
        candidates: dict[str, tuple[str, Callable[[], SharpEncoder]]] = {}
        for text in sorted(self.upsampler or UPSAMPLERS.names()):
            name, _, options = resolve_upsampler(text, self.factor)
            if (options or not needs_function(name)) and (self.factor == 1 or default_factor(name) != 1):
                kind = NEEDS_TRAINING if needs_training(name) else READY
                label = parse_upsampler(text, UPSAMPLERS).curve
                candidates[label] = kind, partial(build_encoder, backbone, label, self.factor)
        for name in shipped_weights(self.backbone, self.factor):
            candidates[name] = SHIPPED, partial(load_from_file, name, featurizer=backbone)
        for name, path in label_encoders(self.checkpoint or ()).items():
            if name in candidates:
                raise ConfigError(f"two candidates are called {name!r}; name the checkpoint: LABEL={path}")
            candidates[name] = CHECKPOINT, partial(load_from_file, path, featurizer=backbone)
        return candidates


def rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Order rows of :meth:`RecommendTask.run` and give each its "rank": by the first score, if any, then by time.

    Those that need training come last.
    """

    def key(row: dict[str, Any]) -> tuple[bool, bool, float, float]:
        known = _is_scored(row)
        return row["kind"] == NEEDS_TRAINING, not known, -_score(row) if known else 0.0, row["time"]["median"]

    ordered = sorted(rows, key=key)
    return [
        {**row, "rank": None if row["kind"] == NEEDS_TRAINING else number}
        for number, row in enumerate(ordered, start=1)
    ]


def _fit(
    encoder: SharpEncoder, call: Callable[[], UpsampleFeatures], limit: int | None, device: torch.device
) -> dict[str, Any]:
    """Measure the peak memory of one picture; over the limit, make the encoder work in chunks.

    Raises:
        FeatSharpError: When it does not run, or not within the limit.
    """
    _run(call)
    peak = measure_memory(call, device)
    if limit is None or peak <= limit:
        return {"peak_bytes": peak, "in_parts": False}
    taken = f"takes {format_memory(peak)} of {format_memory(limit)}"
    if not works_in_chunks(encoder.upsampler):
        raise ConfigError(f"{taken} and cannot work in chunks")
    # An encoder's limit is for the tensors beside the result; what else the process takes is known once it has run.
    left = limit - _result_bytes(call())
    if left < 1:
        raise ConfigError(f"{taken}; the result alone is as large")
    for _ in range(2):
        encoder.max_memory = left
        _run(call)
        peak = measure_memory(call, device)
        if peak <= limit:
            return {"peak_bytes": peak, "in_parts": True}
        left = max(1, left - (peak - limit))
    raise ConfigError(f"{taken}, in chunks still {format_memory(peak)}")


def _measure_quality(row: dict[str, Any], encoder: SharpEncoder, quality: Quality | None) -> dict[str, Any]:
    """Measure the scores of a candidate, "quality"; without any, "note" has the reason."""
    scores, note = None, ""
    if quality is not None and row["kind"] != NEEDS_TRAINING:
        try:
            scores = quality(encoder)
        except FeatSharpError as error:
            note = f"no quality: {error}"
        else:
            note = "" if _is_scored({"quality": scores}) else f"no quality: got {scores}"
    return {"quality": scores, "note": note}


def _score(row: dict[str, Any]) -> float:
    """Return the first score, which ranks; NaN without any."""
    return float(next(iter((row["quality"] or {}).values()), math.nan))


def _is_scored(row: dict[str, Any]) -> bool:
    return math.isfinite(_score(row))


def _reasons(rows: Sequence[dict[str, Any]], key: str) -> str:
    """Format the first few reasons, and the number of others."""
    shown = "; ".join(f"{row['name']}: {row[key]}" for row in rows[:SHOWN_REASONS])
    return shown + f"; and {len(rows) - SHOWN_REASONS} more" * (len(rows) > SHOWN_REASONS)


def _run(call: Callable[[], object]) -> None:
    """Call once; raise ConfigError with the reason of a failure."""
    failure = find_failure(call)
    if failure is not None:
        raise ConfigError(failure)


def _result_bytes(features: UpsampleFeatures) -> int:
    return sum(x.nbytes for x in features if isinstance(x, Tensor))


def _cells(row: dict[str, Any], scores: list[str]) -> tuple[str, ...]:
    """Format a row."""
    quality, time = row["quality"] or {}, row["time"]
    remarks = [row["kind"]] * (row["kind"] != READY) + ["in chunks"] * row["in_parts"]
    return (
        row["name"],
        "-" if row["rank"] is None else str(row["rank"]),
        *(f"{quality[name]:.4f}" if name in quality else "-" for name in scores),
        f"{time['median']:.1f}",
        f"{time['low']:.1f} - {time['high']:.1f}",
        format_memory(row["peak_bytes"]),
        ", ".join(remarks),
    )
