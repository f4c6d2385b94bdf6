"""Measure the peak memory of a photograph of 3840 x 2160 pixels at 2x, under a limit of 2 GiB.

    python benchmarks/four_k.py --upsampler bilinear-2x views-2x?passes=5 vits14-focus/featsharp-2x

Each runs in a process of its own. The peak is that of the process's resident memory above what it has before the
picture is encoded (weights and libraries), without the result itself; the photograph is smooth noise of a fixed seed,
since memory does not depend on what is shown. Writes benchmarks/results/four-k-cpu.json; fails where a limit is not
kept.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from checkout import commit

from featsharp import load_from_file
from featsharp.bench.measure import describe_machine
from featsharp.files import write_file
from featsharp.memory import format_memory, parse_memory, process_bytes
from featsharp.ops.resize import resize

RESULTS = Path(__file__).resolve().parent / "results"
SIZE = (2160, 3840)


def main() -> int:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upsampler", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--backbone", default="vits14-focus")
    parser.add_argument("--limit", default="2GiB")
    parser.add_argument("--output", type=Path, default=RESULTS / "four-k-cpu.json", metavar="FILE")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.upsampler[0], arguments.backbone, arguments.limit)))
        return 0
    rows = []
    for name in arguments.upsampler:
        options = ["--one", "--upsampler", name, "--backbone", arguments.backbone, "--limit", arguments.limit]
        run = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
        rows.append(json.loads(run.stdout))
        print(f"{name:36} peak {format_memory(rows[-1]['peak'])}, {rows[-1]['seconds']:.0f} s")
    about = {"command": shlex.join(["python", "benchmarks/four_k.py", *sys.argv[1:]]), "commit": commit()}
    content = {**about, "machine": describe_machine(torch.device("cpu")), "size": SIZE, "rows": rows}
    write_file(arguments.output, (json.dumps(content, indent=1) + "\n").encode())
    return int(any(row["peak"] > parse_memory(arguments.limit) for row in rows))


@torch.inference_mode()
def measure(name: str, backbone: str, limit: str) -> dict[str, object]:
    """Encode the picture once by an upsampler: bytes and seconds."""
    own = name.startswith(f"{backbone}/")
    encoder = load_from_file(name, featurizer=None if own else backbone).eval()
    encoder.max_memory = limit
    noise = torch.rand(1, 3, 27, 48, generator=torch.Generator().manual_seed(0))
    picture = encoder.input_conditioner(resize(noise, SIZE))
    encoder(picture[..., :448, :448])  # what is loaded and started once
    # Linux resets the peak of a process that writes 5 here.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, start = process_bytes("VmRSS"), time.perf_counter()
    result = encoder(picture).high_res
    peak = process_bytes("VmHWM") - before - result.numel() * result.itemsize
    return {"upsampler": name, "shape": list(result.shape), "peak": peak, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    sys.exit(main())
