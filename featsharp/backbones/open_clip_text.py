"""Text beside the features of an open_clip backbone: embeddings in the space of its projected features.

With ``project=true`` a CLIP-type backbone gives features that can be compared with its text by cosine ("Extract Free
Dense Labels from CLIP", MaskCLIP, arXiv 2112.01071).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from featsharp.backbones import resolve_backbone
from featsharp.backbones.base import Backbone
from featsharp.backbones.from_open_clip import DIRECTORY, INSTALL_OPEN_CLIP, download_file, find_source
from featsharp.backbones.loading import import_optional, seeded_weights
from featsharp.backbones.options import Options
from featsharp.errors import ConfigError, InputError, MissingDependencyError, first_line
from featsharp.names import parse_backbone


def project_to_text(backbone: str) -> str:
    """Add ``project=true``, features in the space of text, to the name of an open_clip backbone without that option."""
    name = resolve_backbone(backbone)
    if name.prefix != "open_clip" or "project" in name.options:
        return backbone
    return str(name.with_options(project=True))


class TextTower:
    """The text tower that belongs to a backbone.

    Args:
        backbone: Of open_clip, created by name with ``project=true``.

    Raises:
        ConfigError: For a backbone of another library or without projected features.
        MissingDependencyError: Where its tokenizer or weights are not here and cannot be fetched.
    """

    def __init__(self, backbone: Backbone) -> None:
        name = parse_backbone(backbone.name)
        options = getattr(backbone, "options", None)
        if name.prefix != "open_clip" or not isinstance(options, Options):
            raise ConfigError(
                f"text needs a backbone of open_clip, which was trained with text, such as "
                f"open_clip:ViT-B-16/openai?project=true; {backbone.name!r} is none"
            )
        if not options.project:
            raise ConfigError(
                f"features of {backbone.name!r} are not in the space of its text; use "
                f"{str(name.with_options(project=True))!r}"
            )
        open_clip = import_optional("open_clip", f"the text of {backbone.name!r}", INSTALL_OPEN_CLIP)
        spec = name.model.partition(":")[2]
        source = find_source(open_clip, backbone.name, spec, options)
        local = source.place not in ("open_clip",) and not spec.startswith(("hf-hub:", DIRECTORY))
        model_name = f"{DIRECTORY}{spec}" if local else spec if ":" in spec else spec.partition("/")[0]
        try:
            self._tokenize = open_clip.get_tokenizer(model_name)
        except Exception as error:  # of many libraries, which fetch files
            raise MissingDependencyError(
                f"the tokenizer of {backbone.name!r} cannot be loaded ({first_line(error)}); with a network, run once: "
                f"python -c \"import open_clip; open_clip.get_tokenizer('{model_name}')\""
            ) from error
        with seeded_weights():
            self._model: Any = open_clip.create_model(
                model_name,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=bool((source.tag or {}).get("quick_gelu", False)),
            )
        if options.pretrained:
            weights = source.weights or download_file(open_clip, backbone.name, spec, tag=source.tag)
            open_clip.load_checkpoint(self._model, str(weights))
        self._model.visual = None
        self._model.eval()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embed texts: [N, C], of length 1, float32 on the CPU; InputError for an empty one."""
        if not texts or not all(text.strip() for text in texts):
            raise InputError("a text to look for is empty; describe it, for example 'a photo of a dog'")
        return F.normalize(self._model.encode_text(self._tokenize(list(texts))).float(), dim=-1)
