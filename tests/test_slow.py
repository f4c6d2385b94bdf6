"""The claim of the whole package on real photographs and a real backbone: minutes, not seconds."""

from pathlib import Path

import pytest

import featsharp
from featsharp.configs.compose import compose
from featsharp.evaluation.fidelity import FidelityMeter
from featsharp.evaluation.samples import ImageSet
from featsharp.train import train

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the photographs of shared/data are not here")
@pytest.mark.timeout(900)
def test_featsharp_beats_bilinear_and_tile_after_a_short_training(tmp_path):
    names = sorted(path.name for path in PHOTOS.glob("*.jpg"))
    for folder, chosen in (("train", names[:60]), ("heldout", names[-8:])):
        (tmp_path / folder).mkdir()
        for name in chosen:
            (tmp_path / folder / name).symlink_to(PHOTOS / name)
    overrides = [f"train_data_dir={tmp_path / 'train'}", f"output_base={tmp_path}", "output_subdir=run"]
    train(
        compose(["+model=vits14-focus", "+upsampler=featsharp-2x", "num_training_steps=30", "batch_size=2", *overrides])
    )
    encoders = {
        name: featsharp.load_from_file(f"{name}-2x", featurizer="vits14-focus") for name in ("bilinear", "tile")
    }
    encoders["featsharp"] = featsharp.load_from_file(tmp_path / "run" / "last.pth")
    scores = {}
    for name, encoder in encoders.items():
        meter = FidelityMeter(encoder)
        for _, image in ImageSet(tmp_path / "heldout"):
            meter.add(image)
        scores[name] = meter.result()["area"].value
    assert scores["featsharp"] > 1.1 * scores["bilinear"] > scores["tile"]
