"""The head of the protocol that JAFAR's successors share: batch normalisation and a 1x1 convolution on sharp features.

The head sees features at the size of the labels, 448 x 448, which for 384 channels are 154 MB a picture in half
precision: they are never stored. Bilinear enlargement is linear, and its weights of a pixel sum to one, so the
convolution, and the normalisation by given statistics, may come before it: the head is applied to a method's map as it
is, and its output is enlarged. The statistics that batch normalisation would take of the enlarged map follow exactly
from the small one (:func:`moments`).

Shapes: B pictures, C channels, (h, w) of the map, (H, W) of the labels, K outputs.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from featsharp.errors import DataError, InputError
from featsharp.evaluation.head import LinearProbe, read_kept, read_skipped
from featsharp.evaluation.keys import digest
from featsharp.evaluation.layouts.layout import Sample
from featsharp.files import write_file
from featsharp.ops.resize import resize, size_of
from featsharp.terminal import with_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KitSchedule:
    """Training schedule of a head.

    Attributes:
        epochs: Rounds over all pictures.
        batch: Pictures per update; the last ones of a round may be fewer.
        learning_rate: Of AdamW with betas (0.9, 0.999), constant.
        weight_decay: Of AdamW.
        seed: Of the weights and the order of pictures.
        batch_norm: Whether features are normalised by the statistics of the batch, in use by the running ones.
    """

    epochs: int = 20
    batch: int = 2
    learning_rate: float = 5e-4
    weight_decay: float = 1e-5
    seed: int = 0
    batch_norm: bool = True


class Training(NamedTuple):
    """Data that a head is trained on.

    Attributes:
        samples: Training pictures.
        features: Returns the map [C, h, w] of one; raises DataError or InputError for a bad one.
        sizes: (h, w) that the output is enlarged to, one after the other; the last is that of the targets.
        outputs: K.
        loss: Maps output [B, K, H, W] and targets [B, H, W] to a number.
        key: JSON values that change with the features, and with the targets of the same files.
    """

    samples: Sequence[Sample]
    features: Callable[[Sample], Tensor]
    sizes: Sequence[tuple[int, int]]
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    key: Sequence[object]


class KitHead(NamedTuple):
    """A trained head."""

    probe: LinearProbe
    sizes: Sequence[tuple[int, int]]
    images: int
    skipped: list[tuple[str, str]]  # name and reason of training pictures that could not be used

    def __call__(self, features: Tensor) -> Tensor:
        """Compute the output [B, K, H, W] of a map [B, C, h, w]."""
        norm = self.probe.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        return enlarge_through(_normalised_conv(self.probe, features, norm.running_mean, norm.running_var), self.sizes)

    @property
    def key(self) -> str:
        """Digest of the weights."""
        state = self.probe.state_dict().values()
        return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in state)).hexdigest()


def moments(maps: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance [C] of maps [B, C, h, w] enlarged bilinearly to ``sizes``, without enlarging.

    With A [H, h] and A' [W, w] the matrices of the enlargement along rows and columns, the sum of squares of a channel
    X is that of X * (A^T A X A'^T A').
    """
    if all(size == size_of(maps) for size in sizes):
        variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
        return mean, variance
    mean = maps.mean((0, 2, 3))
    centred = maps - mean[:, None, None]
    rows, columns = (
        _axis_matrix(source, [size[axis] for size in sizes]).to(maps.device)
        for axis, source in enumerate(size_of(maps))
    )
    shift = torch.einsum("bchw,h,w->c", centred, rows.mean(0), columns.mean(0)) / len(maps)
    weighed = (rows.T @ rows / len(rows)) @ centred @ (columns.T @ columns / len(columns))
    square = (weighed * centred).sum((0, 2, 3)) / len(maps)
    return mean + shift, (square - shift.square()).clamp(min=0)


