"""Encoders and files from and to the Hub, against a stand-in on the loopback device; weights by name; hubconf.py."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import serve

import featsharp
from featsharp.builder import SharpEncoder, create_encoder, load_from_file, save_checkpoint
from featsharp.card import MADE
from featsharp.cli.main import main
from featsharp.errors import CheckpointError, ConfigError
from featsharp.weights import HOME, list_weights
from featsharp.weights.hub import fetch_file, find_file, push_folder
from featsharp.weights.published import PUBLISHED, PublishedFile, fetch_published

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server():
    with serve() as server:
        yield server


@pytest.fixture
def run(server, tmp_path):
    """Run Python in a process whose Hub is the server, as the library reads its address when it is imported."""
    pytest.importorskip("huggingface_hub")

    def run(script: str, **environment: str) -> str:
        settings = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_none", "FEATSHARP_CACHE": str(tmp_path / "cache")}
        settings |= {"TORCH_HOME": str(tmp_path / "torch")} | environment
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | settings, cwd=tmp_path, capture_output=True, text=True
        )
        return done.stdout + done.stderr

    return run


FETCH = """
from featsharp.errors import FeatSharpError
from featsharp.weights.hub import fetch_file
try:
    print("got", fetch_file("me/sharp", "model.safetensors").read_bytes()[:5])
except FeatSharpError as error:
    print("refused:", error)
"""


def test_offline_says_what_is_missing(tmp_path):
    """The tests are offline, as conftest says."""
    pytest.importorskip("huggingface_hub")
    assert find_file("nobody/nothing", "model.safetensors") is None
    with pytest.raises(
        CheckpointError, match="no folder of that name; HF_HUB_OFFLINE is set and the file is not in the cache"
    ):
        fetch_file("nobody/nothing", "model.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot push to nobody/nothing .*HF_HUB_OFFLINE is set"):
        push_folder(tmp_path, "nobody/nothing", message="first", private=None, token=None)


@pytest.mark.slow
def test_a_file_is_fetched_once_anew_when_changed_and_found_offline(server, run):
    server.files["me/sharp", "model.safetensors"] = b"first" + bytes(1000)
    script = FETCH + FETCH  # in one process: twice
    assert run(script).count("got b'first'") == 2
    assert [method for method, path in server.requests if path.endswith("model.safetensors")].count("GET") == 1
    server.files["me/sharp", "model.safetensors"] = b"later" + bytes(1000)
    assert "got b'later'" in run(FETCH)  # by its etag
    server.requests.clear()
    assert "got b'later'" in run(FETCH, HF_HUB_OFFLINE="1")
    refused = run(FETCH.replace("me/sharp", "me/other"), HF_HUB_OFFLINE="1")
    assert re.search(r"refused: cannot fetch model.safetensors of me/other .* HF_HUB_OFFLINE is set and", refused)
    assert server.requests == []
    assert "refused: cannot fetch model.safetensors of me/none" in run(FETCH.replace("me/sharp", "me/none"))


def test_without_the_library_the_command_that_installs_it_is_named(run):
    printed = run('import sys\nsys.modules["huggingface_hub"] = None\n' + FETCH)
    assert 'run: pip install "featsharp[hub]"' in printed


@pytest.mark.slow
def test_a_download_that_breaks_off_is_never_used(server, run, tmp_path):
    server.files["me/sharp", "model.safetensors"] = b"whole" + bytes(1000)
    server.cut.add("model.safetensors")
    assert "refused: cannot fetch model.safetensors of me/sharp" in run(FETCH)
    assert not list((tmp_path / "hub").glob("hub/*/snapshots/*/*"))
    assert "refused" in run(FETCH, HF_HUB_OFFLINE="1")
    server.cut.clear()
    assert "got b'whole'" in run(FETCH)
    (path,) = (tmp_path / "hub").glob("hub/*/snapshots/*/*")
    assert path.read_bytes() == b"whole" + bytes(1000)


@pytest.mark.slow
def test_an_encoder_is_pushed_and_pulled(server, run, tmp_path):
    torch.manual_seed(0)
    encoder = create_encoder("toy-vit", "featup", 2)
    save_checkpoint(
        encoder,
        tmp_path / "last.pth",
        config={"train_data_dir": "/private/folder/photos", "num_training_steps": 30, "output_root": "/private"},
        training={"step": 30},
    )
    printed = run("""
