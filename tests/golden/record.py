"""Write ``record.json``, the recorded outputs: ``python tests/golden/record.py [PATTERN]``, from the repository's root.

With a pattern ("upsampler/jafar*") only those cases are run again, and all others stay as they are. Record only where a
change of the numbers is meant, and say so in the commit: the difference of the file shows which cases it reached.
"""

import fnmatch
import hashlib
import importlib.metadata
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_cases import CASES, Values, run_case
from torch import Tensor

RECORD = Path(__file__).with_name("record.json")
SAMPLES = 48  # values that are kept of a tensor, evenly spaced
LIBRARIES = ("numpy", "open_clip_torch", "pillow", "timm", "torch", "torchvision", "transformers")


def summarise(value: Tensor | float | str) -> Any:
    """A number or text as it is; of a tensor its shape, mean, deviation, evenly spaced values and a hash of all."""
    if not isinstance(value, Tensor):
        return value
    array = value.detach().cpu().contiguous().numpy()
    flat = array.ravel()
    places = np.linspace(0, flat.size - 1, min(flat.size, SAMPLES)).round().astype(int)
    return {
        "shape": list(array.shape),
        "mean": _short(flat.mean(dtype=np.float64)) if flat.size else 0.0,
        "std": _short(flat.std(dtype=np.float64)) if flat.size else 0.0,
        "sha256": hashlib.sha256(array.tobytes()).hexdigest()[:16],
        "values": [_short(v) for v in flat[places]],
    }


def summarise_all(values: Values) -> dict[str, Any]:
    return {name: summarise(value) for name, value in values.items()}


def describe_machine() -> dict[str, Any]:
    """What the last bits depend on."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Name and generation: some virtual machines have the same name for several."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    return ", ".join(facts[key] for key in ("model name", "cpu family", "model", "stepping") if key in facts)


def _short(value: Any) -> float:
    """Eight digits, more than float32 has."""
    return float(f"{float(value):.8g}")


def main(pattern: str = "*") -> None:
    chosen = [name for name in CASES if fnmatch.fnmatch(name, pattern)]
    record = {"machine": describe_machine(), "cases": {}}
    if pattern != "*":
        record = json.loads(RECORD.read_text())
        if record["machine"] != describe_machine():
            sys.exit("the record is of another machine or of other libraries; record all cases")
        record["cases"] = {name: case for name, case in record["cases"].items() if name in CASES}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            record["cases"][name] = summarise_all(run_case(name, Path(folder)))
    lines = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(key)}: {json.dumps(v)}" for key, v in record["cases"][name].items())
        + "\n  }"
        for name in sorted(record["cases"])
    )
    RECORD.write_text(f'{{\n "machine": {json.dumps(record["machine"])},\n "cases": {{\n{lines}\n }}\n}}\n')
    print(f"{len(chosen)} of {len(CASES)} cases recorded, {RECORD.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
