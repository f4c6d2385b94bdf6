"""Text beside features: embeddings are the library's own, and a map is the cosine of each place with them."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from featsharp.backbones import create_backbone
from featsharp.cli.main import main
from featsharp.data.images import decode_image
from featsharp.errors import ConfigError, InputError
from featsharp.visualization.similarity import cosine_map, self_similarity

open_clip = pytest.importorskip("open_clip")

CONFIG = {
    "embed_dim": 48,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 64, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with both towers, as open_clip lays it out for a hub."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("clip")
    model = open_clip.CLIP(**CONFIG).eval().requires_grad_(False)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    (path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}), "utf-8"
    )
    return path, model


def test_embeddings_are_those_of_the_library(folder):
    from featsharp.backbones.open_clip_text import TextTower

    path, model = folder
    tower = TextTower(create_backbone(f"open_clip:{path}", project=True))
    texts = ["a photo of a dog", "Grass, and sky above it."]
    expected = F.normalize(model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts)), dim=-1)
    torch.testing.assert_close(tower(texts), expected)
    assert (tower(texts[:1]) - tower(texts[1:])).norm() > 0.01
    with pytest.raises(InputError, match="is empty; describe it"):
        tower(["a dog", " "])


@pytest.mark.slow
def test_random_weights_need_no_file():
    from featsharp.backbones.open_clip_text import TextTower

    tower = TextTower(create_backbone("open_clip:ViT-B-32?pretrained=false", project=True))
    assert tower(["x"]).shape == (1, 512)


def test_backbones_without_text_say_what_to_use(folder):
    from featsharp.backbones.open_clip_text import TextTower

    with pytest.raises(ConfigError, match=r"text needs a backbone of open_clip.*'toy-vit' is none"):
        TextTower(create_backbone("toy-vit"))
    with pytest.raises(ConfigError, match=r"not in the space of its text; use 'open_clip:.*\?project=true'"):
        TextTower(create_backbone(f"open_clip:{folder[0]}"))


def test_a_similarity_map_is_the_cosine_of_each_place():
    features, vectors = torch.randn(2, 7, 3, 5), torch.randn(4, 7)
    expected = torch.empty(2, 4, 3, 5)
    for b, n, y, x in np.ndindex(*expected.shape):
        a, c = features[b, :, y, x], vectors[n]
        expected[b, n, y, x] = a @ c / (a.norm() * c.norm())
    torch.testing.assert_close(cosine_map(features, vectors), expected)
    torch.testing.assert_close(cosine_map(features.half(), vectors), expected, atol=2e-3, rtol=0)
    at = self_similarity(features[:1], (0.99, 0.3))
    torch.testing.assert_close(at, cosine_map(features[:1], features[0, :, 2, 1][None])[0, 0])
    assert cosine_map(torch.zeros(1, 7, 2, 2), vectors).abs().max() == 0
    with pytest.raises(InputError, match=r"got \(2, 7, 3, 5\) and \(4, 6\)"):
        cosine_map(features, vectors[:, :6])


@pytest.mark.slow
def test_the_command_draws_a_row_for_each_text(folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    base = ["upsample", str(tmp_path / "photo.png"), "--checkpoint", "bilinear-2x", "--backbone"]
    rows = {}
    for count in (0, 2):
        texts = [word for text in ("a dog", "a cat")[:count] for word in ("--text", text)]
        out = tmp_path / f"out{count}"
        assert main([*base, f"open_clip:{folder[0]}?project=true", "-o", str(out), *texts]) == 0
        rows[count] = np.asarray(decode_image(out / "photo.png"))
    assert rows[2].shape[1] == rows[0].shape[1]
    height = len(rows[0])
    assert rows[2].shape[0] > 2.8 * height
    assert (rows[2][:height] == rows[0]).mean() > 0.99  # the PCA row is as without text
    capsys.readouterr()
    # The projection is added to a name that does not speak of it; other backbones are refused in one line.
    assert main([*base, f"open_clip:{folder[0]}", "-o", str(tmp_path / "added"), "--text", "a dog"]) == 0
    capsys.readouterr()
    assert main([*base, "toy-vit", "-o", str(tmp_path / "none"), "--text", "a dog"]) == 1
    assert "text needs a backbone of open_clip" in capsys.readouterr().err


def test_the_demo_compares_text_and_features_of_one_backbone(folder, tmp_path):
    """Features of one model, then another one with channels of that number is chosen and computed with."""
    pytest.importorskip("gradio")
    from featsharp.visualization.explore import vector_pictures
    from featsharp.visualization.page import SIDE, TEXT, Demo, show, to_pixels

    path, model = folder
    other = shutil.copytree(path, tmp_path / "other")
    torch.manual_seed(4)
    save_file(open_clip.CLIP(**CONFIG).state_dict(), other / "open_clip_model.safetensors")
    names = [f"open_clip:{path}", f"open_clip:{other}"]
    demo = Demo(names, torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (56, 70, 3), np.uint8)
    first, _, view, _ = demo.compute(pixels, names[0], "bilinear", 2)
    assert TEXT in view["choices"]
    second = demo.compute(pixels, names[1], "bilinear", 2)[0]
    drawn = [demo.look(features, TEXT, None, 4, "a dog")[0][1] for features in (first, second, first)]
    vector = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(["a dog"]))[0]
    (_, high_res), _ = vector_pictures(first, vector)
    np.testing.assert_array_equal(drawn[0], to_pixels(show(high_res, first.image, SIDE)))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0], drawn[1])
