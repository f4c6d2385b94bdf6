"""The normalizer contract: backbone features in, features of comparable scale out, and back.

Shapes: B batch, C = embed_dim channels, (H, W) token grid.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from featsharp.device import without_autocast
from featsharp.errors import ConfigError, InputError
from featsharp.normalizers.statistics import FeatureStatistics
from featsharp.registry import Entry, Registry

# A spread this small against the mean is nothing but rounding of the sums.
_RELATIVE_SPREAD_FLOOR = 1e-12


class Normalizer(nn.Module):
    """Map to features of comparable scale. Subclasses implement ``_normalize`` and, if they can, the inverse.

    It is computed in float32 under autocast and for 16-bit features too (float64 for float64 features): means can be
    far larger than spreads, which 16 bits cannot resolve. Floating buffers stay float32 under ``.to(dtype)``,
    ``.half()`` and ``.bfloat16()`` for the same reason.

    Args:
        embed_dim: Channels C of the features.

    Attributes:
        name: Of the normalizer in :func:`create_normalizer`.
        needs_fit: Whether :meth:`fit` must come before the first use.
        invertible: Whether :meth:`denormalize` exists.

    Buffers: ``alpha``, scalar float32, 1 / phi with phi^2 the mean channel variance; ``fitted``, scalar bool.
    """

    name: str
    needs_fit: bool = False
    invertible: bool = True
    alpha: Tensor
    fitted: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        if embed_dim < 1:
            raise ConfigError(f"a normalizer needs at least one channel; got embed_dim={embed_dim}")
        self.embed_dim = embed_dim
        self.register_buffer("alpha", torch.ones((), dtype=torch.float32))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._seen_fitted = False

    def forward(self, features: Tensor) -> Tensor:
        """Normalise backbone features: [B, C, H, W] to the same shape and dtype.

        Raises:
            InputError: For another shape or an integer dtype.
            ConfigError: When it needs statistics and has none.
        """
        return self._run(self._normalize, features)

    def denormalize(self, features: Tensor) -> Tensor:
        """Invert :meth:`forward`: [B, C, H, W] to the same shape and dtype, in the backbone's space.

        Raises:
            InputError, ConfigError: As :meth:`forward`; ConfigError also when there is no inverse.
        """
        if not self.invertible:
            raise ConfigError(
                f"normalizer {self.name!r} has no inverse; ask for normalised features (denormalize=False) or use "
                "normalizer 'phi-s'"
            )
        return self._run(self._denormalize, features)

    @torch.no_grad()
    def fit(self, statistics: FeatureStatistics) -> None:
        """Set the transform from the mean and covariance of the backbone's features.

        Raises:
            InputError: When the channel counts differ, with fewer than two vectors, or when no channel varies.
        """
        if statistics.embed_dim != self.embed_dim:
            raise InputError(
                f"normalizer for {self.embed_dim} channels cannot be fitted to statistics of {statistics.embed_dim}"
            )
        mean, covariance = statistics.mean, statistics.covariance
        phi = covariance.diagonal().mean().sqrt()
        if not phi > _RELATIVE_SPREAD_FLOOR * mean.square().mean().sqrt():
            raise InputError(
                f"the features of all {statistics.count} vectors are the same, so no scale can be fitted; use images "
                "that differ and check that the backbone's weights are loaded"
            )
        self.alpha.copy_(1 / phi)
        self._fit(mean, covariance)
        self.fitted.fill_(True)
        self._seen_fitted = True

    @property
    def variance_scale(self) -> float:
        """phi^2 = alpha^-2, the mean channel variance of the backbone's features, whether or not the map applies it.

        Raises:
            ConfigError: Before :meth:`fit`.
        """
        if not self.fitted:
            raise self._unfitted()
        return float(self.alpha) ** -2

    def _normalize(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _denormalize(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def _fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Set what the subclass needs beyond ``alpha``: mean [C], covariance [C, C], both float64 on the CPU."""

    def _run(self, transform: Callable[[Tensor], Tensor], features: Tensor) -> Tensor:
        if features.ndim != 4 or features.shape[1] != self.embed_dim or not features.is_floating_point():
            raise InputError(
                f"normalizer {self.name!r} takes floating features [B, {self.embed_dim}, H, W]; got "
                f"{tuple(features.shape)} {features.dtype}"
            )
        # Read the buffer until it is set and then never again: each read makes the host wait for the accelerator, and a
        # graph that is recorded cannot depend on it.
        if self.needs_fit and not self._seen_fitted and not features.is_meta:
            self._seen_fitted = bool(self.fitted)
            if not self._seen_fitted:
                raise self._unfitted()
        dtype = torch.promote_types(features.dtype, torch.float32)
        with without_autocast(features):
            return transform(features.to(dtype)).to(features.dtype)

    def _unfitted(self) -> ConfigError:
        return ConfigError(
            f"normalizer {self.name!r} was not fitted; call fit(statistics) with the backbone's features or load a "
            "trained checkpoint"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalizer":
        before = {key: value for key, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for key, value in before.items():
            after = self._buffers[key]
            if after is not None and after.dtype != value.dtype:
                self._buffers[key] = value.to(after.device)
        return self

    def __dir__(self) -> list[str]:
        """All names but of what cannot be asked for yet: torch.jit.trace asks for every one."""
        return [name for name in super().__dir__() if name != "variance_scale" or self._seen_fitted]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._seen_fitted = not self.fitted.is_meta and bool(self.fitted)

    def extra_repr(self) -> str:
        return f"name={self.name!r}, embed_dim={self.embed_dim}"


NORMALIZERS: Registry[Normalizer] = Registry("normalizer")


def create_normalizer(name: str, embed_dim: int) -> Normalizer:
    """Build a normalizer for features of ``embed_dim`` channels.

    Raises:
        ConfigError: For an unknown name, or a width that the normalizer cannot take.
    """
    return NORMALIZERS[name].factory(embed_dim)


def list_normalizers() -> list[Entry[Normalizer]]:
    """List all normalizers with their one-line descriptions, by name."""
    return NORMALIZERS.entries()
