"""Listing of folders by one rule for every reader, lists in text files, names, and writing."""

import os
import re
import socket
from pathlib import Path

import pytest

from featsharp.data import open_source
from featsharp.errors import DataError, FeatSharpError
from featsharp.evaluation.layouts.boundaries import find_pictures
from featsharp.evaluation.layouts.objects import open_labels
from featsharp.evaluation.layouts.pairs import list_pairs
from featsharp.evaluation.layouts.segmentation import open_segmentation
from featsharp.files import (
    NAME_BYTES,
    check_writable,
    fit_name,
    is_hidden,
    list_files,
    path_in_list,
    read_lines,
    replacing,
    write_file,
)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


# Copies and leftovers of systems and programs, below a folder of data.
COPIES = (
    ".ipynb_checkpoints/{}-checkpoint{}",
    ".thumbnails/{}{}",
    "__MACOSX/._{}{}",
    "__MACOSX/{}{}",
    "._{}{}",
    ".{}{}.swp{}",
    "@eaDir/{}{}/SYNOPHOTO_THUMB_XL{}",
    "$RECYCLE.BIN/{}{}",
)


def add_copies(folder: Path, stem: str, suffix: str) -> None:
    touch(folder, *(copy.format(*(stem, suffix, suffix)[: copy.count("{}")]) for copy in COPIES))


# The rule


def test_files_are_relative_sorted_and_not_hidden(tmp_path):
    names = [
        "Z.png",
        "a-b/x.png",
        "a/b.png",
        "a/deep/er/c.txt",
        "no suffix",
        " lead",
        "trail ",
        "new\nline",
        "-x",
        "e.",
    ]
    touch(tmp_path, *names)
    add_copies(tmp_path, "Z", ".png")
    add_copies(tmp_path / "a", "b", ".png")
    assert list_files(tmp_path) == sorted(names)
    assert list_files(tmp_path, deep=False) == sorted(name for name in names if "/" not in name)
    assert list_files(tmp_path, exclude=tmp_path / "a/../a/deep") == sorted({*names} - {"a/deep/er/c.txt"})


def test_a_root_may_be_hidden(tmp_path):
    root = touch(tmp_path / ".cache/__MACOSX", "a.png", ".b/c.png")
    assert list_files(root) == ["a.png"]
    assert list_files(os.path.relpath(root)) == ["a.png"]


@pytest.mark.parametrize(
    ("name", "hidden"),
    [("a/b.c", False), ("../a", False), ("./a", False), ("a/.b/c", True), ("__MACOSX/a", True), ("a__MACOSX/b", False)],
)
def test_hidden_names(name, hidden):
    assert is_hidden(name) is hidden


def test_links_are_followed_and_loops_end(tmp_path):
    root = touch(tmp_path / "root", "a.png", "z/b.png")
    touch(tmp_path / "store", "c.png", "deep/d.png")
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "file.png").symlink_to(tmp_path / "store/c.png")
    (root / "up").symlink_to("..")
    (root / "z/loop").symlink_to(root)
    (root / "y").symlink_to(root / "z")  # before z in the order
    (root / "self").symlink_to("self")
    (root / "nowhere.png").symlink_to(tmp_path / "gone.png")
    # What "up" leads to beside the root itself: the store was seen by then.
    assert list_files(root) == [
        *("a.png", "file.png", "linked/c.png", "linked/deep/d.png", "nowhere.png", "self", "y/b.png")
    ]


def test_many_links_to_each_other_do_not_multiply(tmp_path):
    """Each of 16 folders has links to the next one: 65,536 ways to the last."""
    for number in range(17):
        touch(tmp_path / f"d{number}", "x.png")
    for number in range(16):
        for link in ("a", "b"):
            (tmp_path / f"d{number}" / link).symlink_to(tmp_path / f"d{number + 1}")
    assert len(list_files(tmp_path / "d0")) == 17


def test_what_is_no_file_is_named_and_never_opened(tmp_path, caplog):
    touch(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "null.png").symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "s.png"))
        problems: list[tuple[str, str]] = []
        assert list_files(tmp_path, problems) == ["a.png"]
    assert sorted(problems) == [
        (f"{tmp_path}/{name}", "link or special file") for name in ("null.png", "pipe.png", "s.png")
    ]
    list_files(tmp_path)
    assert len(caplog.messages) == 3


