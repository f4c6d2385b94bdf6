"""Writers: what they are told arrives, several are one, and none of them can end a run."""

import io
import json
import os
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from featsharp.errors import ConfigError, MissingDependencyError
from featsharp.training.loggers import NullWriter, VizWriter, Writers, get_visualizer, writer_names
from featsharp.training.loggers.wandb import ID_FILE

CONFIG = {"optim": {"learning_rate": 0.5}, "views": {"zoom": [1.0, 2.0]}, "viz": {"entity": None}}
PICTURE = torch.linspace(0, 1, 3 * 4 * 6).reshape(3, 4, 6)


class Recorder(VizWriter):
    """Keeps all calls; fails from the ``fail_at``-th on."""

    def __init__(self, folder: Path | None = None, *, fail_at: int = 1000) -> None:
        self.folder, self.fail_at = folder, fail_at
        self.calls: list[tuple] = []

    def _keep(self, *call: object) -> None:
        self.calls.append(call)
        if len(self.calls) >= self.fail_at:
            raise OSError(28, "No space\nleft on device")

    def config(self, config) -> None:
        self._keep("config", config)

    def scalar(self, name: str, value: float, step: int) -> None:
        self._keep("scalar", name, value, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        self._keep("image", name, step)

    def close(self) -> None:
        self._keep("close")


class Unrelated:
    """Not derived from VizWriter, but with some of its methods."""

    def scalar(self, name: str, value: float, step: int) -> None: ...

    def close(self) -> None: ...


class Unreachable(VizWriter):
    def __init__(self, folder: Path) -> None:
        raise ConnectionError("no route to host")


def tell_all(writer: VizWriter) -> None:
    writer.config(CONFIG)
    writer.scalar("loss/total", 0.25, 10)
    writer.scalar("optim/gradient_norm", 3.0, 10)
    writer.scalar("loss/total", 0.125, 20)
    writer.image("val/features_0", PICTURE, 20)
    writer.close()


def pixels(picture: Tensor) -> np.ndarray:
    return (picture * 255).round().permute(1, 2, 0).numpy()


# One writer


def test_tensorboard_has_scalars_pictures_and_the_configuration(tmp_path):
    """U16."""
    tell_all(get_visualizer("tensorboard", tmp_path))
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss/total")] == [(10, 0.25), (20, 0.125)]
    (event,) = reader.Images("val/features_0")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)), float)
    assert event.step == 20
    assert np.abs(shown - pixels(PICTURE)).max() <= 1
    (text,) = reader.Tensors("config/text_summary")
    lines = text.tensor_proto.string_val[0].decode().splitlines()
    assert "      learning_rate: 0.5" in lines  # four for Markdown, two for YAML
    assert "      entity: null" in lines


def test_tensorboard_shows_no_step_twice_when_a_run_is_resumed(tmp_path):
    for start, last, value in ((0, 5, 1.0), (3, 6, 2.0), (0, 2, 3.0)):  # the last one had lost its checkpoint
        writer = get_visualizer("tensorboard", tmp_path, step=start)
        writer.config(CONFIG)
        for step in range(start + 1, last + 1):
            writer.scalar("loss/total", value, step)
        writer.close()
        reader = EventAccumulator(str(tmp_path))
        reader.Reload()
        shown = [(event.step, event.value) for event in reader.Scalars("loss/total")]
        assert shown[start:] == [(step, value) for step in range(start + 1, last + 1)]
        assert [step for step, _ in shown] == list(range(1, last + 1))


