"""The heads of the quick protocol of segmentation: three seeds of a linear one, 24 rounds each.

Features are standardised by mean and deviation of the first 100 training images; the head is a 1x1 convolution in
torch's initialisation, trained with AdamW and one cycle of the learning rate. The mean of three seeds is reported,
since with so short a training the order of the images matters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from featsharp.evaluation.head import LinearProbe
from featsharp.ops.resize import resize, size_of
from featsharp.terminal import with_progress

# Size (h, w) that labels are sampled at for training: a quarter of CamVid's.
LABEL_SIZE = (90, 120)
# Training images whose features decide the standardisation.
STANDARDISED_BY = 100


@dataclass(frozen=True)
class QuickSchedule:
    """Training schedule of the heads.

    Attributes:
        seed: Of the first head, for its weights and the order of images; that of the others follow.
        heads: Number of seeds.
        epochs: Rounds over all images; those beyond the last whole batch are left out.
        batch: Images per update; all of them where there are fewer.
        learning_rate: Peak.
        weight_decay: Of AdamW.
    """

    seed: int = 0
    heads: int = 3
    epochs: int = 24
    batch: int = 8
    learning_rate: float = 5e-3
    weight_decay: float = 1e-3


def fit_heads(
    features: Callable[[int], Tensor],
    targets: Tensor,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: QuickSchedule,
    device: torch.device,
    *,
    progress: bool = False,
) -> LinearProbe:
    """Train one head after the other; the arguments are those of ``fit_probe`` in :mod:`featsharp.evaluation.head`.

    Returns:
        One probe with ``outputs`` channels of each head, on ``device``, in eval mode, without gradients.
    """
    first = torch.stack([features(number).float() for number in range(min(STANDARDISED_BY, len(targets)))])
    mean, deviation = first.mean((0, 2, 3)), first.std((0, 2, 3))
    del first

    def make_probe(channels: int) -> LinearProbe:
        probe = LinearProbe(len(mean), channels).eval()
        assert probe.norm.running_mean is not None
        assert probe.norm.running_var is not None
        probe.norm.running_mean.copy_(mean)
        probe.norm.running_var.copy_((deviation.square() - probe.norm.eps).clamp(min=0))
        return probe

    heads: list[LinearProbe] = []
    for seed in range(schedule.seed, schedule.seed + schedule.heads):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = make_probe(outputs)
            head.classify.reset_parameters()
            label = f"training of head {len(heads) + 1} of {schedule.heads}"
            epochs = with_progress(range(schedule.epochs), label, progress)
            _train(head.to(device), features, targets, loss, schedule, epochs)
        heads.append(head)
    joined = make_probe(outputs * len(heads)).to(device)
    with torch.no_grad():
        for name, parameter in joined.classify.named_parameters():
            parameter.copy_(torch.cat([getattr(head.classify, name) for head in heads]))
    return joined.requires_grad_(False)


def _train(
    head: LinearProbe,
    features: Callable[[int], Tensor],
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: QuickSchedule,
    epochs: Iterable[int],
) -> None:
    """Train a head in place, with the global random numbers."""
    device = head.classify.weight.device
    batch = min(schedule.batch, len(targets))
    batches = len(targets) // batch
    optimizer = torch.optim.AdamW(
        head.classify.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=schedule.epochs * batches
    )
    for _ in epochs:
        for chosen in torch.randperm(len(targets), device="cpu")[: batches * batch].view(-1, batch):
            maps = torch.stack([features(number) for number in chosen.tolist()]).to(device)
            truth = targets[chosen].to(device)
            error = loss(resize(head(maps), size_of(truth)), truth)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            cycle.step()
