"""Features of many pictures in files, with random access: a data set's features by one command.

    featsharp extract photos/ -o features --backbone dinov2-s
    featsharp extract photos/ -o features --backbone vits14-focus --upsampler vits14-focus/featsharp-2x --batch 16
    featsharp extract clip.mp4 -o features --backbone dinov2-s --upsampler bilinear-2x --pca 64 --every 5
    torchrun --nproc-per-node 8 -m featsharp extract s3://BUCKET/photos -o features --backbone dinov2-l

SOURCE is a picture, a folder, a .tar, a list (.txt, one path or URL a line), a pattern ('photos/**/*.jpg'), a video,
or a URL of fsspec. The same command goes on with what is missing after an interruption, with the result that it would
have had; pictures that cannot be read are skipped and listed. In Python:

    store = featsharp.extraction.open("features")
    store["a.jpg"]           # [C, h, w], memory-mapped; store.skipped, store.options, store.dataset()
"""

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from featsharp.cli.arguments import CHECKPOINT_ENDINGS, add_backbone, add_device, parse_count, parse_size
from featsharp.errors import ConfigError, DataError
from featsharp.terminal import say
from featsharp.urls import is_url

if TYPE_CHECKING:
    from featsharp.extraction import FeatureStore
    from featsharp.model import SharpEncoder

# Those of extraction/sinks.py and mapped.py, which need torch.
FORMATS = ("safetensors", "npy", "zarr", "webdataset")
DTYPES = ("float16", "bfloat16", "float32")
SHOWN = 10  # skipped pictures that are listed at the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="pictures, see above")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder of the store")
    parser.add_argument(
        "--upsampler",
        metavar="NAME",
        help="an upsampler that needs no training (bilinear-2x, tile), shipped weights or a checkpoint; "
        "default: the backbone's own map",
    )
    add_backbone(parser)
    parser.add_argument("--factor", type=float, metavar="X", help="of the upsampler, in place of -2x in its name")
    parser.add_argument("--output-size", type=parse_size, metavar="HxW", help="cells of the map, whatever the picture")
    parser.add_argument("--size", type=parse_size, metavar="HxW", help="scale pictures to this many pixels first")
    parser.add_argument("--layer", type=int, metavar="N", help="of the backbone, negative from its end")
    parser.add_argument("--format", default="safetensors", choices=FORMATS, help="of the store (%(default)s)")
    parser.add_argument("--dtype", default="float16", choices=DTYPES, help="of stored numbers (%(default)s)")
    parser.add_argument("--normalized", action="store_true", help="features in PHI-S space, of unit variance")
    parser.add_argument(
        "--summary", action="store_true", help="store the backbone's summary (CLS or pooled token), too"
    )
    parser.add_argument("--pool", choices=("mean", "max"), help="one vector a picture in place of a map")
    parser.add_argument("--pca", type=parse_count, metavar="N", help="reduce to N principal components, after --pool")
    parser.add_argument("--every", type=parse_count, default=1, metavar="N", help="every N-th picture or frame only")
    parser.add_argument("--limit", type=parse_count, metavar="N", help="the first N of these only")
    parser.add_argument(
        "--shard-size", type=parse_count, metavar="N", help="pictures that are written as one (about 128 MiB of them)"
    )
    parser.add_argument("--batch", type=parse_count, default=8, metavar="N", help="pictures per pass (%(default)s)")
    parser.add_argument("--workers", type=parse_count, default=2, metavar="N", help="threads that read (%(default)s)")
    parser.add_argument(
        "--ranks",
        type=parse_count,
        metavar="N",
        help="share the work among N processes here; under torchrun or Slurm it is shared by itself",
    )
    parser.add_argument(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="ray: a Ray cluster (this machine where there is none) with --ranks actors",
    )
    parser.add_argument("--gpus", type=float, default=0, metavar="X", help="GPUs of an actor of Ray, fractions too")
    parser.add_argument(
        "--autocast",
        default="float32",
        help="type of the backbone's products: float32 (default), bfloat16, float16, auto (bfloat16 where native)",
    )
    parser.add_argument("--max-memory", metavar="AMOUNT", help="such as 2GiB; see the documentation")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    rank, ranks, local = _find_rank()
    if arguments.ranks and ranks == 1 and arguments.engine == "local":
        return _start_ranks(arguments)
    if not (arguments.backbone or arguments.upsampler):
        raise ConfigError("nothing to extract with; give --backbone NAME, for example dinov2-s or vits14-focus")
    if arguments.engine == "ray" and arguments.autocast == "auto":
        raise ConfigError(
            "--autocast auto may be another type on each machine of a cluster; give bfloat16, float16 or float32"
        )
    if arguments.engine == "ray" and arguments.device != "auto":
        raise ConfigError("--device is for --engine local; --gpus X gives each actor of Ray GPUs, without it the CPU")
    source = arguments.source
    if not source or not (is_url(source) or set("*?[{") & set(source) or Path(source).exists()):
        raise DataError(
            f"{source!r} does not exist; give a picture, a folder, a list, a pattern, a tar, a video or a URL"
        )
    import torch

    from featsharp.extraction import Options, extract
    from featsharp.memory import keep_freed_memory

    keep_freed_memory()
    options = Options(
        format=arguments.format,
        dtype=getattr(torch, arguments.dtype),
        size=arguments.size,
        output_size=arguments.output_size,
        normalized=arguments.normalized,
        summary=arguments.summary,
        pool=arguments.pool,
        pca=arguments.pca,
        every=arguments.every,
        limit=arguments.limit,
        shard_size=arguments.shard_size,
    )
    how = {"batch": arguments.batch, "workers": arguments.workers}
    if arguments.engine == "ray":
        from featsharp.extraction.ray_engine import extract_with_ray

        build = functools.partial(_load_encoder, arguments)
        actors = arguments.ranks or 1
        store = extract_with_ray(build, source, arguments.output, options, actors=actors, gpus=arguments.gpus, **how)
    else:
        encoder = _load_encoder(arguments, arguments.device, local)
        store = extract(encoder, source, arguments.output, options, rank=rank, ranks=ranks, **how)
    if rank or (arguments.ranks and ranks > 1):  # whoever started the ranks sees more of the store at their end
        return 0
    return _report(store)


