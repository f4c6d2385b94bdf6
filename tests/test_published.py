"""Files in the layout of the authors, with random tensors, against functional code written from the papers' formulas.

Nothing of the package computes what is expected here; names and shapes of tensors are those of the published files.
"""

import hashlib
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import featsharp
from featsharp import load_from_file, load_published, save_checkpoint
from featsharp.backbones import from_callable
from featsharp.errors import BackboneMismatchError, CheckpointError, ConfigError
from featsharp.weights.published import PUBLISHED, PublishedFile, fetch_published

CHANNELS, PATCH = 8, 4


def backbone(channels=CHANNELS, patch=PATCH):
    """Patches in random directions."""
    generator = torch.Generator().manual_seed(5)
    embed = torch.nn.Conv2d(3, channels, patch, stride=patch)
    with torch.no_grad():
        for parameter in embed.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / patch)
    return from_callable(embed, patch_size=patch, embed_dim=channels, input_size=(8 * patch, 8 * patch))


def random_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random tensors of a size that keeps signals alive; norms near 1."""
    state = {}
    for key, shape in shapes.items():
        fan_in = math.prod(shape[1:]) or 1
        state[key] = torch.randn(shape) / math.sqrt(fan_in) if len(shape) > 1 else 0.3 * torch.randn(shape)
        if len(shape) == 1 and key.endswith("weight"):
            state[key] = 1 + state[key]
    return state


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


# FeatUp ---------------------------------------------------------------------------------------------------------------


def featup_shapes(channels=CHANNELS, *, norm=False):
    shapes = {}
    for n in range(1, 5):
        shapes |= {
            f"upsampler.up{n}.range_temp": (),
            f"upsampler.up{n}.sigma_spatial": (),
            f"upsampler.up{n}.range_proj.0.weight": (32, 3, 1, 1),
            f"upsampler.up{n}.range_proj.0.bias": (32,),
            f"upsampler.up{n}.range_proj.3.weight": (32, 32, 1, 1),
            f"upsampler.up{n}.range_proj.3.bias": (32,),
            f"upsampler.up{n}.fixup_proj.0.weight": (49, 52, 1, 1),
            f"upsampler.up{n}.fixup_proj.0.bias": (49,),
            f"upsampler.up{n}.fixup_proj.3.weight": (49, 49, 1, 1),
            f"upsampler.up{n}.fixup_proj.3.bias": (49,),
        }
    shapes |= {"upsampler.fixup_proj.1.weight": (channels, channels, 1, 1), "upsampler.fixup_proj.1.bias": (channels,)}
    if norm:
        shapes |= {"model.1.norm.weight": (channels,), "model.1.norm.bias": (channels,)}
    return shapes


def featup_state(sigma=(1.0, -0.5, 0.12, 0.3), **options):
    state = random_state(featup_shapes(**options))
    for n, value in enumerate(sigma, 1):
        state[f"upsampler.up{n}.sigma_spatial"] = torch.tensor(value)
    return state


def featup_oracle(state, features, image, levels, *, final):
    """Dropout off; the product of kernels as published, over a sum of at least 1e-7."""
    steps = [i / 3 for i in range(-3, 4)]
    squared = torch.tensor([y * y + x * x for y in steps for x in steps])
    x = features
    for n in range(1, levels + 1):
        part = {key.removeprefix(f"upsampler.up{n}."): value for key, value in state.items()}
        size = (2 * x.shape[2], 2 * x.shape[3])
        guidance = F.adaptive_avg_pool2d(image, size)
        key = F.gelu(F.conv2d(guidance, part["range_proj.0.weight"], part["range_proj.0.bias"]))
        key = F.conv2d(key, part["range_proj.3.weight"], part["range_proj.3.bias"])
        around = F.unfold(F.pad(key, (3, 3, 3, 3), mode="reflect"), 7).reshape(len(key), 32, 49, *size)
        temperature = part["range_temp"].exp().clamp(1e-4, 1e4)
        range_kernel = (temperature * torch.einsum("bdphw,bdhw->bphw", around, key)).softmax(1)
        spatial_kernel = torch.exp(-squared / (2 * part["sigma_spatial"] ** 2))
        kernel = range_kernel * spatial_kernel[None, :, None, None]
        kernel = kernel / kernel.sum(1, keepdim=True).clamp(min=1e-7)
        fixup = F.conv2d(torch.cat([kernel, guidance], 1), part["fixup_proj.0.weight"], part["fixup_proj.0.bias"])
        fixup = F.conv2d(F.gelu(fixup), part["fixup_proj.3.weight"], part["fixup_proj.3.bias"])
        kernel = kernel + 0.1 * fixup
        value = F.interpolate(x, size, mode="bicubic", align_corners=False)
        value = F.unfold(F.pad(value, (3, 3, 3, 3), mode="reflect"), 7).reshape(len(x), -1, 49, *size)
        x = torch.einsum("bphw,bcphw->bchw", kernel, value)
    if final:
        x = x + 0.1 * F.conv2d(x, state["upsampler.fixup_proj.1.weight"], state["upsampler.fixup_proj.1.bias"])
    return x


def lightning(state):
    """What Lightning writes beside the tensors: numbers, names, an optimiser."""
    rest = {
        "model.0.blocks.0.attn.qkv.weight": torch.zeros(3),
        "downsampler.kernel": torch.zeros(2),
        "scale_net.net.0.weight": torch.zeros(2),
    }
    return {
        "epoch": 1,
        "global_step": 2000,
        "pytorch-lightning_version": "2.0.2",
        "state_dict": state | rest,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_model_score": None}},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"model_type": "dino16", "n_jitters": 5, "spectral": [0.1], "chkpt_dir": None},
    }


def test_the_layout_of_featup_has_the_published_number_of_parameters():
    assert count(featup_shapes(384)) == 24_932 + 384**2 + 384 == 4 * 6233 + 384**2 + 384


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("factor", "final_fixup", "final"), [(None, None, True), (2, None, False), (8, True, True), (16, False, False)]
)
def test_featup(tmp_path, factor, final_fixup, final, norm):
    state = featup_state(norm=norm)
    torch.save(lightning(state), tmp_path / "stack.ckpt")
    encoder = load_published("featup", tmp_path / "stack.ckpt", backbone(), factor=factor, final_fixup=final_fixup)
    image = torch.randn(2, 3, 5 * PATCH, 4 * PATCH)
    features = encoder.backbone(image).features
    if norm:
        features = F.layer_norm(
            features.movedim(1, 3), (CHANNELS,), state["model.1.norm.weight"], state["model.1.norm.bias"]
        ).movedim(3, 1)
    with torch.no_grad():
        out = encoder(image)
    levels = int(math.log2(factor or 16))
    expected = featup_oracle(state, features, image, levels, final=final)
    assert out.high_res.shape == (2, CHANNELS, 5 * 2**levels, 4 * 2**levels)
    torch.testing.assert_close(out.low_res, features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.high_res, expected, atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_an_encoder_of_featup_is_for_one_factor_of_its_levels(tmp_path):
    torch.save(featup_state(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="4 levels of 2x, used from the first; got factor 6, use 4"):
        load_published("featup", tmp_path / "a.pth", backbone(), factor=6)
    with pytest.raises(ConfigError, match="final_fixup= is for 'featup' only; leave it out for 'lift'"):
        load_published("lift", tmp_path / "a.pth", backbone(), final_fixup=True)


# JAFAR and AnyUp ------------------------------------------------------------------------------------------------------


def encoder_shapes(name, channels, kernel=1, layer="block.{}"):
    """A convolution without bias and two residual blocks."""
    shapes = {f"{name}.0.weight": (128, channels, kernel, kernel)} if channels else {}
    for block in (1, 2):
        for place in (0, 2, 3, 5):
            prefix = f"{name}.{block}.{layer.format(place)}"
            if place in (0, 3):
                shapes |= {f"{prefix}.weight": (128,), f"{prefix}.bias": (128,)}
            else:
                shapes[f"{prefix}.weight"] = (128, 128, 1, 1)
    return shapes


CROSS = "cross_decode.cross_attn."


def jafar_shapes(channels=CHANNELS, kernel=1, *, packed=False, **options):
    shapes = {
        **encoder_shapes("image_encoder", 3, kernel, **options),
        **encoder_shapes("key_encoder", 128, **options),
        **encoder_shapes("query_encoder", 128, **options),
        **encoder_shapes("key_features_encoder", channels, **options),
        f"{CROSS}norm_q.weight": (128,),
        f"{CROSS}norm_k.weight": (128,),
        f"{CROSS}norm_v.weight": (channels,),
        f"{CROSS}attention.in_proj_bias": (384,),
        f"{CROSS}attention.out_proj.weight": (128, 128),
        f"{CROSS}attention.out_proj.bias": (128,),
        "cross_decode.conv2d.weight": (128, 128, 3, 3),
        "sft_key.gamma.weight": (128, 128, 1, 1),
        "sft_key.beta.weight": (128, 128, 1, 1),
        "rope.freqs": (2, 128),
    }
    if packed:
        return shapes | {f"{CROSS}attention.in_proj_weight": (384, 128)}
    return shapes | {
        f"{CROSS}attention.q_proj_weight": (128, 128),
        f"{CROSS}attention.k_proj_weight": (128, 128),
        f"{CROSS}attention.v_proj_weight": (128, channels),
    }


def anyup_shapes():
    return {
        **encoder_shapes("image_encoder", 3),
        **encoder_shapes("key_encoder", 128),
        **encoder_shapes("query_encoder", 128),
        "key_features_encoder.0.basis": (128, 1, 5, 5),
        **encoder_shapes("key_features_encoder", 0),
        **encoder_shapes("aggregation", 256, 3),
        f"{CROSS}norm_q.weight": (128,),
        f"{CROSS}norm_k.weight": (128,),
        f"{CROSS}attention.in_proj_weight": (384, 128),
        f"{CROSS}attention.in_proj_bias": (384,),
        f"{CROSS}attention.out_proj.weight": (128, 128),
        f"{CROSS}attention.out_proj.bias": (128,),
        "cross_decode.conv2d.weight": (128, 128, 3, 3),
        "rope.freqs": (2, 128),
    }


def encode_oracle(state, name, x):
    """The layers of an encoder in the order of the file; group norms of 8 groups."""
    if f"{name}.0.weight" in state:
        weight = state[f"{name}.0.weight"]
        pad = weight.shape[-1] // 2
        x = F.conv2d(F.pad(x, (pad, pad, pad, pad), mode="reflect") if pad else x, weight)
    for block in (1, 2):
        keys = [key for key in state if key.startswith(f"{name}.{block}.")]
        norm_1, bias_1, conv_1, norm_2, bias_2, conv_2 = (state[key] for key in keys)
        y = F.conv2d(F.silu(F.group_norm(x, 8, norm_1, bias_1)), conv_1)
        x = x + F.conv2d(F.silu(F.group_norm(y, 8, norm_2, bias_2)), conv_2)
    return x


def rope_oracle(freqs, x):
    """Channel i with i + 64, each turned by its own angle; coordinates 0 to 1 with both ends."""
    height, width = x.shape[-2:]
    out = torch.zeros_like(x)
    for row in range(height):
        for col in range(width):
            angle = row / max(1, height - 1) * freqs[0] + col / max(1, width - 1) * freqs[1]
            cos, sin = angle.cos(), angle.sin()
            a, b = x[:, :64, row, col], x[:, 64:, row, col]
            out[:, :64, row, col] = a * cos[:64] - b * sin[:64]
            out[:, 64:, row, col] = b * cos[64:] + a * sin[64:]
    return out


def attend_oracle(state, query, key, value, allowed=None):
    """Maps [B, 128, H, W], [B, 128, h, w] and [B, C, h, w]; weights averaged over 4 heads, raw values."""
    eps = torch.finfo(torch.float32).eps
    projected = []
    for x, part in ((query, "q"), (key, "k")):
        x = x.flatten(2).transpose(1, 2)
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * state[f"{CROSS}norm_{part}.weight"]
        at = "qkv".index(part)
        if f"{CROSS}attention.in_proj_weight" in state:
            weight = state[f"{CROSS}attention.in_proj_weight"][128 * at : 128 * at + 128]
        else:
            weight = state[f"{CROSS}attention.{part}_proj_weight"]
        x = x @ weight.T + state[f"{CROSS}attention.in_proj_bias"][128 * at : 128 * at + 128]
        projected.append(x.reshape(*x.shape[:2], 4, 32))
    scores = torch.einsum("bqnd,bknd->bnqk", *projected) / math.sqrt(32)
    if allowed is not None:
        scores = torch.where(allowed, scores, -torch.inf)
    out = torch.einsum("bqk,bck->bcq", scores.softmax(-1).mean(1), value.flatten(2))
    return out.unflatten(2, query.shape[2:])


def jafar_oracle(state, features, image, size):
    encoded = rope_oracle(state["rope.freqs"], encode_oracle(state, "image_encoder", image))
    query = F.group_norm(F.adaptive_avg_pool2d(encode_oracle(state, "query_encoder", encoded), size), 8)
    query = F.conv2d(query, state["cross_decode.conv2d.weight"], padding=1)
    key = F.group_norm(F.adaptive_avg_pool2d(encode_oracle(state, "key_encoder", encoded), features.shape[2:]), 8)
    code = encode_oracle(state, "key_features_encoder", features / features.norm(dim=1, keepdim=True))
    key = F.conv2d(code, state["sft_key.gamma.weight"]) * key + F.conv2d(code, state["sft_key.beta.weight"])
    return attend_oracle(state, query, key, features)


def clipped_windows(places, cells):
    """[places, cells]: floor and ceiling of the window of a tenth to each side, clipped to the image."""
    rows = []
    for place in range(places):
        centre = Fraction(2 * place + 1, 2 * places)
        low, high = max(Fraction(0), centre - Fraction(1, 10)), min(Fraction(1), centre + Fraction(1, 10))
        rows.append([math.floor(low * cells) <= cell < math.ceil(high * cells) for cell in range(cells)])
    return torch.tensor(rows)


def anyup_oracle(state, features, image, size):
    encoded = rope_oracle(state["rope.freqs"], encode_oracle(state, "image_encoder", image))
    query = F.adaptive_avg_pool2d(encode_oracle(state, "query_encoder", encoded), size)
    query = F.conv2d(query, state["cross_decode.conv2d.weight"], padding=1)
    grid = tuple(features.shape[2:])
    image_key = F.adaptive_avg_pool2d(encode_oracle(state, "key_encoder", encoded), grid)
    basis, unit = state["key_features_encoder.0.basis"], features / features.norm(dim=1, keepdim=True)
    taps = F.conv2d(torch.ones(1, 1, *grid), torch.ones(1, 1, 5, 5), padding=2)
    assert taps[0, 0, 0, 0] == 9
    answers = [(F.conv2d(unit[:, c : c + 1], basis, padding=2) / taps).softmax(1) for c in range(unit.shape[1])]
    code = encode_oracle(state, "key_features_encoder", torch.stack(answers).mean(0))
    key = encode_oracle(state, "aggregation", torch.cat([image_key, code], 1))
    rows, cols = clipped_windows(size[0], grid[0]), clipped_windows(size[1], grid[1])
    allowed = torch.einsum("ah,bw->abhw", rows.float(), cols.float()).flatten(2).flatten(0, 1) > 0
    return attend_oracle(state, query, key, features, allowed)


def test_the_layouts_of_jafar_and_anyup_have_the_published_number_of_parameters():
    published = {384: 631_552, 768: 730_240, 1024: 796_032, 1152: 828_928}
    assert {channels: count(jafar_shapes(channels, 3)) for channels in published} == published
    assert count(anyup_shapes()) == 878_080


@pytest.mark.parametrize(
    ("channels", "kernel", "options"),
    [
        (CHANNELS, 1, {}),
        (CHANNELS, 3, {}),
        (128, 1, {"packed": True}),
        (CHANNELS, 1, {"layer": "layers.1.{}.inner"}),
    ],
)
def test_jafar(tmp_path, channels, kernel, options):
    state = random_state(jafar_shapes(channels, kernel, **options))
    torch.save({"jafar": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "jafar.pth")
    encoder = load_published("jafar", tmp_path / "jafar.pth", backbone(channels), factor=1.5)
    image = torch.randn(1, 3, 3 * PATCH, 5 * PATCH)
    features = encoder.backbone(image).features
    with torch.no_grad():
        out = encoder(image).high_res
    size = (5, 8)
    if kernel == 3:  # FeatSharp's copy
        image = F.interpolate(image, (10, 16), mode="bilinear", antialias=True)
    torch.testing.assert_close(out, jafar_oracle(state, features, image, size), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("channels", [CHANNELS, 11])
def test_anyup(tmp_path, channels):
    state = random_state(anyup_shapes())
    torch.save(state, tmp_path / "anyup.pth")
    encoder = load_published("anyup", tmp_path / "anyup.pth", backbone(channels), factor=1.5)
    image = torch.randn(1, 3, 3 * PATCH + 1, 4 * PATCH + 1)
    with torch.no_grad():
        out = encoder(image)
    assert out.low_res.shape == (1, channels, 3, 4)
    assert out.high_res.shape == (1, channels, 5, 6)
    expected = anyup_oracle(state, out.low_res, image, (5, 6))
    torch.testing.assert_close(out.high_res, expected, atol=1e-4, rtol=1e-4)
    # Few cells make windows that are mostly all of the map; one more with many.
    features, image = torch.randn(1, channels, 23, 12), torch.randn(1, 3, 30, 25)
    with torch.no_grad():
        out = encoder.upsampler.upsample(features, image, (31, 24))
    torch.testing.assert_close(out, anyup_oracle(state, features, image, (31, 24)), atol=1e-4, rtol=1e-4)


def test_without_a_factor_there_is_a_feature_for_every_pixel(tmp_path):
    torch.save(random_state(anyup_shapes()), tmp_path / "anyup.pth")
    assert load_published("anyup", tmp_path / "anyup.pth", backbone()).factor == PATCH


# LiFT -----------------------------------------------------------------------------------------------------------------


def lift_shapes(channels=CHANNELS):
    def norm(name, width):
        parts = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (width,))
        return {f"{name}.{part}": shape for part, shape in parts.items()}

    joined, half = (channels + 32) // 2, channels // 2
    return {
        "up1.up.weight": (channels + 32, joined, 2, 2),
        "up1.up.bias": (joined,),
        "up1.conv_1.double_conv.0.weight": (half, joined + 32, 3, 3),
        **norm("up1.conv_1.double_conv.1", half),
        "up1.conv_1.double_conv.3.weight": (half, half, 3, 3),
        **norm("up1.conv_1.double_conv.4", half),
        "outc.weight": (channels, half, 1, 1),
        "outc.bias": (channels,),
        "image_convs_1.0.weight": (32, 3, 3, 3),
        "image_convs_1.0.bias": (32,),
        **norm("image_convs_1.1", 32),
        "image_convs_1.3.weight": (32, 32, 3, 3),
        "image_convs_1.3.bias": (32,),
        **norm("image_convs_1.4", 32),
        "image_convs_2.0.weight": (32, 32, 3, 3),
        "image_convs_2.0.bias": (32,),
        **norm("image_convs_2.1", 32),
    }


def lift_state(channels=CHANNELS):
    state = random_state(lift_shapes(channels))
    for key in [key for key in state if key.endswith("running_var")]:
        state[key] = state[key].square() + 0.5
        state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(100)
    return state


def lift_oracle(state, features, image, patch):
    def norm_relu(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        return (x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]).clamp(min=0)

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=1, **options)

    fine = norm_relu(conv(image, "image_convs_1.0", stride=2), "image_convs_1.1")
    fine = norm_relu(conv(fine, "image_convs_1.3", stride=2), "image_convs_1.4")
    if patch == 16:
        fine = F.max_pool2d(fine, 2)
    coarse = norm_relu(conv(fine, "image_convs_2.0", stride=2), "image_convs_2.1")
    x = torch.cat([features, coarse], 1)
    x = F.conv_transpose2d(x, state["up1.up.weight"], state["up1.up.bias"], stride=2)
    x = torch.cat([x, fine], 1)
    for place in (0, 3):
        name = "up1.conv_1.double_conv"
        x = norm_relu(conv(x, f"{name}.{place}"), f"{name}.{place + 1}")
    return F.conv2d(x, state["outc.weight"], state["outc.bias"])


def test_the_layout_of_lift_has_the_published_number_of_parameters():
    learned = {key: shape for key, shape in lift_shapes(384).items() if "running" not in key}
    assert count(learned) == 1_187_280


@pytest.mark.parametrize("patch", [8, 16])
def test_lift(tmp_path, patch):
    state = lift_state()
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "lift.pth")
    encoder = load_published("lift", tmp_path / "lift.pth", backbone(patch=patch))
    image = torch.randn(2, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        out = encoder(image)
    expected = lift_oracle(state, out.low_res, image, patch)
    assert out.high_res.shape == (2, CHANNELS, 6, 10)
    torch.testing.assert_close(out.high_res, expected, atol=1e-4, rtol=1e-4)
    again = load_published("lift", tmp_path / "lift.pth", backbone(patch=patch), factor=4)
    doubled = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(
            again(image).high_res, lift_oracle(state, expected, doubled, patch), atol=1e-4, rtol=1e-4
        )


# NAF, LoftUp and UPLiFT; outputs are tested in tests/upsamplers/test_peers.py -----------------------------------------


def batch_norm(name, width):
    shapes = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def naf_shapes():
    shapes = {"image_encoder.rope.periods": (16,)}
    for name, side in (("encoder", 1), ("sem_encoder", 3)):
        shapes |= affine(f"image_encoder.{name}.0", 128, 3, side, side)
        for block in (1, 2):
            for part in (1, 2):
                shapes |= affine(f"image_encoder.{name}.{block}.norm{part}", 128)
                shapes |= affine(f"image_encoder.{name}.{block}.conv{part}", 128, 128, side, side)
    return shapes


def loftup_shapes(channels=CHANNELS):
    width = channels + 20
    shapes = {
        **affine("channelnorm.norm", channels),
        "upsampler.lr_pe.biases": (2, 2, 5),
        "upsampler.fourier_feat.1.biases": (2, 5, 20),
        **affine("upsampler.first_conv.0.norm", 203),
        **affine("upsampler.first_conv.1", width, 203, 3, 3),
        **batch_norm("upsampler.first_conv.2", width),
        **affine("upsampler.first_conv.4", width, width, 3, 3),
        **batch_norm("upsampler.first_conv.5", width),
        **affine("upsampler.final_conv.0", channels, width, 1, 1),
        **affine("upsampler.final_conv.1", channels),
        **affine("upsampler.ca_transformer.norm", width),
    }
    for n in (0, 1):
        layer = f"upsampler.ca_transformer.layers.{n}"
        shapes |= {
            **affine(f"{layer}.0.norm_q", width),
            **affine(f"{layer}.0.norm_kv", width),
            f"{layer}.0.attention.in_proj_weight": (3 * width, width),
            f"{layer}.0.attention.in_proj_bias": (3 * width,),
            **affine(f"{layer}.0.attention.out_proj", width, width),
            **affine(f"{layer}.1.net.0", width),
            **affine(f"{layer}.1.net.1", channels, width),
            **affine(f"{layer}.1.net.4", width, channels),
        }
    return shapes


def uplift_shapes(channels=CHANNELS):
    shapes, inputs = {}, 3
    for n, width in enumerate((16, 32, 64, 128, 128)):
        block = f"encoder.block_{n}.blocks.0.conv"
        shapes |= {f"{block}.0.weight": (width, inputs, 3, 3), **batch_norm(f"{block}.1", width)}
        shapes |= affine(f"{block}.3", width, width, 1, 1)
        inputs = width
    for n, inputs in enumerate((channels + 128, 192)):
        block = f"decoder.block_{n}.blocks.0.conv"
        shapes |= {f"{block}.0.weight": (64, inputs, 3, 3), **batch_norm(f"{block}.1", 64)}
        shapes |= {f"{block}.3.weight": (64, 64, 3, 3), **batch_norm(f"{block}.4", 64)}
        shapes |= affine(f"{block}.6", 64, 64, 1, 1)
    shapes |= {"decoder.up_1.up.weight": (64, 64, 2, 2), "decoder.up_1.up.bias": (64,)}
    return shapes | affine("attender.conv1", 17, 64, 1, 1)


def counted_state(shapes):
    """Random tensors, with variances above zero and counters of batches."""
    state = random_state(shapes)
    for key in state:
        if key.endswith("running_var"):
            state[key] = state[key].square() + 0.5
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(100)
    return state


@pytest.mark.parametrize(
    ("shapes", "tensors", "parameters"),
    [
        (naf_shapes(), 37, 662_528 + 16),
        (loftup_shapes(384), 54, 4_303_894),
        (uplift_shapes(384), 72, 789_521),
    ],
)
def test_the_layouts_of_the_peers_are_the_published_ones(shapes, tensors, parameters):
    assert len(shapes) == tensors
    learned = {key: shape for key, shape in shapes.items() if "running" not in key and "batches" not in key}
    assert count(learned) == parameters


def test_checkpoints_of_loftups_training(tmp_path):
    """With the backbone and what computes losses, and the channel norm under another name."""
    state = STATES["loftup"]()
    torch.save(state, tmp_path / "hub.bin")
    training = {key.replace("channelnorm.norm", "model.1.norm"): value for key, value in state.items()}
    training |= {"model.0.blocks.0.weight": torch.zeros(2), "downsampler.kernel": torch.zeros(3)}
    torch.save({"state_dict": training}, tmp_path / "last.ckpt")
    first, second = (load_published("loftup", tmp_path / name, backbone()) for name in ("hub.bin", "last.ckpt"))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    inner = {key.removeprefix("upsampler."): value for key, value in state.items() if "channelnorm" not in key}
    torch.save(inner, tmp_path / "inner.bin")
    with pytest.raises(CheckpointError, match=r"lacks channelnorm\.norm\.bias, channelnorm\.norm\.weight; is it"):
        load_published("loftup", tmp_path / "inner.bin", backbone())


def test_counters_that_were_cast_with_the_weights(tmp_path):
    state = {key: value.float() for key, value in STATES["uplift"]().items()}
    torch.save(state, tmp_path / "a.pth")
    loaded = load_published("uplift", tmp_path / "a.pth", backbone()).state_dict()
    assert {x.dtype for key, x in loaded.items() if key.endswith("num_batches_tracked")} == {torch.int64}


def test_results_as_published_are_asked_for(tmp_path):
    torch.save(STATES["uplift"](), tmp_path / "a.pth")
    ours = load_published("uplift", tmp_path / "a.pth", backbone())
    published = load_published("uplift", tmp_path / "a.pth", backbone(), published=True)
    assert (ours.factor, ours.upsampler.published) == (PATCH, False)
    assert (published.factor, published.upsampler.published) == (16, True)
    with pytest.raises(ConfigError, match="published= is for 'naf', 'loftup', 'uplift' only; leave it out for 'lift'"):
        load_published("lift", tmp_path / "a.pth", backbone(), published=True)


def test_a_file_that_is_fetched_keeps_the_hash_that_it_came_with(tmp_path, caplog):
    torch.save(STATES["naf"](), tmp_path / "there.pth")
    file = PublishedFile("naf", (tmp_path / "there.pth").as_uri(), "Apache-2.0", "any", "me")
    with caplog.at_level("WARNING"):
        path = fetch_published("name", file, tmp_path / "cache")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.read_bytes() == (tmp_path / "there.pth").read_bytes()
    # Licence and authors are said first, the hash when it is known.
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("name: weights by me for backbone any, licence Apache-2.0, from file:")
    assert said[1] == f"name: sha256 {digest} (recorded now: nobody has stated one)"
    caplog.clear()
    (tmp_path / "there.pth").unlink()
    assert fetch_published("name", file, tmp_path / "cache") == path  # nothing is fetched again
    assert not caplog.text
    load_published("naf", path, backbone())
    path.write_bytes(b"changed")
    record = tmp_path / "cache" / "name.sha256"
    with pytest.raises(
        CheckpointError, match=rf"has sha256 .* instead of {digest}; .* delete it and its record {record}$"
    ):
        fetch_published("name", file, tmp_path / "cache")
    # What was there without a record is recorded when it is used.
    record.unlink()
    caplog.clear()
    assert fetch_published("name", file, tmp_path / "cache") == path
    changed = hashlib.sha256(b"changed").hexdigest()
    assert record.read_text(encoding="ascii").strip() == changed
    assert [x.getMessage() for x in caplog.records] == [f"name: sha256 {changed} (recorded now: nobody has stated one)"]
    stated = replace(file, sha256=digest)
    with pytest.raises(CheckpointError, match=rf"has sha256 {changed} instead of {digest}; .* delete it$"):
        fetch_published("name", stated, tmp_path / "cache")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot fetch file:.* give its path"):
        fetch_published("name", file, tmp_path / "cache")
    # What comes anew has to be what came first.
    (tmp_path / "there.pth").write_bytes(b"other")
    with pytest.raises(
        CheckpointError, match=rf"there.pth has sha256 .* instead of {changed}; .*delete the record {record}$"
    ):
        fetch_published("name", file, tmp_path / "cache")
    assert [x.name for x in (tmp_path / "cache").iterdir()] == ["name.sha256"]
    # Where no record can be written the file is used all the same.
    record.unlink()
    record.mkdir()
    caplog.clear()
    assert fetch_published("name", file, tmp_path / "cache").read_bytes() == b"other"
    assert "is not recorded: cannot write" in caplog.text


def test_names_of_published_files(tmp_path, monkeypatch):
    for name, file in PUBLISHED.items():
        assert file.address.startswith("https://"), name
        assert file.licence, name
    with pytest.raises(ConfigError, match="naf_release has weights of kind 'naf'; got 'loftup', use 'naf'"):
        load_published("loftup", "naf_release", backbone())
    # A name is looked for in the cache, and a file of the current folder comes before it.
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    torch.save(STATES["naf"](), tmp_path / "naf_release")
    (tmp_path / "cache" / "published").mkdir(parents=True)
    (tmp_path / "naf_release").rename(tmp_path / "cache" / "published" / "naf_release")
    assert load_published("naf", "naf_release", backbone()).factor == PATCH
    monkeypatch.chdir(tmp_path)
    (tmp_path / "naf_release").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        load_published("naf", "naf_release", backbone())


# Files ----------------------------------------------------------------------------------------------------------------

STATES = {
    "featup": lambda: featup_state(norm=True),
    "lift": lift_state,
    "jafar": lambda: random_state(jafar_shapes()),
    "anyup": lambda: random_state(anyup_shapes()),
    "naf": lambda: random_state(naf_shapes()),
    "loftup": lambda: counted_state(loftup_shapes()),
    "uplift": lambda: counted_state(uplift_shapes()),
}
PATCH_OF = {"lift": 8}


@pytest.mark.parametrize("kind", STATES)
def test_an_encoder_is_written_and_read_as_one_of_ours(kind, tmp_path):
    given = backbone(patch=PATCH_OF.get(kind, PATCH))
    torch.save(STATES[kind](), tmp_path / "published.pth")
    encoder = load_published(kind, tmp_path / "published.pth", given, factor=2)
    save_checkpoint(encoder, tmp_path / "ours.pth")
    again = load_from_file(tmp_path / "ours.pth", featurizer=given)
    image = torch.randn(1, 3, 3 * given.patch_size, 4 * given.patch_size)
    with torch.no_grad():
        assert torch.equal(encoder(image).high_res, again(image).high_res)


@pytest.mark.parametrize("kind", STATES)
def test_safetensors_files_are_the_same(kind, tmp_path):
    state, given = STATES[kind](), backbone(patch=PATCH_OF.get(kind, PATCH))
    torch.save(state, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    first, second = (load_published(kind, tmp_path / name, given, factor=2) for name in ("a.pth", "a.safetensors"))
    assert first.recipe == second.recipe
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


LARGE = ("jafar", "anyup", "naf", "loftup", "uplift")  # have many tensors


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in LARGE else []) for kind in STATES]
)
def test_every_tensor_has_to_fit(kind, tmp_path):
    given, file = backbone(patch=PATCH_OF.get(kind, PATCH)), tmp_path / "a.pth"
    state = STATES[kind]()
    dead = {f"{CROSS}norm_v.weight", f"{CROSS}attention.v_proj_weight"}
    dead |= {f"{CROSS}attention.out_proj.{leaf}" for leaf in ("weight", "bias")}
    for key in [key for key in state if key not in dead]:
        torch.save({name: value for name, value in state.items() if name != key}, file)
        with pytest.raises(CheckpointError, match="lacks"):
            load_published(kind, file, given)
    key = {
        "featup": "upsampler.up2.range_temp",
        "lift": "outc.bias",
        "naf": "image_encoder.rope.periods",
        "loftup": "upsampler.lr_pe.biases",
        "uplift": "attender.conv1.bias",
    }.get(kind, "rope.freqs")
    torch.save({name: value for name, value in state.items() if name != key}, file)
    with pytest.raises(CheckpointError, match=f"lacks {key}; is it a file of this kind"):
        load_published(kind, file, given)
    torch.save(state | {"extra.weight": torch.zeros(2), "also": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"has unknown also, extra\.weight; is it"):
        load_published(kind, file, given)
    key = next(reversed([key for key in state if key not in dead and "in_proj" not in key and "outc" not in key]))
    torch.save(state | {key: torch.zeros(3, 1)}, file)
    with pytest.raises(CheckpointError, match=r"has other shapes: .* \(3, 1\) instead of"):
        load_published(kind, file, given)


def test_dead_projections_may_be_there_or_not(tmp_path):
    state = random_state(jafar_shapes())
    for key in [key for key in state if "norm_v" in key or "out_proj" in key or "v_proj" in key]:
        del state[key]
    torch.save(state, tmp_path / "a.pth")
    load_published("jafar", tmp_path / "a.pth", backbone(), factor=2)


@pytest.mark.parametrize(
    ("kind", "state"),
    [
        ("featup", featup_state),
        ("lift", lift_state),
        *((k, lambda k=k: STATES[k]()) for k in ("jafar", "loftup", "uplift")),
    ],
)
def test_weights_for_another_width(kind, state, tmp_path):
    torch.save(state(), tmp_path / "a.pth")
    with pytest.raises(BackboneMismatchError, match=r"for features of 8 channels, but backbone .* has 12"):
        load_published(kind, tmp_path / "a.pth", backbone(12, 8))


class Settings:
    """Stands for a class of the authors."""


def test_files_that_could_run_code_are_refused_with_a_way_out(tmp_path):
    torch.save(lightning(featup_state()) | {"hyper_parameters": Settings()}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"could run code \(.*Settings\).*weights_only=False\)\['state_dict'\]"):
        load_published("featup", tmp_path / "a.ckpt", backbone())


def test_files_that_are_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no file .*none\.pth; get it from the authors"):
        load_published("lift", tmp_path / "none.pth", backbone())
    with pytest.raises(
        CheckpointError, match=r"no file anyup_papr \(did you mean 'anyup_paper'\?\); .*: anyup_paper, anyup"
    ):
        load_published("anyup", "anyup_papr", backbone())
    with pytest.raises(
        CheckpointError, match=r"anyup_paper is no checkpoint .*load_published\('anyup', 'anyup_paper', BA"
    ):
        load_from_file("anyup_paper", featurizer="toy-vit")
    for name in ("a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match=r"damaged|truncated"):
            load_published("lift", tmp_path / name, backbone())
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no state dict; got list"):
        load_published("lift", tmp_path / "list.pth", backbone())
    torch.save({"outc.bias": torch.zeros(3), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(CheckpointError, match="no state dict: epoch is no tensor"):
        load_published("lift", tmp_path / "mixed.pth", backbone())
    torch.save(lift_state() | {"outc.bias": torch.full((CHANNELS,), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match="NaN"):
        load_published("lift", tmp_path / "nan.pth", backbone(patch=8))


def test_unknown_kind(tmp_path):
    with pytest.raises(ConfigError, match="unknown kind of published weights 'jaffar'; did you mean 'jafar'"):
        load_published("jaffar", tmp_path / "a.pth", backbone())


def test_it_is_public():
    assert featsharp.load_published is load_published
