"""The shared protocol: its head against a plain one, known scores on synthetic twins, resuming, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.features import centre_crop
from featsharp.evaluation.layouts.labels import VOID
from featsharp.evaluation.layouts.layout import Sample
from featsharp.evaluation.papers import PAPERS
from featsharp.evaluation.protocol_head import (
    KitSchedule,
    Training,
    enlarge_through,
    moments,
    read_target,
    train_kit_head,
)
from featsharp.evaluation.runner import Subject, evaluate
from featsharp.evaluation.shared_protocol import (
    BINS,
    ProtocolTask,
    class_loss,
    class_upsampler,
    depth_loss,
    expected_depth,
    score_depth,
)

COLOURS = np.array([[220, 30, 40], [40, 200, 60], [30, 60, 210]], np.uint8)
SMALL: dict[str, Any] = {"image_size": (32, 48), "epochs": 16, "learning_rate": 0.1}


class PatchColour(Backbone):
    """The mean colour of patches of 8 pixels, or numbers that have nothing to do with the picture."""

    def __init__(self, *, random: bool = False) -> None:
        super().__init__("patch-colour", patch_size=8, embed_dim=3, input_size=(32, 48))
        self.generator = torch.Generator().manual_seed(0) if random else None
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        colours = F.avg_pool2d(images, 8)
        return BackboneOutput(
            colours if self.generator is None else torch.randn(colours.shape, generator=self.generator), None
        )


def subject(name: str = "bilinear-2x", *, random: bool = False) -> Subject:
    encoder = create_encoder(PatchColour(random=random), name)
    return Subject("random" if random else name, lambda: encoder)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def halves(number: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    """Four rectangles of whole patches of random classes."""
    rng = np.random.default_rng(number)
    return np.kron(rng.integers(0, 3, (2, 3)), np.ones((size[0] // 2, size[1] // 3), np.uint8)).astype(np.uint8)


Writer = Callable[[Path, int, str, np.ndarray, np.ndarray], None]


def write_voc(root: Path, number: int, split: str, picture: np.ndarray, labels: np.ndarray) -> None:
    """VOC 2012: lists of names, and labels in a palette."""
    stem = f"2007_{number:06d}"
    write(root / f"JPEGImages/{stem}.jpg", picture)
    path = root / f"SegmentationClass/{stem}.png"
    path.parent.mkdir(exist_ok=True)
    image = Image.fromarray(labels)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)
    lists = root / f"ImageSets/Segmentation/{split}.txt"
    lists.parent.mkdir(parents=True, exist_ok=True)
    with lists.open("a") as file:
        file.write(f"{stem}\n")


def write_ade20k(root: Path, number: int, split: str, picture: np.ndarray, labels: np.ndarray) -> None:
    folder = {"train": "training", "val": "validation"}[split]
    write(root / f"images/{folder}/ADE_{number:08d}.jpg", picture)
    write(root / f"annotations/{folder}/ADE_{number:08d}.png", labels)


def write_cityscapes(root: Path, number: int, split: str, picture: np.ndarray, labels: np.ndarray) -> None:
    stem = f"{split}/ulm/ulm_{number:06d}_000019"
    write(root / f"leftImg8bit/{stem}_leftImg8bit.png", picture)
    write(root / f"gtFine/{stem}_gtFine_labelIds.png", labels)


def write_coco(root: Path, number: int, split: str, picture: np.ndarray, labels: np.ndarray) -> None:
    """COCO-Stuff as the kit has it: below dataset, and lists of the pictures beside."""
    write(root / f"dataset/images/{split}2017/{number:012d}.jpg", picture)
    write(root / f"dataset/annotations/{split}2017/{number:012d}.png", labels)
    lists = root / f"curated/{split}2017/Coco164kFull_Stuff_Coarse.txt"
    lists.parent.mkdir(parents=True, exist_ok=True)
    with lists.open("a") as file:
        file.write(f"{number:012d}\n")


def write_camvid(root: Path, number: int, split: str, picture: np.ndarray, labels: np.ndarray) -> None:
    write(root / f"{split}/{number}.png", picture)
    write(root / f"{split}annot/{number}.png", labels)


# By set: writer, the numbers of three classes, that of void, and the names of the classes.
TWINS: dict[str, tuple[Writer, list[int], int, list[str]]] = {
    "voc": (write_voc, [0, 15, 20], 255, ["background", "person", "tvmonitor"]),
    "ade20k": (write_ade20k, [1, 13, 150], 0, ["wall", "person", "flag"]),
    "cityscapes": (write_cityscapes, [7, 11, 33], 5, ["road", "building", "bicycle"]),
    "coco-stuff": (write_coco, [0, 118, 181], 255, ["person", "plant-stuff", "solid-stuff"]),
    "camvid": (write_camvid, [0, 3, 10], 11, ["sky", "road", "bicyclist"]),
}


def write_twin(root: Path, name: str) -> Path:
    """Six pictures to train on and three to measure on; a third of the rows at the top is void and black."""
    writer, numbers, void, _ = TWINS[name]
    for number in range(9):
        truth = halves(number)
        picture, labels = COLOURS[truth], np.array(numbers, np.uint8)[truth]
        picture[:10], labels[:10] = 0, void
        writer(root / name, number, "train" if number < 6 else "val", picture, labels)
    return root / name


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    return write_twin(tmp_path, "camvid")


# The head


@pytest.mark.parametrize("sizes", [[(21, 17)], [(8, 10), (21, 17)], [(4, 5)], [(3, 4)]])
def test_moments_are_those_of_the_enlarged_map(sizes):
    maps = 3 * torch.randn(2, 6, 4, 5) + torch.arange(6)[:, None, None] * 10
    mean, variance = moments(maps, sizes)
    large = enlarge_through(maps.double(), sizes)
    torch.testing.assert_close(mean.double(), large.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(variance.double(), large.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)


def random_samples(count: int, size: tuple[int, int]) -> tuple[list[Sample], dict[str, Tensor]]:
    rng = np.random.default_rng(0)
    targets = [rng.integers(-1, 3, size).astype(np.int16) for _ in range(count)]
    samples = [Sample(str(n), n, lambda: Image.new("RGB", (1, 1)), lambda n=n: targets[n]) for n in range(count)]
    return samples, {str(n): 2 + torch.randn(5, 4, 6) for n in range(count)}


@pytest.mark.parametrize("batch_norm", [True, False])
def test_the_head_is_trained_as_on_features_of_the_size_of_the_labels(batch_norm, tmp_path):
    samples, maps = random_samples(5, (13, 19))
    training = Training(samples, lambda s: maps[s.name], [(7, 9), (13, 19)], 3, class_loss, ["x"])
    schedule = KitSchedule(epochs=3, learning_rate=0.05, batch_norm=batch_norm)
    head = train_kit_head(training, schedule, torch.device("cpu"), tmp_path)

    norm: nn.Module = nn.BatchNorm2d(5, affine=False) if batch_norm else nn.Identity()
    torch.manual_seed(0)
    plain = nn.Sequential(norm, nn.Conv2d(5, 3, 1)).double().train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.05, weight_decay=1e-5)
    large = {name: enlarge_through(x[None].double(), [(7, 9), (13, 19)])[0] for name, x in maps.items()}
    for epoch in range(3):
        order = torch.randperm(5, generator=torch.Generator().manual_seed(epoch)).tolist()
        for batch in (order[:2], order[2:4], order[4:]):
            logits = plain(torch.stack([large[str(n)] for n in batch]))
            truth = torch.stack([torch.from_numpy(samples[n].read_target()) for n in batch]).long()
            loss = F.cross_entropy(logits, truth, ignore_index=VOID)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    plain.eval()
    expected = plain(large["0"][None]).float()
    torch.testing.assert_close(head(maps["0"][None]), expected, rtol=1e-3, atol=1e-3)


def test_training_goes_on_from_the_last_round_and_gives_the_same_head(tmp_path):
    samples, maps = random_samples(5, (8, 12))
    calls = []

    def features(sample: Sample) -> Tensor:
        calls.append(sample.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return maps[sample.name]

    def train(folder: str, epochs: int) -> Tensor:
        calls.clear()
        data = Training(samples, features, [(8, 12)], 3, class_loss, [])
        head = train_kit_head(data, KitSchedule(epochs, learning_rate=0.1), torch.device("cpu"), tmp_path / folder)
        return head.probe.classify.weight

    stop = 0
    expected = train("whole", 4)
    stop = 5 + 1 + 5 * 2 + 2
    with pytest.raises(KeyboardInterrupt):
        train("killed", 4)
    assert [path.name.rsplit("-")[1] for path in (tmp_path / "killed").iterdir()] == ["2.safetensors"]
    stop = 0
    assert torch.equal(train("killed", 4), expected)
    assert len(calls) == 5 * 2
    train("killed", 4)
    assert not calls
    # A damaged file is as none, and a head of fewer rounds is where one of more starts.
    next((tmp_path / "killed").iterdir()).write_bytes(b"x")
    assert torch.equal(train("killed", 4), expected)
    train("longer", 2)
    assert torch.equal(train("longer", 4), expected)


def test_targets_are_those_of_the_centre_of_the_picture():
    truth = np.arange(7 * 12, dtype=np.uint8).reshape(7, 12)
    sample = Sample("x", 0, lambda: Image.new("RGB", (1, 1)), lambda: truth)
    assert read_target(sample, (7, 7)).tolist() == truth[:, 2:9].tolist()
    enlarged = Image.fromarray(np.repeat(np.repeat(truth, 4, 0), 4, 1))  # blocks, whose bicubic centres are unchanged
    crop = np.asarray(centre_crop(enlarged, (28, 28)))
    assert read_target(sample, (28, 28)).tolist() == crop.tolist()


# Scores of twins


@pytest.mark.parametrize("name", TWINS)
def test_features_that_show_the_classes_score_full_marks_and_random_ones_chance(name, tmp_path):
    data, both = write_twin(tmp_path, name), name in ("camvid", "coco-stuff")
    result = evaluate(ProtocolTask(name, data, probabilities=both, **SMALL), [subject()], progress=False)
    scores = result["bilinear-2x"]["result"]
    untrained = ProtocolTask(name, data, probabilities=False, **SMALL | {"epochs": 1})
    lost = evaluate(untrained, [subject(random=True)], progress=False)["random"]["result"]
    assert scores["train_images"] == 6
    assert len(result["bilinear-2x"]["items"]) == 3
    assert scores["miou"]["value"] > 0.9
    assert not both or scores["miou_probabilities"]["value"] > 0.8
    assert {key for key, value in scores["iou"].items() if value} == set(TWINS[name][3])
    # At best one of three equally frequent classes everywhere, or guesses.
    assert lost["miou"]["value"] < 0.25
    assert lost["pixel_accuracy"]["value"] < 0.5


def write_depth(root: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Pictures whose red says the depth, 1 to 4 m, with a hole."""
    rng = np.random.default_rng(0)
    pictures, depths = [], []
    for _ in range(8):
        depth = np.kron(rng.uniform(1, 4, (2, 3)), np.ones((16, 16)))
        picture = np.zeros((32, 48, 3), np.uint8)
        picture[..., 0] = np.rint(depth * 60)
        depth[3:6, 3:9] = 0
        pictures.append(picture)
        depths.append(depth.astype(np.float32))
    return pictures, depths


