"""The training loop: it learns, ends where it should, resumes bit for bit, and loses nothing when something breaks."""

import os
import signal
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder, load_from_file, save_checkpoint
from featsharp.checkpoint import read_checkpoint, write_checkpoint
from featsharp.data.images import image_to_tensor
from featsharp.data.loader import StepSampler, ViewDataset, load_batches
from featsharp.data.mixture import ImageMixture
from featsharp.data.views import ViewConfig
from featsharp.errors import CheckpointError, ConfigError, InputError
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.resize import resize
from featsharp.training.config import RunConfig, UpsamplerConfig
from featsharp.training.distributed import World
from featsharp.training.loggers import NullWriter
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective
from featsharp.training.optim import OptimConfig
from featsharp.training.signals import Terminated
from featsharp.training.trainer import Trainer, Validation
from featsharp.training.uncompiled import UncompiledBackbone

ALONE = World(0, 1, torch.device("cpu"))
VIEWS = ViewConfig(num_views=3, jitter_zoom=[0.9, 1.6], rotation=8.0, shift=0.15)
DROPOUT = MultiViewConfig(downsampler="attention", kernel_size=3, uncertainty=True)


class Recorder(NullWriter):
    """Keeps scalars; ``stop_at`` plays the user who interrupts the run; ``act`` is called with the step of each."""

    def __init__(self, stop_at: int | None = None, act: Callable[[int], None] = lambda step: None) -> None:
        self.values: dict[str, dict[int, float]] = {}
        self.pictures: list[tuple[str, int]] = []
        self.stop_at, self.act = stop_at, act

    def scalar(self, name: str, value: float, step: int) -> None:
        if step == self.stop_at:
            raise KeyboardInterrupt
        self.act(step)
        self.values.setdefault(name, {})[step] = value

    def image(self, name: str, image: Tensor, step: int) -> None:
        self.pictures.append((name, step))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def write_photos(folder: Path) -> Path:
    """Pictures of three flat regions each, with a little noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :96][..., None]
    for number in range(8):
        centres, colours = rng.uniform(0, 96, (3, 2)), rng.integers(0, 256, (3, 3))
        nearest = ((y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2).argmin(-1)
        pixels = (colours[nearest] + rng.integers(-6, 7, (96, 96, 3))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def trainer_of(
    photos: Path,
    folder: Path,
    encoder: SharpEncoder | None = None,
    *,
    objective: MultiViewConfig = DROPOUT,
    validate: object = None,
    world: World = ALONE,
    dtype: str = "float32",
    **settings: object,
) -> Trainer:
    torch.manual_seed(0)
    if encoder is None:
        backbone = create_backbone("toy-vit")
        if settings.get("compile_model"):
            backbone = UncompiledBackbone(backbone)
        encoder = create_encoder(backbone, "featsharp", 2, normalizer="phi-s", bias_buffer=True)
        statistics = FeatureStatistics(encoder.embed_dim)
        statistics.update(encoder.backbone(torch.randn(8, 3, 64, 64)).features)
        encoder.normalizer.fit(statistics)
    defaults = {
        "num_training_steps": 6,
        "batch_size": 2,
        "num_workers": 0,
        "log_frequency": 1,
        "val_frequency": 0,
        "checkpoint_frequency": 0,
        "progress": False,
        "upsampler": UpsamplerConfig(dtype=dtype),
    }
    return Trainer(
        encoder,
        MultiViewObjective(encoder.embed_dim, encoder.factor, objective),
        ViewDataset(ImageMixture.from_data_dir(str(photos)), (128, 128), VIEWS, seed=0),
        RunConfig(**{**defaults, **settings}),  # type: ignore[arg-type]
        folder,
        world,
        validate=validate,  # type: ignore[arg-type]
    )


def assert_equal(found: object, expected: object) -> None:
    """Nested states, equal to the last bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)  # type: ignore[arg-type]
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()  # type: ignore[attr-defined]
        for key in expected:
            assert_equal(found[key], expected[key])  # type: ignore[index]
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):  # type: ignore[call-overload]
            assert_equal(a, b)
    else:
        assert found == expected


