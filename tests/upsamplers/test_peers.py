"""NAF, LoftUp and UPLiFT against outputs of their published modules, and against stored ones of this package.

The first need files that do not come with the project. The second, ``peers.safetensors``, were computed by the code
that reproduced the first; weights are a formula of whole numbers. ``python tests/upsamplers/test_peers.py`` writes it
anew.
"""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featsharp import load_published
from featsharp.backbones import from_callable
from featsharp.ops.boxes import whole
from featsharp.upsamplers import create_upsampler

STORED = Path(__file__).with_name("peers.safetensors")
PLACES = [parent / "shared" / "data" / "peers" for parent in Path(__file__).resolve().parents]
PEERS = next((place for place in PLACES if place.is_dir()), PLACES[-1])
needs_peers = pytest.mark.skipif(
    not PEERS.is_dir(), reason="outputs of the published modules (shared/data) are not here"
)


# Outputs of the published modules -------------------------------------------------------------------------------------


def load_peer(name):
    """Tensors of a file, and an encoder of its weights for so many channels."""
    tensors = load_file(PEERS / f"{name}.safetensors")
    weights = {key.removeprefix("weights/"): x for key, x in tensors.items() if key.startswith("weights/")}

    def build(folder, channels, factor, *, published=True):
        save_file(weights, folder / "weights.safetensors")
        backbone = from_callable(
            torch.nn.Conv2d(3, channels, 8, stride=8), patch_size=8, embed_dim=channels, input_size=(64, 64)
        )
        return load_published(
            name, folder / "weights.safetensors", backbone, factor=factor, published=published
        ).upsampler

    return tensors, build


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


@needs_peers
@pytest.mark.parametrize(("part", "size"), [("", (20, 25)), ("alt_shrink/", (18, 31)), ("alt_enlarge/", (32, 27))])
@torch.no_grad()
def test_naf_as_published(part, size, tmp_path):
    """Ratios that are not whole, an image that is squashed, and one smaller than the output."""
    tensors, build = load_peer("naf")
    features, image = tensors[f"{part}features"], tensors[f"{part}image"]
    upsampler = build(tmp_path, features.shape[1], 2)
    if not part:
        close(upsampler.encode_image(image, size)[:1], tensors["mid/queries_after_rope_item0"])
    close(upsampler.upsample(features, image, size), tensors[f"{part}output"])
    ours = build(tmp_path, features.shape[1], 2, published=False).upsample(features, image, size)
    assert (ours - tensors[f"{part}output"]).abs().max() > 0.1, "published=True changes nothing"


@needs_peers
@torch.no_grad()
def test_loftup_as_published(tmp_path):
    tensors, build = load_peer("loftup")
    features, image, size = tensors["features"], tensors["image"], tuple(tensors["image"].shape[2:])
    upsampler = build(tmp_path, 40, 2)
    described = upsampler.describe(upsampler.stretch(image), whole(size), size)
    close(described, tensors["mid/fourier_features"])
    cells, tokens = upsampler.encode_cells(tensors["mid/fourier_features"]), upsampler.encode_tokens(features)
    close(cells, tensors["mid/first_conv"])
    close(tokens[..., 40:].transpose(1, 2), tensors["mid/lr_pe"].flatten(2))
    out = upsampler.gather(cells.flatten(2).transpose(1, 2), tokens)
    close(out.transpose(1, 2).unflatten(2, size), tensors["output"])
    close(upsampler.upsample(features, image, size), tensors["output"], 1e-2)
    close(upsampler.upsample(features[:1], image[:1], size), tensors["output_first_item_alone"], 1e-2)
    assert (tensors["output"][:1] - tensors["output_first_item_alone"]).abs().max() > 1
    # Ours is that of an image alone, whatever its batch.
    ours = build(tmp_path, 40, 2, published=False).upsample(features, image, size)
    close(ours[:1], tensors["output_first_item_alone"], 1e-2)
    close(upsampler.train().upsample(features, image, size), tensors["output_train_mode"], 1e-2)


