"""Encoders from names and objects, to files and back."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featsharp import create_backbone, create_encoder, from_callable, load_from_file, save_checkpoint
from featsharp.builder import load_model_state, model_state, save_weights
from featsharp.checkpoint import read_checkpoint
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError
from featsharp.layers.spectral import add_spectral
from featsharp.model import SharpEncoder
from featsharp.normalizers import FeatureStatistics
from featsharp.upsamplers import create_upsampler


def smooth_images(count: int, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(torch.randn(count, 3, 7, 8), size, mode="bicubic")


def trained(encoder: SharpEncoder) -> SharpEncoder:
    """An encoder as training leaves it: every number moved, the normalizer fitted."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        if encoder.normalizer.needs_fit:
            statistics = FeatureStatistics(encoder.embed_dim)
            statistics.update(encoder.backbone(smooth_images(8, encoder.backbone.input_size)).features)
            encoder.normalizer.fit(statistics)
    return encoder


def outputs(encoder: SharpEncoder, images: torch.Tensor):
    with torch.no_grad():
        return encoder(images)


ENCODERS = [
    ("featup", 4, {}, "phi-s", True),
    ("featup", 3, {"start": "published"}, "layernorm", False),
    ("featsharp", 2, {}, "phi-s", True),
    ("featsharp", 3, {"inputs": ("bilinear", "tiles"), "window": 3, "widths": "published"}, "none", False),
    ("tile", 2, {"overlap": 2}, "phi-s-onlyalpha", False),
]


@pytest.mark.parametrize(("upsampler", "factor", "options", "normalizer", "bias"), ENCODERS)
def test_save_and_load(tmp_path, upsampler, factor, options, normalizer, bias):
    encoder = create_encoder(
        "toy-vit", upsampler, factor, upsampler_options=options, normalizer=normalizer, bias_buffer=bias
    )
    trained(encoder)
    save_checkpoint(encoder, tmp_path / "last.pth", config={"num_training_steps": 3})
    loaded = load_from_file(tmp_path / "last.pth")
    assert not loaded.training
    assert loaded.recipe == encoder.recipe
    images = smooth_images(2, (72, 96))
    for one, other in zip(outputs(encoder, images)[:2], outputs(loaded, images)[:2], strict=True):
        assert torch.equal(one, other)
    content = read_checkpoint(tmp_path / "last.pth")
    assert content["config"] == {"num_training_steps": 3}
    assert content["training"] is None
    assert not any(key.startswith("backbone.") for key in content["model"])


@pytest.mark.parametrize("upsampler", ["featup", "featsharp"])
def test_spectral_factors_are_folded_and_training_goes_on_after_saving(tmp_path, upsampler):
    encoder = create_encoder("toy-vit", upsampler, 2)
    add_spectral(encoder.upsampler)
    trained(encoder).train()
    images = smooth_images(1, (64, 80))
    for _ in range(2):
        outputs(encoder, images)  # a power iteration
        save_checkpoint(encoder, tmp_path / "last.pth")
        encoder(images).high_res.mean().backward()
    save_checkpoint(encoder, tmp_path / "last.pth")
    loaded = load_from_file(tmp_path / "last.pth")
    assert loaded.state_dict().keys() == create_encoder("toy-vit", upsampler, 2).state_dict().keys()
    torch.testing.assert_close(
        outputs(loaded, images).high_res, outputs(encoder.eval(), images).high_res, atol=1e-5, rtol=1e-5
    )


def test_the_rotation_of_phi_s_is_loaded_bit_for_bit(tmp_path):
    encoder = trained(create_encoder("toy-vit", "bilinear", 2, normalizer="phi-s"))
    save_checkpoint(encoder, tmp_path / "last.pth")
    loaded = load_from_file(tmp_path / "last.pth").normalizer
    for key, value in encoder.normalizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    rotations = [key for key, value in read_checkpoint(tmp_path / "last.pth")["model"].items() if value.ndim == 2]
    assert rotations == ["normalizer.rotation"]  # once; its inverse is the transpose


