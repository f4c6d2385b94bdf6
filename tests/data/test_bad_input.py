"""Every kind of bad input is passed over, counted by its kind, and touches nothing but the archive it lies in."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from featsharp.data._tar import stream_tar
from featsharp.data.mixture import ImageMixture
from featsharp.data.skips import SkipLog, count_kinds
from featsharp.data.sources import open_source
from featsharp.data.streams import ShardStream
from featsharp.errors import ConfigError, DataError


def picture(number: int = 0, side: int = 16) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def uniform() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A few bytes that claim to be 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class Trap:
    """Makes a folder called ``trace`` in the working directory when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("trace",)


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.devmajor, info.devminor = kind, target, 1, 3
    return info


def damaged(at: int, length: int = 300) -> bytes:
    """A tar of two images with other bytes from ``at`` on."""
    whole = bytearray(tar_of(("first.png", picture(1)), ("second.png", picture(2))))
    whole[at : at + length] = b"\xa5" * length
    return bytes(whole)


class Case(NamedTuple):
    tar: bytes
    kinds: dict[str, int]
    good: int = 0  # images in the tar that are of use all the same


# Two headers and the contents between them: the first image takes 512 + 1024 bytes.
SECOND = 512 + -(-len(picture(1)) // 512) * 512
TWO = tar_of(("first.png", picture(1)), ("second.png", picture(2)))
TRAP = pickle.dumps(Trap())
CASES = {
    "corrupt tar": Case(b"no tar at all" * 200, {"not readable as a tar file": 1}),
    "empty tar": Case(b"", {"not readable as a tar file": 1}),
    "corrupt header": Case(damaged(SECOND), {"damaged header": 1}, good=1),
    "truncated in a member": Case(TWO[: SECOND + 512 + 100], {"cut short": 1}, good=1),
    "truncated in a header": Case(TWO[: SECOND + 100], {"cut short": 1}, good=1),
    "truncated between members": Case(TWO[:SECOND], {"no end-of-archive mark": 1}, good=1),
    "truncated image": Case(tar_of(("x.png", picture()[:300])), {"cannot be decoded": 1}),
    "damaged image": Case(tar_of(("x.png", picture()[:60] + bytes(900))), {"cannot be decoded": 1}),
    "wrong extension": Case(
        tar_of(("x.jpg", b"some text"), ("y.png", b"%PDF-1.7")), {"not an image that can be read": 2}
    ),
    "image by content, not by extension": Case(tar_of(("really-a-png.jpg", picture(4))), {}, good=1),
    "zero bytes": Case(tar_of(("x.jpg", b""), ("y.png", b"")), {"the file is empty": 2}),
    "decompression bomb": Case(tar_of(("x.png", bomb())), {"too many pixels": 1}),
    "other members": Case(
        tar_of(("0.json", b"{}"), ("0.cls", b"3"), ("0.txt", b"a cat"), ("Makefile", b"")), {"no image by name": 4}
    ),
    "hidden members": Case(tar_of(("._x.png", picture()), (".cache/x.png", picture())), {"no image by name": 2}),
    "pickles": Case(
        tar_of(*((f"0.{end}", TRAP) for end in ("pyd", "pickle", "pkl", "pth", "pt", "npy"))), {"no image by name": 6}
    ),
    "pickles that pretend": Case(tar_of(("x.png", TRAP)), {"not an image that can be read": 1}),
    "relative path tricks": Case(
        tar_of(("../x.png", picture()), ("a/../../x.png", picture()), ("..\\x.png", picture())),
        {"path that leads outside the tar": 3},
    ),
    "absolute paths": Case(
        tar_of(("/tmp/x.png", picture()), ("C:\\x.png", picture()), ("\\\\host\\x.png", picture())),
        {"path that leads outside the tar": 3},
    ),
    "links": Case(
        tar_of(special("x.png", tarfile.SYMTYPE, "/etc/passwd"), special("y.png", tarfile.LNKTYPE, "../../x.png")),
        {"link or special file": 2},
    ),
    "devices": Case(
        tar_of(
            special("null.png", tarfile.CHRTYPE),
            special("disk", tarfile.BLKTYPE),
            special("fifo.png", tarfile.FIFOTYPE),
        ),
        {"link or special file": 3},
    ),
    "folders": Case(tar_of(special("folder.png", tarfile.DIRTYPE)), {}),
    "uniform images": Case(tar_of(("x.png", uniform())), {"uniform colour": 1}),
    "small images": Case(tar_of(("x.png", picture(side=7))), {"too small": 1}),
}


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one good shard of three images; the working directory is beside it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "good.tar").write_bytes(tar_of(*((f"{number}.png", picture(10 + number)) for number in range(3))))
    monkeypatch.chdir(tmp_path)
    return folder


