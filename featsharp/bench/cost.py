"""What an upsampler costs, counted from shapes alone: parameters, backbone passes, floating-point operations.

The measure of everything is one pass of a ViT-S/14 (12 layers, 384 channels) over 224 x 224 pixels. Products are
counted, in the upsampler and in the passes that it asks for; interpolation, norms and activations are not. For times
see :mod:`featsharp.bench.encode`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from featsharp.bench.counting import counting
from featsharp.upsamplers.base import Upsampler

LAYERS, EMBED_DIM, PATCH, SIDE = 12, 384, 14, 224


@dataclass(frozen=True)
class Cost:
    """What sharp features of one picture take."""

    parameters: int  # of the upsampler
    passes: int  # images that go through the backbone, of whatever size
    relative: float  # operations of passes and upsampler, in units of one backbone pass


def count_cost(upsampler: Upsampler) -> Cost:
    """The cost of an upsampler that was built for 384 channels; nothing is computed."""
    passes, operations = 0, 0.0

    def encode(images: Tensor, *, patch_stride: int | None = None) -> tuple[Tensor, None]:
        nonlocal passes, operations
        stride = patch_stride or PATCH
        grid = [(side - PATCH) // stride + 1 for side in images.shape[-2:]]
        passes += len(images)
        operations += len(images) * vit_operations(grid[0] * grid[1])
        return images.new_empty(len(images), EMBED_DIM, *grid), None

    side = int(SIDE * upsampler.input_upsample_factor)
    with FakeTensorMode(allow_non_fake_inputs=True), counting() as counter:
        upsampler.eval()(torch.empty(1, 3, side, side), encode, (SIDE, SIDE))
    total = operations + counter.flops.get_total_flops()
    parameters = sum(p.numel() for p in upsampler.parameters())
    return Cost(parameters, passes, total / vit_operations((SIDE // PATCH) ** 2))


def vit_operations(tokens: int) -> float:
    """Of one pass: linear layers 24 T C^2 and attention 4 T^2 C per layer, a multiplication and an addition each."""
    return LAYERS * (24.0 * tokens * EMBED_DIM**2 + 4.0 * tokens**2 * EMBED_DIM)
