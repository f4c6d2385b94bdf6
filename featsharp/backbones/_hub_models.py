"""Modules of torch.hub repositories as backbones: DINO, DINOv2, DINOv3 and RADIO.

Shapes:
    tokens [B, P + h * w, C]: P prefix tokens (class token first, then registers), then patches row by row.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.backbones._probing import MIN_PROBE_GRID, Probe, check_grid_order
from featsharp.backbones.base import IMAGENET_MEAN, IMAGENET_STD, Backbone, BackboneOutput, embeds_patches
from featsharp.backbones.loading import first_line
from featsharp.backbones.options import Options
from featsharp.backbones.tokens import FACETS, TokenBackbone
from featsharp.errors import ConfigError
from featsharp.ops.resize import size_of


def is_dino(model: nn.Module) -> bool:
    """Tell whether a module has the methods of DINO, DINOv2 and DINOv3, which timm's transformers share in part."""
    prepares = hasattr(model, "prepare_tokens") or hasattr(model, "prepare_tokens_with_masks")
    return prepares and hasattr(model, "get_intermediate_layers") and hasattr(model, "blocks")


def is_radio(model: nn.Module) -> bool:
    """Tell whether a module brings its whitening as RADIO does."""
    return callable(getattr(model, "make_preprocessor_external", None)) and hasattr(model, "patch_size")


class DinoBackbone(TokenBackbone):
    """A transformer with the methods of DINO or DINOv2; features are patch tokens after the final norm.

    The two differ in what they return: DINOv2 (and DINOv3, which kept the methods) gives ``forward_features`` as a
    mapping with ``x_norm_patchtokens`` and ``x_norm_clstoken``; DINO gives ``get_intermediate_layers(x, n)`` as all
    tokens of the last n blocks. Both norm what they return, and resample positions at other sizes by themselves.

    The summary is the final class token. Facets are the output of the packed projection ``blocks[i].attn.qkv``.

    Args:
        name: A label.
        model: The module.
        choices: Layers, facet and summary.
        input_size: (h, w) in pixels; None: that of its ``patch_embed``.
        mean, std: Whitening, which these modules do not know; None: ImageNet's, with which they were trained.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        choices: Options,
        *,
        input_size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        vit: Any = model
        patch_size = _both(vit.patch_embed.patch_size)
        if patch_size[0] != patch_size[1]:
            raise ConfigError(f"backbone {name!r} has {patch_size[0]}x{patch_size[1]} patches; only square ones work")
        width = vit.embed_dim
        super().__init__(
            name,
            model,
            choices,
            _flat(vit.blocks),
            width=width,
            summaries={"cls": width},
            patch_size=patch_size[0],
            input_size=input_size or _whole(_both(vit.patch_embed.img_size), patch_size[0]),
            mean=tuple(mean or IMAGENET_MEAN),
            std=tuple(std or IMAGENET_STD),
        )
        self.gives_mapping = hasattr(model, "prepare_tokens_with_masks")
        self.embeds_patches = embeds_patches(getattr(vit.patch_embed, "proj", None), patch_size[0])
        _self_test(self)

    def run(self, images: Tensor) -> tuple[Tensor, Any]:
        if self.gives_mapping:
            named = self.model.forward_features(images)
            return named["x_norm_patchtokens"], named["x_norm_clstoken"]
        tokens = self.model.get_intermediate_layers(images, 1)[0]
        return tokens, tokens[:, 0]

    def norm(self, tokens: Tensor) -> Tensor:
        return self.model.norm(tokens)

    def source(self, block: Any) -> nn.Module:
        packed = getattr(getattr(block, "attn", None), "qkv", None)
        if packed is None:
            raise ConfigError(
                f"the blocks of backbone {self.name!r} have no attn.qkv, from which a facet could be taken"
            )
        return packed

    def facet_width(self, block: Any) -> int:
        return self.model.embed_dim

    def take(self, block: Any, tensor: Any, grid: tuple[int, int]) -> Tensor:
        tokens = tensor[0] if isinstance(tensor, list) else tensor  # DINOv3 hands on lists of one
        return tokens if self.options.facet == "token" else tokens.chunk(3, -1)[FACETS.index(self.options.facet)]

    def summarise(self, kind: str, tokens: Tensor, output: Any, num_patches: int) -> Tensor:
        return output


class RadioBackbone(Backbone):
    """A module with the interface of NVIDIA's RADIO: images in [0, 1] to (summary, spatial features).

    Its conditioner is taken out with ``make_preprocessor_external()`` and becomes ``mean`` and ``std``. It skips class
    and register tokens by itself, and at other sizes, non-square ones too, crops its position table (CPE). Sizes are
    multiples of ``min_resolution_step`` up to ``max_resolution``; ``preferred_resolution`` is the native one.

    With ``adaptor_names`` it returns a mapping, of which the features and summaries of the named adaptors are taken,
    concatenated on the channel axis.

    Args:
        name: A label.
        model: The module.
        choices: The summary ("default", the model's own; "mean" or "none").
        adaptor_names: As given to its entry.
        input_size: (h, w) in pixels; None: its preferred resolution.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        choices: Options,
        *,
        adaptor_names: Sequence[str] = (),
        input_size: tuple[int, int] | None = None,
    ) -> None:
        radio: Any = model
        if choices.layer is not None or choices.facet != "token":
            raise ConfigError(
                f"backbone {name!r} shows its final features only; leave out layer and facet, or take a RADIO model of "
                f"timm (timm.list_models('*radio*'))"
            )
        _check_summary(name, choices, ("default", "mean", "none"))
        mean, std = _whitening_of(name, radio.make_preprocessor_external())
        patch_size = _both(radio.patch_size)[0]
        step = getattr(radio, "min_resolution_step", None) or patch_size
        super().__init__(
            name,
            patch_size=patch_size,
            embed_dim=0,  # found out below, as is the width of the summary: adaptors and versions differ
            input_size=input_size or _resolution(radio.preferred_resolution),
            mean=mean,
            std=std,
        )
        self.model: Any = model
        self.choices, self.adaptor_names, self.step = choices, tuple(adaptor_names), step
        self.max_side: int | None = None
        limit = getattr(radio, "max_resolution", None)
        if limit is not None:
            self.max_side = min(_resolution(limit)) // step * step
        self.freeze()
        size = self.fit_size(MIN_PROBE_GRID * patch_size, (MIN_PROBE_GRID + 1) * patch_size)
        with torch.no_grad():
            features, summary = self.extract(Probe(model, name, size, None).images(size))
        self.embed_dim, self.summary_dim = features.shape[1], None if summary is None else summary.shape[1]
        _self_test(self)

    def fit_size(self, height: float, width: float) -> tuple[int, int]:
        """The nearest multiples of the model's step, none above its maximum."""
        super().fit_size(height, width)
        limit = self.max_side or float("inf")
        rows, columns = (min(max(1, round(side / self.step)) * self.step, limit) for side in (height, width))
        return int(rows), int(columns)

    def extract(self, images: Tensor) -> BackboneOutput:
        raw = self.model(images)
        # Without adaptors it is the pair itself, with them a mapping from names to pairs.
        pairs = [raw[name] for name in self.adaptor_names] or [raw]
        grid = self.grid_size(size_of(images))
        maps = [_as_map(features, grid) for _, features in pairs]
        features = maps[0] if len(maps) == 1 else torch.cat(maps, 1)
        if self.choices.summary == "none":
            return BackboneOutput(features, None)
        if self.choices.summary == "mean":
            return BackboneOutput(features, features.mean((2, 3)))
        return BackboneOutput(features, torch.cat([summary for summary, _ in pairs], 1))


