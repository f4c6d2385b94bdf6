"""timm models by name: facts, positions, summaries and errors."""

import pytest
import torch

from featsharp.backbones import create_backbone
from featsharp.backbones.timm_vit import TimmViT
from featsharp.errors import ConfigError, MissingDependencyError

timm = pytest.importorskip("timm")


def tiny(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=0, **kwargs)


def test_facts_are_those_of_the_model():
    backbone = create_backbone("timm:vit_tiny_patch16_224?pretrained=false")
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (16, 192, (224, 224))
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)
    assert backbone.num_prefix_tokens == 1
    assert backbone.summary_dim == 192
    assert backbone.flexible


def test_tokens_are_the_models_own():
    model = tiny(dynamic_img_size=True)
    images = torch.randn(2, 3, 224, 224)
    out = TimmViT("mine", model)(images)
    tokens = model.forward_features(images)
    torch.testing.assert_close(out.features.flatten(2).transpose(1, 2), tokens[:, 1:])
    torch.testing.assert_close(out.summary, tokens[:, 0])


def test_registers_are_skipped_and_the_class_token_is_the_summary():
    model = tiny(reg_tokens=4, dynamic_img_size=True)
    out = TimmViT("mine", model)(images := torch.randn(1, 3, 48, 80))
    tokens = model.forward_features(images)
    assert tokens.shape[1] == 5 + 15
    torch.testing.assert_close(out.features[0, :, 1, 2], tokens[0, 5 + 5 + 2])
    torch.testing.assert_close(out.summary, tokens[:, 0])


def test_without_class_token_the_summary_is_the_models_pool():
    model = tiny(class_token=False, global_pool="map", dynamic_img_size=True)
    backbone = TimmViT("mine", model)
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(backbone(images).summary, model.attn_pool(model.forward_features(images)))
    silent = TimmViT("mine", tiny(class_token=False, global_pool="", dynamic_img_size=True))
    assert silent.summary_dim is None
    assert silent(images).summary is None


def test_native_size_is_whole_patches_and_uses_the_stored_embedding(monkeypatch):
    model = tiny(img_size=100, dynamic_img_size=True)  # 6 whole patches of 16
    backbone = TimmViT("mine", model)
    assert backbone.input_size == (96, 96)

    def no_resampling(*args, **kwargs):
        raise AssertionError("resampled at the native size")

    monkeypatch.setattr(torch.nn.functional, "interpolate", no_resampling)
    backbone(torch.zeros(1, 3, 96, 96))
    with pytest.raises(AssertionError, match="resampled"):
        backbone(torch.zeros(1, 3, 96, 112))


def test_fixed_models_are_known_as_such():
    assert not TimmViT("mine", tiny()).flexible
    beit = create_backbone("timm:beit_base_patch16_224?pretrained=false&img_size=32")
    assert not beit.flexible
    assert beit.input_size == (32, 32)
    assert beit(torch.zeros(1, 3, 32, 32)).features.shape == (1, 768, 2, 2)


def test_image_size_option():
    backbone = create_backbone("timm:vit_tiny_patch16_224?pretrained=false&img_size=64x96")
    assert backbone.input_size == (64, 96)
    assert backbone(torch.zeros(1, 3, 64, 96)).features.shape == (1, 192, 4, 6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vit_tny_patch16_224", "unknown timm model 'vit_tny_patch16_224'; did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224?pretraind=false", "did you mean 'pretrained'"),
        ("vit_tiny_patch16_224?pretrained", "key=value"),
        ("vit_tiny_patch16_224?pretrained=no", "true or false; got 'no'"),
        ("vit_tiny_patch16_224?pretrained=false&pretrained=true", "given twice"),
        ("vit_tiny_patch16_224?pretrained=false&img_size=0", "448x224; got '0'"),
        ("vit_tiny_patch16_224?pretrained=false&img_size=100", "whole patches of 16; the nearest below is 96x96"),
        ("vit_tiny_patch16_224.nonsense", "Invalid pretrained tag"),
        ("resnet18?pretrained=false", "does not give patch tokens; wrap it with featsharp.backbones.from_callable"),
        ("resnet18?pretrained=false&img_size=64", "img_size"),
    ],
)
def test_wrong_names_and_options(spec, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(f"timm:{spec}")


def test_patches_that_are_not_square_are_refused():
    with pytest.raises(ConfigError, match="16x8 patches"):
        TimmViT("mine", tiny(patch_size=(16, 8)))


def test_weights_that_cannot_be_had_say_what_to_do(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"vit_tiny_patch16_224.*cannot be fetched.*pretrained=false"):
        create_backbone("timm:vit_tiny_patch16_224")
