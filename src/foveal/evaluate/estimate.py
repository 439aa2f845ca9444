"""Means with standard errors, over measurements that come in groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far it is likely to be from that of all texts like these."""

    mean: float
    error: float | None
    """Standard error; None where there is only one group to tell it from."""
    count: int
    """Single measurements."""

    def as_dict(self) -> dict[str, float | int | None]:
        """For JSON."""
        return {"mean": self.mean, "error": self.error, "count": self.count}


def of_values(values: Sequence[float]) -> Estimate:
    """Of independent measurements."""
    return of_groups(torch.tensor(values, dtype=torch.float64), torch.ones(len(values), dtype=torch.int64))


def of_groups(sums_X: Tensor, counts_X: Tensor) -> Estimate:
    """The mean of all measurements, given the sum and the number of those in each group.

    Measurements of one group may depend on one another, groups do not: the linearised variance of a ratio,
    X / (X - 1) sum_x (sum_x - mean count_x)^2 / (sum of counts)^2 (Cochran, Sampling Techniques, section 6.3).
    """
    kept_X = counts_X > 0
    sums_X, counts_X = sums_X[kept_X].double(), counts_X[kept_X].double()
    groups, count = len(sums_X), float(counts_X.sum())
    assert groups, "a mean of nothing"
    mean = float(sums_X.sum()) / count
    if groups == 1:
        return Estimate(mean, None, int(count))
    spread = float((sums_X - mean * counts_X).square().sum())
    return Estimate(mean, sqrt(groups / (groups - 1) * spread) / count, int(count))
