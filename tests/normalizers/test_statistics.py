"""Streaming mean and covariance against the two-pass result, in any split and any order of merging."""

import itertools

import pytest
import torch

from featsharp.errors import InputError
from featsharp.normalizers import FeatureStatistics


def draw(count, channels, seed=0, offset=30.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64) @ mixing + offset


def collect(*batches):
    statistics = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.update(batch)
    return statistics


def assert_equal_to_two_pass(statistics, rows, tolerance=1e-10):
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / (len(rows) - 1)
    assert statistics.count == len(rows)
    assert (statistics.mean - mean).norm() / mean.norm() < tolerance
    assert (statistics.covariance - covariance).norm() / covariance.norm() < tolerance


@pytest.mark.parametrize("channels", [4, 12, 36, 384])
def test_uneven_batches_equal_two_pass(channels):
    rows = draw(701, channels)
    statistics = collect(*rows.split([1, 2, 300, 7, 390, 1]))
    assert_equal_to_two_pass(statistics, rows)
    torch.testing.assert_close(statistics.covariance, torch.cov(rows.T), rtol=1e-9, atol=1e-9)


def test_means_far_larger_than_spreads_do_not_cancel():
    rows = draw(500, 12, offset=1e6)
    assert_equal_to_two_pass(collect(*rows.split(37)), rows)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_parts_merge_in_any_order(order):
    rows = draw(97, 12)
    parts = [collect(part) for part in rows.split([5, 91, 1])]
    merged = FeatureStatistics(12)
    for index in order:
        merged.merge(parts[index])
    assert_equal_to_two_pass(merged, rows)


def test_two_processes_equal_one_pass():
    """Every process sees its own batches and sends its state; whoever merges gets what one process would."""
    batches = [draw(2 * 3 * 5, 12, seed).reshape(2, 3, 5, 12).movedim(-1, 1) for seed in range(5)]
    first, second = collect(*batches[0::2]), collect(*batches[1::2])
    received = FeatureStatistics.from_state(second.state())
    first.merge(received)
    assert_equal_to_two_pass(first, torch.cat([b.movedim(1, -1).reshape(-1, 12) for b in batches]))


def test_merging_leaves_the_other_part_alone():
    rows = draw(40, 4)
    first, second = collect(rows[:10]), collect(rows[10:])
    first.merge(second)
    first.update(rows)
    assert_equal_to_two_pass(second, rows[10:])


def test_empty_parts_and_batches_change_nothing():
    rows = draw(9, 4)
    statistics = collect(rows)
    statistics.merge(FeatureStatistics(4))
    statistics.update(rows[:0])
    assert_equal_to_two_pass(statistics, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_maps_are_vectors_per_token_in_float64(dtype):
    maps = draw(2 * 3 * 7, 12).reshape(2, 3, 7, 12).movedim(-1, 1).to(dtype)
    assert_equal_to_two_pass(collect(maps), maps.movedim(1, -1).reshape(-1, 12).double())


def test_gradients_are_not_recorded():
    statistics = collect(draw(9, 4).requires_grad_())
    assert not statistics.covariance.requires_grad


def test_states_gathered_in_inference_mode_can_be_used_outside():
    rows = draw(30, 4)
    statistics = FeatureStatistics(4)
    with torch.inference_mode():
        statistics.update(rows[:20])
    statistics.update(rows[20:])
    assert_equal_to_two_pass(statistics, rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_and_change_nothing(value):
    rows = draw(20, 4)
    statistics = collect(rows)
    bad = rows.clone()
    bad[3, 1] = bad[7, 2] = value
    with pytest.raises(InputError, match="2 of 80 feature values"):
        statistics.update(bad)
    assert_equal_to_two_pass(statistics, rows)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 5, 3, 3), (2, 4, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"\[B, 4, H, W\] or \[N, 4\]"):
        FeatureStatistics(4).update(torch.zeros(shape))


def test_too_few_vectors_are_refused():
    statistics = FeatureStatistics(4)
    with pytest.raises(InputError, match="at least 1"):
        _ = statistics.mean
    statistics.update(torch.ones(1, 4))
    assert torch.equal(statistics.mean, torch.ones(4, dtype=torch.float64))
    with pytest.raises(InputError, match="at least 2 vectors; got 1"):
        _ = statistics.covariance


def test_merging_other_widths_is_refused():
    with pytest.raises(InputError, match="of 12 channels into those of 4"):
        FeatureStatistics(4).merge(FeatureStatistics(12))


def test_state_round_trip_is_exact():
    statistics = collect(draw(50, 12))
    restored = FeatureStatistics.from_state(statistics.state())
    assert restored.count == 50
    assert torch.equal(restored.mean, statistics.mean)
    assert torch.equal(restored.covariance, statistics.covariance)
    restored.update(draw(5, 12))
    assert statistics.count == 50


def test_damaged_states_are_refused():
    state = collect(draw(50, 12)).state()
    with pytest.raises(InputError, match="lack scatter"):
        FeatureStatistics.from_state({key: state[key] for key in ("count", "mean")})
    for damage in (
        {"mean": state["mean"][:5]},
        {"scatter": state["scatter"].float()},
        {"mean": state["mean"] * float("nan")},
        {"count": torch.tensor(-1)},
    ):
        with pytest.raises(InputError, match="damaged"):
            FeatureStatistics.from_state(state | damage)
