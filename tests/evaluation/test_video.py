"""Label propagation and flicker on clips with known answers; their rules against loops."""

import math
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
from featsharp.evaluation.flicker import FlickerTask, follow
from featsharp.evaluation.layouts.davis import find_clips, find_masked_clips
from featsharp.evaluation.runner import Subject, Task, evaluate
from featsharp.evaluation.shared_protocol import ProtocolTask
from featsharp.evaluation.video import VideoTask, boundary_score, neighbours, propagate, region_score

SIZE = (24, 40)


class Colours(Backbone):
    """Features that are the colour of each pixel; of no colour, where they are random."""

    def __init__(self, *, random: bool = False, channels: int = 4) -> None:
        super().__init__("colours", patch_size=1, embed_dim=channels, input_size=SIZE, mean=(0, 0, 0), std=(1, 1, 1))
        self.generator = torch.Generator().manual_seed(0) if random else None
        self.freeze()

    def extract(self, images: Tensor) -> BackboneOutput:
        if self.generator is not None:
            return BackboneOutput(torch.randn(len(images), 4, *images.shape[-2:], generator=self.generator), None)
        return BackboneOutput(torch.cat([images - 0.5, 0 * images[:, :1] + 0.1], 1)[:, : self.embed_dim], None)


def write_clip(root: Path, name: str = "boat", frames: int = 5, year: int = 2017) -> list[np.ndarray]:
    """A red and a green box that move over blue, each frame a cell of two pixels further."""
    masks = []
    for folder in ("JPEGImages", "Annotations"):
        (root / folder / "480p" / name).mkdir(parents=True)
    for number in range(frames):
        mask = np.zeros(SIZE, np.uint8)
        mask[4:12, 4 + 2 * number : 14 + 2 * number] = 1
        mask[14:22, 24 - 2 * number : 32 - 2 * number] = 2
        colours = np.array([(20, 20, 200), (220, 30, 30), (30, 220, 30)], np.uint8)
        Image.fromarray(colours[mask]).save(root / f"JPEGImages/480p/{name}/{number:05d}.png")
        stored = Image.fromarray(mask if year == 2017 else np.where(mask == 1, 255, 0).astype(np.uint8))
        if year == 2017:
            stored.putpalette(colours.tobytes())
        stored.save(root / f"Annotations/480p/{name}/{number:05d}.png")
        masks.append(mask)
    return masks


def measure(task: Task, backbone: Backbone | None = None) -> dict:
    subject = Subject("x", lambda: create_encoder(backbone or Colours(), "identity", 1))
    return evaluate(task, [subject], progress=False)["x"]


@pytest.mark.parametrize("year", [2016, 2017])
def test_perfect_features_keep_every_object(tmp_path, year):
    pytest.importorskip("scipy")
    write_clip(tmp_path, year=year)
    result = measure(VideoTask(tmp_path, low_res_size=(12, 20)))["result"]
    for name in ("j_and_f", "j", "f", "j_recall", "f_recall"):
        assert result[name] == {"value": 1, "low": 1, "high": 1}
    assert result["objects"] == (2 if year == 2017 else 1)


def test_random_features_score_chance(tmp_path):
    """Labels drawn at random from a mask of a share p hit with p^2, of a union of 2 p - p^2."""
    pytest.importorskip("scipy")
    write_clip(tmp_path, frames=8, year=2016)
    for path in (tmp_path / "Annotations/480p/boat").iterdir():
        mask = np.zeros(SIZE, np.uint8)
        mask[:, :20] = 255
        Image.fromarray(mask).save(path)
    task = VideoTask(tmp_path, low_res_size=SIZE, neighbourhood=10, top=1)
    result = measure(task, Colours(random=True))["result"]
    assert result["j"]["value"] == pytest.approx(1 / 3, abs=0.05)


