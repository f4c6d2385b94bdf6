"""What is tried with each kind of malformed input, in the current folder, and what has to stay as it is."""

import contextlib
import gzip
import importlib
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from PIL import Image
from safetensors import safe_open

from featsharp.builder import create_encoder, save_checkpoint, save_weights
from featsharp.checkpoint import read_checkpoint
from featsharp.cli import main as cli
from featsharp.data._tar import stream_tar
from featsharp.data.filters import ImageFilter
from featsharp.data.images import try_decode
from featsharp.data.mixture import ImageMixture
from featsharp.data.sources import open_source
from featsharp.errors import FeatSharpError
from featsharp.published import load_published
from malformed import commands, files

REFUSED, PROCESSED = "refused", "processed"
UPSAMPLE = "upsample {} --checkpoint tile-2x --backbone toy-vit -o {}"
SEGMENTATION = "eval segmentation --data data --upsampler bilinear-2x --backbone toy-vit --steps 2 --batch 2 --json {}"
FIT = "fit photos/0.png --backbone toy-vit --steps {} --views 4 --dim 8 --size 32x40 -o fits"


class Damage(Exception):
    """Something that had nothing to do with the malformed input came out differently."""


def run(arguments: str | list[str]) -> tuple[int, str]:
    """Run a command in this process; returns its status and what it wrote to stderr."""
    log = Path(os.environ["LOG"])
    before = log.stat().st_size
    try:
        status = cli.main(arguments.split() if isinstance(arguments, str) else arguments)
    except SystemExit as stop:  # of argparse
        status = int(stop.code or 0)
    said = log.read_bytes()[before:].decode(errors="replace")
    if "Traceback (most recent call last)" in said:
        raise RuntimeError(f"a traceback was printed: {said[-1500:]}")
    if status and not said.strip():
        raise RuntimeError(f"status {status} without a word")
    return status, said


def check_same(expected: Path) -> None:
    """Raise Damage unless the files of another folder came out the same here."""
    for path in expected.rglob("*"):
        here = Path(path.relative_to(expected))
        if path.is_file() and (not here.exists() or _content(here) != _content(path)):
            raise Damage(f"{here} came out differently")


