"""Tables as lines of text."""

from featsharp.terminal import align

ROWS = [("a", "1"), ("longer", "2.25")]


def test_numbers_are_flush_right_and_names_left():
    assert align(("name", "ms"), ROWS) == ["name      ms", "a          1", "longer  2.25"]


def test_text_is_flush_left_without_blanks_at_the_end():
    assert align(("name", "what"), ROWS, numbers=False) == ["name    what", "a       1", "longer  2.25"]


def test_a_head_alone():
    assert align(("name", "ms"), []) == ["name  ms"]
