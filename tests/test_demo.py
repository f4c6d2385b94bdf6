"""The demo: its page in a browser, on a wide and a narrow screen, and what it says of wrong input."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from featsharp.cli.demo import installed_backbones
from featsharp.cli.main import main
from featsharp.errors import MissingDependencyError
from featsharp.visualization.page import PCA, SIMILARITY, TEXT, Demo, list_methods, list_views, with_text

pytest.importorskip("gradio")
ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def png(size: tuple[int, int] = (90, 140), seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), np.uint8)
    Image.fromarray(pixels).resize(size[::-1]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo(["toy-vit", "vits14-focus"], torch.device("cpu"))


def test_a_picture_is_read_computed_and_looked_at(demo):
    picture, *nothing, text = demo.read_upload(png())
    assert (picture.shape, nothing, text) == ((90, 140, 3), [None] * 3, "140 x 90 pixels. Press Compute.")
    features, (low_res, high_res), view, text = demo.compute(picture, "toy-vit", "bilinear", 2)
    assert low_res.shape == high_res.shape == (411, 640, 3)
    assert (view["value"], TEXT in view["choices"]) == (PCA, False)
    assert "features of `toy-vit`" in text
    assert "MiB" in text
    pair, words = demo.look(features, SIMILARITY, (0.5, 0.25), 4, "")
    assert words == "Cosine with the feature at x 0.25, y 0.50 of the picture: dark 0, bright 1."
    assert not np.array_equal(pair[1], high_res)
    assert demo.look(features, SIMILARITY, None, 4, "")[1] == "Click into the picture to choose a point."
    assert "4 clusters" in demo.look(features, "clusters", None, 4, "")[1]


def test_a_large_picture_is_scaled_down_and_the_page_says_so(demo):
    picture, *_, text = demo.read_upload(png((30, 3000)))
    assert picture.shape == (20, 2048, 3)
    assert text == "3000 x 30 pixels, scaled down to 2048 x 20 for this page. Press Compute."


def test_errors_are_text_on_the_page(demo):
    def say(function, results, *inputs):
        *skipped, text = with_text(function, results)(*inputs)
        assert len(skipped) == results - 1
        return text

    assert say(demo.read_upload, 5, b"no picture").startswith("**Error:** the uploaded file: ")
    assert "no picture yet" in say(demo.compute, 4, None, "toy-vit", "bilinear", 2)
    assert "no features yet" in say(demo.look, 2, None, PCA, None, 4, "")
    picture = demo.read_upload(png())[0]
    assert "start it with --backbone" in say(demo.compute, 4, picture, "hub:a/b/c", "bilinear", 2)
    assert "has no 2x for toy-vit" in say(demo.compute, 4, picture, "toy-vit", "/etc/passwd", 2)
    features = demo.compute(picture, "toy-vit", "bilinear", 2)[0]
    assert "text needs a backbone of open_clip" in say(demo.look, 2, features, TEXT, None, 4, "a dog")
    assert "there is no example" in say(demo.read_example, 5, "../../etc/passwd")


def test_a_port_that_is_taken_costs_one_line(capsys, monkeypatch):
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "")  # the command sets them for its process
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--backbone", "toy-vit", "--port", str(port)]) != 0
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_unknown_backbones_are_refused_at_the_start(capsys):
    for name, hint in (("nonsense", "unknown backbone 'nonsense'"), ("tim:vit", "prefix 'tim:'; did you mean 'timm:'")):
        assert main(["demo", "--backbone", "toy-vit", name]) == 1
        assert hint in capsys.readouterr().err


def test_what_is_listed_without_being_named_is_installed():
    assert list(installed_backbones(["vits14-focus", "dinov2-s", "toy-vit"])) == ["vits14-focus", "toy-vit"]
    with pytest.raises(
        MissingDependencyError, match=r"no weights of dinov2-s are here.*name a backbone with --backbone"
    ):
        installed_backbones(["dinov2-s"])


def test_choices_are_what_works():
    assert "vits14-focus/featsharp" in list_methods("vits14-focus", 2)
    assert "vits14-focus/featsharp" not in list_methods("toy-vit", 2)
    assert TEXT not in list_views("toy-vit")
    assert TEXT in list_views("open_clip:ViT-B-32/openai")


@pytest.fixture(scope="module")
def page():
    """The address of a running demo; it leaves no file when it is ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "featsharp", "demo", "--backbone", "toy-vit", "--port", str(port)]
        environment = {**os.environ, "TMPDIR": folder, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            [*command, "--max-upload", "1"], env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout.readline().startswith(f"featsharp demo: http://127.0.0.1:{port}")
                yield f"http://127.0.0.1:{port}"
                kept = list(Path(folder).rglob("*.*"))
                assert kept  # the pictures of the page, while it runs
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
        assert not [path for path in Path(folder).rglob("*") if "featsharp-demo" in str(path)]


def until(condition, says, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the page says {says()!r}"
        time.sleep(0.2)


@pytest.mark.full
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(page, width, tmp_path):
    """Never skipped: `make test-full` puts a browser there (tests/install_browser.sh)."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "there is no chromium; tests/install_browser.sh installs it"
    (tmp_path / "photo.png").write_bytes(png())
    (tmp_path / "broken.png").write_bytes(png()[:200])
    (tmp_path / "large.bmp").write_bytes(b"BM" + bytes(2_000_000))
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        hosts: set[str] = set()
        faults: list[str] = []
        tab.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.goto(page, timeout=60_000)
        status, upload = tab.locator("#status"), tab.locator("input[type=file]").first
        tab.wait_for_selector("#compute", timeout=60_000)

        def drawn() -> list[str]:
            return [image.get_attribute("src") or "" for image in tab.locator("#slider img").all()]

        tab.click("#compute")
        until(lambda: "there is no picture yet" in status.inner_text(), status.inner_text)
        upload.set_input_files(tmp_path / "broken.png")
        until(lambda: "the uploaded file: cannot be decoded" in status.inner_text(), status.inner_text)
        upload.set_input_files(tmp_path / "photo.png")
        until(lambda: "140 x 90 pixels" in status.inner_text(), status.inner_text)
        tab.click("#compute")
        until(lambda: "features of toy-vit" in status.inner_text() and len(drawn()) == 2, status.inner_text)
        first = drawn()
        assert first[0] != first[1]
        picture = tab.locator("#picture img").first
        box = picture.bounding_box()
        picture.click(position={"x": 0.25 * box["width"], "y": 0.5 * box["height"]})
        until(lambda: "Cosine with the feature" in status.inner_text() and drawn() != first, status.inner_text)
        point = [float(number) for number in re.findall(r"[xy] (0\.\d+)", status.inner_text())]
        assert point == pytest.approx([0.25, 0.5], abs=0.02)  # a pixel or two
        tab.get_by_label("clusters").click()
        until(lambda: "6 clusters" in status.inner_text(), status.inner_text)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
        before = drawn()
        upload.set_input_files(tmp_path / "large.bmp")
        until(lambda: tab.locator(".toast-body").count() > 0, status.inner_text)  # refused before it is read
        assert "exceed" in tab.locator(".toast-body").inner_text()
        assert drawn() == before
        assert "Traceback" not in tab.locator("body").inner_text()
        browser.close()
    assert hosts == {page.removeprefix("http://")}  # no fonts, no analytics, nothing from elsewhere
    assert not faults


@pytest.mark.full
def test_it_listens_on_this_machine_alone(page):
    assert urlopen(page, timeout=30).status == 200
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {
        "127.0.0.1",
        "127.0.1.1",
    }
    for address in others:
        with socket.socket() as call:
            call.settimeout(5)
            assert call.connect_ex((address, int(page.rpartition(":")[2]))) != 0
