"""The training loop: step, log, validate, save, resume."""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from featsharp.builder import check_backbone, save_checkpoint
from featsharp.checkpoint import ENCODER_FILE, FileKind, read_checkpoint, read_step, restoring
from featsharp.data.loader import Batch, Positions, S, SampleDataset, StepSampler, load_batches
from featsharp.data.skips import SkipLog
from featsharp.device import autocast_dtype, usual_defaults
from featsharp.errors import unknown_name
from featsharp.layers.spectral import add_spectral, spectral_norms
from featsharp.model import SharpEncoder
from featsharp.terminal import progress_bar
from featsharp.training.config import LoopConfig, RunConfig, public_form
from featsharp.training.distributed import (
    World,
    add_over_processes,
    any_process,
    average_gradients,
    copy_from_main,
    gather_objects,
    object_from_main,
)
from featsharp.training.loggers import NullWriter, VizWriter
from featsharp.training.objectives import Losses, Objective
from featsharp.training.objectives.base import loss_scalars, weighted_sum
from featsharp.training.optim import (
    build_optimizer,
    build_scaler,
    build_schedule,
    load_optimizer,
    optimizer_step,
)
from featsharp.training.resume import check_continuation, count_readers
from featsharp.training.signals import Terminated, TermSignal
from featsharp.training.usage import StepClock, peak_memory

logger = logging.getLogger(__name__)

LAST, BEST = "last.pth", "best.pth"
# Steps after which a run logs its first estimate of the remaining time.
FIRST_ESTIMATE = 20


class Validation(NamedTuple):
    """Results on the fixed validation samples; ``score`` selects the best checkpoint."""

    score: float
    scalars: dict[str, float]
    images: dict[str, Tensor]  # [3, H, W] in [0, 1]
    samples: str = ""  # a tag for the samples: scores on different samples are not compared


Validate = Callable[[Any, Any], Validation]


