"""Measure extraction: pictures a second, and the share of the wall time that the backbone works, against a plain loop.

    python benchmarks/extract.py --data PHOTOS --count 500

The plain loop encodes one picture after the other with ``encode_image`` and saves each map with ``torch.save`` in
float16. Both are given the same files, read once before, and compute the same passes with as many threads. The share is
the time between the start and the end of the backbone's passes; as readers work beside them on the same cores, the
passes are also timed alone afterwards, in batches of the same sizes. Writes benchmarks/results/extract.json and
extract.md. Run it while the machine does nothing else.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkout import commit

from featsharp import SharpEncoder, create_encoder, load_from_file
from featsharp.bench.measure import describe_machine
from featsharp.extraction import extract
from featsharp.extraction.sources import open_pictures
from featsharp.files import write_file
from featsharp.memory import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
ENCODERS: dict[str, Callable[[], SharpEncoder]] = {
    "vits14-focus": lambda: create_encoder("vits14-focus", "identity", 1),
    "vits14-focus, bilinear 2x": lambda: create_encoder("vits14-focus", "bilinear", 2),
    "vits14-focus, featsharp 2x (linear)": lambda: load_from_file("vits14-focus/featsharp-2x"),
}


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=list(ENCODERS), metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS / "extract.json", metavar="FILE")
    arguments = parser.parse_args()
    keep_freed_memory()
    source, rows = commit(), []
    for name in arguments.encoders:
        encoder = ENCODERS[name]()
        with tempfile.TemporaryDirectory() as folder:
            photos = link_photos(Path(arguments.data), arguments.count, Path(folder) / "photos")
            encoder.encode_image(next(photos.iterdir()))
            how = {"batch": arguments.batch, "workers": arguments.workers, "progress": False}
            for kind, work in (
                ("plain loop", partial(loop, encoder, photos, Path(folder) / "loop")),
                ("extract", partial(extract, encoder, photos, Path(folder) / "store", **how)),
            ):
                rows.append({"encoder": name, "kind": kind, **measure(encoder, work, arguments.count)})
                print(json.dumps(rows[-1]), flush=True)
    content = {
        "command": f"python benchmarks/{Path(__file__).name} {shlex.join(sys.argv[1:])}",
        "commit": source,
        "machine": describe_machine(torch.device("cpu")),
        "rows": rows,
    }
    write_file(arguments.output, json.dumps(content, indent=1).encode())
    write_file(arguments.output.with_suffix(".md"), page(content).encode())
    print(page(content))


def link_photos(source: Path, count: int, folder: Path) -> Path:
    """Make a folder of links to the first ``count`` pictures, and read them once: none comes from a cold disk."""
    folder.mkdir()
    pictures = open_pictures(source)
    if len(pictures) < count:
        raise SystemExit(f"{source} has {len(pictures)} pictures; give a --count of at most so many")
    for index in range(count):
        photo = (source / pictures.key(index)).resolve()
        photo.read_bytes()
        (folder / f"{index:06d}{photo.suffix}").symlink_to(photo)
    return folder


def loop(encoder: SharpEncoder, photos: Path, output: Path) -> None:
    """Encode and save one picture after the other."""
    output.mkdir()
    for path in sorted(photos.iterdir()):
        torch.save(encoder.encode_image(path).high_res[0].half(), output / f"{path.name}.pt")


def measure(encoder: SharpEncoder, work: Callable[[], object], count: int) -> dict[str, Any]:
    """Run ``work``: pictures a second, and seconds in all, within the backbone, and of the same passes alone."""
    inside, started = 0.0, 0.0
    shapes: list[torch.Size] = []

    def enter(_: object, inputs: tuple[torch.Tensor]) -> None:
        nonlocal started
        shapes.append(inputs[0].shape)
        started = time.perf_counter()

    def leave(*_: object) -> None:
        nonlocal inside
        inside += time.perf_counter() - started

    hooks = [encoder.backbone.register_forward_pre_hook(enter), encoder.backbone.register_forward_hook(leave)]
    start = time.perf_counter()
    work()
    wall = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    start = time.perf_counter()
    with torch.no_grad():
        for shape in shapes:
            encoder.backbone(torch.randn(shape))
    alone = time.perf_counter() - start
    return {
        "pictures_per_second": count / wall,
        "backbone_share": inside / wall,
        "passes_alone_share": alone / wall,
        "seconds": wall,
        "passes": len(shapes),
    }


def page(content: dict[str, Any]) -> str:
    """The rows as a table in Markdown."""
    machine = content["machine"]
    lines = [
        "# Extraction against a plain loop",
        "",
        f"`{content['command']}`, commit {content['commit']}. {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, Python {machine['python']}, torch {machine['torch']}.",
        "",
        "| encoder | | pictures / s | of the time in the backbone | its passes alone, of the time | passes |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['encoder']} | {row['kind']} | {row['pictures_per_second']:.2f} | {row['backbone_share']:.1%} | "
        f"{row['passes_alone_share']:.1%} | {row['passes']} |"
        for row in content["rows"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
