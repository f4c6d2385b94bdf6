"""Features written to a mapped file: read back by the formats' own libraries, whole or not at all."""

import os
import resource

import numpy as np
import pytest
import torch
from safetensors import safe_open

from featsharp.builder import create_encoder
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.extraction.mapped import MappedFeatures

SHAPE = (1, 3, 4, 6)


def fill(path, dtype=torch.float32, **options):
    low_res = torch.randn(1, 3, 2, 3).to(dtype)
    with MappedFeatures(path, **options) as file:
        high_res = file.allocate(low_res, SHAPE, dtype)
        assert high_res.shape == SHAPE
        assert high_res.dtype == dtype
        high_res.copy_(torch.arange(72.0).view(SHAPE))
        assert not path.exists()
    return low_res, high_res


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_safetensors(dtype, tmp_path):
    path = tmp_path / "new" / "photo.safetensors"
    low_res, high_res = fill(path, dtype, metadata={"image_size": "40x60"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"image_size": "40x60"}
        assert torch.equal(file.get_tensor("low_res"), low_res[0])
        assert torch.equal(file.get_tensor("high_res"), torch.arange(72.0).view(SHAPE)[0].to(dtype))
    assert torch.equal(high_res.float(), torch.arange(72.0).view(SHAPE))  # stays mapped


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_npy(dtype, tmp_path):
    path = tmp_path / "photo.npy"
    fill(path, dtype)
    values = np.load(path, mmap_mode="r")
    assert torch.equal(torch.from_numpy(values.copy()), torch.arange(72.0).view(SHAPE)[0].to(dtype))
    assert os.listdir(tmp_path) == ["photo.npy"]


def test_two_dtypes_in_one_file(tmp_path):
    low_res = torch.randn(1, 3, 1, 1).to(torch.bfloat16)
    with MappedFeatures(tmp_path / "x.safetensors") as file:
        file.allocate(low_res, SHAPE, torch.float32).fill_(2)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("low_res"), low_res[0])
        assert torch.equal(file.get_tensor("high_res"), torch.full(SHAPE[1:], 2.0))


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "photo.npy"
    path.write_bytes(b"earlier")
    with pytest.raises(RuntimeError, match="size"), MappedFeatures(path) as file:
        file.allocate(torch.zeros(1, 3, 2, 3), SHAPE, torch.float32).copy_(torch.zeros(5))
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["photo.npy"]


def test_a_full_disk_is_reported_before_the_work(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, before[1]))
    try:
        with (
            pytest.raises(FeatSharpError, match=r"cannot write .*photo\.npy, 2048 MiB: File too large; free some"),
            MappedFeatures(tmp_path / "photo.npy") as file,
        ):
            file.allocate(torch.zeros(1, 2, 2, 2), (1, 2, 1 << 14, 1 << 14), torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_a_second_map_takes_the_place_of_the_first(tmp_path):
    with MappedFeatures(tmp_path / "photo.npy") as file:
        file.allocate(torch.zeros(1, 3, 2, 3), (1, 3, 8, 6), torch.float32).fill_(1)
        file.allocate(torch.zeros(1, 3, 2, 3), SHAPE, torch.float32).fill_(2)
    assert np.array_equal(np.load(tmp_path / "photo.npy"), np.full(SHAPE[1:], 2, np.float32))
    assert os.listdir(tmp_path) == ["photo.npy"]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match=r"\.safetensors or \.npy files; got .*photo\.pt"):
        MappedFeatures(tmp_path / "photo.pt")
    with pytest.raises(ConfigError, match="NumPy has no bfloat16"), MappedFeatures(tmp_path / "photo.npy") as file:
        file.allocate(torch.zeros(1, 3, 2, 3), SHAPE, torch.bfloat16)
    with pytest.raises(ConfigError, match="one picture; got a batch of 2"), MappedFeatures(tmp_path / "x.npy") as file:
        file.allocate(torch.zeros(2, 3, 2, 3), (2, 3, 4, 6), torch.float32)
    with MappedFeatures(tmp_path / "unused.npy"):
        pass
    assert os.listdir(tmp_path) == []


def test_an_encoder_writes_to_it(tmp_path):
    encoder = create_encoder("toy-vit", "featsharp", 2)
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        expected = encoder(images)
    encoder.max_memory = "100MB"
    with MappedFeatures(tmp_path / "x.safetensors") as file:
        encoder(images, allocate=file.allocate)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("high_res"), expected.high_res[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(file.get_tensor("low_res"), expected.low_res[0])
