"""A backbone whose features are known for every picture, which several tests of evaluation share."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.upsamplers.base import GuidedUpsampler


class PatchColour(Backbone):
    """A pure patch function: the mean colour of patches of 8 pixels, mixed to four channels; keeps what it was shown.

    Args:
        native: (h, w) in pixels.
        offset: Added to all features.
        broken: Whether all features are NaN.
    """

    def __init__(self, native: tuple[int, int] = (32, 48), offset: float = 0, *, broken: bool = False) -> None:
        super().__init__("patch-colour", patch_size=8, embed_dim=4, input_size=native)
        self.register_buffer("mix", torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
        self.offset = torch.nan if broken else offset
        self.seen: list[Tensor] = []
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        self.seen.append(images)
        return BackboneOutput(F.conv2d(F.avg_pool2d(images, 8), self.mix) + self.offset, None)


def lay_on_side(path: Path) -> None:
    """Store a picture on its side, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.save(path, exif=exif)


class NotFinite(GuidedUpsampler):
    """An upsampler of four channels that gives NaN."""

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.full((1, 4, *size), float("nan"))