@pytest.mark.slow
def test_loss_falls_and_the_run_ends_at_the_last_step(photos, tmp_path):
    """F1, U6."""
    writer = Recorder()
    settings = MultiViewConfig(downsampler="simple", kernel_size=5, uncertainty=False)
    encoder = create_encoder("toy-vit", "featsharp", 2, bias_buffer=True)
    trainer = trainer_of(
        photos,
        tmp_path,
        encoder,
        objective=settings,
        num_training_steps=30,
        optim=OptimConfig(learning_rate=5e-3, jbu_learning_rate=5e-3),
    )
    # The loss of the same views before and after; from step to step it varies with the pictures.
    (probe,) = load_batches(trainer.dataset, StepSampler(99, 100, 8), 0)

    def probe_loss() -> float:
        loss = trainer.objective.backward(encoder, probe.samples, (64, 64)).reconstruction.item()
        encoder.zero_grad()
        return loss

    before = probe_loss()
    trainer.run(writer)
    assert probe_loss() < 0.95 * before
    assert trainer.step == 30
    assert list(writer.values["loss/total"]) == list(range(1, 31))
    assert read_checkpoint(tmp_path / "last.pth")["training"]["step"] == 30
    assert {"loss/total", "fidelity/train", "optim/gradient_norm", "speed/seconds_per_step"} <= writer.values.keys()
    assert writer.values["optim/spectral_norm_median"][1] == pytest.approx(1, abs=0.01)


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(photos, tmp_path):
    whole = Recorder()
    uninterrupted = trainer_of(photos, tmp_path / "whole")
    uninterrupted.run(whole)
    first = trainer_of(photos, tmp_path / "parts", checkpoint_frequency=3)
    with pytest.raises(KeyboardInterrupt):
        first.run(Recorder(stop_at=5))
    rest = Recorder()
    second = trainer_of(photos, tmp_path / "parts")
    # What is not in the checkpoint must not matter: other weights, another fit, another random state.
    for parameter in second.parameters:
        parameter.data.normal_()
    for name, value in second.encoder.normalizer.named_buffers():
        if name != "fitted":
            value.normal_()
    second.resume(tmp_path / "parts" / "last.pth")
    assert second.step == 3
    second.run(rest)
    assert_equal(second.state(), uninterrupted.state())
    assert_equal(second.encoder.state_dict(), uninterrupted.encoder.state_dict())
    for name, values in rest.values.items():
        if not name.startswith(("speed/", "memory/", "data/wait")):
            assert values == {step: whole.values[name][step] for step in (4, 5, 6)}, name


PLAIN = MultiViewConfig(downsampler="simple", kernel_size=5, uncertainty=False)


def weights_after(trainer: Trainer) -> dict[str, Tensor]:
    trainer.run()
    return {name: value.detach().clone() for name, value in trainer.trained.named_parameters()}


@pytest.mark.slow
def test_accumulated_batches_equal_one_large_batch(photos, tmp_path):
    """In samples, gradients and reported losses."""
    losses, gradients = [], []
    for name, sizes in (("large", (4, 1)), ("many", (2, 2)), ("small", (2, 1))):
        writer = Recorder()
        trainer = trainer_of(
            *(photos, tmp_path / name), objective=PLAIN, batch_size=sizes[0], accumulation_steps=sizes[1]
        )
        trainer.run(writer)
        losses.append(list(writer.values["loss/total"].values()))
        # Of views in the middle of the data, for the same weights; the optimiser would magnify what rounding does.
        fresh = trainer_of(photos, tmp_path / "x", objective=PLAIN)
        batches = load_batches(fresh.dataset, StepSampler(3 * sizes[1], 4 * sizes[1], sizes[0]), 0)
        fresh.train_step(*(batch.samples for batch in batches))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in fresh.parameters]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())
    assert not torch.allclose(gradients[2], gradients[0], rtol=0.1)
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_accumulation_goes_on_at_its_place_in_the_data(photos, tmp_path):
    settings = {"objective": PLAIN, "num_training_steps": 4, "accumulation_steps": 2}
    whole = weights_after(trainer_of(photos, tmp_path / "whole", **settings))
    stopped = trainer_of(photos, tmp_path / "parts", checkpoint_frequency=2, **settings)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(Recorder(stop_at=3))
    resumed = trainer_of(photos, tmp_path / "parts", **settings)
    resumed.resume(tmp_path / "parts" / "last.pth")
    assert_equal(weights_after(resumed), whole)