import featsharp, torch
encoder = featsharp.load_from_file("last.pth")
print("pushed to", encoder.push_to_hub("me/sharp", licence="apache-2.0", sections={"Figures": "none yet"}))
again = featsharp.SharpEncoder.from_pretrained("me/sharp")
image = torch.randn(1, 3, 64, 48)
print("equal", torch.allclose(again(image).high_res, encoder(image).high_res, atol=1e-3))
""")
    assert re.search(rf"pushed to {server.address}/me/sharp/commit/[0-9a-f]{{40}}", printed), printed
    assert "equal True" in printed
    names = {name for repository, name in server.files if repository == "me/sharp"}
    assert names >= {"model.safetensors", "config.json", "README.md"}
    assert not [name for name in names if name.endswith((".pth", ".bin", ".pt", ".pkl"))]
    config = json.loads(server.files["me/sharp", "config.json"])
    assert (config["library"], config["backbone"]["name"]) == ("featsharp", "toy-vit")
    card = server.files["me/sharp", "README.md"].decode()
    for fact in ("license: apache-2.0", "library_name: featsharp", "featup-2x", "photos", "| steps | 30 |", "none yet"):
        assert fact in card
    assert "private" not in card
    # Offline it is found; nothing else is.
    offline = "import featsharp; print(featsharp.SharpEncoder.from_pretrained('me/sharp').caption)"
    assert "featup 2x" in run(offline, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in run(
        "import featsharp; featsharp.create_encoder('toy-vit', 'tile', 2).push_to_hub('me/other')", HF_HUB_OFFLINE="1"
    )


def test_a_folder_is_written_and_read_without_the_hub(tmp_path):
    encoder = create_encoder("toy-vit", "featup", 2, normalizer="none")
    encoder.save_pretrained(tmp_path / "sharp")
    assert sorted(os.listdir(tmp_path / "sharp")) == ["README.md", "config.json", "model.safetensors"]
    again = featsharp.SharpEncoder.from_pretrained(tmp_path / "sharp")
    assert isinstance(again, SharpEncoder)
    image = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        torch.testing.assert_close(again(image).high_res, encoder(image).high_res, atol=2e-3, rtol=2e-3)
    card = tmp_path / "sharp" / "README.md"
    assert "Not stated by those who made these weights" in card.read_text(encoding="utf-8")
    create_encoder("toy-vit", "jafar", 4).save_pretrained(tmp_path / "sharp", licence="MIT")
    made = card.read_text(encoding="utf-8")
    assert "# jafar 4x for toy-vit" in made
    assert "featup" not in made
    card.write_text(made.replace(MADE, "my own"), encoding="utf-8")
    encoder.save_pretrained(tmp_path / "sharp", licence="apache-2.0", sections={"Data": "none"})
    assert card.read_text(encoding="utf-8") == made.replace(MADE, "my own")
    with pytest.raises(CheckpointError, match="was built from an upsampler object"):
        create_encoder("toy-vit", encoder.upsampler).save_pretrained(tmp_path / "object")
    assert not (tmp_path / "object").exists()
    with pytest.raises(CheckpointError, match=r"model.safetensors does not exist"):
        SharpEncoder.from_pretrained(tmp_path)
    for name in ("./nothere", "nothere", str(tmp_path / "nothere"), "~/runs/a"):
        with pytest.raises(CheckpointError, match=rf"^there is no folder {re.escape(name)}; .*save_pretrained"):
            SharpEncoder.from_pretrained(name)


def test_torch_hub_finds_the_entries(tmp_path):
    encoder = torch.hub.load(str(ROOT), "sharp_encoder", "toy-vit", "tile", 2, source="local")
    assert encoder(torch.zeros(1, 3, 96, 64)).high_res.shape == (1, 32, 12, 8)
    encoder.save_pretrained(tmp_path)
    assert torch.hub.load(str(ROOT), "from_hub", tmp_path, source="local").caption == "tile 2x"
    assert torch.hub.load(str(ROOT), "pretrained", "tile-2x", featurizer="toy-vit", source="local").factor == 2
    with pytest.raises(ConfigError, match="unknown kind of published weights"):
        torch.hub.load(str(ROOT), "published", "none", "file.pth", "toy-vit", source="local")


# Weights of others ----------------------------------------------------------------------------------------------------

PUBLISHED_SCRIPT = """
import logging
from featsharp.errors import FeatSharpError
from featsharp.weights.published import PublishedFile, fetch_published, HUB
logging.basicConfig(format="%(message)s")
file = PublishedFile("loftup", HUB + "me/weights/resolve/main/model.bin", "MIT", "any", "me/weights")
try:
    print("got", fetch_published("mine", file).read_bytes()[:5])
