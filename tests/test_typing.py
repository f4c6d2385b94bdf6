"""A user's own code passes strict checks of mypy against the package: its public names have types, none of them Any."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The flags of --strict: not on the command line, so that what `make lint` has read of torch remains of use. An unused
# `type: ignore` is an error of its own: the mistyped name below has to be noticed.
SNIPPET = """
# mypy: disallow-any-generics, disallow-subclassing-any, disallow-untyped-calls, disallow-untyped-defs
# mypy: disallow-incomplete-defs, check-untyped-defs, disallow-untyped-decorators, warn-unused-ignores
# mypy: warn-return-any, no-implicit-reexport, strict-equality, extra-checks
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import featsharp
from featsharp import SharpEncoder, UpsampleFeatures, UpsampleLayer, load_from_file
from featsharp.backbones import Backbone
from featsharp.data import Picture, picture_to_tensor
from featsharp.extraction import MappedFeatures
from featsharp.training.loggers import VizWriter
from featsharp.upsamplers import Encode, Upsampler

encoder = load_from_file("vits14-focus/featsharp-2x", max_memory="2GiB")
assert_type(encoder, SharpEncoder)
out = encoder.encode_image("photo.jpg", return_summary=True)
assert_type(out, UpsampleFeatures)
assert_type(out.high_res, Tensor)
assert_type(encoder.encode_image(["a.jpg", Path("b.png")]), list[UpsampleFeatures])
picture: Picture = np.zeros((64, 64, 3), np.uint8)
for picture in (picture, torch.rand(3, 64, 64), io.BytesIO(), Image.new("L", (64, 64)), open("photo.jpg", "rb")):
    assert_type(encoder.encode_image(picture), UpsampleFeatures)
    pixels: Tensor = picture_to_tensor(picture)
images = encoder.input_conditioner(torch.rand(1, 3, 64, 64))
maps: UpsampleFeatures = encoder(images, denormalize=True, output_size=(50, 70))
with MappedFeatures("photo.npy") as file:
    encoder.encode_image("photo.jpg", size=(2048, 2048), allocate=file.allocate)

backbone = featsharp.from_callable(nn.Identity(), mean=(0.5,) * 3, std=(0.5,) * 3)
assert_type(backbone, Backbone)
assert_type(featsharp.create_encoder(backbone, "tile", 2), SharpEncoder)
assert_type(featsharp.create_backbone("dinov2-l", layer=-2), Backbone)
assert_type(featsharp.load_published("anyup", "anyup.pth", backbone), SharpEncoder)
features: Tensor = UpsampleLayer("resize-conv", 384, 4)(torch.rand(1, 384, 16, 16), images)
featsharp.load_form_file("last.pth")  # type: ignore[attr-defined]


@featsharp.register_upsampler("nearest", "copies of every cell")
class Nearest(Upsampler):
    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        low_res, summary = encode(image)
        return UpsampleFeatures(low_res, low_res.repeat_interleave(2, -1).repeat_interleave(2, -2), summary)


def shrink(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, Tensor | None]:
    return images[..., ::8, ::8], None


def call_with_custom_features(upsampler: Upsampler) -> Tensor:
    return upsampler.forward(images, shrink, (64, 64)).high_res


encode: Encode = encoder.encode


class PrintWriter(VizWriter):
    def config(self, config: Mapping[str, Any]) -> None:
        print(config)

    def scalar(self, name: str, value: float, step: int) -> None:
        print(step, name, value)

    def image(self, name: str, image: Tensor, step: int) -> None:
        print(step, name, image.shape)


writer: VizWriter = PrintWriter()
"""


@pytest.mark.slow  # mypy reads torch, where no `make lint` has done so before
def test_a_users_snippet_passes_strict_checks(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", str(tmp_path / "snippet.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("Success"), done.stdout + done.stderr