def test_another_backbone_is_refused_with_what_differs(tmp_path):
    save_checkpoint(create_encoder("toy-vit", "bilinear", 2), tmp_path / "last.pth")
    with pytest.raises(BackboneMismatchError, match="for backbone 'toy-vit', not for this 'toy-cnn': weights_sha256"):
        load_from_file(tmp_path / "last.pth", featurizer="toy-cnn")
    other = from_callable(nn.Conv2d(3, 16, 4, 4), name="mine", input_size=(64, 64))
    with pytest.raises(BackboneMismatchError, match="patch_size 4 instead of 8; embed_dim 16 instead of 32"):
        load_from_file(tmp_path / "last.pth", featurizer=other)
    same = create_backbone("toy-vit")
    with torch.no_grad():
        same.pos_embed[0, 0, 0, 0] += 1e-3
    with pytest.raises(BackboneMismatchError, match="weights_sha256"):
        load_from_file(tmp_path / "last.pth", featurizer=same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_encoder_saves_what_loads_again(tmp_path, dtype):
    encoder = create_encoder("toy-vit", "bilinear", 2)
    known = encoder.backbone.weights_hash()
    encoder = create_encoder("toy-vit", "bilinear", 2).to(dtype)
    assert encoder.backbone.weights_hash() == known
    save_checkpoint(encoder, tmp_path / "last.pth")
    assert load_from_file(tmp_path / "last.pth").backbone.weights_hash() == known
    with torch.no_grad():
        encoder.backbone.pos_embed[0, 0, 0, 0] += 1
    assert encoder.backbone.weights_hash() != known


def test_loading_in_inference_mode(tmp_path):
    save_checkpoint(create_encoder("toy-vit", "featup", 2), tmp_path / "last.pth")
    with torch.inference_mode():
        encoder = load_from_file(tmp_path / "last.pth")
        assert encoder(smooth_images(1, (64, 64))).high_res.shape == (1, 32, 16, 16)


def test_a_backbone_of_ones_own_comes_back_as_featurizer(tmp_path):
    trunk = nn.Conv2d(3, 16, 8, 8)
    encoder = trained(create_encoder(from_callable(trunk, name="mine", input_size=(64, 64)), "featsharp", 2))
    save_checkpoint(encoder, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match="'mine', which cannot be built by name; pass the same backbone as feat"):
        load_from_file(tmp_path / "last.pth")
    again = from_callable(trunk, name="another label", input_size=(64, 64))
    loaded = load_from_file(tmp_path / "last.pth", featurizer=again)
    assert loaded.backbone is again
    images = smooth_images(1, (64, 64))
    assert torch.equal(outputs(loaded, images).high_res, outputs(encoder, images).high_res)


@pytest.mark.parametrize(
    ("path", "upsampler", "factor"),
    [
        ("tile-2x", "tile", 2),
        ("tile-1.5x", "tile", 1.5),
        ("bilinear-4x", "bilinear", 4),
        ("identity-1x", "identity", 1),
        ("native-highres-2x", "native-highres", 2),
        ("s2-2x", "s2", 2),
    ],
)
@pytest.mark.parametrize("featurizer", ["toy-vit", create_backbone("toy-cnn")])
def test_pseudo_paths(path, upsampler, factor, featurizer):
    encoder = load_from_file(path, featurizer=featurizer)
    images = smooth_images(1, (64, 64))
    expected = create_encoder(featurizer, upsampler, factor)
    assert torch.equal(outputs(encoder, images).high_res, outputs(expected, images).high_res)
    assert encoder.factor == factor


def test_pseudo_paths_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match="tile-2x is no file but an untrained upsampler; give it a backbone"):
        load_from_file("tile-2x")
    with pytest.raises(ConfigError, match="at least 1; got 0"):
        load_from_file("tile-0x", featurizer="toy-vit")
    with pytest.raises(ConfigError, match="featsharp has to be trained; give a checkpoint of it"):
        load_from_file("featsharp-2x", featurizer="toy-vit")
    with pytest.raises(CheckpointError, match="checkpoint featsharpp-2x does not exist"):
        load_from_file("featsharpp-2x", featurizer="toy-vit")
    with pytest.raises(ConfigError, match="module 'no_such_module' cannot be imported"):
        load_from_file("no_such_module:function-2x", featurizer="toy-vit")


