"""Semantic correspondence: synthetic twins of the data sets with known answers, and matching against brute force.

Points of the tests are (x, y) with the centre of the first pixel at (0.5, 0.5); the writers put them as each data set
counts.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_colour import lay_on_side
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.correspondence import (
    CorrespondenceTask,
    NearestPixel,
    draw,
    draw_pairs,
    interpolated_lengths,
    match,
    place,
    pool_pck,
    prepare,
)
from featsharp.evaluation.features import find_low_res_size
from featsharp.evaluation.layouts.pairs import find_layout, list_pairs
from featsharp.evaluation.runner import Subject, evaluate
from featsharp.evaluation.shared_protocol import ProtocolTask

# Centres of patches of 8 pixels, in the source; the object moves by MOVE.
POINTS = np.array([[12.0, 12], [28, 12], [12, 44], [36, 36], [36, 20]])
MOVE = np.array([16.0, 8.0])
SIDE = 32.0  # larger side of the box of POINTS


class PatchPixels(Backbone):
    """The pixels of each patch: a feature that no other patch of a noisy picture has."""

    def __init__(self, patch_size: int = 8, native: int = 32) -> None:
        super().__init__("pixels", patch_size=patch_size, embed_dim=3 * patch_size**2, input_size=(native, native))
        self.calls = 0
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        self.calls += len(images)
        return BackboneOutput(F.pixel_unshuffle(images, self.patch_size), None)


class Random(Backbone):
    """Features that have nothing to do with each other, one per pixel."""

    def __init__(self) -> None:
        super().__init__("random", patch_size=1, embed_dim=16, input_size=(16, 16))
        self.generator = torch.Generator().manual_seed(0)
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(torch.randn(len(images), 16, *images.shape[-2:], generator=self.generator), None)


class Nothing(Backbone):
    """NaN."""

    def __init__(self) -> None:
        super().__init__("nothing", patch_size=8, embed_dim=4, input_size=(32, 32))
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(torch.full((len(images), 4, *self.grid_size(images.shape[-2:])), torch.nan), None)


def noise(seed: int, height: int = 64, width: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **({"quality": 100, "subsampling": 0} if path.suffix == ".jpg" else {}))


def save_mat(path: Path, **arrays: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, arrays)


def spair(root: Path, **changes: object) -> Path:
    """One pair of a cat that moved; ``changes`` are made to its annotation."""
    pixels = noise(0)
    save(root / "JPEGImages/cat/a.jpg", pixels)
    save(root / "JPEGImages/cat/b.jpg", np.roll(pixels, (int(MOVE[1]), int(MOVE[0])), axis=(0, 1)))
    content = {
        "src_imname": "a.jpg",
        "trg_imname": "b.jpg",
        "src_kps": (POINTS - 0.5).tolist(),
        "trg_kps": (POINTS + MOVE - 0.5).tolist(),
        "src_bndbox": [12, 12, 44, 44],
        "trg_bndbox": [20, 10, 60, 60],  # larger side 50
        "category": "cat",
    }
    path = root / "PairAnnotation/test/000001-a-b:cat.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | changes))
    return path


def pascal(root: Path, target_points: np.ndarray = POINTS + MOVE, *, points_in_list: bool = False) -> Path:
    pixels = noise(0)
    save(root / "JPEGImages/a.jpg", pixels)
    save(root / "JPEGImages/b.jpg", np.roll(pixels, (int(MOVE[1]), int(MOVE[0])), axis=(0, 1)))
    path = root / "test_pairs.csv"
    images = "PF-dataset-PASCAL/JPEGImages/a.jpg,PF-dataset-PASCAL/JPEGImages/b.jpg,8"
    if points_in_list:
        lists = [";".join(str(v + 0.5) for v in axis) for points in (POINTS, target_points) for axis in points.T]
        path.write_text(f"source_image,target_image,class,XA,YA,XB,YB\n{images},{','.join(lists)}\n")
    else:
        path.write_text(f"source_image,target_image,class\n{images}\n")
        save_mat(root / "Annotations/cat/a.mat", kps=POINTS + 0.5, bbox=np.array([[1.0, 1, 50, 50]]))
        save_mat(root / "Annotations/cat/b.mat", kps=target_points + 0.5, bbox=np.array([[10.0, 10, 60, 50]]))
    return path


def willow(root: Path, group: str = "duck(S)") -> None:
    pixels = noise(0)
    for name, move in (("1", 0 * MOVE), ("2", MOVE)):
        save(root / group / f"{name}.png", np.roll(pixels, (int(move[1]), int(move[0])), axis=(0, 1)))
        save_mat(root / group / f"{name}.mat", pts_coord=(POINTS + move + 0.5).T)


def measure(root: Path, backbone: Backbone | None = None, upsampler=("tile", 2), **settings):
    task = CorrespondenceTask(data=root, **settings)
    subject = Subject("x", lambda: create_encoder(backbone or PatchPixels(), *upsampler))
    return evaluate(task, [subject], progress=False)["x"]


@pytest.mark.parametrize(
    ("layout", "write"),
    [
        ("spair", spair),
        ("pf-pascal", pascal),
        ("pf-pascal", lambda root: pascal(root, points_in_list=True)),
        ("pf-willow", willow),
    ],
)
@pytest.mark.parametrize("given", [True, False])
def test_perfect_features_find_what_moved(tmp_path, layout, write, given):
    write(tmp_path)
    assert find_layout(tmp_path) == layout
    outcome = measure(tmp_path, layout=layout if given else "auto")
    assert not outcome["skipped"]
    # The pixels next to the centre of a patch are 0.71 pixels away from it.
    assert outcome["result"]["pck@0.1"]["value"] == outcome["result"]["pck@0.05"]["value"] == 1
    assert outcome["result"]["pck@0.01_categories"]["value"] == 0
    assert outcome["result"]["pairs"] == (2 if layout == "pf-willow" else 1)
    assert outcome["result"]["image_size"] == [64, 64]
    assert outcome["result"]["low_res_size"] == [32, 32]
    (category,) = outcome["result"]["categories"]
    assert category == ("duck(S)" if layout == "pf-willow" else "cat")
    assert outcome["result"]["categories"][category]["pck@0.1"]["value"] == 1


@pytest.mark.parametrize(
    ("layout", "normalize_by", "size"),
    [
        ("spair", "auto", 50),
        ("spair", "keypoints", SIDE),
        ("spair", "image", 64),
        ("pf-pascal", "auto", 64),
        ("pf-pascal", "box", 50),
        ("pf-willow", "auto", SIDE),
    ],
)
def test_what_alpha_is_a_share_of(tmp_path, layout, normalize_by, size):
    {"spair": spair, "pf-pascal": pascal, "pf-willow": willow}[layout](tmp_path)
    error = 0.5**0.5  # from the centre of a patch to that of the nearest pixels
    alphas = (1.02 * error / size, 0.98 * error / size)
    outcome = measure(tmp_path, alphas=alphas, normalize_by=normalize_by)
    for row in outcome["items"].values():
        assert row["hits"] == [5, 0]
        assert row["keypoints"] == 5


def test_a_list_of_willow_pairs(tmp_path):
    willow(tmp_path)
    columns = [*POINTS.T.ravel() + 0.5, *(POINTS + MOVE).T.ravel() + 0.5]
    rows = [["imageA", "imageB", *("x" for _ in range(20))], ["PF/duck(S)/1.png", "PF/duck(S)/2.png", *columns]]
    (tmp_path / "test_pairs.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    outcome = measure(tmp_path)
    assert outcome["result"]["pck@0.1"]["value"] == 1
    assert list(outcome["items"]) == ["2-1-2:duck(S)"]


@pytest.mark.parametrize("fit", ["letterbox", "stretch"])
def test_images_that_are_not_square(tmp_path, fit):
    pixels, points = noise(0, 32, 64), np.array([[12.0, 12], [28, 12], [36, 12]])
    save(tmp_path / "g/1.png", pixels)
    save(tmp_path / "g/2.png", np.roll(pixels, (8, 16), axis=(0, 1)))
    save_mat(tmp_path / "g/1.mat", pts_coord=(points + 0.5).T)
    save_mat(tmp_path / "g/2.mat", pts_coord=(points + (16, 8) + 0.5).T)
    assert measure(tmp_path, fit=fit)["result"]["pck@0.1"]["value"] == 1


def test_random_features_score_chance(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        save(tmp_path / f"g/{number}.png", noise(number, 32, 32))
        save_mat(tmp_path / f"g/{number}.mat", pts_coord=rng.uniform(1, 32, (2, 10)))
    outcome = measure(tmp_path, Random(), alphas=(0.4,), normalize_by="image")["result"]
    y, x = np.mgrid[:32, :32] + 0.5
    points = np.concatenate([entry.read().target_points for entry in list_pairs(tmp_path)])
    chances = [(np.hypot(x - point[0], y - point[1]) < 0.4 * 32).mean() for point in points]
    assert outcome["keypoints"] == len(chances) == 300
    deviation = np.sqrt(np.mean(chances) * (1 - np.mean(chances)) / len(chances))
    assert outcome["pck@0.4"]["value"] == pytest.approx(np.mean(chances), abs=3 * deviation)


def test_pooling_by_hand():
    outcome = pool_pck([(1, 2, "cat"), (3, 3, "cat"), (0, 5, "dog")])
    assert outcome["keypoints"].value == pytest.approx(4 / 10)
    assert outcome["pairs"].value == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert outcome["categories"].value == pytest.approx((4 / 5 + 0) / 2)
    assert outcome["keypoints"].low < 0.4 < outcome["keypoints"].high


def test_misplaced_points_are_misses_beyond_alpha(tmp_path):
    moved = POINTS + MOVE
    moved[0] -= (3, 0)  # found 2.5 or 3.5 pixels beside it, and half a pixel across
    spair(tmp_path, trg_kps=(moved - 0.5).tolist())
    (row,) = measure(tmp_path, alphas=(4 / 50, 2.4 / 50))["items"].values()
    assert row["hits"] == [5, 4]


@pytest.mark.parametrize(("grid", "canvas"), [((5, 7), (31, 23)), ((4, 4), (4, 4)), ((2, 3), (6, 5))])
def test_matching_is_the_cosine_of_enlarged_features(grid, canvas):
    source, target = (torch.randn(1, 6, *grid) for _ in range(2))
    images = [prepare(x, place((50, 40), canvas, "letterbox")) for x in (source, target)]
    points = np.random.default_rng(0).uniform(0, (40, 50), (9, 2))
    # By the definition: enlarge the normalised features, sample, and look at every pixel of the box.
    placement = images[0].placement
    top, bottom, left, right = placement.box
    enlarged = F.interpolate(F.normalize(target), canvas, mode="bilinear")[0, :, top:bottom, left:right]
    expected = []
    for x, y in points:
        row = np.clip((top + y * (bottom - top) / 50) / canvas[0] * grid[0] - 0.5, 0, grid[0] - 1)
        column = np.clip((left + x * (right - left) / 40) / canvas[1] * grid[1] - 0.5, 0, grid[1] - 1)
        (a, b), (c, d) = ((int(v), min(int(v) + 1, n - 1)) for v, n in zip((row, column), grid, strict=True))
        s, t = row - a, column - c
        cells = F.normalize(source)[0]
        query = (1 - s) * ((1 - t) * cells[:, a, c] + t * cells[:, a, d])
        query = query + s * ((1 - t) * cells[:, b, c] + t * cells[:, b, d])
        cosines = F.cosine_similarity(query[:, None, None], enlarged, dim=0)
        best = np.unravel_index(int(cosines.argmax()), cosines.shape)
        expected.append([(best[1] + 0.5) * 40 / (right - left), (best[0] + 0.5) * 50 / (bottom - top)])
    np.testing.assert_allclose(match(images[0], images[1], points), expected)


def test_lengths_between_cells_are_those_of_the_interpolated_features():
    cells = torch.randn(1, 5, 4, 6)
    expected = F.interpolate(cells, (29, 31), mode="bilinear")[0].norm(dim=0)
    torch.testing.assert_close(interpolated_lengths(cells[0], (29, 31)), expected)


def test_where_images_lie():
    letterbox = place((50, 100), (64, 64), "letterbox")
    assert letterbox.box == (16, 48, 0, 64)
    np.testing.assert_allclose(letterbox.to_canvas(np.array([[50, 25], [0, 0]])), [[32, 32], [0, 16]])
    stretch = place((50, 100), (64, 32), "stretch")
    assert stretch.box == (0, 64, 0, 32)
    points = np.random.default_rng(0).uniform(0, 50, (4, 2))
    for placement in (letterbox, stretch, place((300, 2), (64, 64), "letterbox")):
        np.testing.assert_allclose(placement.to_image(placement.to_canvas(points)), points)


def test_padding_has_the_mean_colour():
    image = Image.fromarray(noise(0, 32, 64))
    canvas = draw(image, place((32, 64), (64, 64), "letterbox"), lambda x: x + 1)
    assert (canvas[..., :16, :] == 0).all()
    assert (canvas[..., 48:, :] == 0).all()
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 + 1
    torch.testing.assert_close(canvas[0, :, 16:48], expected)


def test_an_image_is_encoded_once_while_there_is_room(tmp_path):
    for name in "abc":
        save(tmp_path / f"{name}.png", noise(ord(name)))
    backbone = PatchPixels()  # the canvas is twice the native size
    encoder = create_encoder(backbone, "identity", 1)
    size = 4 * (192 * 16 + 64 * 64)
    for room, order, calls in [(2 * size, "abababcb", 3), (2 * size, "abca", 4), (size - 1, "aabb", 2), (0, "aba", 3)]:
        backbone.calls, rule = 0, NearestPixel(encoder, (32, 32), "stretch", room)
        with torch.no_grad():
            for name in order:
                rule.encode(tmp_path / f"{name}.png")
        assert backbone.calls == calls


def test_drawing_pairs(tmp_path):
    for group in ("duck(S)", "car(G)"):
        willow(tmp_path, group)
    entries = list_pairs(tmp_path)
    assert [entry.category for entry in entries] == ["car(G)"] * 2 + ["duck(S)"] * 2
    drawn = draw_pairs(entries, 5, seed=0)
    assert [entry.category for entry in drawn] == ["car(G)"] * 5 + ["duck(S)"] * 5
    assert [e.name for e in drawn] == [e.name for e in draw_pairs(entries, 5, seed=0)]
    assert [e.name for e in drawn] != [e.name for e in draw_pairs(entries, 5, seed=1)]
    names = [item.name for item in CorrespondenceTask(data=tmp_path, pairs_per_category=5, limit=7).items()]
    assert len(set(names)) == len(names) == 7


def test_all_ordered_pairs_of_a_group(tmp_path):
    for name in "123":
        save(tmp_path / f"g/{name}.png", noise(0))
        save_mat(tmp_path / f"g/{name}.mat", pts_coord=POINTS.T)
    assert [e.name for e in list_pairs(tmp_path)] == [f"{a}-{b}:g" for a in "123" for b in "123" if a != b]


def test_the_shared_protocol_measures_pairs_as_this_task_does(tmp_path):
    spair(tmp_path)
    encoder = create_encoder(PatchPixels(), "tile", 2)
    here, there = (
        evaluate(task, [Subject("x", lambda: encoder)], progress=False)["x"]
        for task in (CorrespondenceTask(tmp_path), ProtocolTask("spair", tmp_path, image_size=(32, 32)))
    )
    assert here["result"] == there["result"]
    assert here["items"] == there["items"]


def test_layout_lists_choose_and_order_pairs(tmp_path):
    path = spair(tmp_path)
    (path.parent / "000000-x-y:dog.json").write_text(path.read_text())
    assert [e.name for e in list_pairs(tmp_path)] == ["000000-x-y:dog", "000001-a-b:cat"]
    (tmp_path / "Layout/large").mkdir(parents=True)
    (tmp_path / "Layout/large/test.txt").write_text("000001-a-b:cat\n")
    assert [(e.name, e.category) for e in list_pairs(tmp_path)] == [("000001-a-b:cat", "cat")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trg_kps": [[1, 2]]}, r"000001-a-b:cat\.json: 5 keypoints in the source, 1 in the target"),
        ({"src_kps": [], "trg_kps": []}, r"000001-a-b:cat\.json: no keypoint is annotated"),
        ({"src_kps": [[70, 5]], "trg_kps": [[5, 5]]}, r"a\.jpg: keypoint \(70\.5, 5\.5\) lies outside .* 64 x 64"),
        ({"src_kps": [[5, 5]], "trg_kps": [[5, -3]]}, r"b\.jpg: keypoint \(5\.5, -2\.5\) lies outside"),
        ({"trg_imname": "gone.jpg"}, r"gone\.jpg: no such file"),
        ({"trg_bndbox": [5, 5, 5, 5]}, r"000001-a-b:cat\.json: the box of the target has a larger side of 0"),
        ({"trg_bndbox": [5, 5]}, r"000001-a-b:cat\.json: a box has four numbers; got 2"),
        ({"trg_bndbox": None}, r"000001-a-b:cat\.json: a box has four numbers; got 1"),
        ({"trg_imname": 7}, r"000001-a-b:cat\.json is no annotation"),
        ({"src_kps": [["x", 1]]}, r"000001-a-b:cat\.json: .* are not numbers"),
        ({"category": None}, r"None/a\.jpg: no such file"),
    ],
)
def test_a_bad_pair_is_skipped_and_named(tmp_path, changes, message):
    bad = spair(tmp_path, **changes)
    good = bad.with_name("000002-a-b:cat.json")
    content = json.loads(spair(tmp_path / "other").read_text())
    good.write_text(json.dumps(content))
    outcome = measure(tmp_path)
    assert list(outcome["items"]) == [good.stem]
    ((name, reason),) = outcome["skipped"]
    assert name == bad.stem
    assert re.search(message, reason)


def test_keypoints_of_a_picture_with_an_orientation_are_named(tmp_path):
    willow(tmp_path, "a(S)")
    willow(tmp_path, "b(S)")
    lay_on_side(tmp_path / "b(S)/2.png")
    outcome = measure(tmp_path)
    assert list(outcome["items"]) == ["1-2:a(S)", "2-1:a(S)"]
    for _, reason in outcome["skipped"]:
        assert re.search(r"b\(S\)/2\.png: its keypoints may be for the pixels as stored", reason)


def test_a_pair_file_that_is_missing_or_damaged(tmp_path):
    path = spair(tmp_path)
    path.with_name("000002-a-b:cat.json").write_text("{")
    (tmp_path / "Layout/large").mkdir(parents=True)
    (tmp_path / "Layout/large/test.txt").write_text("000001-a-b:cat\n000002-a-b:cat\n000003-a-b:cat\n")
    skipped = dict(measure(tmp_path)["skipped"])
    assert "000002-a-b:cat.json is no annotation" in skipped["000002-a-b:cat"]
    assert "000003-a-b:cat.json cannot be read" in skipped["000003-a-b:cat"]


def test_hidden_keypoints_of_pascal(tmp_path):
    hidden = POINTS + MOVE
    hidden[1:3] = np.nan
    pascal(tmp_path, hidden)
    outcome = measure(tmp_path)["result"]
    assert outcome["keypoints"] == 3
    assert outcome["pck@0.1"]["value"] == 1
    pascal(tmp_path, hidden * np.nan)
    with pytest.raises(DataError, match=r"test_pairs\.csv line 2: no keypoint is visible in both"):
        measure(tmp_path)


def test_damage_in_lists_and_annotations_of_pascal(tmp_path):
    path = pascal(tmp_path)
    save_mat(tmp_path / "Annotations/cat/b.mat", kps=POINTS, bbox=POINTS[:1])
    with pytest.raises(DataError, match=r"b\.mat: a box has four numbers; got 2"):
        measure(tmp_path)
    save_mat(tmp_path / "Annotations/cat/b.mat", points=POINTS)
    with pytest.raises(DataError, match=r"b\.mat has no variable 'kps'; it holds points"):
        measure(tmp_path)
    for content in ("source_image,target_image\na,b\n", "source_image,target_image,class\na,b,0\n"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"test_pairs\.csv line 2: expected the columns"):
            measure(tmp_path)
    path.write_text("source_image,target_image,class\na,b\n")
    with pytest.raises(DataError, match=r"test_pairs\.csv line 2: 2 fields under a header of 3"):
        measure(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"needs a list of pairs, test_pairs_pf_pascal\.csv or test_pairs\.csv"):
        measure(tmp_path)


def test_willow_without_image_annotation_or_box(tmp_path):
    willow(tmp_path)
    save(tmp_path / "duck(S)/4.png", noise(0))
    save_mat(tmp_path / "duck(S)/5.mat", pts_coord=POINTS.T)
    skipped = dict(measure(tmp_path)["skipped"])
    assert len(skipped) == 4 * 3 - 2
    assert "4.mat cannot be read" in skipped["1-4:duck(S)"]
    assert "5.mat: its image is missing" in skipped["1-5:duck(S)"]
    with pytest.raises(DataError, match=r"has no box for it; choose --normalize-by keypoints or image"):
        measure(tmp_path, normalize_by="box")


def test_data_sets_that_are_missing_or_empty(tmp_path):
    with pytest.raises(
        DataError, match="no known layout of a correspondence data set; expected spair: PairAnnotation/"
    ):
        measure(tmp_path)
    with pytest.raises(DataError, match="gone: no such folder"):
        measure(tmp_path / "gone")
    spair(tmp_path)
    with pytest.raises(DataError, match=r"PairAnnotation/val, which is missing"):
        measure(tmp_path, split="val")
    (tmp_path / "PairAnnotation/val").mkdir()
    with pytest.raises(DataError, match=r"the split 'val' of layout spair has no pairs"):
        measure(tmp_path, split="val")
    with pytest.raises(DataError, match=r"mine\.txt: no such file"):
        measure(tmp_path, pair_list=tmp_path / "mine.txt")


def test_nan_features_are_no_score(tmp_path):
    willow(tmp_path)
    with pytest.raises(DataError, match=r"none of 2 items .* NaN"):
        measure(tmp_path, Nothing(), ("identity", 1))


def test_settings_that_do_not_work():
    with pytest.raises(ConfigError, match=r"positive shares .* \[0\.1, 0\]"):
        CorrespondenceTask(alphas=[0.1, 0])
    with pytest.raises(ConfigError, match="twice"):
        CorrespondenceTask(alphas=[0.1, 0.1])
    encoder = create_encoder("toy-vit-fixed", "identity", 1)
    assert find_low_res_size(encoder, None) == (64, 64)
    with pytest.raises(ConfigError, match="32x32 is no size that backbone 'toy-vit-fixed' takes; the nearest is 64x64"):
        find_low_res_size(encoder, (32, 32))


def test_command_with_several_encoders(tmp_path, capsys):
    willow(tmp_path)
    result = tmp_path / "pck.json"
    arguments = ["eval", "correspondence", "--data", str(tmp_path), "--backbone", "toy-vit", "--device", "cpu"]
    arguments += ["--upsampler", "bilinear-2x", "tile-2x", "--alphas", "0.2", "--low-res-size", "32x32"]
    assert not main([*arguments, "--json", str(result)])
    assert "pck@0.2_categories" in capsys.readouterr().out
    content = json.loads(result.read_text())
    assert content["encoders"]["tile-2x"]["result"]["image_size"] == [64, 64]
    assert set(content["encoders"]["bilinear-2x"]["items"]) == {"1-2:duck(S)", "2-1:duck(S)"}


@pytest.mark.slow
def test_real_photographs_of_willow():
    root = Path(__file__).resolve().parents[3] / "shared" / "data" / "pf_willow"
    if not root.is_dir():
        pytest.skip("the images of PF-WILLOW are not here")
    outcome = measure(root, create_encoder("toy-vit", "identity", 1).backbone, ("bilinear", 2), limit=90)
    assert len(outcome["items"]) == 90
    assert not outcome["skipped"]
    assert outcome["result"]["keypoints"] == 900
