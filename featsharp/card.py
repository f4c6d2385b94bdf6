"""Model cards of sharp encoders: the header that the Hub reads, what is known of model and training, and given text."""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from featsharp.model import SharpEncoder

# Marks a card as made here, which the next one may replace.
MADE = "<!-- Made by featsharp, which replaces this text when it saves here again; without this line it stays. -->"
# Keys of a run's configuration that a card shows. Folders and names of runs stay private.
SHOWN = ("num_training_steps", "batch_size", "accumulation_steps", "seed", "spectral", "objective", "optim")
USE = """```python
import featsharp

encoder = featsharp.SharpEncoder.from_pretrained("OWNER/NAME")
out = encoder.encode_image("photo.jpg")
```"""


def write_card(
    encoder: SharpEncoder, training: Mapping[str, Any], sections: Mapping[str, str], *, licence: str | None
) -> str:
    """Write a model card in Markdown.

    Args:
        encoder: Built from names.
        training: From its file: ``config`` and ``step`` of the run, or ``card``, the text of another card.
        sections: Headings and texts to add.
        licence: SPDX identifier; None: the card says that none is stated.
    """
    header = ["---", "library_name: featsharp", "pipeline_tag: image-feature-extraction"]
    header += [f"license: {licence.lower()}"] if licence else []
    header += ["tags:", "- feature-upsampling", "---"]
    rows = [f"| {name} | {_cell(text)} |" for name, text in _facts(encoder, training).items() if text]
    body = [MADE, "", f"# {encoder.caption} for {encoder.backbone.name}", "", "| | |", "|---|---|", *rows]
    texts = {"Use": USE}
    if "card" in training:
        texts["Training"] = training["card"]
    if shown := {key: value for key, value in training.get("config", {}).items() if key in SHOWN}:
        texts["Configuration"] = f"```json\n{json.dumps(shown, indent=2, sort_keys=True, default=str)}\n```"
    texts |= sections
    texts["Licence"] = licence or "Not stated by those who made these weights."
    for heading, text in texts.items():
        body += ["", f"## {heading}", "", text.strip()]
    return "\n".join([*header, "", *body, ""])


def _facts(encoder: SharpEncoder, training: Mapping[str, Any]) -> dict[str, str]:
    """Collect the rows of the table; "" where something is not known."""
    recipe, step = encoder.recipe, training.get("step")
    name = f"{recipe['upsampler']}-{encoder.factor:g}x"
    options = ", ".join(f"{key}={value}" for key, value in recipe["options"].items())
    config = training.get("config", {})
    given = config.get("train_data_dir") or []
    data = " ".join(PurePath(str(place)).name for place in ([given] if isinstance(given, str) else given))
    command = f"featsharp train +model={encoder.backbone.name} +upsampler={name} train_data_dir={data}"
    command += "".join(f" {key}={config[key]}" for key in ("num_training_steps", "batch_size", "seed") if key in config)
    return {
        "backbone": f"{encoder.backbone.name}; its weights are not in this repository, their hash is",
        "features": f"{encoder.embed_dim} channels, patches of {encoder.patch_size} pixels",
        "upsampler": name + (f" ({options})" if options else ""),
        "normalizer": recipe["normalizer"],
        "parameters": f"{sum(p.numel() for p in encoder.upsampler.parameters()):,}, in half precision",
        "training data": data,
        "steps": "" if step is None else f"{step:,}",
        "command, from its configuration": f"`{command}`" if data else "",
    }


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
