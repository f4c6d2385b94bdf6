"""LoftUp: masks, refinement and affinities against loops, and short runs of the peers' configurations."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.builder import create_encoder, load_from_file, save_checkpoint
from featsharp.checkpoint import read_checkpoint
from featsharp.configs.compose import compose
from featsharp.data.mixture import Division, ImageMixture
from featsharp.data.views import ViewConfig, base_view, cut_values, draw_crop, sample_views
from featsharp.errors import ConfigError, DataError
from featsharp.model import SharpEncoder
from featsharp.train import main
from featsharp.training.objectives import create_objective
from featsharp.training.objectives.loftup import LoftUpConfig, affinities, read_masks, refine, shrink_masks

LOFTUP = ("+upsampler=loftup-2x", "objective=loftup", "normalizer=none", "views.num_views=1")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of three flat regions, with the masks of them."""
    rng = np.random.default_rng(0)
    for folder in ("photos", "masks"):
        (tmp_path / folder).mkdir()
    for number in range(3):
        masks = np.kron(rng.integers(0, 4, (3, 4)), np.ones((40, 40), int)).astype(np.uint16)
        colours = rng.integers(0, 256, (4, 3), np.uint8)[masks]
        Image.fromarray(colours).save(tmp_path / f"photos/{number}.png")
        Image.fromarray(masks).save(tmp_path / f"masks/{number}.png")
    return tmp_path / "photos"


def test_features_move_to_the_mean_of_their_mask():
    features = torch.randn(2, 5, 3, 4)
    masks = torch.randint(0, 3, (2, 3, 4))
    expected = features.clone()
    for b in range(2):
        for number in (1, 2):
            inside = masks[b] == number
            if inside.any():
                mean = features[b][:, inside].mean(1)
                expected[b][:, inside] = 0.2 * features[b][:, inside] + 0.8 * mean[:, None]
    torch.testing.assert_close(refine(features, masks, 0.8), expected)
    assert torch.equal(refine(features, torch.zeros(2, 3, 4, dtype=torch.long), 0.8), features)


def test_affinities_are_cosines_without_the_border():
    features = torch.randn(1, 3, 10, 12)
    inner = features[0, :, 1:9, 1:11].reshape(3, -1)
    found = affinities(features)
    assert found.shape == (1, 80, 80)
    for i, j in ((0, 0), (3, 70), (79, 12)):
        cosine = torch.cosine_similarity(inner[:, i], inner[:, j], dim=0)
        assert found[0, i, j] == pytest.approx(float(cosine), abs=1e-5)


def test_masks_are_cut_as_the_picture_is():
    """A picture whose grey is the number of its mask shows the same crop."""
    values = np.kron(np.arange(12).reshape(3, 4), np.ones((30, 30), int))
    picture = Image.fromarray((20 * values).astype(np.uint8)).convert("RGB")
    config = ViewConfig(num_views=1, zoom=[1.0, 2.0])
    for seed in range(4):
        views = sample_views(picture, (42, 70), config, np.random.default_rng(seed))
        shown = base_view(type(views)(*(x[None] for x in views)))[0][0, 0] * 255 / 20
        cut = cut_values(values, (42, 70), *draw_crop(config, np.random.default_rng(seed)))
        flat = np.ones(cut.shape, bool)  # away from edges
        for step in (-3, 3):
            flat &= (np.roll(cut, step, 0) == cut) & (np.roll(cut, step, 1) == cut)
        assert flat.mean() > 0.3
        assert np.abs(shown.numpy() - cut)[flat].max() < 0.1


