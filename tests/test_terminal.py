"""Tables, wrapped text, levels of messages."""

import contextlib
import logging
import os
import termios

import pytest

from featsharp.terminal import align, parse_verbosity, progress_bar, set_up_terminal, with_progress, wrap

ROWS = [("a", "1"), ("longer", "2.25")]


def test_numbers_are_flush_right_and_names_left():
    assert align(("name", "ms"), ROWS) == ["name      ms", "a          1", "longer  2.25"]


def test_text_is_flush_left_without_blanks_at_the_end():
    assert align(("name", "what"), ROWS, numbers=False) == ["name    what", "a       1", "longer  2.25"]


def test_a_head_alone():
    assert align(("name", "ms"), []) == ["name  ms"]


@pytest.mark.parametrize(("columns", "widest"), [("60", 60), ("500", 100), ("10", 38)])
def test_text_is_wrapped_to_the_terminal_but_to_100_characters_at_most(columns, widest, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    text = " ".join(["word"] * 80)
    lines = wrap(text, "  name", indent=8)
    assert widest - 5 < max(map(len, lines)) <= widest
    assert lines[0].startswith("  name  word")
    assert all(line.startswith(" " * 8 + "word") for line in lines[1:])
    assert " ".join(line[8:] for line in lines) == text


def test_no_text_has_no_lines():
    assert wrap("", indent=6) == []


def test_flags_of_messages_are_split_off_overrides():
    assert parse_verbosity(["+a=-v", "-q", "b=1", "~c", "-vv", "--help"]) == (1, ["+a=-v", "b=1", "~c", "--help"])
    assert parse_verbosity(["verbose=1"]) == (0, ["verbose=1"])


@pytest.mark.parametrize(
    ("verbosity", "level"),
    [
        (-2, logging.ERROR),
        (-1, logging.ERROR),
        (0, logging.INFO),
        (1, logging.INFO),
        (2, logging.DEBUG),
        (9, logging.DEBUG),
    ],
)
def test_levels(verbosity, level):
    set_up_terminal(verbosity, usual=logging.INFO)
    assert logging.getLogger("featsharp").level == level


@pytest.mark.parametrize(("verbosity", "wanted", "shown"), [(0, True, True), (-1, True, False), (0, False, False)])
def test_a_bar_is_shown_on_a_terminal_but_not_under_q(verbosity, wanted, shown):
    terminal, program = os.openpty()
    termios.tcsetwinsize(program, (24, 80))
    set_up_terminal(verbosity)
    with open(program, "w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
        assert list(with_progress(iter("ab"), "label", wanted, total=2)) == ["a", "b"]
        with progress_bar("training", 7, start=3, wanted=wanted) as advance:
            advance("loss=0.5")
        stream.write("end")
        stream.flush()
        text = ""
        while not text.endswith("end"):  # a terminal passes on in pieces
            text += os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert ("label:" in text and "training:" in text) == shown
    assert shown or text == "end"


def test_there_is_no_bar_in_a_file(capsys):
    set_up_terminal()
    assert list(with_progress([1, 2], "label")) == [1, 2]
    assert capsys.readouterr().err == ""