def write_labeled_nyu(root: Path) -> Path:
    h5py, savemat = pytest.importorskip("h5py"), pytest.importorskip("scipy.io").savemat
    pictures, depths = write_depth(root)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.stack([picture.transpose(2, 1, 0) for picture in pictures])
        file["depths"] = np.stack([depth.T for depth in depths])
    # From 1 on, in columns, as MATLAB writes them; the first picture is not used.
    savemat(root / "splits.mat", {"trainNdxs": np.array([[2], [3], [4], [5], [6]]), "testNdxs": np.array([[7], [8]])})
    return root


def write_folder_nyu(root: Path) -> Path:
    lines = []
    for number, (picture, depth) in enumerate(zip(*write_depth(root), strict=True)):
        write(root / f"kitchen/rgb_{number:05d}.png", picture)
        write(root / f"kitchen/sync_depth_{number:05d}.png", np.rint(1000 * depth).astype(np.uint16))
        lines.append(f"kitchen/rgb_{number:05d}.png kitchen/sync_depth_{number:05d}.png 518.8579\n")
    (root / "nyu_train.txt").write_text("".join(lines[1:6]))
    (root / "nyu_test.txt").write_text("".join(lines[6:]))
    return root


@pytest.mark.slow
@pytest.mark.parametrize("writer", [write_labeled_nyu, write_folder_nyu])
def test_depth_of_both_layouts(writer, tmp_path):
    task = ProtocolTask("nyu-depth", writer(tmp_path), **SMALL | {"epochs": 20})
    image, depth = task.dataset.train[0].read_image(), task.dataset.train[0].read_target()
    pictures, depths = write_depth(tmp_path)
    assert np.array_equal(np.asarray(image), pictures[1])
    np.testing.assert_allclose(depth, depths[1], atol=6e-4)
    result = evaluate(task, [subject()], progress=False)["bilinear-2x"]
    assert len(result["items"]) == 2
    assert result["result"]["d1"]["value"] > 0.85
    assert result["result"]["rmse"]["value"] < 0.5
    task.epochs = 4
    assert evaluate(task, [subject(random=True)], progress=False)["random"]["result"]["d1"]["value"] < 0.6


