"""Speed and memory on this machine.

    featsharp bench ops                        operations and upsamplers, by every backend that runs here
    featsharp bench encode                     whole encoders beside the backbone passes that they need
    featsharp bench ops --json ops.json        the figures with machine and versions

Times are medians of interleaved runs with quartiles. Memory is what a call takes at its peak, its result included. Run
it while the machine does nothing else.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featsharp.cli.arguments import add_device, check_result
from featsharp.errors import ConfigError
from featsharp.files import write_file
from featsharp.terminal import say

if TYPE_CHECKING:
    import torch

UPSAMPLERS = ("identity", "bilinear", "tile", "featup", "jafar", "featsharp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("ops", "encode"))
    parser.add_argument(
        "--factors",
        type=float,
        nargs="+",
        help="upsampling factors, whole for ops; default: 2 4 16 for ops, 2 4 for encode",
    )
    parser.add_argument("--backbone", default="vits14-focus", help="name; for ops, whose passes are timed beside")
    parser.add_argument("--normalizer", default="phi-s", help="for encode")
    parser.add_argument(
        "--upsamplers", nargs="+", default=UPSAMPLERS, metavar="NAME", help="for encode: names, or module:function"
    )
    parser.add_argument("--repeat", type=int, default=15, help="most runs of a case; slow ones get fewer")
    parser.add_argument("--threads", type=int, help="CPU threads of PyTorch; default: its own choice")
    add_device(parser)
    parser.add_argument("--no-scaling", action="store_true", help="for ops: leave out the outputs of growing size")
    parser.add_argument(
        "--keep-freed-memory", action="store_true", help="set the C allocator as the other commands do: faster"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file too")


def run(arguments: argparse.Namespace) -> int:
    threads = 1 if arguments.threads is None else arguments.threads
    if arguments.repeat < 2 or min(arguments.factors or [1]) < 1 or threads < 1:
        raise ConfigError("--repeat must be at least 2, --factors and --threads at least 1")

    if arguments.json:
        check_result(arguments.json)

    import torch

    from featsharp.bench.measure import describe_machine
    from featsharp.device import find_device
    from featsharp.memory import keep_freed_memory

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = find_device(arguments.device)
    kept = arguments.keep_freed_memory and keep_freed_memory()
    torch.manual_seed(0)
    machine = describe_machine(device)
    say(", ".join(f"{key} {value}" for key, value in machine.items()))
    content: dict[str, Any] = {
        "command": f"featsharp {shlex.join(sys.argv[1:])}",
        "machine": machine,
        "keeps_freed_memory": kept,
    }
    if arguments.what == "ops":
        content["ops"] = _bench_ops(arguments, device)
        if not arguments.no_scaling:
            content["scaling"] = _bench_scaling(arguments, device)
    else:
        content["encode"] = _bench_encode(arguments, device)
    if arguments.json:
        write_file(arguments.json, json.dumps(content, indent=1).encode() + b"\n")
    return 0


def _bench_ops(arguments: argparse.Namespace, device: "torch.device") -> list[dict[str, Any]]:
    from featsharp.bench.ops import bench_ops

    say("16x16 features of 384 channels; rows appear when all are timed")
    say(f"{'':44} {'forward ms':>11} {'quartiles':>17} {'backward ms':>12} {'memory':>9}")
    rows = []
    for row in bench_ops(
        tuple(map(int, arguments.factors or (2, 4, 16))), device, repeat=arguments.repeat, backbone=arguments.backbone
    ):
        line = f"{row['name']:40} {row['factor']:2}x {row['forward']['median']:11.1f} {_quartiles(row['forward']):>17}"
        if "peak_bytes" in row:
            backward = f"{row['backward']['median']:.1f}" if "backward" in row else ""
            line += f" {backward:>12} {row['peak_bytes'] / 2**20:5.0f} MiB"
        say(line)
        rows.append(row)
    return rows


def _bench_scaling(arguments: argparse.Namespace, device: "torch.device") -> list[dict[str, Any]]:
    from featsharp.bench.ops import bench_scaling

    say(f"{'cost per output cell':44} {'microseconds':>12}")
    rows = []
    for row in bench_scaling(device, repeat=arguments.repeat):
        cost = 1000 * row["forward"]["median"] / row["side"] ** 2
        say(f"{row['name']:34} {row['side']:4}x{row['side']:<4} {cost:12.1f}")
        rows.append(row)
    return rows


def _bench_encode(arguments: argparse.Namespace, device: "torch.device") -> list[dict[str, Any]]:
    import torch

    from featsharp.bench.encode import bench_encode
    from featsharp.bench.workloads import describe_skipped

    rows, skipped = bench_encode(
        arguments.backbone,
        arguments.upsamplers,
        arguments.factors or (2, 4),
        device,
        repeat=arguments.repeat,
        normalizer=arguments.normalizer,
        autocast=(None, torch.bfloat16),
    )
    columns = f"{'encode ms':>10} {'quartiles':>17} {'passes':>6} {'alone ms':>9} {'ratio':>6} {'memory':>9}"
    say(f"{arguments.backbone:39} {columns}")
    for row in rows:
        encode, alone = row["encode"], row["backbone"]["median"]
        say(
            f"{row['upsampler']:14} {row['factor']:3g}x {row['dtype']:19} {encode['median']:10.0f} "
            f"{_quartiles(encode):>17} {row['passes']:6} {alone:9.0f} {encode['median'] / alone:6.3f} "
            f"{row['peak_bytes'] / 2**20:5.0f} MiB"
        )
    say(*describe_skipped(skipped))
    return rows


def _quartiles(timing: dict[str, float]) -> str:
    return f"{timing['low']:.1f} - {timing['high']:.1f}"
