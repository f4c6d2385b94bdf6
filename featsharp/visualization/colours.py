"""Numbers as colours, without matplotlib, which training does not need."""

import torch
from torch import Tensor

# Sixteen even steps of matplotlib's viridis: equal steps of the value look equal, also in grey and to the colour-blind.
VIRIDIS = (
    (68, 1, 84), (72, 26, 108), (71, 47, 125), (65, 68, 135), (57, 86, 140), (49, 104, 142), (42, 120, 142),
    (35, 136, 142), (31, 152, 139), (34, 168, 132), (53, 183, 121), (84, 197, 104), (122, 209, 81), (165, 219, 54),
    (210, 226, 27), (253, 231, 37),
)  # fmt: skip


def colour_map(values: Tensor, low: float, high: float) -> Tensor:
    """Map float [h, w] to RGB [3, h, w] in [0, 1]: dark blue at ``low`` and below, yellow at ``high`` and above."""
    colours = torch.tensor(VIRIDIS, dtype=torch.float32, device=values.device) / 255
    position = ((values.float() - low) / max(high - low, 1e-12)).clamp(0, 1) * (len(VIRIDIS) - 1)
    below = position.long().clamp(max=len(VIRIDIS) - 2)
    return torch.lerp(colours[below], colours[below + 1], (position - below)[..., None]).permute(2, 0, 1)
