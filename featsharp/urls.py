"""URLs: distinguished from paths, and redacted, so that passwords and tokens are not shown."""

import re

HIDDEN = "***"

# Quotes and punctuation belong to the URL unless a blank or the like follows: hiding too much is better than too
# little, but the rest of a message behind a URL has to stay.
_URL = re.compile(
    r"""(?P<scheme>[A-Za-z][\w+.-]+:/{1,2})"""  # a single letter is a drive
    r"""(?P<rest>(?:[^\s'":,;]|[:,;](?![:,;]*(?:\s|$))|['"](?![\s,;:|&)\]}]|$))+)"""
)
_WHOLE = re.compile(r"""(?P<scheme>['"]?[A-Za-z][\w+.-]+://)(?P<rest>.+)""", re.DOTALL)
# Up to the last @ before the path; behind a colon that starts no port, up to the last @ at all, as passwords may
# have any of / ? #.
_USER = re.compile(r"^(?:[^/?#@]*:(?!\d+(?:[/?#]|$)).*@|[^/?#]*@)", re.DOTALL)
_VALUE = re.compile(r"([^=&;]+=)[^&;]*|[^&;]+")


def is_url(text: str) -> bool:
    """Return whether text is a URL of fsspec: ``scheme://...`` or a chain such as ``zip://*.jpg::photos.zip``."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]+(://|::)", text))  # C:\ is a drive


def redact_url(text: str) -> str:
    """Redact the URLs in a text, for logs, messages and files that are passed on.

    Names, passwords, values of queries and fragments become ``***``; the keys of queries stay. Text without URLs is
    returned as it is. Other secrets in a command (``--token abc``) are not recognised.

    Example:
        >>> redact_url("pipe:curl -s 'https://me:pw@host/a.tar?token=abc&part=7' | cat")
        "pipe:curl -s 'https://***@host/a.tar?token=***&part=***' | cat"
    """
    return _URL.sub(lambda url: url["scheme"] + _redact(url["rest"]), text)


def redact_setting(value: str) -> str:
    """Redact the URLs in a value of the configuration.

    Where the whole value is one URL, blanks belong to it; in text, :func:`redact_url` ends it there.
    """
    url = _WHOLE.fullmatch(value)
    return url["scheme"] + _redact(url["rest"]) if url else redact_url(value)


def _redact(rest: str) -> str:
    rest = _USER.sub(f"{HIDDEN}@", rest)
    rest, mark, _ = rest.partition("#")
    path, question, query = rest.partition("?")
    shown = _VALUE.sub(lambda value: (value[1] or "") + HIDDEN, query)
    return path + question + shown + (f"#{HIDDEN}" if mark else "")
