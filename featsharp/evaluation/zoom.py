"""Zoom cosine: do the sharp features agree with the backbone's features of crops?

For random half-size crops of the centre of an image: the cosine similarity, in the backbone's space, between the sharp
features inside the crop and the backbone's features of the crop at its native size. The sharp map is interpolated
bilinearly to the centres of the crop's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from featsharp.data.images import Picture, decode_image
from featsharp.evaluation.estimates import Estimate, estimate_mean
from featsharp.evaluation.features import EncodedCrop, encode_crop, encode_raw
from featsharp.evaluation.images import ImageTask, NumberedDraws
from featsharp.evaluation.runner import Row, Run, Subject, Summary
from featsharp.model import SharpEncoder
from featsharp.ops.resize import size_of
from featsharp.ops.views import View
from featsharp.settings import setting

# Per image, and the seed of their random numbers.
CROPS, SEED = 2, 78


class ZoomMeter:
    """Meter of the zoom cosine of one encoder over images.

    Args:
        encoder: In eval mode.
        crops: Random crops per image; they start at whole tokens, off the border where there is room.
        seed: Of the crops; the same seed gives every encoder the same crops.
    """

    def __init__(self, encoder: SharpEncoder, *, crops: int = CROPS, seed: int = SEED) -> None:
        self.encoder = encoder
        native = encoder.backbone.input_size
        self.size = 2 * native[0], 2 * native[1]
        rows, columns = encoder.backbone.grid_size(native)

        def draw(generator: torch.Generator) -> Tensor:
            ends = [max(2, tokens) for _ in range(crops) for tokens in (rows, columns)]
            return torch.cat([torch.randint(1, end, (1,), generator=generator, device="cpu") for end in ends])

        self._starts = NumberedDraws(seed, draw)
        self._cosines: list[float] = []

    def add(self, picture: Picture) -> None:
        """Measure one picture, in any form that ``decode_image`` takes."""
        self._cosines.append(self.measure(decode_image(picture), len(self._cosines)))

    @torch.inference_mode()
    def measure(self, image: Image, number: int) -> float:
        """Compute the zoom cosine of one RGB picture; ``number`` decides its crops."""
        return self.measure_crop(encode_crop(self.encoder, image, self.size), number)

    @torch.inference_mode()
    def measure_crop(self, crop: EncodedCrop, number: int) -> float:
        """:meth:`measure` a picture that is encoded already, at the size of this meter."""
        (height, width), patch = self.encoder.backbone.input_size, self.encoder.backbone.patch_size
        starts = [(patch * y, patch * x) for y, x in self._starts[number].view(-1, 2).tolist()]
        crops = torch.cat([crop.image[..., y : y + height, x : x + width] for y, x in starts])
        targets = encode_raw(self.encoder, crops)
        views = [View.crop(2, (x / width - 0.5, y / height - 0.5)).to_base for y, x in starts]
        predictions = (
            View(torch.cat(views)).to(crops.device).warp(crop.high_res, size_of(targets), padding_mode="border")
        )
        return F.cosine_similarity(predictions, targets, dim=1).mean().item()

    def result(self) -> Estimate:
        """Estimate the mean over the images so far."""
        return estimate_mean(self._cosines)


@dataclass
class ZoomTask(ImageTask):
    """Zoom cosine."""

    name: ClassVar[str] = "zoom"

    crops: int = setting(CROPS, "crops per image", type="count", metavar="N")
    seed: int = setting(SEED, "of the crops", type=int, metavar="N")

    def prepare(self, encoder: SharpEncoder, subject: Subject, run: Run) -> ZoomMeter:
        return ZoomMeter(encoder, crops=self.crops, seed=self.seed)

    def measure_image(self, encoder: SharpEncoder, image: Image, number: int, head: ZoomMeter) -> Row:
        return {"zoom_cosine": head.measure(image, number)}

    def score(self, rows: Sequence[Row], head: ZoomMeter) -> Summary:
        return {"zoom_cosine": estimate_mean([row["zoom_cosine"] for row in rows])}
