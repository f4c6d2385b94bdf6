"""Frozen features of pictures: as an encoder gives them, and kept on disk so that training sees them often.

Every picture is scaled to one size, whatever its shape: without cropping, a map then covers the whole of it.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from featsharp.data.images import decode_image, image_to_tensor
from featsharp.errors import FeatSharpError
from featsharp.evaluation.identity import digest, encoder_key, file_key
from featsharp.evaluation.samples import check_finite
from featsharp.evaluation.segmentation.readers import Pair
from featsharp.files import write_file
from featsharp.memory import format_memory
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureReader:
    """One of the two maps of an encoder for any picture.

    Attributes:
        encoder: In eval mode.
        image_size: (h, w) in pixels at which the encoder sees the picture.
        low_res_size: (h, w) in pixels of its low-resolution pass.
    """

    encoder: SharpEncoder
    image_size: tuple[int, int]
    low_res_size: tuple[int, int]

    @torch.no_grad()  # not inference mode: heads are trained on them
    def read(self, image: Image, part: Literal["high_res", "low_res"]) -> Tensor:
        """Features of an RGB picture, [1, C, h, w] float32 on the encoder's device, in the backbone's space.

        They are what users get: without the positional pattern that a bias buffer learned, and in normalised space
        where the normalizer has no inverse.

        Raises:
            InputError: When they are NaN or infinite.
        """
        encoder = self.encoder
        pixels = resize(image_to_tensor(image)[None].to(encoder.device), self.image_size)
        maps = encoder(
            encoder.input_conditioner(pixels),
            low_res_size=self.low_res_size,
            denormalize=encoder.normalizer.invertible,
        )
        features: Tensor = getattr(maps, part).float()
        check_finite(features)
        return features


class Features(NamedTuple):
    """A map [C, h, w] on the CPU, in half precision where its numbers allow, and (h, w) of the picture it is of."""

    map: Tensor
    picture_size: tuple[int, int]


class FeatureCache:
    """Features of the pictures of a data set, computed once and then read from files.

    A file is known by the content of the encoder, the sizes, and the name, length and time of the picture's file. A
    damaged one is made again. Beyond the limit features are computed whenever they are asked for.

    Args:
        reader: Computes them.
        part: Which map.
        folder: Where to; it may hold those of other encoders.
        limit: Bytes that all files of the folder may take.
    """

    def __init__(self, reader: FeatureReader, part: Literal["high_res", "low_res"], folder: Path, limit: int) -> None:
        self.reader, self.part, self.folder, self.limit = reader, part, folder, limit
        self.key = digest(encoder_key(reader.encoder), reader.image_size, reader.low_res_size, part)
        self._used = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self._full = False

    def get(self, pair: Pair) -> Features:
        """Features of the image of a pair.

        Raises:
            DataError, InputError: When there are none: see ``decode_image`` and :class:`FeatureReader`.
        """
        path = self.folder / f"{digest(self.key, file_key(pair.root, pair.image))}.safetensors"
        found = _load(path)
        if found is None:
            image = decode_image(pair.root / pair.image, name=pair.image, upright=False)
            features = self.reader.read(image, self.part)[0].cpu()
            half = features.half()
            found = Features(half if half.isfinite().all() else features, (image.height, image.width))
            self._store(path, found)
        return found

    def _store(self, path: Path, features: Features) -> None:
        if self._full:
            return
        content = save({"map": features.map.contiguous(), "picture_size": torch.tensor(features.picture_size)})
        replaced = path.stat().st_size if path.exists() else 0
        if self._used - replaced + len(content) > self.limit:
            self._stop(f"the limit of {format_memory(self.limit)} is reached")
            return
        try:
            write_file(path, content)
        except FeatSharpError as error:
            self._stop(str(error))
            return
        self._used += len(content) - replaced

    def _stop(self, reason: str) -> None:
        self._full = True
        logger.warning(
            "features of the other images are computed again in every round of training, which is slow: %s. Give more "
            "room (--cache-limit, --cache-dir) or fewer images (--train-limit)",
            reason,
        )


def _load(path: Path) -> Features | None:
    """None where there is no file, or a damaged one."""
    try:
        content = load(path.read_bytes())
        height, width = content["picture_size"].tolist()
        return Features(content["map"], (height, width))
    except (OSError, SafetensorError, KeyError):
        return None
