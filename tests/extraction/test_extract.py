"""Stores of features against one picture at a time, whoever made them and however often they were interrupted."""

import argparse
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.utils.data import DataLoader

import featsharp
from featsharp.cli import extract as extract_command
from featsharp.cli.main import main
from featsharp.device import find_device
from featsharp.errors import ConfigError, DataError, InputError
from featsharp.extraction import FeatureStore, Options, extract
from featsharp.extraction.compression import fit_pca
from featsharp.extraction.pipeline import DTYPES, POOLS
from featsharp.extraction.sinks import SINKS, file_names
from featsharp.extraction.sources import open_pictures

SIZES = [(96, 64), (64, 96), (96, 64), (40, 100), (33, 33), (96, 64), (64, 96)]


def paint(folder: Path, sizes: list[tuple[int, int]] = SIZES) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return paint(tmp_path / "photos")


@pytest.fixture(scope="module")
def encoder() -> featsharp.SharpEncoder:
    return featsharp.create_encoder("toy-vit", "bilinear", 2)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Values


@pytest.mark.parametrize("format", list(SINKS))
def test_every_format_holds_the_features_of_each_picture(photos, tmp_path, encoder, format):
    (photos / "bad.png").write_bytes(b"no picture")
    options = Options(format=format, dtype=torch.float32, summary=True, shard_size=3)
    store = extract(encoder, photos, tmp_path / "out", options, batch=2, progress=False)
    assert store.complete
    assert list(store) == [f"{number}.png" for number in range(7)]
    assert [name for name, _ in store.skipped] == ["bad.png"]
    for key in store:
        one = encoder.encode_image(photos / key, return_summary=True)
        torch.testing.assert_close(store[key], one.high_res[0], rtol=1e-5, atol=1e-5)
        assert one.summary is not None
        torch.testing.assert_close(store.tensor(key, "summary"), one.summary[0], rtol=1e-5, atol=1e-5)
        with Image.open(photos / key) as picture:
            assert store.image_size(key) == (picture.height, picture.width)


def test_other_libraries_read_every_format(photos, tmp_path, encoder):
    import webdataset
    import zarr

    stores = {}
    for format in SINKS:
        options = Options(format=format, dtype=torch.float32, shard_size=3)
        stores[format] = extract(encoder, photos, tmp_path / format, options, progress=False)
    expected = {key: stores["safetensors"][key].numpy() for key in stores["safetensors"]}
    read: dict[str, dict[str, np.ndarray]] = {format: {} for format in SINKS}
    for file in sorted((tmp_path / "safetensors" / "shards").iterdir()):
        with safe_open(file, "np") as shard:
            read["safetensors"] |= {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
    for key in expected:
        read["npy"][key] = np.load(tmp_path / "npy" / key.replace("png", "npy"))
        read["zarr"][key] = zarr.open(tmp_path / "zarr" / "features.zarr", mode="r")[key.removesuffix(".png")][:]
    tars = sorted(str(path) for path in (tmp_path / "webdataset" / "shards").iterdir())
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
        read["webdataset"][sample["json"]["key"]] = sample["features.npy"]
    for format, arrays in read.items():
        assert arrays.keys() == expected.keys(), format
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[key])


def test_half_types_round_the_features_once(photos, tmp_path, encoder):
    full = extract(encoder, photos, tmp_path / "float32", Options(dtype=torch.float32), progress=False)
    for dtype in (torch.float16, torch.bfloat16):
        store = extract(encoder, photos, tmp_path / str(dtype), Options(dtype=dtype), progress=False)
        for key in store:
            assert torch.equal(store[key], full[key].to(dtype))


def test_normalized_pooled_and_sized_features(photos, tmp_path):
    encoder = featsharp.load_from_file("bilinear-2x", featurizer="toy-vit")
    sized = extract(encoder, photos, tmp_path / "a", Options(output_size=(11, 9), size=(64, 32)), progress=False)
    assert {tuple(sized[key].shape) for key in sized} == {(32, 11, 9)}
    pooled = extract(encoder, photos, tmp_path / "b", Options(pool="mean", dtype=torch.float32), progress=False)
    for key in pooled:
        one = encoder.encode_image(photos / key).high_res[0]
        torch.testing.assert_close(pooled[key], one.mean((1, 2)), rtol=1e-5, atol=1e-5)


