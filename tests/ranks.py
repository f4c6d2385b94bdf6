"""Commands that run several processes, which gloo may end."""

import re
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path


def is_abort_of_gloo(log: str) -> bool:
    """Whether a thread of gloo ended its process (counted by benchmarks/two_processes.py)."""
    return "SIGABRT" in log and re.search(r"terminate called after throwing an instance of 'gloo::", log) is not None


def run_ranks(
    command: Sequence[str], written: Path, *, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a command; after an abort of gloo, without what it has ``written``, once more."""
    for last in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=200, check=False)
        if last or not is_abort_of_gloo(done.stderr):
            break
        warnings.warn(f"gloo ended a process (pytorch issue 188266), tried again:\n{done.stderr}", stacklevel=2)
        shutil.rmtree(written, ignore_errors=True)
    return done
