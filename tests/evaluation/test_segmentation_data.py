"""Every layout is read as its data set defines it, and bad label files are named with what is wrong."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.layouts.label_files import ranges
from featsharp.evaluation.layouts.labels import VOID, FolderOptions, LabelCode
from featsharp.evaluation.layouts.segmentation import SegmentationData, open_segmentation

CODE = LabelCode(("a", "b", "c"), {0: 0, 1: 1, 2: 2, 255: VOID})


def write(path: Path, values: object, *, palette: bool = False) -> None:
    """An image file: [H, W] as grey or palette, [H, W, 3] as RGB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image = image.convert("L")
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)


def write_pair(image: Path, label: Path, values: list[int], *, palette: bool = False) -> None:
    write(image, np.full((1, len(values), 3), 128))
    write(label, [values], palette=palette)


def ade20k(root: Path, values: list[int]) -> None:
    for split in ("training", "validation"):
        write_pair(root / f"images/{split}/ADE_00000001.jpg", root / f"annotations/{split}/ADE_00000001.png", values)


def voc(root: Path, values: list[int], lists: str = "Segmentation", labels: str = "SegmentationClass") -> None:
    (root / "ImageSets" / lists).mkdir(parents=True)
    for number, split in enumerate(("train", "val")):
        stem = f"2007_00000{number}"
        write_pair(root / f"JPEGImages/{stem}.jpg", root / f"{labels}/{stem}.png", values, palette=True)
        (root / f"ImageSets/{lists}/{split}.txt").write_text(f"{stem}\n")


def context(root: Path, values: list[int]) -> None:
    voc(root, values, "SegmentationContext", "SegmentationClassContext")


def cityscapes(root: Path, values: list[int], kind: str = "labelIds") -> None:
    for split in ("train", "val"):
        stem = f"{split}/ulm/ulm_000000_000019"
        write_pair(root / f"leftImg8bit/{stem}_leftImg8bit.png", root / f"gtFine/{stem}_gtFine_{kind}.png", values)
        write(root / f"gtFine/{stem}_gtFine_color.png", np.zeros((1, len(values), 3)))


def coco_stuff(root: Path, values: list[int], labels: str = "stuffthingmaps", ending: str = "") -> None:
    for split in ("train2017", "val2017"):
        stem = f"{split}/000000000009"
        write_pair(root / f"images/{stem}.jpg", root / f"{labels}/{stem}{ending}.png", values)
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations/instances_val2017.json").write_text("{}")


def camvid(root: Path, values: list[int]) -> None:
    for split in ("train", "val"):
        write_pair(root / f"{split}/0001TP_1.png", root / f"{split}annot/0001TP_1.png", values)


def folder(root: Path, values: list[int], order: str = "{kind}/{split}") -> None:
    for split in ("train", "val"):
        image, label = (root / order.format(kind=kind, split=split) for kind in ("images", "labels"))
        write_pair(image / "x.jpg", label / "x.png", values)


def split_first(root: Path, values: list[int]) -> None:
    folder(root, values, "{split}/{kind}")


def read_val(data: SegmentationData) -> list[int]:
    pair = data.val[0]
    assert (pair.root / pair.image).is_file()
    return data.code.read(pair.root / pair.label, pair.label).classes[0].tolist()


@pytest.mark.parametrize(
    ("writer", "layout", "values", "expected"),
    [
        (ade20k, "ade20k", [0, 1, 13, 150], [None, "wall", "person", "flag"]),
        (voc, "voc", [0, 1, 15, 20, 255], ["background", "aeroplane", "person", "tvmonitor", None]),
        (context, "context", [0, 1, 37, 59, 255], [None, "aeroplane", "person", "wood", None]),
        (context, "context60", [0, 1, 59, 255], ["background", "aeroplane", "wood", None]),
        (
            cityscapes,
            "cityscapes",
            [0, 6, 7, 8, 9, 11, 24, 25, 28, 29, 31, 33],
            [None, None, "road", "sidewalk", None, "building", "person", "rider", "bus", None, "train", "bicycle"],
        ),
        (
            coco_stuff,
            "coco-stuff",
            [0, 10, 12, 89, 91, 181, 255],
            ["person", "fire hydrant", "stop sign", "toothbrush", "banner", "wood", None],
        ),
        (
            coco_stuff,
            "coco-stuff-27",
            [0, 10, 12, 89, 91, 118, 169, 181, 255],
            [
                "person",
                "outdoor",
                "outdoor",
                "indoor",
                "textile-stuff",
                "plant-stuff",
                "food-stuff",
                "solid-stuff",
                None,
            ],
        ),
        (camvid, "camvid", [0, 5, 10, 11, 255], ["sky", "tree", "bicyclist", None, None]),
        (folder, "folder", [0, 3, 255], ["0", "3", None]),
        (split_first, "folder", [0, 3, 255], ["0", "3", None]),
    ],
)
def test_labels_of_a_layout_mean_what_its_data_set_says(writer: Callable, layout, values, expected, tmp_path):
    writer(tmp_path, values)
    data = open_segmentation(tmp_path, layout)
    assert [None if c == VOID else data.code.classes[c] for c in read_val(data)] == expected
    assert len(data.train) == len(data.val) == 1
    if layout not in ("context60", "coco-stuff-27"):
        assert open_segmentation(tmp_path).layout == layout


