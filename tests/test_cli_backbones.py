"""``featsharp ls backbones`` and ``featsharp doctor --backbone``: what is here, what it is like."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors import SafetensorError

from featsharp.backbones import MODELS, Model, create_backbone, list_backbones
from featsharp.backbones.local_weights import has_local_weights
from featsharp.cli.main import main
from featsharp.errors import MissingDependencyError
from featsharp.evaluation.position_bias import position_bias

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "backbones.md"


def run(*arguments: str) -> int:
    return main(list(arguments))


@pytest.fixture
def caches(monkeypatch) -> Iterator[Path]:
    """Empty caches of the Hugging Face hub and of torch.hub; other tests find nothing of what is put there."""
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    monkeypatch.setenv("TORCH_HOME", constants.HF_HUB_CACHE)
    yield Path(constants.HF_HUB_CACHE)
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)


def cached(cache: Path, repository: str, file: str, content: str = "") -> None:
    """A file where the hub's client puts it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("abc")
    path = folder / "snapshots" / "abc" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


# Are the weights here?


@pytest.mark.parametrize(
    ("name", "repository", "file"),
    [
        ("dinov2-l_448px", "timm/vit_large_patch14_reg4_dinov2.lvd142m", "model.safetensors"),
        ("timm:resnet50.tv_in1k?layer=2", "timm/resnet50.tv_in1k", "pytorch_model.bin"),
        ("siglip2?layer=3", "google/siglip2-so400m-patch16-512", "model.safetensors"),
        ("hf:org/model", "org/model", "pytorch_model.bin"),
        ("dfn-clip", "apple/DFN5B-CLIP-ViT-H-14-378", "open_clip_pytorch_model.bin"),
        ("clip-b16", "timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"),
    ],
)
def test_weights_in_the_cache_of_the_hub(caches, name, repository, file):
    assert has_local_weights(name) is False
    cached(caches, repository, "config.json")
    assert has_local_weights(name) is False
    cached(caches, repository, file)
    assert has_local_weights(name) is True


def test_weights_in_several_files_need_all_of_them(caches):
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}}
    cached(caches, "google/paligemma-3b-pt-448", "model.safetensors.index.json", json.dumps(index))
    cached(caches, "google/paligemma-3b-pt-448", "model-1.safetensors")
    assert has_local_weights("paligemma") is False
    cached(caches, "google/paligemma-3b-pt-448", "model-2.safetensors")
    assert has_local_weights("paligemma") is True


def test_code_of_torch_hub_and_what_nobody_can_tell(caches, tmp_path):
    assert has_local_weights("radio-l") is False
    (caches / "hub" / "NVlabs_RADIO_main").mkdir(parents=True)
    assert has_local_weights("radio-l") is None
    assert has_local_weights("open_clip:ViT-B-32/openai") is None
    assert has_local_weights("timm:vit_small_patch16_224") is None  # timm knows the default tag
    assert has_local_weights(f"hf:{tmp_path}") is True
    assert has_local_weights("toy-vit") is True


def test_the_licence_is_said_before_weights_are_fetched(caches, caplog):
    pytest.importorskip("timm")
    with pytest.raises(MissingDependencyError):  # the tests are offline
        create_backbone("dino-s16?layer=3")
    assert "timm:vit_small_patch16_224.dino: weights of licence Apache-2.0, which are not" in caplog.text
    caplog.clear()
    create_backbone("dino-s16?pretrained=false&img_size=32")
    cached(caches, "timm/vit_small_patch16_224.dino", "model.safetensors", "damaged")
    with pytest.raises(SafetensorError):
        create_backbone("dino-s16")
    assert "licence" not in caplog.text


# featsharp ls backbones


