"""Other systems: parts of Python that they lack, their paths and texts, and names that are no text."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

from featsharp.builder import create_encoder, load_from_file, save_checkpoint, save_weights
from featsharp.checkpoint import read_tensors
from featsharp.cli.main import main
from featsharp.data.entries import is_stream, parse_data_dir
from featsharp.device import best_device, find_device, has_mps, to_double
from featsharp.errors import ConfigError, FeatSharpError
from featsharp.evaluation.layouts.objects import open_labels
from featsharp.evaluation.layouts.pairs import list_pairs
from featsharp.evaluation.layouts.segmentation import open_segmentation
from featsharp.extraction import MappedFeatures
from featsharp.names import readable, split_label
from featsharp.urls import redact_setting, redact_url

ROOT = Path(__file__).resolve().parents[1]
NO_TEXT = os.fsdecode(b"caf\xe9")

# What Windows, and some notebooks, lack. Other packages, which look at sys.platform, are imported before.
HIDE = """
import builtins, importlib, io, os, pkgutil, signal, sys, warnings
import torch, numpy, PIL.Image, safetensors.torch

for name in ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
for module, names in (
    (os, "killpg fork forkpty setsid getpgid setpgid getuid geteuid getgid sched_getaffinity sched_setaffinity "
         "sysconf statvfs posix_fallocate posix_fadvise POSIX_FADV_DONTNEED pread getloadavg mkfifo wait4 O_CLOEXEC "
         "O_NONBLOCK"),
    (signal, "SIGHUP SIGUSR1 SIGUSR2 SIGPIPE SIGALRM SIGCHLD SIGTSTP SIGQUIT alarm setitimer pthread_sigmask"),
):
    for name in names.split():
        delattr(module, name)

def without_proc(call):
    def wrapped(path, *args, **kwargs):
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", os.fsdecode(path))
        return call(path, *args, **kwargs)
    return wrapped

builtins.open = io.open = without_proc(open)
os.stat = without_proc(os.stat)
"""

IMPORT = """
import featsharp
for module in pkgutil.walk_packages(featsharp.__path__, "featsharp."):
    if not module.name.endswith(("__main__", "triton_kernel")):
        importlib.import_module(module.name)
"""

RUN = """
from featsharp.cli.main import main
from featsharp.training.usage import peak_memory
assert list(peak_memory(torch.device("cpu"))) == []
here = ["--backbone", "toy-vit", "--device", "cpu"]
train = ["train", "+model=toy-vit", "+upsampler=featup-2x", "val_data_dir=photos", "dist_train_data_dir=photos",
         "num_training_steps=1", "batch_size=1", "num_workers=0", "normalizer.num_samples=2", "device=cpu",
         "normalizer.batch_size=2", "viz.type=none"]
for command in (
    ["upsample", "photos", "--checkpoint", "tile-2x", "-o", "out", *here],
    ["upsample", "photos", "--checkpoint", "tile-2x", "--max-memory", "300MiB", "-o", "mapped", *here],
    ["pack", "photos", "shards"],
    ["eval", "reference", "--data", "photos", "--upsampler", "bilinear-2x", "--json", "result.json", *here],
    ["doctor"],
    [*train, "train_data_dir=photos", "output_root=run"],
    [*train, "train_data_dir='pipe:cat shards/shard-000000.tar'", "output_root=piped"],
):
    assert main(command) == 0, command
