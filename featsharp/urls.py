"""Redaction of URLs: the parts that hold passwords and tokens are not shown."""

import re

HIDDEN = "***"

# Quotes and the marks of a sentence belong to the URL unless something follows that would not: hiding too much is
# better than too little, but what a message says behind a URL has to stay.
_URL = re.compile(
    r"""(?P<scheme>[A-Za-z][\w+.-]*:/{1,2})"""
    r"""(?P<rest>(?:[^\s'":,;]|[:,;](?![:,;]*(?:\s|$))|['"](?![\s,;:|&)\]}]|$))+)"""
)
_WHOLE = re.compile(r"""(?P<scheme>['"]?[A-Za-z][\w+.-]+://)(?P<rest>.+)""", re.DOTALL)
# Up to the last @ before the path; behind a colon that starts no port, up to the last @ at all, as passwords may
# hold any of / ? #.
_USER = re.compile(r"^(?:[^/?#@]*:(?!\d+(?:[/?#]|$)).*@|[^/?#]*@)", re.DOTALL)
_VALUE = re.compile(r"([^=&;]+=)[^&;]*|[^&;]+")


def redact_url(text: str) -> str:
    """Redact the URLs in a text, for logs, messages and files that are passed on.

    Names, passwords, values of queries and fragments become ``***``; the names of the values stay. Text without URLs
    is returned as it is. What a command takes otherwise (``--token abc``) is not recognised.

    Example:
        >>> redact_url("pipe:curl -s 'https://me:pw@host/a.tar?token=abc&part=7' | cat")
        "pipe:curl -s 'https://***@host/a.tar?token=***&part=***' | cat"
    """
    return _URL.sub(lambda url: url["scheme"] + _redact(url["rest"]), text)


def redact_setting(value: str) -> str:
    """Redact the URLs in a value of the configuration.

    Where it is one URL as a whole, blanks belong to that; a reader of text, as :func:`redact_url` is, would stop there.
    """
    url = _WHOLE.fullmatch(value)
    return url["scheme"] + _redact(url["rest"]) if url else redact_url(value)


def _redact(rest: str) -> str:
    rest = _USER.sub(f"{HIDDEN}@", rest)
    rest, mark, _ = rest.partition("#")
    path, question, query = rest.partition("?")
    shown = _VALUE.sub(lambda value: (value[1] or "") + HIDDEN, query)
    return path + question + shown + (f"#{HIDDEN}" if mark else "")
