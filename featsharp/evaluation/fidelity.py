"""Multi-view fidelity: does the sharp map agree with what the backbone says about other views of the same scene?

    fidelity = sum(mask * variance) / sum(mask * squared error)      (FeatSharp, arXiv 2502.16025; higher is better)

The protocol makes runs comparable: held-out images, views fixed by the image's number, masks eroded by one token,
errors in the backbone's own space without any learned bias, pooled over images as a ratio of sums, and two
downsamplers: area pooling, which has no parameters, and the run's own where there is one. The variance is that of the
targets, so the best constant scores 1; PHI-S scales the whole space by one number, so the ratio is the same in PHI-S
space.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor, nn

from featsharp.data.views import ViewConfig, Views, base_view, cut_canvas, render_views, sample_homography
from featsharp.errors import ConfigError
from featsharp.evaluation.samples import Estimate, bootstrap, encode_raw, predict_raw
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize
from featsharp.ops.warp import inside, warp

# Views zoom in by up to 1.6 and rotate by up to 8 degrees.
EVAL_VIEWS = ViewConfig(
    num_views=8, zoom=(1.0, 1.0), jitter_zoom=(1.0, 1.6), perspective=(0.0, 0.0), rotation=8.0, shift=0.0
)


def default_eval_size(encoder: SharpEncoder) -> tuple[int, int]:
    """(h, w) of the evaluation images: the native size times the factor, rounded up, or twice the native size."""
    times = max(2, math.ceil(encoder.factor))
    return encoder.backbone.input_size[0] * times, encoder.backbone.input_size[1] * times


class FidelityMeter:
    """Collects the fidelity of one encoder, image by image.

    Args:
        encoder: In eval mode.
        downsamplers: Named modules from [N, C, f*h, f*w] to [N, C, h, w] in *normalised* space, tried besides "area".
        size: (h, w) in pixels of the base image; the low-resolution pass has the backbone's native size.
        views: How views are drawn.
        seed: Of the views; the same seed gives every encoder the same views.
    """

    def __init__(
        self,
        encoder: SharpEncoder,
        *,
        downsamplers: Mapping[str, nn.Module] | None = None,
        size: tuple[int, int] | None = None,
        views: ViewConfig = EVAL_VIEWS,
        seed: int = 0,
    ) -> None:
        self.encoder, self.views, self.seed = encoder, views, seed
        self.size = size or default_eval_size(encoder)
        self.downsamplers = {"area": None, **(downsamplers or {})}
        # Per image: squared errors by downsampler, number of values, sum and sum of squares of targets, cosines.
        self._rows: list[dict[str, float]] = []
        self._target_sum: list[Tensor] = []

    @torch.inference_mode()
    def add(self, image: Image) -> None:
        """Measure one RGB picture."""
        encoder, device = self.encoder, self.encoder.device
        rng = np.random.default_rng((self.seed, len(self._rows)))
        canvas, mask = cut_canvas(image, self.size)
        homographies = np.stack([sample_homography(self.size, self.views, rng) for _ in range(self.views.num_views)])
        views = Views(canvas[None], mask[None], torch.from_numpy(homographies).float()[None])
        views = Views(*(x.to(device) for x in views))
        native = encoder.backbone.input_size
        images, masks = render_views(views, native)
        targets = encode_raw(encoder, encoder.input_conditioner(images))
        grid = (targets.shape[-2], targets.shape[-1])
        high_res = predict_raw(encoder, encoder.input_conditioner(base_view(views)[0]), native)
        to_base = views.homographies[0]
        gain = math.ceil(encoder.factor)  # whole, so that cells can be pooled
        large = (gain * grid[0], gain * grid[1])
        warped = warp(high_res.expand(len(to_base), -1, -1, -1), to_base, large)
        valid = _erode((resize(masks, grid) > 0.99).float() * inside(to_base, grid))
        row = {"count": valid.sum().item() * targets.shape[1], "square": (valid * targets.square()).sum().item()}
        for name, downsampler in self.downsamplers.items():
            prediction = self._pool(warped, grid, downsampler)
            row[f"error/{name}"] = (valid * (prediction - targets).square()).sum().item()
            if name == "area":
                cosine = F.cosine_similarity(prediction, targets, dim=1)[:, None]
                row["cosine"], row["tokens"] = (valid * cosine).sum().item(), valid.sum().item()
        self._rows.append(row)
        self._target_sum.append((valid * targets).sum((0, 2, 3)).double().cpu())

    def result(self) -> dict[str, Estimate]:
        """Fidelity by downsampler ("area", ...) and "cosine", the mean cosine similarity under area pooling."""
        if not self._rows:
            raise ConfigError("no image was measured; add at least one")
        channels = len(self._target_sum[0])
        mean_square = (torch.stack(self._target_sum).sum(0) / (self._total("count") / channels)).square().sum().item()
        # One variance for all resamples: it is a property of the space, not of the encoder.
        variance = self._total("square") / self._total("count") - mean_square / channels
        out = {}
        for name in self.downsamplers:
            rows = [(row["count"], row[f"error/{name}"]) for row in self._rows]
            out[name] = bootstrap(rows, lambda r: float(variance * r[:, 0].sum() / max(r[:, 1].sum(), 1e-12)))
        rows = [(row["cosine"], row["tokens"]) for row in self._rows]
        out["cosine"] = bootstrap(rows, lambda r: float(r[:, 0].sum() / r[:, 1].sum()))
        return out

    def _total(self, key: str) -> float:
        return sum(row[key] for row in self._rows)

    def _pool(self, warped: Tensor, grid: tuple[int, int], downsampler: nn.Module | None) -> Tensor:
        if downsampler is None:
            return F.adaptive_avg_pool2d(warped, grid)
        normalizer = self.encoder.normalizer
        if not normalizer.invertible:
            return downsampler(warped)
        return normalizer.denormalize(downsampler(normalizer(warped)))


def _erode(mask: Tensor) -> Tensor:
    """Drop the outermost ring of a [B, 1, h, w] mask; beyond the map counts as outside. Tiny maps are all ring."""
    if min(mask.shape[-2:]) <= 2:
        return mask
    return -F.max_pool2d(F.pad(-mask, (1, 1, 1, 1)), 3, stride=1)
