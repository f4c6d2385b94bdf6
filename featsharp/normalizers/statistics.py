"""Mean and covariance of feature vectors, collected batch by batch in float64.

The parallel update of Chan, Golub and LeVeque (1979): exact for any split into batches and for any order of merging,
and free of the cancellation of the sum-of-squares formula.

Shapes: B batch, C channels, (H, W) token grid, N vectors.
"""

import torch
from torch import Tensor

from featsharp.device import to_double
from featsharp.errors import InputError


class FeatureStatistics:
    """Running count, mean and scatter of vectors with ``embed_dim`` channels.

    The sums are on the device of the last batch. Statistics of several processes are joined with :meth:`merge`;
    :meth:`state` and :meth:`from_state` transfer them.
    """

    def __init__(self, embed_dim: int) -> None:
        self.embed_dim = embed_dim
        self._count = 0
        self._mean = torch.zeros(embed_dim, dtype=torch.float64)
        self._scatter = torch.zeros(embed_dim, embed_dim, dtype=torch.float64)

    @property
    def count(self) -> int:
        """Number of vectors seen."""
        return self._count

    @property
    def mean(self) -> Tensor:
        """[C] float64 on the CPU.

        Raises:
            InputError: Before the first vector.
        """
        self._require(1, "a mean")
        return self._mean.cpu()

    @property
    def covariance(self) -> Tensor:
        """[C, C] float64 on the CPU, the unbiased estimate (divided by count - 1).

        Raises:
            InputError: With fewer than two vectors.
        """
        self._require(2, "a covariance")
        return self._scatter.cpu() / (self._count - 1)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Add every vector of a batch; one without vectors changes nothing.

        Args:
            features: [B, C, H, W] or [N, C], any floating dtype, finite.

        Raises:
            InputError: For another shape, or for NaN or infinite values; the statistics are then as before.
        """
        if features.ndim not in (2, 4) or features.shape[1] != self.embed_dim:
            c = self.embed_dim
            raise InputError(f"statistics take features [B, {c}, H, W] or [N, {c}]; got {tuple(features.shape)}")
        rows = to_double(features.movedim(1, -1).reshape(-1, self.embed_dim))
        if not len(rows):
            return
        bad = int((~rows.isfinite()).sum())
        if bad:
            raise InputError(
                f"{bad} of {rows.numel()} feature values are NaN or infinite; check the images and the backbone's "
                "precision (float16 overflows where bfloat16 and float32 do not)"
            )
        mean = rows.mean(0)
        centred = rows - mean
        self._combine(len(rows), mean, centred.T @ centred)

    @torch.no_grad()
    def merge(self, other: "FeatureStatistics") -> None:
        """Add the vectors of ``other``, which does not change.

        Raises:
            InputError: When the channel counts differ.
        """
        if other.embed_dim != self.embed_dim:
            raise InputError(f"cannot merge statistics of {other.embed_dim} channels into those of {self.embed_dim}")
        if other.count:
            self._combine(other._count, other._mean, other._scatter)

    def state(self) -> dict[str, Tensor]:
        """``count`` (int64), ``mean`` [C] and ``scatter`` [C, C] = covariance * (count - 1) (float64), on the CPU."""
        return {"count": torch.tensor(self._count), "mean": self._mean.cpu(), "scatter": self._scatter.cpu()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "FeatureStatistics":
        """Rebuild statistics from :meth:`state`.

        Raises:
            InputError: When an entry is missing, has the wrong shape or dtype, or holds NaN or infinite values.
        """
        missing = {"count", "mean", "scatter"} - state.keys()
        if missing:
            raise InputError(f"feature statistics lack {', '.join(sorted(missing))}; compute them again")
        count, mean, scatter = state["count"], state["mean"], state["scatter"]
        doubles = mean.dtype == scatter.dtype == torch.float64
        square = mean.ndim == 1 and scatter.shape == (len(mean), len(mean)) and count.numel() == 1
        if not (doubles and square and mean.isfinite().all() and scatter.isfinite().all() and int(count) >= 0):
            raise InputError("feature statistics are damaged (shape, dtype or values); compute them again")
        statistics = cls(len(mean))
        statistics._count, statistics._mean, statistics._scatter = int(count), mean.clone(), scatter.clone()
        return statistics

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        """Join with other statistics: the update of Chan et al."""
        total = self._count + count
        delta = mean - self._mean.to(mean.device)
        self._mean = self._mean.to(mean.device) + delta * (count / total)
        self._scatter = (
            self._scatter.to(mean.device) + scatter + torch.outer(delta, delta) * (count * self._count / total)
        )
        self._count = total

    def _require(self, count: int, what: str) -> None:
        if self._count < count:
            raise InputError(
                f"{what} of features needs at least {count} vectors; got {self._count}; pass more images to update()"
            )
