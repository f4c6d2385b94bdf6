"""Label maps of any convention mean what they should, or are refused with the values found and what to give."""

import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.layouts.label_files import COLOUR, read_label_file, spell
from featsharp.evaluation.layouts.labels import VOID, FolderOptions, LabelCode
from featsharp.evaluation.layouts.segmentation import open_segmentation

FILES = 5


def write_labels(root: Path, train: Any, val: Any = None, save: Callable[[Any, Path], None] | None = None) -> Path:
    """A data set of layout folder: every label file of a split has the same values, [W] or [W, channels]."""
    for split, values in (("train", train), ("val", train if val is None else val)):
        for number in range(FILES):
            image, label = root / f"images/{split}/{number}.png", root / f"labels/{split}/{number}.png"
            for path in (image, label):
                path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (len(values), 1)).save(image)
            (save or save_array)(values, label)
    return root


def save_array(values: Any, path: Path) -> None:
    Image.fromarray(np.asarray(values, np.uint16 if np.max(values) > 255 else np.uint8)[None]).save(path)


def meaning(root: Path, names: str = "", **options: int) -> tuple[list[str | None], tuple[str, ...]]:
    """The class of every pixel of the first validation label, None for void, and all classes of the head."""
    if names:
        (root / "classes.txt").write_text(names.replace("/", "\n"))
    data = open_segmentation(root, options=FolderOptions(**options))
    pair = data.val[0]
    read = data.code.read(pair.root / pair.label, pair.label).classes[0].tolist()
    return [None if c == VOID else data.code.classes[c] for c in read], data.code.classes


