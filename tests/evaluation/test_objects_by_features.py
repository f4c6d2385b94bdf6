"""Discovery and class activation maps: twins with known answers, the rules against loops and a dense solver."""

import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import DataError, InputError
from featsharp.evaluation.cam import CamTask, class_map, fit_classifier, left_out_scores, mean_average_precision, remove
from featsharp.evaluation.discovery import DiscoveryTask, connected, find_object, second_eigenvector
from featsharp.evaluation.objects import mask_box, overlap
from featsharp.evaluation.runner import Subject, Task, evaluate

SIZE = (36, 48)
COLOURS = {1: (230, 30, 30), 2: (30, 230, 30)}


class Pixels(Backbone):
    """Features that are the colours themselves, or have nothing to do with them."""

    def __init__(self, *, random: bool = False) -> None:
        super().__init__("pixels", patch_size=1, embed_dim=3, input_size=(18, 24), mean=(0.5,) * 3, std=(0.5,) * 3)
        self.generator = torch.Generator().manual_seed(1) if random else None
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        if self.generator is not None:
            images = torch.randn(images.shape, generator=self.generator)
        return BackboneOutput(images, None)


def write_objects(root: Path, count: int = 12) -> tuple[Path, Path]:
    """A red or a green box of a quarter of the area on grey, at a place of its own; COCO's file says where."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    content: dict = {"images": [], "annotations": []}
    for number in range(count):
        picture = np.full((*SIZE, 3), 128, np.uint8)
        y, x = 2 * int(rng.integers(0, 9)), 2 * int(rng.integers(0, 12))
        category = 1 + number % 2
        picture[y : y + 18, x : x + 24] = COLOURS[category]
        Image.fromarray(picture).save(root / "images" / f"{number:02d}.png")
        content["images"].append({"id": number, "file_name": f"{number:02d}.png", "height": SIZE[0], "width": SIZE[1]})
        box = {"id": number, "image_id": number, "category_id": category, "bbox": [x, y, 24, 18], "area": 24 * 18}
        content["annotations"].append(box)
    (root / "objects.json").write_text(json.dumps(content))
    return root / "images", root / "objects.json"


def measure(task: Task, backbone: Backbone) -> dict:
    subject = Subject("x", lambda: create_encoder(backbone, "native-highres", 2))
    return evaluate(task, [subject], progress=False)["x"]


def values(outcome: dict) -> dict[str, float]:
    return {name: one["value"] for name, one in outcome["result"].items() if isinstance(one, dict)}


def test_an_object_of_its_own_colour_is_found(tmp_path):
    pytest.importorskip("scipy")
    found = values(measure(DiscoveryTask(*write_objects(tmp_path)), Pixels()))
    assert found == {"corloc_tokencut": 1, "corloc_lost": 1, "corloc_whole": 0}


def test_random_features_find_nothing(tmp_path):
    pytest.importorskip("scipy")
    found = values(measure(DiscoveryTask(*write_objects(tmp_path)), Pixels(random=True)))
    # A part that hangs together by chance spreads over the picture, or is a few cells.
    assert found["corloc_tokencut"] <= 2 / 12
    assert found["corloc_lost"] <= 2 / 12


def test_the_cut_is_that_of_a_dense_solver():
    linalg = pytest.importorskip("scipy.linalg")
    vectors = np.random.default_rng(0).standard_normal((30, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = np.where(unit @ unit.T > 0.2, 1.0, 1e-5)
    degrees = np.diag(weights.sum(1))
    numbers, dense = linalg.eigh(degrees - weights, degrees)
    assert numbers[0] == pytest.approx(0, abs=1e-9)
    expected, found = dense[:, 1], second_eigenvector(weights)
    assert abs(found @ expected) / np.linalg.norm(found) / np.linalg.norm(expected) == pytest.approx(1)


def test_a_cut_that_is_not_found_is_an_error_of_its_picture():
    """A chain, whose largest eigenvalues lie too close together."""
    pytest.importorskip("scipy")
    places = np.arange(400)
    with pytest.raises(InputError, match="normalised cut of 400 cells was not found"):
        second_eigenvector(np.where(np.abs(places[:, None] - places) <= 1, 1.0, 1e-5))


def test_maps_of_too_many_cells_are_refused_and_tau_is_a_setting(tmp_path):
    pytest.importorskip("scipy")
    data = write_objects(tmp_path, 2)
    with pytest.raises(DataError, match=r"map of 96x96 cells .* at most 8192: give a smaller --low-res-size"):
        measure(DiscoveryTask(*data, low_res_size=(48, 48)), Pixels())
    # No cosine is above 1: without an edge nothing is set apart.
    assert values(measure(DiscoveryTask(*data, tau=1.0), Pixels()))["corloc_tokencut"] == 0


def test_lost_is_what_loops_find():
    vectors, cells = np.random.default_rng(2).standard_normal((5 * 7, 4)), (5, 7)
    vectors[8:10] += 3
    degree = [sum(float(a @ b) > 0 for b in vectors) for a in vectors]
    order = sorted(range(35), key=lambda cell: degree[cell])
    seed = order[0]
    voters = [cell for cell in order[: round(35 / 9)] if float(vectors[cell] @ vectors[seed]) > 0]
    inside = {cell for cell in range(35) if sum(float(vectors[cell] @ vectors[v]) for v in voters) > 0} | {seed}
    expected, queue = {seed}, deque([seed])
    while queue:
        y, x = divmod(queue.popleft(), 7)
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < 5 and 0 <= u < 7 and 7 * v + u in inside - expected:
                expected.add(7 * v + u)
                queue.append(7 * v + u)
    found = find_object(vectors, cells)
    assert set(np.flatnonzero(found)) == expected
    assert 1 < len(expected) < 35


def test_parts_and_boxes():
    pytest.importorskip("scipy")
    inside = np.array([1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1], dtype=bool)
    assert connected(inside, 0, (3, 4)).astype(int).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert mask_box(connected(inside, 11, (3, 4))).tolist() == [2, 3, 3, 4]
    assert overlap(np.array([0, 4, 0, 4]), np.array([2, 6, 0, 4])) == pytest.approx(8 / 24)
    assert overlap(np.array([0, 4, 0, 4]), np.array([5, 6, 5, 6])) == 0


def test_maps_of_colours_point_at_their_object(tmp_path):
    outcome = measure(CamTask(*write_objects(tmp_path)), Pixels())
    found = values(outcome)
    assert found["pointing"] == 1
    # 15 pixels beside a box of 18 x 24 in 36 x 48 are most of it, at any place.
    assert 0.5 < found["pointing_chance"] < 1
    assert found["average_drop"] < 0.1
    assert found["deletion"] < found["insertion"] - 0.2
    assert outcome["result"]["classes"] == 2
    assert outcome["result"]["classifier_map"] == outcome["result"]["classifier_map_seen"] == 1


def test_random_maps_point_by_chance(tmp_path):
    found = values(measure(CamTask(*write_objects(tmp_path, 40)), Pixels(random=True)))
    assert found["pointing"] == pytest.approx(found["pointing_chance"], abs=0.25)
    # What is left of noise is noise: nothing is learned by removing the map's largest values first.
    assert found["insertion"] == pytest.approx(found["deletion"], abs=0.1)


def test_every_class_is_pointed_at(tmp_path):
    """A green box of a ninth of the area beside the red one: the map of each class is on its own."""
    images, labels = write_objects(tmp_path, 4)
    content = json.loads(labels.read_text())
    for number in range(4):
        picture = np.full((*SIZE, 3), 128, np.uint8)
        picture[:18, :24], picture[24:, 32:] = COLOURS[1], COLOURS[2]
        if number == 2:
            picture[:18, :24] = 128
        if number == 3:
            picture[24:, 32:] = 128
        Image.fromarray(picture).resize((480, 360), 0).save(images / f"{number:02d}.png")
    content["images"] = [one | {"height": 360, "width": 480} for one in content["images"]]
    content["annotations"] = [
        {"id": 2 * n + c, "image_id": n, "category_id": c, "bbox": box, "area": box[2] * box[3]}
        for n in range(4)
        for c, box in ((1, [0, 0, 240, 180]), (2, [320, 240, 160, 120]))
        if (n, c) not in ((2, 1), (3, 2))
    ]
    labels.write_text(json.dumps(content))
    outcome = measure(CamTask(images, labels), Pixels())
    chances = [255 * 195 / (360 * 480), 175 * 135 / (360 * 480)]
    assert outcome["items"]["00.png"]["pointing_chance"] == pytest.approx(np.mean(chances))
    assert outcome["items"]["03.png"]["pointing_chance"] == pytest.approx(chances[0])
    assert outcome["result"]["pointing"]["value"] == 1


def test_a_classifier_that_learnt_by_heart_is_seen():
    generator = torch.Generator().manual_seed(0)
    vectors, wanted = torch.randn(40, 80, generator=generator), (torch.rand(40, 3, generator=generator) < 0.3).float()
    weight, bias = fit_classifier(vectors, wanted)
    assert mean_average_precision(vectors @ weight.T + bias, wanted) == 1
    assert mean_average_precision(left_out_scores(vectors, wanted), wanted) < 0.6
    # Ranks 1 and 3 of four, and rank 2: (1 + 2/3) / 2 and 1/2.
    scores, answers = torch.tensor([[4.0, 3], [3, 4], [2, 2], [1, 1]]), torch.tensor([[1.0, 1], [0, 0], [1, 0], [0, 0]])
    assert mean_average_precision(scores, answers) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)


def test_the_map_is_grad_cam_of_the_score():
    """Grad-CAM: gradients of the score, averaged over cells, weigh the channels; then ReLU."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 5, 6, 7, generator=generator, requires_grad=True)
    weight = torch.randn(5, generator=generator)
    (features.mean((2, 3)) @ weight).sum().backward()
    grad_cam = (features.grad.mean((2, 3), keepdim=True) * features)[0].sum(0).relu().detach()
    torch.testing.assert_close(class_map(features.detach(), weight), grad_cam / grad_cam.max())
    assert class_map(-torch.ones(1, 5, 2, 2), torch.ones(5)).tolist() == [[0, 0], [0, 0]]