@pytest.mark.parametrize(
    ("writer", "layout", "count"),
    [
        (ade20k, "ade20k", 150),
        (voc, "voc", 21),
        (context, "context", 59),
        (context, "context60", 60),
        (cityscapes, "cityscapes", 19),
        (coco_stuff, "coco-stuff", 171),
        (camvid, "camvid", 11),
    ],
)
def test_every_class_has_one_name_and_one_number(writer, layout, count, tmp_path):
    writer(tmp_path, [0])
    code = open_segmentation(tmp_path, layout).code
    assert len(set(code.classes)) == count
    assert sorted(c for c in code.codes.values() if c != VOID) == list(range(count))


def test_coco_numbers_leave_out_what_was_never_annotated(tmp_path):
    coco_stuff(tmp_path, [0])
    code = open_segmentation(tmp_path).code
    # Street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush: COCO ids from 1.
    assert not {number - 1 for number in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)} & code.codes.keys()


def test_every_class_of_coco_stuff_belongs_to_one_of_27_groups(tmp_path):
    coco_stuff(tmp_path, [0])
    fine, coarse = (open_segmentation(tmp_path, layout).code for layout in ("coco-stuff", "coco-stuff-27"))
    assert fine.codes.keys() == coarse.codes.keys()
    assert {c for c in coarse.codes.values() if c != VOID} == set(range(27))
    # Things are the first 12 groups, as COCO's 80 things are the first classes.
    assert all((c < 80) == (coarse.codes[number] < 12) for number, c in fine.codes.items() if c != VOID)


def test_coco_stuff_27_takes_the_pictures_of_the_lists_alone(tmp_path):
    for split in ("train2017", "val2017"):
        for number in (9, 11):
            write_pair(
                tmp_path / f"dataset/images/{split}/{number:012d}.jpg",
                tmp_path / f"dataset/annotations/{split}/{number:012d}.png",
                [0, 181],
            )
    assert len(open_segmentation(tmp_path, "coco-stuff-27").val) == 2
    for split in ("train2017", "val2017"):
        path = tmp_path / f"curated/{split}/Coco164kFull_Stuff_Coarse.txt"
        path.parent.mkdir(parents=True)
        path.write_text(f"{11:012d}\n")
    data = open_segmentation(tmp_path, "coco-stuff-27")
    assert [pair.image for pair in data.train] == ["images/train2017/000000000011.jpg"]
    assert len(data.val) == 1


@pytest.mark.parametrize("ending", ["", "_labelTrainIds"])
def test_coco_stuff_in_its_other_folder(ending, tmp_path):
    coco_stuff(tmp_path, [0, 91 if not ending else 80], "annotations", ending)
    data = open_segmentation(tmp_path, "coco-stuff")
    assert [data.code.classes[c] for c in read_val(data)] == ["person", "banner"]


def test_cityscapes_with_train_ids(tmp_path):
    cityscapes(tmp_path, [0, 18, 255], "labelTrainIds")
    assert read_val(open_segmentation(tmp_path)) == [0, 18, VOID]


def test_camvid_in_plain_folders_is_known_by_its_class_names(tmp_path):
    split_first(tmp_path, [0, 11])
    (tmp_path / "classes.txt").write_text(
        "sky\nbuilding\npole\nroad\npavement\ntree\nsign_symbol\nfence\ncar\npedestrian\nbicyclist\n"
    )
    data = open_segmentation(tmp_path)
    assert data.layout == "camvid"
    assert read_val(data) == [0, VOID]


def test_an_archive_may_be_given_by_the_folder_that_it_was_unpacked_in(tmp_path):
    ade20k(tmp_path / "ADEChallengeData2016", [1])
    assert open_segmentation(tmp_path).layout == "ade20k"


def test_a_folder_has_the_classes_of_its_file(tmp_path):
    folder(tmp_path, [0, 1, 7])
    (tmp_path / "classes.txt").write_text("grass\nwater\n\n")
    data = open_segmentation(tmp_path, options=FolderOptions(ignore_index=7))
    assert data.code.classes == ("grass", "water")
    assert read_val(data) == [0, 1, VOID]
    with pytest.raises(ConfigError, match=r"classes\.txt has 2 classes, the setting 5"):
        open_segmentation(tmp_path, options=FolderOptions(classes=5))
    (tmp_path / "classes.txt").write_text("grass\ngrass\n")
    with pytest.raises(DataError, match=r"classes\.txt.*none of them twice"):
        open_segmentation(tmp_path)


