"""The statistics cache: what makes a key, what a file gives back, and how a bad file is survived."""

import logging
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from featsharp.normalizers import (
    CachedStatistics,
    FeatureStatistics,
    StatisticsKey,
    cache_path,
    create_normalizer,
    fit_with_cache,
    load_statistics,
    save_statistics,
)

KEY = StatisticsKey("toy-vit", "ab" * 32, (224, 160), "photos-650", samples=300, seed=0)


def draw_statistics(seed=0, channels=12):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    statistics = FeatureStatistics(channels)
    statistics.update(torch.randn(200, channels, generator=generator) @ mixing + 5)
    return statistics


class Collector:
    """Counts how often the statistics had to be computed."""

    def __init__(self, seed=0):
        self.calls, self.seed = 0, seed

    def __call__(self):
        self.calls += 1
        return draw_statistics(self.seed)


def fit(folder, collect, key=KEY, name="phi-s"):
    normalizer = create_normalizer(name, 12)
    fit_with_cache(normalizer, key, collect, folder)
    assert normalizer.fitted
    return normalizer


def test_saved_statistics_come_back_exactly(tmp_path):
    statistics = draw_statistics()
    path = save_statistics(KEY, CachedStatistics(statistics, {}), tmp_path)
    assert path == cache_path(KEY, tmp_path)
    assert path.stem == KEY.digest()
    loaded = load_statistics(KEY, tmp_path)
    assert loaded is not None
    assert loaded.statistics.count == 200
    assert torch.equal(loaded.statistics.mean, statistics.mean)
    assert torch.equal(loaded.statistics.covariance, statistics.covariance)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_second_fit_reads_the_very_same_transform(tmp_path):
    collect = Collector()
    first, second = fit(tmp_path, collect), fit(tmp_path, collect)
    assert collect.calls == 1
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)


def test_a_cached_rotation_is_used_rather_than_a_new_one(tmp_path):
    """Another machine's eigenvectors may differ in sign: the stored rotation must win."""
    collect = Collector()
    normalizer = fit(tmp_path, collect)
    buffers = {key: value.clone() for key, value in normalizer.named_buffers()}
    buffers["rotation"][3] *= -1
    save_statistics(KEY, CachedStatistics(draw_statistics(), {"phi-s": buffers}), tmp_path)
    assert torch.equal(fit(tmp_path, collect).rotation, buffers["rotation"])


def test_one_file_serves_several_normalizers(tmp_path):
    collect = Collector()
    for name in ("phi-s", "phi-s-noalpha", "phi-s-onlyalpha", "layernorm", "none"):
        fit(tmp_path, collect, name=name)
    assert collect.calls == 1
    cached = load_statistics(KEY, tmp_path)
    assert cached is not None
    assert set(cached.transforms) == {"phi-s", "phi-s-noalpha", "phi-s-onlyalpha", "layernorm", "none"}
    assert set(cached.transforms["layernorm"]) == {"alpha", "fitted"}


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "toy-cnn"},
        {"weights_sha256": "cd" * 32},
        {"input_size": (160, 224)},
        {"data": "photos-651"},
        {"samples": 301},
        {"seed": 1},
    ],
)
def test_any_other_key_misses(tmp_path, change):
    collect = Collector()
    fit(tmp_path, collect)
    other = replace(KEY, **change)
    assert other.digest() != KEY.digest()
    assert load_statistics(other, tmp_path) is None
    fit(tmp_path, collect, key=other)
    assert collect.calls == 2


def test_equal_keys_have_equal_digests():
    assert replace(KEY).digest() == KEY.digest()
    assert replace(KEY, input_size=[224, 160]).digest() == KEY.digest()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(path):
    tensors = load_file(path)
    del tensors["statistics.scatter"]
    save_file(tensors, path, metadata={"key": KEY.to_json()})


def poison(path):
    tensors = load_file(path)
    tensors["statistics.mean"][2] = float("nan")
    save_file(tensors, path, metadata={"key": KEY.to_json()})


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        drop_a_tensor,
        poison,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no tensors here, only text" * 10),
        lambda path: save_file(load_file(path), path),
        lambda path: save_file(load_file(path), path, metadata={"key": replace(KEY, seed=9).to_json()}),
    ],
    ids=["truncated", "tensor-missing", "nan", "empty", "text", "no-key", "other-key"],
)
def test_a_bad_file_is_reported_ignored_and_replaced(tmp_path, caplog, damage):
    collect = Collector()
    fit(tmp_path, collect)
    damage(cache_path(KEY, tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load_statistics(KEY, tmp_path) is None
    assert "ignoring the statistics cache" in caplog.text
    fit(tmp_path, collect)
    assert collect.calls == 2
    assert load_statistics(KEY, tmp_path) is not None


def test_an_unusable_transform_is_fitted_again_from_the_cached_statistics(tmp_path):
    collect = Collector()
    rotation = fit(tmp_path, collect).rotation
    for bad in ({"rotation": torch.eye(4)}, {"mean": torch.full((12,), float("nan"))}, {"fitted": torch.tensor(False)}):
        buffers = dict(create_normalizer("phi-s", 12).named_buffers()) | {"fitted": torch.tensor(True)} | bad
        save_statistics(KEY, CachedStatistics(draw_statistics(), {"phi-s": buffers}), tmp_path)
        torch.testing.assert_close(fit(tmp_path, collect).rotation, rotation)
    assert collect.calls == 1


def test_statistics_of_another_width_are_computed_again(tmp_path, caplog):
    save_statistics(KEY, CachedStatistics(draw_statistics(channels=4), {}), tmp_path)
    collect = Collector()
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, collect)
    assert collect.calls == 1
    assert "another width" in caplog.text


def test_a_folder_that_cannot_be_written_only_costs_the_cache(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    collect = Collector()
    with caplog.at_level(logging.WARNING):
        fit(blocked, collect)
    assert collect.calls == 1
    assert "cannot write the statistics cache" in caplog.text


def test_a_write_that_fails_half_way_keeps_the_old_file(tmp_path):
    fit(tmp_path, Collector())
    path = cache_path(KEY, tmp_path)
    before = path.read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert save_statistics(KEY, CachedStatistics(draw_statistics(1), {}), tmp_path) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_default_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "own"))
    assert cache_path(KEY).is_relative_to(tmp_path / "own")
    monkeypatch.delenv("FEATSHARP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_path(KEY).is_relative_to(tmp_path / "xdg" / "featsharp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_path(KEY).is_relative_to(Path.home() / ".cache" / "featsharp")
