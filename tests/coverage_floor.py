"""Fail where a module of the package has less than a floor of its lines run by the tests: `make test` calls this."""

import json
import sys
from pathlib import Path

FLOOR = 60  # per cent


def modules_below(report: dict, floor: float = FLOOR) -> list[str]:
    """Modules of a coverage report (``coverage json``) with less than ``floor`` per cent of their lines run."""
    shares = {name: file["summary"]["percent_covered"] for name, file in report["files"].items()}
    return [f"{name}: {share:.1f} %" for name, share in sorted(shares.items()) if share < floor]


if __name__ == "__main__":
    low = modules_below(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    print(*low or [f"every module has at least {FLOOR} % of its lines run"], sep="\n")
    sys.exit(bool(low))
