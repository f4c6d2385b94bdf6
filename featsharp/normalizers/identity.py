"""Features as the backbone gives them."""

from torch import Tensor

from featsharp.normalizers.base import NORMALIZERS, Normalizer


@NORMALIZERS.register("none", "features as the backbone gives them")
class NoNormalizer(Normalizer):
    """Identity, both ways; ``fit`` only records the variance that :attr:`variance_scale` reports."""

    name = "none"

    def _normalize(self, features: Tensor) -> Tensor:
        return features

    def _denormalize(self, features: Tensor) -> Tensor:
        return features
