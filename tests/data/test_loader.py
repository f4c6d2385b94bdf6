"""The order of training samples depends on the seed and the step only, and nothing that is skipped goes unnoticed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.data.loader import Batch, StepSampler, ViewDataset, load_batches
from featsharp.data.mixture import ImageMixture
from featsharp.data.skips import MAX_EXAMPLES, SkipLog
from featsharp.data.sources import open_source
from featsharp.data.views import ViewConfig
from featsharp.errors import DataError

SIZE = (16, 24)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (30 + number, 40, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return tmp_path


def dataset_of(folder: Path, seed: int = 0) -> ViewDataset:
    return ViewDataset(ImageMixture([open_source(folder)], seed=seed), SIZE, ViewConfig(num_views=2), seed)


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.samples, other.samples, strict=True))
        assert batch.skipped == other.skipped


def test_ranks_share_every_step_without_gap_or_overlap():
    alone = list(StepSampler(0, 5, batch_size=6))
    ranks = [list(StepSampler(0, 5, batch_size=2, rank=rank, world=3)) for rank in range(3)]
    for step, numbers in enumerate(alone):
        assert numbers == [n for rank in ranks for n in rank[step]]
    assert [n for numbers in alone for n in numbers] == list(range(30))
    assert len(StepSampler(3, 5, 6)) == 2


def test_resumed_sampler_goes_on_where_it_stopped():
    whole = list(StepSampler(0, 7, 3, rank=1, world=2))
    assert list(StepSampler(4, 7, 3, rank=1, world=2)) == whole[4:]
    assert list(StepSampler(7, 7, 3)) == []


def test_batches_have_the_shapes_of_the_views(photos):
    (batch,) = load_batches(dataset_of(photos), StepSampler(0, 1, 3), num_workers=0)
    assert batch.samples.canvas.shape == (3, 3, 20, 30)
    assert batch.samples.mask.shape == (3, 1, 20, 30)
    assert batch.samples.homographies.shape == (3, 2, 3, 3)
    assert batch.skipped == []


def test_workers_and_a_restart_change_nothing(photos):
    (photos / "3.png").write_bytes(b"")
    whole = list(load_batches(dataset_of(photos), StepSampler(0, 4, 3), num_workers=0))
    assert_same(list(load_batches(dataset_of(photos), StepSampler(0, 4, 3), num_workers=1)), whole)
    assert_same(list(load_batches(dataset_of(photos), StepSampler(2, 4, 3), num_workers=0)), whole[2:])
    other = next(load_batches(dataset_of(photos, seed=1), StepSampler(0, 1, 3), num_workers=0))
    assert not torch.equal(other.samples.homographies, whole[0].samples.homographies)


def test_loading_leaves_the_global_random_state_alone(photos):
    before = torch.get_rng_state()
    list(load_batches(dataset_of(photos), StepSampler(0, 2, 2), num_workers=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_unusable_images_are_named_with_their_reason(photos):
    (photos / "2.png").write_bytes(b"")
    Image.new("RGB", (40, 40), (7, 7, 7)).save(photos / "4.png")
    log = SkipLog()
    met = [entry for batch in load_batches(dataset_of(photos), StepSampler(0, 6, 4), 0) for entry in batch.skipped]
    told = log.add(met)
    reasons = {Path(name).name: reason for name, reason in met}
    assert reasons.keys() == {"2.png", "4.png"}
    assert "empty" in reasons["2.png"]
    assert reasons["4.png"] == "uniform colour"
    # Each time counted; one line in the log, for the damaged one.
    assert log.count == len(met) > 4
    assert [(Path(name).name, reason) for name, reason in told] == [("2.png", reasons["2.png"])]
    assert log.add(met) == []
    assert log.summary().startswith(f"images skipped {2 * len(met)} times: ")


def test_a_log_of_skipped_images_stays_small_and_its_counts_add_up():
    """Of several processes, and of a run that goes on."""
    logs = [SkipLog(), SkipLog()]
    for number, log in enumerate(logs):
        told = log.add([(f"{number}/{n}.png", "cannot be decoded (at byte 7)") for n in range(1000)])
        assert len(told) == MAX_EXAMPLES
        assert told[-1][1] == "cannot be decoded (at byte 7) (more of this kind are only counted)"
        assert log.add([(f"{number}/{n}.png", "too small (1 x 1 pixels)") for n in range(500)]) == []
        log.add([("shard.tar/*", "30 no image by name")])
    one, other = logs
    one.add_state(other.state())
    assert one.state()["kinds"] == {"cannot be decoded": 2000, "no image by name": 60, "too small": 1000}
    assert one.count == 3000
    assert all(len(names) <= MAX_EXAMPLES for names in one.state()["examples"].values())
    assert one.summary() == (
        "images skipped 3000 times: 2000 cannot be decoded (0/0.png, 0/1.png, 0/2.png, ...), "
        "1000 too small (0/0.png, 0/1.png, 0/2.png, ...); 60 other files passed over (no image by name)"
    )
    again = SkipLog()
    again.add_state(one.state())
    assert again.state() == one.state()


def test_empty_log_has_no_summary():
    assert SkipLog().summary() == ""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_without_a_usable_image_is_one_clear_error(tmp_path, num_workers):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="in a row cannot be used") as caught:
        list(load_batches(dataset_of(tmp_path), StepSampler(0, 1, 1), num_workers))
    assert len(str(caught.value).splitlines()) == 1


def test_repeated_samples_come_once_per_epoch_in_an_order_of_each_epoch():
    batches = list(StepSampler(0, 9, batch_size=4, distinct=12, seed=3))
    epochs = [[n for numbers in batches[i : i + 3] for n in numbers] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(StepSampler(5, 9, batch_size=4, distinct=12, seed=3)) == batches[5:]
    ranks = [list(StepSampler(0, 9, batch_size=2, rank=rank, world=2, distinct=12, seed=3)) for rank in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == batches
