"""Graphs of whole encoders by torch.export, torch.jit.trace and the older ONNX exporter hold for other inputs."""

import io
import warnings

import pytest
import torch
import torch.nn.functional as F

from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.normalizers import FeatureStatistics
from featsharp.ops.local_attention import local_attention
from featsharp.ops.recording import split_length
from featsharp.ops.resize import average, resample, resize
from featsharp.upsamplers import list_upsamplers


def nearest(image, features, size):
    return F.interpolate(features, size, mode="nearest")


def enlarge(images):
    return F.interpolate(images, scale_factor=2, mode="bicubic")


OPTIONS = {"custom": {"function": nearest}, "super-resolution": {"enlarge": enlarge}, "anyup": {"guidance_scale": 2.0}}
# One that cuts tiles, one with local operations, and all others in the slow tests.
QUICK = ("tile", "featup")
# All upsamplers take minutes, and what they do follows from their parts and the backbone's.
MARKS = {("tile", 8): []} | dict.fromkeys(
    [*((name, 8) for name in ("featsharp", "jafar", "resfu", "uplift")), ("bilinear", 14)], pytest.mark.slow
)
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in list_upsamplers()]


class Flat(torch.nn.Module):
    """An encoder whose results are a plain tuple."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        out = self.encoder(images, return_summary=True)
        return out.low_res, out.high_res, out.summary


def build(name, backbone="toy-vit"):
    factor = 1 if name in ("identity", "s2-pooled") else 2
    if name == "loftup":  # a cell per pixel: its frequencies would show how the image of a graph is resampled
        factor = 14 if backbone == "vits14-focus" else 8
    return Flat(create_encoder(backbone, name, factor, upsampler_options=OPTIONS.get(name, {}))).eval()


def check(program, model, images):
    for out, expected in zip(program(images), [x for x in model(images) if x is not None], strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "backbone", "patch"),
    [
        pytest.param(name, backbone, patch, marks=MARKS.get((name, patch), pytest.mark.full))
        for name in list_upsamplers()
        for backbone, patch in (("toy-vit", 8), ("vits14-focus", 14))
        if (name, patch) != ("anyup", 14)  # rounding of resampled positions comes out larger, see below
        and name not in ("views", "learned-views")  # which have one size, see below
    ],
)
@torch.no_grad()
def test_an_exported_program_takes_other_batches_and_sizes(name, backbone, patch):
    model = build(name, backbone)
    height, width = (torch.export.Dim(side, min=2, max=20) for side in ("height", "width"))
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = ({0: batch, 2: 2 * patch * height, 3: 2 * patch * width},)
    images = torch.randn(2, 3, 8 * patch, 6 * patch)
    program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False).module()
    for count, rows, columns in ((1, 8, 6), (3, 4, 8), (5, 10, 4)):
        check(program, model, torch.randn(count, 3, rows * patch, columns * patch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["views", "learned-views"])
@torch.no_grad()
def test_a_program_of_views_has_one_size(name):
    """It takes other batches; that it cannot take other sizes is said by name."""
    model, images = build(name), torch.randn(2, 3, 64, 48)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},), strict=False).module()
    check(program, model, torch.randn(3, 3, 64, 48))
    height = torch.export.Dim("height", min=2, max=20)
    with pytest.raises(ConfigError, match=r"views solves with matrices .* export it for one height and width"):
        torch.export.export(model, (images,), dynamic_shapes=({2: 16 * height},), strict=False)


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_program_is_whole_without_this_package():
    images = torch.randn(1, 3, 64, 64)
    program = torch.export.export(build("featsharp"), (images,), strict=False)
    assert "featsharp" not in str({node.target for node in program.graph.nodes if node.op == "call_function"})


@torch.no_grad()
def test_a_fitted_normalizer_is_exported():
    encoder = create_encoder("toy-vit", "bilinear", 2, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(32)
    statistics.update(torch.randn(200, 32))
    encoder.normalizer.fit(statistics)
    loaded = create_encoder("toy-vit", "bilinear", 2, normalizer="phi-s", bias_buffer=True)
    loaded.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 48, 64)
    check(torch.export.export(Flat(loaded), (images,), strict=False).module(), Flat(encoder), images)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_traced_module_takes_other_batches(name):
    model = build(name)
    # At the native size of the backbone, for anyup: it normalises features that hardly differ, by which the rounding of
    # resampled positions would come out a thousand times larger.
    size = (64, 64) if name == "anyup" else (48, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, (torch.randn(2, 3, *size),), check_trace=False)
        whole = torch.jit.trace(model.encoder, (torch.randn(2, 3, *size),), check_trace=False)
    assert not any("featsharp" in node.kind() for node in traced.inlined_graph.nodes())
    images = torch.randn(2, 3, *size)
    for out, expected in zip(whole(images), model.encoder(images)[:2], strict=True):  # without a summary, two maps
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for count in (2, 1, 3):
        check(traced, model, torch.randn(count, 3, *size))


@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] not in ("anyup", "loftup")])
@torch.no_grad()
def test_the_older_onnx_exporter(name):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, file = build(name), io.BytesIO()
    if name in QUICK:  # the encoder as it is
        model = model.encoder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            (torch.randn(2, 3, 48, 64),),
            file,
            dynamo=False,
            opset_version=20,
            input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
        )
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def program(images):
        return map(torch.from_numpy, session.run(None, {"images": images.numpy()}))

    # The maps that these blend out of windows have the batch that they were exported with.
    fixed = ("s2", "s2-pooled", "featsharp-progressive", "views", "learned-views")
    for count in (2,) if name in fixed else (2, 1, 3):
        check(program, model, torch.randn(count, 3, 48, 64))


@pytest.mark.parametrize("size", [(5, 7), (3, 20), (13, 4), (11, 9)])
def test_what_a_traced_graph_computes_by_matrices(size):
    x = torch.randn(2, 3, 11, 9)
    for function in (
        resize,
        average,
        lambda x, size: resample(x, size, "bilinear"),
        lambda x, size: resample(x, size, "bicubic"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(lambda x, f=function: f(x, size), (x,), check_trace=False)
        torch.testing.assert_close(traced(x[:1]), function(x[:1], size), atol=1e-5, rtol=1e-5)


def test_pieces_hold_no_more_than_the_limit_and_cover_all():
    for length, images, numbers, limit in ((10, 1, 3, 7), (10, 4, 3, 7), (10, 1, 1, 100), (1, 1, 9, 1)):
        pieces = split_length(length, images, numbers, limit)
        assert [i for piece in pieces for i in range(length)[piece]] == [*range(length)]
        assert all(
            piece.stop - piece.start == 1 or (piece.stop - piece.start) * images * numbers <= limit for piece in pieces
        )


def test_a_backend_that_is_named_is_kept_in_a_program():
    class Attend(torch.nn.Module):
        def forward(self, x):
            return local_attention(x, x, x, window=3, backend="blocked")

    program = torch.export.export(Attend(), (torch.randn(1, 4, 4, 1, 8),), strict=False)
    assert any("local_attention" in str(node.target) for node in program.graph.nodes)
