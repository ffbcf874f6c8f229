"""Fréchet distance between two sets of feature vectors, from sums that add up over batches and ranks."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class FeatureStatistics:
    """Mean and covariance of feature vectors that come in batches; C = `dim` channels.

    Kept are the exact count and the fp64 sums of features and of their outer products, so that the parts of
    several ranks merge to what one would have found.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._sum = torch.zeros(dim, dtype=torch.float64)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features [B, C].

        Raises:
            ValueError: they have another shape, or a value is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"got features of shape {tuple(features.shape)}; expected [B, {self.dim}]")
        features = features.detach().cpu().double()
        if not features.isfinite().all():
            raise ValueError("features are not finite; are pictures and weights of the extractor whole?")
        self.count += len(features)
        self._sum += features.sum(dim=0)
        self._outer += features.T @ features

    def merge(self, other: "FeatureStatistics") -> None:
        """Add what other statistics counted.

        Raises:
            ValueError: they are of features of another size.
        """
        if other.dim != self.dim:
            raise ValueError(f"got statistics of {other.dim} channels; expected {self.dim}, as counted here")
        self.count += other.count
        self._sum += other._sum
        self._outer += other._outer

    @property
    def mean(self) -> Tensor:
        """[C], float64."""
        self._require(1)
        return self._sum / self.count

    @property
    def covariance(self) -> Tensor:
        """[C, C], float64, unbiased as `numpy.cov`."""
        self._require(2)
        mean = self.mean
        return (self._outer - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def state(self) -> dict[str, np.ndarray]:
        """Plain arrays for `numpy.savez`, which `from_state` reads."""
        return {"count": np.array(self.count), "sum": self._sum.numpy(), "outer": self._outer.numpy()}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "FeatureStatistics":
        """Statistics from the arrays of `state`.

        Raises:
            ValueError: an array is missing or has another shape.
        """
        missing = {"count", "sum", "outer"} - set(state)
        if missing:
            raise ValueError(
                f"no array {min(missing)!r} among {sorted(state)}; expected those of FeatureStatistics.state"
            )
        total, outer = (torch.from_numpy(np.array(state[name], dtype="float64")) for name in ("sum", "outer"))
        if total.ndim != 1 or outer.shape != (len(total), len(total)):
            raise ValueError(
                f"got sums of shapes {tuple(total.shape)} and {tuple(outer.shape)}; expected [C] and [C, C]"
            )
        statistics = cls(len(total))
        statistics.count, statistics._sum, statistics._outer = int(state["count"]), total, outer
        return statistics

    def _require(self, count: int) -> None:
        if self.count < count:
            raise ValueError(f"statistics of {self.count} pictures; expected {count} or more")


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """Squared 2-Wasserstein distance of the two Gaussians, as FID reports it (arXiv 1706.08500, eq. 6).

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^1/2). The last trace is the sum of the singular values of
    A1^T A2 for any C = A A^T, which, other than a matrix square root, has no imaginary parts and no trouble
    with singular products: fewer pictures than channels are no special case.

    Raises:
        ValueError: the statistics are of features of different sizes, or of fewer than two pictures.
    """
    if first.dim != second.dim:
        raise ValueError(
            f"statistics of {first.dim} and of {second.dim} channels; expected features of one extractor"
        )
    one, two = first.covariance, second.covariance
    difference = first.mean - second.mean
    fidelity = torch.linalg.svdvals(_factor(one).T @ _factor(two)).sum()
    return float(difference @ difference + one.trace() + two.trace() - 2 * fidelity)


def _factor(covariance: Tensor) -> Tensor:
    """A [C, rank] with A A^T = covariance [C, C]; what is rounding error of zero is left out."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