def test_principal_components_are_those_of_numpy(photos, tmp_path, encoder):
    full = extract(encoder, photos, tmp_path / "full", Options(dtype=torch.float32), progress=False)
    store = extract(encoder, photos, tmp_path / "pca", Options(dtype=torch.float32, pca=4), progress=False)
    cells = np.concatenate([full[key].flatten(1).T.numpy() for key in full]).astype(np.float64)
    _, _, basis = np.linalg.svd(cells - cells.mean(0), full_matrices=False)
    basis = basis[:4] * np.sign(np.take_along_axis(basis[:4], np.abs(basis[:4]).argmax(1)[:, None], 1))
    for key in store:
        expected = np.einsum("nc,chw->nhw", basis, full[key].numpy() - cells.mean(0)[:, None, None])
        np.testing.assert_allclose(store[key].numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_basis_of_pooled_features_is_fitted_to_enough_of_them(tmp_path, pool):
    """More components than the pictures that a basis of maps is fitted to; pooled first."""
    photos = paint(tmp_path / "photos", [(32, 32)] * 80)
    tokens = torch.nn.PixelUnshuffle(8)  # of 192 channels
    encoder = featsharp.create_encoder(featsharp.backbones.from_callable(tokens, input_size=(32, 32)), "identity")
    pooled = extract(encoder, photos, tmp_path / "a", Options(pool=pool, dtype="float32"), progress=False)
    store = extract(encoder, photos, tmp_path / "b", Options(pool=pool, dtype="float32", pca=70), progress=False)
    vectors = np.stack([pooled[key].numpy() for key in pooled]).astype(np.float64)
    _, _, basis = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    basis = basis[:70] * np.sign(np.take_along_axis(basis[:70], np.abs(basis[:70]).argmax(1)[:, None], 1))
    expected = (vectors - vectors.mean(0)) @ basis.T
    np.testing.assert_allclose(np.stack([store[key].numpy() for key in store]), expected, atol=2e-3)
    with pytest.raises(DataError, match="need more than the 80 features of these pictures"):
        extract(encoder, photos, tmp_path / "c", Options(pool=pool, pca=80), progress=False)


def test_an_odd_picture_is_skipped_with_principal_components_too(tmp_path, encoder):
    photos = paint(tmp_path / "photos", [(64, 64), (64, 64), (64, 640)])
    (photos / "bad.png").write_bytes(b"")
    skipped = []
    for pca in (None, 3):
        options = Options(output_size=(16, 16), pca=pca)
        store = extract(encoder, photos, tmp_path / f"{pca}", options, progress=False)
        assert list(store) == ["0.png", "1.png"]
        skipped.append(store.skipped)
    assert skipped[0] == skipped[1]
    assert [name for name, _ in skipped[0]] == ["2.png", "bad.png"]
    (tmp_path / "list.txt").write_text("photos/2.png")
    with pytest.raises(DataError, match="need more than the 0 features"):
        extract(encoder, tmp_path / "list.txt", tmp_path / "none", Options(output_size=(16, 16), pca=3))


def test_a_loaded_basis_projects_to_the_same_bits(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for count in range(1, 9):
        sample = [torch.randn(1, 32, 8, 8, generator=generator) for _ in range(2)]
        fitted, loaded = (fit_pca(tmp_path / f"{count}", count, lambda: iter(sample)) for _ in range(2))  # noqa: B023
        features = torch.randn(1, 32, 9, 9, generator=generator)
        assert torch.equal(fitted(features), loaded(features))


def test_a_store_is_a_mapping_and_a_dataset(photos, tmp_path, encoder):
    store = extract(encoder, photos, tmp_path / "out", progress=False)
    assert "0.png" in store
    assert store.get("none.png") is None
    with pytest.raises(KeyError, match=r"keys look like '0\.png'"):
        store["none.png"]
    loader = DataLoader(store.dataset(), batch_size=None, num_workers=2)
    assert [key for key, _ in loader] == list(store)
    with pytest.raises(DataError, match="is no store of features"):
        FeatureStore(photos)


# Sources


def test_lists_patterns_tars_and_single_pictures(photos, tmp_path, encoder):
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfphotos/0.png\r\n# a comment\r\n\r\nphotos/3.png\r\nphotos/0.png\r\n"
    )
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(photos / "1.png", "a/1.png")
    expected = {
        tmp_path / "list.txt": ["0.png", "3.png"],
        photos / "[12].png": ["1.png", "2.png"],
        tmp_path / "**" / "6.png": ["6.png"],
        tmp_path / "shard.tar": ["a/1.png"],
        photos / "4.png": ["4.png"],
    }
    for number, (source, keys) in enumerate(expected.items()):
        assert list(extract(encoder, source, tmp_path / f"out{number}", progress=False)) == keys


def test_tars_are_read_alike_however_they_are_named(photos, tmp_path, encoder):
    for number in (1, 2):
        with tarfile.open(tmp_path / f"s{number}.tar", "w") as tar:
            tar.add(photos / f"{number}.png", "x.png")
    (tmp_path / ".hidden.tar").write_bytes(b"")
    (tmp_path / "local.txt").write_text("s1.tar\ns2.tar\nphotos/3.png\n")
    (tmp_path / "urls.txt").write_text(f"file://{tmp_path}/s1.tar\nfile://{tmp_path}/s2.tar\n")
    keys = ["s1.tar/x.png", "s2.tar/x.png"]
    for number, (source, more) in enumerate(
        {
            tmp_path / "s*.tar": [],
            f"file://{tmp_path}/s*.tar": [],
            tmp_path / "s{1..2}.tar": [],
            tmp_path / "urls.txt": [],
            tmp_path / "local.txt": ["photos/3.png"],
            tmp_path / "**": [f"photos/{number}.png" for number in range(7)],
            tmp_path: [f"photos/{number}.png" for number in range(7)],
        }.items()
    ):
        store = extract(encoder, source, tmp_path.parent / f"{tmp_path.name}-{number}", progress=False)
        assert sorted(store) == sorted([*keys, *more])
        one = encoder.encode_image(photos / "2.png").high_res[0]
        torch.testing.assert_close(store["s2.tar/x.png"], one.half(), rtol=1e-2, atol=1e-2)
    (tmp_path / "s3.tar.gz").write_bytes(b"")
    for source in (tmp_path / "s*", tmp_path, f"file://{tmp_path}", f"file://{tmp_path}/s*"):
        with pytest.raises(DataError, match=r"s3\.tar\.gz: compressed tar files cannot be read at random"):
            open_pictures(source)
    (tmp_path / "empty.tar").write_bytes(bytes(10240))
    (tmp_path / "empty.txt").write_text("empty.tar")
    (tmp_path / "url.txt").write_text(f"file://{tmp_path}/empty.tar")
    for name in ("e*.tar", "empty.tar", "empty.txt", "url.txt"):
        with pytest.raises(DataError, match=r"no (pictures|images)"):
            open_pictures(tmp_path / name)
    (tmp_path / "url.txt").write_text(f"file://{tmp_path}/none.tar")
    with pytest.raises(DataError, match=r"none\.tar: cannot be read"):
        open_pictures(tmp_path / "url.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges on Windows")
def test_a_pattern_takes_what_a_folder_does(photos, monkeypatch):
    """Loops of links count once, copies in hidden folders never."""
    for folder in (photos / "deep", photos / "@eaDir", photos / ".trash"):
        shutil.copytree(photos, folder, ignore=lambda _, names: {name for name in names if name != "0.png"})
    (photos / "loop").symlink_to(photos)
    (photos / "folder.png").mkdir()
    monkeypatch.chdir(photos.parent)

    def found(pattern: str | Path) -> list[str]:
        pictures = open_pictures(pattern)
        return [pictures.key(index) for index in range(len(pictures))]

    folder = found("photos")
    assert folder == ["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "6.png", "deep/0.png"]
    for pattern in ("photos/**/*.png", "photos/**/**/*", "photos/**", "**/*.png", str(photos / "**/[0-9].png")):
        assert found(pattern) == folder
    assert found("photos/*.png") == folder[:7]
    assert found("photos/*/0.png") == ["deep/0.png", "loop/0.png"]  # one level, no loop
    assert found("photos/d*/**/0.png") == ["0.png"]
    assert found("photos/.trash/*.png") == ["0.png"]  # a hidden folder that is named


def test_urls_of_fsspec(photos, tmp_path, encoder):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(photos / "0.png", "inside/0.png")
        archive.writestr("inside/readme.txt", "none")
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            tar.add(photos / "1.png", "1.png")
        archive.writestr("inside/more.tar", buffer.getvalue())
    local = extract(encoder, photos, tmp_path / "local", progress=False)
    for number, url in enumerate(
        [f"zip://inside::{tmp_path}/photos.zip", f"file://{photos}", f"file://{photos}/[01].png"]
    ):
        store = extract(encoder, url, tmp_path / f"out{number}", progress=False)
        keys = {"0.png": "0.png", "more.tar/1.png": "1.png"} if number == 0 else {key: key for key in store}
        assert list(store) == list(keys)
        for key, name in keys.items():
            torch.testing.assert_close(store[key], local[name], rtol=1e-2, atol=1e-2)
    with pytest.raises(ConfigError, match="fsspec cannot open"):
        extract(encoder, "nosuch://x", tmp_path / "none")


def test_frames_of_a_video(tmp_path, encoder):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=5)  # lossless
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for level in range(0, 200, 20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for workers in (1, 4):
        out = tmp_path / f"out{workers}"
        store = extract(encoder, tmp_path / "clip.mkv", out, Options(every=3), workers=workers, progress=False)
        assert list(store) == [f"clip.mkv/{number:06d}" for number in (0, 3, 6, 9)]
        for number, key in zip((0, 3, 6, 9), store, strict=True):
            grey = Image.new("RGB", (64, 48), (20 * number,) * 3)
            expected = encoder.encode_image(grey).high_res[0]
            torch.testing.assert_close(store[key], expected.half(), rtol=1e-2, atol=1e-2)


# Interruptions, options, processes


def run_cli(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "featsharp", "extract", *map(str, arguments), "--backbone", "toy-vit"]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def test_a_store_that_was_cut_short_is_completed_to_the_same_bytes(photos, tmp_path, encoder):
    for format in SINKS:
        whole = tmp_path / format
        extract(encoder, photos, whole, Options(format=format, pca=3, shard_size=3), progress=False)
        expected = content(whole)
        again = tmp_path / f"{format}-again"
        shutil.copytree(whole, again)
        # A shard without its index, an index that is missing, an unfinished file.
        (again / "index" / "000001.json").unlink()
        (again / "index" / ".000002.json.123.tmp").write_bytes(b"{")
        if format == "zarr":
            (again / "features.zarr" / "0" / "zarr.abc.partial").write_bytes(b"{")
        assert not FeatureStore(again).complete
        assert len(FeatureStore(again)) == 4
        extract(encoder, photos, again, Options(format=format, pca=3, shard_size=3), progress=False)
        assert content(again) == expected, format


def test_processes_share_the_shards_without_overlap(photos, tmp_path, encoder):
    options = Options(shard_size=3)
    extract(encoder, photos, tmp_path / "one", options, progress=False)
    written = []
    for rank in range(2):
        before = set(content(tmp_path / "two"))
        extract(encoder, photos, tmp_path / "two", options, rank=rank, ranks=2, progress=False)
        written.append(set(content(tmp_path / "two")) - before)
        if not rank:
            unfinished = tmp_path / "two" / "index" / ".000000.json.123.tmp"  # of one that was killed
            unfinished.write_bytes(b"{")
            os.utime(unfinished, (time.time() - 60, time.time() - 60))
    assert all("index/000001.json" not in files for files in written[:1])
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_other_options_or_pictures_are_refused(photos, tmp_path, encoder):
    extract(encoder, photos, tmp_path / "out", progress=False)
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"dtype 'float16' -> 'float32'"):
        extract(encoder, photos, tmp_path / "out", Options(dtype=torch.float32))
    with pytest.raises(ConfigError, match="encoder 'bilinear 2x on toy-vit' -> 'tile 2x on toy-vit'"):
        extract(featsharp.create_encoder("toy-vit", "tile", 2), photos, tmp_path / "out")
    (photos / "6.png").write_bytes((photos / "5.png").read_bytes() + b"more")
    with pytest.raises(ConfigError, match="files of the same names have other sizes"):
        extract(encoder, photos, tmp_path / "out")
    (photos / "6.png").unlink()
    with pytest.raises(ConfigError, match="pictures 7 -> 6"):
        extract(encoder, photos, tmp_path / "out")
    with pytest.raises(ConfigError, match="is no store of features"):
        extract(encoder, photos, photos)
    assert content(tmp_path / "out") == before


def test_the_source_may_be_spelled_otherwise_later(photos, tmp_path, encoder, monkeypatch):
    (photos / "bad.tar").write_bytes(b"x" * 1024)
    (photos / "none.png").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    first = extract(encoder, photos, tmp_path / "out", progress=False)
    assert [name for name, _ in first.skipped] == ["bad.tar", "none.png"]
    written = content(tmp_path / "out")
    for number, source in enumerate(["photos", "./photos/", "photos/../photos"]):
        extract(encoder, source, tmp_path / "out", progress=False)
        extract(encoder, source, tmp_path / f"{number}", progress=False)
        assert content(tmp_path / f"{number}") == written
    monkeypatch.chdir(photos)
    extract(encoder, ".", tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard_size": 0}, "shard_size takes a whole number of at least 1; got 0"),
        ({"shard_size": 2.5}, "shard_size takes a whole number"),
        ({"every": 0}, "every takes a whole number"),
        ({"every": -1}, "every takes a whole number"),
        ({"every": None}, "every takes a whole number"),
        ({"limit": 0}, "limit takes a whole number"),
        ({"limit": -1}, "limit takes a whole number"),
        ({"pca": 2.5}, "pca takes a whole number"),
        ({"pca": True}, "pca takes a whole number"),
        ({"output_size": 5}, r"output_size is \(height, width\), two whole numbers of cells; got 5"),
        ({"size": 448}, r"size is \(height, width\), two whole numbers of pixels; got 448"),
        ({"size": (0, 64)}, "size has sides of at least 1"),
        ({"dtype": torch.float64}, "dtype takes float16, bfloat16, float32.*; got torch.float64"),
        ({"dtype": np.float16}, "dtype takes float16"),
        ({"normalized": "no"}, "normalized is True or False; got 'no'"),
    ],
)
def test_values_of_another_kind_are_refused_before_anything_is_written(photos, tmp_path, encoder, options, said):
    with pytest.raises(InputError, match=said):
        extract(encoder, photos, tmp_path / "out", Options(**options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"source": ["a.png", "b.png"]}, "source takes a picture, a folder.* write many paths into a list.*got a list"),
        ({"source": Image.new("RGB", (64, 64))}, "give opened pictures to encoder.encode_image; got a Image"),
        ({"source": np.zeros((9, 9, 3))}, "got a ndarray"),
        ({"source": None}, "got None"),
        ({"source": ""}, "source takes .*; got ''"),
        ({"output": ""}, "output takes a path; got ''"),
        ({"batch": 0}, "batch takes a whole number"),
        ({"workers": 1.5}, "workers takes a whole number"),
        ({"ranks": 0}, "ranks takes a whole number"),
        ({"rank": 2, "ranks": 2}, "rank takes 0 to 1"),
    ],
)
def test_arguments_of_another_kind_are_refused(photos, tmp_path, encoder, arguments, said):
    with pytest.raises(InputError, match=said):
        extract(encoder, **{"source": photos, "output": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Options(format="hdf5"), "safetensors, npy, zarr, webdataset"),
        (Options(format="npy", dtype=torch.bfloat16), "no bfloat16"),
        (Options(pool="median"), "mean or max"),
        (Options(pca=33), "1 to 32"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(photos, tmp_path, encoder, options, said):
    with pytest.raises(ConfigError, match=said):
        extract(encoder, photos, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_size_of_maps_without_an_upsampler_is_refused_at_once(photos, tmp_path):
    identity = featsharp.create_encoder("toy-vit", "identity")
    with pytest.raises(ConfigError, match=r"--output-size.* needs an upsampler, such as bilinear"):
        extract(identity, photos, tmp_path / "out", Options(output_size=(40, 50)))
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_finite_are_skipped_and_counted(photos, tmp_path):
    class Sometimes(featsharp.backbones.toy.ToyViT):  # type: ignore[name-defined, misc]
        def extract(self, images):
            output = super().extract(images)
            dark = images.mean((1, 2, 3)) < -1
            return output._replace(features=output.features.masked_fill(dark[:, None, None, None], torch.nan))

    Image.new("RGB", (96, 64)).save(photos / "black.png")
    store = extract(featsharp.create_encoder(Sometimes(), "bilinear", 2), photos, tmp_path / "out", progress=False)
    assert len(store) == 7
    assert store.skipped == [("black.png", "the features are NaN or infinite, or too large for float16")]


@pytest.mark.slow
def test_a_full_disk_ends_it_with_a_store_that_goes_on(tmp_path):
    resource = pytest.importorskip("resource")
    photos = paint(tmp_path / "photos", [(96, 64)] * 40)

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = run_cli(photos, "-o", tmp_path / "out", preexec_fn=limit)
    assert out.returncode == 1
    assert "cannot write" in out.stderr
    assert "free some space" in out.stderr
    assert "Traceback" not in out.stderr
    assert run_cli(photos, "-o", tmp_path / "out").returncode == 0
    assert len(FeatureStore(tmp_path / "out")) == 40


def test_the_command_line(photos, tmp_path, capsys):
    (photos / "bad.png").write_bytes(b"")
    arguments = ["extract", str(photos), "-o", str(tmp_path / "out"), "--backbone", "toy-vit", "--upsampler", "tile"]
    assert main([*arguments, "--factor", "1.5", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "7 of 8 pictures, 1 skipped" in out
    assert "bad.png: the file is empty" in out
    store = FeatureStore(tmp_path / "out")
    assert store.options["encoder"] == "tile 1.5x on toy-vit"
    expected = featsharp.create_encoder("toy-vit", "tile", 1.5).encode_image(photos / "0.png").high_res[0]
    torch.testing.assert_close(store["0.png"].float(), expected, rtol=1e-2, atol=1e-2)
    for wrong, said in (
        (["--upsampler", "tile-2x"], "--factor and the factor"),
        (["--upsampler", "nosuch"], "nosuch"),
    ):
        assert main([*arguments, "--factor", "1.5", *wrong]) == 1
        assert said in capsys.readouterr().err
    for source in (str(tmp_path / "none"), ""):
        assert main(["extract", source, "-o", str(tmp_path / "x"), "--backbone", "toy-vit"]) == 1
        assert f"{source!r} does not exist" in capsys.readouterr().err
    assert main(["extract", str(photos), "-o", "", "--backbone", "toy-vit"]) == 1
    assert "output takes a path" in capsys.readouterr().err


def test_tables_of_the_command_are_those_of_the_library():
    """Its help names them without importing torch."""
    assert tuple(SINKS) == extract_command.FORMATS
    assert tuple(DTYPES) == extract_command.DTYPES
    parser = argparse.ArgumentParser()
    extract_command.add_arguments(parser)
    (pool,) = (action for action in parser._actions if action.dest == "pool")
    assert list(pool.choices or ()) == list(POOLS)


def test_ranks_are_those_of_torchrun_and_of_tasks_of_srun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert extract_command._find_rank() == (0, 1, 0)  # a batch script
    for name, value in {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert extract_command._find_rank() == (5, 8, 1)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    assert extract_command._find_rank() == (3, 4, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU names the device")
def test_a_rank_takes_a_gpu_that_it_sees() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:0' cannot be used here"):
        find_device("cuda", 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--autocast", "auto"], "give bfloat16, float16 or float32"),
        (["--device", "cuda"], "--gpus X gives each actor"),
    ],
)
def test_what_each_machine_of_a_cluster_would_decide_is_refused(photos, tmp_path, capsys, arguments, said):
    command = ["extract", str(photos), "-o", str(tmp_path / "out"), "--backbone", "toy-vit", "--engine", "ray"]
    assert main([*command, *arguments]) == 1
    assert said in capsys.readouterr().err


def test_names_of_files_keep_pictures_apart():
    keys = ["a/x.jpg", "a/x.png", "b/Y.jpg", "b/y.png", "a.b.jpg", "a_b.jpg", "n" * 251 + ".jpg"]
    names = file_names(keys, "npy")
    assert list(names.values())[:5] == ["a/x", "a/x.png", "b/Y", "b/y.png", "a.b"]
    assert len((names[keys[-1]] + ".features.npy").encode()) == 255
    samples = file_names(keys, "webdataset")
    assert len({name.casefold() for name in samples.values()}) == len(keys)
    assert not any("." in name for name in samples.values())


@pytest.mark.parametrize("format", list(SINKS))
def test_names_that_a_format_gives_a_meaning_of_its_own(tmp_path, encoder, format):
    photos = tmp_path / "photos"
    for number, key in enumerate(
        ["a.png", "a/b.png", "a/c.png", "a/c/0.png", "a.summary.png", "a.summary/1.png", "zarr.json.png", "index/0.png"]
    ):
        (photos / key).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(photos / key)
    options = Options(format=format, dtype=torch.float32, summary=True, shard_size=3)
    store = extract(encoder, photos, tmp_path / "out", options, progress=False)
    assert len(store) == 8
    for key in store:
        one = encoder.encode_image(photos / key, return_summary=True)
        torch.testing.assert_close(store[key], one.high_res[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(store.tensor(key, "summary"), one.summary[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are text there")
@pytest.mark.parametrize("format", list(SINKS))
def test_names_that_come_to_the_same_text(tmp_path, encoder, format):
    """Bytes that are no text and what they are escaped to; a summary and a picture of its name; words of a format."""
    bytes_and_text = ["\udcff.png", "\\udcff.png", "\\udcff.png.jpg", "a\udcff/x.png", "a\\udcff/x.png"]
    words = ["__metadata__", "__metadata__.features", "__metadata__.features.summary", "\udcfe.summary"]
    words += ["x.png", "x.png.summary", "x.png.summary.features", "x.png.summary.features-2"]
    options = Options(format=format, dtype="float32", summary=True)
    for name, keys in (("folder", bytes_and_text), ("list.txt", words)):
        for number, key in enumerate(keys):
            Image.new("RGB", (64, 64), (25 * number, 0, 0)).save(tmp_path / "a.png")
            (tmp_path / "folder" / key).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / "a.png").rename(tmp_path / "folder" / key)
        (tmp_path / "list.txt").write_bytes(b"\n".join(os.fsencode(f"folder/{key}") for key in keys))
        store = extract(encoder, tmp_path / name, tmp_path / f"{name}-out", options, progress=False)
        assert sorted(store) == sorted(keys)
        for key in keys:
            one = encoder.encode_image((tmp_path / "folder" / key).read_bytes(), return_summary=True)
            torch.testing.assert_close(store[key], one.high_res[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(store.tensor(key, "summary"), one.summary[0], rtol=1e-5, atol=1e-5)
        for shard in (store.path / "shards").glob("*.safetensors"):
            with safe_open(shard, "np") as opened:
                assert len(list(opened.keys())) == 2 * len(keys)


def test_a_second_picture_of_one_name_is_counted_and_what_leads_outside_is_not_written(photos, tmp_path, encoder):
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for number in (0, 1, 2):
            tar.add(photos / f"{number}.png", f"{number % 2}.png")
    store = extract(encoder, tmp_path / "twice.tar", tmp_path / "a", Options(shard_size=2), progress=False)
    assert (list(store), store.skipped) == (["0.png", "1.png"], [("0.png", "has the name of a picture before it")])
    torch.testing.assert_close(
        store["0.png"], encoder.encode_image(photos / "0.png").high_res[0].half(), rtol=1e-2, atol=1e-2
    )
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.write(photos / "0.png", "../evil.png")
        archive.write(photos / "1.png", "good.png")
    store = extract(encoder, f"zip://::{tmp_path}/evil.zip", tmp_path / "b", Options(format="npy"), progress=False)
    assert (list(store), store.skipped) == (["good.png"], [("../evil.png", "path that leads outside the source")])


# Kills


def kill_and_resume(tmp_path: Path, kills: int, pictures: int, format: str = "safetensors") -> int:
    """Kill the command ``kills`` times, and compare with an uninterrupted run; returns the shards that kills left."""
    photos = paint(tmp_path / "photos", [(64, 64), (64, 80), (80, 64)] * (pictures // 3))
    arguments = ["extract", str(photos), "--backbone", "toy-vit", "--pca", "5", "--shard-size", "4"]
    arguments += ["--format", format, "-o"]
    killed = tmp_path / "killed"
    assert main([*arguments, str(tmp_path / "whole")]) == 0
    rng = np.random.default_rng(0)
    for _ in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-m", "featsharp", *arguments, str(killed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        shards = len(list((killed / "index").glob("*.json")))
        while process.poll() is None and len(list((killed / "index").glob("*.json"))) == shards:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = len(list((killed / "index").glob("[0-9]*.json")))
    assert main([*arguments, str(killed)]) == 0
    assert content(killed) == content(tmp_path / "whole")
    return left


@pytest.mark.parametrize(
    ("format", "kills", "pictures"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("safetensors", 5, 300), ("npy", 1, 90))),
        *(pytest.param(*case, marks=pytest.mark.full) for case in (("zarr", 3, 210), ("webdataset", 3, 210))),
    ],
)
def test_kills_leave_no_trace(tmp_path, format, kills, pictures):
    assert 0 < kill_and_resume(tmp_path, kills, pictures, format) < pictures // 4


@pytest.mark.full
@pytest.mark.timeout(600)  # a start of the command each
def test_fifty_kills_leave_no_trace(tmp_path):
    assert 0 < kill_and_resume(tmp_path, 50, 900) < 225


@pytest.mark.slow
def test_ranks_of_the_command_line(tmp_path):
    photos = paint(tmp_path / "photos", [(64, 64)] * 9)
    assert run_cli(photos, "-o", tmp_path / "one", "--shard-size", 3).returncode == 0
    (tmp_path / "two" / "index").mkdir(parents=True)
    shutil.copy(tmp_path / "one" / "store.json", tmp_path / "two")
    (tmp_path / "two" / "index" / ".000000.json.123.tmp").write_bytes(b"{")  # of a rank that was killed just now
    out = run_cli(photos, "-o", tmp_path / "two", "--ranks", 2, "--shard-size", 3)
    assert out.returncode == 0, out.stderr
    assert "9 of 9 pictures, 0 skipped" in out.stdout  # of both together, once
    assert out.stdout.count("pictures") == 1
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_an_actor_of_ray_that_is_killed_loses_and_doubles_nothing(tmp_path):
    pytest.importorskip("ray")
    photos = paint(tmp_path / "photos", [(64, 64), (64, 80), (80, 64)] * 100)
    command = [sys.executable, "-m", "featsharp", "extract", str(photos), "--backbone", "toy-vit"]
    command += ["--shard-size", "4", "-o"]
    subprocess.run([*command, str(tmp_path / "one")], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, str(tmp_path / "ray"), "--engine", "ray", "--ranks", "2"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_worker_niceness": "0"},  # other tests would leave them nothing of a busy processor
    )
    try:
        index = tmp_path / "ray" / "index"
        while process.poll() is None and len(list(index.glob("[0-9]*.json"))) < 5:
            time.sleep(0.05)
        titles = {int(file.parent.name): file.read_bytes() for file in Path("/proc").glob("[0-9]*/cmdline")}
        makers = [process_id for process_id, title in titles.items() if b"MapWorker" in title]
        assert len(makers) == 2
        os.kill(makers[0], signal.SIGKILL)
        out, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "300 of 300 pictures, 0 skipped" in out
    assert content(tmp_path / "ray") == content(tmp_path / "one")