Case = tuple[Sequence[int], dict[str, Any], Sequence[str | None], Sequence[str]]
READ: dict[str, Case] = {
    "mask of 0 and 255": ([0, 255], {}, ["0", "255"], ["0", "255"]),
    "its names": ([255, 0], {"names": "ground/object"}, ["object", "ground"], ["ground", "object"]),
    "its number of classes": ([0, 255], {"options": {"classes": 2}}, ["0", "255"], ["0", "255"]),
    "mask without void": ([0, 255], {"options": {"ignore_index": -1}}, ["0", "255"], ["0", "255"]),
    "mask with void between": ([0, 128, 255], {"options": {"ignore_index": 128}}, ["0", None, "255"], ["0", "255"]),
    "mask of 16 bits": ([0, 65535], {}, ["0", "65535"], ["0", "65535"]),
    "void 255": ([0, 1, 255], {}, ["0", "1", None], ["0", "1"]),
    "void first": ([0, 1, 2], {"options": {"ignore_index": 0}}, [None, "1", "2"], ["1", "2"]),
    "void in the middle": ([0, 1, 2], {"options": {"ignore_index": 1}}, ["0", None, "2"], ["0", "2"]),
    "void last": ([0, 1, 2], {"options": {"ignore_index": 2}}, ["0", "1", None], ["0", "1"]),
    "void that never occurs": ([0, 1], {"options": {"ignore_index": 99}}, ["0", "1"], ["0", "1"]),
    "negative void that never occurs": ([0, 1], {"options": {"ignore_index": -100}}, ["0", "1"], ["0", "1"]),
    "from 1": ([1, 2, 3], {}, ["1", "2", "3"], ["1", "2", "3"]),
    "from 1, with names": ([1, 2, 3], {"names": "a/b/c"}, ["a", "b", "c"], ["a", "b", "c"]),
    "from 1, with their number": ([1, 2, 3], {"options": {"classes": 3}}, ["1", "2", "3"], ["1", "2", "3"]),
    "from 1 with void 255": ([1, 2, 255], {"names": "a/b"}, ["a", "b", None], ["a", "b"]),
    "void 0 without a name": (
        [0, 1, 2, 3],
        {"names": "a/b/c", "options": {"ignore_index": 0}},
        [None, "a", "b", "c"],
        ["a", "b", "c"],
    ),
    "void 0 with a name": (
        [0, 1, 2],
        {"names": "background/a/b", "options": {"ignore_index": 0}},
        [None, "a", "b"],
        ["a", "b"],
    ),
    "void is not among the number of classes": (
        [0, 1, 2, 3],
        {"options": {"classes": 3, "ignore_index": 2}},
        ["0", "1", None, "3"],
        ["0", "1", "3"],
    ),
    "void is among the number of classes": (
        [0, 1, 2],
        {"options": {"classes": 3, "ignore_index": 0}},
        [None, "1", "2"],
        ["1", "2"],
    ),
    "the line of void that labelme writes first": (
        [0, 1, 255], {"names": "__ignore__/_background_/a"}, ["_background_", "a", None], ["_background_", "a"],
    ),
    "a line named void": ([0, 1, 2], {"names": "a/Void/b"}, ["a", None, "b"], ["a", "b"]),
    "void first, and named so": (
        [0, 1, 2],
        {"names": "void/a/b", "options": {"ignore_index": 0}},
        [None, "a", "b"],
        ["a", "b"],
    ),
    "void last after the names": (
        [0, 1, 2],
        {"names": "a/b", "options": {"ignore_index": 2}},
        ["a", "b", None],
        ["a", "b"],
    ),
    "empty classes": ([0, 2, 5], {}, ["0", "2", "5"], ["0", "1", "2", "3", "4", "5"]),
    "more names than classes that occur": ([0, 1], {"names": "a/b/c/d"}, ["a", "b"], ["a", "b", "c", "d"]),
    "16 bits": ([0, 1, 300], {"options": {"classes": 301}}, ["0", "1", "300"], [str(n) for n in range(301)]),
    "255 among many": ([*range(300)], {"options": {"ignore_index": -1}}, [str(n) for n in range(300)],
                       [str(n) for n in range(300)]),
    "255 is void among many": ([*range(300)], {"options": {"ignore_index": 255}},
                               [None if n == 255 else str(n) for n in range(300)],
                               [str(n) for n in range(300) if n != 255]),
    "255 is a class of 256": ([*range(256)], {"options": {"classes": 256}}, [str(n) for n in range(256)],
                              [str(n) for n in range(256)]),
    "255 is void after 255 classes": ([*range(256)], {"options": {"classes": 255}},
                                      [*(str(n) for n in range(255)), None], [str(n) for n in range(255)]),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_numbers_are_read(case, tmp_path):
    values, given, expected, classes = READ[case]
    found = meaning(write_labels(tmp_path, values), given.get("names", ""), **given.get("options", {}))
    assert found == (list(expected), tuple(classes))


Refused = tuple[Sequence[int], Sequence[int] | None, dict[str, Any], str]
REFUSED: dict[str, Refused] = {
    "a mask whose 255 is void": (
        [0, 255],
        None,
        {"options": {"ignore_index": 255}},
        r"1 class is left in training labels beside 255, void.*\(5 files\) show 0 \(in 5\), 255 \(in 5\).*without --ig",
    ),
    "one class and void": ([1, 255], None, {}, r"1 class is left .* beside 255, void"),
    "one class": ([3, 3], None, {}, "1 class is left in training labels"),
    "one class in validation": ([0, 1, 2], [1], {}, "1 class is left in validation labels"),
    "nothing but void": ([255], None, {"names": "a/b"}, "0 class is left in training labels beside 255, void"),
    "ids of instances": ([0, 1001, 24005, 33017], None, {}, "between 0 and 1001 no number occurs.*ids of instances"),
    "ids in a row": ([1001, 1002, 1003], None, {}, "numbers begin at 1001"),
    "ids with names": ([0, 1001, 24005], None, {"names": "a/b"}, "there are 2 classes, but labels have 1001, 24005"),
    "three grey levels": ([0, 128, 255], None, {}, r"between 0 and 128.*If 128 is void, give --ignore-index 128"),
    "void of 16 bits": ([0, 1, 65535], None, {}, "--ignore-index 65535"),
    "-1 stored as 255": ([0, 1, 255], None, {"options": {"ignore_index": -1}}, "--ignore-index 255"),
    "-100 stored as 156": ([0, 1, 156], None, {"options": {"ignore_index": -100}}, "--ignore-index 156"),
    "255 in a row": ([*range(256)], None, {}, "255 may be void or a class.*Give --ignore-index 255"),
    "fewer names than occur": ([0, 1, 2], None, {"names": "a/b"}, r"2 classes, but labels have 2; allowed are 0\.\.1"),
    "void 0 that is not given": ([0, 1, 2, 3], None, {"names": "a/b/c"}, "3 classes, but labels have 3.*--ignore-in"),
    "fewer than given": ([0, 1, 2], None, {"options": {"classes": 2}}, "2 classes, but labels have 2"),
    "a void name too few": (
        [0, 1, 2, 3], None, {"names": "void/a/b", "options": {"ignore_index": 0}}, "3 classes, but labels have 3",
    ),
    "from 0 in training, from 1 in validation": ([0, 1, 2], [1, 2, 3], {}, "validation labels have 3, which training"),
    "from 1 in training, from 0 in validation": ([1, 2, 3], [0, 1, 2], {}, "validation labels have 0, which training"),
    "the same with more names": ([1, 2], [0, 1], {"names": "a/b/c/d"}, "in 5 of 5 training labels and in none"),
    "1 in training, 255 in validation": ([0, 1], [0, 255], {}, "some masks have 0 and 1, others 0 and 255"),
    "255 in training, 1 in validation": ([0, 255], [0, 1], {}, "some masks have 0 and 1, others 0 and 255"),
    "8 bits in training, 16 in validation": ([0, 255], [0, 65535], {}, "validation labels have 65535, which training"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_certain_is_refused(case, tmp_path):
    train, val, given, message = REFUSED[case]
    with pytest.raises(DataError) as caught:
        meaning(write_labels(tmp_path, train, val), given.get("names", ""), **given.get("options", {}))
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert "Training labels (5 files) show" in text
    assert len(text) < 700


def test_a_few_files_with_other_numbers_are_left_to_be_skipped(tmp_path):
    write_labels(tmp_path, [0, 1, 2])
    save_array([0, 1, 77], tmp_path / "labels/train/3.png")
    assert meaning(tmp_path, "a/b/c")[0] == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"label 77 is out of range; allowed are 0\.\.2, and 255 for void"):
        open_segmentation(tmp_path).code.read(tmp_path / "labels/train/3.png", "3.png")
    save_array([0, 1, 78], tmp_path / "labels/val/3.png")
    with pytest.raises(DataError, match="3 classes, but labels have 77, 78"):
        open_segmentation(tmp_path)


@pytest.mark.parametrize("objects", [(1, 3, 5, 2, 7), (6, 1, 2, 3, 4)])
def test_files_that_number_their_objects_show_instances(objects, tmp_path):
    write_labels(tmp_path, [0, 1])
    for number, count in enumerate(objects):
        for split in ("train", "val"):
            save_array([*range(count + 1), 255], tmp_path / f"labels/{split}/{number}.png")
    with pytest.raises(DataError, match=r"every file has a row.*Replace ids of instances"):
        meaning(tmp_path)
    assert meaning(tmp_path, classes=8)[1] == tuple(map(str, range(8)))
    save_array([0, 2, 255], tmp_path / "labels/train/1.png")  # classes leave gaps
    assert meaning(tmp_path)[1] == tuple(map(str, range(max(objects) + 1)))


def test_options_that_contradict_a_known_data_set(tmp_path):
    names = "sky/building/pole/road/pavement/tree/sign_symbol/fence/car/pedestrian/bicyclist"
    write_labels(tmp_path, [0, 1, 11])
    assert meaning(tmp_path, names, ignore_index=11)[0] == ["sky", "building", None]
    with pytest.raises(ConfigError, match="layout 'camvid' has class 0; leave out --ignore-index 0"):
        meaning(tmp_path, names, ignore_index=0)
    with pytest.raises(ConfigError, match="layout 'camvid' has 11 classes; leave out --classes 12"):
        meaning(tmp_path, names, classes=12)


def test_options_out_of_range(tmp_path):
    write_labels(tmp_path, [0, 1])
    for number in (2**32, -(2**31) - 1, 10**30):
        with pytest.raises(ConfigError, match=rf"no label file holds the void number {number}; .* 32 bits"):
            meaning(tmp_path, ignore_index=number)
    with pytest.raises(ConfigError, match="at most 32768 classes; got 32769"):
        meaning(tmp_path, classes=32769)
    assert len(meaning(tmp_path, classes=32768, ignore_index=2**32 - 1)[1]) == 32768
    with pytest.raises(DataError, match="33000 classes are more than 32768"):
        meaning(write_labels(tmp_path / "many", range(33000)), ignore_index=-1)


# Colours

COLOURS = [(0, 0, 0), (128, 0, 0), (128, 128, 128), (224, 224, 192)]
TABLE = "background 0 0 0/plane 128 0 0/bus 128 128 128/void 224 224 192"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("classes.txt", TABLE.replace("/", "\n")),
        ("class_dict.csv", "name,r,g,b\nbackground,0,0,0\nplane,128,0,0\nbus,128,128,128\nVoid,224,224,192\n"),
        ("label_colors.txt", "0 0 0\tbackground\n128 0 0\t\tplane\n128 128 128 bus\n224 224 192\tVoid\n"),
        ("labelmap.txt", "# label:color_rgb:parts:actions\nbackground:0,0,0::\nplane:128,0,0::\nbus:128,128,128::\n"
                         "ignored:224,224,192::\n"),
    ],
)  # fmt: skip
def test_colours_of_a_class_table_are_read(name, table, tmp_path):
    write_labels(tmp_path, COLOURS)
    (tmp_path / name).write_text(table)
    expected = ["background", "plane", "bus", None]
    assert meaning(tmp_path) == (expected, tuple(expected[:3]))
    # A file of greys alone is one of colours, too; the numbers of the lines may be stored as well.
    Image.fromarray(np.array([[COLOURS[2], COLOURS[0]]], np.uint8)).save(tmp_path / "labels/val/0.png")
    assert meaning(tmp_path)[0] == ["bus", "background"]
    save_array([3, 1], tmp_path / "labels/val/0.png")
    assert meaning(tmp_path)[0] == [None, "plane"]


