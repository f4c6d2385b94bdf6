"""The quick protocols of keypoints, boundaries and segmentation, each against loops or plain torch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colour import PatchColour
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from featsharp.builder import create_encoder
from featsharp.errors import ConfigError
from featsharp.evaluation.boundaries import BoundaryTask
from featsharp.evaluation.correspondence import CorrespondenceTask
from featsharp.evaluation.quick_head import QuickSchedule, fit_heads
from featsharp.evaluation.ridges import agreed_boundaries, count_near, find_ridges
from featsharp.evaluation.runner import Subject, Task, evaluate
from featsharp.evaluation.segmentation import SegmentationTask, confusion, pool_rows, score_image


def run(task: Task, encoder: object = None) -> dict:
    encoder = encoder or create_encoder(PatchColour((32, 32), offset=3), "bilinear", 2)
    return evaluate(task, [Subject("x", lambda: encoder)], progress=False)["x"]  # type: ignore[arg-type, return-value]


def noise(seed: int, height: int, width: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


# Keypoints


def write_group(root: Path) -> dict[str, np.ndarray]:
    """Three pictures of unlike shapes with points as MATLAB counts them."""
    rng = np.random.default_rng(5)
    (root / "g").mkdir()
    points = {}
    for number, (height, width) in enumerate([(60, 90), (80, 80), (70, 50)]):
        Image.fromarray(noise(number, height, width)).save(root / "g" / f"{number}.png")
        points[str(number)] = rng.uniform(5, (width - 5, height - 5), (12, 2))
        savemat(root / "g" / f"{number}.mat", {"pts_coord": points[str(number)].T})
    return points


def test_keypoints_are_matched_with_cells_of_the_grid(tmp_path):
    points = write_group(tmp_path)
    encoder = create_encoder(PatchColour((32, 32), offset=3), "bilinear", 2)
    maps, grids, sizes = {}, {}, {}
    with torch.inference_mode():
        for name in points:
            image = Image.open(tmp_path / "g" / f"{name}.png")
            sizes[name] = image.size
            pixels = np.array(image.resize((64, 64), Image.Resampling.BICUBIC))
            x = encoder.input_conditioner(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
            maps[name] = F.normalize(encoder(x, low_res_size=(32, 32)).high_res, dim=1)
            grids[name] = F.normalize(F.interpolate(maps[name], (64, 64), mode="bilinear"), dim=1)[0]
    outcome = run(CorrespondenceTask(tmp_path, protocol="quick", alphas=(0.3, 0.1)), encoder)
    for a in points:
        for b in points:
            if a == b:
                continue
            hits = [0, 0]
            for source, target in zip(points[a], points[b], strict=True):
                at = torch.tensor(2 * source / sizes[a] - 1, dtype=torch.float32).view(1, 1, 1, 2)
                query = F.grid_sample(maps[a], at, align_corners=False)[0, :, 0, 0]
                row, column = divmod(int(torch.einsum("c,chw->hw", query, grids[b]).argmax()), 64)
                error = math.dist(((column + 0.5) / 64 * sizes[b][0], (row + 0.5) / 64 * sizes[b][1]), target)
                side = np.ptp(points[b], axis=0).max()
                hits = [hit + (error < alpha * side) for hit, alpha in zip(hits, (0.3, 0.1), strict=True)]
            assert outcome["items"][f"{a}-{b}:g"]["hits"] == hits
    assert 0 < outcome["result"]["pck@0.3"]["value"] < 1


# Boundaries


def test_ridges_against_loops():
    features = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))
    size = (22, 31)
    ridges = find_ridges(features, size)
    cells = F.interpolate(F.normalize(features[None], dim=1), (11, 15), mode="bilinear")[0]
    cells = cells / cells.norm(dim=0)
    change = torch.zeros(11, 15)
    for i in range(11):
        for j in range(15):
            if 0 < j < 14:
                change[i, j] += 1 - cells[:, i, j - 1] @ cells[:, i, j + 1]
            if 0 < i < 10:
                change[i, j] += 1 - cells[:, i - 1, j] @ cells[:, i + 1, j]
    change = F.interpolate(change[None, None], size, mode="bilinear")[0, 0].numpy()
    for i in range(size[0]):
        for j in range(size[1]):
            around = change[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].max()
            if abs(change[i, j] - 0.98 * around) > 1e-5:
                assert ridges.ridge[i, j] == (change[i, j] >= 0.98 * around)
            smaller = (change < change[i, j] - 1e-5).mean()
            not_larger = (change <= change[i, j] + 1e-5).mean()
            assert smaller - 1e-6 <= ridges.rank[i, j] <= not_larger


def test_pixels_near_each_other_against_loops():
    rng = np.random.default_rng(0)
    ridges = find_ridges(torch.randn(5, 6, 6), (24, 30))
    human = rng.random((24, 30)) < 0.03
    thresholds, tolerance = (0.2, 0.7, 1.5), 2.3
    counts = count_near(ridges, human, thresholds, tolerance)
    for threshold, row in zip(thresholds, counts.tolist(), strict=True):
        predicted = [(i, j) for i, j in np.argwhere(ridges.ridge) if ridges.rank[i, j] > threshold]
        drawn = [tuple(place) for place in np.argwhere(human)]
        right = sum(any(math.dist(p, q) <= tolerance for q in drawn) for p in predicted)
        reached = sum(any(math.dist(p, q) <= tolerance for p in predicted) for q in drawn)
        assert row == [right, len(predicted), reached, len(drawn)]
    assert counts[2].tolist() == [0, 0, 0, human.sum()]


def test_boundaries_are_those_that_enough_people_drew():
    maps = [np.array([[bool(number < drawn) for drawn in (0, 2, 3, 10)]]) for number in range(10)]
    assert agreed_boundaries(maps).tolist() == [[False, False, True, True]]


def test_boundaries_of_a_rectangle_are_found(tmp_path):
    for folder in ("images", "groundTruth"):
        (tmp_path / folder).mkdir()
    regions = np.zeros((192, 256), np.uint8)
    regions[40:152, 56:200] = 1  # on borders of tiles' cells, in the middle of those of the whole picture
    line = np.zeros(regions.shape, bool)
    line[:-1] |= regions[:-1] != regions[1:]
    line[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    Image.fromarray(np.array([[200, 60, 30], [30, 90, 220]], np.uint8)[regions]).save(tmp_path / "images/a.png")
    cell = np.empty((1, 1), object)
    cell[0, 0] = {"Segmentation": regions, "Boundaries": line}
    savemat(tmp_path / "groundTruth/a.mat", {"groundTruth": cell})
    task = BoundaryTask(tmp_path, protocol="quick")
    sharp, blurred = (
        run(task, create_encoder(PatchColour((96, 128), offset=3), name, factor))["result"]
        for name, factor in (("tile", 2), ("identity", 1))
    )
    assert sharp["ods_f"]["value"] > 0.95 > blurred["ods_f"]["value"]
    assert len(sharp["curve"]) == 25


# Segmentation


def test_heads_are_those_of_plain_torch():
    maps = torch.randn(13, 6, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    labels = (maps[:, :3].argmax(1)).to(torch.int16)
    labels[0, 0] = -1

    def loss(logits: Tensor, truth: Tensor) -> Tensor:
        return F.cross_entropy(logits, truth.long(), ignore_index=-1)

    before = torch.get_rng_state()
    probe = fit_heads(maps.__getitem__, labels, 3, loss, QuickSchedule(heads=2, epochs=3, batch=4), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    mean, deviation = maps.mean((0, 2, 3))[:, None, None], maps.std((0, 2, 3))[:, None, None]
    expected = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        head = torch.nn.Conv2d(6, 3, 1)
        optimizer = torch.optim.AdamW(head.parameters(), 5e-3, weight_decay=1e-3)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=9)
        for _ in range(3):
            for chosen in torch.randperm(13)[:12].reshape(3, 4):
                optimizer.zero_grad()
                loss(head((maps[chosen] - mean) / deviation), labels[chosen]).backward()
                optimizer.step()
                cycle.step()
        expected.append(head((maps - mean) / deviation))
    torch.testing.assert_close(probe(maps), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)
    assert not probe.training


def test_scores_are_means_over_heads():
    rng = np.random.default_rng(0)
    truths, predictions = rng.integers(-1, 3, (4, 6, 7)), rng.integers(0, 3, (4, 2, 6, 7))
    rows = [score_image(*(confusion(t, p, 3) for p in both)) for t, both in zip(truths, predictions, strict=True)]
    pooled = pool_rows(rows, ["a", "b", "c"], heads=2)
    of_heads = []
    for head in range(2):
        shares = []
        for c in range(3):
            predicted, true = predictions[:, head] == c, truths == c
            shares.append((predicted & true).sum() / ((predicted & (truths >= 0)) | true).sum())
        of_heads.append(shares)
    assert pooled["miou"].value == pytest.approx(np.mean(of_heads))
    assert [pooled["iou"][name] for name in "abc"] == pytest.approx(np.mean(of_heads, axis=0).tolist())
    assert pooled["miou"].low < pooled["miou"].value < pooled["miou"].high
    hits = [(predictions[:, head] == truths).sum() / (truths >= 0).sum() for head in range(2)]
    assert pooled["pixel_accuracy"].value == pytest.approx(np.mean(hits))


@pytest.mark.slow
def test_colours_are_segmented(tmp_path):
    for split, count in (("train", 64), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for number in range(count):
            regions = np.zeros((64, 96), np.uint8)
            regions[:, 16 * (1 + number % 4) :] = 1
            colours = np.array([[200, 60, 30], [30, 90, 220]], np.uint8)
            Image.fromarray(colours[regions]).save(tmp_path / f"images/{split}/{number}.png")
            Image.fromarray(regions).save(tmp_path / f"labels/{split}/{number}.png")
    task = SegmentationTask(tmp_path, protocol="quick", classes=2, label_size=(16, 24))
    encoder = create_encoder(PatchColour((32, 48), offset=3), "tile", 2)
    first = run(task, encoder)["result"]
    assert first["miou"]["value"] > 0.9
    assert first["train_images"] == 64
    assert run(task, encoder)["result"] == first
    assert run(SegmentationTask(tmp_path, protocol="quick", classes=2), encoder)["result"]["label_size"] == [90, 120]


# Settings


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (CorrespondenceTask, {"fit": "stretch"}, "has no --fit"),
        (BoundaryTask, {"tolerance": 0.01}, "has no --tolerance"),
        (SegmentationTask, {"learning_rate": 0.1}, "has no --learning-rate"),
    ],
)
def test_settings_of_the_full_protocol_are_refused(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(protocol="quick", **settings)
    assert kind(**settings).protocol == "full"
    with pytest.raises(ConfigError, match="unknown protocol 'quik'; did you mean 'quick'"):
        kind(protocol="quik")