"""


def photo(path: Path, seed: int = 0, side: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return path


def python(code: str, folder: Path, **environment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_every_module_and_the_commands_work_without_what_windows_lacks(tmp_path):
    for number in range(2):
        photo(tmp_path / f"photos/{number}.png", number)
    python(HIDE + IMPORT + RUN, tmp_path, FEATSHARP_CACHE=str(tmp_path / "cache"))
    for name in ("out", "mapped"):
        assert len(list((tmp_path / name).glob("*.safetensors"))) == 2
    for name in ("run", "piped"):
        assert (tmp_path / name / "last.pth").is_file()


def test_a_mapped_file_on_a_disk_that_reserves_no_space(tmp_path, monkeypatch):
    def refuse(*arguments: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with MappedFeatures(tmp_path / "a.npy") as file:
        file.allocate(torch.zeros(1, 2, 3, 4), (1, 2, 6, 8), torch.float32)[:] = 1
    assert np.load(tmp_path / "a.npy").shape == (2, 6, 8)


# Paths with drive letters


@pytest.mark.parametrize("path", ["C:\\data\\photos", "C:/data/x.tar", "d:/x@y/z", "\\\\server\\share\\photos", "C:x"])
def test_drives_are_no_schemes(path):
    assert not is_stream(path)
    ((parsed, weight),) = parse_data_dir(path)
    assert (str(parsed), weight) == (path, 1.0)
    assert redact_url(f"in {path}: not there") == f"in {path}: not there"
    assert redact_setting(path) == path


def test_drives_are_no_labels_and_no_backbones():
    assert split_label("C:\\runs\\a=b\\last.pth") == ("", "C:\\runs\\a=b\\last.pth")
    assert split_label("ours=C:\\runs\\last.pth") == ("ours", "C:\\runs\\last.pth")
    with pytest.raises(FeatSharpError, match=r"checkpoint C:\\runs\\last-2x\.pth does not exist"):
        load_from_file("C:\\runs\\last-2x.pth")
    from featsharp.backbones import create_backbone

    for name in ("hub:C:\\clones\\dino\\vits8", "hub:C:/clones/dino/vits8"):
        with pytest.raises(ConfigError, match="C:/clones/dino is no torch"):
            create_backbone(name)


def test_members_of_tars_with_drives_are_refused(tmp_path):
    from featsharp.data import open_source

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("ok.png", "C:/x.png", "..\\x.png"):
            tar.add(photo(tmp_path / "x.png"), name)
    source = open_source(tmp_path / "a.tar")
    assert [source.name(index) for index in range(len(source))] == ["ok.png"]


# Texts as Windows writes them


@pytest.fixture(params=["\n", "\r\n"], ids=["lf", "crlf"])
def text(request):
    """Write lines as a file with a byte order mark and the system's ends of lines."""

    def write(path: Path, *lines: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xef\xbb\xbf" + "".join(line + request.param for line in lines).encode())

    return write


def test_lists_of_data_sets(text, tmp_path):
    for name in ("a", "b c"):
        for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            photo(tmp_path / f"voc/{folder}/{name}.{suffix}")
    for split in ("train", "val"):
        text(tmp_path / f"voc/ImageSets/Segmentation/{split}.txt", "a", "", "b c")
    data = open_segmentation(tmp_path / "voc")
    assert [pair.image for pair in data.val] == ["JPEGImages/a.jpg", "JPEGImages/b c.jpg"]

    text(tmp_path / "spair/Layout/large/test.txt", "1-a-b:cat", "2-a-b:cat")
    (tmp_path / "spair/PairAnnotation/test").mkdir(parents=True)
    assert [entry.name for entry in list_pairs(tmp_path / "spair")] == ["1-a-b:cat", "2-a-b:cat"]

    (tmp_path / "pascal/JPEGImages").mkdir(parents=True)
    text(tmp_path / "pascal/test_pairs.csv", "source_image,target_image,class", "JPEGImages\\x.jpg,JPEGImages\\y.jpg,1")
    assert [entry.name for entry in list_pairs(tmp_path / "pascal")] == ["2-x-y:aeroplane"]


def test_classes(text, tmp_path):
    for folder in ("images/train", "labels/train", "images/val", "labels/val"):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2) // 2).save(tmp_path / folder / "a.png")
    text(tmp_path / "classes.txt", "sky", "ground é")
    assert open_segmentation(tmp_path, "folder").code.classes == ("sky", "ground é")


def test_objects(text, tmp_path):
    text(tmp_path / "yolo/a.txt", "3 0.5 0.5 0.5 0.5", "")
    (found,) = open_labels(tmp_path / "yolo").read("a.jpg", (8, 8))
    assert (found.category, found.area) == (3, 16.0)
    box = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 4, 4]}
    content = {"images": [{"id": 1, "file_name": "C:\\photos\\a.b.jpg"}], "annotations": [box]}
    text(tmp_path / "coco.json", json.dumps(content))
    labels = open_labels(tmp_path / "coco.json")
    assert labels.knows("train/a.b.jpg")
    assert not labels.knows("C:.jpg")