@needs_peers
@pytest.mark.parametrize(
    ("part", "inputs", "factor", "size"),
    [
        ("", "", 4, None),
        ("alt_outsize/", "", 2, (13, 17)),
        ("alt_outsize_shrink/", "", 4, (9, 11)),
        ("alt_patch16/", "alt_patch16/", 8, None),
    ],
)
@torch.no_grad()
def test_uplift_as_published(part, inputs, factor, size, tmp_path):
    tensors, build = load_peer("uplift")
    features, image = tensors[f"{inputs}features"], tensors[f"{inputs}image"]
    upsampler = build(tmp_path, 96, factor)
    close(upsampler.upsample(features, image, size), tensors[f"{part}output"])
    ours = build(tmp_path, 96, factor, published=False).upsample(features, image, size)
    # Ours doubles as often as the size needs, here three times instead of once.
    assert ((ours - tensors[f"{part}output"]).abs().max() > 0.1) == (part == "alt_outsize/")
    if not part:
        guide = upsampler.encode_image(image, (3, 4), 2)[0]
        close(upsampler.weigh(features, guide, whole((6, 8))), tensors["mid/attender_weights_step_1"])
        close(upsampler.double_map(features, guide, whole((6, 8))), tensors["mid/step_1"])


# Outputs of this package ----------------------------------------------------------------------------------------------

# Name, options, channels, grid, pixels of the image, size of the output, tolerance.
CASES = {
    "naf": ("naf", {}, 6, (9, 10), (30, 20), (13, 15), 1e-4),
    "naf, published": ("naf", {"published": True}, 4, (9, 10), (54, 20), (13, 15), 1e-4),
    "loftup": ("loftup", {}, 8, (3, 2), (9, 11), (9, 11), 1e-2),
    "loftup, published": ("loftup", {"published": True}, 8, (3, 2), (9, 11), (9, 11), 1e-2),
    "uplift": ("uplift", {}, 6, (3, 2), (20, 30), (11, 7), 1e-4),
    "uplift, published": ("uplift", {"published": True}, 6, (3, 2), (24, 16), (11, 7), 1e-4),
}


class Width:
    """All that ``create_upsampler`` asks of a backbone."""

    def __init__(self, embed_dim):
        self.embed_dim = embed_dim


def formula(shape, seed):
    """Numbers from -1 to 1 in steps of 1 / 1001, by a quadratic formula of whole numbers."""
    count = torch.Size(shape).numel()
    place = torch.arange(count)
    return (((31 * place * place + 7919 * place + 104729 * seed) % 2003).float() / 1001 - 1).reshape(shape)


def set_weights(module):
    """Set all weights by the formula, to sizes that keep signals alive."""
    state = module.state_dict()
    for seed, (key, old) in enumerate(sorted(state.items())):
        x = formula(old.shape, seed)
        if key == "periods" or not old.is_floating_point():
            continue
        if key.endswith("running_var"):
            x = 1 + 0.5 * x
        elif old.ndim == 1:
            x = 0.3 * x + (1 if key.endswith("weight") else 0)
        elif not key.endswith("biases"):
            x = x * (3 / max(1, old[0].numel())) ** 0.5
        state[key] = x
    module.load_state_dict(state)
    return module.eval()


@torch.no_grad()
def compute(case):
    name, options, channels, grid, pixels, size, _ = CASES[case]
    upsampler = set_weights(create_upsampler(name, Width(channels), 2, options=options))
    features, image = formula((2, channels, *grid), 1), formula((2, 3, *pixels), 2)
    return {"features": features, "image": image, "output": upsampler.upsample(features, image, size)}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_as_stored(case):
    with safe_open(STORED, "pt") as file:
        stored = {key: file.get_tensor(f"{case}/{key}") for key in ("features", "image", "output")}
    computed = compute(case)
    for key in ("features", "image"):
        assert torch.equal(computed[key], stored[key]), key
    assert stored["output"].std() > 0.02
    close(computed["output"], stored["output"], CASES[case][-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_file({f"{case}/{key}": x.contiguous() for case in CASES for key, x in compute(case).items()}, STORED)
