"""Compare the fidelity of an encoder with that of the mean of many views of a photograph, warped back.

    python benchmarks/view_ceiling.py --data PHOTOS --limit 8 --checkpoint vits14-focus/featsharp-2x

The mean uses the backbone's features of --views other views of the same photograph, so it bounds upsamplers of a few
passes from above; the error that it leaves is noise that differs from view to view. Prints fidelity with area pooling.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.builder import create_encoder, load_from_file
from featsharp.data.views import ViewConfig, Views, base_view, cut_canvas, render_views, sample_homography
from featsharp.device import autocast_dtype
from featsharp.evaluation.features import encode_raw, predict_raw
from featsharp.evaluation.fidelity import default_eval_size
from featsharp.evaluation.images import ImageSet
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize

CHUNK = 24  # views at a time
# Those that are measured: 8 of a photograph, with its pixels beyond the crop where there are any.
VIEWS = ViewConfig(
    num_views=8, zoom=[1.0, 1.0], jitter_zoom=[1.0, 1.6], perspective=[0.0, 0.0], rotation=8.0, shift=0.0
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--views", type=int, default=96)
    parser.add_argument("--checkpoint", default="vits14-focus/featsharp-2x")
    arguments = parser.parse_args()
    encoder = load_from_file(arguments.checkpoint)
    encoder.backbone.autocast_dtype = autocast_dtype("auto", torch.device("cpu"))
    encoders = {"bilinear": create_encoder(encoder.backbone, "bilinear", 2), arguments.checkpoint: encoder}
    errors: dict[str, float] = {}
    targets, weights = [], []
    for number, (_, image) in enumerate(ImageSet(arguments.data, limit=arguments.limit)):
        views = draw(image, encoder, VIEWS.num_views, seed=(0, number))
        target, valid = encode(encoder, views)
        targets.append(target)
        weights.append(valid)
        others = draw(image, encoder, arguments.views, seed=(1, number))
        maps = {"mean of views": mean_of_views(encoder, others)}
        base = encoder.input_conditioner(base_view(views)[0])
        with torch.inference_mode():
            maps |= {name: predict_raw(e, base, encoder.backbone.input_size) for name, e in encoders.items()}
        for name, features in maps.items():
            seen = views.jitters.warp(features, tuple(features.shape[-2:]))
            pooled = F.adaptive_avg_pool2d(seen, tuple(target.shape[-2:]))
            errors[name] = errors.get(name, 0.0) + (valid * (pooled - target).square()).sum().item()
    target, valid = torch.cat(targets), torch.cat(weights)
    mean = (valid * target).sum((0, 2, 3)) / valid.sum()
    variance = (valid * (target - mean[:, None, None]).square()).sum().item()
    for name, error in errors.items():
        print(f"{name:32} {variance / error:.3f}")


def draw(image: Image, encoder: SharpEncoder, count: int, seed: tuple[int, int]) -> Views:
    """Views of a photograph, drawn as the fidelity task did for docs/experiments.md."""
    size = default_eval_size(encoder)
    canvas, mask = cut_canvas(image, size)
    rng = np.random.default_rng(seed)
    homographies = np.stack([sample_homography(size, VIEWS, rng) for _ in range(count)])
    return Views(canvas[None], mask[None], torch.from_numpy(homographies).float()[None])


@torch.inference_mode()
def encode(encoder: SharpEncoder, views: Views) -> tuple[Tensor, Tensor]:
    """Features of every view, [n, C, h, w], and the mask of those that count, [n, 1, h, w]."""
    images, masks = render_views(views, encoder.backbone.input_size)
    features = torch.cat([encode_raw(encoder, encoder.input_conditioner(chunk)) for chunk in images.split(CHUNK)])
    grid = (features.shape[-2], features.shape[-1])
    shown = (resize(masks, grid) > 0.99).float() * views.jitters.inside(grid)
    # Leave out the outermost tokens, which describe the view least well.
    return features, -F.max_pool2d(F.pad(-shown, (1, 1, 1, 1)), 3, stride=1)


def mean_of_views(encoder: SharpEncoder, views: Views) -> Tensor:
    """[1, C, 4h, 4w]: the mean over views of their features, each warped back to the base image."""
    features, valid = encode(encoder, views)
    size = (4 * features.shape[-2], 4 * features.shape[-1])
    total, count = torch.zeros(1), torch.zeros(1)
    for chunk, mask, jitters in zip(features.split(CHUNK), valid.split(CHUNK), views.jitters.split(CHUNK), strict=True):
        back = jitters.inverse()
        weight = back.warp(mask, size, padding_mode="zeros") * back.inside(size)
        total = total + (back.warp(chunk, size, padding_mode="border") * weight).sum(0)
        count = count + weight.sum(0)
    return (total / count.clamp(min=1e-3))[None]


if __name__ == "__main__":
    main()