def test_a_folder_without_names_has_the_classes_that_training_shows(tmp_path):
    folder(tmp_path, [0, 4])
    write_pair(tmp_path / "images/train/y.jpg", tmp_path / "labels/train/y.png", [6, 255])
    (tmp_path / "labels/train/broken.png").write_bytes(b"")
    assert len(open_segmentation(tmp_path).code.classes) == 7
    assert len(open_segmentation(tmp_path, options=FolderOptions(classes=9)).code.classes) == 9
    (tmp_path / "labels/train/x.png").unlink()
    (tmp_path / "labels/train/y.png").unlink()
    with pytest.raises(DataError, match=r"labels/train/x\.png: no such label file.*names of their pictures"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "layout", "message"),
    [
        (lambda root: None, "auto", r"no known layout.*ade20k: images/\{training.*folder: images"),
        (lambda root: None, "voc", r"expected voc: JPEGImages, SegmentationClass"),
        (lambda root: voc(root, [0]), "ade20k", "expected ade20k"),
        (
            lambda root: (voc(root, [0]), (root / "ImageSets/Segmentation/val.txt").unlink()),
            "auto",
            r"val\.txt: no such",
        ),
        (
            lambda root: (voc(root, [0]), (root / "ImageSets/Segmentation/val.txt").write_text("")),
            "auto",
            "no validation images; layout 'voc' expects",
        ),
        (lambda root: (folder(root, [0]), (root / "images/train/x.jpg").unlink()), "auto", "no training images"),
    ],
)
def test_a_data_set_that_is_none_says_what_was_expected(prepare, layout, message, tmp_path):
    prepare(tmp_path)
    with pytest.raises(DataError, match=message):
        open_segmentation(tmp_path, layout)


def test_unknown_layout_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'ade20k'"):
        open_segmentation(tmp_path, "ade20")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_segmentation(tmp_path / "nowhere")


def test_an_image_without_a_label_is_listed(tmp_path):
    folder(tmp_path, [0, 1])
    (tmp_path / "labels/val/x.png").unlink()
    data = open_segmentation(tmp_path)
    with pytest.raises(DataError, match=r"labels/val/x\.png: no such label file"):
        read_val(data)


def test_labels_out_of_range_are_named(tmp_path):
    write(tmp_path / "bad.png", [[0, 255, 7]])
    with pytest.raises(DataError, match=r"bad\.png: label 7 is out of range; allowed are 0\.\.2, and 255 for void"):
        CODE.read(tmp_path / "bad.png", "bad.png")
    Image.fromarray(np.full((1, 2), 70000, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(DataError, match=r"wide\.tif: label 70000"):
        CODE.read(tmp_path / "wide.tif", "wide.tif")


def test_label_files_that_are_none_are_named(tmp_path):
    write(tmp_path / "rgb.png", np.full((2, 2, 3), (0, 1, 2)))
    write(tmp_path / "lossy.jpg", np.zeros((2, 2)))
    write(tmp_path / "short.png", np.random.default_rng(0).integers(0, 3, (64, 64)))
    content = (tmp_path / "short.png").read_bytes()
    (tmp_path / "short.png").write_bytes(content[: len(content) // 2])
    for name, message in (
        ("rgb.png", r"one number per pixel.*colours, such as \(0, 1, 2\)"),
        ("lossy.jpg", "lossless image such as png"),
        ("short.png", "cannot be read as labels"),
    ):
        with pytest.raises(DataError, match=f"{name}: .*{message}"):
            CODE.read(tmp_path / name, name)


def test_labels_of_16_4_2_and_1_bits_keep_their_numbers(tmp_path):
    values = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    expected = {16: values, 4: values, 2: values, 1: values % 2}
    code = LabelCode(("a", "b", "c", "d"), {number: number for number in range(4)})
    for bits, stored in expected.items():
        path = tmp_path / f"{bits}.png"
        path.write_bytes(grey_png(stored, bits))
        assert code.read(path, path.name).classes.tolist() == stored.tolist()


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A grey png by its specification: Pillow does not write those of 2 and 4 bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape
    rows = [
        b"\0"
        + int("".join(f"{number:0{bits}b}" for number in row).ljust(-(-width * bits // 8) * 8, "0"), 2).to_bytes(
            -(-width * bits // 8), "big"
        )
        for row in values.tolist()
    ]
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"".join(rows)))
        + chunk(b"IEND", b"")
    )


def test_ranges():
    assert ranges([3, 0, 1, 2, 7, 9, 10]) == "0..3, 7, 9..10"
    assert ranges([]) == ""
