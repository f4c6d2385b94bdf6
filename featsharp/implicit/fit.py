"""Fitting an implicit network to one image: encode views, then step, save, resume.

FeatUp's implicit upsampler (arXiv 2403.10516). Differences from the published code:

- The network adds to the enlarged features of the image, zero at the start (``start="nothing"``: published), so that a
  few hundred steps are enough instead of thousands.
- The map is rendered at ``render`` cells per token (published: one per pixel, 14 or 16), so that a fit on a CPU takes
  minutes; the network can be evaluated at any resolution afterwards. Its frequencies end at the resolution of the
  image (``frequencies="published"``: far beyond).
- 150 views instead of 3000: more did not help fits of a few hundred steps, and encoding is the larger part of the work.
- A blur shared by all channels and positions pools the map; ``downsampler="attention"`` is the published kind.
- Any shape of image, any backbone, views cut from the picture itself, an exact PCA, mirrored margins left out of the
  loss; all randomness depends on ``seed`` and the step, so that a resumed fit equals the uninterrupted one.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featsharp.backbones.base import Backbone
from featsharp.builder import check_backbone, create_encoder
from featsharp.checkpoint import read_checkpoint, read_step, restoring, write_checkpoint
from featsharp.data.images import Picture, decode_image, image_to_tensor
from featsharp.device import usual_defaults
from featsharp.errors import CheckpointError, ConfigError, InputError, unknown_name
from featsharp.implicit.crops import Canvas, CropConfig, sample_crops
from featsharp.implicit.fitted import FIT_FILE, ImplicitFeatures, build_fitted
from featsharp.implicit.network import FREQUENCY_KINDS, ImplicitNetwork, colour_range, frequency_table
from featsharp.implicit.objective import FitLosses, FitObjective
from featsharp.implicit.projection import Projection
from featsharp.ops.resize import resize
from featsharp.ops.views import View
from featsharp.training.downsamplers import DOWNSAMPLERS
from featsharp.training.optim import restore_optimizer

# Views that the projection is fitted to, and that the backbone encodes at once.
PROJECTION_VIEWS = 50
ENCODE_BATCH = 10
LEARNING_RATE = 2e-3
STARTS = ("bilinear", "nothing")

# Streams of random numbers: the second part of their seeds.
VIEW_STREAM, HELD_OUT_STREAM, START_STREAM, STEP_STREAM = range(4)

# Iterates over a sequence and shows the progress; the second argument is a label.
Progress = Callable[[Sequence[Any], str], Any]


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit; a resumed one must have the same.

    Attributes:
        views: Number of views that are encoded (published: 3000).
        dim: Principal components of the features that are fitted (at most as many as there are channels).
        render: Cells per token and axis of the map that is fitted, at most the patch size.
        frequencies: "resolved" or "published", see :func:`featsharp.implicit.network.frequency_table`.
        colour: Whether the colours of the image are inputs of the network.
        downsampler: "simple", "attention" or "area".
        start: "bilinear": the network adds to the enlarged features of the image, zero at the start. "nothing": it
            computes the whole map (published).
        views_per_step: Views that one step compares with, drawn with replacement.
        seed: Of all random numbers.
        crops: Ranges of the views.
    """

    views: int = 150
    dim: int = 128
    render: int = 4
    frequencies: str = "resolved"
    colour: bool = True
    downsampler: str = "simple"
    start: str = "bilinear"
    views_per_step: int = 10
    seed: int = 0
    crops: CropConfig = field(default_factory=CropConfig)

    def __post_init__(self) -> None:
        for kind, given, allowed in (
            ("start of a fit", self.start, STARTS),
            ("kind of frequencies", self.frequencies, FREQUENCY_KINDS),
            ("downsampler", self.downsampler, DOWNSAMPLERS.names()),
        ):
            if given not in allowed:
                raise unknown_name(kind, given, allowed)
        for name in ("views", "dim", "render", "views_per_step"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)}")


