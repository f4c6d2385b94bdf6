"""Adaptation to a backbone in minutes: what the views gain there, and a linear student of them.

Nothing here is trained by steps. On some photographs the map of sixteen passes is made, and the mix of a linear
``learned-views`` of five passes is fitted to it in closed form; the precisions of its windows and of its prior that
predict other views best are chosen. All is then measured on photographs held back.
"""

import itertools
import logging
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.builder import SharpEncoder, create_encoder
from featsharp.errors import DataError, InputError
from featsharp.evaluation.estimates import Estimate, bootstrap
from featsharp.evaluation.fidelity import FidelityMeter, pool_fidelity
from featsharp.evaluation.images import ImageSet
from featsharp.evaluation.runner import Row
from featsharp.normalizers import FeatureStatistics
from featsharp.training.feature_cache import CachedBackbone
from featsharp.training.least_squares import LinearFit

logger = logging.getLogger(__name__)

# Photographs: at least so many; one in HELD_BACK is only measured on, at most MOST_HELD_BACK; settings are chosen on
# CHOOSING others; more than MOST gain nothing.
LEAST, HELD_BACK, MOST_HELD_BACK, CHOOSING, MOST = 4, 4, 16, 6, 400
FIT_SHARE = 0.6  # of the time; measuring takes the rest
# Precisions that are tried: of the prior for each view, and of windows relative to whole pictures.
PRIORS, WINDOWS = (0.02, 0.05, 0.15), (0.3, 1.0)
RIDGE = 0.02
STUDENT = "linear student"


class Result(NamedTuple):
    """Student, and its figures on photographs held back.

    Attributes:
        student: The encoder with the linear student; in eval mode.
        fidelity: By name: bilinear, views(4), views(5), views(16), views(16) with ``chosen``, linear student.
        gain: Fidelity of the student over that of bilinear, and over that of the same five passes unfitted.
        chosen: (prior, precision of windows) of the views that predict other views best.
        photographs: Used for the fit, and held back.
        skipped: (name, reason) of photographs that were left out.
    """

    student: SharpEncoder
    fidelity: dict[str, Estimate]
    gain: dict[str, Estimate]
    chosen: tuple[float, float]
    photographs: tuple[int, int]
    skipped: list[tuple[str, str]]

    @property
    def gained(self) -> bool:
        """True where the student is better than bilinear and than its unfitted views, both beyond their intervals."""
        return all(ratio.low > 1 for ratio in self.gain.values())