def test_float16_scales_its_loss_and_learns_what_float32_learns(photos, tmp_path):
    """The scale is part of the checkpoint; gradients beyond the range of the type cost a step, not the run."""
    settings = {"objective": PLAIN, "num_training_steps": 3}
    trainer = trainer_of(photos, tmp_path / "a", dtype="float16", **settings)
    start = {name: value.detach().clone() for name, value in trainer.trained.named_parameters()}
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    trainer.step = 0
    (batch,) = load_batches(trainer.dataset, StepSampler(0, 1, 2), 0)
    trainer.train_step(batch.samples)
    assert trainer.scaler.get_scale() == 2.0**39
    assert_equal(dict(trainer.trained.named_parameters()), start)

    trainer = trainer_of(photos, tmp_path / "b", dtype="float16", **settings)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**10})
    half = weights_after(trainer)
    whole = weights_after(trainer_of(photos, tmp_path / "c", **settings))
    moved = sum((whole[name] - start[name]).abs().sum() for name in start)
    apart = sum((whole[name] - half[name]).abs().sum() for name in start)
    assert apart < 0.2 * moved
    resumed = trainer_of(photos, tmp_path / "b", dtype="float16", **settings)
    resumed.resume(tmp_path / "b" / "last.pth")
    assert resumed.scaler.get_scale() == 2.0**10


@pytest.mark.slow
def test_a_compiled_upsampler_trains_as_it_is_and_keeps_its_names(photos, tmp_path):
    plain = trainer_of(photos, tmp_path / "a", objective=PLAIN, num_training_steps=2)
    compiled = trainer_of(
        photos, tmp_path / "b", objective=PLAIN, num_training_steps=2, compile_model=True, compile_backend="eager"
    )
    found, expected = weights_after(compiled), weights_after(plain)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    assert load_from_file(tmp_path / "b" / "last.pth")(torch.randn(1, 3, 64, 64)).high_res.isfinite().all()
    with pytest.raises(ConfigError, match=r"unknown compile_backend 'egaer'; did you mean .*'eager'"):
        trainer_of(photos, tmp_path / "c", compile_model=True, compile_backend="egaer")


def test_what_was_killed_before_its_validation_is_validated_when_it_goes_on(photos, tmp_path):
    scores = {2: 3.0, 4: 1.0}

    def look(encoder: SharpEncoder, objective: MultiViewObjective) -> Validation:
        return Validation(scores[trainer.step], {"val/score": scores[trainer.step]}, {})

    def killed(encoder: SharpEncoder, objective: MultiViewObjective) -> Validation:
        raise KeyboardInterrupt

    settings = {"num_training_steps": 4, "val_frequency": 2}
    trainer = trainer_of(photos, tmp_path, validate=killed, **settings)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    writer = Recorder()
    trainer = trainer_of(photos, tmp_path, validate=look, **settings)
    trainer.resume(tmp_path / "last.pth")
    trainer.run(writer)
    assert writer.values["val/score"] == scores
    assert read_checkpoint(tmp_path / "best.pth")["training"]["step"] == 2


def test_sigterm_ends_the_run_after_its_step_and_saves(photos, tmp_path):
    writer = Recorder(act=lambda step: signal.raise_signal(signal.SIGTERM) if step == 3 else None)
    trainer = trainer_of(photos, tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="after step 3, which is saved"):
        trainer.run(writer)
    assert read_checkpoint(tmp_path / "last.pth")["training"]["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_during_the_last_save_costs_only_the_validation_which_comes_with_the_next_start(photos, tmp_path):
    looks = []

    def look(encoder: SharpEncoder, objective: MultiViewObjective) -> Validation:
        looks.append(trainer.step)
        return Validation(1.0, {}, {})

    def while_saving(*_: object) -> None:
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)

    trainer = trainer_of(photos, tmp_path, validate=look, num_training_steps=2)
    trainer.optimizer.register_state_dict_pre_hook(while_saving)
    with pytest.raises(Terminated, match=r"after the last step, which is saved; only its validation is missing"):
        trainer.run()
    assert looks == []
    assert read_checkpoint(tmp_path / "last.pth")["training"]["step"] == 2
    trainer = trainer_of(photos, tmp_path, validate=look, num_training_steps=2)
    trainer.resume(tmp_path / "last.pth")
    trainer.run()
    assert looks == [2]
    assert (tmp_path / "best.pth").exists()


