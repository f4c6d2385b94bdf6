"""The linear probe: normalisation and one 1x1 convolution on frozen features.

The head and schedule are those of RADIO and FeatSharp (arXiv 2502.16025): BatchNorm, Conv1x1, logits enlarged
bilinearly, cross-entropy without void pixels, AdamW without weight decay, linear warm-up and polynomial decay of power
1. Other than there, pictures are not augmented, which lets their features be computed once.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from featsharp.evaluation.segmentation.labels import VOID
from featsharp.files import write_file
from featsharp.ops.resize import resize, size_of

logger = logging.getLogger(__name__)

_WARM_UP = 0.02  # of the steps


class LinearProbe(nn.Module):
    """Features [B, C, h, w] to logits [B, K, h, w] float32.

    The convolution starts at zero, the best guess that knows nothing, so a seed decides the order of images only. The
    normalisation has no weights of its own: the convolution would absorb them.

    Args:
        channels: C.
        classes: K.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.classify = nn.utils.skip_init(nn.Conv2d, channels, classes, 1)  # leaves the global random state alone
        for parameter in self.classify.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classify(self.norm(features.float()))
        return logits


@dataclass(frozen=True)
class Schedule:
    """How long and how a probe is trained.

    Attributes:
        steps: Updates.
        batch: Images per update; all of them where there are fewer.
        learning_rate: Its peak, after the warm-up of the first 2 % of the steps; then it falls linearly to 0.
        seed: Of the order of images.
    """

    steps: int = 4000
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 0

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step, the first being 0."""
        warm_up = max(1, round(_WARM_UP * self.steps))
        return min((step + 1) / warm_up, (self.steps - step) / max(1, self.steps - warm_up))


def fit_probe(
    features: Callable[[int], Tensor], labels: Tensor, classes: int, schedule: Schedule, device: torch.device
) -> LinearProbe:
    """Train a probe.

    Args:
        features: Number of an image -> [C, h, w], any floating point type, on any device; the same size for all.
        labels: [N, H, W] integers on the CPU, classes and VOID; each image has a labelled pixel. Logits are scaled to
            H x W for the loss.
        classes: K.
        schedule: See there.
        device: Where to train.

    Returns:
        The probe on ``device``, in eval mode, without gradients.
    """
    probe = LinearProbe(len(features(0)), classes).to(device).train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=schedule.learning_rate, weight_decay=0)
    for step, batch in enumerate(itertools.islice(_batches(len(labels), schedule), schedule.steps)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate(step)
        maps = torch.stack([features(number) for number in batch]).to(device)
        truth = labels[batch].to(device, torch.long)
        loss = F.cross_entropy(resize(probe(maps), size_of(truth)), truth, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            logger.info("linear probe: step %d of %d, loss %.3f", step + 1, schedule.steps, loss.item())
    return probe.eval().requires_grad_(False)


def save_probe(probe: LinearProbe, path: Path, about: object) -> None:
    """Write a probe with some JSON value about it."""
    state = {name: value.cpu().contiguous() for name, value in probe.state_dict().items()}
    write_file(path, save(state, {"about": json.dumps(about)}))


def load_probe(path: Path, device: torch.device) -> tuple[LinearProbe, Any] | None:
    """What :func:`save_probe` wrote, the probe as :func:`fit_probe` returns it; None without a sound file."""
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            about = json.loads(file.metadata()["about"])
        classes, channels = state["classify.weight"].shape[:2]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    probe = LinearProbe(channels, classes)
    probe.load_state_dict(state)
    return probe.to(device).eval().requires_grad_(False), about


def _batches(images: int, schedule: Schedule) -> Iterator[list[int]]:
    """Without end: every image once, in a new order each time, cut into batches."""
    generator = torch.Generator().manual_seed(schedule.seed)
    order = itertools.chain.from_iterable(
        torch.randperm(images, generator=generator).tolist() for _ in itertools.count()
    )
    while True:
        yield list(itertools.islice(order, min(schedule.batch, images)))
