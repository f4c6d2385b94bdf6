"""Training in two real processes on the CPU: one run, whatever the number of processes and the precision."""

import io
import resource
import signal
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import together
from test_trainer import ALONE, PLAIN, Recorder, assert_equal, trainer_of, write_photos
from torch import Tensor

from featsharp.builder import create_encoder
from featsharp.checkpoint import read_checkpoint
from featsharp.data.loader import StepSampler, load_batches
from featsharp.errors import CheckpointError, DistributedError
from featsharp.training.distributed import World, gather_objects
from featsharp.training.signals import Terminated
from featsharp.training.trainer import Trainer

pytestmark = pytest.mark.slow  # resumption and accumulation in one process: test_trainer.py


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def gradients_of(trainer: Trainer, world: World, step: int = 3) -> Tensor:
    """All gradients of one step, with the views of ``step`` of the data."""
    config = trainer.config
    micro = config.accumulation_steps
    sampler = StepSampler(step * micro, (step + 1) * micro, config.batch_size, world.rank, world.size)
    trainer.train_step(*(batch.samples for batch in load_batches(trainer.dataset, sampler, 0)))
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])


def assert_same_everywhere(state: object, world: World) -> None:
    for other in gather_objects(state, world):
        assert_equal(other, state)


# Equal to one process


def train_part(photos: Path, folder: Path, dtype: str, world: World) -> None:
    """Batch 1, two batches per step."""
    settings = {"objective": PLAIN, "batch_size": 1, "accumulation_steps": 2, "dtype": dtype, "world": world}
    gradients = gradients_of(trainer_of(photos, folder, **settings), world)
    writer = Recorder()
    trainer = trainer_of(photos, folder, num_training_steps=3, **settings)
    trainer.run(writer)
    # Buffers too: the singular vectors of the spectral norms follow from the weights alone, nothing has to be sent.
    assert_same_everywhere(trainer.encoder.state_dict(), world)
    assert_same_everywhere(trainer.objective.state_dict(), world)
    assert_same_everywhere(trainer.optimizer.state_dict(), world)
    if world.is_main:
        torch.save({"gradients": gradients, "losses": writer.values["loss/total"]}, folder / f"{dtype}.pt")


def train_parts(photos: Path, folder: Path, world: World) -> None:
    for dtype in ROUNDING:
        train_part(photos, folder, dtype, world)


ROUNDING = {"float32": 1e-5, "bfloat16": 2e-2}  # of gradients, as a part of the largest


