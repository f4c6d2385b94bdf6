"""The fit as an upsampler, for figures and measures: every picture that it is given gets a fit of its own."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featsharp.backbones import create_backbone
from featsharp.backbones.base import Backbone
from featsharp.builder import SharpEncoder, create_encoder, load_from_file
from featsharp.errors import ConfigError
from featsharp.implicit.fit import FitConfig, Fitter
from featsharp.names import parse_upsampler
from featsharp.ops.resize import resize
from featsharp.upsamplers.base import Encode, UpsampleFeatures, Upsampler

NAME = "implicit"


class Implicit(Upsampler):
    """FeatUp's implicit network, fitted anew to each picture, which takes minutes.

    Args:
        backbone: What the fits encode views with.
        factor: Of the map that is read; finer than ``config.render``, it is smoother only.
        steps: Of each fit.
        config: Of the fits.
    """

    keeps_space = "nearly"
    needs = "image, views"

    def __init__(self, backbone: Backbone, factor: float, steps: int, config: FitConfig) -> None:
        super().__init__(backbone.embed_dim, factor)
        self._backbones = (backbone,)  # no submodule: it is the encoder's
        self.steps, self.config = steps, config

    def forward(
        self, image: Tensor, encode: Encode, low_res_size: tuple[int, int], output_size: tuple[int, int] | None = None
    ) -> UpsampleFeatures:
        """See :class:`Upsampler`; images are whitened as the backbone takes them."""
        low_res, summary = encode(resize(image, low_res_size))
        size, (backbone,) = self.high_res_grid(low_res, output_size), self._backbones
        mean, std = (image.new_tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
        pixels = ((image * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        with torch.inference_mode(False), torch.enable_grad():
            maps = [self._fit(backbone, one, low_res_size).features(size) for one in pixels]
        return UpsampleFeatures(low_res, torch.cat(maps).to(low_res), summary)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, steps={self.steps}, {self.config}"

    def _fit(self, backbone: Backbone, picture: Any, size: tuple[int, int]) -> Any:
        fitter = Fitter(backbone, picture, self.config, size=size)
        fitter.run(self.steps)
        return fitter.fitted


def load_encoder(
    path: str | PathLike[str], *, featurizer: str | Backbone | None = None, allow_functions: bool = False
) -> SharpEncoder:
    """Load what :func:`featsharp.builder.load_from_file` loads, and ``implicit-2x?steps=400&views=150``.

    The options are those of ``featsharp fit``.

    Raises:
        ConfigError: For options that a fit does not have, and an implicit encoder without a backbone.
    """
    given = None if Path(path).exists() else parse_upsampler(str(path))
    if given is None or given.name != NAME:
        return load_from_file(path, featurizer=featurizer, allow_functions=allow_functions)
    if featurizer is None:
        raise ConfigError(f"{path} is fitted to each picture; give it a backbone: --backbone vits14-focus")
    backbone = create_backbone(featurizer)
    options = dict(given.options)
    steps = options.pop("steps", 400)
    try:
        config = FitConfig(**options)
    except TypeError as error:
        known = ", ".join(("steps", *FitConfig.__dataclass_fields__))
        raise ConfigError(f"{path}: {error}; a fit has {known}") from error
    return create_encoder(backbone, Implicit(backbone, given.factor or 2, steps, config)).requires_grad_(False)