def test_the_void_colour_is_given_by_its_line(tmp_path):
    write_labels(tmp_path, COLOURS)
    table = TABLE.replace("void", "border")
    assert meaning(tmp_path, table, ignore_index=3)[0] == ["background", "plane", "bus", None]
    assert meaning(tmp_path, table)[0][-1] == "border"


def test_colours_that_nothing_explains_are_refused(tmp_path):
    write_labels(tmp_path, COLOURS)
    with pytest.raises(DataError, match=r"labels are colours.*show \(0, 0, 0\) \(in 5\), \(128, 0, 0\).*NAME R G B"):
        meaning(tmp_path)
    with pytest.raises(DataError, match=r"3 classes, but labels have \(224, 224, 192\)"):
        meaning(tmp_path, TABLE.rpartition("/")[0])
    for table in ("a 0 0 0/b 128 0 0/c", "a 0 0 0/b 0 0 0", "a 0 0 300/b 0 0 0"):
        with pytest.raises(DataError, match=r"classes\.txt: expected for each class a line NAME R G B"):
            meaning(tmp_path, table)


def palette_image(indices: Any, palette: Any) -> Image.Image:
    image = Image.fromarray(np.asarray(indices, np.uint8)[None]).convert("L")
    image.putpalette(np.asarray(palette, np.uint8).tobytes())
    return image