def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    touch(tmp_path, "a.png")
    problems: list[tuple[str, str]] = []
    assert list_files(tmp_path / "gone", problems) == []
    assert problems == [(f"{tmp_path}/gone", "cannot be listed (No such file or directory)")]


# Every reader


@pytest.fixture
def rule(tmp_path):
    """Make a data set: copies are added to each of its folders, which are then moved away and linked."""

    def apply(root: Path, folders: dict[str, tuple[str, str]]) -> Path:
        for number, (folder, (stem, suffix)) in enumerate(folders.items()):
            add_copies(root / folder, stem, suffix)
            (root / folder).rename(tmp_path / f"elsewhere-{number}")
            (root / folder).symlink_to(tmp_path / f"elsewhere-{number}")
            (root / folder / "loop").symlink_to(root)
        return root

    return apply


@pytest.mark.parametrize(
    ("layout", "images", "labels", "endings"),
    [
        ("folder", "images/{}", "labels/{}", ("", "")),
        ("folder", "{}/images", "{}/labels", ("", "")),
        ("ade20k", "images/{}", "annotations/{}", ("", "")),
        ("camvid", "{}", "{}annot", ("", "")),
        ("coco-stuff", "images/{}", "annotations/{}", ("", "")),
        ("cityscapes", "leftImg8bit/{}/city", "gtFine/{}/city", ("_leftImg8bit", "_gtFine_labelTrainIds")),
    ],
)
def test_segmentation(layout, images, labels, endings, rule, tmp_path):
    splits = {"ade20k": ("training", "validation"), "coco-stuff": ("train2017", "val2017")}.get(
        layout, ("train", "val")
    )
    folders = {}
    for split in splits:
        for folder, ending in zip((images.format(split), labels.format(split)), endings, strict=True):
            touch(tmp_path / "data" / folder, f"a{ending}.png")
            folders[folder] = (f"b{ending}", ".png")
    root = rule(tmp_path / "data", folders)
    touch(tmp_path / "data" / labels.format(splits[0]) / ".ipynb_checkpoints", "a_gtFine_labelIds.png")
    if layout == "folder":
        (root / "classes.txt").write_text("one\ntwo\n")
    data = open_segmentation(root, layout)
    for pairs, split in ((data.train, splits[0]), (data.val, splits[1])):
        # The loop leads back to the root, whose folders were not seen from here: those of the other names are no pairs.
        names = {pair.image: pair.label for pair in pairs if "loop" not in pair.image}
        assert names == {f"{images.format(split)}/a{endings[0]}.png": f"{labels.format(split)}/a{endings[1]}.png"}


def test_boundaries(rule, tmp_path):
    for split in ("test", "train"):
        touch(tmp_path / f"data/images/{split}", "a.jpg")
        touch(tmp_path / f"data/groundTruth/{split}", "a.mat")
    (root := tmp_path / "data")
    rule(root, {"images/test": ("b", ".jpg"), "groundTruth/test": ("a", ".mat")})
    (picture,) = find_pictures(root, "test")
    assert picture == (root / "images/test/a.jpg", (root / "groundTruth/test/a.mat",))
    touch(tmp_path / "by-split/.hidden/images", "a.jpg")
    touch(tmp_path / "by-split/val/images", "a.jpg")
    touch(tmp_path / "by-split/val/groundTruth", "a.MAT")
    (picture,) = find_pictures(tmp_path / "by-split", None)
    assert [path.name for path in picture.truths] == ["a.MAT"]


def test_keypoint_pairs(rule, tmp_path):
    root = tmp_path / "data"
    for name in ("a.png", "a.mat", "b.png", "b.mat"):
        touch(root / "cars", name)
    rule(root, {"cars": ("c", ".png")})
    touch(root / "cars/.ipynb_checkpoints", "d.png", "d.mat")
    assert sorted(entry.name for entry in list_pairs(root)) == ["a-b:cars", "b-a:cars"]
    touch(tmp_path / "spair/PairAnnotation/test", "1-a-b:cat.json", "._1-a-b:cat.json")
    assert [entry.name for entry in list_pairs(tmp_path / "spair")] == ["1-a-b:cat"]


def test_objects(tmp_path):
    touch(tmp_path / "labels", "._a.txt")
    with pytest.raises(DataError, match="holds no objects"):
        open_labels(tmp_path / "labels")
    touch(tmp_path / "labels", "a.txt")
    assert open_labels(tmp_path / "labels").knows("x/a.jpg")


