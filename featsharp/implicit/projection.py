"""Principal components of a backbone's features: fewer channels to fit, and their inverse."""

import torch
from torch import Tensor, nn

from featsharp.device import to_double
from featsharp.errors import InputError


class Projection(nn.Module):
    """Projection of C channels to K principal components and back, ``z = basis (x - mean) / scale``.

    One scale for all components brings their mean square to 1, so that learning rates and loss weights suit every
    backbone (the published fit takes features as they are). With K = C nothing is lost. ``mean`` is [C], ``basis``
    [K, C] with orthonormal rows, ``scale`` a scalar.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, basis: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.register_buffer("scale", scale)

    @classmethod
    def fit(cls, features: Tensor, dim: int) -> "Projection":
        """Fit the first min(``dim``, C) components to [B, C, h, w].

        Exact, from the covariance in float64: the published randomised PCA gives another basis with every call.

        Raises:
            InputError: When the features hold NaN or infinite values.
        """
        rows = to_double(features.movedim(1, -1).flatten(0, -2))
        if not torch.isfinite(rows).all():
            raise InputError("the backbone's features hold NaN or infinite values; nothing can be fitted to them")
        mean = rows.mean(0)
        rows = rows - mean
        variances, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        kept = min(dim, len(mean))
        # eigh sorts in ascending order.
        basis = vectors.flip(1)[:, :kept].T.contiguous()
        scale = variances.flip(0)[:kept].clamp(min=0).mean().sqrt()
        # Constant features have no scale.
        scale = torch.where(scale > 1e-6, scale, 1.0)
        return cls(*(part.float().to(features.device) for part in (mean, basis, scale)))

    def project(self, features: Tensor) -> Tensor:
        """Project [B, C, h, w] to [B, K, h, w]."""
        centred = features - self.mean[:, None, None]
        return torch.einsum("kc,bchw->bkhw", self.basis / self.scale, centred)

    def restore(self, components: Tensor) -> Tensor:
        """Map [B, K, h, w] back to [B, C, h, w]."""
        features = torch.einsum("kc,bkhw->bchw", self.basis * self.scale, components)
        return features.add_(self.mean[:, None, None])  # in place: the map may be large