def test_depth_measures_against_formulas():
    truth = np.array([[1.0, 2.0, 0.0], [10.0, 4.0, 3.0]])  # 0 and 10 m are not measured
    prediction = np.array([[1.2, 1.5, 9.0], [1.0, 4.0, 3.9]])
    row = score_depth(prediction, truth)
    assert row["d1"] == 2 / 4
    assert row["rmse"] == pytest.approx(np.sqrt((0.2**2 + 0.5**2 + 0.9**2) / 4))
    logits = torch.zeros(1, BINS, 1, 2)
    logits[0, 10, 0, 1] = 1e6
    depth = expected_depth(logits)
    assert depth[0, 0, 0] == pytest.approx((0.001 + 10) / 2, abs=1e-4)
    assert depth[0, 0, 1] == pytest.approx(0.001 + 10 * (10 - 0.001) / 255, abs=1e-3)
    error = torch.log(depth / torch.tensor([2.0, 3.0])).double()
    expected = (error.var(correction=0) + 0.15 * error.mean() ** 2).sqrt()
    assert depth_loss(logits, torch.tensor([[[2.0, 3.0]]])) == pytest.approx(float(expected), rel=1e-4)
    assert depth_loss(logits, torch.zeros(1, 1, 2)) == 0


# Class probabilities, and memory


