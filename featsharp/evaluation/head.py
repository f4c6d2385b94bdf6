"""Heads on frozen features: a linear one, trained on features that are computed once and cached on disk.

The head and schedule are those of RADIO and FeatSharp (arXiv 2502.16025): BatchNorm, Conv1x1, output enlarged
bilinearly, AdamW without weight decay, linear warm-up and polynomial decay of power 1. Unlike there, pictures are not
augmented, so that their features can be computed once.

Every picture of any shape is scaled to one size: without cropping, a map covers the whole picture.
"""

import hashlib
import itertools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from featsharp.checkpoint import read_tensors
from featsharp.errors import DataError, FeatSharpError, InputError
from featsharp.evaluation.features import ScalePicture, check_finite, whitened_picture
from featsharp.evaluation.keys import digest, encoder_key
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.labels import LabelledImage
from featsharp.files import write_file
from featsharp.memory import format_memory
from featsharp.model import SharpEncoder
from featsharp.ops.resize import resize, size_of
from featsharp.terminal import with_progress

logger = logging.getLogger(__name__)

MapName = Literal["high_res", "low_res"]
Target = TypeVar("Target")
Kept = TypeVar("Kept")

_WARM_UP = 0.02  # of the steps


class LinearProbe(nn.Module):
    """Linear head from features [B, channels, h, w] to logits [B, classes, h, w] float32.

    The convolution starts at zero, so a seed affects the order of images only. The normalisation has no weights, which
    the convolution would absorb.
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
    """Training schedule of a probe.

    Attributes:
        steps: Updates.
        batch: Images per update; all of them where there are fewer.
        learning_rate: Peak, after the warm-up of the first 2 % of the steps; then it falls linearly to 0.
        seed: Of the order of images.
    """

    steps: int = 4000
    batch: int = 8
    learning_rate: float = 1e-3
    seed: int = 0

    def rate(self, step: int) -> float:
        """Compute the learning rate at a step, from 0, relative to its peak."""
        warm_up = max(1, round(_WARM_UP * self.steps))
        return min((step + 1) / warm_up, (self.steps - step) / max(1, self.steps - warm_up))

    def batches(self, images: int) -> Iterator[list[int]]:
        """Iterate over the image numbers of every step: all images once, in a new order each time, cut into batches."""
        generator = torch.Generator().manual_seed(self.seed)
        order = itertools.chain.from_iterable(
            torch.randperm(images, generator=generator).tolist() for _ in itertools.count()
        )
        for _ in range(self.steps):
            yield list(itertools.islice(order, min(self.batch, images)))


class TrainingData(NamedTuple):
    """Pictures to train a head on.

    Attributes:
        pairs: Images with their label files.
        read: Returns the target of a pair, [h', w'], the same size for all, and the pixels that its label file lies
            on; raises DataError for a bad one.
        loss: Maps output [B, K, h', w'] and targets to a number.
        outputs: K.
        key: JSON values that change with the targets of the same files.
    """

    pairs: Sequence[LabelledImage]
    read: Callable[[LabelledImage], tuple[Tensor, Frame]]
    loss: Callable[[Tensor, Tensor], Tensor]
    outputs: int
    key: Sequence[object]


@dataclass(frozen=True)
class FeatureReader:
    """Encoding of pictures to one of the two maps of an encoder.

    Attributes:
        encoder: In eval mode.
        image_size: (h, w) in pixels of the encoder's input.
        low_res_size: (h, w) in pixels of its low-resolution pass.
        scale: Scales a picture to ``image_size``, whitened.
    """

    encoder: SharpEncoder
    image_size: tuple[int, int]
    low_res_size: tuple[int, int]
    scale: ScalePicture = whitened_picture

    @torch.no_grad()  # not inference mode: heads are trained on them
    def read(self, image: Image, map_name: MapName) -> Tensor:
        """Encode an RGB picture to features [1, C, h, w] float32 on the encoder's device, in the backbone's space.

        They are those that users get: without the positional pattern that a bias buffer learned, and in normalised
        space where the normalizer has no inverse.

        Raises:
            InputError: When they are NaN or infinite.
        """
        maps = self.encoder(
            self.scale(self.encoder, image, self.image_size),
            low_res_size=self.low_res_size,
            denormalize=self.encoder.normalizer.invertible,
        )
        features: Tensor = getattr(maps, map_name).float()
        check_finite(features)
        return features


class FeatureCache:
    """Features of the pictures of a data set, computed once and then read from files.

    A file's name is a digest of the content of the encoder, the sizes, the pixels that labels lie on, and the name,
    length and time of the picture's file. A damaged one is written again. Beyond the limit features are computed every
    time.

    Args:
        reader: Of the features.
        map_name: The map to cache.
        folder: Of the files; it may have those of other encoders.
        limit: Most bytes of all files of the folder.
    """

    def __init__(self, reader: FeatureReader, map_name: MapName, folder: Path, limit: int) -> None:
        self.reader, self.map_name, self.folder, self.limit = reader, map_name, folder, limit
        sizes = reader.image_size, reader.low_res_size, reader.scale.__name__
        self.key = digest(encoder_key(reader.encoder), *sizes, map_name)
        self._used = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        self._full = False

    def get(self, pair: LabelledImage, frame: Frame) -> Tensor:
        """:meth:`read` the features of the image of a pair whose labels lie on the pixels ``frame``.

        Raises:
            DataError, InputError: When that fails: see ``decode_labelled`` and :class:`FeatureReader`.
        """
        return self.read((pair.keys()[0], frame), lambda: pair.decode(frame))

    def read(self, key: Sequence[object], decode: Callable[[], Image]) -> Tensor:
        """Read the features of a picture, or compute them.

        Args:
            key: JSON values that change with the picture.
            decode: Reads it.

        Returns:
            [C, h, w] on the CPU, in half precision where its range allows.
        """
        path = self.folder / f"{digest(self.key, *key)}.safetensors"
        cached = _load_features(path)
        if cached is not None:
            return cached
        features = self.reader.read(decode(), self.map_name)[0].cpu()
        half = features.half()
        computed = half if half.isfinite().all() else features
        self._store(path, computed)
        return computed

    def _store(self, path: Path, features: Tensor) -> None:
        if self._full:
            return
        content = save({"map": features.contiguous()})
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


@dataclass(frozen=True)
class Head:
    """A head trained for one encoder.

    Attributes:
        reader: Of the features that it is applied to.
        probe: In eval mode.
        images: Number of training images.
        skipped: Name and reason of training images that could not be used.
    """

    reader: FeatureReader
    probe: LinearProbe
    images: int
    skipped: list[tuple[str, str]]

    def __call__(self, image: Image) -> Tensor:
        """Apply to the sharp features of an RGB picture: [1, K, h, w]."""
        output: Tensor = self.probe(self.reader.read(image, "high_res"))
        return output

    @property
    def key(self) -> str:
        """Digest of the weights."""
        return hashlib.sha256(self.probe.classify.weight.cpu().numpy().tobytes()).hexdigest()


def fit_probe(
    features: Callable[[int], Tensor],
    targets: Tensor,
    outputs: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    schedule: Schedule,
    device: torch.device,
    *,
    progress: bool = False,
) -> LinearProbe:
    """Train a probe.

    Args:
        features: Number of an image -> [C, h, w], any floating point type, on any device; the same size for all.
        targets: [N, H, W] on the CPU. The output is scaled to H x W for the loss.
        outputs: K.
        loss: Maps output [B, K, H, W] and targets [B, H, W] to a number.
        schedule: Of the training.
        device: To train on.
        progress: Whether to show a bar on stderr.

    Returns:
        The probe on ``device``, in eval mode, without gradients.
    """
    probe = LinearProbe(len(features(0)), outputs).to(device).train()
    optimizer = torch.optim.AdamW(probe.parameters(), lr=schedule.learning_rate, weight_decay=0)
    batches = list(schedule.batches(len(targets)))
    for step, batch in enumerate(with_progress(batches, "training of the head", progress)):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.rate(step)
        maps = torch.stack([features(number) for number in batch]).to(device)
        truth = targets[batch].to(device)
        error = loss(resize(probe(maps), size_of(truth)), truth)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            logger.info("linear probe: step %d of %d, loss %.3f", step + 1, schedule.steps, error.item())
    return probe.eval().requires_grad_(False)


def train_head(
    reader: FeatureReader,
    map_name: MapName,
    data: TrainingData,
    schedule: Any,
    fit: Callable[..., LinearProbe] = fit_probe,
    *,
    cache_dir: Path | None,
    cache_limit: int,
    scratch: Path | None = None,
    progress: bool = False,
) -> Head:
    """Train a head on one of the maps of an encoder, or load the same from disk.

    Args:
        reader: Of the features.
        map_name: The map to train on.
        data: Training pictures and targets.
        schedule: Of the training, a dataclass.
        fit: Trains a probe by it: :func:`fit_probe`, or another function of the same arguments.
        cache_dir: Folder for features and heads; None: ``scratch``.
        cache_limit: Most bytes of features there.
        scratch: Folder for the head, and for the features until it is trained; None: a temporary one.
        progress: Whether to show bars on stderr.

    Raises:
        DataError: When no training image can be used.
    """
    with ExitStack() as stack:
        folder = cache_dir or scratch or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="featsharp-")))
        cache = FeatureCache(reader, map_name, folder / "features", cache_limit)
        files = [pair.keys() for pair in data.pairs]
        name = digest(cache.key, files, *data.key, asdict(schedule))
        path = folder / "heads" / f"{name}.safetensors"
        cached = load_probe(path, reader.encoder.device)
        if cached is not None:
            return Head(reader, *cached)
        pairs, frames, targets, skipped = read_targets(cache, data.pairs, data.read, progress)
        logger.info("training a head on %d images", len(pairs))
        probe = fit(
            lambda number: cache.get(pairs[number], frames[number]),
            torch.stack(targets),
            data.outputs,
            data.loss,
            schedule,
            reader.encoder.device,
            progress=progress,
        )
        try:
            save_probe(probe, path, len(pairs), skipped)
        except FeatSharpError as error:
            logger.warning("the head is not kept, a stopped evaluation will train it again: %s", error)
        if cache_dir is None:
            shutil.rmtree(cache.folder, ignore_errors=True)  # the limit is for each encoder
    return Head(reader, probe, len(pairs), skipped)


def save_probe(probe: LinearProbe, path: Path, images: int, skipped: list[tuple[str, str]]) -> None:
    """Write a probe with the number of images that it was trained on, and those left out."""
    state = {name: value.cpu().contiguous() for name, value in probe.state_dict().items()}
    write_file(path, save(state, {"about": json.dumps([images, skipped])}))


def load_probe(path: Path, device: torch.device) -> tuple[LinearProbe, int, list[tuple[str, str]]] | None:
    """Load a file of :func:`save_probe`, the probe as of :func:`fit_probe`; None without an intact file."""

    def build(state: dict[str, Tensor], about: Any) -> tuple[LinearProbe, int, list[tuple[str, str]]]:
        images, skipped = about
        probe = LinearProbe(*reversed(state["classify.weight"].shape[:2]))
        probe.load_state_dict(state)
        return probe.to(device).eval().requires_grad_(False), int(images), read_skipped(skipped)

    return read_kept(path, build)


def read_kept(path: Path, build: Callable[[dict[str, Tensor], Any], Kept]) -> Kept | None:
    """Build what an evaluation has kept from the tensors of a file and its JSON "about"; None without an intact file.

    ``build`` raises what damage makes it meet.
    """
    try:
        state, texts = read_tensors(path)
        return build(state, json.loads(texts["about"]))
    except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError):
        return None


def read_skipped(pairs: Sequence[Sequence[object]]) -> list[tuple[str, str]]:
    """Return names and reasons as they were before they were JSON."""
    return [(str(name), str(reason)) for name, reason in pairs]


def read_targets(
    cache: FeatureCache,
    wanted: Sequence[LabelledImage],
    read: Callable[[LabelledImage], tuple[Target, Frame]],
    progress: bool,
) -> tuple[list[LabelledImage], list[Frame], list[Target], list[tuple[str, str]]]:
    """Read training pairs, and fill the cache with their features.

    Args:
        cache: Of features.
        wanted: The pairs.
        read: Returns the target of a pair and the pixels of its labels; raises DataError for a bad one.
        progress: Whether to show a bar on stderr.

    Returns:
        The usable pairs, the pixels of their labels, their targets; (name, reason) of the others.

    Raises:
        DataError: When none is usable.
    """
    pairs: list[LabelledImage] = []
    frames: list[Frame] = []
    targets: list[Target] = []
    skipped = []
    for pair in with_progress(wanted, "training features", progress):
        try:
            target, frame = read(pair)
            cache.get(pair, frame)
        except (DataError, InputError) as error:
            reason = str(error).removeprefix(f"{pair.image}: ")
            logger.warning("training without %s: %s", pair.image, reason)
            skipped.append((pair.image, reason))
        else:
            pairs.append(pair)
            frames.append(frame)
            targets.append(target)
    if not pairs:
        raise DataError(
            f"none of {len(skipped)} training images can be used; the first, {skipped[0][0]}: {skipped[0][1]}"
        )
    return pairs, frames, targets, skipped


def _load_features(path: Path) -> Tensor | None:
    """Load cached features; None where there is no file, or a damaged one."""
    try:
        return load(path.read_bytes())["map"]
    except (OSError, SafetensorError, KeyError):
        return None
