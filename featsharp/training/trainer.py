"""The training loop: step, log, look, save, resume."""

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from featsharp.builder import check_backbone, save_checkpoint
from featsharp.checkpoint import read_checkpoint, restoring
from featsharp.data.loader import Places, SkipLog, StepSampler, ViewDataset, load_views
from featsharp.data.views import Views
from featsharp.errors import CheckpointError, unknown_name
from featsharp.layers.spectral import add_spectral, spectral_norms
from featsharp.model import SharpEncoder
from featsharp.training.distributed import (
    World,
    add_over_processes,
    any_process,
    average_gradients,
    copy_from_main,
    gather_objects,
    object_from_main,
)
from featsharp.training.loggers import VizWriter
from featsharp.training.objectives import Losses, Objective
from featsharp.training.objectives.base import weighted_sum
from featsharp.training.optim import (
    OptimConfig,
    build_optimizer,
    build_scaler,
    build_schedule,
    load_optimizer,
    optimizer_step,
)
from featsharp.training.signals import Terminated, TermSignal
from featsharp.training.usage import StepClock, peak_memory

logger = logging.getLogger(__name__)

LAST, BEST = "last.pth", "best.pth"


class Validation(NamedTuple):
    """What a look at the fixed validation samples found; ``score`` decides which checkpoint is the best."""

    score: float
    scalars: dict[str, float]
    images: dict[str, Tensor]  # [3, H, W] in [0, 1]
    samples: str = ""  # a tag for the samples: scores of others are not compared


Validate = Callable[[SharpEncoder, Objective], Validation]