class Loop(Generic[S]):
    """The loop of every training run; what is trained, and its files, are those of a subclass.

    Args:
        model: On the device of ``world``.
        objective: On the same device.
        dataset: Of what the objective learns from.
        config: Of the run; saved in the checkpoints.
        folder: Of ``last.pth`` and ``best.pth``.
        world: Rank of this process.
        dtype: Autocast type of training, as text.
        validate: Called with model and objective on rank 0 every ``val_frequency`` steps and at the end.
        skipped: Names of the images that the fits before a new run skipped, and reasons.
    """

    config: LoopConfig
    kind: FileKind = ENCODER_FILE
    saves_start = False  # whether the start is worth a checkpoint

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        dataset: SampleDataset[S],
        config: LoopConfig,
        folder: Path,
        world: World,
        *,
        dtype: str = "auto",
        validate: Validate | None = None,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.model, self.objective, self.dataset, self.config = model, objective, dataset, config
        self.folder, self.world, self.validate = folder, world, validate
        self._writer: VizWriter = NullWriter()
        self.trained = self.trained_parts()
        copy_from_main([*self.trained.parameters(), *objective.parameters()], world)
        self.optimizer = self.build_optimizer()
        self.schedule = build_schedule(self.optimizer, config.optim, config.num_training_steps)
        self.autocast_dtype = autocast_dtype(dtype, world.device)
        self.scaler = build_scaler(world.device, self.autocast_dtype)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if config.compile_model:
            backends = torch.compiler.list_backends(exclude_tags=())
            if config.compile_backend not in backends:
                raise unknown_name("compile_backend", config.compile_backend, backends)
            model.compile(backend=config.compile_backend, dynamic=None)  # the sizes of a run are few
        self.step = 0
        self.validated = -1  # the last step that was validated
        self.best_score = float("-inf")
        self.best_among: str | None = None  # tag of the samples of the best score
        self.is_new = True
        self.skipped = SkipLog()
        self.skipped.add(list(skipped))
        self.positions: Positions = {}
        self.term = TermSignal()
        self.clock = StepClock()

    # What a subclass says of its model

    def trained_parts(self) -> nn.ModuleDict:
        """Collect what is trained, and saved for resuming."""
        raise NotImplementedError

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimiser of all that is trained."""
        raise NotImplementedError

    def backward(self, samples: S, loss_scale: float) -> Losses:
        """Add the gradients of one batch, times ``loss_scale``; returns the detached losses."""
        raise NotImplementedError

    def write(self, path: Path, config: dict[str, Any], training: dict[str, Any]) -> None:
        """Write a checkpoint: the model, the configuration, and what resuming needs."""
        raise NotImplementedError

    def check_model(self, content: Mapping[str, Any], path: Path) -> None:
        """Raise CheckpointError where the checkpoint is of a model that this run cannot continue."""

    def load_frozen(self, content: Mapping[str, Any]) -> None:
        """Load from a checkpoint what training does not change but depends on."""

    def scalars(self, losses: Losses) -> dict[str, float]:
        """Collect the scalars of a step and of the model, for the log."""
        return loss_scalars(losses)

    # The loop

    @usual_defaults()
    def run(self, writer: VizWriter | None = None) -> None:
        """Train to the last step, then save and validate.

        Random numbers and samples of a step follow from its number, so checkpoints need neither, except for positions
        in streams (only decoding shows how many of their images are unusable). A resumed run therefore needs the same
        number of processes, and with streams of workers, as each reads a separate sequence.

        Args:
            writer: Of scalars and pictures, on rank 0 alone.

        Raises:
            Terminated: On SIGTERM, after the step was finished and saved, on every process.
        """
        self._writer = writer or NullWriter()
        last_step, is_main = self.config.num_training_steps, self.world.is_main
        if is_main:
            count = sum(p.numel() for p in self.trained.parameters())
            logger.info("%d of %d steps to go; %d trainable parameters", last_step - self.step, last_step, count)
            if self.is_new:
                self.skipped.add(self.dataset.mixture.skipped)  # every process has opened the same sources
            if self.is_new and self.saves_start:
                self.save()  # a run that is killed in its first steps need not fit again
        if self._is_due(self.config.val_frequency) and self.validated != self.step < last_step:
            self._save_and_validate()  # the earlier run was killed after saving, before validating
        wanted = self.config.progress and is_main
        bar = progress_bar("training", last_step, start=self.step, unit="step", wanted=wanted)
        loaded = load_batches(self.dataset, self._sampler(), self.config.num_workers, self.positions)
        with closing(loaded), bar as advance, self.term:
            for batches in self._batches_of_steps(loaded):
                losses = self.train_step(*batches)
                loss = losses.reconstruction.item()  # waits for the device
                self.clock.step_done()
                advance(f"loss={loss:.4f}")
                self._report(losses)
                if self.step < last_step and any_process(self.term.came, self.world):
                    self._save_and_stop()
            wait_share = max(gather_objects(self.clock.wait_share, self.world))  # before rank 0 is busy validating
            self._save_and_validate()
        if is_main and self.clock.works:
            logger.info(self.clock.summary(wait_share))
        if is_main and self.skipped.kinds:  # of all processes: saving has joined them
            logger.warning(self.skipped.summary())
        if self.term.came:
            raise Terminated("stopped by SIGTERM after the last step, which is saved; only its validation is missing")

    def _sampler(self) -> StepSampler:
        """Sampler of this process for the remaining steps."""
        config, micro = self.config, self.config.accumulation_steps
        return StepSampler(
            self.step * micro,
            config.num_training_steps * micro,
            config.batch_size,
            self.world.rank,
            self.world.size,
            distinct=config.feature_cache.samples,
            seed=config.seed,
        )

    def _batches_of_steps(self, loaded: Iterator[Batch[S]]) -> Iterator[list[S]]:
        """Iterate over ``accumulation_steps`` batches at a time, on the device."""
        batches: list[S] = []
        for samples, skipped in self.clock.batches(loaded):
            for name, reason in self.skipped.add(skipped):
                logger.warning("skipped %s: %s", name, reason)
            batches.append(samples.to(self.world.device))
            if len(batches) == self.config.accumulation_steps:
                yield batches
                batches = []

    def train_step(self, *batches: S) -> Losses:
        """Make an optimiser step on one or more batches of samples; returns the mean losses over batches and processes.

        Raises:
            InputError: When the gradient is not finite. The weights are unchanged.
        """
        self.model.train()
        self.objective.train()
        # Seeded by the step, so that a resumed run draws the same numbers as an uninterrupted one.
        step_seed = np.random.SeedSequence((self.config.seed, self.step, self.world.rank))
        torch.manual_seed(int(step_seed.generate_state(1)[0]))
        self.optimizer.zero_grad(set_to_none=True)
        weight = 1 / len(batches)
        losses = [self.backward(samples, self.scaler.get_scale() * weight) for samples in batches]
        average_gradients(self.parameters, self.world)
        self.gradient_norm = optimizer_step(
            self.optimizer, self.scaler, self.parameters, self.config.optim.clip_norm, self.step + 1
        )
        self.schedule.step()
        self.step += 1
        return average_losses(weighted_sum(losses, [weight] * len(losses)), self.world)

    def save(self, name: str = LAST) -> Path:
        """Write a checkpoint that a run can resume from; returns its path."""
        path = self.folder / name
        self.write(path, public_form(self.config), self.state())
        return path

    def state(self) -> dict[str, Any]:
        """Collect everything a resumed run needs, as tensors and plain values."""
        return {
            "step": self.step,
            "processes": self.world.size,
            "readers": count_readers(self.config, self.world.size),
            "validated": self.validated,
            "best_score": self.best_score,
            "best_among": self.best_among,
            "trained": self.trained.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped.state(),
            "places": {name: list(position) for name, position in self.positions.items()},
        }

    def resume(self, path: Path) -> None:
        """Restore from the checkpoint at ``path``, which only rank 0 needs to see; see :meth:`restore`."""
        self.restore(object_from_main(lambda: read_checkpoint(path, self.kind), self.world), path)

    def restore(self, content: Mapping[str, Any], path: Path) -> None:
        """Restore the state of a checkpoint.

        Args:
            content: Of the checkpoint, on every process.
            path: Of the checkpoint, for messages.

        Raises:
            CheckpointError: When it belongs to another backbone or number of processes (of readers, where there are
                streams), or does not fit at all.
        """
        with restoring(path):
            has_streams = self.dataset.mixture.has_streams
            processes = self.world.size
            check_model = functools.partial(self.check_model, content, path)
            check_continuation(content, path, check_model, self.config, processes, has_streams=has_streams)
            state = content["training"]
            self.trained.load_state_dict(state["trained"])
            self.load_frozen(content)
            self.objective.load_state_dict(state["objective"])
            load_optimizer(self.optimizer, state["optimizer"])
            if state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
            self.step, self.is_new = read_step(state), False
            self.validated = state.get("validated", self.step)
            self.best_score, self.best_among = state["best_score"], state.get("best_among")
            self.schedule = build_schedule(self.optimizer, self.config.optim, self.config.num_training_steps, self.step)
            self.skipped = SkipLog()
            if self.world.is_main:
                self.skipped.add_state(state["skipped"])
            if state["readers"] == count_readers(self.config, processes):  # else a forced run starts by the step alone
                self.positions |= {name: (sample, read) for name, (sample, read) in state["places"].items()}
        if self.world.is_main:
            logger.info("resuming %s at step %d", path, self.step)

    def _is_due(self, frequency: int) -> bool:
        """Return whether this step is one of every ``frequency``; 0: never."""
        return bool(frequency and self.step and self.step % frequency == 0)

    def _report(self, losses: Losses) -> None:
        config, step = self.config, self.step
        if config.log_frequency and step % config.log_frequency == 0:
            for name, value in self._scalars(losses).items():
                self._writer.scalar(name, value, step)
        if step == config.num_training_steps:
            return  # run() saves and validates at the end
        if self._is_due(config.val_frequency):
            self._save_and_validate()
        elif self._is_due(config.checkpoint_frequency):
            self._save_on_main()
        elif len(self.clock.works) != FIRST_ESTIMATE:
            return
        if self.world.is_main:
            left = config.num_training_steps - step
            logger.info("step %d of %d; about %s left", step, config.num_training_steps, self.clock.time_for(left))

    def _save_on_main(self) -> None:
        """Save the state of all processes; all of them must call it."""
        _, *others = gather_objects(self.skipped.state(), self.world)
        for positions in gather_objects(self.positions, self.world):
            for reader, position in positions.items():  # only the process of a reader has its latest
                self.positions[reader] = max(self.positions.get(reader, position), position)
        if self.world.is_main:
            for counted in others:
                self.skipped.add_state(counted)
            self.save()
        else:
            self.skipped.kinds.clear()  # rank 0 has counted them

    def _save_and_stop(self) -> None:
        logger.info("SIGTERM: saving step %d", self.step)
        self._save_on_main()
        any_process(True, self.world)  # no process ends before the file is written: the launcher might end the others
        raise Terminated(f"stopped by SIGTERM after step {self.step}, which is saved")

    def _scalars(self, losses: Losses) -> dict[str, float]:
        """Collect the scalars of the last step, and the speed of the steps since the last log.

        All processes must call it: waiting time and memory are the maxima over them.
        """
        speed = self.clock.scalars(self.config.batch_size * self.config.accumulation_steps * self.world.size)
        worst = {name: speed.pop(name) for name in ("data/wait_seconds", "data/wait_share")}
        worst |= peak_memory(self.world.device)
        everywhere = gather_objects((worst, self.skipped.count), self.world)
        return {
            **self.scalars(losses),
            "optim/gradient_norm": self.gradient_norm.item(),
            **{f"optim/learning_rate_{group['name']}": group["lr"] for group in self.optimizer.param_groups},
            **speed,
            **{name: max(values[name] for values, _ in everywhere) for name in worst},
            "data/skipped": sum(count for _, count in everywhere),
        }

    def _save_and_validate(self) -> None:
        self._save_on_main()  # first, so that a failure of validation loses no training
        if not self.world.is_main or self.validate is None or self.term.came:
            return
        self.model.eval()
        self.objective.eval()
        with torch.no_grad():
            result = self.validate(self.model, self.objective)
        for name, value in result.scalars.items():
            self._writer.scalar(name, value, self.step)
        for name, image in result.images.items():
            self._writer.image(name, image, self.step)
        self.validated = self.step
        if self.best_among not in (None, result.samples):
            logger.info("the validation samples are others than before: the best checkpoint is chosen anew")
            self.best_score = float("-inf")
        self.best_among = result.samples
        if result.score > self.best_score:
            self.best_score = result.score
            self.save(BEST)
        self.save()


class Trainer(Loop[S]):
    """Training of the upsampler and the bias buffer of an encoder.

    Args:
        encoder: On the device of ``world``, its normalizer fitted (or about to be loaded by :meth:`resume`). Views are
            rendered at the native size of its backbone.
        objective, dataset, folder, world, validate, skipped: As for :class:`Loop`.
        config: Of the run; saved in the checkpoints.
    """

    config: RunConfig

    def __init__(
        self,
        encoder: SharpEncoder,
        objective: Objective[S],
        dataset: SampleDataset[S],
        config: RunConfig,
        folder: Path,
        world: World,
        *,
        validate: Validate | None = None,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.encoder, self._objective = encoder, objective
        if config.spectral:
            for module in encoder.upsampler.spectral_modules():
                add_spectral(module)
        super().__init__(
            encoder, objective, dataset, config, folder, world,
            dtype=config.upsampler.dtype, validate=validate, skipped=skipped,
        )  # fmt: skip
        self.saves_start = config.linear_fit.samples > 0

    def trained_parts(self) -> nn.ModuleDict:
        trained = nn.ModuleDict({"upsampler": self.encoder.upsampler})
        if self.encoder.bias_buffer is not None:
            trained["bias_buffer"] = self.encoder.bias_buffer
        return trained

    def build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.encoder, self._objective, self.config.optim)

    def backward(self, samples: S, loss_scale: float) -> Losses:
        size = self.encoder.backbone.input_size
        return self._objective.backward(self.encoder, samples, size, self.autocast_dtype, loss_scale)

    def write(self, path: Path, config: dict[str, Any], training: dict[str, Any]) -> None:
        save_checkpoint(self.encoder, path, config=config, training=training)

    def check_model(self, content: Mapping[str, Any], path: Path) -> None:
        check_backbone(self.encoder.backbone, content["encoder"]["backbone"], path)

    def load_frozen(self, content: Mapping[str, Any]) -> None:
        """Load the normalizer: trained weights belong to its rotation, which another fit may not reproduce."""
        prefix = "normalizer."
        normalizer = {k.removeprefix(prefix): v for k, v in content["model"].items() if k.startswith(prefix)}
        self.encoder.normalizer.load_state_dict(normalizer)

    def scalars(self, losses: Losses) -> dict[str, float]:
        scalars = self._objective.scalars(losses)
        norms = spectral_norms(self.encoder.upsampler)
        if norms:
            values = torch.cat(list(norms.values()))
            extremes = {"min": values.min(), "median": values.median(), "max": values.max()}
            scalars |= {f"optim/spectral_norm_{name}": value.item() for name, value in extremes.items()}
        return scalars


def average_losses(losses: Losses, world: World) -> Losses:
    """Average losses over the processes."""
    if world.size == 1:
        return losses
    values = torch.stack([losses.total, losses.reconstruction, *losses.terms.values()])
    add_over_processes([values], world)
    total, reconstruction, *terms = (values / world.size).unbind()
    return Losses(total, reconstruction, dict(zip(losses.terms, terms, strict=True)))