def _content(path: Path) -> object:
    """Bytes of a file; those of safetensors with the header parsed, whose order is that of a hash."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


class Kind:
    """A kind of input.

    Attributes:
        header: In words, when an input has got past its header.
        change: What was changed in this one.
        written: Files that hold the input or its own result, which may change.
    """

    header: ClassVar[str]

    def __init__(self, expected: Path) -> None:
        self.expected = expected
        self.change = ""
        self.written: set[str] = set()

    def prepare(self) -> None:
        """Fill the current folder with what works, and `expected` with results of neighbours."""
        Path("photos").mkdir()
        for number in range(3):
            Image.fromarray(files.pixels(number)).save(f"photos/{number}.png")

    def make(self, draw: Random) -> None:
        """Write the malformed input."""
        raise NotImplementedError

    def parses(self) -> bool:
        """Whether it has got past the header, by another reader than ours."""
        raise NotImplementedError

    def attempt(self) -> tuple[str, str]:
        """Try it; returns refused or processed, and what was said."""
        raise NotImplementedError

    def keep(self, names: str) -> None:
        """Move results of neighbours to where they are compared with."""
        for path in Path().glob(names):
            (self.expected / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, self.expected / path)


def opens(path: str) -> bool:
    """Whether Pillow opens a picture and reports a size."""
    try:
        with Image.open(path) as image:
            return min(image.size) > 0
    except Exception:
        return False


class Picture(Kind):
    header = "Pillow opens it and reports a size"

    def prepare(self) -> None:
        super().prepare()
        run(UPSAMPLE.format("photos", "out"))
        self.keep("out/0.*")
        self.keep("out/2.*")

    def make(self, draw: Random) -> None:
        data, self.change, _ = files.picture(draw)
        Path("photos/1.png").write_bytes(data)
        self.written = {"photos/1.png"}

    def parses(self) -> bool:
        return opens("photos/1.png")

    def attempt(self) -> tuple[str, str]:
        status, said = run(UPSAMPLE.format("photos", "out"))
        check_same(self.expected)
        if status:
            return REFUSED, said
        self.written |= {"out/1.png", "out/1.safetensors"}
        with safe_open("out/1.safetensors", "pt") as file:
            if not all(file.get_tensor(name).isfinite().all() for name in ("low_res", "high_res")):
                raise Damage("the features are not finite")
        return PROCESSED, said


class Tar(Kind):
    header = "the header of its first member parses (tarfile), behind the compression where there is one"

    def prepare(self) -> None:
        Path("good.tar").write_bytes(_tar_of({f"{number}.png": _small(number) for number in (7, 8)}))
        Path("bad.tar").write_bytes(_tar_of({f"{number}.png": _small(number) for number in range(4)}))

    def make(self, draw: Random) -> None:
        data, self.change, self.intact = files.tar(draw)
        Path("bad.tar").write_bytes(data)
        self.written = {"bad.tar"}

    def parses(self) -> bool:
        data = Path("bad.tar").read_bytes()
        opened: Callable[..., Any] = {b"\x1f\x8b": gzip.open, b"\xfd7": files.lzma.open}.get(data[:2], io.BytesIO)
        try:
            with opened(io.BytesIO(data) if opened is not io.BytesIO else data) as file:
                tarfile.TarInfo.frombuf(file.read(512), "utf-8", "surrogateescape")
        except Exception:
            return False
        return True

    def attempt(self) -> tuple[str, str]:
        bad = {f"bad.tar/{name}": _small(int(name[-5])) for name in self.intact}
        good = {f"good.tar/{number}.png": _small(number) for number in (7, 8)}
        skipped: list[tuple[str, str]] = []
        with open("bad.tar", "rb") as file:
            streamed = {}
            for name, data, reason in stream_tar(file):
                streamed[f"bad.tar/{name}"] = data
                skipped += [(name, reason)] if reason else []
        source = open_source(".")
        indexed = {source.name(number): source.read(number) for number in range(len(source))}
        skipped += source.skipped
        for number in range(len(source)):
            try_decode(source.encoded(number), skipped)
        mixture = ImageMixture.from_data_dir(".", keep=ImageFilter(1))
        for number in range(4):
            mixture.load(number)
        compressed = "compressed" in self.change
        for wanted, found in ((good, indexed), ({} if compressed else bad, indexed), (bad, streamed)):
            if lost := [name for name, data in wanted.items() if found.get(name) != data]:
                raise Damage(f"{', '.join(lost)} came out differently")
        return (REFUSED, str(skipped[:3])) if skipped else (PROCESSED, "")


def _small(number: int) -> bytes:
    return files.encode(Image.fromarray(files.pixels(number, (16, 16, 3))), "PNG")


def _tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_data() -> None:
    """A data set for segmentation, of four classes."""
    for number in range(6):
        split = "train" if number < 3 else "val"
        for folder in ("images", "labels"):
            Path("data", folder, split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(files.pixels(number)).save(f"data/images/{split}/{number}.png")
        Image.fromarray(files.pixels(number, (60, 80)) % 4).save(f"data/labels/{split}/{number}.png")
    Path("data/classes.txt").write_text("a\nb\nc\nd\n", encoding="utf-8")


def rows() -> dict[str, Any]:
    """Items of the result of the evaluation."""
    return next(iter(json.loads(Path("result.json").read_text(encoding="utf-8"))["encoders"].values()))


class LabelMap(Kind):
    header = "Pillow opens it and reports a size"

    def prepare(self) -> None:
        make_data()
        run(SEGMENTATION.format("result.json"))

    def make(self, draw: Random) -> None:
        # One in eight is a label map of the training images: the head, and so all results, may then differ.
        self.training = draw.random() < 0.12
        path = "data/labels/train/1.png" if self.training else "data/labels/val/4.png"
        data, self.change, _ = files.picture(draw, lossless=True)
        Path(path).write_bytes(data)
        self.path, self.written = path, {path}

    def parses(self) -> bool:
        return opens(self.path)

    def attempt(self) -> tuple[str, str]:
        before = rows()["items"]
        status, said = run(SEGMENTATION.format("result.json"))
        if status:
            return REFUSED, said
        self.written |= {"result.json"}
        result = rows()
        for name in ("images/val/3.png", "images/val/5.png"):
            if not self.training and result["items"].get(name) != before[name]:
                raise Damage(f"{name} came out differently: {result['items'].get(name)} instead of {before[name]}")
        skipped = result["skipped"] + result["result"]["train_skipped"]
        return (REFUSED, str(skipped)) if skipped else (PROCESSED, said)


class Tensors(Kind):
    header = "the JSON of a safetensors file parses to a mapping; the zip of a checkpoint lists its members"
    files: ClassVar = ("good.safetensors", "good.pth", "out/last.pth", "fits/0.pth", "cache/*/*.safetensors")

    def prepare(self) -> None:
        super().prepare()
        make_data()
        torch.manual_seed(0)
        encoder = create_encoder("toy-vit", "featsharp", 2)
        save_weights(encoder, "good.safetensors")
        save_checkpoint(encoder, "good.pth")
        run("upsample photos/2.png --checkpoint good.safetensors -o after")
        self.keep("after/*")
        run(["train", *commands.CONFIGURATION])
        run(FIT.format(2))
        run(SEGMENTATION.format("result.json") + " --cache-dir cache")

    def make(self, draw: Random) -> None:
        pattern = draw.choice(("good.safetensors",) * 4 + ("good.pth",) * 2 + self.files[2:])
        path = draw.choice(sorted(Path().glob(pattern)))
        data = path.read_bytes()
        if path.suffix == ".pth":
            data, change, _ = files.checkpoint(draw, data, _saved, torch.load(path, weights_only=True))
        else:
            data, change, _ = files.safetensors(draw, data)
        self.change = f"{change} of {path}"
        self.path = path if path.parent.name else path.with_stem("bad")
        self.path.write_bytes(data)
        self.written = {str(self.path)}
        self.published = draw.random() < 0.2

    def parses(self) -> bool:
        data = self.path.read_bytes()
        try:
            if self.path.suffix == ".pth":
                return len(zipfile.ZipFile(io.BytesIO(data)).namelist()) > 0
            (length,) = struct.unpack_from("<Q", data)
            return isinstance(json.loads(data[8 : 8 + length]), dict)
        except Exception:
            return False

    def attempt(self) -> tuple[str, str]:
        folder = self.path.parts[0]
        if folder == "out":
            status, said = run(["train", *commands.CONFIGURATION, "num_training_steps=2"])
            self.written |= {"out/best.pth", "out/config.yaml"} if status == 0 else set()
            if "returned NaN" in said:  # noticed after the run has gone on
                self.written |= {"out/config.yaml"}
        elif folder == "fits":
            status, said = run(FIT.format(3))
            self.written |= {"fits/0.png", "fits/0.safetensors"} if status == 0 else set()
        elif folder == "cache":
            status, said = run(SEGMENTATION.format("again.json") + " --cache-dir cache")
        else:
            status, said = run(["upsample", "photos/0.png", "--checkpoint", folder, "-o", "new"])
            run(["export", folder, "-o", "exported.safetensors"])
            if self.published:
                with contextlib.suppress(FeatSharpError):
                    load_published("lift", folder, "toy-vit")
        run("upsample photos/2.png --checkpoint good.safetensors -o after")
        check_same(self.expected)
        return (REFUSED if status else PROCESSED), said


def _saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Configuration(Kind):
    header = "Hydra's parser reads every override"

    def prepare(self) -> None:
        super().prepare()
        run(["train", *commands.CONFIGURATION])
        read_checkpoint("out/last.pth")

    def make(self, draw: Random) -> None:
        self.arguments, self.change = commands.configuration(draw)

    def parses(self) -> bool:
        try:
            OverridesParser.create().parse_overrides(self.arguments[1:])
        except (HydraException, RecursionError):
            return False
        return True

    def attempt(self) -> tuple[str, str]:
        status, said = run(self.arguments)
        if status == 0:
            self.written |= {"out/last.pth", "out/best.pth", "out/config.yaml"}
            read_checkpoint("out/last.pth")
        return (REFUSED if status else PROCESSED), said


class Command(Kind):
    header = "argparse reaches the function run of the command"

    def prepare(self) -> None:
        super().prepare()
        make_data()
        torch.manual_seed(0)
        save_weights(create_encoder("toy-vit", "featsharp", 2), "good.safetensors")
        run(UPSAMPLE.format("photos/0.png", "earlier"))
        run(SEGMENTATION.format("data.json"))
        run(["train", *commands.CONFIGURATION])

    def make(self, draw: Random) -> None:
        self.arguments, self.change = commands.command(draw)
        self.reached = False

    def parses(self) -> bool:
        """Make `run` of every command note that it was reached; known after the attempt."""
        for name in cli.COMMANDS:
            module = importlib.import_module(f"featsharp.cli.{name}")
            module.run = self._noting(module.run)
        return False

    def _noting(self, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def reached(arguments: Any) -> Any:
            self.reached = True
            return function(arguments)

        return reached

    def attempt(self) -> tuple[str, str]:
        status, said = run(self.arguments)
        if status == 0:  # what it was told to write over
            self.written |= {name for flag, name in pairwise(self.arguments) if flag in ("-o", "--output", "--json")}
        return (REFUSED if status else PROCESSED), said


KINDS: dict[str, type[Kind]] = {
    "picture": Picture,
    "tar": Tar,
    "configuration": Configuration,
    "label-map": LabelMap,
    "tensors": Tensors,
    "command": Command,
}
