"""Nothing is sent: importing and using the package opens no socket and asks for no address."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

WATCH = """
import sys

seen = []
EVENTS = {"socket.__new__", "socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
EVENTS |= {"urllib.Request", "http.client.connect", "ftplib.connect", "smtplib.connect"}
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)) if event in EVENTS else None)
"""
USE = """
import featsharp
from featsharp.cli.main import main

for name in featsharp.__all__:
    getattr(featsharp, name)
encoder = featsharp.create_encoder("toy-vit", "featsharp", 2)
encoder.encode_image("photos/a.png", return_summary=True)
featsharp.save_checkpoint(encoder, "last.pth")
featsharp.load_from_file("last.pth")
"""
COMMANDS = """
assert main(["upsample", "photos/a.png", "-o", "pictures", "--backbone", "toy-vit", "--checkpoint", "tile-2x"]) == 0
assert main(["ls"]) == 0
assert main(["doctor", "--backbone", "toy-vit"]) == 0
assert main(["extract", "photos", "-o", "store", "--backbone", "toy-vit"]) == 0
assert main(["eval", "fidelity", "--data", "photos", "--backbone", "toy-vit", "--upsampler", "bilinear-2x"]) == 0
small = "num_training_steps=1 num_workers=0 normalizer.num_samples=4 batch_size=1 progress=false"
assert main(["train", "+model=toy-vit", "+upsampler=resize-conv-2x", "train_data_dir=photos", *small.split()]) == 0
"""
REPORT = """
assert not seen, seen
"""


def use(code: str, folder) -> subprocess.CompletedProcess[str]:
    (folder / "photos").mkdir()
    for name in ("a.png", "b.png"):
        pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / name)
    # Not the offline mode of the tests: that no address is asked for must not need it.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment["FEATSHARP_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-c", WATCH + code + REPORT]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_importing_and_using_opens_no_socket(tmp_path):
    done = use(USE, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_commands_open_no_socket(tmp_path):
    done = use(USE + COMMANDS, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_watch_sees_a_socket(tmp_path):
    """The test above can fail: a request to this machine is seen."""
    asking = "import urllib.request\ntry: urllib.request.urlopen('http://127.0.0.1:9')\nexcept OSError: pass\n"
    done = use(asking, tmp_path)
    assert done.returncode == 1
    assert "'urllib.Request'" in done.stderr
    assert "'socket.connect'" in done.stderr
