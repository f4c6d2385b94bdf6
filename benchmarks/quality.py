r"""Train upsamplers on the same photographs with the same steps, and measure them on the others.

    python benchmarks/quality.py --photos PHOTOS --steps 1500 --output benchmarks/results/quality-vits14-focus-cpu
    python benchmarks/quality.py --photos PHOTOS --steps 120 --before --upsamplers sapa-2x "jafar-2x objective=jafar" \
        --output benchmarks/results/upsamplers-quality-cpu

The first --train-count photographs by name train, the rest are held out. An upsampler is a value of +upsampler=, with
further overrides of the configuration behind it. Writes OUTPUT.md and OUTPUT.json. Trainings go to --work and are
resumed from there, so an interrupted benchmark goes on where it stopped.
"""

import argparse
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from checkout import commit

from featsharp.bench.measure import processor
from featsharp.builder import create_encoder, load_from_file
from featsharp.cli.eval import load_downsampler
from featsharp.configs.compose import compose
from featsharp.data.images import is_image_name
from featsharp.device import autocast_dtype
from featsharp.evaluation.estimates import Estimate, bootstrap
from featsharp.evaluation.fidelity import FidelityMeter
from featsharp.evaluation.images import ImageSet
from featsharp.evaluation.zoom import ZoomMeter
from featsharp.memory import keep_freed_memory
from featsharp.model import SharpEncoder
from featsharp.ops.resize import size_of
from featsharp.train import train
from featsharp.upsamplers import create_upsampler

FACTOR = 2


def main() -> None:
    arguments = parse_arguments()
    source = commit()
    keep_freed_memory()
    arguments.work.mkdir(parents=True, exist_ok=True)
    split_photos(arguments.photos, arguments.work, arguments.train_count)
    backbone_dtype = autocast_dtype("auto", torch.device("cpu"))
    untrained = {"low resolution": ("identity", 1), "bilinear": ("bilinear", FACTOR), "tile": ("tile", FACTOR)}
    seconds = {upsampler: train_one(upsampler, arguments) for upsampler in arguments.upsamplers}

    size = tuple(2 * side for side in load_backbone_size(arguments.backbone))
    rows: dict[str, dict[str, Estimate]] = {}

    def add_row(label: str, encoder: SharpEncoder, downsampler: torch.nn.Module | None = None) -> None:
        encoder.backbone.autocast_dtype = backbone_dtype
        rows[label] = measure(encoder, downsampler, arguments.work / "heldout", size, arguments.heldout_count)
        print(label, {name: round(estimate.value, 4) for name, estimate in rows[label].items()}, flush=True)

    for label, (name, factor) in untrained.items():
        add_row(label, create_encoder(arguments.backbone, name, factor))
    for upsampler in arguments.upsamplers:
        checkpoint = run_folder(upsampler, arguments) / "last.pth"
        if arguments.before:
            add_row(f"{upsampler}, untrained", untrained_encoder(checkpoint))
        encoder = load_from_file(checkpoint)
        add_row(upsampler, encoder, load_downsampler(str(checkpoint), encoder))
    write_report(arguments, rows, seconds, size, source)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    # FeatSharp first: it is the long one.
    parser.add_argument("--upsamplers", nargs="+", default=["featsharp-2x", "featup-2x"], metavar="NAME-FACTORx")
    parser.add_argument("--before", action="store_true", help="measure each upsampler before training, too")
    parser.add_argument("--backbone", default="vits14-focus", help="a value of +model= and a backbone name")
    parser.add_argument("--train-count", type=int, default=650)
    parser.add_argument("--heldout-count", type=int, help="measure on so many of the held-out ones; default: all")
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


def run_folder(upsampler: str, arguments: argparse.Namespace) -> Path:
    """Folder of the training of an upsampler."""
    return arguments.work / upsampler.replace(" ", ",")


