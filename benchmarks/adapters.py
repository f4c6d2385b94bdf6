"""Time that the adapters of backbones add to the forward pass of the bare model.

    python benchmarks/adapters.py --output benchmarks/results/adapters-cpu.json

Real classes of the libraries with random weights; both calls alternate, and the figure is the median over rounds of
their quotient. The bare call is what a user of the library would write for the same features.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone
from featsharp.bench.measure import describe_machine

Call = Callable[[Tensor], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, backbone, bare in cases(Path(folder)):
            images = torch.randn(1, 3, *backbone.input_size)
            share, milliseconds = compare(backbone, bare, images, arguments.rounds)
            rows.append({"model": name, "bare_milliseconds": milliseconds, "added_percent": 100 * (share - 1)})
            print(f"{name:44} {milliseconds:7.1f} ms {100 * (share - 1):+6.2f} %", flush=True)
    content = {
        "command": f"python benchmarks/adapters.py {' '.join(sys.argv[1:])}",
        "machine": describe_machine(torch.device("cpu")),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


def cases(folder: Path) -> Iterator[tuple[str, Backbone, Call]]:
    """Name, backbone and bare call of each family."""
    for model in ("vit_small_patch16_224", "vit_small_patch14_reg4_dinov2", "convnext_tiny", "resnet50"):
        size = "&img_size=224" if model.startswith("vit") else ""
        timm_backbone = create_backbone(f"timm:{model}?pretrained=false{size}")
        module = timm_backbone.model
        yield f"timm:{model}", timm_backbone, getattr(module, "forward_features", module)
    import transformers

    small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12}
    for kind, config in (
        ("Dinov2Model", transformers.Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=224)),
        ("SiglipVisionModel", transformers.SiglipVisionConfig(**small, image_size=224, patch_size=16)),
        ("CLIPVisionModel", transformers.CLIPVisionConfig(**small, image_size=224, patch_size=16)),
    ):
        model_folder = folder / kind
        getattr(transformers, kind)(config).save_pretrained(model_folder)
        (model_folder / "preprocessor_config.json").write_text(
            json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 224, "width": 224}})
        )
        bare = getattr(transformers, kind).from_pretrained(model_folder).eval()
        backbone = create_backbone(f"hf:{model_folder}")
        yield f"hf:{kind}", backbone, bare
    import open_clip

    for model in ("ViT-S-16", "RN50"):
        visual = open_clip.create_model(model).visual.eval()
        yield f"open_clip:{model}", create_backbone(f"open_clip:{model}?pretrained=false"), visual


def compare(backbone: Call, bare: Call, images: Tensor, rounds: int) -> tuple[float, float]:
    """Median quotient of the two times, and median milliseconds of the bare call."""
    quotients, bare_times = [], []
    for number in range(rounds + 2):
        order = (backbone, bare) if number % 2 else (bare, backbone)
        seconds = {}
        for call in order:
            start = time.perf_counter()
            call(images)
            seconds[call] = time.perf_counter() - start
        if number >= 2:  # the first rounds warm up
            quotients.append(seconds[backbone] / seconds[bare])
            bare_times.append(1000 * seconds[bare])
    return statistics.median(quotients), statistics.median(bare_times)


if __name__ == "__main__":
    main()
