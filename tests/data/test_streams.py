"""Shards by URL and from commands: every image once per epoch, the same again after a restart, and never a hang."""

import base64
import io
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.checkpoint import read_checkpoint
from featsharp.data import pack_images
from featsharp.data._fetch import FetchConfig
from featsharp.data._order import hash_bits
from featsharp.data.filters import ImageFilter, Predicate
from featsharp.data.images import EncodedImage
from featsharp.data.loader import Batch, Positions, StepSampler, ViewDataset, load_batches
from featsharp.data.mixture import Division, ImageMixture
from featsharp.data.skips import SkipLog
from featsharp.data.sources import open_source
from featsharp.data.streams import ShardStream, deal, shuffle
from featsharp.data.views import ViewConfig
from featsharp.errors import ConfigError, DataError, FeatSharpError
from featsharp.train import main
from featsharp.urls import redact_url


def picture(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, numbers: range) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            info = tarfile.TarInfo(f"{number:03d}.png")
            data = picture(number)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; ``lost`` says how often one breaks off in the middle, ``busy`` how often it answers 500."""

    lost: ClassVar[Counter[str]] = Counter()
    busy: ClassVar[Counter[str]] = Counter()
    asked: ClassVar[list[str]] = []
    user: ClassVar[str] = ""  # as the header says it

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(self.path)
        if self.headers.get("Authorization", "") != self.user:
            self.send_error(401)
        elif self.busy[path]:
            self.busy[path] -= 1
            self.send_error(500)
        elif self.lost[path]:
            self.lost[path] -= 1
            data = Path(self.translate_path(path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Ten shards with 3, 4, 5, 3, ... images, shards/0.tar to 9.tar, over HTTP; the address of their folder."""
    first = 0
    for shard in range(10):
        write_tar(tmp_path / "www" / f"{shard}.tar", range(first, first + 3 + shard % 3))
        first += 3 + shard % 3
    Handler.lost, Handler.busy, Handler.asked, Handler.user = Counter(), Counter(), [], ""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www"))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


NUM_IMAGES = 39
IMPATIENT = FetchConfig(backoff=0.01)


def names(images: Iterator[EncodedImage], count: int) -> list[str]:
    return [Path(image.name).name for image in islice(images, count)]


# Order