def account_of(mixture: ImageMixture, count: int) -> tuple[set[str], dict[str, int]]:
    """Names of the images that were used, and what the log of a run counts, whatever was met again left out."""
    log = SkipLog()
    skipped = dict.fromkeys(mixture.skipped)
    used = set()
    for n in range(count):
        loaded = mixture.load(n)
        used.add(Path(loaded.name).name)
        skipped |= dict.fromkeys(loaded.skipped)
    log.add(list(skipped))
    for kind, number in log.kinds.items():
        assert f"{number} " in log.summary()
        assert kind in log.summary()
    return used, dict(log.kinds)


@pytest.mark.parametrize("how", ["folder", pytest.param("stream", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bad_input_is_passed_over_and_counted_by_kind(case: Case, how: str, shards: Path) -> None:
    (shards / "bad.tar").write_bytes(case.tar)
    before = sorted(shards.parent.rglob("*"))
    mixture = ImageMixture.from_data_dir(str(shards) if how == "folder" else f"pipe:cat {shards}/{{good,bad}}.tar")
    used, kinds = account_of(mixture, 40)
    assert kinds == case.kinds
    assert used >= {"0.png", "1.png", "2.png"}
    assert len(used) == 3 + case.good
    assert sorted(shards.parent.rglob("*")) == before  # nothing was extracted, no pickle was opened


@pytest.mark.parametrize("how", ["folder", "stream"])
@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.good], ids=lambda case: None)
def test_a_source_without_a_valid_image_is_an_error_that_names_the_kinds(case: Case, how: str, shards: Path) -> None:
    """Also beside a good source, whose images would otherwise hide it."""
    bad = shards.parent / "bad"
    bad.mkdir()
    (bad / "x.tar").write_bytes(case.tar)
    path = str(bad) if how == "folder" else f"pipe:cat {bad}/x.tar"
    with pytest.raises(DataError) as caught:
        ImageMixture.from_data_dir([str(shards), [path, 0.01]])
    message = str(caught.value)
    assert message.startswith(f"{path}: no ")
    assert all(f"{count} {kind}" in message for kind, count in case.kinds.items())
    assert "\n" not in message


def test_plain_files_are_counted_like_members(tmp_path: Path) -> None:
    for name, data in {"ok.png": picture(), "cut.png": picture()[:100], "notes.txt": b"", "x.pth": TRAP}.items():
        (tmp_path / name).write_bytes(data)
    used, kinds = account_of(ImageMixture.from_data_dir(str(tmp_path)), 4)
    assert used == {"ok.png"}
    assert kinds == {"no image by name": 2, "cannot be decoded": 1}


def test_damage_is_a_line_in_the_log_when_a_source_is_opened(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    (shards / "cut.tar").write_bytes(TWO[: SECOND + 100])
    source = open_source(shards)
    assert source.problems[0].startswith(f"{shards}/cut.tar: cut short")
    assert source.problems[0] in caplog.messages


def test_kinds_are_told_from_their_details() -> None:
    reasons = [
        "cannot be decoded (OSError: x (y))",
        "cannot be decoded",
        "too many pixels; raise the limit",
        "7 others",
    ]
    assert count_kinds([("a", reason) for reason in reasons]) == {
        "cannot be decoded": 2,
        "too many pixels": 1,
        "others": 7,
    }
    assert list(count_kinds([("a", "x"), ("b", "y"), ("c", "y")])) == ["y", "x"]


def test_members_of_a_stream_cannot_claim_any_memory() -> None:
    tar = tar_of(("small.png", picture(10)), ("large.png", picture(side=64)), ("last.png", picture(10)))
    assert len(picture(10)) < 2000 < len(picture(side=64))
    members = list(stream_tar(io.BytesIO(tar), max_bytes=2000))
    assert [(member.name, member.reason) for member in members] == [
        ("small.png", ""),
        ("large.png", "larger than 0 MiB"),
        ("last.png", ""),
    ]
    assert members[1].data == b""


def hostile_header(kind: bytes, size: int) -> bytes:
    """One header of a type that tarfile does not know, with any size; base 256 can say negative ones."""
    info = tarfile.TarInfo("x.png")
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = kind
    header[124:136] = size.to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def plain_tar(numbers: range) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in numbers:
            data = picture(number)
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue().rstrip(b"\0") + b"\0" * 512


@pytest.mark.parametrize("size", [-512, -1024])
def test_a_member_of_negative_size_does_not_go_round_in_circles(tmp_path, size):
    start = plain_tar(range(2))
    start = start[: len(start) // 512 * 512]
    (tmp_path / "x.tar").write_bytes(start + hostile_header(b"Z", size) + b"\0" * 1024)
    source = open_source(tmp_path)
    assert len(source) == 2
    assert len(source.skipped) == 1


@pytest.mark.timeout(20)
def test_a_member_of_any_size_in_a_stream_is_not_skipped_part_by_part():
    start = plain_tar(range(2))
    info = tarfile.TarInfo("x.png")
    info.size = 1 << 62
    data = start[: len(start) // 512 * 512] + info.tobuf(tarfile.GNU_FORMAT)
    *intact, large, end = stream_tar(io.BytesIO(data))
    assert [member.reason for member in intact] == ["", ""]
    assert large.reason == "larger than 256 MiB"
    assert "this member and all after it are lost" in end.reason


def test_a_chain_of_headers_is_damage(tmp_path):
    (tmp_path / "0.png").write_bytes(picture())
    link = tarfile.TarInfo("././@LongLink")
    link.type, link.size = tarfile.GNUTYPE_LONGNAME, 2
    (tmp_path / "x.tar").write_bytes((link.tobuf(tarfile.GNU_FORMAT) + b"x".ljust(512, b"\0")) * 3000 + b"\0" * 1024)
    source = open_source(tmp_path)
    assert len(source) == 1
    assert len(source.skipped) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_in_a_folder_is_not_read(tmp_path):
    (tmp_path / "0.png").write_bytes(picture())
    os.mkfifo(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.tar")
    source = open_source(tmp_path)
    assert len(source) == 1
    assert count_kinds(source.skipped) == {"link or special file": 2}


# Archives that hold more than one thing


def tar_in(folder: Path, how: str) -> str:
    """The setting for a folder with the single shard bad.tar."""
    return str(folder) if how == "folder" else f"pipe:cat {folder}/bad.tar"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["folder", "stream"])
@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_extended_headers_cannot_claim_any_memory(tmp_path, how, kind):
    """tarfile reads them whole, whatever their size."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 26
    start = plain_tar(range(3))
    with open(tmp_path / "bad.tar", "wb") as file:
        file.write(start[: len(start) // 512 * 512].removesuffix(b"\0" * 512) + header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(1 << 27)
    tracemalloc.start()
    used, kinds = account_of(ImageMixture.from_data_dir(tar_in(tmp_path, how)), 6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24  # a quarter of the claim
    assert used == {"0.png", "1.png", "2.png"}
    assert kinds == {"not readable as a tar file": 1}


@pytest.mark.parametrize("how", ["folder", "stream"])
def test_joined_tars_are_read_to_their_end(tmp_path, how):
    """As GNU tar does with -i; each one but the last ends with a mark and with padding."""
    joined = [tar_of((f"{n}.png", picture(n))) for n in range(3)]
    (tmp_path / "bad.tar").write_bytes(b"".join(joined))
    used, kinds = account_of(ImageMixture.from_data_dir(tar_in(tmp_path, how)), 12)
    assert used == {"0.png", "1.png", "2.png"}
    assert kinds == {}
    (tmp_path / "bad.tar").write_bytes(b"".join(joined) + b"something else".ljust(512, b"!"))
    used, kinds = account_of(ImageMixture.from_data_dir(tar_in(tmp_path, how)), 12)
    assert used == {"0.png", "1.png", "2.png"}
    assert kinds == {"damaged header": 1}
    (tmp_path / "bad.tar").write_bytes(joined[0] + joined[1] + joined[2][:700])
    used, kinds = account_of(ImageMixture.from_data_dir(tar_in(tmp_path, how)), 12)
    assert used == {"0.png", "1.png"}
    assert kinds == {"cut short": 1}


def test_a_tar_that_ends_in_endless_zeros_is_read_no_further(tmp_path):
    with open(tmp_path / "bad.tar", "wb") as file:
        file.write(tar_of(("x.png", picture())))
        file.truncate(1 << 42)
    begin = time.process_time()
    source = open_source(tmp_path)
    assert time.process_time() - begin < 5
    assert (len(source), source.skipped) == (1, [])


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_compressed_tars_are_read_as_streams(tmp_path, mode):
    with tarfile.open(tmp_path / f"bad.tar.{mode}", f"w:{mode}") as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(picture(number))
            tar.addfile(info, io.BytesIO(picture(number)))
    used, kinds = account_of(ImageMixture.from_data_dir(f"pipe:cat {tmp_path}/bad.tar.{mode}"), 12)
    assert used == {"0.png", "1.png", "2.png"}
    assert kinds == {}
    whole = (tmp_path / f"bad.tar.{mode}").read_bytes()
    (tmp_path / "bad.tar").write_bytes(whole[: len(whole) // 2] + b"?" * 1000 + whole[len(whole) // 2 :])
    with pytest.raises(DataError, match="compressed tar files cannot be read at random"):
        open_source(tmp_path / "bad.tar")
    for _ in ShardStream(f"pipe:cat {tmp_path}/bad.tar").probe():  # whatever it finds
        pass


COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def images_of(folder: Path, data: bytes) -> tuple[set[str], dict[str, int]]:
    (folder / "bad.tar").write_bytes(data)
    return account_of(ImageMixture.from_data_dir(f"pipe:cat {folder}/bad.tar"), 12)


@pytest.mark.parametrize("mode", COMPRESSIONS)
def test_compressed_tars_that_were_joined_are_read_to_their_end(tmp_path, mode):
    tars = [tar_of((f"{n}.png", picture(n))) for n in range(3)]
    parts = [COMPRESSIONS[mode](tar) for tar in tars]
    everything = {"0.png", "1.png", "2.png"}
    assert images_of(tmp_path, b"".join(parts)) == (everything, {})
    assert images_of(tmp_path, (bytes(64)).join(parts) + bytes(64)) == (everything, {})
    # One tar in members of any sizes, as the parallel tools write it.
    whole = tar_of(*((f"{n}.png", picture(n)) for n in range(3)))
    members = [COMPRESSIONS[mode](whole[at : at + 700]) for at in range(0, len(whole), 700)]
    assert images_of(tmp_path, b"".join(members)) == (everything, {})


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPRESSIONS)
def test_damage_of_a_compressed_tar_is_counted(tmp_path, mode):
    parts = [COMPRESSIONS[mode](tar_of((f"{n}.png", picture(n)))) for n in range(3)]
    damage = {"not readable as a tar file": 1}
    assert images_of(tmp_path, b"".join(parts) + b"something else") == ({"0.png", "1.png", "2.png"}, damage)
    broken = bytearray(parts[1])
    broken[20:40] = b"\xa5" * 20
    assert images_of(tmp_path, parts[0] + broken + parts[2]) == ({"0.png"}, damage)
    assert images_of(tmp_path, parts[0] + parts[1][: len(parts[1]) // 2]) == ({"0.png"}, {"cut short": 1})
    (tmp_path / "good.tar").write_bytes(tar_of(("good.png", picture(7))))
    for bad in (parts[0][:100], bytes(broken)):
        (tmp_path / "bad.tar").write_bytes(bad)
        used, kinds = account_of(ImageMixture.from_data_dir(f"pipe:cat {tmp_path}/{{good,bad}}.tar"), 4)
        assert used == {"good.png"}
        assert kinds == damage


class _Lossy(io.RawIOBase):
    """A connection that is lost after some bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def read(self, size: int = -1) -> bytes:
        if not (data := self.data.read(size)):
            raise ConnectionResetError("lost")
        return data


@pytest.mark.parametrize("mode", ["plain", *COMPRESSIONS])
def test_a_lost_connection_is_no_damage(mode):
    """It is tried again, even where the errors of damaged data are of the same class."""
    whole = tar_of(*((f"{n}.png", picture(n, side=64)) for n in range(3)))
    whole = COMPRESSIONS.get(mode, bytes)(whole)
    with pytest.raises(ConnectionResetError):
        list(stream_tar(_Lossy(whole[: len(whole) // 2])))


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPRESSIONS)
def test_a_compressed_stream_takes_bounded_memory(mode):
    """Of 64 MiB of zeros in few bytes, and of all of them before the first image."""
    big = tarfile.TarInfo("big.txt")
    big.size = 1 << 26
    data = COMPRESSIONS[mode](big.tobuf() + bytes(big.size) + tar_of(("x.png", picture())))
    tracemalloc.start()
    members = list(stream_tar(io.BytesIO(data)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [member.name for member in members if member.data] == ["x.png"]
    assert peak < 1 << 24  # xz keeps 8 MiB by itself


def test_other_compression_is_an_error_that_says_what_to_do(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(2000))
    with pytest.raises(DataError, match=r"no usable image found \(1 not readable as a tar file\);.* \| zstd -dc"):
        ImageMixture.from_data_dir(f"pipe:cat {tmp_path}/x.tar")
    with pytest.raises(DataError, match=r"9\}\.tar\.zst\?token=\*\*\*: .* write pipe:curl -sf URL \| zstd -dc"):
        ImageMixture.from_data_dir("https://host/{0..9}.tar.zst?token=x")
    (tmp_path / "x.tar").rename(tmp_path / "x.tar.zst")
    with pytest.raises(DataError, match=r"cannot be read at random; .*'pipe:zstd -dc .*/x\.tar\.zst'"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("s3://bucket/{0..9}.tar", r"write pipe:aws s3 cp s3://bucket/\{0\.\.9\}\.tar -$"),
        ("gs://bucket/x.tar", r"write pipe:gsutil cat gs://bucket/x\.tar$"),
        ("hdfs://host/x.tar", "write pipe:COMMAND with a command that writes it$"),
        ("file:///data/x.tar", "write the path alone$"),
    ],
)
def test_addresses_of_other_stores_name_the_command_that_reads_them(path, advice):
    with pytest.raises(ConfigError, match=advice):
        ImageMixture.from_data_dir([[path, 3]])
