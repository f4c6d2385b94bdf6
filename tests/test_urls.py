"""No part of a URL that may be secret is shown, wherever in a text it stands."""

import sys

import pytest

from featsharp.training.loggers.wandb import _public_command_line
from featsharp.urls import redact_setting, redact_url


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/{000..099}.tar", "https://host/{000..099}.tar"),
        ("http://host:8080/a@b/x.tar", "http://host:8080/a@b/x.tar"),
        ("https://me:SECRET@host/x.tar", "https://***@host/x.tar"),
        ("https://SECRET@host:8080/x.tar", "https://***@host:8080/x.tar"),
        ("https://me:SEC/RET?SEC#RET@host/x.tar", "https://***@host/x.tar"),
        ("https://host/x.tar?token=SECRET", "https://host/x.tar?token=***"),
        ("https://host/x.tar?a=SECRET=&b=SECRET;c=#SECRET", "https://host/x.tar?a=***&b=***;c=***#***"),
        ("https://host/x.tar?SECRET", "https://host/x.tar?***"),
        ("https://host/x.tar?t=SEC'RET\"SECRET", "https://host/x.tar?t=***"),
        ("S3://me:SECRET@bucket/x.tar", "S3://***@bucket/x.tar"),
        ("https:/me:SECRET@host/x.tar", "https:/***@host/x.tar"),  # as a path that was normalised
        ("pipe:curl 'http://h/x?t=SECRET' | cat", "pipe:curl 'http://h/x?t=***' | cat"),
        ("pipe:a http://u:SECRET@h/x http://h/y?t=SECRET", "pipe:a http://***@h/x http://h/y?t=***"),
        ("[['https://h/x?t=SECRET', 3], 'photos']", "[['https://h/x?t=***', 3], 'photos']"),
        ("pipe:cat /data/x.tar; echo a@b?c=d", "pipe:cat /data/x.tar; echo a@b?c=d"),
        ("photos/a?b=c#d", "photos/a?b=c#d"),
    ],
)
def test_names_passwords_queries_and_fragments_are_hidden(text: str, shown: str) -> None:
    assert redact_url(text) == shown
    assert "SEC" not in shown
    assert redact_url(shown) == shown
    assert redact_url(shown + ": y") == shown + ": y"
    assert redact_url(shown + "; y, z") == shown + "; y, z"
    assert redact_setting(text) == shown


def test_what_is_said_about_a_url_stays_when_a_message_is_redacted_again() -> None:
    said = "no usable image on http://***@127.0.0.1:8765/s-000.tar?sig=*** p00.jpg: KeyError, http://h/x?t=***; why"
    assert redact_url(said) == said
    assert redact_url("http://me:SECRET:@h/x?t=SECRET:: y") == "http://***@h/x?t=***:: y"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("https://u:SEC RET@h/a.tar?sig=SEC RET", "https://***@h/a.tar?sig=***"),
        ("https://u:SEC\nRET@h/my photos/a.tar#SEC RET", "https://***@h/my photos/a.tar#***"),
        ("'https://u:SEC RET@h/a.tar'", "'https://***@h/a.tar'"),
        ("s3://u:SEC RET@h/a.tar", "s3://***@h/a.tar"),
        ("C:/my photos", "C:/my photos"),
    ],
)
def test_blanks_belong_to_a_setting_that_is_a_url(value: str, shown: str) -> None:
    assert redact_setting(value) == shown
    assert redact_setting(shown) == redact_url(shown) == shown


def test_trackers_note_down_a_command_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["train", "train_data_dir=https://u:SEC RET@h/a.tar?sig=SEC RET", "batch_size=2"]
    monkeypatch.setattr("sys.argv", given)
    with _public_command_line():
        assert sys.argv == ["train", "train_data_dir=https://***@h/a.tar?sig=***", "batch_size=2"]
    assert sys.argv == given