def test_masks_that_are_missing_or_do_not_fit_are_named(photos, tmp_path):
    assert read_masks(tmp_path / "masks", "photos/1.jpg", (120, 160)).dtype == np.int32
    with pytest.raises(DataError, match=r"7\.png cannot be read"):
        read_masks(tmp_path / "masks", "7.png", (120, 160))
    with pytest.raises(DataError, match=r"uint16 \(120, 160\); expected a folder with STEM\.png"):
        read_masks(tmp_path / "masks", "1.png", (120, 161))
    encoder = create_encoder("toy-vit", "loftup", 2)
    with pytest.raises(
        ConfigError, match=re.escape(f"objective.masks={tmp_path / 'none'} is not a folder with STEM.png")
    ):
        create_objective(encoder, LoftUpConfig(masks=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"objective\.start=CHECKPOINT"):
        create_objective(encoder, LoftUpConfig(masks=str(tmp_path / "masks"), stage=2))
    with pytest.raises(ConfigError, match=r"objective\.masks"):
        compose(["+model=toy-vit", *LOFTUP, f"train_data_dir={photos}"])


def test_shrunk_masks_are_those_at_the_centres_of_cells():
    masks = torch.arange(24).view(1, 4, 6)
    assert shrink_masks(masks, (2, 3)).tolist() == [[[7, 9, 11], [19, 21, 23]]]


def prepare(photos: Path, *overrides: str) -> tuple[SharpEncoder, Any, Any]:
    """An encoder, its objective, and a batch for it."""
    config = compose(["+model=toy-vit", f"train_data_dir={photos}", *overrides])
    torch.manual_seed(0)
    encoder = create_encoder(
        config.model.name, config.upsampler.name, config.upsampler.factor, normalizer=config.normalizer.name
    )
    encoder.upsampler.requires_grad_().train()
    objective = create_objective(encoder, config.objective).train()
    dataset = objective.open_dataset(encoder, ImageMixture.from_data_dir(str(photos)), config.views, 0)
    batch = dataset.load([0, 1], Division(batch_size=2))
    assert not batch.skipped
    return encoder, objective, batch.samples


def lower_loss(photos: Path, *overrides: str, steps: int = 12) -> tuple[float, float, Any]:
    """Train on one batch; the first and the last loss, and the objective."""
    encoder, objective, samples = prepare(photos, *overrides)
    parameters = [p for p in (*encoder.upsampler.parameters(), *objective.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    losses = []
    for _ in range(steps):
        torch.manual_seed(1)  # the same crops and projections
        optimizer.zero_grad()
        losses.append(objective.backward(encoder, samples, encoder.backbone.input_size).total.item())
        optimizer.step()
    return losses[0], losses[-1], objective


@pytest.mark.slow  # ten seconds each
@pytest.mark.parametrize("upsampler", ["naf", "uplift-2x"])
def test_a_short_run_of_a_peer_lowers_its_loss(photos, upsampler):
    first, last, objective = lower_loss(photos, f"+upsampler={upsampler}")
    assert last < 0.97 * first
    assert type(objective).__name__ == "ReconstructionObjective"


def test_each_stage_has_its_term(photos, tmp_path):
    save_checkpoint(create_encoder("toy-vit", "loftup", 2), tmp_path / "first.pth")
    second = ("objective.stage=2", f"objective.start={tmp_path / 'first.pth'}")
    for stage, name, weight in (((), "masks", 1), (second, "affinity", 0.5)):
        common = (*LOFTUP, f"objective.masks={tmp_path / 'masks'}", "objective.affinity_weight=0.5")
        encoder, objective, samples = prepare(photos, *common, *stage)
        losses = objective.backward(encoder, samples, encoder.backbone.input_size)
        assert losses.terms[name] > 0
        others = sum(value.item() for key, value in losses.terms.items() if key != name)
        assert losses.total.item() >= losses.reconstruction.item() + weight * losses.terms[name].item() - 1e-5
        assert others >= 0
        gradients = [p.grad for p in encoder.upsampler.parameters()]
        assert all(one is not None and one.isfinite().all() for one in gradients)


@pytest.mark.slow
def test_both_stages_of_loftup_lower_their_loss(photos, tmp_path):
    masks = f"objective.masks={tmp_path / 'masks'}"
    first, last, _ = lower_loss(photos, *LOFTUP, masks, steps=5)
    assert last < 0.97 * first
    start = create_encoder("toy-vit", "loftup", 2)
    save_checkpoint(start, tmp_path / "stage1.pth")
    second = ("objective.stage=2", f"objective.start={tmp_path / 'stage1.pth'}", "objective.mask_strength=0.5")
    first, last, objective = lower_loss(photos, *LOFTUP, masks, *second, steps=11)
    assert last < 0.97 * first
    # The teacher started from the checkpoint, and came a hundredth of the way once in ten steps.
    weight = "layers.0.in_proj.weight"
    moved = (objective.teacher.state_dict()[weight] - start.upsampler.state_dict()[weight]).abs().max()
    assert 0 < moved < 1e-3
    assert not any(p.requires_grad for p in objective.teacher.parameters())


@pytest.mark.slow
def test_the_second_stage_starts_from_the_checkpoint_of_the_first(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        common = ["+model=toy-vit", *LOFTUP, "train_data_dir=photos", "objective.masks=masks", f"output_subdir={name}"]
        quiet = ["viz.type=none", "viz.num_images=1", "num_workers=0", "batch_size=2", "progress=false"]
        assert main([*common, *quiet, "num_training_steps=2", *overrides]) == 0
        return read_checkpoint(f"outputs/{name}/last.pth")["training"]["objective"]

    assert not any(key.startswith("teacher.") for key in run("first"))
    second = run("second", "objective.stage=2", "objective.start=outputs/first/last.pth", "optim.learning_rate=0")
    first = load_from_file("outputs/first/last.pth").upsampler.state_dict()
    for key, value in first.items():
        if value.is_floating_point() and "running" not in key:
            assert torch.equal(second[f"teacher.{key}"], value), key