@contextmanager
def without_permissions(folder: Path) -> Iterator[None]:
    """The folder can be read, not written to, by whoever this process is."""
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:  # to whom permissions mean nothing
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_folder_that_became_read_only_ends_the_run_and_keeps_the_checkpoint(photos):
    with tempfile.TemporaryDirectory() as place:  # that of pytest is closed to others
        Path(place).chmod(0o755)
        folder = Path(place) / "run"
        trainer = trainer_of(photos, folder, num_training_steps=2)
        trainer.run()
        before = (folder / "last.pth").read_bytes()
        with without_permissions(folder), pytest.raises(CheckpointError, match=r"cannot write .*Permission denied"):
            trainer.save()
        assert (folder / "last.pth").read_bytes() == before
        assert {path.name for path in folder.iterdir()} == {"last.pth"}


def test_a_forced_resumption_takes_the_rates_of_the_new_configuration(photos, tmp_path):
    trainer_of(photos, tmp_path, num_training_steps=2).run()
    trainer = trainer_of(photos, tmp_path, num_training_steps=4, optim=OptimConfig(learning_rate=0.5))
    trainer.resume(tmp_path / "last.pth")
    main = next(group for group in trainer.optimizer.param_groups if group["name"] == "main")
    assert main["initial_lr"] == 0.5
    assert main["lr"] == pytest.approx(trainer.schedule.lr_lambdas[0](2) * 0.5)


def test_another_number_of_processes_is_refused_unless_forced(photos, tmp_path, caplog):
    trainer_of(photos, tmp_path, num_training_steps=2).run()
    content = read_checkpoint(tmp_path / "last.pth")
    content["training"]["processes"] = 8
    write_checkpoint(tmp_path / "last.pth", content)
    trainer = trainer_of(photos, tmp_path)
    with pytest.raises(CheckpointError, match=r"with 8 processes, this one has 1.*force_resume=true"):
        trainer.resume(tmp_path / "last.pth")
    assert trainer.step == 0
    trainer.config.force_resume = True
    trainer.resume(tmp_path / "last.pth")
    assert trainer.step == 2
    assert "with 8 processes" in caplog.text


@pytest.mark.slow
def test_another_number_of_readers_is_refused_where_it_changes_the_order(photos, tmp_path, caplog):
    """Local data is read at random; of streams every worker reads a sequence of its own."""
    trainer_of(photos, tmp_path / "local", num_training_steps=2).run()
    local = trainer_of(photos, tmp_path / "local", num_training_steps=4, num_workers=3)
    local.resume(tmp_path / "local" / "last.pth")
    assert local.step == 2

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in sorted(photos.iterdir()):
            tar.add(path, path.name)
    stream = ImageMixture.from_data_dir(f"pipe:cat {tmp_path}/shard.tar")

    def streaming(num_workers: int, **settings: object) -> Trainer:
        trainer = trainer_of(photos, tmp_path / "stream", num_workers=num_workers, **settings)
        trainer.dataset.mixture = stream
        return trainer

    last = tmp_path / "stream" / "last.pth"
    streaming(1, num_training_steps=1).run()
    same = streaming(0)  # the training process reads in place of a worker
    same.resume(last)
    assert same.step == 1
    other = streaming(3)
    with pytest.raises(CheckpointError, match=r"had 1 readers .* has 3: .*Set num_workers=1; force_resume=true"):
        other.resume(last)
    assert other.step == 0
    other.config.force_resume = True
    other.resume(last)
    assert other.step == 1
    assert "had 1 readers" in caplog.text


@pytest.mark.slow
def test_best_and_last_checkpoint_load(photos, tmp_path):
    """U19: scores decide which step is kept as the best; both files rebuild the encoder."""
    scores = {2: 1.0, 4: 3.0, 6: 2.0}
    kept: dict[int, Tensor] = {}
    image = torch.randn(1, 3, 128, 96)
    writer = Recorder()

    def look(encoder: SharpEncoder, objective: MultiViewObjective) -> Validation:
        assert not encoder.training
        assert not objective.training
        assert not torch.is_grad_enabled()
        kept[trainer.step] = encoder(image).high_res
        torch.rand(3)  # what validation draws must not change the run
        return Validation(scores[trainer.step], {"val/score": scores[trainer.step]}, {"val/x": torch.zeros(3, 2, 2)})

    trainer = trainer_of(photos, tmp_path / "a", validate=look, val_frequency=2)
    trainer.run(writer)
    assert writer.values["val/score"] == scores
    assert writer.pictures == [("val/x", 2), ("val/x", 4), ("val/x", 6)]
    for name, step in (("best.pth", 4), ("last.pth", 6)):
        content = read_checkpoint(tmp_path / "a" / name)
        assert content["training"]["step"] == step
        assert content["training"]["best_score"] == 3.0
        loaded = load_from_file(tmp_path / "a" / name)
        with torch.no_grad():
            assert torch.allclose(loaded(image).high_res, kept[step], atol=1e-5)
    unwatched = trainer_of(photos, tmp_path / "b")
    unwatched.run()
    assert_equal(unwatched.trained.state_dict(), trainer.trained.state_dict())


