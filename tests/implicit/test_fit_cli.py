"""``featsharp fit``: what it writes and says, after a real kill too."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from skimage import data

from featsharp.checkpoint import read_checkpoint
from featsharp.cli.main import main
from featsharp.implicit import load_fit
from featsharp.implicit.fitted import FIT_FILE

QUICK = ["--backbone", "toy-vit", "--views", "10", "--device", "cpu"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(data.astronaut()[40:300, 120:460]).save(path)
    return path


def run(*arguments: object) -> int:
    try:
        return main(["fit", *(str(argument) for argument in arguments)])
    except SystemExit as error:
        return int(error.code or 0)


def test_end_to_end(photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photo, *QUICK, "-o", out, "--steps", 5, "--query", "20x30") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == str(out / "photo.safetensors")
    assert second.startswith("on 8 other views: fitted fidelity ")
    assert sorted(path.name for path in out.iterdir()) == ["photo.png", "photo.pth", "photo.safetensors"]
    with safe_open(out / "photo.safetensors", framework="pt") as file:
        assert file.metadata() == {"image_size": "260x340", "layout": "CHW"}
        low_res, high_res = file.get_tensor("low_res"), file.get_tensor("high_res")
    assert low_res.dtype == high_res.dtype == torch.float32
    assert low_res.shape == (32, 7, 9)
    assert torch.equal(high_res, load_fit(out / "photo.pth").features((20, 30))[0])
    with Image.open(out / "photo.png") as picture:
        width, height = picture.size
    assert width >= 3 * 448  # and gaps between the pictures
    assert height >= 343  # and captions
    # Another query of a finished fit; by default there is a cell for every pixel.
    assert run(photo, *QUICK, "-o", out, "--steps", 5) == 0
    with safe_open(out / "photo.safetensors", framework="pt") as file:
        assert file.get_tensor("high_res").shape == (32, 56, 72)


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(photo, tmp_path, clean_environment):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "featsharp.cli.main", "fit", str(photo), *QUICK, "-o", str(out), "--steps"]
    process = subprocess.Popen([*command, "1000000"], env=clean_environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "photo.pth").exists() and read_checkpoint(out / "photo.pth", FIT_FILE)["training"]["step"]:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = read_checkpoint(out / "photo.pth", FIT_FILE)["training"]["step"]
    assert step > 0
    assert not (out / "photo.safetensors").exists()
    assert run(photo, *QUICK, "-o", out, "--steps", step + 3) == 0
    fresh = tmp_path / "fresh"
    assert run(photo, *QUICK, "-o", fresh, "--steps", step + 3) == 0
    resumed, whole = (load_fit(folder / "photo.pth").state_dict() for folder in (out, fresh))
    if torch.get_num_threads() == 1:  # with more, the two processes may add in another order
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    else:
        assert all(torch.allclose(resumed[key], whole[key], atol=1e-2) for key in whole)


def test_a_changed_setting_is_refused_in_one_line(photo, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(photo, *QUICK, "-o", out, "--steps", 1) == 0
    before = (out / "photo.pth").read_bytes()
    capsys.readouterr()
    assert run(photo, *QUICK, "-o", out, "--steps", 2, "--seed", 7) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "seed 7 instead of 0" in line
    assert (out / "photo.pth").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}/none.jpg", *QUICK, "-o", "{tmp}/out"], "does not exist"),
        (["{photo}", "--backbone", "toy", "-o", "{tmp}/out"], "toy"),
        (["{photo}", *QUICK, "-o", "{tmp}/out", "--steps", "0"], "at least 1"),
        (["{photo}", *QUICK, "-o", "{tmp}/out", "--query", "large"], "HEIGHTxWIDTH"),
        (["{photo}", *QUICK, "-o", "{tmp}/out", "--query", "0x5"], "'0x5' is no size"),
        (["{photo}", *QUICK, "-o", "{tmp}/out", "--render", "99"], "patches of 8 pixels"),
        (["{photo}", *QUICK, "-o", "{tmp}/out", "--downsampler", "none"], "unknown downsampler"),
        (["{photo}", *QUICK, "-o", "{tmp}/out", "--device", "gpu"], "cannot be used"),
        (["{photo}", *QUICK, "-o", "{photo}"], "cannot write"),
        (["{tmp}/mine.png", *QUICK, "-o", "{tmp}"], "would overwrite the input"),
        (["{tmp}/in/mine.png", *QUICK, "-o", "{tmp}"], "which featsharp did not write"),
    ],
)
def test_bad_input_costs_one_line(photo, tmp_path, capsys, arguments, said):
    for path in (tmp_path / "mine.png", tmp_path / "in" / "mine.png"):
        path.parent.mkdir(exist_ok=True)
        Image.open(photo).save(path)
    files = sorted(tmp_path.rglob("*"))
    assert run(*(argument.format(tmp=tmp_path, photo=photo) for argument in arguments)) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("featsharp fit: ")
    assert said in line
    assert sorted(tmp_path.rglob("*")) == files