def train_one(upsampler: str, arguments: argparse.Namespace) -> float:
    """Train to the last step or resume; returns the median seconds per step of the run that finished it."""
    folder = run_folder(upsampler, arguments)
    timing = folder / "seconds.json"
    name, *overrides = upsampler.split()
    config = compose(
        [
            f"+model={arguments.backbone}",
            f"+upsampler={name}",
            *overrides,
            f"train_data_dir={arguments.work / 'train'}",
            f"output_base={arguments.work}",
            f"output_subdir='{folder.name}'",
            f"num_training_steps={arguments.steps}",
            f"batch_size={arguments.batch_size}",
            "val_frequency=0",
            "device=cpu",
            "checkpoint_frequency=100",
        ]
    )
    trainer = train(config)
    if trainer.clock.works:  # some steps were run
        timing.write_text(json.dumps(trainer.clock.seconds_per_step))
    return float(json.loads(timing.read_text()))


def untrained_encoder(checkpoint: Path) -> SharpEncoder:
    """The encoder of a trained checkpoint as it was before the first step: same normalizer, no bias, fresh weights."""
    encoder = load_from_file(checkpoint)
    torch.manual_seed(0)  # that of the training
    recipe = encoder.recipe
    encoder.upsampler = create_upsampler(
        recipe["upsampler"], encoder.backbone, recipe["factor"], options=recipe["options"]
    ).eval()
    if encoder.bias_buffer is not None:
        torch.nn.init.zeros_(encoder.bias_buffer.buffer)
    return encoder


def load_backbone_size(name: str) -> tuple[int, int]:
    """Native (h, w) of a backbone."""
    return create_encoder(name, "identity", 1).backbone.input_size


def measure(
    encoder: SharpEncoder,
    downsampler: torch.nn.Module | None,
    folder: Path,
    size: tuple[int, ...],
    limit: int | None,
) -> dict[str, Estimate]:
    """Fidelity (area and learned downsampler), cosine and zoom cosine over a folder, all at one input size.

    "kept" is the cosine of the map, averaged over low-resolution tokens, with the low-resolution features.
    """
    downsamplers = {} if downsampler is None else {"own": downsampler}
    fidelity = FidelityMeter(encoder, downsamplers=downsamplers, size=(size[0], size[1]))
    zoom = ZoomMeter(encoder)
    kept = []
    for _, image in ImageSet(folder, limit=limit):
        fidelity.add(image)
        zoom.add(image)
        out = encoder.encode_image(image, denormalize=True)
        pooled = F.adaptive_avg_pool2d(out.high_res, size_of(out.low_res))
        kept.append([F.cosine_similarity(pooled, out.low_res).mean().item()])
    return {**fidelity.result(), "zoom": zoom.result(), "kept": bootstrap(kept, lambda rows: float(rows.mean()))}


def write_report(
    arguments: argparse.Namespace,
    rows: Mapping[str, Mapping[str, Estimate]],
    seconds: Mapping[str, float],
    size: tuple[int, ...],
    source: str,
) -> None:
    """Write OUTPUT.json with all figures and OUTPUT.md with the table."""
    settings = [f"--train-count {arguments.train_count}", f"--steps {arguments.steps}"]
    settings.append(f"--batch-size {arguments.batch_size}")
    if arguments.heldout_count is not None:
        settings.append(f"--heldout-count {arguments.heldout_count}")
    if arguments.before:
        settings.append("--before")
    upsamplers = " ".join(f'"{name}"' if " " in name else name for name in arguments.upsamplers)
    command = (
        f"python benchmarks/quality.py --photos PHOTOS {' '.join(settings)} --upsamplers {upsamplers} "
        f"--output {arguments.output.as_posix()}"
    )
    machine = f"{processor()}, {os.cpu_count()} cores, no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    content = {
        "command": command,
        "commit": source,
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
        f"{arguments.batch_size}, measured on {arguments.heldout_count or 'all'} of the others. Input {size[0]}, "
        f"low-resolution pass {size[0] // 2}. Higher is better in every column but the last; brackets are 95 % "
        'bootstrap intervals over images. "Kept" is the cosine of the map, averaged over each low-resolution token, '
        "with the low-resolution features.",
        "",
        "| encoder | fidelity (area) | fidelity (own downsampler) | cosine | zoom cosine | kept | seconds per step |",
        "|---|---|---|---|---|---|---|",
    ]
    for label in rows:
        speed = f"{seconds[label]:.2f}" if label in seconds else ""
        cells = [cell(label, name) for name in ("area", "own", "cosine", "zoom", "kept")]
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


if __name__ == "__main__":
    main()
