"""All measures in one table: the numbers that their tasks have alone, and those of an independent script."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from test_room import write_room

from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import ConfigError, DataError
from featsharp.evaluation.boundaries import BoundaryTask
from featsharp.evaluation.correspondence import CorrespondenceTask
from featsharp.evaluation.fidelity import FidelityTask
from featsharp.evaluation.measures import AllTask, PhotoTask
from featsharp.evaluation.room import RoomTask
from featsharp.evaluation.runner import Subject, Task, evaluate
from featsharp.evaluation.segmentation import SegmentationTask
from featsharp.evaluation.zoom import ZoomTask

SHARED = Path(__file__).resolve().parents[3] / "shared"


def picture(seed: int, size: tuple[int, int] = (96, 128)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A few pictures for every measure."""
    root = tmp_path / "data"
    folders = "photos", "pf_willow/g", "bsds/images", "bsds/groundTruth"
    splits = [f"camvid/{kind}/{split}" for kind in ("images", "labels") for split in ("train", "val")]
    for folder in (*folders, *splits):
        (root / folder).mkdir(parents=True)
    for number in range(4):
        picture(number).save(root / f"photos/{number}.png")
    for number in range(2):
        picture(number).save(root / f"pf_willow/g/{number}.png")
        points = np.random.default_rng(number).uniform(8, 88, (2, 10))
        savemat(root / f"pf_willow/g/{number}.mat", {"pts_coord": points})
        picture(number).save(root / f"bsds/images/{number}.png")
        cell = np.empty((1, 1), object)
        cell[0, 0] = {"Boundaries": np.random.default_rng(number).random((96, 128)) < 0.05}
        savemat(root / f"bsds/groundTruth/{number}.mat", {"groundTruth": cell})
    for split in ("train", "val"):
        for number in range(2):
            picture(number).save(root / f"camvid/images/{split}/{number}.png")
            labels = np.random.default_rng(number).integers(0, 3, (96, 128), np.uint8)
            Image.fromarray(labels).save(root / f"camvid/labels/{split}/{number}.png")
    write_room(root / "room_depth", 9)
    return root


def run(task: Task, upsampler: str = "bilinear") -> dict:
    encoder = create_encoder("toy-vit", upsampler, 2)
    return evaluate(task, [Subject("x", lambda: encoder)], progress=False)["x"]["result"]


def test_every_number_is_that_of_its_task(data):
    every = ("photos", "correspondence", "room", "boundaries", "segmentation")
    outcome = run(AllTask(data, measures=every))
    alone = [
        (FidelityTask(data / "photos"), {"fidelity": "fidelity_area"}),
        (ZoomTask(data / "photos"), {"zoom": "zoom_cosine"}),
        (CorrespondenceTask(data / "pf_willow", protocol="quick"), {"PCK@0.05": "pck@0.05", "PCK@0.1": "pck@0.1"}),
        (RoomTask(data / "room_depth"), {"room@10": "room@10", "room@20": "room@20"}),
        (BoundaryTask(data / "bsds", protocol="quick"), {"boundary F": "ods_f"}),
        (SegmentationTask(data / "camvid", protocol="quick"), {"mIoU": "miou"}),
    ]
    for task, names in alone:
        result = run(task)
        for name, metric in names.items():
            assert outcome.pop(name) == result[metric]
    assert set(outcome) == {"parts"}
    assert set(outcome["parts"]) == set(every)


def test_photographs_are_chosen_and_encoded_once(data):
    seen = []
    encoder = create_encoder("toy-vit", "bilinear", 2)
    encoder.upsampler.register_forward_hook(lambda *arguments: seen.append(arguments))
    task = AllTask(data, measures=("photos",), skip=1, every=2)
    items = list(evaluate(task, [Subject("x", lambda: encoder)], progress=False)["x"]["items"])
    assert items == ["photos: 1.png", "photos: 3.png"]
    assert len(seen) == 2
    assert run(task)["fidelity"] == run(FidelityTask(data / "photos", skip=1, every=2))["fidelity_area"]


def test_a_larger_factor_has_a_larger_picture_for_fidelity_alone(data):
    encoder = create_encoder("toy-vit", "bilinear", 4)
    subject = Subject("x", lambda: encoder)
    photos, zoom, fidelity = (
        evaluate(kind(data / "photos", limit=2), [subject], progress=False)["x"]["result"]
        for kind in (PhotoTask, ZoomTask, FidelityTask)
    )
    assert photos["zoom_cosine"] == zoom["zoom_cosine"]
    assert photos["fidelity"] == fidelity["fidelity_area"]


