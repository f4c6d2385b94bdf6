"""Folders and shards give the same images in a fixed order; mixtures keep shares, epochs and reproducibility."""

import io
import pickle
import tarfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featsharp.data import ImageMixture, ImageSource, WeightedPath, decode_image, open_source, parse_data_dir
from featsharp.data._order import shuffled
from featsharp.data.filters import ImageFilter
from featsharp.errors import ConfigError, DataError, InputError


def picture(number: int, size: tuple[int, int] = (16, 12)) -> bytes:
    """A PNG that tells its number by its first pixel."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
    pixels[0, 0] = (number // 65536, number // 256 % 256, number % 256)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_folder(root: Path, names: list[str], first: int = 0) -> Path:
    for number, name in enumerate(names, first):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def names_of(source: ImageSource) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def number_of(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    return red * 65536 + green * 256 + blue


# Sources


def test_nested_folder_is_sorted_and_ignores_all_but_images(tmp_path: Path) -> None:
    names = ["b.png", "a/2.PNG", "a/10.png", "a/deep/er/x.jpeg", "Z.png"]
    write_folder(tmp_path, names)
    write_folder(tmp_path, [".hidden.png", ".cache/x.png", "a/._x.png"])
    for name in ("labels.json", "a/notes.txt", "a/x.pickle"):
        (tmp_path / name).write_bytes(b"never read")
    source = open_source(tmp_path)
    assert names_of(source) == sorted(names)
    assert source.problems == []
    assert source.num_shards == 0
    for index, name in enumerate(sorted(names)):
        assert source.read(index) == (tmp_path / name).read_bytes()


def test_nested_shards_and_plain_images_in_one_folder(tmp_path: Path) -> None:
    first = {"000.png": picture(0), "000.json": b"{}", "000.cls": b"3", "001.png": picture(1), "001.pyd": b"\x80evil"}
    second = {
        "x/001.jpg": picture(2),
        "x/001.pickle": b"cos\nsystem\n",
        "x/.y.jpg": b"",
        "x/._001.jpg": b"resource fork",
    }
    write_tar(tmp_path / "part/0.tar", first)
    write_tar(tmp_path / "part/deep/1.TAR", second)
    write_tar(tmp_path / "part/none.tar", {"a.txt": b"text"})
    write_folder(tmp_path, ["a.png", "z.png"], first=3)
    source = open_source(str(tmp_path))
    assert names_of(source) == [
        "a.png",
        "part/0.tar/000.png",
        "part/0.tar/001.png",
        "part/deep/1.TAR/x/001.jpg",
        "z.png",
    ]
    assert [number_of(decode_image(source.read(index))) for index in range(5)] == [3, 0, 1, 2, 4]
    assert source.num_shards == 2
    assert source.problems == []
    assert repr(source) == f"ImageSource({str(tmp_path)!r}, 5 images, 2 shards)"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_single_tar_keeps_member_order_and_long_names(tmp_path: Path, form: int) -> None:
    names = ["z.png", "a.png", f"{'d' * 90}/{'e' * 90}.png"]
    if form != tarfile.USTAR_FORMAT:
        names += [f"{'very-long-' * 40}.png", "gr\u00fc\u00dfe \u96ea.png"]
    members = {name: picture(number) for number, name in enumerate(names)}
    source = open_source(write_tar(tmp_path / "one.tar", members, format=form))
    assert names_of(source) == names
    assert [source.read(index) for index in range(len(names))] == list(members.values())
    assert source.problems == []


def test_folders_and_links_as_members(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        data = picture(1)
        info = tarfile.TarInfo("real.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    source = open_source(path)
    assert names_of(source) == ["real.png"]
    assert source.problems == [f"{path}/link.png: link or special file"]
    assert source.num_others == 0


@pytest.mark.parametrize("where", ["data", "header", "between"])
def test_truncated_tar_gives_the_members_before_the_cut(
    tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "cut.tar", {f"{number}.png": picture(number) for number in range(6)})
    with tarfile.open(path) as tar:
        member = tar.getmembers()[3]
    cut = {"data": member.offset_data + 100, "header": member.offset + 100, "between": member.offset}[where]
    path.write_bytes(path.read_bytes()[:cut])
    write_folder(tmp_path, ["ok.png"])
    source = open_source(tmp_path)
    assert names_of(source) == ["cut.tar/0.png", "cut.tar/1.png", "cut.tar/2.png", "ok.png"]
    assert len(source.problems) == 1
    assert source.problems[0].startswith(f"{path}: ")
    assert "cut short" in source.problems[0]
    assert source.problems[0] in caplog.messages
    assert all(decode_image(source.read(index)) for index in range(4))


def test_damaged_header_in_the_middle(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "damaged.tar", {f"{number}.png": picture(number) for number in range(6)})
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[3].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 300] = b"\xa5" * 300
    path.write_bytes(data)
    source = open_source(path)
    assert names_of(source) == ["0.png", "1.png", "2.png"]
    assert source.problems == [f"{path}: damaged header (at byte {offset}; all members from there on are lost)"]


@pytest.mark.parametrize("content", [b"", b"no tar at all" * 100, b"\0" * 100])
def test_files_that_are_no_tar_are_problems_of_a_folder(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(
        DataError, match=r"bad\.tar: no images found; expected .*; found: 1 not readable as a tar file \(the first, "
    ):
        open_source(tmp_path / "bad.tar")
    write_folder(tmp_path, ["ok.png"])
    source = open_source(tmp_path)
    assert names_of(source) == ["ok.png"]
    assert "bad.tar" in source.problems[0]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar.bz2", "x.tar.xz", "named-wrongly.tar"])
def test_compressed_tars_are_refused(tmp_path: Path, name: str) -> None:
    mode = {"bz2": "w:bz2", "xz": "w:xz"}.get(name.split(".")[-1], "w:gz")
    with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
        tar.addfile(tarfile.TarInfo("a.png"))
    write_folder(tmp_path, ["ok.png"])
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=rf"{name}: compressed .* decompress it"):
            open_source(path)


def test_paths_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent: no such file or folder; expected image files \(\.jpg "):
        open_source(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no images found; expected image files"):
        open_source(tmp_path / "empty")
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(DataError, match=r"file\.txt: neither a folder nor a \.tar file"):
        open_source(tmp_path / "file.txt")
    with pytest.raises(DataError, match="no images found"):
        open_source(write_tar(tmp_path / "none.tar", {"a.json": b"{}"}))


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "store", ["x.png"])
    root = write_folder(tmp_path / "root", ["a.png"])
    (root / "linked").symlink_to(tmp_path / "store")
    (root / "loop").symlink_to(root)
    (root / "dangling.png").symlink_to(tmp_path / "gone.png")
    source = open_source(root)
    assert names_of(source) == ["a.png", "dangling.png", "linked/x.png"]
    with pytest.raises(DataError, match=r"dangling\.png: cannot be read \(No such file"):
        source.read(1)


def test_braces_name_several_shards(tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / f"s-{number:02d}.tar", {f"{number}.png": picture(number)})
    source = open_source(tmp_path / "s-{01..03}.tar")
    assert names_of(source) == ["s-01.tar/1.png", "s-02.tar/2.png", "s-03.tar/3.png"]
    assert [number_of(decode_image(source.read(index))) for index in range(3)] == [1, 2, 3]
    with pytest.raises(
        DataError, match=r"\{03\.\.05\}\.tar: 2 of 3 files are missing, the first .*/s-04\.tar; name the"
    ):
        open_source(tmp_path / "s-{03..05}.tar")
    with pytest.raises(DataError, match=r"stands for s-1, which is no \.tar file"):
        open_source(tmp_path / "s-{1..2}")
    with pytest.raises(ConfigError, match="Unbalanced braces"):
        open_source(tmp_path / "s-{1..2.tar")


def test_exclude_leaves_a_folder_out(tmp_path: Path) -> None:
    write_folder(tmp_path, ["a.png", "out/b.png", "other/out/c.png"])
    assert names_of(open_source(tmp_path, exclude=tmp_path / "other/../out")) == ["a.png", "other/out/c.png"]


def test_index_bounds_and_shrunken_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": picture(0), "1.png": picture(1)})
    source = open_source(path)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source.read(index)
        with pytest.raises(IndexError):
            source.name(index)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"a\.tar/1\.png: the tar file has become shorter"):
        source.read(1)


def test_reading_from_threads_and_a_pickled_copy(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", {f"{number}.png": picture(number) for number in range(40)}))
    copy = pickle.loads(pickle.dumps(source))
    expected = [picture(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.read, range(40))) == expected


# Settings


def test_parse_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("SHARDS", "/mnt/shards")
    assert parse_data_dir("a/b") == [WeightedPath(Path("a/b"), 1.0)]
    assert parse_data_dir(Path("a")) == [WeightedPath(Path("a"), 1.0)]
    assert parse_data_dir(["~/x", ["$SHARDS/y", 9], ("${SHARDS}/z", 0.5)]) == [
        WeightedPath(Path("/home/someone/x"), 1.0),
        WeightedPath(Path("/mnt/shards/y"), 9.0),
        WeightedPath(Path("/mnt/shards/z"), 0.5),
    ]


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), True, "2", None])
def test_weights_that_cannot_be(weight: object) -> None:
    with pytest.raises(ConfigError, match=r"'photos' has weight .* positive number"):
        parse_data_dir([["photos", weight]])


@pytest.mark.parametrize("value", [None, [], 3, {"a": 1}, "", [""], [["a", 1, 2]], ["a", 2], [[1, 2]]])
def test_settings_that_name_no_data(value: object) -> None:
    with pytest.raises(ConfigError, match="data"):
        parse_data_dir(value)


def test_settings_from_omegaconf() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    value = omegaconf.OmegaConf.create(["a", ["b", 2.5]])
    assert parse_data_dir(value) == [WeightedPath(Path("a"), 1.0), WeightedPath(Path("b"), 2.5)]


# Mixtures


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ImageSource]:
    """Three sources of 7, 1 and 30 images, numbered through."""
    root = tmp_path_factory.mktemp("sources")
    write_folder(root / "a", [f"{number}.png" for number in range(7)])
    write_tar(root / "b.tar", {"7.png": picture(7)})
    write_folder(root / "c", [f"{number:02d}.png" for number in range(30)], first=8)
    return [open_source(root / name) for name in ("a", "b.tar", "c")]


@pytest.mark.parametrize("weights", [None, [9, 1, 1], [0.3, 0.2, 0.5], [1e-3, 1, 1e3]])
@pytest.mark.parametrize("seed", [0, 1, -5])
def test_mixture_against_a_sequential_count(sources: list[ImageSource], weights: list[float] | None, seed: int) -> None:
    """What holds for any schedule: walked in order, each source's samples fall into whole epochs, shares are kept."""
    mixture = ImageMixture(sources, weights, seed=seed)
    count = 3000
    located = [mixture.locate(n) for n in range(count)]
    share = np.array(weights or [1, 1, 1]) / np.sum(weights or [1, 1, 1])
    for index, source in enumerate(sources):
        images = [image for where, image in located if where == index]
        assert abs(len(images) - count * share[index]) <= 6
        for start in range(0, len(images) - len(source) + 1, len(source)):
            assert sorted(images[start : start + len(source)]) == list(range(len(source)))