class Fitter:
    """A fit of an implicit network to one picture.

    Construction encodes the views. They are not saved: a resumed fit encodes them again.

    Args:
        backbone: On the device to fit on.
        picture: Of any size, in any form that ``decode_image`` takes.
        config: See :class:`FitConfig`.
        size: (h, w) in pixels to fit the picture at, rounded to a size of the backbone; None: about as many tokens as
            at the backbone's native size, with the picture's aspect ratio.
        resume: A file of :meth:`save` to continue from.
        progress: Wraps sequences that take time, to show a progress bar.

    Raises:
        CheckpointError: When ``resume`` is of another picture, backbone or configuration, with the differences.
    """

    @usual_defaults()
    def __init__(
        self,
        backbone: Backbone,
        picture: Picture,
        config: FitConfig | None = None,
        *,
        size: tuple[int, int] | None = None,
        resume: Path | None = None,
        progress: Progress = lambda items, _: items,
    ) -> None:
        self.config = config = config or FitConfig()
        self.progress = progress
        self.encoder = create_encoder(backbone, "identity", 1)
        if config.render > backbone.patch_size:
            raise ConfigError(
                f"render={config.render} cells per token are more than pixels; backbone {backbone.name!r} has patches "
                f"of {backbone.patch_size} pixels, give at most that"
            )
        rgb = decode_image(picture)
        shape = (rgb.height, rgb.width)
        self.size = backbone.fit_size(*size) if size else self.encoder.native_low_res_size(shape)
        self.device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
        self.canvas = Canvas(rgb, config.crops.pad)
        self._identity: dict[str, Any] = {
            "backbone": backbone.describe(),
            "picture": hashlib.sha256(np.asarray(rgb).tobytes() + repr(shape).encode()).hexdigest(),
            "settings": {**dataclasses.asdict(config), "size": list(self.size)},
        }
        content = None if resume is None else self._read(resume)
        saved = None if content is None else build_fitted(content, resume)

        self.views = sample_crops(config.views, config.crops, np.random.default_rng((config.seed, VIEW_STREAM)))
        self.targets, projection = self._encode_targets(None if saved is None else saved.projection)
        pixels = resize(image_to_tensor(rgb)[None], self.size)[0]
        image = (pixels * 255).round().to(torch.uint8)
        with seeded(self.device, config.seed, START_STREAM):
            network = ImplicitNetwork(
                len(projection.basis),
                frequency_table(config.frequencies, self.size, colour=config.colour),
                colour_range(image / 255),
            )
            self.objective = FitObjective(len(projection.basis), config.render, config.downsampler).to(self.device)
        base = projection.project(self._encode((image[None] / 255).to(self.device)).cpu())
        if config.start == "bilinear":
            torch.nn.init.zeros_(network.layer_out.weight)
            torch.nn.init.zeros_(network.layer_out.bias)
        else:
            base.zero_()
        self.fitted = ImplicitFeatures(network, projection, image, base, config.render).to(self.device)
        self.guide = self.fitted.guide(self.render_size)
        parameters = [*self.fitted.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.NAdam(parameters, lr=LEARNING_RATE)
        self.step = 0
        if content is not None:
            self._restore(content, resume)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (h, w) of the fitted image."""
        return self.encoder.backbone.grid_size(self.size)

    @property
    def render_size(self) -> tuple[int, int]:
        """Cells (h, w) of the map that is fitted."""
        return self.grid[0] * self.config.render, self.grid[1] * self.config.render

    def run(self, steps: int, path: Path | None = None, *, save_every: int = 50) -> None:
        """Fit until ``steps`` steps in total, with a file at ``path`` every ``save_every`` of them.

        Raises:
            CheckpointError: When the fit is beyond ``steps`` already.
        """
        if self.step > steps:
            raise CheckpointError(
                f"the fit has made {self.step} steps already; give at least as many, not {steps}, or another folder"
            )
        if path is not None and self.step == 0:
            self.save(path)  # checks that the folder can be written
        for _ in self.progress(range(self.step, steps), "fitting"):
            self.train_step()
            if path is not None and (self.step == steps or self.step % save_every == 0):
                self.save(path)

    @usual_defaults()
    def train_step(self) -> FitLosses:
        """Make one optimiser step."""
        config = self.config
        rng = np.random.default_rng((config.seed, STEP_STREAM, self.step))
        chosen = torch.from_numpy(rng.integers(len(self.targets), size=config.views_per_step))
        self.fitted.train()
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        with seeded(self.device, config.seed, STEP_STREAM, self.step):
            losses = self.objective(
                self.fitted.components(self.guide),
                self.targets[chosen].to(self.device),
                self.views[chosen].to(self.device),
            )
            losses.total.backward()
        if not torch.isfinite(losses.total):
            raise InputError(f"the loss of step {self.step + 1} is not finite; try another seed or more views")
        self.optimizer.step()
        self.step += 1
        return losses

    def save(self, path: Path) -> None:
        """Write a file for :func:`load_fit` and for resuming."""
        training = {
            "step": self.step,
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        content = {**self._identity, "model": self.fitted.model_state(), "training": training}
        write_checkpoint(path, content, FIT_FILE)

    @torch.no_grad()
    def low_res(self) -> Tensor:
        """Encode the image: [1, C, h, w] float32."""
        return self._encode(self.fitted.image[None].float() / 255)

    @torch.no_grad()
    def held_out_views(self, count: int) -> tuple[Tensor, View]:
        """Encode views that no fit uses: features [n, C, h, w], and these views."""
        rng = np.random.default_rng((self.config.seed, HELD_OUT_STREAM))
        views = sample_crops(count, self.config.crops, rng).to(self.device)
        images = self.canvas.render(views, self.size).to(self.device)
        return torch.cat([self._encode(batch) for batch in images.split(ENCODE_BATCH)]), views

    @torch.no_grad()
    def _encode_targets(self, projection: Projection | None) -> tuple[Tensor, Projection]:
        """Encode and project all views: [n, K, h, w] on the CPU, and the projection, fitted where none is given."""
        projected: list[Tensor] = []
        waiting: list[Tensor] = []  # until there are enough to fit the projection to
        enough = min(PROJECTION_VIEWS, len(self.views))
        for batch in self.progress(list(self.views.split(ENCODE_BATCH)), "encoding views"):
            waiting.append(self._encode(self.canvas.render(batch, self.size).to(self.device)).cpu())
            if projection is None and sum(map(len, waiting)) >= enough:
                projection = Projection.fit(torch.cat(waiting)[:enough], self.config.dim)
            if projection is not None:
                projected += [projection.project(features) for features in waiting]
                waiting.clear()
        assert projection is not None
        return torch.cat(projected), projection

    def _encode(self, images: Tensor) -> Tensor:
        """Encode [B, 3, H, W] in [0, 1] to the backbone's features, float32."""
        return self.encoder.backbone(self.encoder.input_conditioner(images)).features.float()

    def _read(self, path: Path) -> dict[str, Any]:
        """Read a file of the same fit."""
        content = read_checkpoint(path, FIT_FILE)
        with restoring(path):
            check_backbone(self.encoder.backbone, content["backbone"], path)
            differences = [
                f"{name} {value!r} instead of {content['settings'].get(name)!r}"
                for name, value in self._identity["settings"].items()
                if value != content["settings"].get(name)
            ]
            if content["picture"] != self._identity["picture"]:
                differences.insert(0, "another picture")
        if differences:
            raise CheckpointError(
                f"{path} is of a fit with other settings: {'; '.join(differences)}. Give the same to go on with it, or "
                "choose another folder"
            )
        return content

    def _restore(self, content: dict[str, Any], path: object) -> None:
        with restoring(path):
            training = content["training"]
            self.fitted.load_state_dict(content["model"])
            self.objective.load_state_dict(training["objective"])
            restore_optimizer(self.optimizer, training["optimizer"])
            self.step = read_step(training)


@contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Seed random numbers in this context by ``key``, and restore the random state afterwards."""
    devices = [device] if device.type == "cuda" else []
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for cuda in devices:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield
