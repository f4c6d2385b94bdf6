"""Small objects: outlines against scikit-image, pooling and class means against loops, twins of COCO and YOLO."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colour import NotFinite, PatchColour, lay_on_side
from PIL import Image
from skimage.draw import polygon2mask
from torch import Tensor

from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import DataError
from featsharp.evaluation.layouts.objects import open_labels
from featsharp.evaluation.layouts.outlines import draw
from featsharp.evaluation.runner import Subject, evaluate
from featsharp.evaluation.small_objects import SmallObjectTask, nearest_other_mean, pool_masks
from featsharp.upsamplers.base import GuidedUpsampler

COCO128 = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco128"
SIZE = (240, 320)  # (h, w) of the twin's pictures
COLOURS = {3: (220, 40, 40), 7: (40, 220, 40), 20: (40, 40, 220)}  # by class
# Left, top, width, height: 24 x 24, 60 x 60 and 130 x 100 pixels, in cells of 20 pixels (16 x 12) never aligned.
PLACES = [(22, 31, 24, 24), (101, 25, 60, 60), (150, 110, 130, 100)]


class Noise(GuidedUpsampler):
    """Features that have nothing to do with the picture, other ones each time."""

    calls = 0

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        self.calls += 1
        return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(self.calls))


def objects_of(number: int) -> list[tuple[int, tuple[int, int, int, int]]]:
    """Classes and places of the objects of a picture: every class comes in every size."""
    classes = list(COLOURS)
    return [(classes[(number + i) % 3], place) for i, place in enumerate(PLACES)]


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """Coloured boxes on grey: images, YOLO's boxes and outlines, COCO's instances."""
    for folder in ("images", "boxes", "outlines"):
        (tmp_path / folder).mkdir()
    images, annotations = [], []
    for number in range(6):
        pixels = np.full((*SIZE, 3), 128, dtype=np.uint8)
        boxes, outlines = [], []
        for category, (x, y, w, h) in objects_of(number):
            pixels[y : y + h, x : x + w] = COLOURS[category]
            corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
            boxes.append(f"{category} {(x + w / 2) / 320} {(y + h / 2) / 240} {w / 320} {h / 240}")
            outlines.append(" ".join([str(category), *(f"{a / 320} {b / 240}" for a, b in corners)]))
            annotations.append(
                {"id": len(annotations), "image_id": 100 + number, "category_id": category, "bbox": [x, y, w, h],
                 "segmentation": [[float(v) for corner in corners for v in corner]], "area": w * h, "iscrowd": 0}
            )  # fmt: skip
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "boxes" / f"{number}.txt").write_text("\n".join(boxes) + "\n")
        (tmp_path / "outlines" / f"{number}.txt").write_text("\n".join(outlines) + "\n")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": 240, "width": 320})
    crowd = {"id": 99, "image_id": 100, "category_id": 3, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 1,
             "segmentation": {"counts": [0, 81], "size": [9, 9]}}  # fmt: skip
    content = {"images": images, "annotations": [*annotations, crowd], "categories": []}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    return tmp_path


def run(folder: Path, labels: str = "outlines", upsampler: object = "bilinear", factor: int | None = 2, **settings):
    encoder = create_encoder(PatchColour((96, 128)), upsampler, factor)  # type: ignore[arg-type]
    task = SmallObjectTask(data=folder / "images", labels=folder / labels, **settings)
    return evaluate(task, [Subject("one", lambda: encoder)], progress=False)["one"]


# Outlines


def test_outlines_against_scikit_image():
    rng = np.random.default_rng(0)
    for _ in range(20):
        outline = rng.uniform(-3, 28, (rng.integers(3, 9), 2))
        # Its pixels are centred at whole numbers, (row, column).
        expected = polygon2mask((20, 25), outline[:, ::-1] - 0.5)
        assert np.array_equal(draw([outline], (20, 25)), expected)


def test_parts_are_joined_and_pixels_count_by_their_centre():
    box = np.array([(1.4, 2.0), (4.6, 2.0), (4.6, 3.6), (1.4, 3.6)])
    mask = draw([box, box + np.array([10, 0])], (6, 20))
    assert np.argwhere(mask).tolist() == [[y, x + add] for y in (2, 3) for add in (0, 10) for x in (1, 2, 3, 4)]
    assert not draw([box * 0.1], (6, 20)).any()


# Pooling


def test_pooling_is_the_mean_of_the_enlarged_map():
    features, size = torch.randn(5, 6, 8, dtype=torch.float64), (42, 64)
    masks = torch.zeros(3, *size, dtype=torch.float64)
    masks[0, 10:13, 20:22] = 1  # less than a cell
    masks[1, 15:30, 8:40] = 1
    masks[2, 20, 20] = masks[2, 30, 50] = 1
    enlarged = F.interpolate(features[None], size, mode="bilinear", align_corners=False)[0]
    expected = torch.stack([enlarged[:, mask > 0].mean(1) for mask in masks])
    torch.testing.assert_close(pool_masks(features, masks), expected)


# Classes


def test_class_means_are_those_of_other_images():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    category, image = rng.choice([2, 5, 9], 40), rng.integers(0, 7, 40)
    outcome = nearest_other_mean(vectors, category, image)
    for index in range(40):
        others = image != image[index]
        means = {c: vectors[others & (category == c)].mean(0) for c in set(category[others])}
        cosines = {c: vectors[index] @ mean / np.linalg.norm(mean) for c, mean in means.items()}
        assert outcome[index] == max(cosines, key=cosines.get)


def test_a_class_of_one_image_cannot_be_named():
    vectors = np.eye(3)[[0, 1, 0, 2]]
    outcome = nearest_other_mean(vectors, np.array([4, 6, 4, 8]), np.array([0, 0, 1, 1]))
    assert outcome.tolist() == [4, -1, 4, -1]


# The task


@pytest.mark.parametrize("labels", ["outlines", "boxes", "instances.json"])
def test_objects_of_one_colour_are_all_named(twin, labels):
    result = run(twin, labels, "tile", 2)["result"]
    for size in ("small", "medium", "large", "all"):
        assert result[f"accuracy_{size}"]["value"] == 1
    assert [result[f"objects_{size}"] for size in ("small", "medium", "large", "all")] == [6, 6, 6, 18]
    assert result["left_out"] == 0
    assert result["chance"] == pytest.approx(1 / 3)


def test_noise_scores_chance(twin):
    encoder = Noise(4, 2)
    outcome = np.mean([run(twin, upsampler=encoder, factor=None)["result"]["accuracy_all"]["value"] for _ in range(12)])
    # 216 guesses among three: a standard deviation of 0.032.
    assert outcome == pytest.approx(1 / 3, abs=0.1)


def test_small_objects_need_small_cells(twin):
    """E16: with cells of 80 pixels the ground and the neighbours hide small objects, and tiles bring them back."""
    coarse = run(twin, upsampler="identity", factor=1, low_res_size=(24, 32))["result"]
    sharp = run(twin, upsampler="tile", factor=4, low_res_size=(24, 32))["result"]
    assert coarse["accuracy_large"]["value"] == sharp["accuracy_large"]["value"] == 1
    assert sharp["accuracy_small"]["value"] == 1
    assert coarse["accuracy_small"]["value"] < 0.7


def test_annotated_areas_decide_the_size(twin):
    content = json.loads((twin / "instances.json").read_text())
    for annotation in content["annotations"]:
        annotation["area"] = 96.0**2
    (twin / "instances.json").write_text(json.dumps(content))
    result = run(twin, "instances.json")["result"]
    assert result["objects_large"] == 18
    assert result["objects_small"] == 0
    assert "accuracy_small" not in result


def test_images_without_labels_are_no_part(twin):
    (twin / "outlines" / "2.txt").unlink()
    assert list(run(twin, limit=3)["items"]) == ["0.png", "1.png", "4.png"]


def test_masks_that_are_no_polygons_count_by_their_box(twin):
    content = json.loads((twin / "instances.json").read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = {"counts": "abc", "size": list(SIZE)}
    (twin / "instances.json").write_text(json.dumps(content))
    labels = open_labels(twin / "instances.json")
    (first, *rest) = labels.read("0.png", SIZE)
    assert len(rest) == 2
    assert first.mask.sum() == 24 * 24
    assert first.mask[31:55, 22:46].all()


# Bad data


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.2", r"1\.txt, line 4: expected 'class cx cy w h'"),
        ("3 0.5 0.5 0.2 0.2 0.3", r"1\.txt, line 4: expected 'class cx cy w h'"),
        ("person 0.5 0.5 0.2 0.2", r"1\.txt, line 4: expected a class and numbers"),
        ("-1 0.5 0.5 0.2 0.2", r"1\.txt, line 4: expected 'class"),
        ("3 120 80 40 40", r"1\.txt, line 4: coordinates must be fractions from 0 to 1"),
        ("3 nan 0.5 0.2 0.2", r"1\.txt, line 4: coordinates must be fractions"),
    ],
)
def test_bad_lines_are_named_and_their_image_is_skipped(twin, line, message):
    path = twin / "outlines" / "1.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        open_labels(twin / "outlines").read("1.png", SIZE)
    assert [name for name, _ in run(twin)["skipped"]] == ["1.png"]


@pytest.mark.parametrize(
    "change", [{"category_id": None}, {"segmentation": [[1, 2, 3]]}, {"segmentation": None, "bbox": [1, 2]}]
)
def test_bad_annotations_are_named(twin, change):
    content = json.loads((twin / "instances.json").read_text())
    content["annotations"][4] |= change
    (twin / "instances.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances\.json, annotation 4 of 1\.png"):
        open_labels(twin / "instances.json").read("1.png", SIZE)
    assert [name for name, _ in run(twin, "instances.json")["skipped"]] == ["1.png"]


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"images": [], "annotations": [{"image_id": 1}]}'])
def test_other_json_is_refused(tmp_path, content):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(DataError, match=r"other\.json is not a COCO file of instances"):
        open_labels(tmp_path / "other.json")


def test_data_sets_that_cannot_be_used(twin, tmp_path):
    with pytest.raises(DataError, match="nowhere holds no objects; expected a folder of YOLO"):
        open_labels(tmp_path / "nowhere")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.txt").write_text("0 0.5 0.5 1 1")
    with pytest.raises(DataError, match=r"has objects in .*others; images and labels go by one name"):
        run(twin, "others")
    (twin / "outlines" / "0.txt").write_text("")
    assert run(twin)["skipped"] == [["0.png", "there is no object in it"]]
    (twin / "images" / "2.png").write_bytes(b"no image")
    assert [name for name, _ in run(twin)["skipped"]] == ["0.png", "2.png"]
    with pytest.raises(DataError, match=r"no class of .* is in more than one image"):
        run(twin, limit=3)  # one is left


def test_objects_of_a_picture_with_an_orientation_match_or_are_named(twin):
    expected = run(twin, "instances.json")
    for path in (twin / "images").iterdir():
        lay_on_side(path)
    assert run(twin, "instances.json")["result"] == expected["result"]
    with pytest.raises(DataError, match=r"0\.png: 0\.txt may be for the pixels as stored"):
        run(twin, "outlines")


def test_outlines_for_a_picture_of_another_size_are_named(twin):
    path = twin / "images" / "2.png"
    with Image.open(path) as image:
        smaller = image.resize((160, 120))
    smaller.save(path)
    ((name, reason),) = run(twin, "instances.json")["skipped"]
    assert name == "2.png"
    assert "instances.json, image 2.png: the labels are 240x320 pixels, the image 2.png is 120x160" in reason


def test_features_that_are_not_finite_are_no_result(twin):
    with pytest.raises(DataError, match="NaN or infinite features"):
        run(twin, upsampler=NotFinite(4, 2), factor=None)


def test_the_command(twin, capsys):
    command = ["eval", "small-objects", "--data", str(twin / "images"), "--labels", str(twin / "instances.json")]
    out = twin / "result.json"
    assert main([*command, "--backbone", "toy-vit", "--upsampler", "bilinear-2x", "--json", str(out)]) == 0
    assert "accuracy_small" in capsys.readouterr().out
    (encoder,) = json.loads(out.read_text())["encoders"].values()
    assert encoder["items"]["0.png"] == {"objects": 3}


@pytest.mark.skipif(not COCO128.is_dir(), reason="the pictures of shared/data are not here")
@pytest.mark.parametrize("kind", ["object_detection", "instance_segmentation"])
def test_real_labels_are_read(kind):
    folder = COCO128 / kind / "labels"
    labels = open_labels(folder)
    written = sum(len(path.read_text().splitlines()) for path in folder.glob("*.txt"))
    read = 0
    for path in (COCO128 / "images").glob("*.jpg"):
        if labels.knows(path.name):
            with Image.open(path) as image:
                read += len(labels.read(path.name, image.size[::-1]))
    # Two label files of detection have no picture; outlines thinner than a pixel cover none.
    assert 0.95 * written < read <= written