def test_training(rule, tmp_path):
    touch(tmp_path / "photos/sub", "a.jpg")
    rule(tmp_path / "photos", {"sub": ("b", ".jpg")})
    source = open_source(tmp_path / "photos")
    assert [source.name(index) for index in range(len(source))] == ["sub/a.jpg"]


def test_a_tar_that_is_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="neither a folder nor a"):
        open_source(tmp_path / "a.tar")


# Lists


@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_any_system(code, end, tmp_path):
    (tmp_path / "list.txt").write_bytes(end.join(["one", "  zwei ", "", "drei é"]).encode(code))
    assert read_lines(tmp_path / "list.txt") == ["one", "zwei", "", "drei é"]


def test_bytes_in_lists_are_those_of_names(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9\n")
    assert [os.fsencode(line) for line in read_lines(tmp_path / "list.txt")] == [b"caf\xe9"]
    with pytest.raises(DataError, match="cannot be read as a list"):
        read_lines(tmp_path / "gone.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(DataError, match="cannot be read as a list"):
        read_lines(tmp_path / "list.txt")


@pytest.mark.parametrize("text", ["cats/a.b.jpg", "cats\\a.b.jpg", "C:\\data\\cats\\a.b.jpg", "/x/cats/a.b.jpg"])
def test_paths_in_lists(text):
    path = path_in_list(text)
    assert (path.parent.name, path.name, path.stem) == ("cats", "a.b.jpg", "a.b")


# Names and writing


@pytest.mark.parametrize("name", ["a" * 300, "日" * 100, os.fsdecode(b"\xe9" * 255), "a" * 255])
def test_long_names_are_cut_and_stay_apart(name, tmp_path):
    first, second = (fit_name(one, ".safetensors") for one in (name, f"{name[:-1]}b"))
    assert first != second
    for fitted in (first, second):
        assert fitted.endswith(".safetensors")
        assert NAME_BYTES - 3 < len(os.fsencode(fitted)) <= NAME_BYTES  # a character may have three bytes
        (tmp_path / fitted).touch()
    assert fit_name("photo", ".png") == "photo.png"
    assert fit_name("a" * 243, ".safetensors") == f"{'a' * 243}.safetensors"


@pytest.mark.parametrize("name", ["a" * 255, "日" * 85, " ", "a\nb", "-", "trailing.", os.fsdecode(b"\xff\xfe")])
def test_any_name_that_the_system_has_is_written(name, tmp_path):
    write_file(tmp_path / name, b"1")
    write_file(tmp_path / name, b"2")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"2"


def test_a_name_that_cannot_be_is_the_fault_of_one_file(tmp_path):
    (tmp_path / "folder").mkdir()
    touch(tmp_path, "file")
    for path in (tmp_path / ("a" * 256), tmp_path / "folder", tmp_path / "file/a"):
        with pytest.raises(DataError, match="cannot write"):
            write_file(path, b"x")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_a_full_disk_is_the_fault_of_no_file():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    from featsharp.files import cannot_write

    assert type(cannot_write(Path("a"), caught.value)) is FeatSharpError


def test_what_is_no_file_is_written_to_and_never_replaced(tmp_path):
    """As root, or in a container, /dev/null would become a file."""
    pipe, link = tmp_path / "pipe", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        write_file(path, b"result")
        assert os.read(reader, 100) == b"result"
        os.close(reader)
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_whether_a_folder_can_be_written_to_is_known_before(tmp_path):
    touch(tmp_path, "file")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (
        tmp_path / "file",
        tmp_path / "file/below",
        tmp_path / "link",
        Path("/proc/new"),
        tmp_path / ("a" * 256),
    ):
        with pytest.raises(FeatSharpError, match=rf"cannot write {re.escape(str(folder))}: "):
            check_writable(folder)
    check_writable(tmp_path / "new/deep")
    check_writable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_what_another_process_made_meanwhile_stays(tmp_path):
    with replacing(tmp_path / "new/a.txt") as file:
        file.write(b"x")
        check_writable(tmp_path / "new/deep")
    assert (tmp_path / "new/a.txt").read_bytes() == b"x"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_and_devices_are_no_pictures(make, tmp_path):
    from featsharp.data import decode_image

    make(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: a pipe or a device"):
        decode_image(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"x\.png: no such file"):
        decode_image("C:\\photos\\x.png")
