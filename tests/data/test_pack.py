"""Packing keeps every byte of every readable image, reports the rest, and never leaves half a shard."""

import io
import resource
import tarfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featsharp.data import PackReport, open_source, pack_images
from featsharp.errors import ConfigError, DataError


def encoded(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Seven images in nested folders, among them names that collide once separators and dots are replaced."""
    root = tmp_path / "images"
    names = [
        "a/b.png",
        "a_b.png",
        "a/b.v2.png",
        "a.b/c.JPG",
        "deep/er/gr\u00fc\u00dfe.jpeg",
        "x y.png",
        "long" * 50 + ".png",
    ]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(number, "PNG" if name.endswith("png") else "JPEG"))
    (root / "notes.txt").write_text("not an image")
    return root


def contents(root: Path) -> list[bytes]:
    source = open_source(root)
    assert source.problems == []
    return [source.read(index) for index in range(len(source))]


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(images: Path, tmp_path: Path) -> None:
    report = pack_images(images, tmp_path / "new/out", images_per_shard=3)
    assert report == PackReport(written=7, shards=3, skipped=[], problems=[])
    assert files(tmp_path / "new/out") == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert contents(tmp_path / "new/out") == contents(images)


def test_member_names(images: Path, tmp_path: Path) -> None:
    pack_images(str(images), str(tmp_path / "out"))
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        names = tar.getnames()
    assert names == [
        "000000000_a_b_c.jpg",
        "000000001_a_b.png",
        "000000002_a_b_v2.png",
        "000000003_a_b.png",
        "000000004_deep_er_gr_e.jpeg",
        f"000000005_{'long' * 20}.png",
        "000000006_x_y.png",
    ]


def test_webdataset_reads_the_shards(images: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    pack_images(images, tmp_path / "out", images_per_shard=2)
    shards = [str(path) for path in sorted((tmp_path / "out").iterdir())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert len(samples) == 7
    found = []
    for sample in samples:
        kinds = [key for key in sample if not key.startswith("__")]
        assert len(kinds) == 1, "each image is a sample of its own"
        assert kinds[0] in ("png", "jpg", "jpeg")
        found.append(sample[kinds[0]])
    assert found == contents(images)


def test_shards_written_by_webdataset_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for number in range(4):
            writer.write({"__key__": f"s/{number:04d}", "png": encoded(number), "json": {"id": number}, "cls": number})
    assert contents(tmp_path) == [encoded(number) for number in range(4)]


def test_same_input_same_bytes(images: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        pack_images(images, tmp_path / name)
    assert (tmp_path / "one/shard-000000.tar").read_bytes() == (tmp_path / "two/shard-000000.tar").read_bytes()


def test_corrupt_images_are_skipped_and_reported(images: Path, tmp_path: Path) -> None:
    good = contents(images)
    (images / "a/cut.png").write_bytes(encoded(3)[:100])
    (images / "zero.jpg").touch()
    (images / "gone.jpg").symlink_to(tmp_path / "absent")
    report = pack_images(images, tmp_path / "out", images_per_shard=4)
    assert (report.written, report.shards) == (7, 2)
    assert [name for name, _ in report.skipped] == ["a/cut.png", "gone.jpg", "zero.jpg"]
    assert [reason.split(" (")[0] for _, reason in report.skipped] == [
        "cannot be decoded",
        "cannot be read",
        "the file is empty",
    ]
    assert contents(tmp_path / "out") == good


def test_shards_can_be_packed_again_and_their_damage_is_reported(images: Path, tmp_path: Path) -> None:
    pack_images(images, tmp_path / "one", images_per_shard=7)
    shard = tmp_path / "one/shard-000000.tar"
    with tarfile.open(shard) as tar:
        cut = tar.getmembers()[5].offset_data + 10
    expected = contents(tmp_path / "one")[:5]
    shard.write_bytes(shard.read_bytes()[:cut])
    report = pack_images(tmp_path / "one", tmp_path / "two", images_per_shard=2)
    assert (report.written, report.shards) == (5, 3)
    assert len(report.problems) == 1
    assert "cut short" in report.problems[0]
    assert contents(tmp_path / "two") == expected


def test_no_usable_image_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match="in: no images found"):
        pack_images(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/x.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"in: none of 1 images can be decoded; x\.png: not an image"):
        pack_images(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_earlier_shards_are_an_error_unless_overwritten(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_images(images, out, images_per_shard=2)
    (out / "README.md").write_text("kept")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match="out: already holds 4 tar files; name another folder or overwrite"):
        pack_images(images, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (images / "a/b.png").unlink()
    assert pack_images(images, out, images_per_shard=4, overwrite=True).shards == 2
    assert files(out) == ["README.md", "shard-000000.tar", "shard-000001.tar"]
    assert contents(out) == contents(images)


def test_failure_before_the_first_shard_keeps_the_earlier_ones(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_images(images, out)
    before = contents(out)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="none of 1"):
        pack_images(tmp_path / "bad", out, overwrite=True)
    assert contents(out) == before


def test_output_folders_that_cannot_serve(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the output folder is the image folder itself"):
        pack_images(images, images / "../images")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="exists and is not a folder"):
        pack_images(images, tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.tar").touch()
    with pytest.raises(DataError, match=r"holds mine\.tar, a tar file that packing did not write"):
        pack_images(images, tmp_path / "other", overwrite=True)
    with pytest.raises(ConfigError, match="images_per_shard is 0"):
        pack_images(images, tmp_path / "out", images_per_shard=0)


def test_a_shard_is_not_packed_onto_itself(images: Path, tmp_path: Path) -> None:
    pack_images(images, tmp_path / "out")
    with pytest.raises(DataError, match="would be overwritten"):
        pack_images(tmp_path / "out/shard-000000.tar", tmp_path / "out", overwrite=True)


def test_output_inside_the_image_folder_is_not_packed_again(images: Path) -> None:
    expected = contents(images)
    for overwrite in (False, True):
        assert pack_images(images, images / "shards", overwrite=overwrite).written == 7
        assert contents(images / "shards") == expected


def test_a_full_disk_leaves_no_half_shard(images: Path, tmp_path: Path) -> None:
    for number in range(40):
        (images / f"z{number:02d}.png").write_bytes(encoded(number))
    (images / "z00.png").write_bytes(encoded(0) + b"\0" * 60_000)  # makes the shard that holds it too large
    with (
        largest_file(40_000),
        pytest.raises(DataError, match=r"shard-000001\.tar: cannot be written \(File too large\)"),
    ):
        pack_images(images, tmp_path / "out", images_per_shard=7)
    assert files(tmp_path / "out") == ["shard-000000.tar"]
    assert len(contents(tmp_path / "out")) == 7


def test_an_interrupt_leaves_no_half_shard(images: Path, tmp_path: Path) -> None:
    from featsharp.data.pack import _write_shard

    def members() -> Iterator[tuple[str, bytes]]:
        yield "a.png", encoded(0)
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    with pytest.raises(KeyboardInterrupt):
        _write_shard(tmp_path / "out/shard-000000.tar", members(), 0)
    assert files(tmp_path / "out") == []
