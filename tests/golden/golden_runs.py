"""Recorded runs of commands: training, evaluation, the implicit fit, single pictures."""

import contextlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_base import (
    COUNTS,
    FITTED,
    HEADS,
    TRAINED,
    Values,
    add,
    picture,
    save_pictures,
    smooth_images,
    state_of,
)
from PIL import Image
from torch import Tensor

from featsharp import load_from_file
from featsharp.cli.main import main as featsharp_command
from featsharp.implicit import load_fit
from featsharp.train import main as train_command

# Training

LOSSES: list[tuple[str, float, int]] = []


class Losses:
    """A logger, as users can write one: keeps the scalars of a run."""

    def __init__(self, folder: Path) -> None:
        LOSSES.clear()

    def config(self, config: Mapping[str, Any]) -> None:
        pass

    def scalar(self, name: str, value: float, step: int) -> None:
        if name.startswith(("loss/", "optim/", "val/")):  # the others are of the machine
            LOSSES.append((name, value, step))

    def image(self, name: str, image: Tensor, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def train(upsampler: str, overrides: tuple[str, ...], folder: Path) -> Values:
    """Three steps by the command: all scalars, and the weights that the checkpoint holds."""
    arguments = [
        "+model=toy-vit",
        f"+upsampler={upsampler}",
        f"train_data_dir={save_pictures(folder / 'photos', 4)}",
        f"output_base={folder / 'outputs'}",
        "batch_size=2",
        "num_workers=0",
        # Adam turns the rounding of tiny gradients, which is the processor's, into steps as large as the others.
        "optim.learning_rate=1e-4",
        "num_training_steps=3",
        "log_frequency=1",
        "val_frequency=3",
        "normalizer.num_samples=8",
        "normalizer.batch_size=4",
        "viz.num_images=1",
        f"viz.type={Losses.__module__}:{Losses.__name__}",
        "model.dtype=float32",
        "upsampler.dtype=float32",
        "device=cpu",
        "progress=false",
    ]
    assert train_command([*arguments, *overrides]) == 0
    values: Values = {f"{name} at {step}": value for name, value, step in LOSSES}
    (last,) = (folder / "outputs").rglob("last.pth")
    return values | state_of(torch.load(last, weights_only=True)["model"])


RUNS = {
    "featsharp": ("featsharp-2x", ()),
    "featsharp, accumulated": ("featsharp-2x", ("accumulation_steps=2", "spectral=false", "bias_buffer=false")),
    "featsharp, cached features": ("featsharp-2x", ("feature_cache.samples=4",)),
    "featsharp, all of multi-view": (
        "featsharp-2x",
        ("objective.distance=l1", "objective.tv_weight=0.1", "objective.downsampler=area", "views.flip=0.5"),
    ),
    "featsharp-published": ("featsharp-published-2x", ()),
    "featsharp-progressive": ("featsharp-progressive-4x", ()),
    "featsharp-linear": ("featsharp-linear-2x", ("linear_fit.samples=8", "num_training_steps=0")),
    "featup-original": ("featup-original-2x", ()),
    "featup-published": ("featup-published-2x", ()),
    "resfu, smooth L1": ("resfu-2x", ("objective.distance=smooth_l1",)),
    "tile, layernorm": ("tile-2x", ("normalizer=layernorm",)),
    "lift": ("lift-2x", ()),
    "lift, published": ("lift-2x", ("objective.distance=cosine", "objective.subsample=slice", "normalizer=none")),
    "resize-conv, l1": ("resize-conv-2x", ("objective=reconstruction", "objective.distance=l1")),
    "jafar": ("jafar-2x", ("objective=jafar",)),
    "anyup": ("anyup-2x", ("objective=jafar",)),
}
for _label, (_name, _overrides) in RUNS.items():
    # AnyUp amplifies rounding: its first gradient differs by .08 % between AVX2 and AVX512, its third by .2 %.
    add(f"train/{_label}", train, _name, _overrides, tolerance=5 * TRAINED if _label == "anyup" else TRAINED)


# Evaluation


def evaluate(task: str, folder: Path, *arguments: object, upsamplers: tuple[str, ...] = ()) -> Values:
    """The result that a task writes for toy-vit, numbers of single images included."""
    command = ["eval", task, *map(str, arguments), "--device", "cpu", "--dtype", "float32"]
    if upsamplers:
        command += ["--upsampler", *upsamplers]
    if task != "delta-m":
        command += ["--backbone", "toy-vit"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert featsharp_command([*command, "--json", str(folder / "result.json")]) == 0
    content = json.loads((folder / "result.json").read_text())
    numbers = dict(_leaves(content["encoders"] if "encoders" in content else content["result"]))
    return {name: value for name, value in numbers.items() if not isinstance(value, str | bool)}


def _leaves(content: Any, name: str = "") -> Iterator[tuple[str, Tensor | float | str]]:
    """Numbers, texts and lists of numbers inside of JSON, by path."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key == "items":
                numbers = [v for _, v in sorted(_leaves(value)) if not isinstance(v, str)]
                yield f"{name}items", torch.cat([torch.as_tensor(v, dtype=torch.float64).flatten() for v in numbers])
            else:
                yield from _leaves(value, f"{name}{key}/")
    elif isinstance(content, list) and content and not isinstance(content[0], dict | str):
        yield name.rstrip("/"), torch.tensor(content, dtype=torch.float64)
    elif isinstance(content, list):
        yield from _leaves(dict(enumerate(content)), name)
    elif content is not None:
        yield name.rstrip("/"), content


BOTH = ("bilinear-2x", "tile-2x")


def on_images(task: str, arguments: tuple[object, ...], folder: Path) -> Values:
    images = save_pictures(folder / "photos", 3, (144, 176))
    return evaluate(task, folder, "--data", images, *arguments, upsamplers=BOTH)


def drift(folder: Path) -> Values:
    """Applied again and again: an interpolation and a guided upsampler with a checkpoint."""
    train("lift-2x", (), folder)
    (last,) = (folder / "outputs").rglob("last.pth")
    options = ("--data", folder / "photos", "--iterations", 2, "--checkpoint", f"trained={last}")
    return evaluate("drift", folder, *options, upsamplers=("bilinear-2x",))


def trained_fidelity(folder: Path) -> Values:
    """Fidelity of a checkpoint with the downsampler that it was trained with."""
    train("featsharp-2x", (), folder)
    (last,) = (folder / "outputs").rglob("last.pth")
    return evaluate("fidelity", folder, "--data", folder / "photos", "--checkpoint", f"trained={last}")


def segmentation(arguments: tuple[object, ...], folder: Path) -> Values:
    """Rectangles of three classes in noisy colours."""
    rng = np.random.default_rng(0)
    colours = np.array([[200, 60, 70], [70, 180, 80], [60, 80, 190]])
    for number in range(8):
        truth = np.kron(rng.integers(0, 3, (2, 3)), np.ones((64, 64), int))
        pixels = np.clip(colours[truth] + rng.normal(0, 30, (*truth.shape, 3)), 0, 255)
        for kind, content in (("images", pixels), ("labels", truth)):
            path = folder / "data" / kind / ("train" if number < 5 else "val") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content.astype(np.uint8)).save(path)
    options = ("--steps", 20, "--low-res-size", "64x96", *arguments)
    return evaluate("segmentation", folder, "--data", folder / "data", *options, upsamplers=BOTH)


POINTS = np.array([[12, 12], [28, 13], [12, 44], [36, 35], [37, 20]])


def correspondence(folder: Path) -> Values:
    """SPair's layout: pictures whose middle moves by a few pixels before another ground."""
    root = folder / "data"
    for path in (root / "JPEGImages" / "cat", root / "PairAnnotation" / "test"):
        path.mkdir(parents=True)
    for number in range(3):
        source, target = np.array(picture(number, (64, 64))), np.array(picture(number + 10, (64, 64)))
        move = np.array([6 + number, 3])
        target[8 + move[1] : 48 + move[1], 8 + move[0] : 48 + move[0]] = source[8:48, 8:48]
        for name, pixels in ((f"a{number}", source), (f"b{number}", target)):
            Image.fromarray(pixels).save(root / "JPEGImages" / "cat" / f"{name}.jpg", quality=100, subsampling=0)
        content = {
            "src_imname": f"a{number}.jpg",
            "trg_imname": f"b{number}.jpg",
            "src_kps": POINTS.tolist(),
            "trg_kps": (POINTS + move).tolist(),
            "src_bndbox": [8, 8, 48, 48],
            "trg_bndbox": [int(v) for v in (*(8 + move), *(48 + move))],
            "category": "cat",
        }
        path = root / "PairAnnotation" / "test" / f"{number:06}-a{number}-b{number}:cat.json"
        path.write_text(json.dumps(content))
    return evaluate("correspondence", folder, "--data", root, "--low-res-size", "64x64", upsamplers=BOTH)


def boundaries(folder: Path) -> Values:
    """BSDS500's layout: two annotators of pictures of coloured rectangles."""
    from scipy.io import savemat

    images, truths = folder / "data" / "images" / "test", folder / "data" / "groundTruth" / "test"
    images.mkdir(parents=True)
    truths.mkdir(parents=True)
    for number in range(2):
        rng = np.random.default_rng(number)
        regions = np.kron(rng.integers(0, 4, (3, 4)), np.ones((32, 36), int))
        pixels = np.clip(rng.integers(0, 256, (4, 3))[regions] + rng.normal(0, 12, (*regions.shape, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{number}.png")
        edges = np.zeros(regions.shape, bool)
        edges[:-1] |= regions[:-1] != regions[1:]
        edges[:, :-1] |= regions[:, :-1] != regions[:, 1:]
        cells = np.empty((1, 2), dtype=object)
        for annotator, rows in enumerate((96, 64)):
            seen = edges & (np.arange(96) < rows)[:, None]
            cells[0, annotator] = {"Segmentation": regions.astype(np.uint16), "Boundaries": seen}
        savemat(truths / f"{number}.mat", {"groundTruth": cells})
    options = ("--split", "test", "--thresholds", 9)
    return evaluate("boundaries", folder, "--data", folder / "data", *options, upsamplers=BOTH)


def small_objects(folder: Path) -> Values:
    """COCO's instances: noisy boxes of three classes in three sizes."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(5):
        pixels = rng.normal(128, 20, (240, 320, 3))
        for place, (x, y, w, h) in enumerate(((22, 31, 24, 24), (101, 25, 60, 60), (150, 110, 130, 100))):
            category = (number + place) % 3
            pixels[y : y + h, x : x + w] += rng.normal(0, 30, 3) + 40 * (np.arange(3) == category)
            corners = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": category, "bbox": [x, y, w, h],
                 "segmentation": [corners], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 240, "width": 320})
    content = {"images": images, "annotations": annotations, "categories": []}
    (folder / "instances.json").write_text(json.dumps(content))
    options = ("--data", folder / "images", "--labels", folder / "instances.json")
    return evaluate("small-objects", folder, *options, upsamplers=BOTH)


def delta_m(folder: Path) -> Values:
    rows = (
        "model,knn,ade20k,voc,rmse",
        "group,classification,dense,dense,depth",
        "better,higher,,,lower",
        "plain,80,40,50,0.5",
        "sharp,82,44,49,0.4",
        "blurred,80,38,50,0.6",
    )
    (folder / "scores.csv").write_text("\n".join(rows) + "\n")
    return evaluate("delta-m", folder, "--data", folder / "scores.csv", "--baseline", "plain")


def flops(folder: Path) -> Values:
    """Operations of the backbone and of each upsampler."""
    upsamplers = ("featsharp", "featup", "jafar", "resfu", "sapa", "carafe", "lift", "tile", "bilinear")
    values = evaluate("flops", folder, "--factors", 2, upsamplers=upsamplers)
    return {name: value for name, value in values.items() if name.endswith(("/backbone", "/upsampler", "/total"))}


for _task, _arguments in {
    "fidelity": ("--views", 3),
    "zoom": ("--crops", 2),
    "cka": ("--sizes", 32, 64, 96),
    "reference": (),
}.items():
    add(f"eval/{_task}", on_images, _task, _arguments)
add("eval/drift, train", drift, tolerance=TRAINED)
add("eval/fidelity, train", trained_fidelity, tolerance=TRAINED)
add("eval/segmentation", segmentation, (), tolerance=HEADS)
add("eval/segmentation, low-res head", segmentation, ("--head", "low-res"), tolerance=HEADS)
add("eval/correspondence", correspondence)
add("eval/boundaries", boundaries)
add("eval/small-objects", small_objects)
add("eval/delta-m", delta_m)
add("eval/flops", flops, tolerance=COUNTS, exact=False)


# Other commands


def implicit(arguments: tuple[object, ...], folder: Path) -> Values:
    """A network of a few steps, fitted to one picture."""
    picture(0).save(folder / "photo.png")
    command = ["fit", folder / "photo.png", "--backbone", "toy-vit", "--views", 6, "--steps", 4, "--query", "20x30"]
    command += ["-o", folder / "fit", "--device", "cpu", *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        featsharp_command([*map(str, command)])
    fitted = load_fit(folder / "fit" / "photo.pth")
    with torch.no_grad():
        return {"features": fitted.features((25, 31))} | _tensors_of(folder / "fit" / "photo.safetensors", printed)


def upsample(folder: Path) -> Values:
    """Features of a picture by the command, with the weights that come with the package."""
    picture(0, (150, 210)).save(folder / "photo.png")
    command = ["upsample", str(folder / "photo.png"), "-o", str(folder / "out"), "--size", "112x168", "--device", "cpu"]
    command += ["--checkpoint", "vits14-focus/featsharp-2x@1"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        featsharp_command(command)
    (file,) = (folder / "out").rglob("*.safetensors")
    return _tensors_of(file, printed)


def _tensors_of(file: Path, printed: io.StringIO) -> Values:
    from safetensors.torch import load_file

    scores = re.findall(r"\d+\.\d+", printed.getvalue().replace(str(file.parent), ""))
    values: Values = {f"printed {number}": float(score) for number, score in enumerate(scores)}
    return values | load_file(file)


def exported(folder: Path) -> Values:
    """Weights in half precision, after one step of training."""
    train("featsharp-2x", ("num_training_steps=1",), folder)
    (last,) = (folder / "outputs").rglob("last.pth")
    with contextlib.redirect_stdout(io.StringIO()):
        featsharp_command(["export", str(last), "-o", str(folder / "small.safetensors")])
    with torch.no_grad():
        return {"high_res": load_from_file(folder / "small.safetensors")(smooth_images(112, 80)).high_res}


add("implicit/resolved", implicit, (), tolerance=FITTED)
add(
    "implicit/published",
    implicit,
    ("--downsampler", "attention", "--frequencies", "published", "--start", "nothing"),
    tolerance=TRAINED,
)
add("command/upsample vits14-focus", upsample)
add("command/export, train", exported, tolerance=TRAINED)
