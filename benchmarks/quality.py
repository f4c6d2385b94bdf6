"""Train FeatUp-JBU and FeatSharp on the same photographs with the same steps, and measure both on the others.

    python benchmarks/quality.py --photos PHOTOS --steps 1500 --output benchmarks/results/quality-vits14-focus-cpu

The first --train-count photographs by name train, the rest are held out. Writes OUTPUT.md and OUTPUT.json. Trainings go
to --work and are resumed from there, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from featsharp.benchmark.measure import processor
from featsharp.builder import create_encoder, load_from_file
from featsharp.cli.eval import own_downsampler
from featsharp.configs.compose import compose
from featsharp.data.images import is_image_name
from featsharp.evaluation.fidelity import FidelityMeter
from featsharp.evaluation.samples import Estimate, ImageSet
from featsharp.evaluation.zoom import ZoomMeter
from featsharp.model import SharpEncoder
from featsharp.ops.memory import keep_freed_memory
from featsharp.train import autocast_dtype, train

FACTOR = 2


def main() -> None:
    arguments = parse_arguments()
    keep_freed_memory()
    arguments.work.mkdir(parents=True, exist_ok=True)
    split_photos(arguments.photos, arguments.work, arguments.train_count)
    backbone_dtype = autocast_dtype("auto", torch.device("cpu"))
    untrained = {"low resolution": ("identity", 1), "bilinear": ("bilinear", FACTOR), "tile": ("tile", FACTOR)}
    trained = {"FeatUp-JBU": "featup-2x", "FeatSharp": "featsharp-2x"}
    seconds = {}
    # FeatSharp first: it is the long one.
    for label in reversed(trained):
        seconds[label] = train_one(trained[label], arguments)

    size = tuple(2 * side for side in load_backbone_size(arguments.backbone))
    rows: dict[str, dict[str, Estimate]] = {}
    for label in [*untrained, *trained]:
        if label in untrained:
            name, factor = untrained[label]
            encoder, own = create_encoder(arguments.backbone, name, factor), None
        else:
            checkpoint = arguments.work / trained[label] / "last.pth"
            encoder = load_from_file(checkpoint)
            own = own_downsampler(str(checkpoint), encoder)
        encoder.backbone.autocast_dtype = backbone_dtype
        rows[label] = measure(encoder, own, arguments.work / "heldout", size)
        print(label, {name: round(estimate.value, 4) for name, estimate in rows[label].items()}, flush=True)
    write_report(arguments, rows, seconds, size)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--backbone", default="vits14-focus", help="a value of +model= and a backbone name")
    parser.add_argument("--train-count", type=int, default=650)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("out/quality"))
    parser.add_argument("--output", type=Path, required=True, help="without suffix")
    return parser.parse_args()


def split_photos(photos: Path, work: Path, train_count: int) -> None:
    """Link the photographs into work/train and work/heldout."""
    names = sorted(path.name for path in photos.iterdir() if is_image_name(path.name))
    for folder, chosen in (("train", names[:train_count]), ("heldout", names[train_count:])):
        (work / folder).mkdir(exist_ok=True)
        for name in chosen:
            link = work / folder / name
            if not link.exists():
                os.symlink((photos / name).resolve(), link)


def train_one(upsampler: str, arguments: argparse.Namespace) -> float:
    """Train to the last step, or go on; returns the median seconds per step of the run that finished it."""
    timing = arguments.work / f"{upsampler}.seconds.json"
    config = compose(
        [
            f"+model={arguments.backbone}",
            f"+upsampler={upsampler}",
            f"train_data_dir={arguments.work / 'train'}",
            f"output_base={arguments.work}",
            f"output_subdir={upsampler}",
            f"num_training_steps={arguments.steps}",
            f"batch_size={arguments.batch_size}",
            "val_frequency=0",
            "device=cpu",
            "checkpoint_frequency=100",
        ]
    )
    trainer = train(config)
    if trainer.seconds_per_step == trainer.seconds_per_step:  # not NaN: some steps were run
        timing.write_text(json.dumps(trainer.seconds_per_step))
    return float(json.loads(timing.read_text()))


def load_backbone_size(name: str) -> tuple[int, int]:
    """Native (h, w) of a backbone."""
    return create_encoder(name, "identity", 1).backbone.input_size


def measure(
    encoder: SharpEncoder, own: torch.nn.Module | None, folder: Path, size: tuple[int, ...]
) -> dict[str, Estimate]:
    """Fidelity (area and own downsampler), cosine and zoom cosine over a folder, all at one input size."""
    fidelity = FidelityMeter(encoder, downsamplers={} if own is None else {"own": own}, size=(size[0], size[1]))
    zoom = ZoomMeter(encoder)
    for _, image in ImageSet(folder):
        fidelity.add(image)
        zoom.add(image)
    return {**fidelity.result(), "zoom": zoom.result()}


def write_report(
    arguments: argparse.Namespace,
    rows: Mapping[str, Mapping[str, Estimate]],
    seconds: Mapping[str, float],
    size: tuple[int, ...],
) -> None:
    """OUTPUT.json with everything, OUTPUT.md for people."""
    command = (
        f"python benchmarks/quality.py --photos PHOTOS --train-count {arguments.train_count} --steps {arguments.steps} "
        f"--batch-size {arguments.batch_size} --output {arguments.output.as_posix()}"
    )
    machine = f"{processor()}, {os.cpu_count()} cores, no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    content = {
        "command": command,
        "commit": commit(),
        "machine": machine,
        "versions": versions,
        "seconds_per_step": dict(seconds),
        "rows": {label: {name: value._asdict() for name, value in row.items()} for label, row in rows.items()},
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")

    def cell(label: str, name: str) -> str:
        if name not in rows[label]:
            return ""
        value = rows[label][name]
        return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"

    lines = [
        f"# Quality of 2x upsamplers on `{arguments.backbone}`",
        "",
        f"Trained on the first {arguments.train_count} photographs by name, {arguments.steps} steps of batch "
        f"{arguments.batch_size}, measured on the others. Input {size[0]}, low-resolution pass {size[0] // 2}. Higher "
        "is better in every column; brackets are 95 % bootstrap intervals over images.",
        "",
        "| encoder | fidelity, area pooling | fidelity, own downsampler | cosine | zoom cosine | seconds per step |",
        "|---|---|---|---|---|---|",
    ]
    for label in rows:
        speed = f"{seconds[label]:.2f}" if label in seconds else ""
        cells = [cell(label, name) for name in ("area", "own", "cosine", "zoom")]
        lines.append(f"| {label} | {' | '.join(cells)} | {speed} |")
    lines += [
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {machine}. Versions: {versions}. Commit: {content['commit']}.",
        "",
    ]
    arguments.output.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def commit() -> str:
    """The commit of the checkout this runs from."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
