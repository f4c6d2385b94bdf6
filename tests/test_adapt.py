"""Adaptation to a backbone: what it fits, what it reports, and what it refuses."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import featsharp
from featsharp.adapt import STUDENT, adapt
from featsharp.backbones import create_backbone, from_callable
from featsharp.cli.main import main
from featsharp.errors import DataError


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = rng.integers(0, 256, (9 + number % 3, 13, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((104, 80), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def blurred(scale):
    """A backbone whose windows are wrong by a factor, which the mix can learn and the views cannot."""
    pool = torch.nn.AvgPool2d(8)
    return from_callable(lambda x: torch.cat([pool(x)] * 6, 1)[:, :16] * scale, patch_size=8, input_size=(64, 64))


@pytest.mark.slow
def test_the_table_has_all_and_the_student_is_the_one_measured(photos):
    result = adapt(create_backbone("toy-vit"), photos, minutes=1)
    assert list(result.fidelity) == ["bilinear", "views(4)", "views(5)", "views(16)", "views(16) chosen", STUDENT]
    assert result.photographs == (6, 2)
    assert result.fidelity["views(16) chosen"].value > 0
    assert not result.skipped
    again = adapt(create_backbone("toy-vit"), photos, minutes=1)
    assert torch.equal(result.student.upsampler.mix, again.student.upsampler.mix)
    assert result.gain["bilinear"].value == pytest.approx(
        result.fidelity[STUDENT].value / result.fidelity["bilinear"].value, rel=1e-6
    )


def test_a_backbone_that_pools_gains_over_bilinear(photos):
    """Its views are exact, so every number of passes is far above bilinear."""
    result = adapt(blurred(1.0), photos, minutes=1)
    assert result.fidelity["views(16)"].value > 1.3 * result.fidelity["bilinear"].value
    assert result.gain["bilinear"].low > 1


def test_time_limits_the_photographs(photos):
    result = adapt(create_backbone("toy-vit"), photos, minutes=1e-9)
    assert result.photographs == (1, 2)


@pytest.mark.slow
def test_a_picture_that_makes_nan_is_named_and_skipped(photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    for name in ("0.png", "1.png"):  # one of those held back, and one of the others
        red = np.asarray(Image.open(folder / name)) // 8 + np.array([200, 0, 0], dtype=np.uint8)
        Image.fromarray(red).save(folder / name)
    pool = torch.nn.AvgPool2d(8)

    def encode(x):
        red = (x[:, 0] - x[:, 2]).mean((1, 2)) > 1
        return torch.cat([pool(x)] * 6, 1)[:, :16].masked_fill(red[:, None, None, None], torch.nan)

    result = adapt(from_callable(encode, patch_size=8, input_size=(64, 64)), folder, minutes=1)
    assert sorted(name for name, _ in result.skipped) == ["0.png", "1.png"]
    assert all("NaN or infinite" in reason for _, reason in result.skipped)
    assert result.photographs == (5, 1)


def test_too_few_photographs_are_refused(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"1 readable photographs; adapt needs at least 4"):
        adapt(create_backbone("toy-vit"), tmp_path)


def test_the_command_says_what_was_gained_and_writes_only_then(photos, tmp_path, capsys):
    output = tmp_path / "student.safetensors"
    arguments = ["adapt", "--backbone", "toy-vit", "--data", str(photos), "--minutes", "1", "-o", str(output)]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "fitted to 6 photographs, measured on 2 others" in text
    assert f"  {STUDENT}" in text
    assert output.exists() == ("nothing gained" not in text)
    if output.exists():
        assert featsharp.load_from_file(output).upsampler.variant == "linear"
    assert main([*arguments[:-2], "--minutes", "0", "-o", str(output)]) == 1
    assert "--minutes must be above 0; got 0" in capsys.readouterr().err
