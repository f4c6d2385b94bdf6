"""Quality against cost: the front, what is measured on, the costs, and going on after an interruption."""

import json

import numpy as np
import pytest

from featsharp.bench.encode import measure_cost
from featsharp.bench.workloads import list_ready
from featsharp.builder import create_encoder, load_from_file
from featsharp.cli.main import main
from featsharp.errors import DataError
from featsharp.evaluation import pareto
from featsharp.evaluation.measures import AllTask, PhotoTask
from featsharp.evaluation.pareto import ParetoTask, find_front
from featsharp.evaluation.runner import Subject, evaluate

pytest.importorskip("skimage")


def test_the_front_of_random_points():
    """Walking up in cost, a point is on the front where it is better than all before it."""
    costs = np.random.default_rng(0).integers(0, 12, 60)
    values = np.random.default_rng(1).integers(0, costs + 1)
    points = {str(number): (int(cost), int(values[number])) for number, cost in enumerate(costs)}
    best = {cost: max(v for c, v in points.values() if c <= cost) for cost, _ in points.values()}
    first = {value: min(c for c, v in points.values() if v >= value) for _, value in points.values()}
    expected = {name for name, (cost, value) in points.items() if value == best[cost] and cost == first[value]}
    assert find_front(points) == expected
    assert 1 < len(expected) < 20


def test_candidates_need_no_training():
    ready = list_ready("vits14-focus")
    assert {"bilinear-2x", "tile-2x", "views-2x", "views-2x?passes=4", "views-2x?views=hr-dv2"} < set(ready)
    assert "vits14-focus/featsharp-2x" in ready
    others = ("featsharp", "custom", "super-resolution", "identity", "s2")  # untrained, of the user's, no second map
    assert not any(name.startswith(f"{other}-") for name in ready for other in others)
    assert not any("/" in name for name in list_ready("toy-vit"))
    for name in list_ready("toy-vit", 1.5):
        assert load_from_file(name, featurizer="toy-vit").factor == 1.5


@pytest.mark.parametrize(("upsampler", "passes"), [("bilinear", 1), ("tile", 5), ("native-highres", None)])
def test_passes_are_operations(upsampler, passes):
    """Of a pass over four times the tokens, linear layers take four times as many and attention sixteen times."""
    encoder = create_encoder("toy-vit", upsampler, 2)
    cost = measure_cost(encoder)
    assert cost["passes"] == pytest.approx(passes) if passes else 1 + 4 < cost["passes"] < 1 + 16
    assert cost["seconds_of_pass"] > 0
    assert cost["seconds"] > 0


def test_package_photographs_serve_without_data(tmp_path, capsys):
    path = tmp_path / "pareto.json"
    command = ["eval", "pareto", "--backbone", "toy-vit", "--limit", "2", "--json", str(path), "--dtype", "float32"]
    assert main([*command, "--upsampler", "views-2x?passes=4", "bilinear-2x"]) == 0
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["encoder", "bilinear-2x", "views-2x?passes=4"]  # by passes
    assert lines[0].split()[1:] == ["passes", "ms", "fidelity", "zoom"]
    result = json.loads(path.read_text())["encoders"]["bilinear-2x"]
    assert list(result["items"]) == [item.name for item in ParetoTask(limit=2).items()]
    assert lines[1].split()[1] == "1.0"
    assert lines[1].split()[3] == f"{result['result']['fidelity']['value']:.2f}*+"
    assert result["result"]["fidelity"]["low"] < result["result"]["fidelity"]["value"]


def test_the_numbers_are_those_of_all_measures(tmp_path):
    task = ParetoTask(limit=2)
    folder = tmp_path / "photos"
    folder.mkdir()
    for item in task.items():
        source, index, _ = item.data[1].data
        (folder / source.name(index).rpartition("/")[2]).write_bytes(source.read(index))
    encoder = create_encoder("toy-vit", "bilinear", 2)
    packages, alone, data = (
        evaluate(one, [Subject("x", lambda: encoder)], progress=False)["x"]["result"]
        for one in (task, PhotoTask(folder), ParetoTask(tmp_path, measures=("photos",)))
    )
    assert packages["fidelity"] == data["fidelity"] == alone["fidelity"]
    assert packages["zoom"] == data["zoom"] == alone["zoom_cosine"]
    assert list(ParetoTask(tmp_path, measures=("photos",)).parts) == list(AllTask(tmp_path, measures=("photos",)).parts)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    command = ["eval", "pareto", "--backbone", "toy-vit", "--limit", "2", "--json", str(tmp_path / "pareto.json")]
    command += ["--upsampler", "bilinear-2x", "tile-2x"]
    measured, measure = [], ParetoTask.measure

    def stop_at_the_third(self, encoder, item, head):
        measured.append((encoder.caption, item.name))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, encoder, item, head)

    monkeypatch.setattr(ParetoTask, "measure", stop_at_the_third)
    assert main(command) != 0
    assert not (tmp_path / "pareto.json").exists()
    assert main(command) == 0
    assert measured[3:] == [measured[2], ("tile 2x", [item.name for item in ParetoTask(limit=2).items()][1])]


def test_without_photographs(monkeypatch):
    monkeypatch.setattr(pareto, "PHOTOGRAPHS", {"no_such_package": ("a.png",)})
    with pytest.raises(DataError, match="no package with photographs is installed; give --data"):
        list(ParetoTask().items())
