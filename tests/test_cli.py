"""The command: what it writes, what it says, and that bad input costs one line and nothing else."""

import contextlib
import io
import json
import logging
import os
import re
import resource
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from featsharp import __version__
from featsharp.backbones import list_backbones
from featsharp.builder import create_encoder, load_from_file, save_checkpoint
from featsharp.cli.doctor import _states
from featsharp.cli.main import COMMANDS, main
from featsharp.configs.compose import options_of
from featsharp.device import has_mps
from featsharp.errors import InputError
from featsharp.normalizers import NORMALIZERS, FeatureStatistics
from featsharp.training.downsamplers import create_downsampler
from featsharp.upsamplers import UPSAMPLERS
from featsharp.visualization.panels import GAP

TILE = ["--checkpoint", "tile-2x", "--backbone", "toy-vit"]


def write_photo(path: Path, width: int = 60, height: int = 40, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photo(tmp_path / "photos" / "a.png")
    write_photo(tmp_path / "photos" / "deep" / "b.jpg", 100, 30, seed=1)
    return tmp_path / "photos"


def test_python_m_featsharp_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["__main__", "--version"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_module("featsharp", run_name="__main__")
    assert capsys.readouterr().out.strip() == __version__


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An encoder as training leaves it, with the state of its downsampler."""
    encoder = create_encoder("toy-vit", "featup", 2, normalizer="phi-s", bias_buffer=True)
    statistics = FeatureStatistics(encoder.embed_dim)
    statistics.update(encoder.backbone(torch.randn(8, 3, 64, 64)).features)
    encoder.normalizer.fit(statistics)
    downsampler = create_downsampler("simple", 32, 2, 5)
    save_checkpoint(
        encoder,
        tmp_path / "last.pth",
        config={"objective": {"downsampler": "simple", "kernel_size": 5}},
        training={"objective": {f"downsampler.{k}": v for k, v in downsampler.state_dict().items()}},
    )
    return tmp_path / "last.pth"


def run(*arguments: object) -> int:
    """The exit status, also where argparse ends the program."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


def read_features(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


# upsample


def test_upsample_of_an_image_and_a_folder(photos, checkpoint, tmp_path, capsys):
    """U31: pictures that open, raw features that line up with the image, non-square sizes, folders kept."""
    image = write_photo(tmp_path / "one" / "tall.png", 30, 90)
    out = tmp_path / "out"
    assert run("upsample", image, photos, "--checkpoint", checkpoint, "-o", out) == 0
    results = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert results == sorted(f"{n}.{s}" for n in ("tall", "a", "deep/b") for s in ("png", "safetensors"))
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in lines) == sorted(
        str(out / f"{n}.safetensors") for n in ("tall", "a", "deep/b")
    )
    assert re.search(
        r"tall.safetensors  90x30 pixels -> 14x5 tokens -> 28x10 cells  \(for more: --size HxW\)$", lines[0]
    )
    tensors, metadata = read_features(out / "tall.safetensors")
    assert metadata == {"image_size": "90x30", "layout": "CHW"}
    assert {name: value.dtype for name, value in tensors.items()} == dict.fromkeys(
        ("low_res", "high_res"), torch.float32
    )
    expected = load_from_file(checkpoint).encode_image(image)
    assert tensors["low_res"].shape[-2] > 2 * tensors["low_res"].shape[-1]
    assert torch.equal(tensors["low_res"], expected.low_res[0])
    assert torch.equal(tensors["high_res"], expected.high_res[0])
    with Image.open(out / "tall.png") as picture:
        width, height = picture.size
        assert (width, height > 448) == (3 * 149 + 2 * GAP, True)  # a line of captions above


def test_upsample_at_a_given_size(photos, tmp_path):
    assert run("upsample", photos / "a.png", *TILE, "-o", tmp_path / "out", "--size", "96x144") == 0
    tensors, _ = read_features(tmp_path / "out" / "a.safetensors")
    assert tensors["low_res"].shape == (32, 6, 9)
    assert tensors["high_res"].shape == (32, 12, 18)


def test_images_of_one_stem_do_not_share_a_result(tmp_path):
    write_photo(tmp_path / "in" / "x.png")
    write_photo(tmp_path / "in" / "x.jpg", seed=1)
    assert run("upsample", tmp_path / "in", *TILE, "-o", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2


def test_one_bad_image_does_not_end_the_work_on_others(photos, tmp_path, capsys):
    (photos / "aa.png").write_bytes(b"")
    assert run("upsample", photos, *TILE, "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert captured.err.splitlines() == [
        f"featsharp upsample: {photos / 'aa.png'}: the file is empty (0 bytes)",
        "featsharp upsample: 2 of 3 images written, 1 failed",
    ]


@pytest.mark.parametrize(("name", "encoding"), [(b"caf\xe9.png", "utf-8"), ("日本.png".encode(), "ascii")])
def test_a_name_that_the_terminal_cannot_write_does_not_end_the_work(name, encoding, tmp_path):
    """Latin-1 bytes on a UTF-8 terminal and Japanese on an ASCII one, as a result and in a message."""
    photo = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    broken = photo.with_name(f"broken{photo.name}")
    broken.touch()
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert (
            run("upsample", write_photo(photo), broken, write_photo(tmp_path / "z.png"), *TILE, "-o", tmp_path / "out")
            == 1
        )
    assert {"z.safetensors", f"{photo.stem}.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    for stream, count in ((out, 2), (err, 2)):
        stream.seek(0)
        assert len(stream.read().splitlines()) == count


def test_captions_name_what_is_drawn(photos, tmp_path):
    """The line above the pictures is white but for three texts, one above each picture."""
    assert run("upsample", photos / "a.png", *TILE, "-o", tmp_path / "out") == 0
    with Image.open(tmp_path / "out" / "a.png") as picture:
        line = np.asarray(picture)[: picture.height - round(448 * 40 / 60)]
    for i in range(3):
        text = line[:, i * (448 + GAP) : i * (448 + GAP) + 448]
        assert text.min() < 100
        assert (text[0] == 255).all()


# Messages


@pytest.mark.parametrize(
    ("flags", "level"),
    [([], "WARNING"), (["-v"], "INFO"), (["-vv"], "DEBUG"), (["-v", "--verbose"], "DEBUG"), (["-q"], "ERROR")],
)
def test_the_level_of_messages(flags, level, capsys):
    """At any place: before the command and behind its arguments."""
    for arguments in ([*flags, "ls", "weights"], ["ls", "weights", *flags], ["ls", *flags, "weights"]):
        assert run(*arguments) == 0
        assert logging.getLogger("featsharp").level == getattr(logging, level)
    assert "vits14-focus/featsharp-2x" in capsys.readouterr().out


def test_training_takes_the_flags_of_messages_among_its_overrides(tmp_path, capsys):
    """Its usual level is INFO."""
    overrides = ["+model=toy-vit", "dry_run=true", f"train_data_dir={tmp_path}", "+upsampler=bilinear-2x"]
    for flags, level in (([], logging.INFO), (["-q"], logging.ERROR), (["-vv"], logging.DEBUG)):
        for arguments in ([*flags, "train", *overrides], ["train", overrides[0], *flags, *overrides[1:]]):
            assert run(*arguments) == 0
            assert logging.getLogger("featsharp").level == level
    assert "name: toy-vit" in capsys.readouterr().out
    assert run("train", "--multirun", *overrides) == 1


# ls, pack, eval


def nearest(image, features, size):
    """An upsampler of the user's."""
    return torch.nn.functional.interpolate(features, size)


@pytest.mark.slow
def test_ls_prints_every_name_with_a_description(capsys, monkeypatch):
    """U28."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run("ls") == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(len(line) for line in lines if not line.lstrip().startswith("https:")) <= 100  # an address stays whole
    names = [*list_backbones(), *UPSAMPLERS.names(), *NORMALIZERS.names()]
    names += [f"+model={n}" for n in options_of("model")] + [f"+upsampler={n}-FACTORx" for n in options_of("upsampler")]
    names += [f"objective={n}" for n in options_of("objective")]
    described = {line.split()[0] for line in lines if line.startswith("  ") and len(line.split()) > 2}
    assert set(names) <= described
    assert re.search(
        r"featsharp +yes +nearly +any +4,630,434 +5.80\n +FeatSharp: JBU[^;]+;\s+needs image, tiles\n", text
    )
    assert re.search(r"identity +no +yes +one +0 +1.00\n[^;]+; needs nothing\n", text)
    assert run("ls", "weights") == 0
    assert capsys.readouterr().out.splitlines()[0] == "weights:"


@pytest.mark.slow
def test_the_table_in_the_documentation_is_the_one_of_the_command(capsys):
    assert run("ls", "upsamplers", "--markdown") == 0
    document = Path(__file__).resolve().parents[1] / "docs" / "upsamplers.md"
    assert capsys.readouterr().out in document.read_text()


@pytest.mark.slow
def test_a_function_of_the_users_is_benchmarked_and_evaluated_like_any_other(capsys, tmp_path):
    """P16."""
    names = ["--upsamplers", f"{__name__}:nearest", "bilinear", "--factors", "2", "--repeat", "2"]
    assert run("bench", "encode", "--backbone", "toy-vit", *names) == 0
    assert re.search(r"test_cli:nearest +2x float32", capsys.readouterr().out)
    for i in range(2):
        Image.effect_noise((90, 70), 60).convert("RGB").save(tmp_path / f"{i}.png")
    chosen = ["--checkpoint", f"{__name__}:nearest-2x", "--backbone", "toy-vit"]
    assert run("eval", "fidelity", *chosen, "--data", tmp_path) == 0
    assert "fidelity_area" in capsys.readouterr().out


def test_doctor_lists_backends_with_reasons(capsys):
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert re.search(r"local_attention blocked +taken by default", text)
    assert re.search(r'local_attention reference +runs when asked for: backend="reference"', text)
    assert re.search(r"^  gradio +(not )?installed$", text, re.M)
    devices = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": has_mps()}
    assert f"devices: {', '.join(name for name, here in devices.items() if here)}; --device auto takes" in text
    if not torch.cuda.is_available():
        assert re.search(r"local_attention triton +cannot run: needs a CUDA device; got cpu", text)
    on_mps = dict(_states("local_attention", "mps"))
    assert on_mps["blocked"].startswith("taken by default")
    assert on_mps["triton"].startswith("cannot run: needs a CUDA device; got mps")


def test_pack_round_trip(photos, tmp_path, capsys, caplog):
    """U8."""
    (photos / "broken.png").write_bytes(b"")
    assert run("pack", photos, tmp_path / "shards") == 0
    assert capsys.readouterr().out == "2 images in 1 shards, 1 skipped\n"
    assert [r.message for r in caplog.records] == ["broken.png skipped: the file is empty (0 bytes)"]
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        contents = [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    assert contents == [(photos / "a.png").read_bytes(), (photos / "deep" / "b.jpg").read_bytes()]
    assert run("pack", photos, tmp_path / "shards") == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_eval_measures_several_encoders_and_writes_json(photos, checkpoint, tmp_path, capsys):
    """E20: per image and pooled, with intervals."""
    path = tmp_path / "new" / "r.json"
    (photos / "broken.png").write_bytes(b"")
    chosen = ["--checkpoint", f"sharp={checkpoint}", "--upsampler", "tile-2x", "--backbone", "toy-vit"]
    assert run("eval", "fidelity", *chosen, "--data", photos, "--json", path) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = ["sharp", "fidelity_area", "fidelity_own", "cosine", "tile-2x", "fidelity_area", "cosine"]
    assert [words[0] for words in table] == names
    assert table[0][1:] == ["(2", "measured,", "1", "skipped)"]
    content = json.loads(path.read_text())
    assert content["command"] == (
        f"featsharp eval fidelity --checkpoint sharp={checkpoint.name} --upsampler tile-2x --backbone toy-vit --data "
        f"{photos.name} --json r.json"
    )
    found = content["encoders"]["sharp"]
    assert (found["backbone"], found["factor"]) == ("toy-vit", 2)
    assert found["skipped"] == [["broken.png", "the file is empty (0 bytes)"]]
    for estimate in found["result"].values():
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert set(found["items"]) == {"a.png", "deep/b.jpg"}
    assert set(found["items"]["a.png"]) == {"area", "own", "cosine"}
    # No machine's paths in a result that is to be shared.
    assert str(tmp_path) not in path.read_text()


@pytest.mark.slow
def test_lists_of_files_are_written_without_their_folders(checkpoint, tmp_path, capsys):
    path = tmp_path / "r.json"
    files = [checkpoint, f"mine={checkpoint}"]
    chosen = ["--backbone", "toy-vit", "--upsampler", "bilinear", "--factors", 2, "--checkpoint", *files]
    assert run("eval", "flops", *chosen, "--json", path) == 0
    assert json.loads(path.read_text())["settings"]["checkpoint"] == [checkpoint.name, f"mine={checkpoint.name}"]
    assert str(tmp_path) not in path.read_text()


def test_an_encoder_that_is_not_there_costs_only_itself(photos, tmp_path, capsys):
    path = tmp_path / "r.json"
    chosen = ["--upsampler", "bilinear-2x", "--checkpoint", "b=nothere.safetensors", "--backbone", "toy-vit"]
    assert run("eval", "zoom", *chosen, "--data", photos, "--json", path) == 1
    content = json.loads(path.read_text())["encoders"]
    assert "does not exist" in content["b"]["failed"]
    assert 0 < content["bilinear-2x"]["result"]["zoom_cosine"]["value"] < 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("r.json")) == ["r.json"]


def test_a_path_may_hold_an_equals_sign(photos, checkpoint, tmp_path, capsys):
    folder = tmp_path / "lr=1e-3"
    folder.mkdir()
    checkpoint.rename(folder / "best.pth")
    assert run("eval", "zoom", "--checkpoint", folder / "best.pth", "--data", photos) == 0
    assert capsys.readouterr().out.startswith("best ")
    assert run("eval", "zoom", "--checkpoint", f"mine={folder / 'best.pth'}", "--data", photos) == 0
    assert capsys.readouterr().out.startswith("mine ")


def test_a_result_cannot_go_where_a_folder_is(photos, tmp_path, capsys):
    assert run("eval", "zoom", *TILE, "--data", photos, "--json", tmp_path) == 1
    assert "is a folder; name a file" in capsys.readouterr().err


def test_encoders_of_one_name_are_refused(photos, checkpoint, capsys):
    assert run("eval", "zoom", "--checkpoint", checkpoint, checkpoint, "--data", photos) == 1
    assert "LABEL=" in capsys.readouterr().err


# Bad input: one line on stderr, a status that is not zero, no traceback


def nan_checkpoint(checkpoint: Path) -> Path:
    content = torch.load(checkpoint, weights_only=True)
    content["model"]["bias_buffer.buffer"][:] = float("nan")
    torch.save(content, checkpoint)
    return checkpoint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["upsample", "{photos}", "--checkpoint", "{tmp}/none.pth", "-o", "{tmp}/out"], "does not exist"),
        (
            ["upsample", "{photos}", "--checkpoint", "{checkpoint}", "--backbone", "toy-cnn", "-o", "{tmp}/out"],
            "was trained for backbone 'toy-vit', not for this 'toy-cnn'",
        ),
        (["upsample", "{photos}", "--checkpoint", "tile-2x", "-o", "{tmp}/out"], "give it a backbone"),
        (["upsample", "{tmp}/empty", *TILE, "-o", "{tmp}/out"], "holds no image"),
        (["upsample", "{tmp}/none.jpg", *TILE, "-o", "{tmp}/out"], "does not exist"),
        (["upsample", "{tmp}/zero.png", *TILE, "-o", "{tmp}/out"], "the file is empty"),
        (["upsample", "{tmp}/tiny.png", *TILE, "-o", "{tmp}/out"], "smaller than one 8-pixel patch"),
        (["upsample", "{photos}/a.png", *TILE, "-o", "{tmp}/out", "--size", "4x4"], "smaller than one 8-pixel patch"),
        (["upsample", "{photos}/a.png", *TILE, "-o", "{tmp}/out", "--size", "big"], "HEIGHTxWIDTH"),
        (["upsample", "{photos}/a.png", *TILE, "-o", "{photos}/a.png"], "cannot write"),
        (["upsample", "{photos}/a.png", *TILE, "-o", "{tmp}/out", "--device", "gpu"], "device 'gpu' cannot be used"),
        (["upsample", "{photos}/a.png", "--checkpoint", "{nan}", "-o", "{tmp}/out"], "NaN or infinite"),
        (["upsample", "{photos}/a.png", "--checkpoint", "{photos}/a.png", "-o", "{tmp}/out"], "checkpoint"),
        (["eval", "fidelity", *TILE, "--data", "{tmp}/empty"], "no images found"),
        (["eval", "fidelity", "--checkpoint", "{nan}", "--data", "{photos}"], "NaN or infinite"),
        (["eval", "speed", *TILE, "--data", "{photos}"], "invalid choice: 'speed'"),
        (["eval", "fidelity", *TILE, "--data", "{photos}", "--limit", "-3"], "at least 1"),
        (["pack", "{tmp}/empty", "{tmp}/out"], "no images found"),
        (["pack", "{photos}", "{tmp}/out", "--images-per-shard", "0"], "at least 1"),
        (["train", "+model=toy-vit", "+upsampler=featsharp-2x", "train_data_dir={tmp}/none"], "no such file"),
        (["upsampel", "x"], "invalid choice: 'upsampel'"),
        ([], "COMMAND"),
    ],
)
def test_bad_input_is_one_line(arguments, said, photos, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.png").write_bytes(b"")
    write_photo(tmp_path / "tiny.png", 5, 30)
    places = {"photos": photos, "tmp": tmp_path, "checkpoint": checkpoint}
    if any("{nan}" in argument for argument in arguments):
        places["nan"] = nan_checkpoint(checkpoint)
    assert run(*(argument.format(**places) for argument in arguments)) != 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("featsharp")
    assert said in line
    assert not list(tmp_path.glob("out/**/*.*"))


def test_full_disk_costs_one_line_and_no_earlier_result(photos, tmp_path, capsys):
    """Files may have 20 kB: the features do not fit, and what was there stays as it was."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.safetensors").write_bytes(b"earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert run("upsample", photos, *TILE, "-o", out) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("featsharp upsample: cannot write")
    assert "File too large" in line
    assert line.endswith("; 0 of 2 images are written, 2 not")
    assert [path.name for path in out.iterdir()] == ["a.safetensors"]
    assert (out / "a.safetensors").read_bytes() == b"earlier"


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == __version__
    for command in COMMANDS.keys() - {"train"}:
        assert run(command, "--help") == 0
    assert run("train", "--help") == 0
    assert "output_base" in capsys.readouterr().out


def test_upsample_lists_folders_as_training_does(tmp_path):
    """Links are followed, hidden files and folders left out."""
    write_photo(tmp_path / "elsewhere" / "a.png")
    write_photo(tmp_path / "photos" / ".thumbnails" / "b.png")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    assert run("upsample", tmp_path / "photos", *TILE, "-o", tmp_path / "out") == 0
    assert [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")] == [
        "link/a.png"
    ]


def test_upsample_never_overwrites_its_input(tmp_path, capsys):
    photo = write_photo(tmp_path / "photo.png")
    before = photo.read_bytes()
    arguments = ("--checkpoint", "tile-2x", "--backbone", "toy-vit", "-o", tmp_path)
    for source in (photo, tmp_path):
        assert run("upsample", source, *arguments) == 1
        assert "would overwrite the input" in capsys.readouterr().err
    assert photo.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["photo.png"]


def test_upsample_never_overwrites_other_pictures(tmp_path, capsys):
    """Neither another input nor a picture that featsharp did not write; its own results it replaces."""
    photo = write_photo(tmp_path / "photo.jpg")
    other = write_photo(tmp_path / "photo.png", seed=1)
    before = other.read_bytes()
    assert run("upsample", tmp_path, *TILE, "-o", tmp_path) == 1
    assert "would overwrite the input" in capsys.readouterr().err
    assert run("upsample", photo, *TILE, "-o", tmp_path) == 1
    assert "which featsharp did not write" in capsys.readouterr().err
    assert other.read_bytes() == before
    assert run("upsample", photo, *TILE, "-o", tmp_path / "out") == 0
    assert run("upsample", photo, *TILE, "-o", tmp_path / "out") == 0


def test_features_are_kept_where_no_picture_can_be_drawn(tmp_path, capsys):
    photo = write_photo(tmp_path / "photo.jpg")
    assert run("upsample", photo, *TILE, "-o", tmp_path / "out", "--size", "16x16") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "photo.safetensors is written, but there is no picture: PCA needs" in line
    tensors, _ = read_features(tmp_path / "out" / "photo.safetensors")
    assert tensors["high_res"].shape == (32, 2, 2)


@pytest.mark.slow
def test_limited_memory_gives_the_same_files(photos, checkpoint, tmp_path):
    assert run("upsample", photos, "--checkpoint", checkpoint, "-o", tmp_path / "free") == 0
    assert run("upsample", photos, "--checkpoint", checkpoint, "-o", tmp_path / "tight", "--max-memory", "60MiB") == 0
    names = sorted(path.name for path in (tmp_path / "free").rglob("*.*"))
    assert sorted(path.name for path in (tmp_path / "tight").rglob("*.*")) == names
    for path in (tmp_path / "free").rglob("*.safetensors"):
        free, tight = read_features(path), read_features(tmp_path / "tight" / path.relative_to(tmp_path / "free"))
        assert free[1] == tight[1]
        for key, value in free[0].items():
            torch.testing.assert_close(tight[0][key], value, atol=1e-4, rtol=1e-4)


def test_without_a_checkpoint_the_best_of_few_passes_is_taken(photos, tmp_path, capsys):
    assert run("upsample", photos / "a.png", "--backbone", "toy-vit", "-o", tmp_path) == 0
    assert "toy-vit with views-2x?passes=4; --help says how to get more" in capsys.readouterr().err
    expected = load_from_file("views-2x?passes=4", featurizer="toy-vit").encode_image(photos / "a.png")
    assert torch.equal(read_features(tmp_path / "a.safetensors")[0]["high_res"], expected.high_res[0])
    assert run("upsample", "--help") == 0
    assert "For better features at more cost: 8 or 16 passes" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cell_for_each_pixel(photos, tmp_path):
    """Within a limit, which the command sets itself, or another one; not where an upsampler makes its map at once."""
    for number, (name, *limit) in enumerate((("views-2x",), ("views-2x", "--max-memory", "60MiB"), ("stride-2x",))):
        out = tmp_path / str(number)
        chosen = ["--checkpoint", name, "--backbone", "toy-vit", "--output-size", "pixels", "-o", out, *limit]
        assert run("upsample", photos, *chosen) == 0
        for path, size in (("a", (40, 60)), ("deep/b", (30, 100))):
            tensors, _ = read_features(out / f"{path}.safetensors")
            assert tensors["high_res"].shape == (32, *size)
    first, second = (read_features(tmp_path / number / "a.safetensors")[0]["high_res"] for number in "01")
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert run("upsample", photos, *TILE, "--output-size", "pixel") == 2


@pytest.mark.slow
def test_too_little_memory_names_the_least_that_works(photos, checkpoint, tmp_path, capsys):
    assert run("upsample", photos, "--checkpoint", checkpoint, "-o", tmp_path / "out", "--max-memory", "1MiB") == 1
    said = capsys.readouterr().err
    assert "max_memory=1MiB is too little" in said
    assert "the least that works for this image is" in said
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.slow
def test_pictures_of_several_maps(tmp_path):
    """S2 stacks maps: the last one is drawn, all are written."""
    photo = write_photo(tmp_path / "photo.png", 90, 70)
    chosen = ["--checkpoint", "s2-2x", "--backbone", "toy-vit"]
    assert run("upsample", photo, *chosen, "-o", tmp_path / "out") == 0
    with safe_open(tmp_path / "out" / "photo.safetensors", framework="pt") as file:
        assert file.get_tensor("high_res").shape[0] == 2 * file.get_tensor("low_res").shape[0]
    assert (tmp_path / "out" / "photo.png").exists()
    assert run("figure", "pca", photo, *chosen, "-o", tmp_path / "figure.png") == 0


def test_checkpoints_that_name_functions_need_a_word(tmp_path, capsys):
    photo = write_photo(tmp_path / "photo.png", 90, 70)
    options = {"function": f"{__name__}:nearest"}
    save_checkpoint(create_encoder("toy-vit", "custom", 2, upsampler_options=options), tmp_path / "last.pth")
    command = ["upsample", photo, "--checkpoint", tmp_path / "last.pth", "-o", tmp_path / "out"]
    assert run(*command) == 1
    assert "--allow-functions on the command line" in capsys.readouterr().err
    assert run(*command, "--allow-functions") == 0


@pytest.mark.parametrize("size", ["--size", "--output-size"])
def test_an_image_too_large_for_the_memory_costs_one_line(size, photos, tmp_path, capsys):
    """More than the address space holds, so that no machine has it."""
    arguments = ["upsample", str(photos), "--checkpoint", "bilinear-2x", "--backbone", "toy-vit", "-o", str(tmp_path)]
    assert main([*arguments, size, "100000000x100000000"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert all("memory ran out; ask for" in line for line in lines[:-1])
    assert lines[-1].startswith(f"featsharp upsample: 0 of {len(lines) - 1} images written")


def test_a_size_below_a_patch_is_refused_before_the_picture_is_scaled_to_it(photos):
    encoder = create_encoder("toy-vit", "bilinear", 2)
    photo = next(photos.glob("*.*"))
    with pytest.raises(InputError, match="smaller than one 8-pixel patch"):
        encoder.encode_image(photo, size=(100_000_000, 1))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "x.json"), "featsharp ls: x.json: No space left on device\n"),
        (OSError(28, "No space left on device"), "featsharp ls: No space left on device\n"),
        (MemoryError(), "featsharp ls: memory ran out; ask for"),
        (torch.OutOfMemoryError("CUDA out of memory"), "featsharp ls: memory ran out; ask for"),
        (RuntimeError("numel: integer multiplication overflow"), "featsharp ls: memory ran out; ask for"),
    ],
)
def test_errors_of_the_system_are_one_line_in_every_command(error, said, capsys, monkeypatch):
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr("featsharp.cli.ls.run", fail)
    assert main(["ls"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("featsharp.cli.ls.run", lambda _: {}["missing"])
    with pytest.raises(KeyError):
        main(["ls"])


@pytest.mark.parametrize(
    "words",
    [
        ("upsample", "a\0b.png"),
        ("upsample", "x.png", "--size", f"8x{10**9}"),
        ("upsample", "x.png", "--size", "²x8"),
        ("fit", "x.png", "--backbone", "toy-vit", "-o", "o", "--dim", "1" * 5000),
    ],
)
def test_words_that_mean_nothing_are_refused_by_the_parser(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 300


def test_a_device_is_not_read_to_its_end(tmp_path, capsys):
    assert main(["figure", "miou", "/dev/zero", "-o", str(tmp_path / "x.png")]) == 1
    assert "a device, not a file" in capsys.readouterr().err


def test_features_are_the_same_file_each_time(photos, tmp_path):
    photo = str(next(photos.glob("*.*")))
    for number in range(4):
        main(
            [
                "upsample",
                photo,
                "--checkpoint",
                "bilinear-2x",
                "--backbone",
                "toy-vit",
                "-o",
                str(tmp_path / str(number)),
            ]
        )
    assert len({path.read_bytes() for path in tmp_path.glob("*/*.safetensors")}) == 1
