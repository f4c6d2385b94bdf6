"""What processes tell each other: two real ones, on the CPU."""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from featsharp.builder import create_encoder
from featsharp.data.loader import ViewDataset
from featsharp.data.mixture import Division, ImageMixture
from featsharp.data.views import ViewConfig, Views
from featsharp.errors import DistributedError
from featsharp.normalizers import FeatureStatistics
from featsharp.training.config import RunConfig
from featsharp.training.distributed import (
    World,
    add_over_processes,
    any_process,
    gather_objects,
    merge_statistics,
    object_from_main,
    run_together,
    start_world,
)
from featsharp.training.loggers import NullWriter
from featsharp.training.objectives import Losses
from featsharp.training.objectives.multi_view import MultiViewConfig, MultiViewObjective
from featsharp.training.trainer import Trainer, average_losses

TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ALONE = World(0, 1, torch.device("cpu"))


def together(work: Callable[[World], None], processes: int = 2) -> list[int | None]:
    """Run ``work`` in several processes at once; returns their exit codes."""
    with tempfile.TemporaryDirectory() as folder:
        # A fork of a process with busy thread pools can hang; that of a server that has only imported cannot.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["featsharp.training.trainer", "torch.distributed"])
        started = [context.Process(target=_join, args=(work, n, processes, folder)) for n in range(processes)]
        for process in started:
            process.start()
        for process in started:
            process.join(150)  # two that import torch at once on a busy machine take long
            process.kill()
            process.join()
        return [process.exitcode for process in started]


def _join(work: Callable[[World], None], rank: int, size: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    work(World(rank, size, torch.device("cpu")))
    dist.destroy_process_group()


def vectors() -> list[torch.Tensor]:
    """Of very different means and counts, the third of none at all."""
    torch.manual_seed(1)
    return [torch.randn(50, 4) + 1000, 3 * torch.randn(7, 4), torch.zeros(0, 4)]


def merge(world: World) -> None:
    own = FeatureStatistics(4)
    own.update(vectors()[world.rank])
    merged = merge_statistics(own, world)
    rows = torch.cat(vectors()).double()
    assert merged.count == 57
    torch.testing.assert_close(merged.mean, rows.mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, rows.T.cov(), rtol=1e-10, atol=0)


def share(world: World) -> None:
    x = torch.tensor(float(world.rank))
    losses = average_losses(Losses(x, x + 1, {"tv": 4 * x}), world)
    assert (losses.total.item(), losses.reconstruction.item(), losses.terms["tv"].item()) == (0.5, 1.5, 2.0)
    assert any_process(world.rank == 1, world)
    assert not any_process(False, world)
    assert object_from_main(lambda: {"rank": world.rank}, world) == {"rank": 0}
    assert gather_objects(world.rank, world) == [0, 1]


class Notes(NullWriter):
    """Keeps scalars by name and step."""

    def __init__(self) -> None:
        self.values: dict[str, dict[int, float]] = {}

    def scalar(self, name: str, value: float, step: int) -> None:
        self.values.setdefault(name, {})[step] = value


class SlowDataset(ViewDataset):
    """Every sample takes longer than a step."""

    def sample(self, n: int, *division: Division) -> tuple[Views, list[tuple[str, str]]]:
        time.sleep(0.5)
        return super().sample(n, *division)


def watch(world: World) -> None:
    """Only rank 1 waits for data; both pass over the same damaged file."""
    folder = Path(tempfile.mkdtemp())
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    Image.fromarray(picture).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"")
    encoder = create_encoder("toy-vit", "featup", 2)
    objective = MultiViewObjective(encoder.embed_dim, 2, MultiViewConfig(downsampler="area", uncertainty=False))
    mixture = ImageMixture.from_data_dir(str(folder))
    dataset = (SlowDataset if world.rank else ViewDataset)(mixture, (128, 128), ViewConfig(num_views=2), 0)
    config = RunConfig(num_training_steps=3, batch_size=2, num_workers=0, log_frequency=1, progress=False)
    writer = Notes()
    trainer = Trainer(encoder, objective, dataset, config, folder / "out", world)
    trainer.run(writer)
    shares = gather_objects(trainer.clock.wait_share, world)
    assert shares[0] < 0.3 < shares[1]
    if world.is_main:
        assert writer.values["data/wait_share"][3] > 0.3
        assert writer.values["data/wait_seconds"][3] > 0.9
        counts = trainer.skipped.state()["kinds"]
        # 12 samples in turns of one good and one damaged file; what takes the place of the latter may be damaged, too.
        assert counts == {"the file is empty": writer.values["data/skipped"][3]}
        assert writer.values["data/skipped"][3] >= 6
    else:
        assert trainer.skipped.count == 0  # rank 0 has counted them


def lose_one(world: World) -> None:
    if world.rank == 1:
        return
    with pytest.raises(DistributedError, match=r"lost another process of this run .* its own error is further up"):
        add_over_processes([torch.ones(3)], world)


@pytest.mark.slow
@pytest.mark.parametrize(("work", "processes"), [(merge, 3), (share, 2), (watch, 2), (lose_one, 2)])
def test_between_processes(work, processes):
    assert together(work, processes) == [0] * processes


def test_an_error_of_this_process_is_not_blamed_on_another():
    """As when memory is short, or a device fails, in the middle of what needs all."""
    with pytest.raises(RuntimeError, match="must match the size") as caught:
        run_together(lambda: torch.ones(2) + torch.ones(3))
    assert not isinstance(caught.value, DistributedError)


@pytest.mark.parametrize(
    ("given", "lacking"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
    ],
)
def test_a_part_of_the_variables_of_torchrun_is_refused(given, lacking, monkeypatch):
    """Two processes that each take themselves for the only one would write to the same folder."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert start_world("cpu") == ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert start_world("cpu") == ALONE
    monkeypatch.delenv("WORLD_SIZE")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=f"^{lacking} of the environment variables"):
        start_world("cpu")


def test_alone_nothing_changes():
    statistics = FeatureStatistics(4)
    assert merge_statistics(statistics, ALONE) is statistics
    assert any_process(True, ALONE)
    assert object_from_main(lambda: 3, ALONE) == 3
    assert gather_objects("x", ALONE) == ["x"]