def test_every_stretch_of_a_mixture_keeps_the_shares(sources: list[ImageSource]) -> None:
    mixture = ImageMixture(sources, [9, 1, 2], seed=3)
    for start in (0, 1000, 123_456_789):
        found = Counter(mixture.locate(start + step)[0] for step in range(120))
        assert all(abs(found[index] - expected) <= 4 for index, expected in enumerate((90, 10, 20)))


def test_any_one_sample_follows_the_weights_over_seeds(sources: list[ImageSource]) -> None:
    for n in (0, 5):
        found = Counter(ImageMixture(sources, [9, 1, 2], seed=seed).locate(n)[0] for seed in range(2400))
        for index, expected in enumerate((1800, 200, 400)):
            assert abs(found[index] - expected) < 5 * expected**0.5


@pytest.mark.slow
def test_shares_are_exact_in_expectation(sources: list[ImageSource]) -> None:
    """Chi-square over 30,000 seeds, one draw of each."""
    weights = [0.1, 7, 1, 2.5, 1e-3, 19]
    six = sources * 2
    found = Counter(ImageMixture(six, weights, seed=seed).locate(seed % 7)[0] for seed in range(30_000))
    expected = [30_000 * weight / sum(weights) for weight in weights]
    assert sum((found[index] - number) ** 2 / number for index, number in enumerate(expected)) < 25.7  # p = 1e-4