@pytest.fixture(scope="module")
def parts(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found together, by type."""
    folder = tmp_path_factory.mktemp("parts")
    assert together(partial(train_parts, photos, folder)) == [0, 0]
    return folder


@pytest.mark.parametrize("dtype", ROUNDING)
def test_two_processes_that_accumulate_equal_one_with_the_whole_batch(photos, parts, tmp_path, dtype):
    found = torch.load(parts / f"{dtype}.pt")
    settings = {"objective": PLAIN, "batch_size": 4, "dtype": dtype}
    expected = gradients_of(trainer_of(photos, tmp_path, **settings), ALONE)
    error = ROUNDING[dtype] * expected.abs().max().item()
    torch.testing.assert_close(found["gradients"], expected, rtol=0, atol=error)
    half = gradients_of(trainer_of(photos, tmp_path, **{**settings, "batch_size": 2}), ALONE)
    assert (half - expected).abs().max() > 10 * error
    writer = Recorder()
    trainer_of(photos, tmp_path / "one", num_training_steps=3, **settings).run(writer)
    assert found["losses"] == pytest.approx(writer.values["loss/total"], rel=max(1e-3, ROUNDING[dtype]))


# Float16


def overflow_on_one(photos: Path, folder: Path, world: World) -> None:
    """The gradient of one process alone is beyond the range of the type."""
    trainer = trainer_of(photos, folder, objective=PLAIN, batch_size=1, dtype="float16", world=world)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**10})
    start = [parameter.detach().clone() for parameter in trainer.parameters]
    if world.rank == 1:
        hook = trainer.parameters[0].register_hook(lambda gradient: gradient + torch.inf)
    gradients_of(trainer, world)
    assert trainer.scaler.get_scale() == 2.0**9
    assert_equal(trainer.parameters, start)
    if world.rank == 1:
        hook.remove()
    gradients_of(trainer, world)
    assert trainer.scaler.get_scale() == 2.0**9
    assert any(not torch.equal(a, b) for a, b in zip(trainer.parameters, start, strict=True))
    assert_same_everywhere(trainer.encoder.state_dict(), world)
    assert_same_everywhere(trainer.scaler.state_dict(), world)


def test_a_gradient_that_overflows_in_one_process_skips_the_step_in_both(photos, tmp_path):
    assert together(partial(overflow_on_one, photos, tmp_path)) == [0, 0]


# Going on


# Of streams, the readers of each process have left out other images than those of the others.
RUNS = {"float32": {}, "float16": {"dtype": "float16"}, "streams": {"checkpoint_frequency": 1}}


def stop_and_go_on(photos: Path, folder: Path, world: World) -> None:
    """SIGTERM comes to the second process alone, in the third of six steps; every process drops taps of its own."""
    for name, settings in RUNS.items():
        data = f"pipe:cat {folder}/{{0,1}}.tar" if name == "streams" else str(photos)
        compare_with_undisturbed(data, folder / name, {**settings, "world": world})


def compare_with_undisturbed(photos: str, folder: Path, settings: dict[str, Any]) -> None:
    world = settings["world"]
    whole = trainer_of(photos, folder / "whole", **settings)
    whole.run()
    stopped = trainer_of(photos, folder / "parts", **settings)
    if world.rank == 1:

        def stop(*_: object) -> None:
            if stopped.step == 2:
                signal.raise_signal(signal.SIGTERM)

        stopped.optimizer.register_step_post_hook(stop)
    with pytest.raises(Terminated, match="after step 3, which is saved"):
        stopped.run()
    resumed = trainer_of(photos, folder / "parts", **settings)
    for parameter in resumed.parameters:
        parameter.data.normal_()
    resumed.resume(folder / "parts" / "last.pth")
    assert resumed.step == 3
    resumed.run()
    # What was skipped before, only the main process and its file know.
    assert_equal({**resumed.state(), "skipped": None}, {**whole.state(), "skipped": None})
    assert_equal(resumed.encoder.state_dict(), whole.encoder.state_dict())


def test_two_processes_go_on_bit_for_bit(photos, tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for photo in sorted(photos.iterdir())[4 * number :][:4]:
                tar.add(photo, photo.name)
                for copy in range(number + 1):
                    damaged = tarfile.TarInfo(f"{copy}-{photo.name}")
                    damaged.size = 100
                    tar.addfile(damaged, io.BytesIO(bytes(100)))
    assert together(partial(stop_and_go_on, photos, tmp_path)) == [0, 0]
    for run in RUNS:
        contents = [read_checkpoint(tmp_path / run / name / "last.pth") for name in ("whole", "parts")]
        assert contents[0]["training"]["processes"] == 2
        assert_equal(contents[1], contents[0])
        assert len(contents[0]["training"]["places"]) == (2 if run == "streams" else 0)


# A full disk


def fill_disk(photos: Path, folder: Path, world: World) -> None:
    """The main process cannot write all of its second checkpoint; the other one would wait for it."""
    settings = {"objective": PLAIN, "num_training_steps": 4, "checkpoint_frequency": 1, "world": world}
    trainer = trainer_of(photos, folder, **settings)
    gradients_of(trainer, world)
    if world.is_main:
        written = trainer.save().read_bytes()
        size = len(written) // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        with pytest.raises(CheckpointError, match=r"cannot write .* An earlier file of that name is unchanged"):
            trainer.run()
        assert (folder / "last.pth").read_bytes() == written
        assert {path.name for path in folder.iterdir()} == {"last.pth"}
    else:
        with pytest.raises(DistributedError, match="lost another process of this run"):
            trainer.run()


def test_a_full_disk_ends_both_processes_and_keeps_the_checkpoint(photos, tmp_path):
    assert together(partial(fill_disk, photos, tmp_path)) == [0, 0]


# Batch normalisation


def normalise_batches(photos: Path, folder: Path, world: World) -> None:
    encoder = create_encoder("toy-vit", "lift", 2, bias_buffer=True)
    trainer = trainer_of(photos, folder, encoder, objective=PLAIN, num_training_steps=2, world=world)
    trainer.run()
    assert_same_everywhere([parameter.detach() for parameter in trainer.parameters], world)
    means = gather_objects(trainer.encoder.state_dict()["upsampler.doubling.image_fine.1.running_mean"], world)
    assert not torch.equal(*means)
    assert_equal(
        read_checkpoint(folder / "last.pth")["model"]["upsampler.doubling.image_fine.1.running_mean"], means[0]
    )


def test_the_statistics_of_batch_normalisation_are_those_of_the_main_process(photos, tmp_path):
    assert together(partial(normalise_batches, photos, tmp_path)) == [0, 0]