def test_removal_and_scores_of_a_linear_toy():
    """The score is the mean of the pixels: their order decides both areas."""
    picture = torch.tensor([[4.0, 1.0], [3.0, 2.0]]).expand(1, 3, 2, 2)
    without, alone = remove(picture, picture[0, 0] / 4, 4)
    assert without.mean((1, 2, 3)).tolist() == [10 / 4, 6 / 4, 3 / 4, 1 / 4, 0]
    assert alone.mean((1, 2, 3)).tolist() == [0, 4 / 4, 7 / 4, 9 / 4, 10 / 4]
    assert torch.trapezoid(alone.mean((1, 2, 3)), dx=1 / 4).item() == pytest.approx((4 + 7 + 9 + 5) / 16)


def test_the_classifier_tells_what_can_be_told():
    vectors = torch.tensor([[0.0, 5.0], [0.1, 7.0], [1.0, 6.0], [1.1, 5.5]])
    weight, bias = fit_classifier(vectors, torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    assert ((vectors @ weight.T + bias).sigmoid() > 0.5).flatten().tolist() == [True, True, False, False]


def test_bad_pictures_are_counted(tmp_path):
    pytest.importorskip("scipy")
    images, labels = write_objects(tmp_path)
    (images / "03.png").write_bytes(b"junk")
    for task in (DiscoveryTask(images, labels), CamTask(images, labels)):
        outcome = measure(task, Pixels())
        assert [name for name, _ in outcome["skipped"]] == ["03.png"]
        assert len(outcome["items"]) == 11
    with pytest.raises(DataError, match=r"holds no objects; expected a folder of YOLO's NAME\.txt or COCO's"):
        measure(DiscoveryTask(images, images), Pixels())


def test_the_commands(tmp_path, capsys):
    pytest.importorskip("scipy")
    images, labels = map(str, write_objects(tmp_path, 3))
    options = ["--data", images, "--labels", labels, "--backbone", "toy-vit", "--upsampler", "bilinear-2x"]
    assert main(["eval", "discovery", *options]) == 0
    assert main(["eval", "cam", *options, "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "corloc_lost" in out
    assert "average_drop" in out