def test_sources_take_their_weight_of_the_circle_to_its_last_step(sources: list[ImageSource]) -> None:
    weights = [0.1, 7, 1, 2.5, 1e-3, 19]
    bounds = ImageMixture(sources * 2, weights)._bounds
    assert (bounds[0], bounds[-1]) == (0, 2**64)
    exact = [Fraction(weight) / sum(map(Fraction, weights)) * 2**64 for weight in weights]
    assert all(abs(bounds[index + 1] - bounds[index] - exact[index]) < 1 for index in range(6))


def test_order_is_a_function_of_seed_and_number(sources: list[ImageSource]) -> None:
    weights = [2, 1, 3]
    forward = [ImageMixture(sources, weights, seed=4).locate(n) for n in range(200)]
    again = ImageMixture(sources, weights, seed=4)
    assert [again.locate(n) for n in reversed(range(200))] == forward[::-1]
    assert [pickle.loads(pickle.dumps(again)).locate(n) for n in (150, 3)] == [forward[150], forward[3]]
    assert [ImageMixture(sources, weights, seed=5).locate(n) for n in range(200)] != forward


def test_order_is_pinned(sources: list[ImageSource]) -> None:
    """A resumed run must meet the same images after an update of this package or of its dependencies."""
    mixture = ImageMixture(sources, [2, 1, 3], seed=0)
    assert [mixture.locate(n) for n in range(8)] == [(0, 6), (2, 9), (2, 5), (0, 1), (2, 6), (1, 0), (2, 26), (2, 18)]
    assert mixture.locate(10**9) == (0, 5)


