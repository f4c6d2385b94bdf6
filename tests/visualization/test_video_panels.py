"""Videos of features: times, turning, one basis, broken frames, and memory that does not grow."""

import gc
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featsharp
from featsharp.cli.main import main
from featsharp.data.images import image_to_tensor
from featsharp.errors import ConfigError, DataError, FeatSharpError
from featsharp.extraction import Options, extract
from featsharp.extraction.video import Frame, decode_frames
from featsharp.visualization.panels import compare_maps
from featsharp.visualization.pca import FeaturePCA
from featsharp.visualization.video import write_comparison_video

av = pytest.importorskip("av")
SIZE = (48, 64)


@pytest.fixture(scope="module")
def encoder() -> featsharp.SharpEncoder:
    return featsharp.create_encoder("toy-vit", "bilinear", 2)


def film(
    path: Path, times: list[Fraction], size: tuple[int, int] = SIZE, *, broken: tuple[int, ...] = (), codec: str = "png"
) -> list[np.ndarray]:
    """Write frames of a moving square at given times, without loss; a packet of nothing for those that are broken."""
    frames = []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.height, stream.width = size
        stream.pix_fmt = {"png": "rgb24", "h264": "yuv420p"}[codec]
        stream.time_base = stream.codec_context.time_base = Fraction(1, 90000)
        for number, time in enumerate(times):
            pixels = np.full((*size, 3), 40, np.uint8)
            pixels[8:24, (3 * number) % 40 : (3 * number) % 40 + 16] = (220, 30 + 5 * (number % 40), 60)
            pixels[-6:] = (20, 60, 230)  # the lower edge
            frames.append(pixels)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = round(time * 90000), Fraction(1, 90000)
            for packet in stream.encode(frame):
                if number in broken:
                    bad = av.Packet(b"\0" * 40)
                    bad.pts, bad.dts, bad.time_base, bad.stream = packet.pts, packet.dts, packet.time_base, stream
                    packet = bad
                container.mux(packet)
        container.mux(stream.encode())
    return frames


def read(path: Path) -> list[Frame]:
    with av.open(str(path)) as container:
        frames = list(decode_frames(container))
    assert all(isinstance(frame, Frame) for frame in frames)
    return frames


def even(count: int, rate: int = 12) -> list[Fraction]:
    return [Fraction(number, rate) for number in range(count)]