@pytest.mark.parametrize("readers", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("shards", [1, 2, 5, 6, 20])
def test_all_readers_together_take_every_image_once_per_epoch(shards: int, readers: int) -> None:
    sizes = [1 + 7 * shard % 11 for shard in range(shards)]
    for epoch in range(4):
        taken = Counter(
            (share.shard, image)
            for reader in range(readers)
            for share in deal(shards, reader, readers, epoch, key=epoch + 5)
            for image in range(share.first, sizes[share.shard], share.every)
        )
        assert taken == Counter((shard, image) for shard in range(shards) for image in range(sizes[shard]))


def test_shuffling_is_bounded_by_bytes_too() -> None:
    """One image may pass the limit; even one of many times the limit leaves it."""
    sizes = [50 + 37 * n % 100 for n in range(300)] + [5000, 10, 10]
    held = most = 0

    def images() -> Iterator[EncodedImage]:
        nonlocal held, most
        for number, size in enumerate(sizes):
            held += size
            most = max(most, held if size < 5000 else 0)
            yield EncodedImage(str(number), bytes(size), [])

    order = []
    for image in shuffle(images(), 64, key=3, max_bytes=2000):
        held -= len(image.data)
        order.append(int(image.name))
    assert sorted(order) == list(range(len(sizes)))
    assert 2000 <= most < 2150
    assert np.abs(np.diff(order)).mean() > 5


@pytest.mark.parametrize(("shards", "readers"), [(1, 8), (3, 8), (8, 8), (17, 8)])
def test_no_reader_is_left_without_data(shards: int, readers: int) -> None:
    """Even where a shard has a single image, each gets its turn."""
    for reader in range(readers):
        found = sum(share.first == 0 for epoch in range(readers) for share in deal(shards, reader, readers, epoch, 1))
        assert found >= 1
    if shards >= readers:
        first = {next(deal(shards, reader, readers, 0, key=1)).shard for reader in range(readers)}
        assert len(first) == readers


def test_shuffling_is_a_permutation_within_bounded_memory() -> None:
    pulled = 0

    def images() -> Iterator[EncodedImage]:
        nonlocal pulled
        for pulled in range(1, 501):
            yield EncodedImage(str(pulled), b"", [])

    order = []
    for given, image in enumerate(shuffle(images(), 64, key=3)):
        assert pulled - given <= 64
        order.append(int(image.name))
    assert sorted(order) == list(range(1, 501))
    assert np.abs(np.diff(order)).mean() > 20
    assert [int(image.name) for image in shuffle(images(), 64, key=3)] == order
    assert [int(image.name) for image in shuffle(images(), 64, key=4)] != order
    assert [int(image.name) for image in shuffle(images(), 1, key=3)] == list(range(1, 501))


@pytest.mark.parametrize("readers", [1, 4, 12, 30])
def test_shards_over_http_give_every_image_once_per_epoch(server: str, readers: int) -> None:
    """Also where there are more readers than shards."""
    url = f"{server}/{{0..9}}.tar"
    assert ShardStream(url).num_shards == 10
    sizes = [3 + shard % 3 for shard in range(10)]
    epoch: Counter[str] = Counter()
    for reader in range(readers):
        stream = ShardStream(url, buffer=5)
        shares = list(deal(10, reader, readers, 0, hash_bits(0, 0)))
        count = sum(len(range(share.first, sizes[share.shard], share.every)) for share in shares)
        epoch.update(names(stream.images(0, reader=reader, readers=readers), count))
        assert names(stream.images(count, reader=reader, readers=readers), 1)  # and it goes on
        stream.close()
    assert epoch == Counter(f"{number:03d}.png" for number in range(NUM_IMAGES))


def test_any_place_can_be_found_again(server: str) -> None:
    url = f"{server}/{{0..9}}.tar"
    whole = names(ShardStream(url, buffer=8).images(0, seed=3, reader=1, readers=3), 60)
    assert len(set(whole)) > 20
    for place in (0, 1, 17, 45):
        assert names(ShardStream(url, buffer=8).images(place, seed=3, reader=1, readers=3), 12) == whole[place:][:12]
    stream = pickle.loads(pickle.dumps(ShardStream(url, buffer=8)))
    for place in (4, 5, 9, 2):  # onwards, and back
        assert names(stream.images(place, seed=3, reader=1, readers=3), 1) == [whole[place]]
    assert names(ShardStream(url, buffer=8).images(0, seed=4, reader=1, readers=3), 60) != whole


def test_reading_on_does_not_start_again(server: str) -> None:
    stream = ShardStream(f"{server}/{{0..9}}.tar", buffer=4)
    for place in range(NUM_IMAGES):
        next(stream.images(place))
    assert len(Handler.asked) == len(set(Handler.asked)) == 10


# Reading


def test_a_lost_connection_is_taken_up_again(server: str) -> None:
    Handler.lost, Handler.busy = Counter({"/1.tar": 2}), Counter({"/2.tar": 3})
    images = list(ShardStream(f"{server}/{{0..3}}.tar", fetch=IMPATIENT).probe())
    assert names(iter(images), 99) == [f"{number:03d}.png" for number in range(15)]
    assert [image.data for image in images] == [picture(number) for number in range(15)]
    assert Handler.asked == ["/0.tar", *["/1.tar"] * 3, *["/2.tar"] * 4, "/3.tar"]


def test_lost_connections_do_not_change_the_order(server: str) -> None:
    url = f"{server}/{{0..9}}.tar"
    whole = list(batches(url, StepSampler(0, 12, 3), workers=0))
    Handler.lost = Counter({f"/{shard}.tar": 1 + shard % 3 for shard in range(10)})
    disturbed = list(batches(url, StepSampler(0, 12, 3), workers=0))
    assert not +Handler.lost
    assert all(same(*pair) for pair in zip(disturbed, whole, strict=True))
    assert all(batch.skipped == [] for batch in disturbed)


@pytest.mark.parametrize("fault", ["lost", "busy", "missing"])
def test_a_shard_that_fails_again_and_again_is_given_up_and_training_goes_on(
    server: str, tmp_path: Path, fault: str
) -> None:
    """What of it came through is used; nobody waits for what is not there."""
    said, attempts, used = {
        "lost": ("connection lost 15360 bytes before the end", 4, {"003.png", "004.png"}),
        "busy": ("HTTP Error 500: Internal Server Error", 4, set()),
        "missing": ("HTTP Error 404: File not found", 1, set()),
    }[fault]
    if fault == "missing":
        (tmp_path / "www/1.tar").unlink()
    else:
        setattr(Handler, fault, Counter({"/1.tar": 1000}))
    stream = ShardStream(f"{server}/{{0..2}}.tar", buffer=1, fetch=IMPATIENT)
    images = list(stream.probe())
    assert [entry for image in images for entry in image.skipped] == [
        (f"{server}/1.tar", f"cannot be fetched ({said})")
    ]
    assert Handler.asked.count("/1.tar") == attempts
    found = {Path(image.name).name for image in images if image.name}
    whole = {f"{number:03d}.png" for number in (*range(3), *range(7, 12))}
    assert found == whole | used
    loaded = list(batches(f"{server}/{{0..2}}.tar", StepSampler(0, 20, 1), workers=1))
    log = SkipLog()
    for batch in loaded:
        log.add(batch.skipped)
    assert log.kinds.keys() == {"cannot be fetched"}


def test_a_password_is_sent_to_the_server_and_never_shown(server: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Handler.user = "Basic " + base64.b64encode(b"me:se/cret").decode()
    Handler.busy = Counter({"/0.tar": 1})
    address = server.replace("//", "//me:se%2Fcret@")
    stream = ShardStream(f"{address}/{{0..1}}.tar")
    assert names(stream.probe(), 9) == [f"{number:03d}.png" for number in range(7)]
    mixture = ImageMixture([stream])
    assert mixture.load(0).name.startswith(server.replace("//", "//***@"))
    assert "trying again" in caplog.text
    assert "cret" not in f"{caplog.text} {stream} {stream.path}"


@pytest.mark.parametrize(
    "path",
    [
        "https://me:SECRET@127.0.0.1:9/{0..1}.tar",
        "https://me:SEC/RET@127.0.0.1:9/x.tar",
        "http://127.0.0.1:9/x.tar?token=SECRET",
        "http://127.0.0.1:9/x.tar?token=a SECRET",
        "http://me:a SECRET@127.0.0.1:9/x.tar?token=a SECRET",
        "http://host/{0..9.tar?token=a SECRET",
        "HTTP://me:SECRET@127.0.0.1:9x/x.tar",
        "http://[bad/x.tar?token=SECRET",
        "http://host/{0..9.tar?token=SECRET",
        "http://host/x.tar.zst?token=SECRET",
        "s3://me:SECRET@bucket/x.tar",
        "pipe:false http://me:SECRET@host/x.tar?token=SECRET",
    ],
)
def test_no_message_shows_a_secret(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is wrong with the address, or with the entry."""
    caplog.set_level("DEBUG")
    for value in (path, [[path, -1]], [[path, 1, 2]], {path: 1}):
        with pytest.raises(FeatSharpError) as caught:
            ImageMixture.from_data_dir(value, fetch=IMPATIENT)
        assert "SEC" not in str(caught.value)
        assert "RET" not in str(caught.value)
    assert "SEC" not in caplog.text


def test_shards_that_differ_in_their_query_alone_are_counted_apart(server: str, tmp_path: Path) -> None:
    """Within one entry and in several."""
    write_tar(tmp_path / "www/0.tar", range(3))
    with tarfile.open(tmp_path / "www/0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("empty.png"))
    for value in (
        f"{server}/0.tar?part={{7..9}}",
        [f"{server}/0.tar?part={part}" for part in range(3)],
    ):
        mixture = ImageMixture.from_data_dir(value)
        log = SkipLog()
        for n in range(40):
            log.add(mixture.load(n).skipped)
        (names,) = log.examples.values()
        assert [redact_url(f"{name}: why") for name in names] == [f"{name}: why" for name in names]
        assert set(names) == {f"{server}/0.tar?part=*** (no. {number}) empty.png" for number in (1, 2, 3)}


def test_missing_shards_are_counted_and_the_others_used(server: str) -> None:
    mixture = ImageMixture.from_data_dir(f"{server}/{{8..11}}.tar")
    loaded = [mixture.load(n) for n in range(40)]
    assert {Path(image.name).name for image in loaded} == {f"{number:03d}.png" for number in range(31, 39)} | {
        "031.png"
    }
    skipped = dict(entry for image in loaded for entry in image.skipped)
    assert set(skipped) == {f"{server}/10.tar", f"{server}/11.tar"}
    assert all("cannot be fetched (HTTP Error 404" in reason for reason in skipped.values())


def test_a_query_is_sent_but_never_shown(server: str) -> None:
    mixture = ImageMixture.from_data_dir(f"{server}/{{0..1}}.tar?token=secret")
    assert "secret" not in f"{mixture.load(0).name} {mixture.sources[0].path} {mixture.sources[0]}"
    assert all(asked.endswith("?token=secret") for asked in Handler.asked)
    with pytest.raises(DataError) as caught:
        ImageMixture.from_data_dir(f"{server}/absent.tar?token=secret")
    assert "secret" not in str(caught.value)


def test_a_command_is_run_by_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "0.tar", range(3))
    monkeypatch.setenv("SHARDS", str(tmp_path))
    images = ShardStream("pipe:dd if=$SHARDS/0.tar status=none | cat").probe()
    assert names(images, 9) == ["000.png", "001.png", "002.png"]


def test_a_command_that_keeps_quiet_is_waited_for_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    write_tar(tmp_path / "0.tar", range(3))
    command = f"pipe:sleep 0.7; cat {tmp_path}/0.tar # http://h/x?t=SECRET"
    images = ShardStream(command, fetch=FetchConfig(timeout=0.2)).probe()
    assert [image.name[-7:] for image in images] == ["000.png", "001.png", "002.png"]
    said = f"pipe:sleep 0.7; cat {tmp_path}/0.tar # http://h/x?t=***: still waiting for the first bytes"
    assert 1 <= caplog.messages.count(said) <= 3
    assert set(caplog.messages) == {said}


def test_a_failing_command_is_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", range(3))
    mixture = ImageMixture.from_data_dir([f"pipe:cat {tmp_path}/0.tar; exit 3"])
    skipped = [entry for n in range(9) for entry in mixture.load(n).skipped]
    assert skipped[0][1] == "cannot be fetched (the command ended with status 3)"


def test_a_command_that_is_no_longer_wanted_is_ended(tmp_path: Path) -> None:
    """Neither a forgotten process nor a wait for one."""
    write_tar(tmp_path / "0.tar", range(3))
    stream = ShardStream(f"pipe:cat {tmp_path}/0.tar; exec sleep 100", buffer=1)
    next(stream.images(0))
    stream.close()


def test_a_group_that_may_not_be_signalled_any_more_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS says of a command that has ended; other systems say that there is none."""

    def refuse(*_: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.killpg", refuse)
    write_tar(tmp_path / "0.tar", range(3))
    images = list(ShardStream(f"pipe:cat {tmp_path}/0.tar").probe())
    assert [entry for image in images for entry in image.skipped] == []
    assert len(images) == 3


def test_a_stalled_command_ends_with_all_that_it_started_even_where_sigterm_is_ignored(tmp_path: Path) -> None:
    """Which is inherited by all that is started. A child of the shell would outlive it."""
    write_tar(tmp_path / "0.tar", range(3))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        child = f"sh -c 'echo $$ > {tmp_path}/started; exec sleep 1000'"
        stream = ShardStream(f"pipe:{child} & cat {tmp_path}/0.tar; wait", buffer=1)
        next(stream.images(0))
        started = tmp_path / "started"
        while not (started.exists() and started.read_text(encoding="utf-8")):
            time.sleep(0.01)
        stream.close()
    finally:
        signal.signal(signal.SIGTERM, before)
    wait_for_the_end_of(tmp_path / "started")


def test_an_address_that_is_none_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="cannot be fetched"):
        ImageMixture.from_data_dir("http://[bad/x.tar")


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/{0..9}.tar", "pipe:false", "pipe:printf ''"])
def test_shards_that_are_all_dead_are_one_clear_error(path: str) -> None:
    once = FetchConfig(attempts=1)
    with pytest.raises(DataError, match=r"no usable image found \("):
        ImageMixture.from_data_dir(path, fetch=once)
    with pytest.raises(DataError, match="20 shards in a row gave no image; the last, "):
        ImageMixture([ShardStream(path, fetch=once)]).load(0)


@pytest.mark.parametrize(
    "braces", ["{0..999999999}", "{a,b}" * 40, "{0..999}{0..999}{0..99}", "{" + "9" * 5000 + "..1}"]
)
def test_braces_that_stand_for_too_many_files(braces: str) -> None:
    """They would be made one by one until memory ends."""
    with pytest.raises(ConfigError, match=r"more than 1,000,000 files"):
        ShardStream(f"pipe:cat {braces}.tar")


def test_braces_that_do_not_pair() -> None:
    with pytest.raises(ConfigError, match=r"Unbalanced braces.*write ranges as \{000\.\.099\}"):
        ImageMixture.from_data_dir("http://host/{0..9.tar")
    with pytest.raises(ConfigError, match="a shuffle buffer of 0 images"):
        ShardStream("http://host/0.tar", buffer=0)


# Mixtures and batches


@pytest.mark.parametrize("division", [Division(), Division(3, 2, 1), Division(2, 3, 2), Division(5, 1, 4)])
def test_readers_divide_the_samples(division: Division) -> None:
    """Against a walk through all samples."""
    place: Counter[int] = Counter()
    for n in range(240):
        step, rank = n // division.batch_size // division.world, n // division.batch_size % division.world
        reader = rank * division.workers + step % division.workers
        assert division.reader(n) == reader
        earlier = [number for numbers in division.earlier(n) for number in numbers]
        assert len(earlier) == place[reader]
        assert all(number < n and division.reader(number) == reader for number in earlier)
        place[reader] += 1
    assert set(place) == set(range(division.readers))


def test_a_mixture_counts_the_places_of_a_stream_by_reader(server: str, tmp_path: Path) -> None:
    """Weighted with a local source, every reader gets the images of its own sequence, one after the other."""
    write_tar(tmp_path / "local.tar", range(100, 104))
    sources = [open_source(tmp_path / "local.tar"), ShardStream(f"{server}/{{0..9}}.tar", buffer=6)]
    mixture = ImageMixture(sources, [1, 2], seed=1)
    division = Division(batch_size=2, world=1, workers=2)
    seed = hash_bits(1, 1)
    found: dict[int, list[str]] = {0: [], 1: []}
    for reader in (0, 1):  # one process each
        own = [n for n in range(60) if division.reader(n) == reader]
        for n in own:
            if mixture.locate(n)[0] == 1:
                found[reader].append(Path(mixture.load(n, division).name).name)
        alone = ShardStream(f"{server}/{{0..9}}.tar", buffer=6)
        assert found[reader] == names(alone.images(0, seed=seed, reader=reader, readers=2), len(found[reader]))
    assert abs(len(found[0]) + len(found[1]) - 40) <= 2


def batches(
    data: object, sampler: StepSampler, workers: int, positions: Positions | None = None, keep: Predicate | None = None
) -> Generator[Batch]:
    mixture = ImageMixture.from_data_dir(data, keep=ImageFilter(predicate=keep), shuffle_buffer=6, fetch=IMPATIENT)
    return load_batches(ViewDataset(mixture, (16, 24), ViewConfig(num_views=1), seed=0), sampler, workers, positions)


def same(batch: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(batch.samples, other.samples, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_of_a_resumed_run_are_those_of_an_uninterrupted_one(server: str, tmp_path: Path, workers: int) -> None:
    (tmp_path / "www" / "4.tar").write_bytes(b"broken")
    url = f"{server}/{{0..9}}.tar"
    whole = list(batches(url, StepSampler(0, 9, 3, rank=1, world=2), workers))
    for first in (1, 4):
        resumed = list(batches(url, StepSampler(first, 9, 3, rank=1, world=2), workers))
        assert len(resumed) == 9 - first
        assert all(same(*pair) for pair in zip(resumed, whole[first:], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_fewer_shards_than_ranks_and_workers(server: str, shards: int) -> None:
    """Four readers: each batch is there, and a round of all of them holds (nearly) every image once."""
    url = f"{server}/{{0..{shards - 1}}}.tar"
    total = sum(3 + shard % 3 for shard in range(shards))
    for rank in range(2):
        assert len(list(batches(url, StepSampler(0, 6, 1, rank, world=2), workers=2))) == 6
    mixture = ImageMixture.from_data_dir(url)
    division = Division(batch_size=1, world=2, workers=2)
    by_reader = {
        reader: [mixture.load(n, division).name for n in range(4 * total) if division.reader(n) == reader]
        for reader in range(4)
    }
    assert set().union(*by_reader.values()) == {image.name for image in ShardStream(url).probe()}
    for reader, loaded in by_reader.items():
        assert len(loaded) == total
        assert max(Counter(loaded).values()) < total, f"reader {reader} repeats one image"


def every_fourth(image: Image.Image, name: str) -> bool:
    return int(Path(name).stem) % 4 == 0


def test_images_that_are_left_out_are_read_past_so_that_each_of_the_others_comes_once_per_epoch(server: str) -> None:
    """Not the next one again for each that is left out."""
    mixture = ImageMixture.from_data_dir(f"{server}/{{0..9}}.tar", keep=ImageFilter(predicate=every_fourth))
    kept = [f"{number:03d}.png" for number in range(0, NUM_IMAGES, 4)]
    loaded = [mixture.load(n) for n in range(3 * len(kept))]
    for epoch in range(3):
        used = [Path(image.name).name for image in loaded[epoch * len(kept) : (epoch + 1) * len(kept)]]
        assert sorted(used) == kept
    left_out = {Path(name).name for image in loaded for name, _ in image.skipped}
    assert left_out | set(kept) == {f"{number:03d}.png" for number in range(NUM_IMAGES)}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_that_leaves_images_out_goes_on_with_the_very_next(server: str, tmp_path: Path, workers: int) -> None:
    """However far the workers had read ahead, and beside local data."""
    write_tar(tmp_path / "local.tar", range(100, 112))
    data = [[f"{server}/{{0..9}}.tar", 2], str(tmp_path / "local.tar")]
    first: Positions = {}
    whole = list(batches(data, StepSampler(0, 8, 3, rank=1, world=2), workers, first, every_fourth))
    assert sum(len(batch.skipped) for batch in whole) > 40
    for stop in (1, 4):
        positions: Positions = {}
        stopped = batches(data, StepSampler(0, 8, 3, rank=1, world=2), workers, positions, every_fourth)
        assert all(same(*pair) for pair in zip(islice(stopped, stop), whole, strict=False))
        stopped.close()
        assert positions != first
        resumed = list(batches(data, StepSampler(stop, 8, 3, rank=1, world=2), workers, positions, every_fourth))
        assert len(resumed) == 8 - stop
        assert all(same(*pair) for pair in zip(resumed, whole[stop:], strict=True))
        assert [batch.skipped for batch in resumed] == [batch.skipped for batch in whole[stop:]]
        assert positions == first


def test_a_stream_of_which_nothing_is_left_is_an_error_and_no_endless_loop(server: str) -> None:
    keep = ImageFilter(predicate=lambda image, name: False)
    message = r"no usable image found \(39 rejected by data\.filter\)"
    with pytest.raises(DataError, match=message):
        ImageMixture.from_data_dir(f"{server}/{{0..9}}.tar", keep=keep)
    mixture = ImageMixture([ShardStream(f"{server}/{{0..9}}.tar")], keep=keep, max_failures=50)
    with pytest.raises(
        DataError, match=r"50 images in a row cannot be used \(50 rejected by data\.filter\); the last, "
    ):
        mixture.load(0)


def test_repeated_samples_are_refused(server: str) -> None:
    with pytest.raises(ConfigError, match=r"feature_cache\.samples repeats samples"):
        next(batches(f"{server}/0.tar", StepSampler(0, 1, 1, distinct=4), 0))


def fails_late(image: Image.Image, name: str) -> bool:
    if name.endswith("/002.png"):
        raise ValueError("a mistake of the user's")
    return True


processes_are_listed = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the /proc of Linux")


@processes_are_listed
@pytest.mark.parametrize("end", ["closed", "failed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_commands_end_with_the_iteration(tmp_path: Path, workers: int, end: str) -> None:
    """However it ends: they would wait for their reader for ever, or go on."""
    write_tar(tmp_path / "0.tar", range(2 if end == "closed" else 3))
    command = f"pipe:echo $$ >> {tmp_path}/started; cat {tmp_path}/0.tar; head -c 100000 /dev/zero; exec sleep 1000"
    mixture = ImageMixture([ShardStream(command, buffer=1)], keep=ImageFilter(predicate=fails_late))
    dataset = ViewDataset(mixture, (16, 24), ViewConfig(num_views=1), seed=0)
    loaded = load_batches(dataset, StepSampler(0, 9, 1), workers)
    next(loaded)
    if end == "closed":
        loaded.close()
    else:
        with pytest.raises(ConfigError, match="a mistake of the user's"):
            list(loaded)
    wait_for_the_end_of(tmp_path / "started")


def wait_for_the_end_of(started: Path) -> None:
    """Of the processes whose numbers a file has."""
    begin = time.monotonic()
    while any(alive(int(line)) for line in started.read_text(encoding="utf-8").split()):
        assert time.monotonic() - begin < 60  # they would sleep for 1000 seconds; a loaded machine takes its time
        time.sleep(0.05)


def alive(process: int) -> bool:
    """Not so are those that ended and that nobody asks for."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


KILLED = """
import os, signal, sys
from featsharp.data.loader import StepSampler, ViewDataset, load_batches
from featsharp.data.mixture import ImageMixture
from featsharp.data.streams import ShardStream
from featsharp.data.views import ViewConfig

mixture = ImageMixture([ShardStream(sys.argv[1], buffer=1)])
batches = load_batches(ViewDataset(mixture, (16, 24), ViewConfig(num_views=1), seed=0), StepSampler(0, 9, 1), 1)
next(batches)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@processes_are_listed
def test_workers_that_wait_for_data_and_their_commands_end_with_a_killed_training(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", range(2))
    note = f"echo $$ $PPID >> {tmp_path}/started"
    command = f"pipe:{note}; cat {tmp_path}/0.tar; head -c 100000 /dev/zero; exec sleep 1000"
    done = subprocess.run([sys.executable, "-c", KILLED, command], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len((tmp_path / "started").read_text().split()) == 2
    wait_for_the_end_of(tmp_path / "started")


# Training


STOPPING_WRITER = """
class Writer:
    def __init__(self, folder): pass
    def config(self, config): pass
    def image(self, name, image, step): pass
    def close(self): pass
    def scalar(self, name, value, step):
        if step == 3:
            raise KeyboardInterrupt
"""


@pytest.mark.slow
def test_training_from_a_url_and_a_pipe_goes_on_where_it_stopped(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(4):
        Image.open(io.BytesIO(picture(number))).resize((160, 120)).save(tmp_path / "photos" / f"{number}.png")
    pack_images(tmp_path / "photos", tmp_path / "packed", images_per_shard=2)
    data = f"train_data_dir=[['{server}/{{0..9}}.tar', 3], ['pipe:cat {tmp_path}/packed/shard-00000{{0,1}}.tar', 1]]"
    common = ["+model=toy-vit", "+upsampler=featup-2x", data, "batch_size=2", "num_workers=1", "progress=false"]
    common += ["normalizer.num_samples=4", "normalizer.batch_size=4", "viz.num_images=1", "viz.type=none"]
    common += ["num_training_steps=4", "checkpoint_frequency=2", "log_frequency=1"]
    assert main([*common, "output_base=whole"]) == 0, caplog.text

    (tmp_path / "stopping_writer.py").write_text(STOPPING_WRITER)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([*common, "output_base=halves", "viz.type=stopping_writer:Writer"]) == 130
    assert main([*common, "output_base=halves"]) == 0
    whole, halves = (read_checkpoint(Path(base, "toy-vit/64/last.pth"))["model"] for base in ("whole", "halves"))
    assert all(torch.equal(whole[key], halves[key]) for key in whole)
