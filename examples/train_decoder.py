"""A sharp upsampler as a layer of a network: end-to-end training of a small segmentation decoder.

    python examples/train_decoder.py --upsampler resize-conv

A frozen backbone gives features of 8 x 8 tokens; a decoder has to label every one of 64 x 64 pixels. Three decoders see
the same images for the same number of steps: bilinear interpolation with a linear head, a learned upsampler that stays
as it begins with a linear head, and the same where both are trained, by the labels alone. Prints the mean intersection
over union on images that none has seen, and what training the upsampler gains over the frozen one.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featsharp import UpsampleLayer, create_backbone

CLASSES, SIDE, FACTOR = 4, 64, 8
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


class Decoder(nn.Module):
    """Upsampled features and a linear head."""

    def __init__(self, upsampler: str, embed_dim: int, *, recompute: bool = False) -> None:
        super().__init__()
        self.upsample = UpsampleLayer(upsampler, embed_dim, FACTOR, recompute=recompute)
        self.head = nn.Conv2d(embed_dim, CLASSES, 1)

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        return self.head(self.upsample(features, images))


def train_decoder(
    upsampler: str, *, steps: int, batch: int = 8, seed: int = 0, recompute: bool = False, frozen: bool = False
) -> float:
    """Train a decoder, or its head alone, on fresh images; returns its mean IoU on 64 held-out ones."""
    backbone = create_backbone("toy-vit")
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    generator = torch.Generator().manual_seed(seed)
    held_out = draw(64, torch.Generator().manual_seed(seed + 1))
    torch.manual_seed(seed)
    decoder = Decoder(upsampler, backbone.embed_dim, recompute=recompute)
    decoder.upsample.requires_grad_(not frozen)
    optimizer = torch.optim.AdamW([x for x in decoder.parameters() if x.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        images, labels = draw(batch, generator)
        images = (images - mean) / std
        loss = F.cross_entropy(decoder(backbone(images).features, images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    decoder.eval()
    images, labels = (held_out[0] - mean) / std, held_out[1]
    with torch.no_grad():
        predicted = torch.cat([decoder(backbone(x).features, x).argmax(1) for x in images.split(16)])
    return mean_iou(predicted, labels)


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Mean over classes of intersection over union."""
    ious = []
    for kind in range(CLASSES):
        both, either = (predicted == kind) & (labels == kind), (predicted == kind) | (labels == kind)
        ious.append(both.sum() / either.sum())
    return torch.stack(ious).mean().item()


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upsampler", default="resize-conv", help="a guided upsampler; see featsharp ls upsamplers")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing: less memory, more time")
    arguments = parser.parse_args(given)
    scores = {}
    for label, name, frozen in (
        ("bilinear", "bilinear", False),
        (f"{arguments.upsampler}, frozen", arguments.upsampler, True),
        (arguments.upsampler, arguments.upsampler, False),
    ):
        scores[label] = train_decoder(name, steps=arguments.steps, recompute=arguments.recompute, frozen=frozen)
        print(f"{label:22} mean IoU {scores[label]:.3f}")
    print(f"trained end to end: {scores[arguments.upsampler] - scores[f'{arguments.upsampler}, frozen']:+.3f}")


if __name__ == "__main__":
    main()
