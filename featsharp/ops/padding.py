"""Borders of maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_border(x: Tensor, padding: Sequence[int], mode: str) -> Tensor:
    """Pad a map as ``torch.nn.functional.pad`` does, by "reflect" or "replicate", in any type on any device."""
    if x.dtype == torch.float16 and x.device.type == "cpu":  # torch 2.4 has no kernel for it; values are only copied
        return F.pad(x.float(), padding, mode=mode).half()
    return F.pad(x, padding, mode=mode)
