"""Perfect features score full marks, labels at random chance, and sharp features win where detail counts."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colour import lay_on_side
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.checkpoint import read_tensors
from featsharp.cli.main import main
from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.head import FeatureCache, FeatureReader, Head, Schedule, fit_probe, load_probe, save_probe
from featsharp.evaluation.keys import encoder_key
from featsharp.evaluation.layouts.frames import Frame
from featsharp.evaluation.layouts.labels import VOID, LabelledImage
from featsharp.evaluation.runner import Item, Journal, Row, Subject, evaluate, evaluate_to_file
from featsharp.evaluation.segmentation import SegmentationTask, confusion, pool_rows, predict, score_image
from featsharp.model import SharpEncoder

CAMVID = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid"

COLOURS = np.array([[220, 30, 40], [40, 200, 60], [30, 60, 210]], np.uint8)
QUICK = {"steps": 60, "batch": 4, "learning_rate": 0.1}


class PatchColour(Backbone):
    """The mean colour of patches of 8 pixels, native at 32 x 48; counts its images."""

    def __init__(self, *, flexible: bool = True) -> None:
        super().__init__("patch-colour", patch_size=8, embed_dim=3, input_size=(32, 48), flexible=flexible)
        self.images = 0

    def extract(self, images: Tensor) -> BackboneOutput:
        self.images += len(images)
        return BackboneOutput(F.avg_pool2d(images, 8), None)


def subject(upsampler: str = "bilinear", factor: float = 2, backbone: Backbone | None = None) -> Subject:
    encoder = create_encoder(backbone or PatchColour(), upsampler, factor)
    return Subject(f"{upsampler}-{factor}x", lambda: encoder)


def write(root: Path, name: str, truth: np.ndarray, *, split: str, picture: np.ndarray | None = None) -> None:
    """A picture whose colours show the classes, and its labels."""
    pixels = COLOURS[np.minimum(truth, 2)] if picture is None else picture
    for kind, content in (("images", pixels), ("labels", truth)):
        path = root / kind / split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content.astype(np.uint8)).save(path)


def quarters(rng: np.random.Generator, size: tuple[int, int] = (128, 192)) -> np.ndarray:
    """Four rectangles of random classes."""
    return np.kron(rng.integers(0, 3, (2, 2)), np.ones((size[0] // 2, size[1] // 2), int))


@pytest.fixture
def blocks(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(8):
        write(tmp_path / "data", f"{number}", quarters(rng), split="train" if number < 5 else "val")
    return tmp_path / "data"


def measure(task: SegmentationTask, *subjects: Subject, **options: Any) -> dict[str, Any]:
    outcome = evaluate(task, subjects or (subject(),), progress=False, **options)
    return outcome[next(iter(outcome))] if len(subjects) < 2 else outcome


def test_features_that_show_the_classes_score_full_marks(blocks):
    result = measure(SegmentationTask(blocks, **QUICK))["result"]
    assert result["miou"]["value"] > 0.99
    assert result["pixel_accuracy"]["value"] > 0.99
    assert list(result["iou"]) == ["0", "1", "2"]
    assert result["miou"]["low"] <= result["miou"]["value"] <= result["miou"]["high"]
    expected = {
        "train_images": 5,
        "train_skipped": [],
        "layout": "folder",
        "factor": 2.0,
        "low_res_size": [32, 48],
        "image_size": [64, 96],
        "label_size": [16, 24],
    }
    assert {name: result[name] for name in expected} == expected


def test_labels_at_random_score_chance(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(12):
        truth = rng.integers(0, 4, (64, 96))
        picture = rng.integers(0, 256, (64, 96, 3))
        write(tmp_path, f"{number}", truth, split="train" if number < 6 else "val", picture=picture)
    result = measure(SegmentationTask(tmp_path, **QUICK))["result"]
    assert result["pixel_accuracy"]["value"] == pytest.approx(1 / 4, abs=0.02)
    # Guesses that are independent of equally frequent classes hit at most 1 / (2 * 4 - 1) of the union.
    assert result["miou"]["value"] < 1 / 7 + 0.02


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """Rows of half a low-resolution token: at random, so that only features as fine as they are can tell."""
    rng = np.random.default_rng(0)
    for number in range(10):
        truth = np.kron(rng.integers(0, 2, (8, 6)), np.ones((8, 16), int))
        write(tmp_path / "data", f"{number}", truth, split="train" if number < 6 else "val")
    return tmp_path / "data"


@pytest.mark.slow
def test_sharp_features_tell_what_blurred_ones_cannot(stripes):
    task = SegmentationTask(stripes, **QUICK)
    outcome = measure(task, subject("identity", 1), subject("bilinear", 2), subject("tile", 2))
    score = {label: content["result"]["miou"]["value"] for label, content in outcome.items()}
    assert score["tile-2x"] > 0.9
    assert score["identity-1x"] < 0.8
    assert score["bilinear-2x"] < 0.8


def test_a_larger_input_resolves_detail_too(stripes):
    outcome = measure(SegmentationTask(stripes, low_res_size=(64, 96), **QUICK), subject("identity", 1))
    assert outcome["result"]["miou"]["value"] > 0.9
    assert outcome["result"]["low_res_size"] == [64, 96]
    assert outcome["result"]["image_size"] == [128, 192]


def test_a_head_of_the_low_res_map_works_on_the_sharp_one(blocks):
    result = measure(SegmentationTask(blocks, head="low-res", **QUICK), subject("tile", 2))["result"]
    assert result["miou"]["value"] > 0.99


def test_a_head_of_the_low_res_map_saw_only_that(blocks, tmp_path):
    task = SegmentationTask(blocks, head="low-res", cache_dir=tmp_path / "cache", **QUICK)
    measure(task, subject("tile", 2))
    cache = FeatureCache(
        FeatureReader(subject("tile", 2).load(), (64, 96), (32, 48)), "low_res", tmp_path / "cache/features", 10**9
    )
    backbone = cache.reader.encoder.backbone
    frame = Frame("labels/train/0.png", (128, 192))
    assert cache.get(LabelledImage(blocks, "images/train/0.png", ""), frame).shape == (3, 4, 6)
    assert backbone.images == 0


def test_several_maps_at_once_get_a_head_of_their_own(blocks):
    task = SegmentationTask(blocks, **QUICK)
    assert measure(task, subject("s2", 2))["result"]["miou"]["value"] > 0.99
    with pytest.raises(ConfigError, match=r"2 maps at once.*--head own"):
        measure(SegmentationTask(blocks, head="low-res"), subject("s2", 2))


@pytest.mark.parametrize(("flexible", "wanted", "nearest"), [(True, (36, 47), "32x48"), (False, (64, 96), "32x48")])
def test_sizes_that_the_backbone_does_not_take(flexible, wanted, nearest, blocks):
    task = SegmentationTask(blocks, low_res_size=wanted)
    with pytest.raises(ConfigError, match=f"low_res_size {wanted[0]}x{wanted[1]} .* nearest is {nearest}"):
        measure(task, subject(backbone=PatchColour(flexible=flexible)))


def test_unknown_head(blocks):
    with pytest.raises(ConfigError, match="head is own or low-res; got 'both'"):
        measure(SegmentationTask(blocks, head="both"))


def test_results_repeat_and_leave_the_global_random_state_alone(blocks):
    before = torch.get_rng_state()
    first, second = (measure(SegmentationTask(blocks, **QUICK)) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_answer(blocks):
    encoder = create_encoder(PatchColour(), "tile", 2).cuda()
    outcome = measure(SegmentationTask(blocks, **QUICK), Subject("x", lambda: encoder))
    assert outcome["result"]["miou"]["value"] > 0.99


# Scores


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import accuracy_score, jaccard_score

    rng = np.random.default_rng(0)
    classes = ("a", "b", "c", "d", "never")
    pictures = [(rng.integers(-1, 4, (9, 7)), rng.integers(0, 4, (9, 7))) for _ in range(6)]
    rows = [json.loads(json.dumps(score_image(confusion(*picture, 5)))) for picture in pictures]
    pooled = pool_rows(rows, classes)
    truth, prediction = (np.concatenate([picture[n].ravel() for picture in pictures]) for n in (0, 1))
    kept = truth != VOID
    expected = jaccard_score(truth[kept], prediction[kept], average=None, labels=range(4))
    assert list(pooled["iou"].values())[:4] == pytest.approx(expected)
    assert pooled["iou"]["never"] is None
    assert pooled["miou"].value == pytest.approx(expected.mean())
    assert pooled["pixel_accuracy"].value == pytest.approx(accuracy_score(truth[kept], prediction[kept]))
    assert pooled["miou"].low < pooled["miou"].value < pooled["miou"].high
    first = pictures[0][0] != VOID
    assert rows[0]["miou"] == pytest.approx(
        jaccard_score(pictures[0][0][first], pictures[0][1][first], average="macro", labels=range(4))
    )


def test_scores_by_hand():
    truth = np.array([[0, 0, 1, VOID]])
    matrix = confusion(truth, np.array([[0, 1, 1, 2]]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    row = score_image(matrix)
    # Class 0: one hit in a union of two; class 1 the same; class 2 was predicted on void only, which does not count.
    assert row["_counts"] == [[0, 1, 2, 1], [1, 1, 1, 2]]
    assert row["miou"] == 0.5
    assert row["pixel_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("size", [(64, 80), (7, 80), (5, 4), (8, 8)])
def test_prediction_in_chunks_is_that_of_the_whole(size):
    logits = torch.randn(1, 5, 8, 8)
    whole = F.interpolate(logits, size, mode="bilinear", antialias=size[0] < 8 or size[1] < 8).argmax(1)[0]
    assert np.array_equal(predict(logits, size, max_logits=5 * size[1] * 3), whole.numpy())


@pytest.mark.slow
def test_void_in_the_range_of_classes_is_no_class_of_head_and_mean(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(8):
        truth, split = quarters(rng), "train" if number < 5 else "val"
        write(tmp_path / "plain", f"{number}", truth, split=split)
        write(tmp_path / "first", f"{number}", truth + 1, split=split, picture=COLOURS[truth])
        write(tmp_path / "mask", f"{number}", (truth > 0) * 255, split=split, picture=COLOURS[truth])
        write(tmp_path / "binary", f"{number}", truth > 0, split=split, picture=COLOURS[truth])
    first = measure(SegmentationTask(tmp_path / "first", ignore_index=0, **QUICK))["result"]
    plain = measure(SegmentationTask(tmp_path / "plain", **QUICK))["result"]
    assert first["miou"] == plain["miou"]
    assert (list(first["iou"]), first["labels"]) == (["1", "2", "3"], "1..3, and 0 for void")
    mask, binary = (measure(SegmentationTask(tmp_path / name, **QUICK))["result"] for name in ("mask", "binary"))
    assert mask["miou"] == binary["miou"]
    assert list(mask["iou"]) == ["0", "255"]


def test_one_class_is_no_perfect_score(blocks):
    for number in range(5, 8):
        Image.fromarray(np.full((128, 192), 2, np.uint8)).save(blocks / f"labels/val/{number}.png")
    (blocks / "classes.txt").write_text("red\ngreen\nblue\n")
    with pytest.raises(DataError, match=r"1 class is left in validation labels.*2 \(in 3\)"):
        measure(SegmentationTask(blocks, **QUICK))
    Image.fromarray(quarters(np.random.default_rng(3)).astype(np.uint8)).save(blocks / "labels/val/7.png")
    with pytest.raises(DataError, match=r"the 1 labels that were measured show one class, 'blue'.*--limit"):
        measure(SegmentationTask(blocks, limit=1, **QUICK))


# Training


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels.long(), ignore_index=VOID)


def test_learning_rate_rises_and_falls_linearly():
    schedule = Schedule(steps=100)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.5, 1, 98 / 98])
    assert rates[51] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(1 / 98)
    assert Schedule(steps=1).rate(0) == 1


def test_a_probe_learns_a_linear_rule_from_labels_finer_than_its_map():
    generator = torch.Generator().manual_seed(0)
    maps = [
        torch.randn(4, 6, 6, generator=generator) * torch.tensor([1, 10, 100, 0.1])[:, None, None] for _ in range(6)
    ]
    labels = torch.stack([(m[3] > 0).long() for m in maps]).repeat_interleave(3, 1).repeat_interleave(3, 2).short()
    labels[:, 0] = VOID
    probe = fit_probe(lambda n: maps[n].half(), labels, 2, cross_entropy, Schedule(200, 4, 0.05), torch.device("cpu"))
    # The smallest channel decides, which takes the normalisation.
    right = (probe(torch.stack(maps)).argmax(1) == torch.stack([m[3] > 0 for m in maps])).float().mean()
    assert right > 0.97
    assert not probe.training
    assert not any(parameter.requires_grad for parameter in probe.parameters())


def test_probes_come_back_from_files(tmp_path):
    maps, labels = torch.randn(3, 5, 4, 4), torch.randint(0, 3, (3, 8, 8)).short()
    probe = fit_probe(maps.__getitem__, labels, 3, cross_entropy, Schedule(5), torch.device("cpu"))
    path, cpu = tmp_path / "x.safetensors", torch.device("cpu")
    save_probe(probe, path, 3, [("a.png", "no label")])
    outcome = load_probe(path, cpu)
    assert outcome is not None
    assert outcome[1:] == (3, [("a.png", "no label")])
    assert torch.equal(outcome[0](maps), probe(maps))
    content = path.read_bytes()
    state, texts = read_tensors(path)
    damaged = [content[:-7], save(state, {"about": "[3, 4]"}), save(state, {"about": "7.5"}), save(state, {})]
    damaged += [save({"x": state["classify.weight"]}, texts), save({**state, "x": torch.ones(2)}, texts)]
    for data in damaged:
        path.write_bytes(data)
        assert load_probe(path, cpu) is None
    assert load_probe(tmp_path / "none", cpu) is None


# What is kept on disk


def run_counted(task: SegmentationTask, encoder: SharpEncoder) -> tuple[dict[str, Any], int]:
    """What an evaluation gives, and how many images the backbone saw in it."""
    backbone = encoder.backbone
    assert isinstance(backbone, PatchColour)
    backbone.images = 0
    result = measure(task, Subject("x", lambda: encoder))
    return result, backbone.images


def test_features_are_computed_once_and_heads_trained_once(blocks, tmp_path):
    encoder = create_encoder(PatchColour(), "bilinear", 2)
    kept = SegmentationTask(blocks, cache_dir=tmp_path / "cache", **QUICK)
    first, images = run_counted(kept, encoder)
    assert images == 5 + 3
    # The same head: only validation images.
    second, images = run_counted(kept, encoder)
    assert (second, images) == (first, 3)
    # Another head, the same features.
    _, images = run_counted(SegmentationTask(blocks, cache_dir=tmp_path / "cache", **QUICK | {"steps": 30}), encoder)
    assert images == 3
    # Nothing kept: the same numbers.
    assert run_counted(SegmentationTask(blocks, **QUICK), encoder) == (first, 8)


def test_a_stopped_training_finds_its_features_again(blocks, tmp_path):
    class Stopping(PatchColour):
        stops_after = 4

        def extract(self, images: Tensor) -> BackboneOutput:
            if self.images == self.stops_after:
                raise KeyboardInterrupt
            return super().extract(images)

    encoder = create_encoder(Stopping(), "bilinear", 2)
    path, task = tmp_path / "result.json", SegmentationTask(blocks, **QUICK)
    subjects = [Subject("x", lambda: encoder)]
    with pytest.raises(KeyboardInterrupt):
        evaluate_to_file(task, subjects, path, {}, progress=False)
    encoder.backbone.images, encoder.backbone.stops_after = 0, None
    resumed = evaluate_to_file(task, subjects, path, {}, progress=False)["encoders"]["x"]
    assert encoder.backbone.images == (5 - 4) + 3
    assert resumed == evaluate(task, subjects, progress=False)["x"]
    assert list(tmp_path.glob("result.json*")) == [path]


@pytest.mark.slow
def test_other_encoders_sizes_and_files_have_features_of_their_own(blocks, tmp_path):
    task = SegmentationTask(blocks, cache_dir=tmp_path / "cache", **QUICK)
    encoder = create_encoder(PatchColour(), "bilinear", 2)
    run_counted(task, encoder)
    assert run_counted(task, create_encoder(PatchColour(), "bilinear", 1.5))[1] == 8
    larger = SegmentationTask(blocks, cache_dir=tmp_path / "cache", low_res_size=(64, 96), **QUICK)
    assert run_counted(larger, encoder)[1] == 8
    write(blocks, "0", np.zeros((64, 96), int), split="train", picture=np.full((64, 96, 3), 100))
    assert run_counted(task, encoder)[1] == 1 + 3


def test_encoders_are_known_by_their_weights():
    torch.manual_seed(0)
    first = create_encoder("toy-vit", "carafe", 2)
    second = create_encoder("toy-vit", "carafe", 2)
    second.load_state_dict(first.state_dict())
    assert encoder_key(first) == encoder_key(second)
    with torch.no_grad():
        next(second.upsampler.parameters()).flatten()[0] += 0.1
    assert encoder_key(first) != encoder_key(second)
    assert encoder_key(first) != encoder_key(create_encoder("toy-vit-fixed", "carafe", 2))


def test_damaged_features_and_heads_are_made_again(blocks, tmp_path):
    task = SegmentationTask(blocks, cache_dir=tmp_path / "cache", **QUICK)
    encoder = create_encoder(PatchColour(), "bilinear", 2)
    first, _ = run_counted(task, encoder)
    files = sorted((tmp_path / "cache/features").glob("*.safetensors"))
    sizes = [path.stat().st_size for path in files]
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:-5])
    shutil.rmtree(tmp_path / "cache/heads")
    again, images = run_counted(task, encoder)
    assert images == 2 + 3
    assert again == first
    assert [path.stat().st_size for path in files] == sizes


def test_beyond_the_limit_features_are_computed_again_which_is_said_once(blocks, caplog):
    encoder = create_encoder(PatchColour(), "bilinear", 2)
    free, _ = run_counted(SegmentationTask(blocks, **QUICK), encoder)
    with caplog.at_level(logging.WARNING):
        tight, images = run_counted(SegmentationTask(blocks, cache_limit="1500B", **QUICK), encoder)
    assert tight == free
    assert images > 60
    warnings = [record for record in caplog.records if "--cache-limit" in record.message]
    assert len(warnings) == 1
    with pytest.raises(ConfigError, match="cannot read 'much'"):
        measure(SegmentationTask(blocks, cache_limit="much"))


def test_the_limit_holds_for_the_folder(blocks, tmp_path):
    for factor in (2, 4):
        encoder = create_encoder(PatchColour(), "bilinear", factor)
        run_counted(SegmentationTask(blocks, cache_dir=tmp_path / "c", cache_limit="5kB", **QUICK), encoder)
    assert 0 < sum(path.stat().st_size for path in (tmp_path / "c/features").iterdir()) <= 5000


def test_numbers_beyond_half_precision_are_kept_whole(blocks, tmp_path):
    class Loud(PatchColour):
        def extract(self, images: Tensor) -> BackboneOutput:
            return BackboneOutput(super().extract(images).features * 1e6, None)

    reader = FeatureReader(create_encoder(Loud(), "bilinear", 2), (64, 96), (32, 48))
    cache = FeatureCache(reader, "high_res", tmp_path, 10**9)
    pair = LabelledImage(blocks, "images/train/0.png", "")
    frame = Frame("0", (128, 192))
    computed, loaded = cache.get(pair, frame), cache.get(pair, frame)
    assert computed.dtype == torch.float32
    assert torch.equal(computed, loaded)
    assert loaded.isfinite().all()
    quiet = FeatureCache(FeatureReader(subject().load(), (64, 96), (32, 48)), "high_res", tmp_path, 10**9)
    assert quiet.get(pair, frame).dtype == torch.float16


def test_a_stopped_evaluation_goes_on(blocks, tmp_path):
    class Stopping(SegmentationTask):
        stop = True

        def measure(self, encoder: SharpEncoder, item: Item, head: Head) -> Row:
            if self.stop and item.name == "images/val/7.png":
                raise KeyboardInterrupt
            return super().measure(encoder, item, head)

    encoder = create_encoder(PatchColour(), "bilinear", 2)
    whole = measure(SegmentationTask(blocks, **QUICK), Subject("x", lambda: encoder))
    task = Stopping(blocks, **QUICK)
    with pytest.raises(KeyboardInterrupt):
        measure(task, Subject("x", lambda: encoder), journal=Journal(tmp_path / "rows"))
    task.stop = False
    encoder.backbone.images = 0
    # The head is kept beside the rows: neither training nor measured images are encoded again.
    assert measure(task, Subject("x", lambda: encoder), journal=Journal(tmp_path / "rows")) == whole
    assert encoder.backbone.images == 1


# Bad data


def spoil_range(root: Path, split: str) -> None:
    truth = np.zeros((128, 192))
    truth[3, 4] = 77
    Image.fromarray(truth.astype(np.uint8)).save(root / f"labels/{split}/bad.png")


def spoil_size(root: Path, split: str) -> None:
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(root / f"labels/{split}/bad.png")


def spoil_channels(root: Path, split: str) -> None:
    Image.fromarray(np.full((128, 192, 3), (0, 1, 2), np.uint8)).save(root / f"labels/{split}/bad.png")


def spoil_all_void(root: Path, split: str) -> None:
    Image.fromarray(np.full((128, 192), 255, np.uint8)).save(root / f"labels/{split}/bad.png")


def remove_label(root: Path, split: str) -> None:
    (root / f"labels/{split}/bad.png").unlink()


def cut_label(root: Path, split: str) -> None:
    path = root / f"labels/{split}/bad.png"
    path.write_bytes(path.read_bytes()[:60])


def cut_image(root: Path, split: str) -> None:
    path = root / f"images/{split}/bad.png"
    path.write_bytes(path.read_bytes()[:60])


def turn(root: Path, split: str, number: int, *, labels: bool) -> None:
    """Lay a picture on its side, and the pixels of its labels where asked."""
    lay_on_side(root / f"images/{split}/{number}.png")
    if labels:
        path = root / f"labels/{split}/{number}.png"
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)


def test_pictures_with_an_orientation_match_their_labels(blocks):
    for number in range(8):
        turn(blocks, "train" if number < 5 else "val", number, labels=number % 2 == 0)
    outcome = measure(SegmentationTask(blocks, **QUICK))
    assert outcome["result"]["miou"]["value"] > 0.99
    assert outcome["result"]["train_images"] == 5
    assert outcome["skipped"] == []


def test_a_square_picture_with_an_orientation_is_named(blocks):
    for split in ("train", "val"):
        write(blocks, "9", quarters(np.random.default_rng(1), (128, 128)), split=split)
        turn(blocks, split, 9, labels=True)
    outcome = measure(SegmentationTask(blocks, **QUICK))
    for name, reason in (*outcome["result"]["train_skipped"], *outcome["skipped"]):
        assert name.endswith("9.png")
        assert "9.png may be for the pixels as stored" in reason
    assert len(outcome["result"]["train_skipped"]) == len(outcome["skipped"]) == 1


@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "val"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_range, r"labels/{}/bad.png: label 77 is out of range; allowed are 0..2, and 255 for void"),
        (spoil_size, r"labels/{0}/bad.png: the labels are 64x96 pixels, the image images/{0}/bad.png is 128x192"),
        (spoil_channels, r"labels/{}/bad.png: labels are one number per pixel"),
        (spoil_all_void, r"labels/{}/bad.png: all pixels are void"),
        (remove_label, r"labels/{}/bad.png: no such label file"),
        (cut_label, r"labels/{}/bad.png: cannot be read as labels"),
        (cut_image, r"cannot be decoded"),
    ],
)
def test_bad_pairs_are_skipped_and_named(spoil, message, split, blocks):
    write(blocks, "bad", quarters(np.random.default_rng(1)), split=split)
    spoil(blocks, split)
    (blocks / "classes.txt").write_text("red\ngreen\nblue\n")
    outcome = measure(SegmentationTask(blocks, **QUICK))
    skipped = {"train": outcome["result"]["train_skipped"], "val": outcome["skipped"]}
    assert outcome["result"]["miou"]["value"] > 0.99
    assert len(skipped["train"]) + len(skipped["val"]) == 1
    [(name, reason)] = skipped[split]
    assert name == f"images/{split}/bad.png"
    assert message.format(split) in reason


@pytest.mark.slow
def test_what_was_skipped_in_training_is_told_again_with_a_head_from_disk(blocks, tmp_path):
    cut_image_of = blocks / "images/train/1.png"
    cut_image_of.write_bytes(b"")
    task = SegmentationTask(blocks, cache_dir=tmp_path / "cache", **QUICK)
    first, second = measure(task), measure(task)
    assert first == second
    assert second["result"]["train_images"] == 4
    assert second["result"]["train_skipped"] == [["images/train/1.png", "the file is empty (0 bytes)"]]


def test_no_usable_training_image_is_an_error(blocks):
    (blocks / "classes.txt").write_text("red\ngreen\nblue\n")
    for path in (blocks / "labels/train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"none of 5 training images.*labels/train/0\.png: no such label"):
        measure(SegmentationTask(blocks))


def test_features_that_are_nan_are_reported(blocks):
    class Broken(PatchColour):
        def extract(self, images: Tensor) -> BackboneOutput:
            return BackboneOutput(super().extract(images).features * torch.nan, None)

    with pytest.raises(DataError, match=r"images/train/0\.png: the encoder returned NaN"):
        measure(SegmentationTask(blocks), subject(backbone=Broken()))


def test_limits_are_spread_evenly(blocks):
    task = SegmentationTask(blocks, limit=2, train_limit=2, **QUICK)
    assert [item.name for item in task.items()] == ["images/val/5.png", "images/val/6.png"]
    assert [pair.image for pair in task.training_data((16, 24)).pairs] == ["images/train/0.png", "images/train/2.png"]
    assert measure(task)["result"]["train_images"] == 2


# The command


@pytest.mark.slow
def test_the_command_writes_what_a_plot_needs(blocks, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--steps", "20", "--low-res-size", "64x96", "--json", str(path), "--device", "cpu"]
    encoders = ["--upsampler", "bilinear-2x", "tile-2x", "--backbone", "toy-vit"]
    assert main(["eval", "segmentation", "--data", str(blocks), *encoders, *options]) == 0
    assert "miou" in capsys.readouterr().out
    encoders = json.loads(path.read_text())["encoders"]
    assert {label: (c["result"]["factor"], c["result"]["low_res_size"]) for label, c in encoders.items()} == {
        "bilinear-2x": (2.0, [64, 96]),
        "tile-2x": (2.0, [64, 96]),
    }
    assert (
        main(["eval", "segmentation", "--data", str(tmp_path), "--upsampler", "tile-2x", "--backbone", "toy-vit"]) == 1
    )
    assert "no known layout" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason="the images of shared/data/camvid are not here")
def test_a_real_backbone_learns_from_a_handful_of_real_images():
    task = SegmentationTask(CAMVID, limit=4, train_limit=16, steps=150)
    encoder = create_encoder("vits14-focus", "bilinear", 2)
    result = measure(task, Subject("x", lambda: encoder))["result"]
    assert result["layout"] == "camvid"
    # Sky, building and road, which nearly every image shows.
    assert result["pixel_accuracy"]["value"] > 0.7
    assert min(result["iou"][name] for name in ("sky", "building", "road")) > 0.5
