"""Queries, keys and values of timm's attention classes, which keep their projections in different ways."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from featsharp.backbones.blocks import captured
from featsharp.backbones.options import Facet
from featsharp.errors import ConfigError

Projection = tuple[Tensor, Tensor | None]  # weight [C, width], bias [C]


def projection(block: nn.Module, facet: Facet) -> Projection:
    """Weight and bias of the query, key or value projection in a block, views of the model's own.

    Raises:
        ConfigError: For a block without attention, or one that computes them in another way.
    """
    attention = getattr(block, "attn", None)
    letter, part = facet[0], ("query", "key", "value").index(facet)
    separate = getattr(attention, f"{letter}_proj", None)
    if isinstance(separate, nn.Linear):
        return separate.weight, separate.bias
    joint, out = getattr(attention, "qkv", None), getattr(attention, "proj", None)
    if not isinstance(joint, nn.Linear) or not isinstance(out, nn.Linear) or joint.out_features != 3 * out.in_features:
        raise ConfigError(f"{type(block).__name__} of timm has no linear {facet} projection; leave out facet={facet}")
    # EVA and BEiT keep the biases apart from the weight.
    bias = joint.bias.chunk(3)[part] if joint.bias is not None else getattr(attention, f"{letter}_bias", None)
    return joint.weight.chunk(3)[part], bias


def project(block: nn.Module, facet: Facet, tokens: Tensor) -> Tensor:
    """Tokens [..., width] as the attention of the block receives them to its queries, keys or values [..., C]."""
    weight, bias = projection(block, facet)
    return F.linear(tokens, weight, bias)


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within this context, the first argument of each of ``modules``, in the order in which they run in this thread."""
    with captured(modules, inputs=True) as inputs:
        yield inputs