def _self_test(backbone: Backbone) -> None:
    """Foreign code can change under its name: shapes, finite values and the order of the grid are tried once."""
    p = backbone.patch_size
    size = backbone.fit_size(MIN_PROBE_GRID * p, (MIN_PROBE_GRID + 1) * p)
    model = backbone.model
    assert isinstance(model, nn.Module)
    images = Probe(model, backbone.name, size, None).images(size)
    try:
        check_grid_order(backbone, images)
    except ConfigError:
        raise
    except Exception as error:  # whatever foreign code raises, the message has to say what was tried
        raise ConfigError(
            f"{backbone.name!r} does not answer as modules of its kind do, on images of {size[0]}x{size[1]} pixels "
            f"({first_line(error)}); load it with torch.hub and wrap it with featsharp.backbones.from_callable"
        ) from error


def _whitening_of(name: str, conditioner: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of a conditioner that whitens each channel; what it makes of 0 and 1 says both."""
    exact = copy.deepcopy(conditioner).double()
    pixels = torch.linspace(0, 1, 48, dtype=torch.float64).reshape(1, 3, 4, 4)
    with torch.no_grad():
        black, white = (exact(torch.full_like(pixels, level))[0, :, 0, 0] for level in (0.0, 1.0))
        std = 1 / (white - black)
        mean = -black * std
        whitened = (pixels - mean[:, None, None]) / std[:, None, None]
        if not torch.allclose(exact(pixels), whitened, atol=1e-6):
            raise ConfigError(
                f"the conditioner of backbone {name!r} does more than to whiten each channel; wrap the module with "
                f"featsharp.backbones.from_callable"
            )
    return tuple(mean.tolist()), tuple(std.tolist())


def _as_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    return features if features.ndim == 4 else features.transpose(1, 2).unflatten(2, grid)


def _check_summary(name: str, choices: Options, known: Sequence[str]) -> None:
    if choices.summary not in known:
        raise ConfigError(f"backbone {name!r} has no summary {choices.summary!r}; it has {', '.join(known)}")


def _flat(blocks: nn.ModuleList) -> list[Any]:
    """The blocks; DINOv2 in training groups them into lists that are padded with identities."""
    if not any(isinstance(block, nn.ModuleList) for block in blocks):
        return list(blocks)
    chunks: list[Any] = list(blocks)
    return [block for chunk in chunks for block in chunk if not isinstance(block, nn.Identity)]


def _both(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _whole(size: tuple[int, int], cell: int) -> tuple[int, int]:
    return size[0] // cell * cell, size[1] // cell * cell


def _resolution(value: Any) -> tuple[int, int]:
    """An int, a pair, or RADIO's object with height and width."""
    return (value.height, value.width) if hasattr(value, "height") else _both(value)
