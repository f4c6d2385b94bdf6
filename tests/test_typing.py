"""A user's own code passes ``mypy --strict`` against the package: its public names have types, none of them Any."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# An unused `type: ignore` is an error of its own under --strict: the mistyped name below has to be noticed.
SNIPPET = """
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import featsharp
from featsharp import SharpEncoder, UpsampleFeatures, UpsampleLayer, load_from_file
from featsharp.backbones import Backbone
from featsharp.extraction import MappedFeatures
from featsharp.training.loggers import VizWriter
from featsharp.upsamplers import Encode, StridedEncode, Upsampler

encoder = load_from_file("vits14-focus/featsharp-2x", max_memory="2GiB")
assert_type(encoder, SharpEncoder)
out = encoder.encode_image("photo.jpg", return_summary=True)
assert_type(out, UpsampleFeatures)
assert_type(out.high_res, Tensor)
assert_type(encoder.encode_image(["a.jpg", Path("b.png")]), list[UpsampleFeatures])
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


def call_with_custom_features(upsampler: Upsampler, encode: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> Tensor:
    return upsampler.forward(images, encode, (64, 64)).high_res


strided: StridedEncode = encoder.encode
encode: Encode = strided


class PrintWriter(VizWriter):
    def config(self, config: Mapping[str, Any]) -> None:
        print(config)

    def scalar(self, name: str, value: float, step: int) -> None:
        print(step, name, value)

    def image(self, name: str, image: Tensor, step: int) -> None:
        print(step, name, image.shape)


writer: VizWriter = PrintWriter()
"""


@pytest.mark.slow  # mypy reads torch
def test_a_users_snippet_passes_strict_checks(tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPET)
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path / 'cache'}"]
    command = [sys.executable, "-m", "mypy", *options, str(tmp_path / "snippet.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("Success"), done.stdout + done.stderr