def test_palette_indices_are_classes(tmp_path):
    palette = np.zeros((256, 3), np.uint8)
    palette[[1, 2, 255]] = COLOURS[1:]
    write_labels(tmp_path, [0, 1, 2, 255], save=lambda values, path: palette_image(values, palette).save(path))
    assert meaning(tmp_path) == (["0", "1", "2", None], ("0", "1", "2"))
    assert meaning(tmp_path, "background 0 0 0/plane 128 0 0/bus 128 128 128")[0] == [
        "background",
        "plane",
        "bus",
        None,
    ]
    # Indices in another order than the lines: the colours decide.
    assert meaning(tmp_path, "bus 128 128 128/plane 128 0 0/background 0 0 0/void 224 224 192")[0] == [
        "background", "plane", "bus", None,
    ]  # fmt: skip


def test_palettes_that_number_colours_differently_are_refused(tmp_path):
    write_labels(tmp_path, [0, 1, 2], save=lambda values, path: palette_image(values, COLOURS).save(path))
    palette_image([0, 1, 2], [COLOURS[0], COLOURS[2], COLOURS[1]]).save(tmp_path / "labels/val/2.png")
    message = r"index 1 is \(128, 0, 0\) in labels/train/0\.png and \(128, 128, 128\) in labels/val/2\.png"
    with pytest.raises(DataError, match=message):
        meaning(tmp_path)
    assert meaning(tmp_path, TABLE)[0] == ["background", "plane", "bus"]