except FeatSharpError as error:
    print("refused:", error)
"""


def test_a_published_file_of_the_hub_says_its_licence_first_and_keeps_its_hash(server, run, tmp_path):
    server.files["me/weights", "model.bin"] = b"first"
    printed = run(PUBLISHED_SCRIPT)
    said = "mine: weights by me/weights for backbone any, licence MIT, from https:"
    assert said in printed
    assert "(recorded now: nobody has stated one)" in printed
    assert "got b'first'" in printed
    assert len((tmp_path / "cache" / "published" / "mine.sha256").read_text(encoding="ascii").strip()) == 64
    server.requests.clear()
    again = run(PUBLISHED_SCRIPT, HF_HUB_OFFLINE="1")
    assert "got b'first'" in again
    assert said not in again
    assert server.requests == []


def test_a_release_goes_to_the_cache_of_torch_hub_whole_or_not_at_all(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path / "cache"))
    server.files["", "release.pth"] = bytes(range(200))
    file = PublishedFile("naf", f"{server.address}/release.pth", "Apache-2.0", "any", "me")
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE forbids to fetch http://127.*; put the file there"):
        fetch_published("mine", file)
    assert server.requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    server.cut.add("release.pth")
    with pytest.raises(CheckpointError, match=r"cannot fetch .* \(.*100.*\); get it in another way"):
        fetch_published("mine", file)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    server.cut.clear()
    path = fetch_published("mine", file)
    assert path == tmp_path / "torch" / "hub" / "checkpoints" / "featsharp-mine.pth"
    assert path.read_bytes() == bytes(range(200))


def test_weights_are_listed_with_address_licence_and_hash(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEATSHARP_CACHE", str(tmp_path))
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "naf_release.sha256").write_text("ab" * 32 + "\n", encoding="ascii")
    assert main(["ls", "weights"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, file in PUBLISHED.items():
        assert name in printed
        assert file.address in printed
        assert file.licence in printed
    assert "ab" * 32 in printed
    for name in list_weights():
        path = HOME / f"{name}.safetensors"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert f"featsharp/weights/{name}.safetensors sha256 {digest}" in printed
    kinds = {file.kind for file in PUBLISHED.values()}
    assert kinds == {"anyup", "jafar", "loftup", "naf", "uplift", "featup"}


# The oldest file ------------------------------------------------------------------------------------------------------


def test_the_oldest_checkpoint_loads_and_encodes_as_it_did():
    """Written by the first commit that could (ebdc298): featup 2x on toy-vit, PHI-S, a bias buffer of mean zero.

    Its features are those of that commit, on an image of another size than the native one.
    """
    from safetensors.torch import load_file

    folder = ROOT / "tests" / "golden"
    encoder = load_from_file(folder / "oldest-featup.pt")
    image = (torch.arange(3 * 64 * 48).reshape(1, 3, 64, 48) % 251) / 125 - 1
    with torch.no_grad():
        out = encoder(image)
    for name, expected in load_file(folder / "oldest-featup.safetensors").items():
        torch.testing.assert_close(getattr(out, name), expected, atol=1e-5, rtol=1e-5)
    assert encoder.facts == {"config": {"seed": 0}, "step": 3}