def test_which_methods_upsample_class_probabilities(camvid):
    backbone = PatchColour()
    for name in ("tile-2x", "views-2x", "native-highres-2x"):
        built = class_upsampler(create_encoder(backbone, name), 11)
        assert built is not None
        assert built.embed_dim == 12
    for name in ("s2-2x", "resize-conv-2x", "stride-2x"):
        assert class_upsampler(create_encoder(backbone, name), 11) is None
    encoder = create_encoder(backbone, "featup-2x")  # kernels from the image, for any number of channels
    result = evaluate(ProtocolTask("camvid", camvid, **SMALL), [Subject("jbu", lambda: encoder)], progress=False)
    assert 0 < result["jbu"]["result"]["miou_probabilities"]["value"] <= 1
    plain = ProtocolTask("camvid", camvid, probabilities=False, **SMALL)
    assert "miou_probabilities" not in evaluate(plain, [subject()], progress=False)["bilinear-2x"]["result"]


def test_only_small_maps_are_kept(camvid, tmp_path):
    def stored(name: str) -> list[tuple[int, ...]]:
        cache = tmp_path / name
        task = ProtocolTask("camvid", camvid, cache_dir=cache, probabilities=False, **SMALL | {"epochs": 1})
        evaluate(task, [subject(name)], progress=False)
        return [tuple(load_file(path)["map"].shape) for path in (cache / "features").glob("*")]

    assert stored("bilinear-8x") == [(3, 4, 6)] * 6  # linear: the low-resolution map
    assert stored("tile-2x") == [(3, 8, 12)] * 6
    assert stored("native-highres-8x") == []  # as large as the labels


# The command


def test_the_command_prints_ours_and_theirs_apart(camvid, tmp_path, capsys):
    result = tmp_path / "result.json"
    command = ["eval", "protocol", "--set", "voc", "--data", str(write_twin(tmp_path, "voc")), "--image-size", "32x32"]
    command += ["--backbone", "toy-vit", "--upsampler", "bilinear-2x", "--epochs", "1", "--json", str(result), "-q"]
    assert main(command) == 0
    ours, *theirs = capsys.readouterr().out.split("ours, voc, heads of 1 epochs:")[1].split("theirs, ")
    assert "bilinear-2x" in ours
    assert "84.38" not in ours
    assert [text.split(" (")[0] for text in theirs] == [table.source.split(" (")[0] for table in PAPERS]
    assert "84.38" in theirs[0]
    assert json.loads(result.read_text())["encoders"]["bilinear-2x"]["result"]["counts_of_papers"] == [1464, 1449]


def test_bad_pictures_are_counted_and_mistakes_named(camvid, tmp_path):
    (camvid / "trainannot/0.png").write_bytes(b"")
    (camvid / "val/7.png").write_bytes(b"")
    void = np.full((32, 48), 11, np.uint8)
    write(camvid / "valannot/8.png", void)
    outcome = evaluate(ProtocolTask("camvid", camvid, **SMALL), [subject()], progress=False)["bilinear-2x"]
    assert outcome["result"]["train_images"] == 5
    assert [name for name, _ in outcome["result"]["train_skipped"]] == ["train/0.png"]
    assert [name for name, _ in outcome["skipped"]] == ["val/7.png", "val/8.png"]
    with pytest.raises(ConfigError, match="unknown set"):
        ProtocolTask("pascal", camvid)
    with pytest.raises(DataError, match="no known layout of a depth data set"):
        evaluate(ProtocolTask("nyu-depth", camvid), [subject()], progress=False)
    write_labeled_nyu(tmp_path)
    pytest.importorskip("scipy.io").savemat(tmp_path / "splits.mat", {"trainNdxs": [[0, 1]], "testNdxs": [[2]]})
    with pytest.raises(DataError, match="has no trainNdxs, the numbers from 1"):
        evaluate(ProtocolTask("nyu-depth", tmp_path), [subject()], progress=False)
