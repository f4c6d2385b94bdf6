r"""LoftUp's two stages of training (arXiv 2504.14032), by masks of objects and parts that a segmenter made.

    stage 1   |P U - P refine(bicubic F)|^2 + R           features F and sharp map U of an image
    stage 2   20 |S(U there) - S(refine(T))|^2 + R        T: the teacher's sharp map of a crop, at its place in U

``refine`` moves features towards their mean inside each mask: (1 - a) x + a mean(x). P is a random projection to 64
channels, drawn for every step. S are the cosines of all pairs of cells, without the outer tenth. R is the multi-view
objective, of which this one has all settings. The teacher is an exponential average of the network, which starts from
the first stage (``start``): 0.99 of it is kept in every tenth step. The crop has a quarter of the image's side.

    featsharp train +model=dinov2-s +upsampler=loftup-14x objective=loftup normalizer=none objective.masks=masks \
        train_data_dir=photos output_subdir=stage1
    featsharp train ... objective.stage=2 objective.start=outputs/stage1/last.pth objective.mask_strength=0.5

Masks are one file per picture, ``STEM.png`` in the folder ``masks``, of the picture's size: grey, 8 or 16 bit, the
number of the mask of each pixel, 0 for none. The published masks are those of SA-1B, which overlap; here they do not.
Published scripts that we know of were cleaned up after the weights, so details are approximate: strengths a are theirs,
optimiser and schedule are ours, and so are the weights of R.

Shapes: B images, C channels, (h, w) of the base view in pixels, (H, W) of the sharp map.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from featsharp.checkpoint import read_checkpoint, restoring
from featsharp.data.loader import Batch, ViewDataset, collate_views
from featsharp.data.mixture import Division, ImageMixture
from featsharp.data.views import ViewConfig, Views, base_view, cut_values, draw_crop, sample_views
from featsharp.errors import ConfigError, DataError
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resample, resize, size_of
from featsharp.settings import key
from featsharp.training.objectives.base import (
    Losses,
    Objective,
    autocast,
    check_finite,
    check_larger_images,
    guided_upsampler,
    register_objective,
)
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective

# Of the image's side, of the crop that the teacher sees.
CROP = 4
# The teacher keeps so much of itself at an update, which comes every so many steps.
KEPT, UPDATE_EVERY = 0.99, 10
# Share of a side that is left out of affinities, on each side.
BORDER = 0.1
EXPECTED = (
    "a folder with STEM.png for each picture: of its size, grey with 8 or 16 bits, the number of the mask of each "
    "pixel, 0 for none"
)


class MaskedViews(NamedTuple):
    """Views, and the masks of their base views."""

    views: Views
    masks: Tensor  # [B, h, w] int32, number of the mask, 0 for none

    def to(self, device: torch.device) -> "MaskedViews":
        """The same on another device."""
        return MaskedViews(self.views.to(device), self.masks.to(device))


class MaskedDataset(ViewDataset):
    """Views of the pictures of a mixture with their masks; a picture without masks counts as skipped, and has none."""

    def __init__(
        self, mixture: ImageMixture, size: tuple[int, int], config: ViewConfig, seed: int, folder: Path
    ) -> None:
        super().__init__(mixture, size, config, seed)
        self.folder = folder

    def load(self, numbers: Sequence[int], division: Division) -> Batch[MaskedViews]:  # type: ignore[override]
        """See :class:`featsharp.data.loader.SampleDataset`."""
        samples, masks = [], []
        for n in numbers:
            loaded = self.mixture.load(n, division)
            skipped = list(loaded.skipped)
            views = sample_views(loaded.image, self.size, self.config, np.random.default_rng((self.seed, n)))
            try:
                values = read_masks(self.folder, loaded.name, (loaded.image.height, loaded.image.width))
            except DataError as error:
                skipped.append((loaded.name, str(error)))
                values = np.zeros((1, 1), np.int32)
            crop = draw_crop(self.config, np.random.default_rng((self.seed, n)))
            masks.append(torch.from_numpy(cut_values(values, self.size, *crop)))
            samples.append((views, skipped))
        batch = collate_views(samples)
        return Batch(MaskedViews(batch.samples, torch.stack(masks)), batch.skipped)


@dataclass
class LoftUpConfig(MultiViewConfig):
    """Settings of the objective, beside those of multi-view.

    Attributes:
        masks: Folder of masks.
        stage: 1 or 2.
        start: Checkpoint whose upsampler the run starts from: that of stage 1, for stage 2.
        mask_strength: Share a of the mean inside a mask; published: 0.8 in stage 1, 0.5 in stage 2.
        projection: Channels of the random projection.
        affinity_weight: Weight of affinities in stage 2.
    """

    name: str = "loftup"
    downsampler: str = "attention"
    masks: str = "???"
    stage: int = key(1, least=1, most=2)
    start: str | None = None
    mask_strength: float = key(0.8, least=0, most=1)
    projection: int = key(64, least=1)
    affinity_weight: float = key(20.0, least=0)


@register_objective("loftup", "match features refined by masks, then those of closer crops (LoftUp)")
class LoftUpObjective(MultiViewObjective):
    """Masks and multi-view consistency, or self-distillation. Trains guided upsamplers of any size.

    Args:
        embed_dim: C.
        factor: f.
        config: See :class:`LoftUpConfig`.
    """

    config_type = LoftUpConfig
    config: LoftUpConfig
    updates: Tensor

    def __init__(self, embed_dim: int, factor: float, config: LoftUpConfig) -> None:
        super().__init__(embed_dim, factor, config)
        self.teacher: nn.Module | None = None
        self.register_buffer("updates", torch.zeros((), dtype=torch.long, device="cpu"))

    def check(self, encoder: SharpEncoder) -> None:
        Objective.check(self, encoder)
        check_larger_images(encoder, "loftup")
        folder = Path(self.config.masks).expanduser()
        if not any(folder.glob("*.png")):
            raise ConfigError(f"objective 'loftup' learns from masks; objective.masks={folder} is not {EXPECTED}")
        if self.config.stage == 2 and self.config.start is None:
            raise ConfigError("stage 2 of objective 'loftup' starts from stage 1; set objective.start=CHECKPOINT")

    def begin(self, encoder: SharpEncoder) -> None:
        if self.config.start is not None:
            with restoring(self.config.start):
                state = read_checkpoint(self.config.start)["model"]
                prefix = "upsampler."
                encoder.upsampler.load_state_dict(
                    {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
                )
        if self.config.stage == 2:
            self.teacher = copy.deepcopy(encoder.upsampler).requires_grad_(False)

    def view_size(self, encoder: SharpEncoder) -> tuple[int, int]:
        """Return the native size; four times that in stage 2."""
        height, width = encoder.backbone.input_size
        times = CROP if self.config.stage == 2 else 1
        return times * height, times * width

    def open_dataset(self, encoder: SharpEncoder, mixture: ImageMixture, views: ViewConfig, seed: int) -> MaskedDataset:
        """Open pictures with their masks."""
        return MaskedDataset(mixture, self.view_size(encoder), views, seed, Path(self.config.masks).expanduser())

    def backward(  # type: ignore[override]
        self,
        encoder: SharpEncoder,
        samples: MaskedViews,
        low_res_size: tuple[int, int],
        autocast_dtype: torch.dtype | None = None,
        loss_scale: float = 1.0,
    ) -> Losses:
        """See :meth:`Objective.backward`; "masks" or "affinity" is the term of the stage, not weighted."""
        views = super().backward(encoder, samples.views, low_res_size, autocast_dtype, loss_scale)
        image = encoder.input_conditioner(base_view(samples.views)[0])
        seen = resize(image, low_res_size)
        with torch.no_grad():
            features = encoder.encode(seen).features
        with autocast(image, autocast_dtype):
            sharp = guided_upsampler(encoder).upsample(features, seen).float()
        if self.config.stage == 1:
            name, weight, loss = "masks", 1.0, self.mask_loss(sharp, features, samples.masks)
        else:
            name, weight = "affinity", self.config.affinity_weight
            loss = self.affinity_loss(encoder, sharp, image, samples.masks, low_res_size)
        check_finite(loss)
        (weight * loss * loss_scale).backward()
        total = views.total + weight * loss.detach()
        return Losses(total, views.reconstruction, {**views.terms, name: loss.detach()})

    def mask_loss(self, sharp: Tensor, features: Tensor, masks: Tensor) -> Tensor:
        """Compute the distance of a sharp map [B, C, H, W] to refined features, after a random projection."""
        size = size_of(sharp)
        target = refine(
            resample(features.float(), size, "bicubic"), shrink_masks(masks, size), self.config.mask_strength
        )
        matrix = F.normalize(torch.randn(sharp.shape[1], self.config.projection, device=sharp.device), dim=0)
        return torch.einsum("bchw,ck->bkhw", sharp - target, matrix).square().mean()

    def affinity_loss(
        self, encoder: SharpEncoder, sharp: Tensor, image: Tensor, masks: Tensor, low_res_size: tuple[int, int]
    ) -> Tensor:
        """Compare the affinities of a crop in the sharp map of the whole image with those in the teacher's of the crop.

        Args:
            encoder: Of the features.
            sharp: [B, C, H, W], of the whole image.
            image: [B, 3, 4h, 4w], whitened.
            masks: [B, 4h, 4w].
            low_res_size: (h, w).
        """
        assert self.teacher is not None
        self._update_teacher(encoder.upsampler)
        cells = [max(1, side // CROP) for side in size_of(sharp)]
        first = [int(torch.randint(side - n + 1, ())) for side, n in zip(size_of(sharp), cells, strict=True)]
        here = tuple(slice(at, at + n) for at, n in zip(first, cells, strict=True))
        start = [
            min(round(at * full / side), full - wanted)
            for at, side, full, wanted in zip(first, size_of(sharp), size_of(image), low_res_size, strict=True)
        ]
        there = tuple(slice(at, at + wanted) for at, wanted in zip(start, low_res_size, strict=True))
        with torch.no_grad():
            crop = image[..., there[0], there[1]]
            taught = self.teacher.upsample(encoder.encode(crop).features, crop).float()  # type: ignore[operator]
            inside = shrink_masks(masks[:, there[0], there[1]], size_of(taught))
            taught = resize(refine(taught, inside, self.config.mask_strength), (cells[0], cells[1]))
            expected = affinities(taught)
        return (affinities(sharp[..., here[0], here[1]]) - expected).square().mean()

    @torch.no_grad()
    def _update_teacher(self, student: nn.Module) -> None:
        assert self.teacher is not None
        self.updates += 1
        if self.updates % UPDATE_EVERY:
            return
        for name, value in self.teacher.state_dict().items():
            new = student.state_dict()[name]
            value.lerp_(new, 1 - KEPT) if value.is_floating_point() else value.copy_(new)


def refine(features: Tensor, masks: Tensor, strength: float) -> Tensor:
    """Move features [B, C, H, W] towards their mean inside each mask of [B, H, W], by ``strength`` in [0, 1]."""
    refined = []
    for values, numbers in zip(features.flatten(2), masks.flatten(1), strict=True):
        _, place, count = numbers.unique(return_inverse=True, return_counts=True)
        sums = values.new_zeros(values.shape[0], len(count)).index_add(1, place, values)
        towards = strength * (numbers > 0).to(values.dtype)
        refined.append(torch.lerp(values, (sums / count)[:, place], towards))
    return torch.stack(refined).view_as(features)


def affinities(features: Tensor) -> Tensor:
    """Compute the cosines [B, N, N] of all cells of a map [B, C, H, W] but those of its border."""
    rows, columns = (round(BORDER * side) if side > 2 else 0 for side in size_of(features))
    inner = features[..., rows : size_of(features)[0] - rows, columns : size_of(features)[1] - columns].flatten(2)
    directions = inner / (inner.norm(dim=1, keepdim=True) + 1e-6)
    return directions.transpose(1, 2) @ directions


def shrink_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample masks [B, h, w] at the centres of the cells of a map: [B, *size]."""
    return F.interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0].long()


def read_masks(folder: Path, name: str, size: tuple[int, int]) -> np.ndarray:
    """Read the masks of a picture of (h, w) pixels, [h, w] int32; DataError where there are none that fit."""
    path = folder / f"{PurePosixPath(name).stem}.png"
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"no masks: {path} cannot be read ({type(error).__name__})") from error
    if values.shape != size or values.dtype.kind not in "ui":
        raise DataError(f"no masks: {path} is {values.dtype} {values.shape}; expected {EXPECTED}")
    return values.astype(np.int32)