def test_ls_says_which_weights_are_here(caches, capsys):
    cached(caches, "timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors")
    assert run("ls", "backbones") == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^  dinov2-s +here +DINOv2-S/14[^=]*= timm:vit_small_patch14_dinov2.lvd142m\?img_size=448$",
        text,
        re.M,
    )
    assert re.search(r"^  dinov2-b +no +DINOv2-B/14", text, re.M)
    assert re.search(r"^  toy-vit +here +tiny", text, re.M)
    assert re.search(r"^  hf:\S+ +- +", text, re.M)
    names = re.findall(r"^  (\S+) ", text, re.M)[1:]  # below the head
    assert names[: len(list_backbones())] == list_backbones()


def test_the_table_in_the_documentation_is_the_one_of_the_command(caches, capsys):
    """On every machine the same, whatever weights it has."""
    assert run("ls", "backbones", "--markdown") == 0
    table = capsys.readouterr().out
    assert table in DOCUMENT.read_text(encoding="utf-8")
    cached(caches, "timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors")
    run("ls", "backbones", "--markdown")
    assert capsys.readouterr().out == table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    assert {row[0] for row in rows} >= set(list_backbones())
    assert ["dfn-clip", MODELS["dfn-clip"].description, "apple-ascl", MODELS["dfn-clip"].target, "-"] in rows


# featsharp doctor --backbone


def doctor(capsys, name: str) -> dict[str, str]:
    assert run("doctor", "--backbone", name, "--device", "cpu", "--repeat", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    return {line[:14].strip(): line[15:] for line in lines}


def test_doctor_of_a_flexible_backbone(capsys):
    found, backbone = doctor(capsys, "toy-vit?dtype=bfloat16"), create_backbone("toy-vit")
    assert found["backbone"] == "toy-vit?dtype=bfloat16"
    assert found["features"] == "32 channels, 8x8 tokens of 8 pixels"
    assert found["summary"] == "32 channels"
    assert found["whitening"] == "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    assert found["sizes"] == "native 64x64; any multiples of 8"
    assert found["dtype"] == "float32, autocast bfloat16"
    count = sum(p.numel() for p in backbone.parameters())
    assert found["weights"] == f"{count:,} parameters, sha256 {backbone.weights_hash()[:12]}"
    for scale, side in ((1, 64), (2, 128)):
        pattern = rf"\d+\.\d ms for one {side}x{side} image on cpu \(median of 2, quartiles \d+\.\d - \d+\.\d\)"
        assert re.fullmatch(pattern, found[f"pass at {scale}x"])
    assert float(found["position bias"].split()[0]) == pytest.approx(position_bias(backbone), abs=0.01)


def test_doctor_of_one_size_only_and_of_windows(capsys):
    found = doctor(capsys, "toy-vit-fixed")
    assert "native 64x64; no other: images are resized to it, or with ?other_sizes=tile" in found["sizes"]
    assert "pass at 1x" in found
    assert found["pass at 2x"] == "none: it takes no larger images"
    found = doctor(capsys, "toy-vit-fixed?other_sizes=tile")
    assert found["sizes"] == "native 64x64; larger ones are covered with windows of it"
    assert "pass at 2x" in found


def test_doctor_of_a_short_name_with_prefix_tokens(capsys, monkeypatch):
    pytest.importorskip("timm")
    target = "timm:vit_tiny_patch16_224?pretrained=false&img_size=32"
    monkeypatch.setitem(MODELS, "short", Model(target, "tiny: for this test", "short"))
    found = doctor(capsys, "short")
    assert found["stands for"] == target
    assert found["features"] == "192 channels, 2x2 tokens of 16 pixels after 1 prefix tokens"
    assert doctor(capsys, "toy-cnn")["summary"] == "none"


def test_doctor_of_what_is_not_there(capsys):
    assert run("doctor", "--backbone", "dinov2-x") == 1
    assert "unknown backbone 'dinov2-x'; did you mean 'dinov2-" in capsys.readouterr().err


@pytest.mark.gpu
def test_doctor_on_a_gpu(capsys):
    assert run("doctor", "--backbone", "toy-vit", "--device", "cuda", "--repeat", "2") == 0
    assert "on cuda" in capsys.readouterr().out
