"""``student:FILE``: a vision transformer that ``featsharp distill`` has taught, from a checkpoint of its run.

The transformer is torch's own. It has a class token for each teacher with a summary, as in RADIO (arXiv 2312.06709),
and starts from random weights.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.backbones.options import Options
from featsharp.checkpoint import FileKind, read_checkpoint, restoring
from featsharp.errors import ConfigError
from featsharp.ops.recording import is_open
from featsharp.ops.resize import resample, size_of

STUDENT_FILE = FileKind(
    "featsharp-student", 1, ("student", "model", "config", "training"), "a student", "featsharp distill"
)


@dataclass(frozen=True)
class Shape:
    """Shape of a student: ViT-Ti/14 at 224 pixels by default; ``class_tokens`` are those of its summary."""

    size: int = 224  # side of its native square input in pixels
    patch_size: int = 14
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    class_tokens: int = 1


class StudentViT(Backbone):
    """A vision transformer with learned positions, trainable; takes any multiple of its patch size.

    Features are patch tokens after the final norm, the summary its class tokens, one after the other.

    Args:
        shape: Of the network, see :func:`check_shape`.
        name: A label.
    """

    embeds_patches = True

    def __init__(self, shape: Shape, name: str = "student") -> None:
        summary = shape.class_tokens * shape.width
        super().__init__(
            name,
            patch_size=shape.patch_size,
            embed_dim=shape.width,
            input_size=(shape.size, shape.size),
            summary_dim=summary or None,
        )
        self.shape = shape
        width, grid = shape.width, shape.size // shape.patch_size
        self.patch_embed = nn.Conv2d(3, width, shape.patch_size, shape.patch_size)
        self.class_tokens = nn.Parameter(0.02 * torch.randn(1, shape.class_tokens, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, width, grid, grid))
        # Not nn.TransformerEncoder, all of whose layers start from the same weights.
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, shape.num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(shape.depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.train(False)

    def extract(self, images: Tensor) -> BackboneOutput:
        patches = self.patch_embed(images)  # [B, C, h, w]
        grid = size_of(patches)
        positions: Tensor = self.positions
        if is_open(*grid) or grid != size_of(positions):
            positions = resample(positions, grid, "bicubic")
        first = self.class_tokens.expand(len(images), -1, -1)
        tokens = torch.cat([first, (patches + positions).flatten(2).transpose(1, 2)], 1)
        tokens = self.norm(self.blocks(tokens))
        count = self.shape.class_tokens
        summary = tokens[:, :count].flatten(1) if count else None
        return BackboneOutput(tokens[:, count:].transpose(1, 2).unflatten(2, grid), summary)


def check_shape(shape: Shape) -> None:
    """Raise ConfigError for a network that cannot be built."""
    if shape.size % shape.patch_size:
        raise ConfigError(
            f"a student of {shape.size} pixels has no whole number of patches of {shape.patch_size}; take a size such "
            f"as {max(1, round(shape.size / shape.patch_size)) * shape.patch_size}"
        )
    if shape.width % shape.num_heads:
        raise ConfigError(f"a student of width {shape.width} cannot be divided among {shape.num_heads} attention heads")


def student_content(student: StudentViT) -> dict[str, Any]:
    """Collect what :func:`load_student` needs of a checkpoint."""
    state = {name: value.detach().cpu() for name, value in student.state_dict().items()}
    return {"student": asdict(student.shape), "model": state}


def load_student(path: str | Path, name: str = "student") -> StudentViT:
    """Load a student, frozen, from a checkpoint of ``featsharp distill``.

    Raises:
        CheckpointError: When the file is missing, damaged, or of another kind.
    """
    content: Mapping[str, Any] = read_checkpoint(path, STUDENT_FILE)
    with restoring(path):
        with torch.device("meta"):
            student = StudentViT(Shape(**content["student"]), name)
        student.load_state_dict(content["model"], strict=True, assign=True)
    student.freeze()
    return student


def build(name: str, model: str, options: Options) -> Backbone:
    """Build ``student:FILE``."""
    return load_student(Path(model).expanduser(), name)