def test_the_command_prints_a_table_and_goes_on(data, tmp_path, capsys):
    path = tmp_path / "all.json"
    command = ["eval", "all", "--data", str(data), "--limit", "2", "--backbone", "toy-vit", "--json", str(path)]
    assert main([*command, "--upsampler", "bilinear-2x", "tile-2x", "--dtype", "float32"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()[-3:]
    assert " ".join(header.split()) == "encoder fidelity zoom PCK@0.05 PCK@0.1 room@10 room@20 boundary F"
    content = json.loads(path.read_text())
    for line, label in ((first, "bilinear-2x"), (second, "tile-2x")):
        words, result = line.split(), content["encoders"][label]["result"]
        assert words[0] == label
        assert words[1] == f"{result['fidelity']['value']:.2f}"
        assert words[4] == f"{100 * result['PCK@0.1']['value']:.1f}"
    assert not content["encoders"]["tile-2x"]["skipped"]


def test_a_folder_that_lacks_and_unknown_measures(data):
    (data / "room_depth").rename(data / "room")
    with pytest.raises(DataError, match="no folder room_depth, which room is measured on"):
        list(AllTask(data).items())
    assert list(AllTask(data, measures=("photos",)).items())
    with pytest.raises(ConfigError, match="unknown measure 'photo'; did you mean 'photos'"):
        AllTask(data, measures=("photo",))
    with pytest.raises(ConfigError, match="which measures"):
        AllTask(data, measures=())


def load_script(data: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", SHARED / "measure" / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.DATA = str(data)
    return script


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "measure").is_dir(), reason="shared/measure and shared/data are not here")
@pytest.mark.parametrize("upsampler", ["bilinear", "tile"])
def test_the_numbers_are_those_of_an_independent_script(tmp_path, upsampler):
    real = SHARED / "data"
    links = {f"photos/{number:03d}.jpg": None for number in range(650)}
    links |= {f"photos/{path.name}": path for path in sorted((real / "photos").glob("*.jpg"))[650:655]}
    links |= {f"pf_willow/{path.parent.name}/{path.name}": path for path in real.glob("pf_willow/car(G)/*")}
    frames = [path for number in range(9) for path in real.glob(f"room_depth/{6 * number:06d}.*")]
    links |= {f"room_depth/{path.name}": path for path in (*frames, real / "room_depth/camera-intrinsics.txt")}
    for picture in sorted((real / "bsds/train/images").glob("*.jpg"))[:2]:
        links[f"bsds/train/images/{picture.name}"] = picture
        truth = Path(f"bsds/train/groundTruth/{picture.stem}.mat")
        links[str(truth)] = real / truth
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if target is None:
            (tmp_path / name).touch()
        else:
            (tmp_path / name).symlink_to(target)
    script = load_script(tmp_path)
    encoder = create_encoder("vits14-focus", upsampler, 2)

    @torch.inference_mode()
    def encode(images: torch.Tensor) -> torch.Tensor:
        return encoder.backbone(images).features.float()

    entry = script.builtin(upsampler, encode)
    expected = {}
    for task in (script.mv, script.zoom, script.pck, script.room, script.edge):
        expected |= task(entry, encode)
    task = AllTask(tmp_path, skip=650, every=2)
    found = evaluate(task, [Subject("x", lambda: encoder)], progress=False)["x"]["result"]
    # The script's variance is that of a sample, of 3 x 4 x 196 tokens, and its numbers are rounded.
    tokens = 3 * 4 * 196
    assert found["fidelity"]["value"] * tokens / (tokens - 1) == pytest.approx(expected["mv_fidelity"], abs=6e-4)
    assert found["zoom"]["value"] == pytest.approx(expected["zoom_cos"], abs=6e-5)
    # One keypoint, and one point of the room, may find another cell of the same similarity, by the last bits.
    keypoint, point = (
        100 / found["parts"][part][count] for part, count in (("correspondence", "keypoints"), ("room", "points"))
    )
    for name, theirs, tie in (
        ("PCK@0.05", "pck@0.05", keypoint),
        ("PCK@0.1", "pck@0.1", keypoint),
        ("room@10", "room@10", point),
        ("room@20", "room@20", point),
    ):
        assert 100 * found[name]["value"] == pytest.approx(expected[theirs], abs=0.06 + tie)
    assert found["parts"]["room"]["points"] == expected["room_points"]
    assert found["boundary F"]["value"] == pytest.approx(expected["edge_f"], abs=6e-4)