def test_epochs_are_shuffled_afresh_and_evenly(sources: list[ImageSource]) -> None:
    mixture = ImageMixture(sources[:1], seed=1)
    epochs = [tuple(mixture.locate(7 * epoch + place)[1] for place in range(7)) for epoch in range(1400)]
    assert len(set(epochs)) > 1000
    for place in range(7):
        found = Counter(epoch[place] for epoch in epochs)
        assert sum((found[image] - 200) ** 2 / 200 for image in range(7)) < 30  # chi-square, 6 degrees of freedom
    pairs = Counter((epoch[0], epoch[1]) for epoch in epochs)
    assert len(pairs) == 42
    assert sum((pairs[pair] - 1400 / 42) ** 2 / (1400 / 42) for pair in pairs) < 90  # 41 degrees of freedom


def test_random_access_is_cheap_at_any_number(sources: list[ImageSource]) -> None:
    mixture = ImageMixture(sources, [2, 1, 3])
    start = time.process_time()
    for step in range(500):
        mixture.locate(10**12 + step)
    assert time.process_time() - start < 2


def test_mixture_arguments(sources: list[ImageSource]) -> None:
    for bad_sources, weights in (([], None), (sources, [1, 2]), (sources, [1, 2, 0]), (sources, [1, 2, float("nan")])):
        with pytest.raises(ConfigError, match="one positive number per source"):
            ImageMixture(bad_sources, weights)
    with pytest.raises(InputError, match="start at 0, got -1"):
        ImageMixture(sources).locate(-1)


def test_mixture_from_a_setting(sources: list[ImageSource]) -> None:
    value = [str(sources[0].path), [str(sources[2].path), 3]]
    mixture = ImageMixture.from_data_dir(value, seed=2)
    assert mixture.weights == [1.0, 3.0]
    assert mixture.seed == 2
    by_hand = ImageMixture([sources[0], sources[2]], [1, 3], seed=2)
    assert [mixture.locate(n) for n in range(50)] == [by_hand.locate(n) for n in range(50)]


def test_load_decodes_what_locate_says(sources: list[ImageSource]) -> None:
    mixture = ImageMixture(sources, [1, 1, 1], seed=6)
    for n in range(20):
        source, image = mixture.locate(n)
        loaded = mixture.load(n)
        assert number_of(loaded.image) == (0, 7, 8)[source] + image
        assert loaded.name == f"{sources[source].path}/{sources[source].name(image)}"
        assert loaded.skipped == []


