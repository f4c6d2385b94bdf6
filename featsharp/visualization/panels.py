"""Pictures side by side, as tensors."""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.files import write_file


def panel(pictures: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Join RGB pictures [3, h, w] in [0, 1] in a row, each enlarged to ``size`` with visible cells: [3, H, n * W]."""
    return torch.cat([F.interpolate(picture[None].cpu().float(), size, mode="nearest")[0] for picture in pictures], -1)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write an RGB picture [3, h, w] in [0, 1] as PNG."""
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    write_file(path, encoded.getvalue())
