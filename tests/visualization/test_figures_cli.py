"""`featsharp figure`: a file for every kind of figure, one line for every mistake."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.backbones import create_backbone
from featsharp.builder import create_encoder, save_checkpoint
from featsharp.cli.main import main
from featsharp.evaluation.position_bias import position_bias
from featsharp.names import split_label
from featsharp.normalizers import FeatureStatistics


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 72, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture
def checkpoint(tmp_path):
    encoder = create_encoder("toy-vit", "featup", 2, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(encoder.embed_dim)
    statistics.update(encoder.backbone(torch.randn(8, 3, 64, 64)).features)
    encoder.normalizer.fit(statistics)
    encoder.bias_buffer.buffer.data.normal_(std=0.1)
    save_checkpoint(encoder, tmp_path / "last.pth")
    return str(tmp_path / "last.pth")


def figure(*arguments):
    return main(["figure", *map(str, arguments)])


def draw(kind, *arguments):
    """The figure that a command writes."""
    module = importlib.import_module(f"featsharp.visualization.figures.{kind}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.make_figure(parser.parse_args(list(map(str, arguments))))


def test_pca_draws_all_encoders_in_order(photo, checkpoint, tmp_path):
    out = tmp_path / "pca.png"
    arguments = [photo, photo, "--upsampler", "bilinear-2x", "tile-2x", "--checkpoint", f"JBU={checkpoint}"]
    axes = draw("pca", *arguments).axes
    titles = [one.get_title() for one in axes[:6]]
    assert titles == ["image", "low resolution", "bilinear 2x", "tile 2x", "JBU", "backbone at 2x"]
    assert len(axes) == 12
    assert figure("pca", *arguments, "-o", out) == 0
    with Image.open(out) as picture:
        # Six pictures of 1.6 inches at 200 dots with some air, two rows of 2 : 3 and a line of captions.
        assert picture.width == pytest.approx(2000, rel=0.03)
        assert picture.height == pytest.approx(2 * 213 + 80, rel=0.1)


@pytest.mark.parametrize("kind", ["pca", "similarity"])
def test_the_backbone_itself_can_be_left_out(photo, kind):
    axes = draw(kind, photo, "--backbone", "toy-vit", "--upsampler", "tile-2x", "--no-real").axes
    assert [one.get_title() for one in axes] == ["image", "low resolution", "tile 2x"]


def test_a_path_with_an_equals_sign_has_no_label(photo, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lr=0.1"
    folder.mkdir()
    (folder / "last.pth").write_bytes(Path(checkpoint).read_bytes())
    for given, title in (("lr=0.1/last.pth", "featup 2x"), ("mine=lr=0.1/last.pth", "mine")):
        assert draw("pca", photo, "--no-real", "--checkpoint", given).axes[-1].get_title() == title


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mine=last.pth", ("mine", "last.pth")),
        ("last.pth", ("", "last.pth")),
        ("a/lr=1.pth", ("", "a/lr=1.pth")),
        ("lr=1.pth", ("", "lr=1.pth")),  # a file that is there
        ("lr=2.pth", ("lr", "2.pth")),
        ("x=a/lr=1.pth", ("x", "a/lr=1.pth")),
    ],
)
def test_labels_are_told_from_paths(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.pth").touch()
    assert split_label(text) == expected


def test_pca_has_a_row_for_each_backbone(photo):
    backbones = ["--backbone", "toy-vit", "toy-vit-fixed", "toy-cnn"]
    axes = draw("pca", photo, "--upsampler", "tile-2x", *backbones, "--real").axes
    assert [one.get_ylabel().replace("\n", "") for one in axes[::4]] == backbones[1:]


def test_checkpoints_share_their_backbone_with_the_training_free(photo, checkpoint):
    arguments = ["--upsampler", "bilinear-2x", "--checkpoint", checkpoint, "--at", "0.25,0.75"]
    axes = draw("similarity", photo, *arguments).axes
    titles = [one.get_title() for one in axes]
    assert titles == ["image", "low resolution", "bilinear 2x", "featup 2x", "backbone at 2x"]
    ((x, y),) = axes[0].lines[0].get_xydata()
    assert (x + 0.5) / 72 == pytest.approx(0.75)
    assert (y + 0.5) / 48 == pytest.approx(0.25)


def test_bias_shows_learned_and_measured_patterns(checkpoint):
    axes = draw("bias", "--checkpoint", checkpoint, "--backbone", "toy-cnn", "--images", 4).axes
    learned, *measured = axes
    strengths = {name: position_bias(create_backbone(name), num_images=4) for name in ("toy-vit", "toy-cnn")}
    assert learned.get_title() == "toy-vit, last"
    strength, bias = learned.get_xlabel().split("\n")
    # A buffer of 0.1 beside features of spread 1.
    assert float(strength.removeprefix("strength ")) == pytest.approx(0.1, abs=0.005)
    assert bias == f"position bias {strengths['toy-vit']:.3f}"
    order = sorted(strengths, key=lambda name: -strengths[name])
    assert [one.get_title() for one in measured] == order
    assert measured[0].get_ylabel().replace("\n", " ") == "mean features of 4 random images"
    assert [one.get_xlabel() for one in measured] == [f"position bias {strengths[name]:.3f}" for name in order]


def test_inputs_are_never_overwritten(photo, checkpoint, tmp_path, capsys):
    kept = {}
    for name, source in (("last.png", checkpoint), ("photo.png", photo)):
        (tmp_path / name).write_bytes(Path(source).read_bytes())
        kept[name] = (tmp_path / name).read_bytes()
    (tmp_path / "result.png").write_text("{}")
    (tmp_path / "link.png").symlink_to(photo)
    free = ["--backbone", "toy-vit", "--upsampler", "tile-2x"]
    commands = {
        photo: ["pca", photo, *free],
        tmp_path / "link.png": ["similarity", photo, *free],
        tmp_path / "last.png": ["bias", "--checkpoint", f"mine={tmp_path / 'last.png'}"],
        tmp_path / "result.png": ["cost", "a.json", "--accuracy", tmp_path / "result.png", "--metric", "x"],
    }
    for output, command in commands.items():
        assert figure(*command, "-o", output) == 1
        assert "would overwrite the input" in capsys.readouterr().err
    assert (tmp_path / "result.png").read_text() == "{}"
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


@pytest.mark.parametrize("kind", ["miou", "pr", "cka", "cost"])
def test_results_of_another_task_are_refused(tmp_path, kind, capsys):
    path = tmp_path / "zoom.json"
    path.write_text(json.dumps({"task": "zoom", "encoders": {}}))
    more = ["--accuracy", path, "--metric", "x"] if kind == "cost" else []
    assert figure(kind, path, *more, "-o", tmp_path / "x.png") == 1
    task = {"miou": "segmentation", "pr": "boundaries", "cka": "cka", "cost": "flops"}[kind]
    message = capsys.readouterr().err
    assert message.startswith("featsharp figure: ")
    assert f"zoom.json is the result of zoom; this figure needs the result of {task}" in message
    assert f"featsharp eval {task}" in message
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        (["miou", "none.json"], "segmentation"),
        (["throughput", "none.json"], "throughput"),
        (["cost", "{there}", "--accuracy", "none.json", "--metric", "x"], "TASK"),
    ],
)
def test_missing_results_say_how_they_are_made(tmp_path, arguments, task, capsys):
    there = tmp_path / "flops.json"
    there.write_text(json.dumps({"task": "flops", "result": {}}))
    assert figure(*(text.format(there=there) for text in arguments), "-o", tmp_path / "x.png") == 1
    message = capsys.readouterr().err
    assert "cannot read none.json" in message
    assert f"make it with: featsharp eval {task} " in message


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--checkpoint a.pth -o x.jpg", ".png, .pdf or .svg"),
        ("--backbone toy-vit -o x.png", "nothing to draw for backbone toy-vit"),
        ("--backbone toy-vit --upsampler tile-2x tile-2x -o x.png", "two encoders are called 'tile 2x'"),
        ("--backbone toy-vit --upsampler featsharp-2x -o x.png", "featsharp has to be trained"),
        ("--backbone toy-vit --checkpoint none.pth -o x.png", "none.pth"),
    ],
)
def test_mistakes_cost_one_line(photo, arguments, problem, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert figure("pca", photo, *arguments.split()) == 1
    message = capsys.readouterr().err
    assert problem in message
    assert len(message.splitlines()) == 1


def test_similarity_is_about_one_backbone(photo, tmp_path, capsys):
    arguments = ["--backbone", "toy-vit", "toy-cnn", "--upsampler", "tile-2x"]
    assert figure("similarity", photo, *arguments, "-o", tmp_path / "x.png") == 1
    assert "one backbone; got toy-vit, toy-cnn" in capsys.readouterr().err


def test_points_are_two_numbers(photo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        figure("similarity", photo, "--at", "middle", "-o", tmp_path / "x.png")
    assert "write Y,X from 0 to 1" in capsys.readouterr().err


def test_without_matplotlib_the_command_to_install_it_is_shown(photo, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert figure("pca", photo, "--backbone", "toy-vit", "--upsampler", "tile-2x", "-o", tmp_path / "x.png") == 1
    assert 'pip install "featsharp[viz]"' in capsys.readouterr().err


def test_pyplot_stays_unused(photo, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    assert figure("pca", photo, "--backbone", "toy-vit", "--upsampler", "tile-2x", "-o", tmp_path / "x.png") == 0
    assert ("matplotlib.pyplot" in sys.modules) == before