def test_labels_come_from_the_cells_that_a_loop_finds():
    """DINO's code as loops: exp of cosines over the temperature, those below the k-th largest are 0, then a mean."""
    generator = torch.Generator().manual_seed(3)
    cells, reach, top, temperature = (4, 5), (1.0, 2.5), 3, 0.1
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    earlier = [(F.normalize(draw(6, 20) - 0.5, dim=0), draw(2, 20)) for _ in range(3)]
    features = F.normalize(draw(6, 20) - 0.5, dim=0)
    expected = torch.zeros(2, 20)
    for cell in range(20):
        weights, labels = [], []
        for known, label in earlier:
            for other in range(20):
                (y, x), (v, u) = divmod(cell, 5), divmod(other, 5)
                if abs(y - v) <= reach[0] and abs(x - u) <= reach[1]:
                    weights.append(math.exp(float(features[:, cell] @ known[:, other]) / temperature))
                    labels.append(label[:, other])
        least = sorted(weights)[-top]
        kept = torch.tensor([weight if weight >= least else 0 for weight in weights])
        expected[:, cell] = (torch.stack(labels, 1) * kept).sum(1) / kept.sum()
    found = propagate(earlier, features, neighbours(cells, reach), top, temperature)
    torch.testing.assert_close(found, expected)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((60, 80), dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def test_regions_and_boundaries_by_hand():
    pytest.importorskip("scipy")
    none, one = box(0, 0, 0, 0), box(10, 30, 20, 50)
    assert region_score(none, none) == boundary_score(none, none) == 1
    assert region_score(one, one) == boundary_score(one, one) == 1
    assert region_score(none, one) == region_score(one, none) == 0
    assert boundary_score(none, one) == boundary_score(one, none) == 0
    # Ten of thirty columns are common, of fifty in all; 0.008 of a diagonal of 100 is 1 pixel, rounded up.
    assert region_score(one, box(10, 30, 40, 70)) == pytest.approx(10 / 50)
    assert boundary_score(one, box(11, 31, 20, 50)) == 1
    assert boundary_score(one, box(40, 50, 60, 70)) == 0


def test_boundaries_are_matched_as_a_loop_does():
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    masks = [rng.random((21, 34)) < 0.1 for _ in range(2)]
    reach = math.ceil(0.008 * math.hypot(21, 34))

    def edges(mask: np.ndarray) -> list[tuple[int, int]]:
        found = []
        for y in range(21):
            for x in range(34):
                below, right = min(y + 1, 20), min(x + 1, 33)
                others = mask[y, right], mask[below, x], mask[below, right]
                if any(other != mask[y, x] for other in others):
                    found.append((y, x))
        return found

    first, second = map(edges, masks)
    shares = [
        sum(any(math.hypot(y - v, x - u) <= reach for v, u in b) for y, x in a) / len(a)
        for a, b in ((first, second), (second, first))
    ]
    assert boundary_score(*masks) == pytest.approx(2 * shares[0] * shares[1] / sum(shares))
    assert 0.2 < boundary_score(*masks) < 1


def test_a_damaged_clip_is_counted_and_lists_are_kept_to(tmp_path):
    pytest.importorskip("scipy")
    for name in ("boat", "car", "dog"):
        write_clip(tmp_path, name, frames=3)
    (tmp_path / "Annotations/480p/car/00001.png").write_bytes(b"junk")
    outcome = measure(VideoTask(tmp_path))
    assert list(outcome["items"]) == ["boat", "dog"]
    assert outcome["skipped"][0][0] == "car"
    assert "00001.png: cannot be read as labels" in outcome["skipped"][0][1]
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("dog\nfox\n")
    assert [clip.name for clip in find_masked_clips(tmp_path)] == ["dog", "fox"]
    assert "fox has 0 frames" in dict(measure(VideoTask(tmp_path))["skipped"])["fox"]
    with pytest.raises(DataError, match=r"has no clips with masks; expected JPEGImages/480p/CLIP/NNNNN\.jpg"):
        find_masked_clips(tmp_path / "Annotations")


def test_the_shared_protocol_has_the_same_numbers(tmp_path):
    write_clip(tmp_path)
    task = ProtocolTask("davis", tmp_path)
    ours = measure(task)
    assert ours["result"] == measure(VideoTask(tmp_path))["result"]
    assert "J&F" in "\n".join(task.table({"x": ours})).splitlines()[1]


def write_frames(root: Path, frames: list[np.ndarray]) -> Path:
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(root / f"{number:02d}.png")
    return root


def textures(count: int, shape: tuple[int, int]) -> list[np.ndarray]:
    """Smooth random pictures."""
    noise = torch.rand(count, 3, shape[0] // 4, shape[1] // 4, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise, shape, mode="bicubic").clamp(0, 1)
    return list((255 * smooth).byte().permute(0, 2, 3, 1).numpy())


def test_frames_that_stay_do_not_flicker_and_unrelated_ones_do(tmp_path):
    one, other, last = textures(3, (48, 80))
    write_frames(tmp_path, [one, one, other, last])
    outcome = measure(FlickerTask(tmp_path, motion="none"), Colours(random=True))
    # The same picture gives other random features: nothing changes but these.
    assert next(iter(outcome["items"].values()))["pixel_change"] < 1e-9
    assert outcome["result"]["feature_change"] == pytest.approx(1, abs=0.03)
    outcome = measure(FlickerTask(tmp_path, motion="none"))
    same, unrelated, _ = outcome["items"].values()
    assert same["feature_change"] < 1e-9
    assert unrelated["feature_change"] == pytest.approx(1, abs=0.3)
    assert outcome["result"]["trusted"] == 1


def test_clips_are_resampled_whole(tmp_path):
    """Of two clips the interval reaches from one to the other, however many pairs of frames they have."""
    one, other, last = textures(3, (48, 80))
    slow = np.uint8(0.9 * one + 0.1 * other)
    alone = {}
    for name, frames in (("slow", [one, slow] * 3), ("unrelated", [one, other, last])):
        (tmp_path / name).mkdir()
        result = measure(FlickerTask(write_frames(tmp_path / name, frames), motion="none"))["result"]
        alone[name] = {key: result[key] for key in ("feature_change", "pixel_change", "flicker")}
    outcome = measure(FlickerTask(tmp_path, motion="none"))
    result = outcome["result"]
    assert result["by_clip"] == alone
    assert (result["clips"], result["pairs"]) == (2, 7)
    for name in ("feature_change", "pixel_change"):
        assert [result[name]["low"], result[name]["high"]] == sorted(clip[name] for clip in alone.values())
    lines = FlickerTask(tmp_path).table({"x": outcome})
    assert [line.split()[:2] for line in lines] == [["encoder", "clip"], ["x", "slow"], ["x", "unrelated"]]


def test_features_are_followed_along_the_motion(tmp_path):
    pytest.importorskip("skimage")
    (large,) = textures(1, (56, 88))
    write_frames(tmp_path, [large[4:52, 4:84], large[2:50, 1:81]])  # what was at (x, y) is now at (x + 3, y + 2)
    grey = [np.asarray(Image.open(tmp_path / f"0{n}.png")).mean(-1) / 255 for n in range(2)]
    motion = follow(*grey)
    inside = np.s_[12:36, 12:68]
    y, x = np.mgrid[:48, :80]
    assert np.abs(motion.places[inside] * (80, 48) - np.stack([x + 3.5, y + 2.5], -1)[inside]).max() < 0.5
    assert motion.trusted[inside].mean() > 0.95
    followed, not_followed = (
        measure(FlickerTask(tmp_path, motion=motion))["result"]["feature_change"] for motion in ("flow", "none")
    )
    assert followed < 0.1 * not_followed


def test_flows_are_kept_up_to_a_limit(tmp_path):
    write_frames(tmp_path, textures(4, (48, 80)))
    task = FlickerTask(tmp_path, motion="none")
    kept = measure(task)
    of_one = next(iter(task._motions.values())).bytes
    assert len(task._motions) == 3
    limited = FlickerTask(tmp_path, motion="none", flow_limit=f"{2 * of_one}B")
    assert measure(limited) == kept
    assert len(limited._motions) == 2


def test_clips_are_found(tmp_path):
    write_clip(tmp_path / "davis", frames=3)
    assert [len(clip.frames) for clip in find_clips(tmp_path / "davis")] == [3]
    frames = find_clips(tmp_path / "davis" / "JPEGImages" / "480p")
    assert [clip.name for clip in frames] == ["boat"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no frames; expected JPEGImages"):
        find_clips(tmp_path / "none")


def test_the_commands(tmp_path, capsys):
    pytest.importorskip("scipy")
    write_clip(tmp_path, frames=3)
    options = ["--data", str(tmp_path), "--backbone", "toy-vit", "--upsampler", "tile-2x", "--low-res-size", "16x32"]
    assert main(["eval", "video", *options]) == 0
    assert main(["eval", "flicker", "--motion", "none", *options]) == 0
    out = capsys.readouterr().out
    assert "j_and_f" in out
    assert "feature_change" in out