def read_log(content: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, after a header of 7 bytes: blocks of 32 KiB, parts of crc, size, kind."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if position % 2**15 > 2**15 - 7:  # too little of the block is left for the start of a part
            position += -position % 2**15
            continue
        _, size, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(run: Path) -> tuple[dict, list[dict]]:
    """Configuration and history rows of an offline run."""
    from wandb.proto import wandb_internal_pb2

    def values(items: object) -> dict:
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    (file,) = run.glob("*.wandb")
    config: dict = {}
    rows = []
    for data in read_log(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        config |= values(record.run.config.update) | values(record.config.update)
        if record.history.item:
            rows.append(values(record.history.item))
    return config, rows


@pytest.fixture
def no_wandb_settings(monkeypatch, tmp_path):
    """No account, no network and no settings of the machine."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.slow
def test_wandb_offline_writes_a_run_folder(tmp_path, no_wandb_settings):
    """U15: rows of scalars by step, a picture, the configuration; a second writer goes on with the same run."""
    pytest.importorskip("wandb")
    for _ in range(2):
        tell_all(get_visualizer("wandb", tmp_path, entity="lab", project="sharp", mode="offline"))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    run_id = (tmp_path / ID_FILE).read_text()
    assert len(run_id) == 8
    assert all(run.name.endswith(f"-{run_id}") for run in runs)
    config, rows = read_wandb(runs[0])
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[0]["loss/total"] == 0.25
    assert rows[0]["optim/gradient_norm"] == 3.0
    assert rows[1]["loss/total"] == 0.125
    (picture,) = (runs[0] / "files" / "media").rglob("*.png")
    assert np.abs(np.asarray(Image.open(picture).convert("RGB"), float) - pixels(PICTURE)).max() <= 1


def test_wandb_without_account_is_a_warning(tmp_path, no_wandb_settings, caplog):
    pytest.importorskip("wandb")
    writer = get_visualizer(["wandb"], tmp_path, mode="online")
    tell_all(writer)
    # wandb has a log of its own.
    (message,) = [record.message for record in caplog.records if record.name.startswith("featsharp")]
    assert message.startswith("nothing more is reported to wandb (UsageError: ")


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_package_names_the_command(tmp_path, monkeypatch, kind, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "featsharp\[(train|wandb)\]"'):
        get_visualizer(kind, tmp_path)
    assert list(tmp_path.iterdir()) == []


# One's own


def test_a_class_of_the_user_is_built_with_the_folder(tmp_path):
    """U17."""
    writer = get_visualizer(f"{__name__}:Recorder", tmp_path)
    (own,) = writer._writers.values()
    assert isinstance(own, Recorder)
    assert own.folder == tmp_path
    tell_all(writer)
    assert [call[0] for call in own.calls] == ["config", "scalar", "scalar", "scalar", "image", "close"]
    assert own.calls[1] == ("scalar", "loss/total", 0.25, 10)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("tensorbord", "unknown viz.type 'tensorbord'; did you mean 'tensorboard'?"),
        (["none", "wand"], "did you mean 'wandb'?"),
        (None, "viz.type is a name or a list of names"),
        ([], r"got \[\]"),
        (3, "got 3"),
        ([["wandb"]], "unknown viz.type"),
        ("no_such_module:Writer", "'no_such_module' cannot be imported"),
        (":Writer", "viz.type names a class as 'my_module:my_class'; got ':Writer'"),
        (f"{__name__}:Recoder", "did you mean 'Recorder'"),
        (f"{__name__}:Unrelated", "is no VizWriter: it lacks config, image; derive it from"),
        (f"{__name__}:CONFIG", "is no VizWriter"),
    ],
)
def test_names_that_are_no_writer(tmp_path, kind, said):
    with pytest.raises(ConfigError, match=said):
        get_visualizer(kind, tmp_path)


def test_names_are_checked_without_importing_anything():
    assert writer_names(["wandb", "none", "wandb", "no_such_module:Writer"]) == [
        "wandb",
        "none",
        "no_such_module:Writer",
    ]


# Several, and what can go wrong


def test_all_of_a_list_are_told(tmp_path):
    writer = get_visualizer(["tensorboard", "none", f"{__name__}:Recorder"], tmp_path)
    own = writer._writers[f"{__name__}:Recorder"]
    tell_all(writer)
    assert len(own.calls) == 6
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [event.value for event in reader.Scalars("loss/total")] == [0.25, 0.125]


@pytest.mark.parametrize("fail_at", range(1, 7))
def test_a_writer_that_raises_is_dropped_with_one_warning(caplog, fail_at):
    failing, sound = Recorder(fail_at=fail_at), Recorder()
    tell_all(Writers({"failing": lambda: failing, "sound": lambda: sound}))
    assert len(failing.calls) == fail_at
    assert len(sound.calls) == 6
    assert caplog.messages == ["nothing more is reported to failing (OSError: [Errno 28] No space left on device)"]


def test_a_tracker_out_of_reach_at_the_start_is_dropped(tmp_path, caplog):
    writer = get_visualizer([f"{__name__}:Unreachable", f"{__name__}:Recorder"], tmp_path)
    assert list(writer._writers) == [f"{__name__}:Recorder"]
    assert caplog.messages == [
        f"nothing more is reported to {__name__}:Unreachable (ConnectionError: no route to host)"
    ]


def test_an_interruption_is_no_failure_of_the_writer():
    class Interrupted(NullWriter):
        def scalar(self, name: str, value: float, step: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Writers({"x": Interrupted}).scalar("loss/total", 0.0, 1)


def test_a_writer_that_cannot_be_closed_does_not_hide_the_error_of_the_run():
    failing = Recorder(fail_at=1)
    writer = Writers({"failing": lambda: failing})
    with pytest.raises(ValueError, match="the run's own"), closing(writer):
        raise ValueError("the run's own")
    assert failing.calls == [("close",)]
