"""Protocols of a task: the full one, of the literature, and a quick one.

The quick protocols need a few minutes on two CPU cores for an encoder of one backbone pass, together with ``fidelity``,
``zoom`` and ``room``: the command ``featsharp eval all``. Numbers of different protocols are not comparable.
"""

import dataclasses
from typing import Any

from featsharp.errors import ConfigError, unknown_name
from featsharp.settings import setting

FULL, QUICK = PROTOCOLS = ("full", "quick")


def protocol_setting(quick: str) -> Any:
    """Make the setting ``protocol`` of a task; ``quick`` says in a few words how the quick one differs."""
    return setting(FULL, f"that of the literature, or a quick one: {quick}", choices=PROTOCOLS)


def check_protocol(task: Any, *fixed: str) -> None:
    """Raise ConfigError for an unknown protocol, and for settings that the quick one does not have but were changed.

    Args:
        task: With a field ``protocol``.
        *fixed: Names of its settings that belong to the full protocol alone.
    """
    if task.protocol not in PROTOCOLS:
        raise unknown_name("protocol", task.protocol, PROTOCOLS)
    changed = [f.name for f in dataclasses.fields(task) if f.name in fixed and getattr(task, f.name) != f.default]
    if task.protocol == QUICK and changed:
        flag = changed[0].replace("_", "-")
        raise ConfigError(f"--protocol quick has no --{flag}; leave it out, or take --protocol full")
