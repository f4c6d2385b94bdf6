"""What docs/training.md shows works as it is written there."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ranks import run_ranks

from featsharp.train import main

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_writer_of_the_page_writes_its_files(tmp_path, monkeypatch):
    """U17: the worked example, on the command line of the page with a small model."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "my_writers.py").write_text(code)
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / "0.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = re.findall(r"python -m featsharp.train (.* viz.type=my_writers:Files)$", PAGE, re.MULTILINE)
    small = "num_training_steps=2 log_frequency=1 batch_size=1 num_workers=0 normalizer.num_samples=4 progress=false"
    assert main([*command.replace("vits14-focus", "toy-vit").split(), *small.split()]) == 0
    folder = tmp_path / "outputs" / "toy-vit" / "64"
    rows = [line.split(",") for line in (folder / "scalars.csv").read_text().splitlines()]
    assert [step for step, name, _ in rows if name == "loss/total"] == ["1", "2"]
    picture = Image.open(folder / "pictures" / "val" / "features_0_000002.png")
    assert picture.size == (4 * 224, 224)


@pytest.mark.slow
def test_several_processes_find_modules_of_the_working_folder(tmp_path):
    """The page's command for them, on two CPU processes; only one of them reports, and to a module of the user."""
    (command,) = re.findall(r"^torchrun --nproc-per-node=8 (-m featsharp.train .*)$", PAGE, re.MULTILINE)
    for given, small in (("siglip2", "toy-vit"), ("featsharp-4x", "featup-2x"), ("shards", "photos")):
        command = command.replace(given, small)
    (tmp_path / "photos").mkdir()
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{seed}.png")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "writers_of_mine.py").write_text(code)
    small = "num_training_steps=2 log_frequency=1 batch_size=1 num_workers=0 normalizer.num_samples=4 progress=false"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = run_ranks(
        [*launcher, *command.split(), *small.split(), "viz.type=writers_of_mine:Files"],
        tmp_path / "outputs",
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FEATSHARP_CACHE": "cache"},
    )
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "outputs" / "toy-vit" / "64" / "scalars.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows if "loss/total" in row] == ["1", "2"]
