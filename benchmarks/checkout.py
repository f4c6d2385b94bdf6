"""The commit that a result was measured at."""

import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


def commit(checkout: Path = HERE) -> str:
    """The commit of a checkout, with "-dirty" for changes; unknown in a copy of one, or without git."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
