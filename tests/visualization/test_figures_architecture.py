"""The diagram in the docs says the shapes that the code has."""

import re
from pathlib import Path
from xml.etree import ElementTree

import torch

from featsharp.builder import create_encoder

DIAGRAM = Path(__file__).resolve().parents[2] / "docs" / "assets" / "architecture.svg"
B, F, C, H, W, P = 3, 2, 32, 6, 10, 8


def stated_shapes() -> dict[str, tuple[int, ...]]:
    """By what the diagram says it is about, with the symbols replaced by numbers."""
    symbols = {"B": B, "f": F, "C": C, "h": H, "w": W, "p": P}
    found = {}
    for text in ElementTree.parse(DIAGRAM).iter("{http://www.w3.org/2000/svg}text"):
        if "data-of" in text.attrib:
            code = text.text.replace("\u00b2", "**2")
            code = re.sub(r"(?<=[A-Za-z0-9)])(?=[A-Za-z(])", "*", code)  # products are written without a sign
            found[text.attrib["data-of"]] = tuple(eval(code, {}, symbols))
    return found


def real_shapes() -> dict[str, tuple[int, ...]]:
    """Of an encoder at work."""
    encoder = create_encoder("toy-vit", "featsharp", F, bias_buffer=True)
    found: dict[str, tuple[int, ...]] = {}
    for name, module in encoder.named_modules():
        module.register_forward_hook(
            lambda module, inputs, output, name=name: (
                found.update({name: tuple(output.shape)}) if isinstance(output, torch.Tensor) else None
            )
        )
    passes = []
    encoder.backbone.register_forward_pre_hook(lambda module, inputs: passes.append(tuple(inputs[0].shape)))
    stacked = []
    encoder.upsampler.block.register_forward_pre_hook(lambda module, inputs: stacked.append(inputs[0]))
    images = torch.rand(B, 3, F * H * P, F * W * P)
    out = encoder(images)
    ((batch, *image_shape),) = passes  # low-resolution images and tiles in one batch
    jbu_map, tile_map = (half.movedim(-1, 1) for half in stacked[0].chunk(2, -1))
    return {
        **found,
        "image": tuple(images.shape),
        "low-res image": (B, *image_shape),
        "tiles": (batch - B, *image_shape),
        "JBU map": tuple(jbu_map.shape),
        "tile map": tuple(tile_map.shape),
        "high_res": tuple(out.high_res.shape),
    }


def test_all_shapes_of_the_diagram_are_those_of_the_code():
    stated, real = stated_shapes(), real_shapes()
    assert len(stated) == 10
    assert stated == {name: real.get(name) for name in stated}
