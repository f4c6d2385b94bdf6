"""Boundaries: edges where the features change, matched one to one, scored as in BSDS, on twins of its layouts."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colour import NotFinite, PatchColour, lay_on_side
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.evaluation.boundaries import (
    BoundaryTask,
    Matcher,
    best_row,
    f_measure,
    neighbour_distances,
    precision_recall,
    thin_edges,
)
from featsharp.evaluation.layouts.boundaries import find_pictures, read_boundaries
from featsharp.evaluation.layouts.frames import decode_labelled
from featsharp.evaluation.runner import Subject, evaluate
from featsharp.upsamplers.base import GuidedUpsampler

BSDS = Path(__file__).resolve().parents[3] / "shared" / "data" / "bsds" / "train"
SIZE = (192, 288)  # of the twin's pictures: 8 x 12 cells of 24 pixels on a doubled map


class Noise(GuidedUpsampler):
    """Features that have nothing to do with the picture."""

    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        seed = int(1000 * features.abs().sum())
        return torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed))


class Constant(GuidedUpsampler):
    def upsample_to(self, features: Tensor, image: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.ones(1, 4, *size)


def boundaries_of(regions: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour belongs to another region."""
    outcome = np.zeros(regions.shape, dtype=bool)
    outcome[:-1] |= regions[:-1] != regions[1:]
    outcome[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    return outcome


def picture(number: int) -> tuple[Image.Image, np.ndarray]:
    """A rectangle of whole cells on a plain ground, and its outline."""
    regions = np.zeros(SIZE, dtype=np.uint8)
    top, left = 24 * (1 + number % 3), 24 * (2 + number)
    regions[top : top + 96, left : left + 120] = 1
    colours = np.array([[200, 60, 30], [30, 90, 220]], dtype=np.uint8)
    return Image.fromarray(colours[regions]), boundaries_of(regions)


def save_truth(path: Path, maps: list[np.ndarray]) -> None:
    """As BSDS500 has it: a 1 x N cell of structs."""
    cells = np.empty((1, len(maps)), dtype=object)
    for number, outcome in enumerate(maps):
        cells[0, number] = {"Segmentation": outcome.astype(np.uint16), "Boundaries": outcome}
    savemat(path, {"groundTruth": cells}, do_compression=True)


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """BSDS500 as published: two annotators, one of whom saw nothing but the upper half."""
    images, truths = tmp_path / "images" / "test", tmp_path / "groundTruth" / "test"
    images.mkdir(parents=True)
    truths.mkdir(parents=True)
    for number in range(4):
        image, outline = picture(number)
        image.save(images / f"{number}.png")
        half = outline.copy()
        half[SIZE[0] // 2 :] = False
        save_truth(truths / f"{number}.mat", [outline, half])
    return tmp_path


def run(data: Path, upsampler: object, factor: int | None = 2, **settings: object) -> dict:
    task = BoundaryTask(data=data, **{"split": "test", **settings})  # type: ignore[arg-type]
    encoder = create_encoder(PatchColour(offset=3), upsampler, factor)  # type: ignore[arg-type]
    return evaluate(task, [Subject("one", lambda: encoder)], progress=False)["one"]


def ods(data: Path, upsampler: object, factor: int | None = 2, **settings: object) -> float:
    return run(data, upsampler, factor, **settings)["result"]["ods_f"]["value"]


# Edges


def test_distances_against_a_loop():
    cells = torch.randn(3, 4, 5)
    vertical, horizontal = neighbour_distances(cells)
    assert (vertical.shape, horizontal.shape) == ((3, 5), (4, 4))
    unit = {(i, j): cells[:, i, j] / cells[:, i, j].norm() for i in range(4) for j in range(5)}
    for i, j in unit:
        if i < 3:
            assert vertical[i, j].item() == pytest.approx((unit[i + 1, j] - unit[i, j]).norm().item(), rel=1e-5)
        if j < 4:
            assert horizontal[i, j].item() == pytest.approx((unit[i, j + 1] - unit[i, j]).norm().item(), rel=1e-5)


def test_length_is_no_edge():
    cells = torch.randn(3, 1, 1) * torch.rand(1, 4, 5).add(0.1)
    assert max(x.max() for x in neighbour_distances(cells)) < 1e-6
    with pytest.raises(InputError, match="at least 2x2 cells"):
        neighbour_distances(torch.randn(3, 1, 5))


def step(angle: float, cells: int = 16) -> Tensor:
    """[2, cells, cells]: two directions in feature space on either side of a line through the centre."""
    centre = torch.arange(cells) + 0.5 - cells / 2
    side = centre[:, None] * math.sin(angle) + centre * math.cos(angle)
    share = (side + 0.5).clamp(0, 1)
    return torch.stack([1 - share, share])


@pytest.mark.parametrize("angle", [0.0, 0.5, math.pi / 4, math.pi / 2, 2.0])
def test_a_step_becomes_one_line_where_it_is(angle):
    size = (160, 240)  # cells of 10 x 15 pixels
    edges = thin_edges(step(angle), size)
    edges[edges < 0.5 * edges.max()] = 0
    y, x = torch.nonzero(edges[10:-10, 15:-15], as_tuple=True)
    # In cells, where the line is straight through the centre; beyond the last border nothing is known.
    distance = ((y + 0.5) / 10 - 7) * math.sin(angle) + ((x + 0.5) / 15 - 7) * math.cos(angle)
    assert distance.abs().max() < 0.5
    rows, columns = len(set(y.tolist())), len(set(x.tolist()))
    assert max(rows / 140, columns / 210) > 0.85
    assert len(y) / max(rows, columns) <= (1 if angle in (0.0, math.pi / 2) else 2)  # pixels thick


def test_flat_maps_have_no_edges_and_the_plateau_of_a_step_gives_one_line():
    assert thin_edges(torch.ones(4, 6, 6), (60, 60)).max() == 0
    edges = thin_edges(step(0.0, cells=8), (80, 80))
    assert (edges > 0).sum(1).tolist() == [1] * 80


def test_maps_finer_than_the_picture_are_averaged():
    edges = thin_edges(step(0.0, cells=64), (32, 32))
    assert edges.shape == (32, 32)
    y, x = torch.nonzero(edges > 0.5 * edges.max(), as_tuple=True)
    assert set(x.tolist()) <= {15, 16}
    assert len(set(y.tolist())) == 32


# Matching


def nearest_first(predicted: np.ndarray, human: np.ndarray, tolerance: float) -> int:
    """Pairs made one by one, the nearest left each time; ties by the offset, upper left first."""
    a, b = np.argwhere(predicted), np.argwhere(human)
    pairs = sorted(
        (int(((q - p) ** 2).sum()), *(q - p).tolist(), i, j) for i, p in enumerate(a) for j, q in enumerate(b)
    )
    left, right = set(), set()
    for square, _, _, i, j in pairs:
        if square <= tolerance**2 and i not in left and j not in right:
            left.add(i)
            right.add(j)
    return len(left)


def largest_matching(predicted: np.ndarray, human: np.ndarray, tolerance: float) -> int:
    """What the official matcher finds."""
    a, b = np.argwhere(predicted), np.argwhere(human)
    near = ((a[:, None] - b[None]) ** 2).sum(-1) <= tolerance**2
    return int((maximum_bipartite_matching(csr_matrix(near), perm_type="column") >= 0).sum())


@pytest.mark.parametrize("tolerance", [0.5, 1.0, 2.3, 4.0])
@pytest.mark.parametrize("density", [0.03, 0.2])
def test_greedy_pairs_against_a_loop_and_the_optimum(tolerance, density):
    rng = np.random.default_rng(0)
    matcher = Matcher((17, 23), tolerance)
    for _ in range(5):
        predicted, human = rng.random((2, 17, 23)) < density
        before = human.copy()
        outcome = matcher.match(predicted, human)
        assert outcome.shape == (predicted.sum(),)
        assert outcome.sum() == nearest_first(predicted, human, tolerance)
        best = largest_matching(predicted, human, tolerance)
        assert best / 2 <= outcome.sum() <= best
        assert np.array_equal(human, before)


def test_shifted_lines_match_within_the_tolerance_and_not_beyond():
    line, shifted = np.zeros((2, 20, 30), dtype=bool)
    line[:, 10] = shifted[:, 13] = True
    assert Matcher((20, 30), 3).match(line, shifted).all()
    assert not Matcher((20, 30), 2.9).match(line, shifted).any()
    # At the border of the picture nothing wraps round into the next row.
    left, right = np.zeros((2, 20, 30), dtype=bool)
    left[:, 0] = right[:, 29] = True
    assert not Matcher((20, 30), 3).match(left, right).any()


def test_a_doubled_edge_is_half_wrong():
    line = np.zeros((20, 30), dtype=bool)
    line[:, 10] = True
    doubled = line | np.roll(line, 2, axis=1)
    assert Matcher((20, 30), 3).match(doubled, line).mean() == 0.5


def test_counts_and_scores_by_hand():
    strength = np.zeros((5, 9))
    strength[2, 1], strength[2, 4], strength[2, 8] = 0.9, 0.5, 0.3
    first, second = np.zeros((2, 5, 9), dtype=bool)
    first[2, 1] = first[2, 5] = second[2, 1] = True
    counts = Matcher((5, 9), 1).count(strength, [1.0, 0.8, 0.4, 0.2], [first, second])
    # Matched to anybody, predicted, pairs of both annotators, human pixels of both.
    assert counts.tolist() == [[0, 0, 0, 3], [1, 1, 2, 3], [2, 2, 3, 3], [2, 3, 3, 3]]
    precision, recall = precision_recall(counts)
    assert precision.tolist() == pytest.approx([0, 1, 1, 2 / 3])
    assert recall.tolist() == pytest.approx([0, 2 / 3, 1, 1])
    assert f_measure(counts).tolist() == pytest.approx([0, 0.8, 1, 0.8])
    assert best_row(counts).tolist() == [2, 2, 3, 3]
    assert best_row(np.stack([counts, counts[::-1]])).tolist() == [[2, 2, 3, 3]] * 2


# The task


def test_known_edges_are_found_by_features_that_see_them(twin):
    """E36: tiles of a patch function see every cell; noise and constants know of no edge; coarse maps miss them."""
    outcome = run(twin, "tile")
    result = outcome["result"]
    assert result["ods_f"]["value"] > 0.95
    assert result["ods_f"]["low"] <= result["ods_f"]["value"] <= result["ods_f"]["high"] <= 1
    assert result["ois_f"]["value"] >= result["ods_f"]["value"]
    assert outcome["items"]["0.png"]["annotators"] == 2
    assert len(result["curve"]) == 60
    assert ods(twin, Constant(4, 2), None) == 0
    noise = ods(twin, Noise(4, 2), None)
    assert 0 < noise < 0.35
    coarse = ods(twin, "identity", 1)
    assert noise < coarse < result["ods_f"]["value"] - 0.1


def test_precision_pools_annotators_and_recall_sums_over_them(twin):
    """An annotator who drew less costs recall nothing and precision nothing: the other one drew it all."""
    result = run(twin, "tile")["result"]
    assert result["ods_precision"] > 0.95
    assert result["ods_recall"] > 0.95
    for path in (twin / "groundTruth" / "test").iterdir():
        outline = picture(int(path.stem))[1]
        outline[SIZE[0] // 2 :] = False
        save_truth(path, [outline])
    half = run(twin, "tile")["result"]
    assert half["ods_precision"] < 0.75
    assert half["ods_recall"] > 0.9


def test_ods_has_one_threshold_for_all_and_ois_one_for_each():
    task = BoundaryTask(thresholds=2)
    rows = [
        {"_counts": [[5, 10, 10, 10], [5, 5, 5, 10]]},  # best at the first: F 2/3 both
        {"_counts": [[10, 40, 10, 10], [10, 10, 10, 10]]},  # best at the second: F 1
    ]
    outcome = task.score(rows, None)
    first, second = 2 * 0.3 * 1 / 1.3, 2 * 1 * 0.75 / 1.75
    assert first < second
    assert outcome["ods_f"].value == pytest.approx(second)
    assert outcome["ods_threshold"] == 2.0
    assert (outcome["ods_precision"], outcome["ods_recall"]) == pytest.approx((1, 0.75))
    counts = np.array([[5, 10, 10, 10], [10, 10, 10, 10]]).sum(0)
    precision, recall = counts[0] / counts[1], counts[2] / counts[3]
    assert outcome["ois_f"].value == pytest.approx(2 * precision * recall / (precision + recall))


def test_tolerance_is_a_part_of_the_diagonal_of_the_picture(twin):
    assert ods(twin, "tile", tolerance=0.001) < 0.8  # 0.3 pixels: the exact pixel
    wide, narrow = (ods(twin, "identity", 1, tolerance=t, thresholds=10) for t in (0.03, 0.0075))
    assert wide > narrow + 0.03


def test_other_sizes_of_the_low_resolution_pass(twin):
    assert ods(twin, "identity", 1, low_res_size=(64, 96)) > 0.95  # 8 x 12 cells without upsampling
    with pytest.raises(ConfigError, match=r"63x97 is no size .* the nearest is 64x96"):
        ods(twin, "identity", 1, low_res_size=(63, 97))


# Layouts


def test_layouts_give_the_same(twin, tmp_path):
    expected = run(twin, "tile")
    moved = tmp_path / "moved"
    for kind in ("images", "groundTruth"):
        shutil.copytree(twin / kind / "test", moved / "test" / kind)
    masks = tmp_path / "masks"
    shutil.copytree(twin / "images" / "test", masks / "images")
    (masks / "boundaries").mkdir()
    for number in range(4):
        outline = picture(number)[1]
        half = outline.copy()
        half[SIZE[0] // 2 :] = False
        for suffix, outcome in (("", outline), ("_second", half)):
            Image.fromarray(255 * outcome.astype(np.uint8)).save(masks / "boundaries" / f"{number}{suffix}.png")
    assert run(moved, "tile")["result"] == expected["result"]
    assert run(moved, "tile", split=None)["result"] == expected["result"]  # the only one
    assert run(moved / "test", "tile", split=None)["result"] == expected["result"]
    assert run(masks, "tile", split=None)["result"] == expected["result"]


def test_masks_belong_to_the_longest_name(tmp_path):
    for folder in ("images", "boundaries"):
        (tmp_path / folder).mkdir()
    for name in ("12", "120", "12_a"):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{name}.png")
    for name in ("12", "12_1", "120_1", "120-2", "12_a", "12_a_1", "13_1"):
        Image.new("L", (4, 4), 255).save(tmp_path / "boundaries" / f"{name}.png")
    outcome = {entry.image.stem: [path.stem for path in entry.truths] for entry in find_pictures(tmp_path, None)}
    assert outcome == {"12": ["12", "12_1"], "120": ["120-2", "120_1"], "12_a": ["12_a", "12_a_1"]}


def test_a_limit_is_spread_evenly(twin):
    assert list(run(twin, "tile", limit=2)["items"]) == ["0.png", "2.png"]


# Bad data


def damage(folder: Path, kind: str) -> str:
    """Spoil the truth of picture 0; returns the message that must come."""
    path = folder / "0.mat"
    outline = picture(0)[1]
    if kind == "missing":
        path.unlink()
        return r"0\.png: there is no file with its boundaries"
    if kind == "other size":
        save_truth(path, [outline[:-1]])
        return r"0\.mat: the labels are 191x288 pixels, the image 0\.png is 192x288"
    if kind == "empty":
        save_truth(path, [np.zeros(SIZE, dtype=bool)])
        return r"0\.mat: nobody drew a boundary"
    if kind == "other content":
        savemat(path, {"labels": outline})
        return r"0\.mat: no variable groundTruth with Boundaries"
    path.write_bytes(path.read_bytes()[:200])
    return r"0\.mat"


@pytest.mark.parametrize("kind", ["missing", "other size", "empty", "other content", "cut off"])
def test_bad_truths_are_named_and_skipped(twin, kind):
    message = damage(twin / "groundTruth" / "test", kind)
    picture = find_pictures(twin, "test")[0]
    with pytest.raises(DataError, match=message):
        decode_labelled(picture.image, picture.image.name, read_boundaries(picture)[1])
    outcome = run(twin, "tile")
    assert [name for name, _ in outcome["skipped"]] == ["0.png"]
    assert list(outcome["items"]) == ["1.png", "2.png", "3.png"]


def test_boundaries_of_a_picture_with_an_orientation_match(twin):
    expected = run(twin, "tile")
    for path in (twin / "images" / "test").iterdir():
        lay_on_side(path)
    assert run(twin, "tile")["items"] == expected["items"]


def test_masks_that_are_inverted_or_of_another_size_are_named(twin, tmp_path):
    entry = find_pictures(twin, "test")[0]
    outline = picture(0)[1]
    masks = []
    for name, drawn in (("a", outline), ("b", ~outline), ("c", outline[:-1])):
        masks.append(tmp_path / f"{name}.png")
        Image.fromarray(drawn.astype(np.uint8) * 255).save(masks[-1])
    with pytest.raises(DataError, match=r"b\.png: \d\d% of the pixels are not black.*white on black"):
        read_boundaries(entry._replace(truths=(masks[1],)))
    with pytest.raises(DataError, match=r"c\.png: boundaries of another size or EXIF orientation than in a\.png"):
        read_boundaries(entry._replace(truths=(masks[0], masks[2])))


def test_damaged_pictures_and_masks_are_named(twin, tmp_path):
    (twin / "images" / "test" / "1.png").write_bytes(b"no image")
    assert run(twin, "tile")["skipped"][0][0] == "1.png"
    mask = tmp_path / "bad.png"
    mask.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png: cannot be decoded as a mask"):
        read_boundaries(find_pictures(twin, "test")[0]._replace(truths=(mask,)))


def test_features_that_are_not_finite_are_no_result(twin):
    with pytest.raises(DataError, match="NaN or infinite features"):
        run(twin, NotFinite(4, 2), None)


def test_folders_that_are_no_data_set(twin, tmp_path):
    with pytest.raises(DataError, match=r"expected images/SPLIT"):
        find_pictures(tmp_path / "nowhere", None)
    with pytest.raises(DataError, match="no boundaries of split 'val'"):
        find_pictures(twin, "val")
    with pytest.raises(DataError, match="choose --split test"):
        find_pictures(twin, None)
    for split in ("train", "val"):
        (tmp_path / "two" / split / "images").mkdir(parents=True)
    with pytest.raises(DataError, match="choose --split train or val"):
        find_pictures(tmp_path / "two", None)
    for path in (twin / "images" / "test").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="holds no image"):
        find_pictures(twin, "test")


def test_the_command(twin, capsys):
    out = twin / "result.json"
    command = ["eval", "boundaries", "--data", str(twin), "--split", "test", "--backbone", "toy-vit"]
    assert main([*command, "--upsampler", "bilinear-2x", "--thresholds", "5", "--json", str(out)]) == 0
    assert "ods_f" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["settings"]["tolerance"] == 0.0075
    assert len(content["encoders"]["bilinear-2x"]["result"]["curve"]) == 5


@pytest.mark.skipif(not BSDS.is_dir(), reason="the pictures of shared/data are not here")
def test_greedy_pairs_on_photographs_are_close_to_the_optimum():
    """The bound that the documentation states."""
    entry = find_pictures(BSDS, None)[0]
    with Image.open(entry.image) as image:
        size, pixels = image.size[::-1], np.array(image)
    features = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() - 128
    edges = thin_edges(F.adaptive_avg_pool2d(features, (64, 96))[0], size).numpy()
    human = read_boundaries(entry)[0][0]
    tolerance = 0.0075 * math.hypot(*size)
    predicted = edges > np.quantile(edges[edges > 0], 0.8)
    best = largest_matching(predicted, human, tolerance)
    assert best > 500
    assert Matcher(size, tolerance).match(predicted, human).sum() >= 0.85 * best