def adapt(backbone: Backbone, photographs: str | Path, *, minutes: float = 10.0) -> Result:
    """Fit a linear student to a backbone, and measure it beside what needs no fit.

    Args:
        backbone: In eval mode, on its device.
        photographs: Folder or tar, with at least four readable pictures.
        minutes: About so long on this machine: fewer photographs are used where passes are slow.

    Raises:
        DataError: For too few photographs that the backbone can encode.
    """
    images = ImageSet(photographs)
    named = list(itertools.islice(images, MOST + MOST_HELD_BACK))
    if len(named) < LEAST:
        raise DataError(f"{photographs}: {len(named)} readable photographs; adapt needs at least {LEAST}, better 100")
    every = max(HELD_BACK, -(-len(named) // MOST_HELD_BACK))
    held = named[::every]
    others = [entry for number, entry in enumerate(named) if number % every]
    skipped, start = list(images.skipped), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cached = CachedBackbone(backbone, Path(folder))  # the encoders share passes
        fitted, used = _fit(cached, others, start + 60 * minutes * FIT_SHARE, skipped)
        logger.info("fitted to %d photographs in %.0f s", len(used), time.monotonic() - start)
        encoders = {"bilinear": create_encoder(cached, "bilinear", 2).eval()}
        encoders |= {f"views({passes})": _views(cached, passes) for passes in (4, 5, 16)}
        chosen = _choose(cached, used[:CHOOSING])
        encoders["views(16) chosen"] = _views(cached, 16, *chosen)
        encoders[STUDENT] = fitted
        rows = _measure(encoders, held, start + 60 * minutes, skipped)
    student = _student(backbone)  # without the cache
    student.normalizer.load_state_dict(fitted.normalizer.state_dict())
    student.upsampler.load_state_dict(fitted.upsampler.state_dict())
    names = "bilinear", "views(5)"
    return Result(
        student,
        {name: pool_fidelity(entries)["area"] for name, entries in rows.items()},
        {name: _ratio(rows[STUDENT], rows[name]) for name in names},
        chosen,
        (len(used), len(rows[STUDENT])),
        skipped,
    )


def _views(backbone: Backbone, passes: int, prior: float = PRIORS[1], windows: float = WINDOWS[1]) -> SharpEncoder:
    options = {"passes": passes, "prior": prior, "windows": windows}
    return create_encoder(backbone, "views", 2, upsampler_options=options, bias_buffer=False).eval()


def _student(backbone: Backbone) -> SharpEncoder:
    options = {"linear": True}
    return create_encoder(
        backbone, "learned-views", 2, upsampler_options=options, normalizer="phi-s", bias_buffer=False
    ).eval()


@torch.no_grad()
def _fit(
    backbone: Backbone, named: list[tuple[str, Image]], end: float, skipped: list[tuple[str, str]]
) -> tuple[SharpEncoder, list[Image]]:
    """Fit PHI-S and the mix of a student until the time ends; returns it with the photographs used."""
    teacher, statistics = _views(backbone, 16), FeatureStatistics(backbone.embed_dim)
    used: list[Image] = []
    targets: list[Tensor] = []
    for name, image in named:
        if used and time.monotonic() > end:
            break
        try:
            out = teacher.encode_image(image)
            statistics.update(out.low_res)
        except InputError as error:
            skipped.append((name, str(error)))
            continue
        used.append(image)
        targets.append(out.high_res)
    if not used:
        raise DataError(f"the backbone encodes none of {len(named)} photographs; the last: {': '.join(skipped[-1])}")
    student = _student(backbone)
    student.normalizer.fit(statistics)
    fit = LinearFit(student.upsampler, RIDGE)
    for image, target in zip(used, targets, strict=True):
        pixels, low_res_size, _ = student.prepare_image(image)
        whitened = student.input_conditioner(pixels.to(target.device))
        maps = student.upsampler.linear_maps(whitened, student.encode, low_res_size or backbone.input_size)
        fit.add(maps, student.normalizer(target), torch.ones_like(target[:, :1]))
    fit.weight.copy_(fit.solve())
    return student, used


def _choose(backbone: Backbone, images: list[Image]) -> tuple[float, float]:
    """Choose (prior, precision of windows) by fidelity on a few photographs."""

    def score(setting: tuple[float, float]) -> float:
        meter = FidelityMeter(_views(backbone, 16, *setting))
        return pool_fidelity([meter.measure(image, number) for number, image in enumerate(images)])["area"].value

    return max(itertools.product(PRIORS, WINDOWS), key=score)


def _measure(
    encoders: dict[str, SharpEncoder], named: list[tuple[str, Image]], end: float, skipped: list[tuple[str, str]]
) -> dict[str, list[Row]]:
    """Measure all encoders on photographs until the time ends, on two at least."""
    meters = {name: FidelityMeter(encoder) for name, encoder in encoders.items()}
    rows: dict[str, list[Row]] = {name: [] for name in encoders}
    for number, (name, image) in enumerate(named):
        if len(rows[STUDENT]) >= 2 and time.monotonic() > end:
            break
        try:
            measured = {encoder: meter.measure(image, number) for encoder, meter in meters.items()}
        except InputError as error:
            skipped.append((name, str(error)))
            continue
        for encoder, row in measured.items():
            rows[encoder].append(row)
    if not rows[STUDENT]:
        raise DataError(f"the backbone encodes none of the {len(named)} photographs held back: {skipped[-1][1]}")
    return rows


def _ratio(ours: list[Row], theirs: list[Row]) -> Estimate:
    """Estimate the ratio of two fidelities on the same photographs."""
    errors = [(row["_error_area"], other["_error_area"]) for row, other in zip(ours, theirs, strict=True)]
    return bootstrap(errors, lambda rows: float(rows[:, 1].sum() / max(rows[:, 0].sum(), 1e-12)))
