"""Checkpoint files: nothing is lost when writing fails, nothing runs when reading, every damage is one clear line."""

import os
import pickle
import resource
import stat
import zipfile
from contextlib import contextmanager

import pytest
import torch

from featsharp.checkpoint import VERSION, read_checkpoint, read_step, write_checkpoint
from featsharp.errors import CheckpointError, first_line
from featsharp.files import remove_leftovers

CONTENT = {
    "encoder": {"recipe": {"upsampler": "featup", "factor": 2, "options": {"inputs": ["jbu"]}}},
    "model": {"weight": torch.arange(2000.0)},
    "config": None,
    "training": {"step": 7, "rng": torch.get_rng_state()},
}


@contextmanager
def full_disk(size: int):
    """No file may grow beyond ``size`` bytes; the write that would fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "folder" / "last.pth"
    write_checkpoint(path, CONTENT)
    content = read_checkpoint(str(path))
    assert content["format"] == "featsharp"
    assert content["version"] == VERSION
    assert content["encoder"] == CONTENT["encoder"]
    assert torch.equal(content["model"]["weight"], CONTENT["model"]["weight"])
    assert content["training"]["step"] == 7
    assert os.listdir(path.parent) == ["last.pth"]


def test_an_existing_file_is_replaced(tmp_path):
    path = tmp_path / "last.pth"
    for step in (1, 2):
        write_checkpoint(path, CONTENT | {"training": {"step": step}})
    assert read_checkpoint(path)["training"]["step"] == 2


def test_links_and_permissions_stay(tmp_path):
    """A link to a larger disk, a file that a group may write."""
    target, link = tmp_path / "disk" / "last.pth", tmp_path / "last.pth"
    link.symlink_to(target)
    write_checkpoint(link, CONTENT)
    target.chmod(0o664)
    write_checkpoint(link, CONTENT | {"training": {"step": 8}})
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o664
    assert read_checkpoint(target)["training"]["step"] == 8
    assert os.listdir(target.parent) == ["last.pth"]


@pytest.mark.parametrize("size", [0, 500, 4000])
def test_a_full_disk_costs_nothing_that_was_there(tmp_path, size):
    path = tmp_path / "last.pth"
    write_checkpoint(path, {"model": {"weight": torch.ones(3)}})
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*last\.pth.* unchanged; free some space"):  # noqa: SIM117
        with full_disk(size):
            write_checkpoint(path, CONTENT)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pth"]


def test_what_reads_otherwise_than_it_was_written_never_replaces_the_earlier_file(tmp_path, monkeypatch):
    """A failing disk, played by a write that loses a byte between the file system and the disk."""
    path = tmp_path / "last.pth"
    write_checkpoint(path, {"model": {"weight": torch.ones(3)}})
    before = path.read_bytes()
    sync = os.fsync

    def lossy(number: int) -> None:
        sync(number)
        os.pwrite(number, b"\xff", 700)

    monkeypatch.setattr(os, "fsync", lossy)
    with pytest.raises(CheckpointError, match=r"read back differs.*earlier file of that name is unchanged"):
        write_checkpoint(path, CONTENT)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.pth"]


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path):
    for name in (".last.pth.17.tmp", ".best.pth.18.tmp", "last.pth", ".hidden", "a.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".last.pth.17.tmp", (0, 0))
    remove_leftovers(tmp_path, older_than=3600)
    assert sorted(os.listdir(tmp_path)) == [".best.pth.18.tmp", ".hidden", "a.tmp", "last.pth"]
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".hidden", "a.tmp", "last.pth"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        write_checkpoint(tmp_path / "file" / "last.pth", CONTENT)


def test_what_fails_to_be_written_leaves_no_trace(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(tmp_path / "last.pth", {"model": lambda: None})
    assert os.listdir(tmp_path) == []


def test_a_missing_file_names_its_neighbours(tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pth does not exist$"):
        read_checkpoint(tmp_path / "last.pth")
    (tmp_path / "best.pth").touch()
    with pytest.raises(CheckpointError, match=r"last\.pth does not exist; that folder has best\.pth"):
        read_checkpoint(tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "last.pth"
    write_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    for length in [0, 1, 3, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint .*last\.pth") as caught:
            read_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_damaged_bytes_give_our_error_or_none(tmp_path):
    path = tmp_path / "last.pth"
    write_checkpoint(path, CONTENT)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(4)
    for _ in range(150):
        start = int(torch.randint(len(whole), (), generator=generator))
        path.write_bytes(whole[:start] + os.urandom(3) + whole[start + 3 :])
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("pickled", [b"\x80\x02u.", b"\x80\x02]K\x01s.", b"\x80\x02h\x07."])
def test_instructions_that_meet_nothing_are_damage(tmp_path, pickled):
    """What a damaged pickle raises is of any kind: IndexError, KeyError, TypeError."""
    write_checkpoint(tmp_path / "whole.pth", CONTENT)
    path = tmp_path / "last.pth"
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(path, "w") as damaged:
        for name in whole.namelist():
            damaged.writestr(name, pickled if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(CheckpointError, match=r"checkpoint .*last\.pth"):
        read_checkpoint(path)


class Malicious:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))])
def test_a_pickle_that_runs_code_is_refused(tmp_path, write):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    write({"format": "featsharp", "version": 1, "model": Malicious(trace)}, path)
    with pytest.raises(CheckpointError, match="could run code; it was not loaded"):
        read_checkpoint(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"format": "other", "version": 1}])
def test_files_of_another_kind(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth is not a featsharp checkpoint"):
        read_checkpoint(tmp_path / "other.pth")


def test_a_text_file(tmp_path):
    (tmp_path / "notes.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"notes\.pth"):
        read_checkpoint(tmp_path / "notes.pth")


def test_a_newer_version(tmp_path):
    torch.save({"format": "featsharp", "version": VERSION + 1}, tmp_path / "new.pth")
    with pytest.raises(CheckpointError, match=f"version {VERSION + 1}, newer than this featsharp; upgrade it"):
        read_checkpoint(tmp_path / "new.pth")


@pytest.mark.parametrize(
    ("content", "lacking"),
    [
        ({}, "encoder, model, config, training"),
        ({"version": "one"}, "encoder"),
        ({"version": 1, "model": {}}, "encoder"),
    ],
)
def test_an_incomplete_file_says_what_it_lacks(tmp_path, content, lacking):
    torch.save({"format": "featsharp", **content}, tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match=f"is not complete: it lacks {lacking}"):
        read_checkpoint(tmp_path / "part.pth")


def test_a_flipped_bit_is_noticed(tmp_path):
    """torch.load would take it."""
    path = tmp_path / "last.pth"
    write_checkpoint(path, {"encoder": {}, "model": {"weight": torch.zeros(4096)}, "config": None, "training": None})
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read .the checksum of .* is wrong"):
        read_checkpoint(path)


def test_an_error_that_quotes_a_whole_file_is_cut():
    assert first_line(ValueError("Unknown endianness: little" + "\0" * 10**6)) == "Unknown endianness: little"
    assert first_line(ValueError("x" * 10**6 + "\nmore")) == "x" * 500
    assert first_line(ValueError()) == "ValueError"


def test_steps_are_counted_from_zero():
    assert read_step({"step": 3}) == 3
    with pytest.raises(ValueError, match="-1 steps"):
        read_step({"step": -1})