@pytest.mark.slow
def test_scores_of_other_validation_samples_are_not_compared(photos, tmp_path, caplog):
    """What scored better on easier pictures does not keep its place."""
    caplog.set_level("INFO")
    for samples, score, steps, best in (("easy", 9.0, 2, 2), ("easy", 8.0, 3, 2), ("hard", 1.0, 4, 4)):
        found = Validation(score, {}, {}, samples)
        trainer = trainer_of(photos, tmp_path, num_training_steps=steps, validate=lambda *_, found=found: found)
        if steps > 2:
            trainer.resume(tmp_path / "last.pth")
        trainer.run()
        assert read_checkpoint(tmp_path / "best.pth")["training"]["step"] == best
        assert sum("chosen anew" in message for message in caplog.messages) == (samples == "hard")


def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(photos, tmp_path):
    def poison(step: int) -> None:
        if step == 3:
            trainer.encoder.bias_buffer.buffer.data[:] = float("nan")  # type: ignore[union-attr]

    trainer = trainer_of(photos, tmp_path, checkpoint_frequency=2)
    with pytest.raises(InputError, match="training loss is nan"):
        trainer.run(Recorder(act=poison))
    content = read_checkpoint(tmp_path / "last.pth")
    assert content["training"]["step"] == 2
    assert all(value.isfinite().all() for value in content["model"].values() if value.is_floating_point())
    assert load_from_file(tmp_path / "last.pth")(torch.randn(1, 3, 64, 64)).high_res.isfinite().all()


def test_gradient_that_is_not_finite_never_reaches_the_weights(photos, tmp_path):
    trainer = trainer_of(photos, tmp_path, num_training_steps=1)
    before = {name: value.clone() for name, value in trainer.trained.named_parameters()}
    trainer.parameters[0].register_hook(lambda gradient: gradient / 0)
    with pytest.raises(InputError, match="gradient of step 1 is not finite"):
        trainer.run()
    assert_equal(dict(trainer.trained.named_parameters()), before)
    assert not (tmp_path / "last.pth").exists()


def test_failing_validation_does_not_cost_the_training(photos, tmp_path):
    def fail(encoder: SharpEncoder, objective: MultiViewObjective) -> Validation:
        raise InputError("nothing to see")

    with pytest.raises(InputError, match="nothing to see"):
        trainer_of(photos, tmp_path, num_training_steps=1, validate=fail).run()
    assert read_checkpoint(tmp_path / "last.pth")["training"]["step"] == 1


def test_resume_refuses_what_it_cannot_continue(photos, tmp_path):
    trainer = trainer_of(photos, tmp_path, num_training_steps=2)
    trainer.run()
    with pytest.raises(CheckpointError, match="at step 2, beyond num_training_steps=1"):
        trainer_of(photos, tmp_path, num_training_steps=1).resume(tmp_path / "last.pth")
    save_checkpoint(trainer.encoder, tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="no training state"):
        trainer.resume(tmp_path / "plain.pth")


@pytest.mark.slow
def test_skipped_images_are_counted_and_logged_once(photos, tmp_path, caplog):
    for path in photos.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"")
    writer = Recorder()
    trainer_of(tmp_path, tmp_path / "out", num_training_steps=9).run(writer)
    counted = writer.values["data/skipped"][9]
    assert counted >= 2  # met in each epoch
    lines = [message for message in caplog.messages if message.startswith("skipped ") and "broken.png" in message]
    assert len(lines) == 1
    assert f"images skipped {counted:.0f} times: {counted:.0f} the file is empty ({tmp_path}/broken.png)" in caplog.text


# What multi-view training keeps and what it takes away


