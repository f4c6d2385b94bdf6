"""PHI-S: every channel's variance becomes exactly 1 through an invertible map that keeps distances up to one factor.

Paper: "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation", arXiv 2410.01680.

    Sigma = U diag(lambda) U^T,  phi^2 = trace(Sigma) / C,  alpha = 1 / phi,  R = H U^T
    y = alpha R (x - mu),  x = R^T y / alpha + mu

H is a normalised Hadamard matrix: U^T decorrelates the channels, H mixes them equally, so that each gets the mean of
all variances. R depends on signs and orders that an eigen-decomposition is free to choose: two fits to the same data
may differ, so modules trained on top must keep the R that they were trained with.

Shapes: B batch, C channels, (H, W) token grid.
"""

import torch
from torch import Tensor

from featsharp.normalizers.base import NORMALIZERS, Normalizer
from featsharp.ops.hadamard import hadamard, require_hadamard


@NORMALIZERS.register("phi-s", "PHI-S: rotation and one scale, every channel's variance is 1; invertible")
class PhiS(Normalizer):
    """Rotation and global scale.

    Buffers, float32: ``mean`` [C], ``alpha`` scalar, ``rotation`` [C, C] (R; its inverse is the transpose).

    Raises:
        ConfigError: For a width without a Hadamard matrix.
    """

    name = "phi-s"
    needs_fit = True
    scales: bool = True
    mean: Tensor
    rotation: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        require_hadamard(embed_dim)  # refuse a width that has none now, not after the statistics pass
        self.register_buffer("mean", torch.zeros(embed_dim, dtype=torch.float32))
        self.register_buffer("rotation", torch.eye(embed_dim, dtype=torch.float32))

    def _fit(self, mean: Tensor, covariance: Tensor) -> None:
        # Only the eigenvectors are used (alpha comes from the trace), so tiny negative eigenvalues do no harm.
        eigenvectors = torch.linalg.eigh(covariance).eigenvectors
        self.mean.copy_(mean)
        self.rotation.copy_(hadamard(self.embed_dim) @ eigenvectors.T)

    def _normalize(self, features: Tensor) -> Tensor:
        centred = features - _per_channel(self.mean, features)
        return _mix_channels(self.rotation * self._scale(), centred)

    def _denormalize(self, features: Tensor) -> Tensor:
        return _mix_channels(self.rotation.T / self._scale(), features) + _per_channel(self.mean, features)

    def _scale(self) -> Tensor | float:
        return self.alpha if self.scales else 1.0


@NORMALIZERS.register("phi-s-noalpha", "rotation of PHI-S alone: all channels get the same variance; invertible")
class PhiSNoAlpha(PhiS):
    """Mean removal and rotation: distances are those of the backbone's space. Buffers as :class:`PhiS`."""

    name = "phi-s-noalpha"
    scales = False


@NORMALIZERS.register("phi-s-onlyalpha", "scale of PHI-S alone: mean removal and one scale, any width; invertible")
class PhiSOnlyAlpha(Normalizer):
    """Mean removal and global scale. Buffers, float32: ``mean`` [C], ``alpha`` scalar. Takes any width."""

    name = "phi-s-onlyalpha"
    needs_fit = True
    mean: Tensor

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        self.register_buffer("mean", torch.zeros(embed_dim, dtype=torch.float32))

    def _fit(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean.copy_(mean)

    def _normalize(self, features: Tensor) -> Tensor:
        return (features - _per_channel(self.mean, features)) * self.alpha

    def _denormalize(self, features: Tensor) -> Tensor:
        return features / self.alpha + _per_channel(self.mean, features)


def _per_channel(values: Tensor, features: Tensor) -> Tensor:
    return values.to(features.dtype)[:, None, None]


def _mix_channels(matrix: Tensor, features: Tensor) -> Tensor:
    """Multiply every vector of features [B, C, H, W] by a matrix [C, C].

    A matrix product, not a 1x1 convolution: as fast or faster, and convolutions may round to TF32 by default.
    """
    mixed = matrix.to(features.dtype) @ features.flatten(2)
    return mixed.reshape(features.shape)
