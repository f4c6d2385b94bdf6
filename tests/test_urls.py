"""No part of a URL that may be secret is shown, wherever in a text it stands."""

import pytest

from featsharp.urls import redact_url


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
