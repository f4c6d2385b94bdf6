"""Bytes of shards from servers and from commands."""

import base64
import logging
import os
import selectors
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse, InvalidURL
from typing import IO, NamedTuple

from featsharp.data.entries import PIPE
from featsharp.urls import redact_url

logger = logging.getLogger(__name__)

# Not webdataset's gopen, which waits for a command's child processes instead of ending them, nor fsspec, whose log
# lines and errors show passwords and tokens (docs/experiments.md, "Libraries for shards").

_running: set[tuple[int, subprocess.Popen[bytes]]] = set()  # commands, by the process that started them
_ASK_AGAIN = {408, 425, 429}  # statuses below 500 of servers that may answer later


class FetchConfig(NamedTuple):
    """Attempts and waits for a shard, before the rest of it is given up."""

    attempts: int = 4
    backoff: float = 1.0  # seconds before the second attempt; twice as many before each further one
    timeout: float = 60.0  # seconds without a byte from a server; for a command this is only logged


def is_temporary(error: Exception) -> bool:
    """Return whether another attempt to fetch may help."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in _ASK_AGAIN
    return not isinstance(error, (InvalidURL, ValueError))


@contextmanager
def open_address(address: str, timeout: float) -> Iterator[IO[bytes]]:
    """Open an address or start a command, as a file that can be read once; OSError where that fails."""
    if address.startswith(PIPE):
        with _run(address.removeprefix(PIPE), timeout) as output:
            yield output
        return
    # The address is http or https; redirections cannot lead to files.
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl(), headers={"User-Agent": "featsharp"})
    if at:
        token = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")  # for this host alone
    with urllib.request.urlopen(request, timeout=timeout) as response:
        yield _Whole(response)  # type: ignore[misc]


def describe_error(error: BaseException) -> str:
    """Describe an error of fetching without secrets."""
    if isinstance(error, (InvalidURL, ValueError)):
        return "the address is not valid"  # the error's text would show parts of it
    return redact_url(" ".join(str(error).split())) or type(error).__name__


@contextmanager
def _run(command: str, timeout: float) -> Iterator[IO[bytes]]:
    """Open the output of a shell command; OSError when it fails.

    At the end the command and its child processes are ended by SIGKILL, as they may ignore SIGTERM, for example where
    they inherited that from the parent of the training process.
    """
    process = subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    running = (os.getpid(), process)
    _running.add(running)
    try:
        _wait_for_output(process.stdout, command, timeout)
        yield process.stdout
        while process.stdout.read(1 << 20):  # bytes after the end mark; a writer that is cut off would fail
            pass
        if process.wait():
            raise OSError(f"the command ended with status {process.returncode}")
    finally:
        process.stdout.close()
        _end(process)
        _running.discard(running)


def _wait_for_output(output: IO[bytes], command: str, interval: float) -> None:
    """Wait for the first bytes or the end, without limit (a command may have to wait for a tape), and log that."""
    if os.name == "nt":  # where only sockets can be waited for; reading waits, too
        return
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while not selector.select(interval):
            logger.info("%s%s: still waiting for the first bytes", PIPE, redact_url(command))


def end_commands() -> None:
    """End all commands of this process, which they would outlive."""
    for owner, process in list(_running):
        if owner == os.getpid():  # others were inherited
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    # After the command has ended, its group is gone, or macOS does not permit signals to it.
    with suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:  # Windows has no groups: child processes end when they find the pipe closed
            process.kill()
    process.wait()


class _Whole:
    """A response that must not end before its announced length: that is a lost connection, not the end of the tar."""

    def __init__(self, response: HTTPResponse) -> None:
        self._response = response

    def read(self, size: int) -> bytes:
        data = self._response.read(size)
        if not data and self._response.length:
            raise OSError(f"connection lost {self._response.length} bytes before the end")
        return data
