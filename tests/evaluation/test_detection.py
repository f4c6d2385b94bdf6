"""Detection: the same synthetic pictures in every layout, wrong data, what is kept, and what is learnt."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from patch_colour import PatchColour, lay_on_side
from PIL import Image

pytest.importorskip("faster_coco_eval")

from featsharp.builder import create_encoder, load_from_file
from featsharp.cli.main import main
from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.detection import DetectionTask
from featsharp.evaluation.layouts.detection import open_detection
from featsharp.evaluation.runner import Run, Subject, evaluate

COCO128 = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"
COLOURS = {3: (220, 40, 40), 7: (40, 220, 40), 20: (40, 40, 220)}  # by category, with gaps
SIZE = (120, 160)  # (h, w) of the pictures


def draw_picture(number: int, rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """Squares of 12, 24 and 48 pixels on grey, one in each third of the width: pixels, and (category, x, y, side)."""
    pixels = np.full((*SIZE, 3), 128, np.uint8)
    objects = []
    for place, side in enumerate(rng.permutation([12, 24, 48]).tolist()):
        category = list(COLOURS)[(number + place) % 3]
        x, y = 53 * place + int(rng.integers(0, 54 - side)), int(rng.integers(0, SIZE[0] - side + 1))
        pixels[y : y + side, x : x + side] = COLOURS[category]
        objects.append((category, x, y, side))
    return pixels, objects


def make_twin(root: Path, train: int, val: int) -> Path:
    """A data set in the layout "plain", with a crowd in the first picture of each split."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for number in range(count):
            pixels, objects = draw_picture(number, rng)
            name = f"{split}{number}.png"
            Image.fromarray(pixels).save(root / "images" / name)
            images.append({"id": 100 + number, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
            annotations += [
                {"id": 10 * number + index, "image_id": 100 + number, "category_id": category, "iscrowd": 0,
                 "bbox": [x, y, side, side], "area": side**2,
                 "segmentation": [[x, y, x + side, y, x + side, y + side, x, y + side]]}
                for index, (category, x, y, side) in enumerate(objects)
            ]  # fmt: skip
        annotations.append(
            {"id": 9999, "image_id": 100, "category_id": 7, "iscrowd": 1, "bbox": [0, 0, 30, 30], "area": 900,
             "segmentation": {"counts": [0, 900], "size": [30, 30]}}
        )  # fmt: skip
        categories = [{"id": category, "name": f"square {category}"} for category in COLOURS]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    return make_twin(tmp_path / "twin", train=4, val=2)


def make_encoder(upsampler: str = "bilinear", factor: int = 2, native: tuple[int, int] = (16, 24)):
    return create_encoder(PatchColour(native), upsampler, factor)


def run(folder: Path, encoder=None, **settings):
    encoder = make_encoder() if encoder is None else encoder
    task = DetectionTask(data=folder, **({"steps": 2, "batch": 2} | settings))
    return evaluate(task, [Subject("one", lambda: encoder)], progress=False)["one"]


# Layouts


def as_coco(plain: Path, root: Path) -> Path:
    """The same pictures as COCO has them: a folder for each split, an older year beside it."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        for path in (plain / "images").glob(f"{split}*.png"):
            (root / f"{split}2017" / path.name).write_bytes(path.read_bytes())
        (root / "annotations" / f"instances_{split}2017.json").write_bytes((plain / f"{split}.json").read_bytes())
        (root / "annotations" / f"instances_{split}2014.json").write_text("{}")
    return root


def as_yolo(plain: Path, root: Path) -> Path:
    """The same pictures as YOLO has them, which knows no crowds."""
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        content = json.loads((plain / f"{split}.json").read_text())
        for image in content["images"]:
            name = image["file_name"]
            (root / "images" / split / name).write_bytes((plain / "images" / name).read_bytes())
            lines = []
            for one in content["annotations"]:
                if one["image_id"] == image["id"] and not one["iscrowd"]:
                    points = np.array(one["segmentation"][0]).reshape(-1, 2) / SIZE[::-1]
                    lines.append(f"{one['category_id']} {' '.join(map(str, points.ravel()))}")
            (root / "labels" / split / f"{Path(name).stem}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_all_layouts_have_the_same_objects(twin, tmp_path):
    rng = np.random.default_rng(0)
    drawn = {
        f"{split}{n}": draw_picture(n, rng)[1] for split, count in (("train", 4), ("val", 2)) for n in range(count)
    }
    folders = {"plain": twin, "coco": as_coco(twin, tmp_path / "coco"), "yolo": as_yolo(twin, tmp_path / "yolo")}
    for layout, folder in folders.items():
        data = open_detection(folder)
        assert data.layout == layout
        assert [len(data.train.pairs), len(data.val.pairs)] == [4, 2]
        for split in (data.train, data.val):
            for pair in split.pairs:
                assert (pair.root / pair.image).is_file()
                expected = drawn[Path(pair.image).stem]
                objects = [one for one in split.labels.boxes(pair.image, SIZE) if not one.crowd]
                for one, (category, x, y, side) in zip(objects, expected, strict=True):
                    assert one.category == category
                    assert one.box == pytest.approx((x, y, x + side, y + side))
                    assert one.area == side**2
                    assert one.mask().sum() == side**2
                    assert one.mask()[y : y + side, x : x + side].all()
        crowds = [one for one in data.val.labels.boxes(data.val.pairs[0].image, SIZE) if one.crowd]
        assert len(crowds) == (layout != "yolo")
        if layout != "yolo":
            assert data.names == {category: f"square {category}" for category in COLOURS}


def test_yolo_without_splits_takes_every_second_picture(twin, tmp_path):
    root = as_yolo(twin, tmp_path / "yolo")
    flat = tmp_path / "flat"
    for folder, target in (("images", "images"), ("labels", "instance_segmentation/labels")):
        (flat / target).mkdir(parents=True)
        for path in (root / folder / "train").iterdir():
            (flat / target / path.name).write_bytes(path.read_bytes())
    data = open_detection(flat)
    assert [pair.image for pair in data.train.pairs] == ["images/train0.png", "images/train2.png"]
    assert [pair.image for pair in data.val.pairs] == ["images/train1.png", "images/train3.png"]


def test_boxes_are_cut_at_the_border(twin):
    content = json.loads((twin / "val.json").read_text())
    content["annotations"][0]["bbox"] = [-5, 100, 30, 40]
    (twin / "val.json").write_text(json.dumps(content))
    labels = open_detection(twin).val.labels
    assert labels.boxes("images/val0.png", SIZE)[0].box == (0, 100, 25, 120)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("val.json", r"val\.json is missing; expected annotations/.* or train\.json and val\.json"),
        ("images", r"images is missing; expected"),
        ("both", r"no known layout of a detection data set; expected coco: .*; plain: .*; yolo: images/"),
        ("folder", r"no such folder; give the folder of a detection data set"),
    ],
)
def test_what_is_missing_is_named_with_what_is_expected(twin, missing, message):
    if missing == "both":
        (twin / "train.json").unlink()
        (twin / "val.json").unlink()
    elif missing == "folder":
        twin = twin / "nowhere"
    else:
        (twin / missing).rename(twin / "other")
    with pytest.raises(DataError, match=message):
        open_detection(twin)


def test_splits_of_coco_that_are_missing_are_named(twin, tmp_path):
    root = as_coco(twin, tmp_path / "coco")
    (root / "val2017").rename(root / "test2017")
    with pytest.raises(DataError, match="val2017 is missing"):
        open_detection(root)
    for path in (root / "annotations").glob("instances_train*"):
        path.unlink()
    with pytest.raises(DataError, match=r"instances_train\*\.json is missing"):
        open_detection(root)
    with pytest.raises(ConfigError, match="unknown layout"):
        open_detection(root, "cococo")


# The task


def test_bad_pictures_are_counted_and_end_nothing(twin):
    (twin / "images" / "train1.png").write_bytes(b"no image")
    content = json.loads((twin / "val.json").read_text())
    content["annotations"][4]["bbox"] = [1, float("nan"), 2, 3]
    (twin / "val.json").write_text(json.dumps(content))
    outcome = run(twin)
    assert outcome["result"]["train_images"] == 3
    ((name, reason),) = outcome["result"]["train_skipped"]
    assert name == "images/train1.png"
    assert "image" in reason
    ((name, reason),) = outcome["skipped"]
    assert name == "images/val1.png"
    assert "val.json, annotation 11 of images/val1.png" in reason
    assert outcome["items"] == {"images/val0.png": {"objects": 3, "size": [120, 160]}}


def test_pictures_on_their_side_give_the_same(twin):
    def measure_all():
        encoder, task = make_encoder(), DetectionTask(data=twin, steps=2, batch=2, masks=True)
        head = task.prepare(encoder, Subject("one", lambda: encoder), Run())
        return head, [task.measure(encoder, item, head) for item in task.items()]

    head, expected = measure_all()
    assert head.categories == [3, 7, 20]
    assert {one["category_id"] for row in expected for one in row["_found"]} <= {3, 7, 20}
    assert [one["iscrowd"] for one in expected[0]["_truth"]] == [0, 0, 0, 1]
    for path in (twin / "images").iterdir():
        lay_on_side(path)
    head, rows = measure_all()
    assert head.skipped == []
    assert rows == expected


@pytest.mark.slow
def test_features_and_detectors_are_kept(twin, tmp_path):
    first, second = make_encoder(), make_encoder()
    expected = run(twin, first, cache_dir=tmp_path / "cache")
    assert run(twin, second, cache_dir=tmp_path / "cache") == expected
    assert first.backbone.seen
    assert not second.backbone.seen
    other = run(twin, second, cache_dir=tmp_path / "cache", seed=1)
    assert not second.backbone.seen
    assert other["items"] == expected["items"]
    for path in (tmp_path / "cache" / "heads").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert run(twin, second, cache_dir=tmp_path / "cache") == expected


def test_a_data_set_without_objects_is_named(twin):
    content = json.loads((twin / "train.json").read_text())
    (twin / "train.json").write_text(json.dumps(content | {"annotations": []}))
    with pytest.raises(DataError, match="none of 4 training pictures has an object"):
        run(twin)


def test_the_command_and_the_table(twin, tmp_path, capsys):
    result = tmp_path / "result.json"
    command = ["eval", "detection", "--data", str(twin), "--steps", "2", "--batch", "2", "--masks", "--limit", "2"]
    encoders = ["--backbone", "toy-vit", "--upsampler", "identity-1x", "bilinear-2x"]
    assert main([*command, *encoders, "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "mask_ap50" in printed
    assert "gain Sm" in printed
    encoders = json.loads(result.read_text())["encoders"]
    assert set(encoders["bilinear-2x"]["result"]["by_class"]) == {"square 3", "square 7", "square 20"}
    assert main(["eval", "tables", "--table", "1", "--results", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "theirs: RADIOv2.5-L" in printed
    assert "ours: toy-vit" in printed
    assert "bilinear-2x" in printed.split("ours")[1]


@pytest.mark.parametrize("upsampler", ["sapa", "s2"])
def test_upsamplers_that_failed_elsewhere_have_a_number(twin, upsampler):
    """E12: SAPA on any number of channels, untrained here; and one that returns two maps."""
    result = run(twin, make_encoder(upsampler))["result"]
    assert 0 <= result["ap"]["value"] <= 1


# What is learnt


@pytest.mark.slow
def test_a_detector_learns_and_small_objects_need_small_cells(tmp_path):
    """E9, E16: squares of known places are found; the small ones only where their cells are small."""
    folder = make_twin(tmp_path / "twin", train=24, val=8)
    settings = {"steps": 160, "batch": 8, "learning_rate": 5e-3}
    coarse = run(folder, make_encoder("identity", 1, (48, 64)), **settings)["result"]
    sharp = run(folder, make_encoder("tile", 4, (48, 64)), **settings)["result"]
    assert sharp["ap50"]["value"] > 0.8
    assert sharp["ap_small"]["value"] > coarse["ap_small"]["value"] + 0.2


@pytest.mark.slow
@pytest.mark.skipif(not COCO128.is_dir(), reason="the pictures of shared/data are not here")
def test_eight_real_pictures_are_learnt_with_their_masks():
    """E29: what the detector was trained on is found, boxes and masks, by a backbone that ships."""
    logging.getLogger("featsharp").setLevel(logging.ERROR)
    encoder = load_from_file("bilinear-2x", featurizer="vits14-focus").eval()
    settings = {"train_limit": 8, "measure_on": "train", "masks": True, "steps": 300, "learning_rate": 3e-3}
    result = run(COCO128, encoder, batch=4, **settings)["result"]
    assert result["ap50"]["value"] > 0.9
    assert result["mask_ap50"]["value"] > 0.9