class Planted(Backbone):
    """Colours of patches, mixed to 8 channels; plus a fixed pattern; plus noise that each new view draws anew."""

    def __init__(self, *, pattern: float = 0.0, noise: float = 0.0) -> None:
        super().__init__("planted", patch_size=8, embed_dim=8, input_size=(64, 64))
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("mix", torch.randn(8, 3, 1, 1, generator=generator))
        self.register_buffer("pattern", pattern * torch.randn(1, 8, 8, 8, generator=generator))
        self.register_buffer("hash", 300 * torch.randn(8, 3, 8, 8, generator=generator))
        self.noise = noise
        self.freeze()

    def signal_of(self, images: Tensor, cell: int = 8) -> Tensor:
        return F.conv2d(F.avg_pool2d(images, cell), self.mix)

    def noise_of(self, images: Tensor) -> Tensor:
        return self.noise * torch.sin(F.conv2d(images, self.hash, stride=8))

    def extract(self, images: Tensor) -> BackboneOutput:
        signal = self.signal_of(images)
        pattern = resize(self.pattern, (signal.shape[-2], signal.shape[-1]))
        return BackboneOutput(signal + pattern + self.noise_of(images), None)


def train_planted(
    photos: Path, folder: Path, backbone: Planted, upsampler: str, factor: int, steps: int, rate: float
) -> SharpEncoder:
    encoder = create_encoder(backbone, upsampler, factor, bias_buffer=bool(backbone.pattern.any()))
    trainer = trainer_of(
        photos,
        folder,
        encoder,
        objective=MultiViewConfig(downsampler="area", uncertainty=False),
        num_training_steps=steps,
        batch_size=4,
        optim=OptimConfig(learning_rate=rate, jbu_learning_rate=rate),
    )
    trainer.dataset.size = (64, 64)
    trainer.run()
    return encoder.eval()


def centred(x: Tensor) -> Tensor:
    """Without the mean over positions, which no view can tell."""
    return (x - x.mean((2, 3), keepdim=True)).flatten()


@pytest.mark.slow
def test_planted_position_bias_is_recovered_and_removed(photos, tmp_path):
    """F8."""
    backbone = Planted(pattern=1.0)
    encoder = train_planted(photos, tmp_path, backbone, "identity", 1, steps=60, rate=0.1)
    assert encoder.bias_buffer is not None
    learned = encoder.bias_buffer.buffer.detach()
    correlation = torch.corrcoef(torch.stack([centred(learned), centred(-backbone.pattern)]))[0, 1]
    assert correlation > 0.95
    # What is left of the pattern in the features of any picture, and what is left of the picture.
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        rest = encoder(images).high_res - backbone.signal_of(images)
    assert centred(rest).square().mean() < 0.05 * centred(backbone.pattern).square().mean()
    assert centred(rest - rest[:1]).abs().max() < 1e-5
    # It is saved and loaded.
    loaded = load_from_file(tmp_path / "last.pth", featurizer=Planted(pattern=1.0))
    assert loaded.bias_buffer is not None
    assert torch.equal(loaded.bias_buffer.buffer, learned)


@pytest.mark.slow
def test_what_views_disagree_on_is_attenuated_and_what_they_share_is_kept(photos, tmp_path):
    """F2: of the noise, at most a fifth of the energy (and under half of what bilinear leaves); of the signal, 90 %."""
    backbone = Planted(noise=1.0)
    encoder = train_planted(photos, tmp_path, backbone, "featup", 2, steps=60, rate=0.03)
    images = torch.stack([image_to_tensor(Image.open(path))[:, :64, :64] for path in sorted(photos.iterdir())])
    whitened = encoder.input_conditioner(images)
    with torch.no_grad():
        signal, noise = backbone.signal_of(whitened), backbone.noise_of(whitened)
        sharp_signal = encoder.upsampler.upsample(signal, whitened)  # type: ignore[operator]
        sharp_noise = encoder.upsampler.upsample(noise, whitened)  # type: ignore[operator]
    truth = backbone.signal_of(whitened, cell=4)
    assert sharp_noise.square().mean() < 0.2 * noise.square().mean()
    assert sharp_noise.square().mean() < 0.5 * resize(noise, (16, 16)).square().mean()
    assert (sharp_signal * truth).mean() > 0.9 * truth.square().mean()
    assert (sharp_signal - truth).square().mean() < 0.5 * (resize(signal, (16, 16)) - truth).square().mean()