def enlarge_through(x: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Resize [B, K, h, w] to one size after the other."""
    for size in sizes:
        x = resize(x, size)
    return x


def train_kit_head(
    data: Training, schedule: KitSchedule, device: torch.device, folder: Path, *, progress: bool = False
) -> KitHead:
    """Train a head, or load the same from disk.

    Its state is written after each round, so that training goes on after an interruption, and from a head that was
    trained for fewer rounds.

    Args:
        data: Pictures, features and targets.
        schedule: Of the training.
        device: To train on.
        folder: For heads.
        progress: Whether to show bars on stderr.

    Raises:
        DataError: When no training picture can be used.
    """
    settings = {name: value for name, value in asdict(schedule).items() if name != "epochs"}
    files = [[sample.name, sample.key] for sample in data.samples]
    name = digest(data.key, data.sizes, data.outputs, files, settings)
    state = next(filter(None, (_load_state(folder, name, epoch) for epoch in range(schedule.epochs, 0, -1))), None)
    if state is None:
        usable, skipped = _check_samples(data, progress)
        state = _State(_new_probe(data, usable, schedule.seed), {}, 0, usable, skipped)
    first = state.epochs
    samples = [data.samples[number] for number in state.usable]
    probe = state.probe.to(device)
    optimizer = torch.optim.AdamW(
        probe.classify.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    if state.moments:
        _load_optimizer(optimizer, state.moments, device)
    epochs = range(first, schedule.epochs)
    for epoch in with_progress(epochs, "rounds of training", progress):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(schedule.seed + epoch)).tolist()
        for start in range(0, len(order), schedule.batch):
            error = _update(
                probe, optimizer, [samples[n] for n in order[start : start + schedule.batch]], data, schedule, device
            )
        logger.info("head: round %d of %d, loss %.3f", epoch + 1, schedule.epochs, error)
        _save_state(folder, name, epoch + 1, probe, optimizer, state)
        if epoch > first:
            _state_path(folder, name, epoch).unlink(missing_ok=True)
    return KitHead(probe.eval().requires_grad_(False), data.sizes, len(samples), state.skipped)


def read_target(sample: Sample, size: tuple[int, int]) -> Tensor:
    """Read the values of a picture's pixels at the centres of ``size`` (h, w) cells of its centre.

    The centre is that of :func:`featsharp.evaluation.features.centre_crop`.
    """
    values = sample.read_target()
    rows, columns = _crop_centre(values.shape, size)
    return torch.from_numpy(values[rows[:, None], columns])


def _crop_centre(source: Sequence[int], size: tuple[int, int]) -> list[np.ndarray]:
    """Compute the rows and columns of an array that lie under the cells of its centre, scaled to just cover them."""
    scale = max(wanted / given for wanted, given in zip(size, source, strict=True))
    chosen = []
    for given, wanted in zip(source, size, strict=True):
        covering = max(wanted, round(given * scale))
        first = (covering - wanted) // 2
        places = (np.arange(first, first + wanted) + 0.5) * (given / covering)
        chosen.append(np.minimum(places.astype(int), given - 1))
    return chosen


def _axis_matrix(source: int, targets: Sequence[int]) -> Tensor:
    """Matrix [last target, source] of bilinear resizing along an axis, float32."""
    matrix = torch.eye(source, device="cpu")[None, None]
    for target in targets:
        matrix = resize(matrix, (target, source))
    return matrix[0, 0]


def _update(
    probe: LinearProbe,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Sample],
    data: Training,
    schedule: KitSchedule,
    device: torch.device,
) -> float:
    """Train on one batch; returns its loss."""
    maps = torch.stack([data.features(sample).float() for sample in batch]).to(device)
    targets = torch.stack([read_target(sample, data.sizes[-1]) for sample in batch]).to(device)
    mean, variance = probe.norm.running_mean, probe.norm.running_var
    assert mean is not None
    assert variance is not None
    if schedule.batch_norm:
        running, momentum = (mean, variance), probe.norm.momentum or 0.0
        mean, variance = moments(maps, data.sizes)
        pixels = len(batch) * data.sizes[-1][0] * data.sizes[-1][1]
        running[0].lerp_(mean, momentum)
        running[1].lerp_(variance * (pixels / max(1, pixels - 1)), momentum)
    loss = data.loss(enlarge_through(_normalised_conv(probe, maps, mean, variance), data.sizes), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def _normalised_conv(probe: LinearProbe, maps: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Normalise within the convolution: there is no second copy of the features, nor is one kept for the gradient."""
    weight = probe.classify.weight * (variance + probe.norm.eps).rsqrt()[None, :, None, None]
    assert probe.classify.bias is not None
    return F.conv2d(maps.float(), weight, probe.classify.bias - weight[:, :, 0, 0] @ mean)


class _State(NamedTuple):
    """State of training after a round."""

    probe: LinearProbe
    moments: dict[str, Tensor]  # of the optimizer
    epochs: int
    usable: list[int]  # numbers of samples
    skipped: list[tuple[str, str]]


def _new_probe(data: Training, usable: Sequence[int], seed: int) -> LinearProbe:
    probe = LinearProbe(len(data.features(data.samples[usable[0]])), data.outputs).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe.classify.reset_parameters()
    return probe


def _check_samples(data: Training, progress: bool) -> tuple[list[int], list[tuple[str, str]]]:
    """Find the usable samples by number; name and reason of the others. Features that are kept are computed here."""
    usable, skipped = [], []
    for number, sample in enumerate(with_progress(data.samples, "training features", progress)):
        try:
            read_target(sample, data.sizes[-1])
            data.features(sample)
        except (DataError, InputError) as error:
            skipped.append((sample.name, str(error).removeprefix(f"{sample.name}: ")))
            logger.warning("training without %s: %s", *skipped[-1])
        else:
            usable.append(number)
    if not usable:
        raise DataError(
            f"none of {len(skipped)} training pictures can be used; the first, {skipped[0][0]}: {skipped[0][1]}"
        )
    return usable, skipped


def _state_path(folder: Path, name: str, epochs: int) -> Path:
    return folder / f"{name}-{epochs}.safetensors"


def _save_state(
    folder: Path, name: str, epochs: int, probe: LinearProbe, optimizer: torch.optim.Optimizer, state: _State
) -> None:
    tensors = dict(probe.state_dict())
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items()}
    content = {key: value.cpu().contiguous() for key, value in tensors.items()}
    about = json.dumps({"usable": state.usable, "skipped": state.skipped})
    write_file(_state_path(folder, name, epochs), save(content, {"about": about}))


def _load_state(folder: Path, name: str, epochs: int) -> _State | None:
    """Load the state after so many rounds; None without an intact file."""

    def build(tensors: dict[str, Tensor], about: Any) -> _State:
        moments = {key: value for key, value in tensors.items() if key.startswith("optimizer.")}
        probe = LinearProbe(*reversed(tensors["classify.weight"].shape[:2])).eval()
        probe.load_state_dict({key: value for key, value in tensors.items() if key not in moments})
        return _State(probe, moments, epochs, about["usable"], read_skipped(about["skipped"]))

    return read_kept(_state_path(folder, name, epochs), build)


def _load_optimizer(optimizer: torch.optim.Optimizer, moments: dict[str, Tensor], device: torch.device) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in moments.items():
        _, number, name = key.split(".")
        state.setdefault(int(number), {})[name] = value if name == "step" else value.to(device)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
