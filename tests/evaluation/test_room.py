"""Real views of a room: a synthetic twin with known answers, the rule against loops, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from featsharp.backbones.base import Backbone, BackboneOutput
from featsharp.builder import create_encoder
from featsharp.cli.main import main
from featsharp.errors import DataError
from featsharp.evaluation.layouts.rgbd import find_frames, read_depth, read_intrinsics, read_pose
from featsharp.evaluation.room import RoomTask
from featsharp.evaluation.runner import Subject, evaluate

SIZE = (192, 256)
FOCAL, DISTANCE = 200.0, 2.0
STEP = 0.08  # metres from frame to frame, 8 pixels


class Colours(Backbone):
    """Two angles per pixel, of red and of green, so that the nearest colour is the nearest feature."""

    def __init__(self) -> None:
        super().__init__("colours", patch_size=1, embed_dim=4, input_size=(64, 64), mean=(0, 0, 0), std=(1, 1, 1))
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        angles = 3 * images[:, :2]
        return BackboneOutput(torch.cat([angles.cos(), angles.sin()], 1), None)


class Random(Backbone):
    """Features that have nothing to do with each other, one per pixel."""

    def __init__(self) -> None:
        super().__init__("random", patch_size=1, embed_dim=16, input_size=(32, 32))
        self.generator = torch.Generator().manual_seed(0)
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        return BackboneOutput(torch.randn(len(images), 16, *images.shape[-2:], generator=self.generator), None)


def write_room(root: Path, frames: int = 4) -> Path:
    """A camera that moves to the right along a wall whose colours say the place."""
    root.mkdir(exist_ok=True)
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    for number in range(frames):
        red = (u + FOCAL * STEP / DISTANCE * number) * 255 / (SIZE[1] + 8 * frames)
        colours = np.stack([red, v * 255 / SIZE[0], 0 * v], -1).round().astype(np.uint8)
        Image.fromarray(colours).save(root / f"{number:03d}.color.png")
        Image.fromarray(np.full(SIZE, 1000 * DISTANCE, np.uint16)).save(root / f"{number:03d}.depth.png")
        pose = np.eye(4)
        pose[0, 3] = STEP * number
        np.savetxt(root / f"{number:03d}.pose.txt", pose)
    np.savetxt(root / "camera-intrinsics.txt", [[FOCAL, 0, SIZE[1] / 2], [0, FOCAL, SIZE[0] / 2], [0, 0, 1]])
    return root


def measure(
    root: Path, backbone: Backbone | None = None, upsampler: tuple = ("identity", 1), **settings: object
) -> dict:
    task = RoomTask(root, **{"every": 1, **settings})  # type: ignore[arg-type]
    subject = Subject("x", lambda: create_encoder(backbone or Colours(), *upsampler))
    return evaluate(task, [subject], progress=False)["x"]


def test_perfect_features_find_every_point(tmp_path):
    outcome = measure(write_room(tmp_path))
    assert not outcome["skipped"]
    assert list(outcome["items"]) == [
        f"00{a}.color.png-00{b}.color.png" for a, b in ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))
    ]
    result = outcome["result"]
    assert result["room@10"]["value"] == result["room@20"]["value"] == 1
    assert result["pairs"] == 5
    # Of 400 points those that leave the picture on its left are lost: 4 pixels of border and 8 for each step.
    assert 0.9 * 2000 < result["points"] < 2000


def test_random_features_score_chance(tmp_path):
    result = measure(write_room(tmp_path, 8), Random(), ("tile", 2))["result"]
    # A circle of 20 pixels of 640, inside a picture of 640 x 480.
    chance, points = np.pi * 20**2 / (640 * 480), result["points"]
    assert result["room@20"]["value"] == pytest.approx(chance, abs=3 * np.sqrt(chance / points))
    assert result["room@10"]["value"] < 0.5 * chance


def test_the_scores_are_what_the_rule_says(tmp_path):
    """Turned cameras, a slanted wall and something before it, against loops over the points."""
    rng = np.random.default_rng(1)
    write_room(tmp_path)
    poses, depths, features = [], [], []
    backbone = Colours()
    for number in range(4):
        angle = 0.05 * number
        pose = np.eye(4)
        pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        pose[:3, 3] = (0.03 * number, 0.01, -0.02 * number)
        v, u = np.mgrid[: SIZE[0], : SIZE[1]]
        # The wall z = 2 of the world, seen along the ray of each pixel.
        rays = np.stack([(u - SIZE[1] / 2) / FOCAL, (v - SIZE[0] / 2) / FOCAL, np.ones(SIZE)], -1) @ pose[:3, :3].T
        depth = ((2 - pose[2, 3]) / rays[..., 2] * 1000).astype(np.uint16)
        depth[40:90, 60 + 9 * number : 90 + 9 * number] = 900
        depth[:, 200:210], depth[100:110] = 0, 65535
        name = tmp_path / f"00{number}"
        np.savetxt(f"{name}.pose.txt", pose)
        Image.fromarray(depth).save(f"{name}.depth.png")
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(f"{name}.color.png")
        picture = Image.open(f"{name}.color.png").resize((128, 128), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        small = F.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        features.append(F.normalize(backbone.extract(small).features[0], dim=0).numpy().astype(float))
        poses.append(pose)
        depths.append(np.where(depth == 65535, 0, depth / 1000))
    draws = np.random.default_rng(0)
    expected = {}
    for gap in (1, 2):
        for a in range(4 - gap):
            b, hits, points = a + gap, [0, 0], 0
            rows, columns = draws.integers(8, SIZE[0] - 8, 400), draws.integers(8, SIZE[1] - 8, 400)
            for v, u in zip(rows, columns, strict=True):
                z = depths[a][v, u]
                if not 0.3 < z < 4:
                    continue
                place = np.array([(u - 128) / FOCAL * z, (v - 96) / FOCAL * z, z, 1])
                x, y, depth, _ = np.linalg.solve(poses[b], poses[a] @ place)
                x, y = x / depth * FOCAL + 128, y / depth * FOCAL + 96
                if not (4 < x < SIZE[1] - 4 and 4 < y < SIZE[0] - 4) or abs(depths[b][int(y), int(x)] - depth) >= 0.04:
                    continue
                at = torch.tensor([[[[(u + 0.5) / 128 - 1, (v + 0.5) / 96 - 1]]]])
                query = F.grid_sample(torch.tensor(features[a])[None], at, align_corners=False).numpy()[0, :, 0, 0]
                best = np.unravel_index(np.einsum("c,chw->hw", query, features[b]).argmax(), (64, 64))
                error = np.hypot((best[1] + 0.5) * 4 - x, (best[0] + 0.5) * 3 - y) * 640 / 256
                points += 1
                hits = [hit + bool(error < pixels) for hit, pixels in zip(hits, (10, 20), strict=True)]
            expected[f"00{a}.color.png-00{b}.color.png"] = {"points": points, "hits": hits}
    outcome = measure(tmp_path, backbone)
    assert outcome["items"] == expected
    assert min(row["points"] for row in expected.values()) > 100
    total = sum(row["points"] for row in expected.values())
    assert outcome["result"]["room@20"]["value"] == pytest.approx(sum(r["hits"][1] for r in expected.values()) / total)


def test_choices_and_seeds(tmp_path):
    write_room(tmp_path, 8)
    assert [item.name for item in RoomTask(tmp_path).items()] == ["000.color.png-004.color.png"]
    some, every, reseeded = (
        {item.name: item.data.u for item in RoomTask(tmp_path, every=2, limit=n, seed=s).items()}
        for n, s in ((3, 0), (None, 0), (3, 1))
    )
    names = list(every)
    assert list(some) == list(reseeded) == [names[0], names[1], names[3]]
    assert all(np.array_equal(u, every[name]) for name, u in some.items())
    assert not any(np.array_equal(u, reseeded[name]) for name, u in some.items())


def test_a_frame_is_encoded_once(tmp_path):
    write_room(tmp_path, 4)
    seen = []

    class Counted(Colours):
        def extract(self, images: Tensor) -> BackboneOutput:
            seen.append(len(images))
            return super().extract(images)

    measure(tmp_path, Counted())
    assert sum(seen) == 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("001.depth.png", None, r"001\.depth\.png: no such file; every frame needs its depth"),
        ("001.pose.txt", None, r"001\.pose\.txt: no such file"),
        ("001.depth.png", b"junk", "cannot be decoded as depth"),
        ("001.pose.txt", b"nan " * 16, "expected 4 x 4 finite numbers"),
        ("001.pose.txt", b"1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 x 1", "cannot be read as a matrix"),
        ("001.pose.txt", b"2 0 0 0\n0 2 0 0\n0 0 2 0\n0 0 0 1", "is no pose of a camera"),
    ],
)
def test_frames_without_depth_or_pose_cost_their_pairs(tmp_path, name, content, message):
    write_room(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    outcome = measure(tmp_path)
    assert list(outcome["items"]) == ["000.color.png-002.color.png", "002.color.png-003.color.png"]
    assert len(outcome["skipped"]) == 3
    for _, reason in outcome["skipped"]:
        assert re.search(message, reason)


def test_frames_that_see_nothing_in_common_are_skipped(tmp_path):
    write_room(tmp_path)
    pose = np.eye(4)
    pose[0, 3] = 10
    np.savetxt(tmp_path / "003.pose.txt", pose)
    skipped = dict(measure(tmp_path)["skipped"])
    assert set(skipped) == {"001.color.png-003.color.png", "002.color.png-003.color.png"}
    assert skipped["002.color.png-003.color.png"] == "both frames see 0 of 400 points; 30 are needed"


def test_depth_of_another_size_or_kind(tmp_path):
    write_room(tmp_path)
    Image.fromarray(np.zeros((96, 128), np.uint16)).save(tmp_path / "001.depth.png")
    assert all("have one size; this one differs" in reason for _, reason in measure(tmp_path)["skipped"])
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "001.depth.png")
    with pytest.raises(DataError, match="16 bits per pixel; this image is of mode RGB"):
        read_depth(tmp_path / "001.depth.png")


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"holds no RGB-D frame; expected NAME\.color\.jpg"):
        find_frames(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        find_frames(tmp_path / "none")
    write_room(tmp_path, 2)
    (tmp_path / "camera-intrinsics.txt").write_text("0 0 1\n0 1 1\n0 0 1")
    with pytest.raises(DataError, match="is no camera matrix"):
        read_intrinsics(tmp_path)
    (tmp_path / "camera-intrinsics.txt").unlink()
    with pytest.raises(DataError, match=r"camera-intrinsics\.txt: no such file"):
        measure(tmp_path)
    for path in tmp_path.glob("*.depth.png"):
        path.unlink()
    with pytest.raises(DataError, match="every frame needs its depth"):
        measure(tmp_path)


def test_units(tmp_path):
    write_room(tmp_path, 2)
    depth = np.array([[0, 1, 1500, 65535]], np.uint16)
    Image.fromarray(depth).save(tmp_path / "d.png")
    assert read_depth(tmp_path / "d.png").tolist() == [[0, 0.001, 1.5, 0]]
    assert read_pose(tmp_path / "001.pose.txt")[0].tolist() == [1, 0, 0, STEP]


def test_the_command(tmp_path, capsys):
    write_room(tmp_path / "room", 3)
    command = ["eval", "room", "--data", str(tmp_path / "room"), "--every", "1", "--backbone", "toy-vit"]
    assert main([*command, "--upsampler", "bilinear-2x", "--json", str(tmp_path / "r.json")]) == 0
    assert "room@10" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["every"] == 1