def test_a_file_goes_before_a_pseudo_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(create_encoder("toy-vit", "bilinear", 3), "tile-2x")
    assert load_from_file("tile-2x").factor == 3


def test_tensors_that_do_not_fit_are_named():
    encoder = create_encoder("toy-vit", "featup", 2, bias_buffer=True)
    state = model_state(encoder)
    key = "upsampler.levels.0.sigma"
    wrong = {
        f"checkpoint x lacks {key}": {k: v for k, v in state.items() if k != key},
        "checkpoint x has unknown extra": state | {"extra": torch.zeros(1)},
        rf"has other shapes: {key} \(2,\) instead of \(\)": state | {key: torch.zeros(2)},
        f"holds NaN or infinite values in {key}": state | {key: torch.tensor(float("nan"))},
    }
    for message, tensors in wrong.items():
        with pytest.raises(CheckpointError, match=message):
            load_model_state(encoder, tensors, "x")
    load_model_state(encoder, state, "x")


def test_a_checkpoint_of_a_diverged_run_is_refused(tmp_path):
    encoder = create_encoder("toy-vit", "featup", 2)
    torch.nn.init.constant_(encoder.upsampler.levels[0].sigma, float("nan"))
    save_checkpoint(encoder, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=r"last\.pth holds NaN or infinite values in upsampler\.levels\.0\.sigma"):
        load_from_file(tmp_path / "last.pth")


def test_objects_instead_of_names():
    backbone = create_backbone("toy-vit")
    upsampler = create_upsampler("tile", backbone, 2, options={"overlap": 1})
    for factor in (None, 2):
        encoder = create_encoder(backbone, upsampler, factor)
        assert encoder.backbone is backbone
        assert encoder.upsampler is upsampler
    with pytest.raises(ConfigError, match=r"brings its own factor \(2\)"):
        create_encoder(backbone, upsampler, 4)
    with pytest.raises(ConfigError, match="and options; leave them out"):
        create_encoder(backbone, upsampler, upsampler_options={"overlap": 2})


@pytest.mark.parametrize("save", [save_checkpoint, save_weights])
def test_an_encoder_that_is_wrapped_or_compiled_saves_what_loads_again(tmp_path, save):
    images = torch.randn(1, 3, 64, 96)
    path = tmp_path / ("last.pth" if save is save_checkpoint else "small.safetensors")
    encoder = create_encoder("toy-vit", "resize-conv", 2)
    with torch.no_grad():
        expected = encoder(images).high_res
        for wrap in (nn.DataParallel, partial(torch.compile, backend="eager"), compile_upsampler):
            save(wrap(encoder), path)
            assert torch.allclose(load_from_file(path)(images).high_res, expected, atol=1e-4)
    with pytest.raises(CheckpointError, match="sharp encoders, from create_encoder; got Linear"):
        save(nn.Linear(2, 2), path)


def compile_upsampler(encoder):
    encoder.upsampler = torch.compile(encoder.upsampler, backend="eager")
    return encoder


