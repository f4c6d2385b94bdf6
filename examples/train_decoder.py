"""A sharp upsampler as a layer of a network: end-to-end training of a small segmentation decoder.

    python examples/train_decoder.py --upsampler resize-conv
    python examples/train_decoder.py --data camvid --upsampler featup --checkpoint featup.pth --steps 400

A frozen backbone gives coarse features; a decoder has to label every pixel. Three decoders see the same pictures for
the same number of steps: bilinear interpolation with a linear head, a learned upsampler that stays as it begins with a
linear head, and the same where both are trained, by the labels alone. It begins at random, or as it was trained before
(--checkpoint). Prints the mean intersection over union on pictures that none has seen, and what training the upsampler
gains over the frozen one.

Without --data pictures are drawn: discs and rectangles of 64 x 64 pixels, on 8 x 8 tokens. With it they are those of a
segmentation data set in any layout of `featsharp eval segmentation`, whose features are computed once.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp import UpsampleLayer, create_backbone, create_encoder, load_from_file

CLASSES, SIDE, FACTOR = 4, 64, 8
VOID = -1  # pixels that do not count
COLOURS = torch.tensor([[0.45, 0.45, 0.45], [0.8, 0.3, 0.2], [0.2, 0.7, 0.3], [0.25, 0.35, 0.85]])


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy discs and rectangles of three classes: images [count, 3, 64, 64] in [0, 1] and labels [count, 64, 64]."""
    rows, cols = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    labels = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for label in labels:
        for _ in range(4):
            kind = int(torch.randint(1, CLASSES, (), generator=generator))
            y, x = torch.randint(0, SIDE, (2,), generator=generator)
            a, b = torch.randint(4, 16, (2,), generator=generator)
            if torch.rand((), generator=generator) < 0.5:
                inside = ((rows - y) / a) ** 2 + ((cols - x) / b) ** 2 < 1
            else:
                inside = ((rows - y).abs() < a) & ((cols - x).abs() < b)
            label[inside] = kind
    noise = 0.12 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return (COLOURS[labels].permute(0, 3, 1, 2) + noise).clamp(0, 1), labels