# Names that are no text


def test_names_in_figures_and_files():
    assert readable(NO_TEXT) == "caf\\udce9"
    assert readable("日本 é\n") == "日本 é\n"
    assert split_label(f"{NO_TEXT}=last.pth") == ("caf\\udce9", "last.pth")


def test_files_of_tensors_in_any_place(tmp_path):
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "plain.safetensors", {"key": "value é"})
    (tmp_path / f"{NO_TEXT}.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes())
    for name in ("plain", NO_TEXT):
        read, texts = read_tensors(tmp_path / f"{name}.safetensors")
        assert texts == {"key": "value é"}
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], value) for key, value in tensors.items())


def test_metadata_that_is_no_text_can_be_read_back(tmp_path):
    path = tmp_path / "a.safetensors"
    with MappedFeatures(path, {"name": NO_TEXT}) as file:
        file.allocate(torch.zeros(1, 2, 3, 4), (1, 2, 6, 8), torch.float32)[:] = 1
    assert load(path.read_bytes()).keys() == {"low_res", "high_res"}
    assert read_tensors(path)[1] == {"name": "caf\\udce9"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose name is no text, with a checkpoint, exported weights and two photographs."""
    folder = tmp_path / NO_TEXT
    for number in range(2):
        photo(folder / f"photos/{NO_TEXT}{number}.png", number)
    encoder = create_encoder("toy-vit", "featup", 2)
    save_checkpoint(encoder, folder / "last.pth")
    save_weights(encoder, folder / "last.safetensors")
    monkeypatch.setenv("FEATSHARP_CACHE", str(folder / "cache"))
    return folder


def test_commands_in_a_folder_whose_name_is_no_text(folder, capsys):
    here = ["--device", "cpu"]
    label = f"{NO_TEXT}={folder / 'last.pth'}"
    photos = folder / "photos"
    for command in (
        ["upsample", photos, "--checkpoint", folder / "last.safetensors", "-o", folder / "out", *here],
        ["eval", "reference", "--data", photos, "--checkpoint", label, "--json", folder / "a.json", *here],
        [
            "eval",
            "reference",
            "--data",
            photos,
            "--checkpoint",
            folder / "last.pth",
            "--json",
            folder / "b.json",
            *here,
        ],
        ["figure", "pca", photos / f"{NO_TEXT}0.png", "--checkpoint", label, "-o", folder / "a.png", *here],
    ):
        assert main(list(map(str, command))) == 0, capsys.readouterr().err
    content = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    (encoder,) = content["encoders"]
    assert encoder == "caf\\udce9"
    assert list(content["encoders"][encoder]["items"]) == [f"{NO_TEXT}{number}.png" for number in range(2)]
    assert len(list((folder / "out").glob("*.safetensors"))) == 2


def test_a_training_in_a_folder_whose_name_is_no_text(folder, caplog):
    settings = ["+model=toy-vit", "+upsampler=featup-2x", "batch_size=1", "num_workers=0", "device=cpu"]
    settings += [
        "normalizer.num_samples=2",
        "normalizer.batch_size=2",
        "viz.type=none",
        "progress=false",
    ]  # TensorBoard only warns there
    paths = [f"train_data_dir='{folder}/photos'", f"output_root='{folder}/run'"]
    for steps in (1, 2):
        assert main(["train", *settings, *paths, f"num_training_steps={steps}"]) == 0
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []
    assert "caf\\udce9" in (folder / "run/config.yaml").read_text(encoding="utf-8")


def test_auto_is_the_fastest_device_that_is_there():
    assert [best_device(cuda, mps) for cuda in (True, False) for mps in (True, False)] == ["cuda", "cuda", "mps", "cpu"]
    assert find_device("auto").type == best_device(torch.cuda.is_available(), has_mps())
    assert to_double(torch.ones(2)).dtype == torch.float64


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="has an Apple GPU")
def test_mps_is_refused_in_one_line_where_it_is_not():
    with pytest.raises(ConfigError, match=r"device 'mps' cannot be used here \(.*\); use auto or cpu"):
        find_device("mps")
