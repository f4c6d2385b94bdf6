"""What of URLs may be shown: not the parts that hold passwords and tokens."""

import re

HIDDEN = "***"

# A quote belongs to the URL unless something follows that would not: hiding too much is better than too little.
_URL = re.compile(r"""(?P<scheme>[A-Za-z][\w+.-]*:/{1,2})(?P<rest>(?:[^\s'"]|['"](?![\s,;:|&)\]}]|$))+)""")
# Up to the last @ before the path; behind a colon that starts no port, up to the last @ at all, as passwords may
# hold any of / ? #.
_USER = re.compile(r"^(?:[^/?#@]*:(?!\d+(?:[/?#]|$)).*@|[^/?#]*@)")
_VALUE = re.compile(r"([^=&;]+=)[^&;]*|[^&;]+")


def redact_url(text: str) -> str:
    """A text without the secrets of the URLs in it, for logs, messages and files that are passed on.

    Names, passwords, values of queries and fragments become ``***``; the names of the values stay. Text without URLs
    is returned as it is. What a command takes otherwise (``--token abc``) is not recognised.

    Example:
        >>> redact_url("pipe:curl -s 'https://me:pw@host/a.tar?token=abc&part=7' | cat")
        "pipe:curl -s 'https://***@host/a.tar?token=***&part=***' | cat"
    """
    return _URL.sub(lambda url: url["scheme"] + _redact(url["rest"]), text)


def _redact(rest: str) -> str:
    rest = _USER.sub(f"{HIDDEN}@", rest)
    rest, mark, _ = rest.partition("#")
    path, question, query = rest.partition("?")
    shown = _VALUE.sub(lambda value: (value[1] or "") + HIDDEN, query)
    return path + question + shown + (f"#{HIDDEN}" if mark else "")