def _load_encoder(arguments: argparse.Namespace, device: str, local_rank: int = 0) -> "SharpEncoder":
    """Load the encoder that --backbone, --upsampler, --factor and --layer name to a device."""
    from featsharp.backbones import create_backbone
    from featsharp.builder import load_from_file
    from featsharp.device import autocast_dtype, find_device
    from featsharp.names import parse_upsampler
    from featsharp.upsamplers import UPSAMPLERS

    place = find_device(device, local_rank)
    name, backbone = arguments.upsampler or "identity", arguments.backbone
    if arguments.factor is not None:
        if parse_upsampler(name, UPSAMPLERS)[1] is not None or name.endswith(CHECKPOINT_ENDINGS):
            raise ConfigError(f"--factor and the factor of {name!r} cannot both be given; leave one out")
        name = f"{name}-{arguments.factor:g}x"
    if arguments.layer is not None:
        if backbone is None:
            raise ConfigError("--layer needs --backbone, the name of the backbone whose layer it is")
        backbone = create_backbone(backbone, layer=arguments.layer)
    encoder = load_from_file(
        name, featurizer=backbone, max_memory=arguments.max_memory, allow_functions=arguments.allow_functions
    ).to(place)
    encoder.backbone.autocast_dtype = autocast_dtype(arguments.autocast, place) or encoder.backbone.autocast_dtype
    return encoder


def _report(store: "FeatureStore") -> int:
    """Say what a store has and lacks; returns the exit status."""
    skipped = store.skipped
    so_far = "" if store.complete else " so far"
    say(f"{store.path}  {len(store)} of {store.total} pictures{so_far}, {len(skipped)} skipped")
    for name, reason in skipped[:SHOWN]:
        say(f"  {name}: {reason}")
    if len(skipped) > SHOWN:
        say(f"  ... and {len(skipped) - SHOWN} more: featsharp.extraction.open(DIR).skipped")
    return 0 if len(store) or not store.complete else 1


def _find_rank() -> tuple[int, int, int]:
    """Return the rank of this process, their number, and its rank on this machine, as torchrun or srun say them."""
    # SLURM_NTASKS stands in batch scripts, too, whose commands are no task among others.
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        rank, ranks, local = (os.environ.get(name, "") for name in names)
        if rank.isdigit() and ranks.isdigit():
            return int(rank), int(ranks), int(local or 0)
    return 0, 1, 0


def _start_ranks(arguments: argparse.Namespace) -> int:
    """Run this command in several processes that share its work; returns the worst of their exit statuses."""
    count, output = arguments.ranks, Path(arguments.output)
    if (output / "store.json").exists():
        from featsharp.extraction.sinks import remove_unfinished

        remove_unfinished(output, arguments.format)  # before any of them writes
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    command = [sys.executable, "-m", "featsharp", *arguments.argv]
    processes = [
        subprocess.Popen(
            command,
            env=threads | os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
        )
        for rank in range(count)
    ]
    status = max(abs(process.wait()) for process in processes)
    if status:
        return status
    from featsharp.extraction import FeatureStore

    return _report(FeatureStore(output))