def test_a_video_shows_each_frame_beside_its_features_in_one_basis(tmp_path, encoder):
    frames = film(tmp_path / "clip.mov", even(17))
    report = write_comparison_video(encoder, tmp_path / "clip.mov", tmp_path / "out.mp4", batch=5)
    assert (report.frames, report.broken, report.basis_frames) == (17, [], 16)
    chosen = sorted({number * 17 // 16 for number in range(16)})
    maps = [encoder.encode_image(frames[number]).low_res for number in chosen]
    basis = FeaturePCA(torch.cat([one.flatten(2) for one in maps], 2)[:, :, None])
    written = read(tmp_path / "out.mp4")
    assert [frame.time for frame in written] == even(17)
    for number in (0, 7, 16):
        out = encoder.encode_image(frames[number])
        image = torch.from_numpy(frames[number]).permute(2, 0, 1) / 255
        expected = compare_maps(image, out.low_res, out.high_res, basis, encoder.caption)
        shown = image_to_tensor(written[number].picture)[:, : expected.shape[1], : expected.shape[2]]
        assert (shown - expected).abs().mean() < 0.02  # what H.264 loses
        wrong = image_to_tensor(written[(number + 6) % 17].picture)[:, : expected.shape[1], : expected.shape[2]]
        assert (shown - expected).abs().mean() < 0.5 * (wrong - expected).abs().mean()


def test_times_are_kept_also_where_they_are_not_even(tmp_path, encoder):
    times = [Fraction(t) for t in ("2", "2.04", "2.5", "2.51", "4")]  # starts late, as a cut of a film does
    film(tmp_path / "clip.mov", times)
    write_comparison_video(encoder, tmp_path / "clip.mov", tmp_path / "out.mp4")
    assert [float(frame.time) for frame in read(tmp_path / "out.mp4")] == pytest.approx([0, 0.04, 0.5, 0.51, 2])
    write_comparison_video(encoder, tmp_path / "clip.mov", tmp_path / "out.mkv", every=2, limit=2)
    written = read(tmp_path / "out.mkv")
    assert [float(frame.time - written[0].time) for frame in written] == pytest.approx([0, 0.5])
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_a_broken_frame_is_counted_and_ends_nothing(tmp_path, encoder):
    film(tmp_path / "clip.mov", even(9), broken=(3, 8))
    report = write_comparison_video(encoder, tmp_path / "clip.mov", tmp_path / "out.mp4")
    assert (report.frames, len(report.broken)) == (7, 2)
    assert "InvalidDataError" in report.broken[0]
    kept = [Fraction(number, 12) for number in range(9) if number not in (3, 8)]
    assert [frame.time for frame in read(tmp_path / "out.mp4")] == kept
    store = extract(encoder, tmp_path / "clip.mov", tmp_path / "store", Options(every=2, limit=4), progress=False)
    assert list(store) == [f"clip.mov/{number:06d}" for number in (0, 2, 4, 6)]
    store = extract(encoder, tmp_path / "clip.mov", tmp_path / "all", progress=False)
    assert [name for name, _ in store.skipped] == ["clip.mov/000003", "clip.mov/000008"]
    assert len(store) == 7


# a, b, c, d of the matrix (x, y) -> (a x + c y, b x + d y), y downwards, and what it does to an array of pixels.
MATRICES = {
    "clockwise": ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),
    "half": ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
    "counterclockwise": ((0, -1, 1, 0), np.rot90),
}


@pytest.mark.parametrize("turn", MATRICES)
def test_a_turned_video_is_shown_upright(tmp_path, encoder, turn):
    frames = film(tmp_path / "clip.mp4", even(3), codec="h264")
    (a, b, c, d), turned = MATRICES[turn]
    content = bytearray((tmp_path / "clip.mp4").read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # the header of the track, as ISO 14496-12 lays it out
    unit = 65536
    assert struct.unpack(">9i", content[start : start + 36]) == (unit, 0, 0, 0, unit, 0, 0, 0, 1 << 30)
    content[start : start + 36] = struct.pack(">9i", a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(content)
    for frame, pixels in zip(read(tmp_path / "turned.mp4"), frames, strict=True):
        expected = turned(pixels).astype(float)
        shown = np.asarray(frame.picture, float)
        assert shown.shape == expected.shape
        assert np.abs(shown - expected).mean() < 12
    write_comparison_video(encoder, tmp_path / "turned.mp4", tmp_path / "out.mp4", limit=1)
    (written,) = read(tmp_path / "out.mp4")
    part = written.picture.width / 3
    assert written.picture.height > part if turn != "half" else written.picture.height < part


def test_frames_are_decoded_as_they_are_wanted(tmp_path):
    """No more than a few are ever held: the first one is there before the file has been read to its end."""
    film(tmp_path / "clip.mov", even(300))
    with open(tmp_path / "clip.mov", "rb") as file, av.open(file) as container:
        frames = decode_frames(container)
        assert isinstance(next(frames), Frame)
        assert file.tell() < 0.8 * (tmp_path / "clip.mov").stat().st_size


@pytest.mark.slow
def test_a_long_video_holds_no_more_frames_than_a_short_one(tmp_path, encoder):
    def count_alive() -> int:
        return sum(type(one) is Image.Image for one in gc.get_objects())

    def count_at_the_end(frames: int) -> int:
        film(tmp_path / "clip.mov", even(frames))
        calls, alive = iter(range(frames)), []
        options = {"batch": 3, "on_frame": lambda _: alive.append(count_alive()) if next(calls) == frames - 2 else None}
        write_comparison_video(encoder, tmp_path / "clip.mov", tmp_path / "out.mp4", **options)
        return alive[0]

    gc.collect()
    before = count_alive()
    assert before + 3 <= count_at_the_end(6) == count_at_the_end(30) < before + 8  # about a batch


def test_what_is_no_video_is_refused(tmp_path, encoder):
    (tmp_path / "text.mp4").write_text("no film", encoding="utf-8")
    film(tmp_path / "clip.mov", even(2))
    film(tmp_path / "ruin.mov", even(3), broken=(0, 1, 2))
    with pytest.raises(DataError, match=r"text.mp4: cannot be opened as a video"):
        write_comparison_video(encoder, tmp_path / "text.mp4", tmp_path / "out.mp4")
    with pytest.raises(DataError, match=r"none of 3 frames can be decoded"):
        write_comparison_video(encoder, tmp_path / "ruin.mov", tmp_path / "out.mp4")
    with pytest.raises(ConfigError, match=r"ends in .mp4, .m4v, .mov, .mkv; got 'out.gif'"):
        write_comparison_video(encoder, tmp_path / "clip.mov", tmp_path / "out.gif")
    assert not list(tmp_path.glob("*out*"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FeatSharpError, match="cannot write"):
        write_comparison_video(encoder, tmp_path / "clip.mov", tmp_path / "file" / "out.mp4")


def test_the_command(tmp_path, capsys):
    film(tmp_path / "clip.mov", even(5), broken=(2,))
    options = ["--backbone", "toy-vit", "--upsampler", "bilinear-2x"]
    clip, out = str(tmp_path / "clip.mov"), tmp_path / "out.mp4"
    assert main(["video", clip, "-o", str(out), *options]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}  4 frames, 1 broken; one PCA basis, fitted to 4 frames\n"
    assert "InvalidDataError" in printed.err
    assert main(["video", clip, "--features", str(tmp_path / "store"), *options, "--limit", "4"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'store'}  features of 3 frames, 1 broken\n"
    store = featsharp.extraction.open(tmp_path / "store")
    assert store["clip.mov/000003"].shape[0] == 32
    assert main(["video", clip, "-o", clip, *options]) == 1
    assert "would overwrite the input" in capsys.readouterr().err
    assert main(["video", str(tmp_path / "none.mp4"), "-o", str(out), *options]) == 1
