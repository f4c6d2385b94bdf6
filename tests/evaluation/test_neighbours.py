"""Nearest neighbours: against scikit-learn and a plain loop, and what has no answer."""

import json

import numpy as np
import pytest
from PIL import Image

from featsharp.cli.main import main
from featsharp.errors import DataError
from featsharp.evaluation.neighbours import NEIGHBOURS, TEMPERATURE, class_of, neighbour_scores


def test_scores_are_those_of_scikit_learn():
    from sklearn.metrics import average_precision_score
    from sklearn.neighbors import KNeighborsClassifier

    rng = np.random.default_rng(0)
    classes = [f"c{label}" for label in rng.integers(0, 4, 47)] + ["alone"]
    centres = rng.normal(size=(5, 9))
    vectors = np.stack([centres[sorted(set(classes)).index(name)] for name in classes]) + rng.normal(size=(48, 9))
    right, precision = neighbour_scores(vectors, classes)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected_right, expected_precision = [], []
    for query, name in enumerate(classes):
        if name == "alone":
            continue
        others = [number for number in range(48) if number != query]
        vote = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights=lambda away: np.exp((1 - away) / TEMPERATURE))
        vote.fit(units[others], [classes[number] for number in others])
        expected_right.append(vote.predict(units[[query]])[0] == name)
        relevant = [classes[number] == name for number in others]
        expected_precision.append(average_precision_score(relevant, units[others] @ units[query]))
    assert right.tolist() == expected_right
    assert 0.2 < right.mean() < 1
    np.testing.assert_allclose(precision, expected_precision, atol=1e-9)


def test_average_precision_by_hand():
    # From the first picture the others lie in the order of their angles: same, other, same.
    angles = np.radians([0, 10, 20, 30])
    right, precision = neighbour_scores(np.stack([np.cos(angles), np.sin(angles)], 1), ["a", "a", "b", "a"])
    assert len(right) == len(precision) == 3  # "b" is alone
    assert precision[0] == pytest.approx((1 / 1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("yin_yang_0060.jpg", "yin_yang"),
        ("cat12.png", "cat"),
        ("birds/owl/3.jpg", "owl"),
        ("birds/shard-000.tar/owl_7.jpg", "birds"),
        ("shard-000.tar/owl_7.jpg", "owl"),
        ("n01440764_tench.jpg", "n01440764_tench"),
    ],
)
def test_classes_are_read_from_names(name, expected):
    assert class_of(name) == expected


@pytest.mark.parametrize("classes", [["a", "b", "c"], ["a", "a", "a"]])
def test_one_class_or_no_pair_has_no_scores(classes):
    with pytest.raises(DataError, match="two classes, and two pictures of one"):
        neighbour_scores(np.eye(3), classes)


@pytest.mark.parametrize(("backbone", "kinds"), [("toy-vit", {"knn", "map"}), ("toy-cnn", {"knn", "map"})])
def test_pictures_of_one_colour_find_each_other(tmp_path, backbone, kinds):
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        for number in range(3):
            pixels = (np.array(colour) + rng.integers(-20, 20, (40, 56, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{name}_{number}.png")
    (tmp_path / "red_9.png").write_bytes(b"no picture")
    path = tmp_path / "result.json"
    command = ["eval", "neighbours", "--data", str(tmp_path), "--backbone", backbone, "--upsampler", "bilinear-2x"]
    assert main([*command, "--json", str(path)]) == 0
    (encoder,) = json.loads(path.read_text())["encoders"].values()
    result = encoder["result"]
    assert (result["classes"], result["queries"]) == (2, 6)
    assert result["map_pooled"]["value"] == result["map"]["value"] == 1
    assert [name for name, _ in encoder["skipped"]] == ["red_9.png"]
    assert encoder["items"]["red_0.png"] == {"class": "red"}