def test_an_upsampler_object_cannot_be_saved(tmp_path):
    backbone = create_backbone("toy-vit")
    encoder = create_encoder(backbone, create_upsampler("tile", backbone, 2))
    with pytest.raises(CheckpointError, match="@register_upsampler and build it by name"):
        save_checkpoint(encoder, tmp_path / "last.pth")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("toy-vit", "bilinear-2x", 3), "'bilinear-2x' has factor 2, but factor=3 is given too"),
        (("toy-vit", "featshrap"), "did you mean 'featsharp'"),
        (("toy-vit", "featshrap", 2), "did you mean 'featsharp'"),
        (("toy-vti", "bilinear", 2), "did you mean 'toy-vit'"),
    ],
)
def test_names_that_cannot_work(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_encoder(*arguments)
    with pytest.raises(ConfigError, match="unknown normalizer 'phis'; did you mean 'phi-s'"):
        create_encoder("toy-vit", "bilinear", 2, normalizer="phis")


def test_the_bias_buffer_has_the_native_grid():
    encoder = create_encoder("toy-vit", "bilinear", 2, bias_buffer=True)
    assert encoder.bias_buffer.buffer.shape == (1, 32, 8, 8)
    assert create_encoder("toy-vit", "bilinear", 2).bias_buffer is None


def test_other_whitening_is_refused(tmp_path):
    module = nn.Conv2d(3, 32, 8, stride=8)
    first = from_callable(module, input_size=(64, 64))
    save_checkpoint(create_encoder(first, "featup", 2), tmp_path / "a.pth")
    second = from_callable(module, input_size=(64, 64), mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(BackboneMismatchError, match=r"mean \[0.5, 0.5, 0.5\] instead of \[0.485"):
        load_from_file(tmp_path / "a.pth", featurizer=second)


def test_mistyped_options_name_the_nearest():
    with pytest.raises(ConfigError, match="'widhts'; did you mean 'widths'"):
        create_encoder("toy-vit", "featsharp", 2, upsampler_options={"widhts": "published"})


def test_loaded_encoders_need_no_gradient_and_can_get_it(tmp_path):
    save_checkpoint(create_encoder("toy-vit", "featsharp", 2), tmp_path / "a.pth")
    venc = load_from_file(tmp_path / "a.pth")
    assert not venc(smooth_images(1, (128, 128))).high_res.requires_grad
    venc.upsampler.requires_grad_()
    assert venc(smooth_images(1, (128, 128))).high_res.requires_grad


def test_options_of_numpy_and_ranges_are_saved_as_plain_values(tmp_path):
    for name, options in {
        "s2": {"scales": range(1, 3)},
        "featsharp": {"window": np.int64(5), "inputs": ("jbu", "tiles")},
        "jafar": {"guidance_scale": np.float64(1.5)},
    }.items():
        encoder = create_encoder("toy-vit", name, np.int64(2), upsampler_options=options)
        save_checkpoint(encoder, tmp_path / "last.pth")
        assert load_from_file(tmp_path / "last.pth").recipe == encoder.recipe


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["encoder"].update(recipe=None),
        lambda content: content["encoder"]["recipe"].pop("factor"),
        lambda content: content["encoder"].update(backbone={}),
        lambda content: content.update(model=[]),
        lambda content: content["encoder"]["recipe"].update(upsampler=["bilinear"]),
    ],
)
def test_edited_checkpoints_are_one_error(damage, tmp_path):
    save_checkpoint(create_encoder("toy-vit", "featup", 2), tmp_path / "last.pth")
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=r"last.pth does not hold what a checkpoint holds"):
        load_from_file(tmp_path / "last.pth")


@pytest.mark.slow
def test_a_compiled_encoder_can_be_copied():
    encoder = create_encoder("toy-vit", "bilinear", 2)
    encoder.compile(backend="eager")
    images = smooth_images(1, (64, 64))
    copied = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(outputs(copied, images).high_res, outputs(encoder, images).high_res)


@pytest.mark.parametrize("name", ["hub:{folder}/entry", "hub:owner/repo/entry?trust=true", "hf:owner/repo?trust=true"])
def test_a_checkpoint_runs_no_code_of_a_repository_unasked(name, tmp_path):
    (tmp_path / "hubconf.py").write_text("raise SystemExit('code ran')\n")
    save_checkpoint(create_encoder("toy-vit", "bilinear", 2), tmp_path / "last.pth")
    content = torch.load(tmp_path / "last.pth", weights_only=True)
    content["encoder"]["backbone"]["name"] = name.format(folder=tmp_path)
    torch.save(content, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match="whose repository would run code of its own; pass featurizer="):
        load_from_file(tmp_path / "last.pth")
    assert load_from_file(tmp_path / "last.pth", featurizer="toy-vit").factor == 2


def test_other_features_of_the_same_weights_are_refused(tmp_path):
    name = "timm:vit_tiny_patch16_224?pretrained=false&img_size=64"
    save_checkpoint(create_encoder(f"{name}&facet=key", "bilinear", 2), tmp_path / "last.pth")
    assert load_from_file(tmp_path / "last.pth").backbone.feature_options == {"facet": "key"}
    for other in (name, f"{name}&facet=key&layer=3"):
        with pytest.raises(BackboneMismatchError, match=r"features .* instead of {'facet': 'key'}"):
            load_from_file(tmp_path / "last.pth", featurizer=other)
