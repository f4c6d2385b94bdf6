"""The outside of the training commands: arguments, messages and exit status."""

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from featsharp.errors import explain
from featsharp.terminal import parse_verbosity, say, set_up_terminal
from featsharp.urls import redact_url


def run_command(
    name: str,
    description: str,
    compose: Callable[[Sequence[str]], Any],
    train: Callable[[Any], object],
    arguments: Sequence[str] | None = None,
) -> int:
    """Compose the configuration and train; returns the exit status: 1 for an error, 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        name: Of the command, for messages.
        description: Printed without arguments, and for -h.
        compose: From overrides to a configuration.
        train: Runs it.
        arguments: None: those of the process.
    """
    verbosity, arguments = parse_verbosity(sys.argv[1:] if arguments is None else arguments)
    set_up_terminal(verbosity, usual=logging.INFO)
    if not arguments or arguments[0] in ("-h", "--help"):
        say(*description.splitlines())
        return 0
    from featsharp.memory import keep_freed_memory
    from featsharp.training.config import to_yaml
    from featsharp.training.distributed import name_process, stop_world
    from featsharp.training.signals import Terminated

    keep_freed_memory()
    try:
        config = compose(arguments)
        if config.dry_run:
            say(*to_yaml(config).splitlines())
            return 0
        train(config)
    except KeyboardInterrupt:
        say(f"featsharp {name}: stopped; the same command goes on from the last checkpoint", error=True)
        return 130
    except Terminated as stop:
        stop_world()
        say(f"featsharp {name}: {name_process()}{stop}; the same command goes on from there", error=True)
        return 128 + signal.SIGTERM
    except Exception as error:
        if (reason := explain(error)) is None:
            raise
        say(f"featsharp {name}: {name_process()}{redact_url(reason)}", error=True)
        return 1
    stop_world()
    return 0
