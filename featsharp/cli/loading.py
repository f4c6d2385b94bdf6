"""The encoder that a command asks for."""

import argparse
from collections.abc import Sequence

from torch import Tensor

from featsharp.bench.choice import choose_upsampler
from featsharp.builder import load_from_file
from featsharp.cli.arguments import DEFAULT_BACKBONE
from featsharp.device import find_device
from featsharp.errors import ConfigError
from featsharp.model import SharpEncoder
from featsharp.terminal import say


def load_encoder(arguments: argparse.Namespace, command: str, *, max_memory: str | None = None) -> SharpEncoder:
    """Load the encoder of ``--checkpoint`` and ``--backbone``, onto ``--device``.

    Without a checkpoint it is the best that is known for the backbone at a cost of at most five passes, and said so.

    Args:
        arguments: With ``backbone``, ``checkpoint``, ``device`` and ``allow_functions``.
        command: For what is said.
        max_memory: As of :class:`SharpEncoder`.
    """
    backbone, checkpoint = arguments.backbone, arguments.checkpoint
    if checkpoint is None:
        backbone = backbone or DEFAULT_BACKBONE
        checkpoint = choose_upsampler(backbone)
        say(f"featsharp {command}: {backbone} with {checkpoint}; --help says how to get more", error=True)
    encoder = load_from_file(
        checkpoint, featurizer=backbone, max_memory=max_memory, allow_functions=arguments.allow_functions
    )
    return encoder.to(find_device(arguments.device))


def embed_texts(encoder: SharpEncoder, texts: Sequence[str]) -> Tensor:
    """Embed texts in the space of the encoder's denormalised features: [N, C].

    Raises:
        ConfigError: For a backbone without text, and an encoder whose features stay in normalised space.
    """
    from featsharp.backbones.open_clip_text import TextTower

    tower = TextTower(encoder.backbone)
    if not encoder.normalizer.invertible:
        raise ConfigError("this encoder's normalizer has no inverse, so its features are not in the space of text")
    return tower(texts)