class Batch(NamedTuple):
    """Features [B, C, h, w], whitened images [B, 3, H, W], and labels [B, H', W']."""

    features: Tensor
    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Pictures to train on, drawn by a generator, and those that are held out."""

    draw: Callable[[int, torch.Generator], Batch]
    held_out: list[Batch]
    embed_dim: int
    classes: int
    factor: int


def shapes(seed: int = 0) -> Data:
    """Drawn pictures, other ones each time, and 64 held-out ones."""
    backbone = create_backbone("toy-vit")
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))

    @torch.no_grad()
    def batch(count: int, generator: torch.Generator) -> Batch:
        images, labels = draw(count, generator)
        images = (images - mean) / std
        return Batch(backbone(images).features, images, labels)

    held_out = torch.Generator().manual_seed(seed + 1)
    return Data(batch, [batch(16, held_out) for _ in range(4)], backbone.embed_dim, CLASSES, FACTOR)


def pictures_of(folder: Path, backbone: str, checkpoint: str | None, limit: int | None = None) -> Data:
    """Pictures of a data set with labels, at the native size of the backbone; the features of all are kept."""
    from featsharp.evaluation.features import whitened_picture
    from featsharp.evaluation.layouts.frames import decode_labelled
    from featsharp.evaluation.layouts.layout import spread
    from featsharp.evaluation.layouts.segmentation import open_segmentation

    data = open_segmentation(folder)
    encoder = load_from_file(checkpoint, featurizer=backbone) if checkpoint else create_encoder(backbone, "bilinear", 2)
    size, grid = encoder.backbone.input_size, encoder.backbone.grid_size(encoder.backbone.input_size)

    @torch.no_grad()
    def read(pair) -> Batch:
        classes, frame = data.code.read(pair.root / pair.label, pair.label)
        image = whitened_picture(encoder, decode_labelled(pair.root / pair.image, pair.image, frame), size)
        labels = torch.from_numpy(classes).float()[None, None]
        labels = F.interpolate(labels, (4 * grid[0], 4 * grid[1]), mode="nearest-exact")[0].long()
        return Batch(encoder.encode(image)[0], image, labels)

    train, held_out = ([read(pair) for pair in spread(pairs, limit)] for pairs in (data.train, data.val))

    def batch(count: int, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(train), (count,), generator=generator).tolist()
        return Batch(*map(torch.cat, zip(*(train[number] for number in chosen), strict=True)))

    return Data(batch, held_out, encoder.embed_dim, len(data.code.classes), int(encoder.factor))


class Decoder(nn.Module):
    """Upsampled features and a linear head."""

    def __init__(self, upsample: UpsampleLayer, embed_dim: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.upsample = upsample
        self.head = nn.Conv2d(embed_dim, classes, 1)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        return self.head(self.upsample(features, images))


def train_decoder(
    upsampler: str | nn.Module,
    *,
    steps: int,
    data: Data | None = None,
    batch: int = 8,
    seed: int = 0,
    recompute: bool = False,
    frozen: bool = False,
) -> float:
    """Train a decoder, or its head alone; returns its mean IoU on the held-out pictures.

    ``upsampler`` is a name, or an object that is copied; ``data`` is drawn where none is given.
    """
    data = data or shapes(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    if isinstance(upsampler, str):
        layer = UpsampleLayer(upsampler, data.embed_dim, data.factor, recompute=recompute)
    else:
        layer = UpsampleLayer(copy.deepcopy(upsampler), recompute=recompute)
    decoder = Decoder(layer, data.embed_dim, data.classes)
    decoder.upsample.requires_grad_(not frozen)
    rate = 5e-3 if isinstance(upsampler, str) else 5e-4  # what was trained before is not thrown away
    groups = [
        {"params": [x for x in decoder.upsample.parameters() if x.requires_grad], "lr": rate},
        {"params": list(decoder.head.parameters()), "lr": 5e-3},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [group["lr"] for group in groups], total_steps=steps)
    for _ in range(steps):
        features, images, labels = data.draw(batch, generator)
        logits = enlarge(decoder(features, images), labels)
        loss = F.cross_entropy(logits, labels, ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    decoder.eval()
    with torch.no_grad():
        predicted = [enlarge(decoder(one.features, one.images), one.labels).argmax(1) for one in data.held_out]
    return mean_iou(torch.cat(predicted), torch.cat([one.labels for one in data.held_out]))


def enlarge(logits: Tensor, labels: Tensor) -> Tensor:
    """Enlarge logits [B, K, h, w] bilinearly to labels [B, H, W]."""
    return F.interpolate(logits, labels.shape[-2:], mode="bilinear")


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Mean of intersection over union of the classes that there are; void pixels do not count."""
    predicted, labels = predicted[labels != VOID], labels[labels != VOID]
    ious = []
    for kind in labels.unique():
        both, either = (predicted == kind) & (labels == kind), (predicted == kind) | (labels == kind)
        ious.append(both.sum() / either.sum())
    return torch.stack(ious).mean().item()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upsampler", default="resize-conv", help="a guided upsampler; see featsharp ls upsamplers")
    parser.add_argument("--checkpoint", metavar="FILE", help="begin with its upsampler; with --data")
    parser.add_argument("--data", type=Path, metavar="DIR", help="pictures with labels; default: drawn ones")
    parser.add_argument("--backbone", default="vits14-focus", help="of --data")
    parser.add_argument("--limit", type=int, metavar="N", help="N pictures of each split, spread over its list")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, more time")
    arguments = parser.parse_args(given)
    if arguments.checkpoint and arguments.data is None:
        parser.error("--checkpoint is of a backbone of its own, not of the drawn pictures'; give --data")
    upsampler: str | nn.Module = arguments.upsampler
    if arguments.checkpoint:
        upsampler = load_from_file(arguments.checkpoint, featurizer=arguments.backbone).upsampler
    data = None
    if arguments.data is not None:
        data = pictures_of(arguments.data, arguments.backbone, arguments.checkpoint, arguments.limit)
    scores = {}
    for label, one, frozen in (
        ("bilinear", "bilinear", False),
        (f"{arguments.upsampler}, frozen", upsampler, True),
        (arguments.upsampler, upsampler, False),
    ):
        scores[label] = train_decoder(
            one, data=data, steps=arguments.steps, seed=arguments.seed, recompute=arguments.recompute, frozen=frozen
        )
        print(f"{label:22} mean IoU {scores[label]:.3f}", flush=True)
    print(f"trained end to end: {scores[arguments.upsampler] - scores[f'{arguments.upsampler}, frozen']:+.3f}")


if __name__ == "__main__":
    main()