@dataclass
class LoopConfig:
    """How long, how often, where.

    Attributes:
        num_steps: The run ends after exactly this many steps.
        batch_size: Images that a process looks at at once.
        accumulation_steps: Batches per step, whose gradients are averaged.
        num_workers: Processes that decode images; 0 decodes in the training process.
        log_frequency, val_frequency, checkpoint_frequency: In steps; 0 for never (but at the end).
        seed: Of everything random.
        distinct_samples: Samples that are repeated epoch by epoch; 0: always new ones.
        spectral: Whether the linear layers of FeatSharp's block are trained under spectral reparametrisation.
        low_res_size: (h, w) in pixels of the low-resolution pass and of the rendered views.
        autocast_dtype: Type of the upsampler's matrix products; None: float32. With float16 the loss is scaled.
        compile_backend: Of ``torch.compile``, which the upsampler is then trained through; None: it is not compiled.
        optim: Rates and schedule.
    """

    num_steps: int
    batch_size: int = 4
    accumulation_steps: int = 1
    num_workers: int = 1
    log_frequency: int = 10
    val_frequency: int = 1000
    checkpoint_frequency: int = 500
    seed: int = 0
    distinct_samples: int = 0
    spectral: bool = True
    low_res_size: tuple[int, int] = (224, 224)
    autocast_dtype: torch.dtype | None = None
    compile_backend: str | None = None
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
            for module in encoder.upsampler.spectral_modules():
                add_spectral(module)
        self.trained = nn.ModuleDict({"upsampler": encoder.upsampler})
        if encoder.bias_buffer is not None:
            self.trained["bias_buffer"] = encoder.bias_buffer
        copy_from_main([*self.trained.parameters(), *objective.parameters()], world)
        self.optimizer = build_optimizer(encoder, objective, config.optim)
        self.schedule = build_schedule(self.optimizer, config.optim, config.num_steps)
        self.scaler = build_scaler(world.device, config.autocast_dtype)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if config.compile_backend is not None:
            compile_upsampler(encoder, config.compile_backend)
        self.step = 0
        self.validated = -1  # the last step that validation looked at
        self.best_score = float("-inf")
        self.best_among: str | None = None  # tag of the samples that the best score is of
        self.skipped = SkipLog()
        self.places: Places = {}
        self.term = TermSignal()
        self.clock = StepClock()

    def run(self) -> None:
        """Train to the last step, then save and validate.

        All that is random in a step follows from its number, and so does its place in the data. That is why nothing of
        either needs to be in a checkpoint but the places of streams (how many images they leave out is known by
        decoding alone), and why the number of processes must stay what it was; with streams that of the workers, too,
        as each reads a sequence of its own.

        Raises:
            Terminated: When SIGTERM came: the step was finished and saved, on every process.
        """
        from tqdm import tqdm

        if self._is_due(self.config.val_frequency) and self.validated != self.step < self.config.num_steps:
            self._save_and_validate()  # what the run was resumed from was saved, and killed before that
        micro = self.config.accumulation_steps
        sampler = StepSampler(
            self.step * micro,
            self.config.num_steps * micro,
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
        batches: list[Views] = []
        loaded = load_views(self.dataset, sampler, self.config.num_workers, self.places)
        with closing(loaded), bar, self.term:
            for views, skipped in self.clock.batches(loaded):
                for name, reason in self.skipped.add(skipped):
                    logger.warning("skipped %s: %s", name, reason)
                batches.append(Views(*(x.to(self.world.device) for x in views)))
                if len(batches) < micro:
                    continue
                losses = self.train_step(*batches)
                batches.clear()
                bar.set_postfix(loss=f"{losses.reconstruction.item():.4f}", refresh=False)  # waits for the device
                self.clock.step_done()
                bar.update()
                self._report(losses)
                if self.step < self.config.num_steps and any_process(self.term.came, self.world):
                    self._save_and_stop()
            wait_share = max(gather_objects(self.clock.wait_share, self.world))  # before rank 0 is busy validating
            self._save_and_validate()
        if self.world.is_main and self.clock.works:
            logger.info(self.clock.summary(wait_share))
        if self.world.is_main and self.skipped.kinds:  # of all processes: saving has joined them
            logger.warning(self.skipped.summary())
        if self.term.came:
            raise Terminated("stopped by SIGTERM after the last step, which is saved; only its validation is missing")

    def train_step(self, *batches: Views) -> Losses:
        """One optimiser step on one or more batches of views; returns the mean losses of all of them and all processes.

        Raises:
            InputError: When the gradient is not finite. The weights are as before.
        """
        self.encoder.train()
        self.objective.train()
        # Random numbers are those of the step, so that a resumed run draws what an uninterrupted one would have.
        step_seed = np.random.SeedSequence((self.config.seed, self.step, self.world.rank))
        torch.manual_seed(int(step_seed.generate_state(1)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        share = 1 / len(batches)
        parts = [
            self.objective.backward(
                self.encoder,
                views,
                self.config.low_res_size,
                self.config.autocast_dtype,
                self.scaler.get_scale() * share,
            )
            for views in batches
        ]
        average_gradients(self.parameters, self.world)
        self.gradient_norm = optimizer_step(
            self.optimizer, self.scaler, self.parameters, self.config.optim.clip_norm, self.step + 1
        )
        self.schedule.step()
        self.step += 1
        return average_losses(weighted_sum(parts, [share] * len(parts)), self.world)

    def save(self, name: str = LAST) -> Path:
        """Write a checkpoint that a run can resume from; returns its path."""
        path = self.folder / name
        save_checkpoint(self.encoder, path, config=self.run_config, training=self.state())
        return path

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain values."""
        return {
            "step": self.step,
            "processes": self.world.size,
            "readers": self.readers,
            "validated": self.validated,
            "best_score": self.best_score,
            "best_among": self.best_among,
            "trained": self.trained.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.state(),
            "places": {name: list(place) for name, place in self.places.items()},
        }

    def resume(self, path: Path, *, force: bool = False) -> None:
        """Go on where the checkpoint at ``path``, which only rank 0 needs to see, was written; see :meth:`restore`."""
        self.restore(object_from_main(lambda: read_checkpoint(path), self.world), path, force=force)

    def restore(self, content: Mapping[str, Any], path: Path, *, force: bool = False) -> None:
        """Go on where a checkpoint was written.

        Args:
            content: Of the checkpoint, on every process.
            path: Where it is from, for messages.
            force: Whether another backbone, or number of processes or readers, is only worth a warning.

        Raises:
            CheckpointError: When it belongs to another backbone or number of processes (of readers, where there are
                streams), or does not fit at all.
        """
        with restoring(path):
            state = content["training"]
            if state is None:
                raise CheckpointError(f"checkpoint {path} holds no training state; start a new run in another folder")
            if state["step"] > self.config.num_steps:
                raise CheckpointError(
                    f"checkpoint {path} is at step {state['step']}, beyond num_training_steps={self.config.num_steps}"
                )
            try:
                check_backbone(self.encoder.backbone, content["encoder"]["backbone"], path)
                self._check_order(state, path)
            except CheckpointError as error:
                if not force:
                    advice = "; force_resume=true goes on all the same"
                    raise type(error)(f"{error}{advice}") from error
                logger.warning("force_resume: %s", error)
            self.trained.load_state_dict(state["trained"])
            # The normalizer too: what was trained belongs to this very rotation, which another fit need not find again.
            prefix = "normalizer."
            normalizer = {k.removeprefix(prefix): v for k, v in content["model"].items() if k.startswith(prefix)}
            self.encoder.normalizer.load_state_dict(normalizer)
            self.objective.load_state_dict(state["objective"])
            load_optimizer(self.optimizer, state["optimizer"])
            if state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
            self.validated = state.get("validated", self.step)
            self.best_score, self.best_among = state["best_score"], state.get("best_among")
            self.schedule = build_schedule(self.optimizer, self.config.optim, self.config.num_steps, self.step)
            if self.world.is_main:
                self.skipped.add_state(state["skipped"])
            self._restore_places(state)

    def _restore_places(self, state: Mapping[str, Any]) -> None:
        """Where the readers of streams were; where there are others now, a forced run starts them by the step alone."""
        if state["readers"] == self.readers:
            self.places |= {name: (sample, read) for name, (sample, read) in state["places"].items()}

    @property
    def readers(self) -> int:
        """How many readers the samples of all processes are divided among."""
        return self.world.size * max(1, self.config.num_workers)

    def _check_order(self, state: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError where the steps to come would see other images than those of the run at ``path``."""
        processes, readers = state["processes"], state["readers"]
        if processes != self.world.size:
            raise CheckpointError(
                f"checkpoint {path} is of a run with {processes} processes, this one has {self.world.size}: the same "
                "step would see other images. Start as many"
            )
        if readers != self.readers and self.dataset.mixture.has_streams:
            raise CheckpointError(
                f"checkpoint {path} is of a run whose shards by URL or pipe had {readers} readers (processes times "
                f"workers), this one has {self.readers}: they would read other images. Set "
                f"num_workers={readers // processes}"
            )

    def _is_due(self, frequency: int) -> bool:
        """Whether this step is one of every ``frequency``; 0: never."""
        return bool(frequency and self.step and self.step % frequency == 0)

    def _report(self, losses: Losses) -> None:
        config, step = self.config, self.step
        if config.log_frequency and step % config.log_frequency == 0:
            for name, value in self._scalars(losses).items():
                self.writer.scalar(name, value, step)
        if step == config.num_steps:
            return  # run() saves and validates at the end
        if self._is_due(config.val_frequency):
            self._save_and_validate()
        elif self._is_due(config.checkpoint_frequency):
            self._save_on_main()

    def _save_on_main(self) -> None:
        """Save what all processes know; all of them must call it."""
        _, *others = gather_objects(self.skipped.state(), self.world)
        for places in gather_objects(self.places, self.world):
            for reader, place in places.items():  # only the process of a reader knows its latest
                self.places[reader] = max(self.places.get(reader, place), place)
        if self.world.is_main:
            for counted in others:
                self.skipped.add_state(counted)
            self.save()
        else:
            self.skipped.kinds.clear()  # rank 0 has counted them

    def _save_and_stop(self) -> None:
        logger.info("SIGTERM: saving step %d", self.step)
        self._save_on_main()
        any_process(True, self.world)  # no process ends before the file is there: its launcher might end the others
        raise Terminated(f"stopped by SIGTERM after step {self.step}, which is saved")

    def _scalars(self, losses: Losses) -> dict[str, float]:
        """What the log says about the last step, and how fast the steps since the last log were.

        All processes must call it: of what each has its own, the log has that of the one which is worst off.
        """
        own = self.clock.scalars(self.config.batch_size * self.config.accumulation_steps * self.world.size)
        shared = {name: own.pop(name) for name in ("data/wait_seconds", "data/wait_share")}
        shared |= peak_memory(self.world.device)
        others = gather_objects((shared, self.skipped.count), self.world)
        scalars = {
            **self.objective.scalars(losses),
            "optim/gradient_norm": self.gradient_norm.item(),
            **{f"optim/learning_rate_{group['name']}": group["lr"] for group in self.optimizer.param_groups},
            **own,
            **{name: max(values[name] for values, _ in others) for name in shared},
            "data/skipped": sum(count for _, count in others),
        }
        norms = spectral_norms(self.encoder.upsampler)
        if norms:
            values = torch.cat(list(norms.values()))
            extremes = {"min": values.min(), "median": values.median(), "max": values.max()}
            scalars |= {f"optim/spectral_norm_{name}": value.item() for name, value in extremes.items()}
        return scalars

    def _save_and_validate(self) -> None:
        self._save_on_main()  # first, so that no failure of validation costs what was trained
        if not self.world.is_main or self.validate is None or self.term.came:
            return
        self.encoder.eval()
        self.objective.eval()
        with torch.no_grad():
            found = self.validate(self.encoder, self.objective)
        for name, value in found.scalars.items():
            self.writer.scalar(name, value, self.step)
        for name, image in found.images.items():
            self.writer.image(name, image, self.step)
        self.validated = self.step
        if self.best_among not in (None, found.samples):
            logger.info("the validation samples are others than before: the best checkpoint is chosen anew")
            self.best_score = float("-inf")
        self.best_among = found.samples
        if found.score > self.best_score:
            self.best_score = found.score
            self.save(BEST)
        self.save()


def average_losses(losses: Losses, world: World) -> Losses:
    """The mean over the processes."""
    if world.size == 1:
        return losses
    values = torch.stack([losses.total, losses.reconstruction, *losses.terms.values()])
    add_over_processes([values], world)
    total, reconstruction, *terms = (values / world.size).unbind()
    return Losses(total, reconstruction, dict(zip(losses.terms, terms, strict=True)))


def compile_upsampler(encoder: SharpEncoder, backend: str) -> None:
    """Compile the upsampler in place: names and tensors stay what they were. The frozen backbone is not compiled.

    Raises:
        ConfigError: For a backend that does not exist.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise unknown_name("compile_backend", backend, known)
    encoder.backbone.forward = torch.compiler.disable(encoder.backbone.forward)  # type: ignore[method-assign]
    encoder.upsampler.compile(backend=backend)