def test_unusable_images_are_replaced_reported_and_always_by_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path, [f"good{number}.png" for number in range(4)])
    (tmp_path / "cut.png").write_bytes(picture(9)[:200])
    (tmp_path / "zero.png").touch()
    (tmp_path / "tiny.png").write_bytes(picture(10, size=(7, 40)))
    Image.new("RGB", (20, 20), (200, 3, 80)).save(tmp_path / "flat.png")
    nearly = Image.new("RGB", (20, 20), (200, 3, 80))
    nearly.putpixel((3, 3), (201, 4, 79))
    nearly.save(tmp_path / "nearly.png")
    reasons = {
        "cut.png": "cannot be decoded",
        "zero.png": "the file is empty (0 bytes)",
        "tiny.png": "too small (7 x 40 pixels",
        "flat.png": "uniform colour",
        "nearly.png": "uniform colour",
    }
    mixture = ImageMixture([open_source(tmp_path)], seed=0)
    met: dict[str, str] = {}
    for n in range(9):
        loaded = mixture.load(n)
        assert Path(loaded.name).name.startswith("good")
        wanted = mixture.sources[0].name(mixture.locate(n)[1])
        assert bool(loaded.skipped) == (wanted in reasons)
        met |= {Path(name).name: reason for name, reason in loaded.skipped}
        again = ImageMixture([open_source(tmp_path)], seed=0).load(n)
        assert (again.name, again.skipped) == (loaded.name, loaded.skipped)
    assert sorted(met) == sorted(reasons)
    assert all(met[name].startswith(reason) for name, reason in reasons.items())


def test_an_image_with_two_levels_is_usable(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (10, 10, 10))
    image.putpixel((0, 0), (10, 12, 10))
    image.save(tmp_path / "x.png")
    assert ImageMixture([open_source(tmp_path)]).load(0).skipped == []


def test_a_mixture_without_any_usable_image_gives_up(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(b"broken")
    (tmp_path / "3.jpg").touch()
    kinds = r"\(3 not an image that can be read, 1 the file is empty\)"
    with pytest.raises(
        DataError, match=rf"sample 5: 4 images in a row cannot be used {kinds}; the last, .*check the data"
    ):
        ImageMixture([open_source(tmp_path)]).load(5)


def keeps_hundreds(image: Image.Image, name: str) -> bool:
    return number_of(image) % 100 == 7


@pytest.mark.slow
def test_few_usable_images_among_many_are_found_and_used_evenly(tmp_path: Path) -> None:
    """One in 100: the same ones for the same samples in any order, and no neighbour of a gap more than others."""
    rare = open_source(write_tar(tmp_path / "rare.tar", {f"{n:03d}.png": picture(n, (8, 8)) for n in range(500)}))
    common = open_source(write_tar(tmp_path / "common.tar", {"x.png": picture(1007, (8, 8))}))
    mixture = ImageMixture([rare, common], [3, 1], keep=ImageFilter(predicate=keeps_hundreds))
    mixture.check()
    loaded = [mixture.load(n) for n in range(200)]
    used = Counter(number_of(image.image) for image in loaded)
    assert used.pop(1007) == 50
    assert set(used) == {7, 107, 207, 307, 407}
    assert sum((count - 30) ** 2 / 30 for count in used.values()) < 18.5  # chi-square, 4 degrees of freedom, p = 0.001
    assert max(len(image.skipped) for image in loaded) > 100  # where an earlier limit would have ended the run
    again = ImageMixture([rare, common], [3, 1], keep=ImageFilter(predicate=keeps_hundreds))
    for n in (150, 3, 77):
        assert again.load(n)[1:] == loaded[n][1:]


def test_a_usable_image_that_is_not_among_the_first_hundred_tried_counts(tmp_path: Path) -> None:
    source = open_source(write_tar(tmp_path / "a.tar", {f"{n:03d}.png": picture(n, (8, 8)) for n in range(300)}))
    order = [shuffled(position, 300, 0) for position in range(300)]

    def keep(image: Image.Image, name: str) -> bool:
        return number_of(image) == order[-1]

    mixture = ImageMixture([source], keep=ImageFilter(predicate=keep))
    mixture.check()
    assert number_of(mixture.load(0).image) == order[-1]
