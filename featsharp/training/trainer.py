"""The training loop: step, log, look, save, resume."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from featsharp.builder import check_backbone, save_checkpoint
from featsharp.checkpoint import read_checkpoint, restoring
from featsharp.data.loader import SkipLog, StepSampler, ViewDataset, load_views
from featsharp.data.views import Views
from featsharp.errors import CheckpointError, InputError
from featsharp.layers.local_block import LocalBlock
from featsharp.layers.spectral import add_spectral, spectral_norms
from featsharp.model import SharpEncoder
from featsharp.training.distributed import World, average_gradients, copy_from_main
from featsharp.training.objectives import Losses, Objective
from featsharp.training.optim import OptimConfig, build_optimizer, build_schedule
from featsharp.training.writers import VizWriter

logger = logging.getLogger(__name__)

LAST, BEST = "last.pth", "best.pth"


class Validation(NamedTuple):
    """What a look at the fixed validation samples found; ``score`` decides which checkpoint is the best."""

    score: float
    scalars: dict[str, float]
    images: dict[str, Tensor]  # [3, H, W] in [0, 1]


Validate = Callable[[SharpEncoder, Objective], Validation]


@dataclass
class LoopConfig:
    """How long, how often, where.

    Attributes:
        num_steps: The run ends after exactly this many steps.
        batch_size: Images per step and process.
        num_workers: Processes that decode images; 0 decodes in the training process.
        log_frequency, val_frequency, checkpoint_frequency: In steps; 0 for never (but at the end).
        seed: Of everything random.
        distinct_samples: Samples that are repeated epoch by epoch; 0: always new ones.
        spectral: Whether the linear layers of FeatSharp's block are trained under spectral reparametrisation.
        low_res_size: (h, w) in pixels of the low-resolution pass and of the rendered views.
        autocast_dtype: Type of the upsampler's matrix products; None: float32.
        optim: Rates and schedule.
    """

    num_steps: int
    batch_size: int = 4
    num_workers: int = 1
    log_frequency: int = 10
    val_frequency: int = 1000
    checkpoint_frequency: int = 500
    seed: int = 0
    distinct_samples: int = 0
    spectral: bool = True
    low_res_size: tuple[int, int] = (224, 224)
    autocast_dtype: torch.dtype | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)


class Trainer:
    """Trains the upsampler and the bias buffer of an encoder.

    Args:
        encoder: On the device of ``world``, its normalizer fitted (or about to be loaded by :meth:`resume`).
        objective: On the same device.
        dataset: Of training views.
        config: See :class:`LoopConfig`.
        folder: Where ``last.pth`` and ``best.pth`` go.
        writer: Receives scalars and pictures; only on the main process.
        world: This process among all.
        run_config: The composed configuration, kept in the checkpoints.
        validate: Looks at fixed samples every ``val_frequency`` steps and at the end.
        progress: Whether to show a progress bar with the loss and the time left.
    """

    def __init__(
        self,
        encoder: SharpEncoder,
        objective: Objective,
        dataset: ViewDataset,
        config: LoopConfig,
        folder: Path,
        writer: VizWriter,
        world: World,
        *,
        run_config: Mapping[str, Any] | None = None,
        validate: Validate | None = None,
        progress: bool = True,
    ) -> None:
        self.encoder, self.objective, self.dataset, self.config = encoder, objective, dataset, config
        self.folder, self.writer, self.world = folder, writer, world
        self.run_config, self.validate, self.progress = run_config, validate, progress
        if config.spectral:
            # Of the local block alone, as published in effect: elsewhere a norm of 1 would undo the start.
            for module in encoder.upsampler.modules():
                if isinstance(module, LocalBlock):
                    add_spectral(module)
        self.trained = nn.ModuleDict({"upsampler": encoder.upsampler})
        if encoder.bias_buffer is not None:
            self.trained["bias_buffer"] = encoder.bias_buffer
        copy_from_main([*self.trained.parameters(), *objective.parameters()], world)
        self.optimizer = build_optimizer(self.trained, objective, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.num_steps)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.step = 0
        self.best_score = float("-inf")
        self.skipped = SkipLog()
        self.seconds_per_step = float("nan")

    def run(self) -> None:
        """Train to the last step, then save and validate."""
        from tqdm import tqdm

        sampler = StepSampler(
            self.step,
            self.config.num_steps,
            self.config.batch_size,
            self.world.rank,
            self.world.size,
            distinct=self.config.distinct_samples,
            seed=self.config.seed,
        )
        bar = tqdm(
            total=self.config.num_steps,
            initial=self.step,
            desc="training",
            unit="step",
            file=sys.stderr,
            disable=not (self.progress and self.world.is_main),
        )
        durations: list[float] = []
        start = time.perf_counter()
        with bar:
            for views, skipped in load_views(self.dataset, sampler, self.config.num_workers):
                for name, reason in self.skipped.add(skipped):
                    logger.warning("skipped %s: %s", name, reason)
                losses = self.train_step(Views(*(x.to(self.world.device) for x in views)))
                durations.append(time.perf_counter() - start)
                bar.set_postfix(loss=f"{losses.reconstruction.item():.4f}", refresh=False)
                bar.update()
                self._report(losses, durations[-1])
                start = time.perf_counter()
        self.seconds_per_step = sorted(durations)[len(durations) // 2] if durations else float("nan")
        if self.skipped.names:
            logger.warning(self.skipped.summary())
        self._save_and_validate()

    def train_step(self, views: Views) -> Losses:
        """One optimiser step on a batch of views."""
        self.encoder.train()
        self.objective.train()
        # Random numbers are those of the step, so that a resumed run draws what an uninterrupted one would have.
        step_seed = np.random.SeedSequence((self.config.seed, self.step, self.world.rank))
        torch.manual_seed(int(step_seed.generate_state(1)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.objective.backward(self.encoder, views, self.config.low_res_size, self.config.autocast_dtype)
        average_gradients(self.parameters, self.world)
        self.gradient_norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm)
        if not torch.isfinite(self.gradient_norm):
            raise InputError(
                f"the gradient of step {self.step + 1} is not finite; lower the learning rate, or use float32"
            )
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        return losses

    def save(self, name: str = LAST) -> Path:
        """Write a checkpoint that a run can resume from; returns its path."""
        path = self.folder / name
        save_checkpoint(self.encoder, path, config=self.run_config, training=self.state())
        return path

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        return {
            "step": self.step,
            "best_score": self.best_score,
            "trained": self.trained.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": dict(self.skipped.names),
        }

    def resume(self, path: Path) -> None:
        """Go on where the checkpoint at ``path`` was written."""
        content = read_checkpoint(path)
        with restoring(path):
            state = content["training"]
            if state is None:
                raise CheckpointError(f"checkpoint {path} holds no training state; start a new run in another folder")
            if state["step"] > self.config.num_steps:
                raise CheckpointError(
                    f"checkpoint {path} is at step {state['step']}, beyond num_training_steps={self.config.num_steps}"
                )
            check_backbone(self.encoder.backbone, content["encoder"]["backbone"], path)
            self.trained.load_state_dict(state["trained"])
            # The normalizer too: what was trained belongs to this very rotation, which another fit need not find again.
            prefix = "normalizer."
            normalizer = {k.removeprefix(prefix): v for k, v in content["model"].items() if k.startswith(prefix)}
            self.encoder.normalizer.load_state_dict(normalizer)
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
            self.best_score = state["best_score"]
            self.schedule = build_schedule(self.optimizer, self.config.optim, self.config.num_steps, self.step)
            self.skipped.names.update(state["skipped"])

    def _report(self, losses: Losses, seconds: float) -> None:
        config, step = self.config, self.step
        if self.world.is_main and config.log_frequency and step % config.log_frequency == 0:
            scalars = {
                **self.objective.scalars(losses),
                "optim/gradient_norm": self.gradient_norm.item(),
                "optim/learning_rate": self.optimizer.param_groups[0]["lr"],
                "speed/seconds_per_step": seconds,
                "data/skipped": self.skipped.count,
            }
            norms = spectral_norms(self.encoder.upsampler)
            if norms:
                scalars["optim/spectral_norm_median"] = torch.cat(list(norms.values())).median().item()
            for name, value in scalars.items():
                self.writer.scalar(name, value, step)
        if step == config.num_steps:
            return  # run() saves and validates at the end
        if config.val_frequency and step % config.val_frequency == 0:
            self._save_and_validate()
        elif config.checkpoint_frequency and step % config.checkpoint_frequency == 0 and self.world.is_main:
            self.save()

    def _save_and_validate(self) -> None:
        if not self.world.is_main:
            return
        self.save()  # first, so that no failure of validation costs what was trained
        if self.validate is None:
            return
        self.encoder.eval()
        self.objective.eval()
        with torch.no_grad():
            found = self.validate(self.encoder, self.objective)
        for name, value in found.scalars.items():
            self.writer.scalar(name, value, self.step)
        for name, image in found.images.items():
            self.writer.image(name, image, self.step)
        if found.score > self.best_score:
            self.best_score = found.score
            self.save(BEST)
            self.save()
