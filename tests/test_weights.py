"""Files for use: small, loaded like checkpoints, refused when they are not what they say."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featsharp.builder import create_encoder, load_from_file, save_checkpoint, save_weights
from featsharp.cli.main import main
from featsharp.errors import CheckpointError
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.weights import HOME, list_weights


@pytest.fixture
def encoder() -> SharpEncoder:
    torch.manual_seed(0)
    encoder = create_encoder("toy-vit", "featsharp", 2, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(encoder.embed_dim)
    statistics.update(encoder.backbone(torch.randn(8, 3, 64, 64)).features)
    encoder.normalizer.fit(statistics)
    for parameter in encoder.upsampler.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return encoder.eval()


def test_weights_load_like_the_checkpoint_and_are_half_its_size(encoder, tmp_path):
    save_checkpoint(encoder, tmp_path / "a.pth")
    save_weights(encoder, tmp_path / "a.safetensors")
    images = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected = load_from_file(tmp_path / "a.pth")(images).high_res
        found = load_from_file(tmp_path / "a.safetensors")(images).high_res
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * expected.std().item())
    assert not torch.equal(found, expected)  # the upsampler was rounded
    stored = load_file(tmp_path / "a.safetensors")
    assert {t.dtype for n, t in stored.items() if n.startswith("upsampler.")} == {torch.float16}
    assert {t.dtype for n, t in stored.items() if n.startswith("normalizer.")} == {torch.float32, torch.bool}


def test_export_command(encoder, tmp_path, capsys):
    save_checkpoint(encoder, tmp_path / "last.pth", training={"step": 1})
    assert main(["export", str(tmp_path / "last.pth"), "-o", str(tmp_path / "out" / "sharp.safetensors")]) == 0
    assert re.search(r"sharp.safetensors: [\d.]+ MiB", capsys.readouterr().out)
    assert load_from_file(tmp_path / "out" / "sharp.safetensors").factor == 2
    assert main(["export", str(tmp_path / "last.pth"), "-o", str(tmp_path / "sharp.pth")]) == 1
    assert "ends in .safetensors" in capsys.readouterr().err


def test_values_beyond_half_precision_are_refused_and_the_old_file_stays(encoder, tmp_path):
    save_weights(encoder, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    next(iter(encoder.upsampler.parameters())).data.fill_(1e6)
    with pytest.raises(CheckpointError, match="half precision cannot hold"):
        save_weights(encoder, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_other_safetensors_files_and_damaged_ones_are_refused(encoder, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a featsharp checkpoint"):
        load_from_file(path)
    save_weights(encoder, path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_from_file(path)
    save_file({"x": torch.zeros(2)}, path, {"format": "featsharp", "version": "99", "encoder": "{}"})
    with pytest.raises(CheckpointError, match="newer than this featsharp"):
        load_from_file(path)
    save_file({"x": torch.zeros(2)}, path, {"format": "featsharp", "version": "1", "encoder": "{"})
    with pytest.raises(CheckpointError, match="does not hold what a checkpoint holds"):
        load_from_file(path)
    save_file({"x": torch.zeros(2)}, path, {"format": "featsharp", "version": "1", "encoder": json.dumps({})})
    with pytest.raises(CheckpointError, match="does not hold what a checkpoint holds"):
        load_from_file(path)


def test_tensors_of_another_kind_are_refused(encoder, tmp_path):
    path = tmp_path / "a.safetensors"
    save_weights(encoder, path)
    state = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    key = next(name for name in state if name.startswith("upsampler."))
    save_file({**state, key: state[key].to(torch.complex64)}, path, header)
    with pytest.raises(CheckpointError, match=rf"has other types: {key} torch.complex64 instead of torch.float32"):
        load_from_file(path)


def test_a_name_that_is_neither_file_nor_weights_says_what_there_is():
    with pytest.raises(CheckpointError, match=r"does not exist; unknown upsampler.*did you mean 'bilinear'") as caught:
        load_from_file("bilinaer-2x", featurizer="toy-vit")
    for name in (*list_weights(), "anyup"):
        assert name in str(caught.value)


def test_shipped_files_are_small_and_have_a_card():
    """U29."""
    files = [HOME / f"{name}.safetensors" for name in list_weights()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    for path in files:
        card = path.with_suffix(".md").read_text(encoding="utf-8")
        for heading in ("Data", "Recipe", "Figures", "Licence", "Limits"):
            assert f"## {heading}" in card


@pytest.mark.parametrize("name", list_weights())
def test_shipped_weights_load_by_name(name):
    pytest.importorskip("onnx")
    encoder = load_from_file(name)
    out = encoder(torch.zeros(1, 3, 448, 336))
    assert out.high_res.shape[-2:] == tuple(encoder.factor * n for n in out.low_res.shape[-2:])


def test_paths_are_checked_before_names(tmp_path, monkeypatch, encoder):
    monkeypatch.chdir(tmp_path)
    Path("vits14-focus").mkdir()
    save_checkpoint(encoder, "vits14-focus/featsharp-2x")
    assert load_from_file("vits14-focus/featsharp-2x").backbone.name == "toy-vit"


def test_beside_its_backbone_weights_need_no_folder():
    encoder = load_from_file("featsharp-2x", featurizer="vits14-focus")
    named = load_from_file("vits14-focus/featsharp-2x")
    assert encoder.recipe == named.recipe
    assert all(torch.equal(one, other) for one, other in zip(encoder.parameters(), named.parameters(), strict=True))