# Files


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *(("L", suffix) for suffix in ("png", "tif", "bmp", "gif", "pgm")),
        *((mode, "png") for mode in ("RGB", "LA", "RGBA", "P")),
        *((mode, "tif") for mode in ("RGB", "LA", "RGBA", "P", "I;16", "I")),
        ("I;16", "png"),
    ],
)
def test_greys_are_numbers_in_every_mode(mode, suffix, tmp_path):
    values = np.array([[0, 1, 2, 255], [2, 255, 0, 20]], np.uint8)
    image = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode != "L":
        image = image.convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    assert read_label_file(tmp_path / f"x.{suffix}", "x").values.tolist() == values.tolist()


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 1, 1]], bool),
        np.array([[0, 1, 2, 255]], np.uint8),
        np.array([[0, 1, -1, -100]], np.int8),
        np.array([[0, 1, -1, -100]], np.int16),
        np.array([[0, 1, -100, 33017]], np.int32),
        np.array([[0, 1, 65535]], np.uint16),
        np.array([[0, 1, 24005123]], np.uint32),
    ],
    ids=lambda values: values.dtype.name,
)
def test_numbers_of_a_tiff_are_those_that_tifffile_wrote(values, tmp_path):
    for photometric in ("minisblack", "miniswhite") if values.dtype in (bool, np.uint8) else ("minisblack",):
        tifffile.imwrite(tmp_path / "x.tif", values, photometric=photometric)
        assert read_label_file(tmp_path / "x.tif", "x").values.tolist() == values.tolist()


def test_a_negative_void_number_is_read(tmp_path):
    def save(values: Any, path: Path) -> None:
        tifffile.imwrite(path.with_suffix(".tif"), np.asarray(values, np.int16)[None])

    write_labels(tmp_path, [0, 1, -100], save=save)
    assert meaning(tmp_path, ignore_index=-100) == (["0", "1", None], ("0", "1"))
    with pytest.raises(DataError, match=r"a number below 0 is no class.*-100.*Give --ignore-index -100"):
        meaning(tmp_path)


@pytest.mark.parametrize("most", [1, 2, 20, 254, 255, 300, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_numbers_of_a_pgm_do_not_depend_on_its_largest(most, plain, tmp_path):
    values = sorted({0, 1, most // 2, most})
    header = f"P{2 if plain else 5} {len(values)} 1 {most}\n".encode()
    body = " ".join(map(str, values)).encode() if plain else np.array(values, ">u2" if most > 255 else "u1").tobytes()
    (tmp_path / "x.pgm").write_bytes(header + body)
    assert read_label_file(tmp_path / "x.pgm", "x").values.tolist() == [values]


def test_files_that_shrinking_renumbered_keep_their_greys(tmp_path):
    palette_image([0, 1, 2, 3], [(0,) * 3, (1,) * 3, (2,) * 3, (255,) * 3]).save(tmp_path / "x.png")
    assert read_label_file(tmp_path / "x.png", "x").values.tolist() == [[0, 1, 2, 255]]


def test_what_labels_cannot_be_is_refused(tmp_path):
    grey = Image.fromarray(np.array([[0, 1]], np.uint8))
    grey.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    grey.save(tmp_path / "alpha.png")
    Image.fromarray(np.zeros((1, 2), np.float32)).save(tmp_path / "float.tif")
    grey.convert("L").save(tmp_path / "pages.tif", save_all=True, append_images=[grey.convert("L")])
    (tmp_path / "rgb16.png").write_bytes(rgb_png16(300))
    grey.convert("L").save(tmp_path / "lossy.jpg")
    for name, message in (
        ("rgb16.png", "several channels of 16 bits"),
        ("lossy.png", r"no such label file; lossy\.jpg is none"),
        ("alpha.png", r"alpha channel from 0 to 255.*--ignore-index"),
        ("float.tif", r"one number per pixel.*this one is F, with 1 channel"),
        ("pages.tif", "one page; this one has 2"),
    ):
        with pytest.raises(DataError, match=f"{re.escape(name)}: .*{message}"):
            read_label_file(tmp_path / name, name)


def rgb_png16(level: int) -> bytes:
    """A png of one pixel with three channels of 16 bits, which Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, row = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0), b"\0" + struct.pack(">HHH", *[level] * 3)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_colours_and_numbers_are_told_apart():
    assert spell(COLOUR + 128 * 65536 + 5) == "(128, 0, 5)"
    code = LabelCode(("a", "b"), {0: 0, 1: 1, 255: VOID, COLOUR: 0, COLOUR + 1: VOID}, (COLOUR,))
    assert code.allowed == "0..1, (0, 0, 0), and 255, (0, 0, 1) for void"


def test_no_readable_label_says_why(tmp_path):
    write_labels(tmp_path, [0, 1], save=lambda values, path: path.write_bytes(b"no image"))
    with pytest.raises(DataError, match=r"labels/train/0\.png: cannot be read as labels.*known pixels.*names of their"):
        meaning(tmp_path)
