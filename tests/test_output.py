"""Results of commands: nothing is lost, whatever names, disks and terminals do, and all is counted."""

import json
import os
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load

from featsharp.cli.main import main
from featsharp.data import open_source
from featsharp.terminal import flush_output, progress_bar, say

TILE = ("--checkpoint", "bilinear-2x", "--backbone", "toy-vit", "--device", "cpu")
ROOT = Path(__file__).resolve().parents[1]


def write_photo(path: Path, height: int = 48, width: int = 48) -> Path:
    """A photograph whose features tell by their sizes which one they are of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    with path.open("wb") as file:
        Image.fromarray(pixels).save(file, "PNG")
    return path


def upsample(*arguments: object) -> int:
    return main(["upsample", *map(str, arguments), *TILE])


def sizes_of(out: Path) -> dict[str, str]:
    """The image sizes in all files of features below a folder, each of which has a picture."""
    sizes = {}
    for path in out.rglob("*.safetensors"):
        data = path.read_bytes()  # the library opens no path that is not UTF-8
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        assert load(data).keys() == {"low_res", "high_res"}
        sizes[path.relative_to(out).as_posix()] = metadata["image_size"]
        with Image.open(path.with_suffix(".png")) as picture:
            picture.load()
    assert len(list(out.rglob("*.png"))) == len(sizes)
    return sizes


# Names


def test_every_image_has_a_result_of_its_own_also_where_the_disk_ignores_case(tmp_path):
    names = [
        "a.jpg",
        "A.JPG",
        "a.png",
        "a.jpg.png",
        "Ä.png",
        "A\u0308.png",
        "ä.jpg",
        "d/a.jpg",
        "D/a.jpg",
        "x.png.jpg",
        "x.png",
    ]
    for number, name in enumerate(names):
        write_photo(tmp_path / "in" / name, 40 + number, 64)
    assert upsample(tmp_path / "in", "-o", tmp_path / "out") == 0
    sizes = sizes_of(tmp_path / "out")
    assert sorted(sizes.values()) == [f"{40 + number}x64" for number in range(len(names))]
    assert len({unicodedata.normalize("NFC", name).casefold() for name in sizes}) == len(names)
    assert sizes["A.safetensors"] == "41x64"


def test_images_of_one_name_in_two_folders_stay_apart_and_one_image_is_done_once(tmp_path):
    for number, name in enumerate(("one", "two", "three", "four")):
        write_photo(tmp_path / name / "a.jpg", 40 + number, 64)
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    assert upsample(*folders, folders[0] / "a.jpg", folders[1], "-o", tmp_path / "out") == 0
    assert sizes_of(tmp_path / "out") == {
        "a.safetensors": "40x64",
        "a.jpg.safetensors": "41x64",
        "a.jpg-2.safetensors": "42x64",
        "a.jpg-3.safetensors": "43x64",
    }


NAMES = {
    "newline": "a\nb.png",
    "dash": "-o.png",
    "blank at the end": "a.png ",
    "dot at the end": "b.png.",
    "blank before the end": "c .png",
    "escape": "\x1b[31mred.png",
    "255 bytes": "a" * 251 + ".png",
    "255 bytes in three-byte characters": "日" * 83 + "aa.png",
    "no text": os.fsdecode(b"\xff\xe9.png"),
    "dots": "e..png",
    "brackets and quotes": "[x]{0..1}'\"*?.png",
}


def test_any_name_that_the_disk_has_gives_a_result(tmp_path, capsys):
    for number, name in enumerate(NAMES.values()):
        write_photo(tmp_path / "in" / name, 40 + number, 64)
    (tmp_path / "in/zz.png").touch()
    assert upsample(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert sorted(sizes_of(tmp_path / "out").values()) == [f"{40 + number}x64" for number in range(len(NAMES))]
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == len(NAMES)
    assert "\x1b" not in captured.out
    assert (
        captured.err.splitlines()[-1]
        == f"featsharp upsample: {len(NAMES)} of {len(NAMES) + 1} images written, 1 failed"
    )
    assert not list(tmp_path.rglob(".*"))  # no temporary file


def test_a_name_with_a_dash_is_named_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_photo(Path("-x.png"))
    assert main(["upsample", *TILE, "-o", "out", "--", "-x.png"]) == 0
    assert list(sizes_of(Path("out"))) == ["-x.safetensors"]


def test_a_long_name_costs_no_journal(tmp_path, capsys):
    """The rows of an evaluation that goes on are beside its result."""
    write_photo(tmp_path / "in/a.png", 96, 96)
    path = tmp_path / ("r" * 250 + ".json")
    flags = ["--upsampler", "bilinear-2x", "--backbone", "toy-vit", "--device", "cpu", "--json", str(path)]
    assert main(["eval", "reference", "--data", str(tmp_path / "in"), *flags]) == 0
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "in"] == [path.name]


# Places


def test_results_are_no_images_of_the_next_run(tmp_path):
    photos = tmp_path / "photos"
    write_photo(photos / "a.jpg")
    write_photo(photos / "sub/b.jpg")
    for out in (photos / "out", photos, photos / "sub"):
        for _ in range(2):
            assert upsample(photos, "-o", out) == 0
            source = open_source(photos)
            assert [source.name(index) for index in range(len(source))] == ["a.jpg", "sub/b.jpg"]
    names = {path.relative_to(photos).as_posix() for path in photos.rglob("*.safetensors")}
    assert names == {f"{place}{name}.safetensors" for place in ("", "out/", "sub/") for name in ("a", "sub/b")} - {
        "sub/b"
    }


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/new", "long"])
def test_a_place_that_cannot_be_written_to_is_named_before_any_work(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    photo = write_photo(tmp_path / "a.png", 96, 96)
    place = "l" * 256 if place == "long" else place
    encoder = ["--upsampler", "bilinear-2x", "--backbone", "no-such-one"]
    for command in (
        ["upsample", photo, "-o", place, "--checkpoint", "bilinear-2x", "--backbone", "no-such-one"],
        ["fit", photo, "-o", place, "--backbone", "no-such-one"],
        ["eval", "reference", "--data", tmp_path, "--json", f"{place}/a.json", *encoder],
        ["figure", "pca", photo, "-o", f"{place}/a.png", *encoder],
        ["bench", "ops", "--json", f"{place}/a.json", "--backbone", "no-such-one"],
        ["export", "vits14-focus/featsharp-2x", "-o", f"{place}/a.safetensors", "--backbone", "no-such-one"],
        ["pack", tmp_path, place],
        ["train", "+model=toy-vit", "+upsampler=bilinear-2x", f"output_root={place}", f"train_data_dir={tmp_path}"],
    ):
        assert main(list(map(str, command))) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"featsharp {command[0]}: ")
        assert "no-such-one" not in line
        assert place in line


def test_what_cannot_be_written_costs_its_image_alone(tmp_path, capsys):
    for name in ("a.png", "d/b.png", "d/c.png", "e.png"):
        write_photo(tmp_path / "in" / name)
    (tmp_path / "out/a.safetensors").mkdir(parents=True)
    (tmp_path / "out/d").touch()
    assert upsample(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert (tmp_path / "out/e.safetensors").is_file()
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 4
    assert err[-1] == "featsharp upsample: 1 of 4 images written, 3 failed"


def test_pipes_devices_and_dangling_links_are_counted_and_not_opened(tmp_path, capsys):
    write_photo(tmp_path / "in/a.png")
    os.mkfifo(tmp_path / "in/pipe.png")
    os.mkfifo(tmp_path / "in/control")
    (tmp_path / "in/zero.png").symlink_to("/dev/zero")
    (tmp_path / "in/gone.png").symlink_to("nowhere")
    assert upsample(tmp_path / "in", "/dev/zero", tmp_path / "in/pipe.png", "-o", tmp_path / "out") == 1
    assert list(sizes_of(tmp_path / "out")) == ["a.safetensors"]
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        "featsharp upsample: 1 of 4 images written, 3 failed; 2 folders or files could not be looked into"
    )
    assert "control" not in err


# Upsamples once, which imports all that it takes, and then again without the rights of root.
AS_NOBODY = """
import os, sys
from featsharp.cli.main import main
assert main([*sys.argv[1:], "warm"]) == 0
os.setgid(65534)
os.setuid(65534)
sys.exit(main(["upsample", "in", *sys.argv[3:], "out"]) + 10 * main(["upsample", "in", *sys.argv[3:], "other"]))
"""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="gives up the rights of root in a process")
def test_a_folder_without_permission_is_named_and_counted():
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        for name in ("warm.png", "in/a.png", "in/secret/b.png"):
            write_photo(root / name)
        (root / "in/secret").chmod(0o700)
        (root / "out").mkdir()
        (root / "out").chmod(0o777)
        command = [sys.executable, "-c", AS_NOBODY, "upsample", "warm.png", *TILE, "-o"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
        assert done.returncode == 11, done.stderr
        assert list(sizes_of(root / "out")) == ["a.safetensors"]
    assert done.stderr.splitlines() == [
        "featsharp upsample: in/secret: cannot be listed (Permission denied)",
        "featsharp upsample: 1 of 1 images written, 0 failed; 1 folders or files could not be looked into",
        "featsharp upsample: cannot write other: Permission denied; choose another folder",
    ]


# Streams


def command(*arguments: object, shell: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a shell, where ``$COMMAND`` is it."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "featsharp.cli.main", *map(str, arguments)]
    return subprocess.run(["bash", "-c", shell, "bash", *words], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "streams",
    [
        "| head -0; exit ${PIPESTATUS[0]}",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("> /dev/full; test $? = 1", ">&-", ">&- 2>&-", "2> /dev/full")
        ),
    ],
)
def test_a_stream_that_takes_nothing_ends_no_work(streams, tmp_path):
    for number in range(3):
        write_photo(tmp_path / f"in/{number}.png")
    done = command("upsample", tmp_path / "in", *TILE, "-o", tmp_path / "out", shell=f'"$@" {streams}')
    assert len(sizes_of(tmp_path / "out")) == 3
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert ("cannot write to standard output: No space" in done.stderr) == (
        "> /dev/full" in streams and "2>" not in streams
    )


@pytest.mark.parametrize("arguments", [["ls", "weights"], ["--help"]])
def test_the_reader_of_a_list_may_end(arguments):
    done = command(*arguments, shell='set -o pipefail; "$@" | head -0')
    assert (done.returncode, done.stderr) == (0, "")
    done = command(*arguments, shell='"$@" > /dev/full')
    assert "Traceback" not in done.stderr
    if arguments[0] == "ls":  # its purpose is lost
        assert (done.returncode, done.stderr) == (
            1,
            "featsharp: cannot write to standard output: No space left on device\n",
        )


class Broken:
    """A stream that fails as a closed terminal does."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")

    def flush(self) -> None:
        raise OSError(5, "Input/output error")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [None, Broken()])
def test_messages_and_bars_survive_a_terminal_that_is_gone(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    say("a", "b")
    say("c", error=True)
    assert (flush_output() is None) == (stream is None)
    with progress_bar("label \udce9", 2) as advance:
        advance("text \udce9")
        advance("")
    assert main(["ls", "weights"]) == int(stream is not None)


def test_a_closed_stream_is_no_error(monkeypatch):
    with open(os.devnull, "w", encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdout", file)
    say("text")
    assert flush_output() is None


def test_control_characters_of_names_do_not_reach_the_terminal(capsys):
    say("a\nb\x1b[2J\x9b\u2028\tc é")
    assert capsys.readouterr().out == "a\\nb\\x1b[2J\\x9b\\u2028\tc é\n"
