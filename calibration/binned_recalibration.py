"""Recalibration of probabilities by a curve for each class: isotonic regression and histogram binning.

With C > 2 classes each class is recalibrated against all others and the rows are divided by their sums, so decisions
may change; with two the positive class has the one curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from lapkit.calibration.binning import Binning, assign_bins
from lapkit.calibration.inputs import Array, as_labels, as_probabilities, as_tensor
from lapkit.calibration.recalibration import Recalibration


@final
@dataclass(frozen=True, eq=False, repr=False)
class IsotonicRecalibration(Recalibration):
    """The monotone curve nearest to the outcomes, joined by straight lines between its steps.

    It may give probability 0 or 1, hence an infinite NLL: use it for many examples, or mix in a little of the uniform.

    Attributes:
        knots: `(2, M)` for each class (or for the positive one): probabilities, ascending, and what becomes of them.

    Reference:
        Zadrozny and Elkan (2002), Transforming classifier scores into accurate multiclass probability estimates.
    """

    knots: Sequence[Tensor]

    @classmethod
    def fit(cls, probabilities: Array, labels: Array) -> IsotonicRecalibration:
        """Isotonic regression (pool adjacent violators) of each class's outcomes on its probabilities.

        Args:
            probabilities: `(N, C)`, or `(N,)` of the positive class, of held-out examples.
            labels: `(N,)` integers in [0, C).

        Returns:
            The recalibration.
        """
        # Half a second of imports, for fits alone.
        from sklearn.isotonic import IsotonicRegression

        knots = []
        for p, outcome in _events(probabilities, labels):
            regression = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
            regression.fit(p.cpu().numpy(), outcome.cpu().numpy())
            steps = np.stack([regression.X_thresholds_, regression.y_thresholds_])
            knots.append(torch.tensor(steps, device=p.device))
        return cls(knots)

    def __call__(self, probabilities: Array) -> Tensor:
        """Recalibrated probabilities.

        Args:
            probabilities: as for `fit`.

        Returns:
            In the form they came in, float64; rows where every class has zero become uniform.
        """
        return _recombined(probabilities, [interpolated(k[0], k[1], p) for k, p in _paired(self.knots, probabilities)])


@final
@dataclass(frozen=True, eq=False, repr=False)
class HistogramBinning(Recalibration):
    """Each bin's probabilities replaced by how often the class occurred in it.

    Attributes:
        edges: `(E, M + 1)` of bins (lo, hi], for each class, or for the positive one (E = 1).
        frequency: `(E, M)`; the middle of the bin where it had no example.

    Reference:
        Zadrozny and Elkan (2001), Obtaining calibrated probability estimates from decision trees and naive Bayesian
        classifiers.
    """

    edges: Tensor
    frequency: Tensor

    @classmethod
    def fit(
        cls, probabilities: Array, labels: Array, *, bins: int = 15, binning: Binning = "equal_mass"
    ) -> HistogramBinning:
        """Frequencies of each class in bins of its probability.

        Args:
            probabilities: `(N, C)`, or `(N,)` of the positive class, of held-out examples.
            labels: `(N,)` integers in [0, C).
            bins: number of bins M.
            binning: "equal_mass" or "equal_width".

        Returns:
            The recalibration.
        """
        edges, frequency = [], []
        for p, outcome in _events(probabilities, labels):
            # Bins of equal mass part equal probabilities; by its edges each probability has one bin.
            ends, _ = assign_bins(p, bins=bins, binning=binning)
            place = torch.bucketize(p, ends[1:-1])
            count = torch.bincount(place, minlength=bins)
            found = torch.bincount(place, outcome, minlength=bins) / count
            edges.append(ends)
            frequency.append(found.where(count > 0, (ends[:-1] + ends[1:]) / 2))
        return cls(torch.stack(edges), torch.stack(frequency))

    def __call__(self, probabilities: Array) -> Tensor:
        """Recalibrated probabilities.

        Args:
            probabilities: as for `fit`; beyond the first or last edge, the outermost bin's.

        Returns:
            In the form they came in, float64; rows where every class has zero become uniform.
        """
        found = []
        pairs = [torch.cat((e, f)) for e, f in zip(self.edges, self.frequency, strict=True)]
        count = self.edges.shape[1]
        for pair, p in _paired(pairs, probabilities):
            found.append(pair[count:][torch.bucketize(p, pair[1 : count - 1])])
        return _recombined(probabilities, found)


def interpolated(x: Tensor, y: Tensor, at: Tensor) -> Tensor:
    """The line through points, constant beyond the first and the last.

    Args:
        x: `(M,)`, ascending.
        y: `(M,)`.
        at: anywhere.

    Returns:
        Its values there.
    """
    if len(x) == 1:
        return y.expand_as(at).clone()
    inside = at.clamp(float(x[0]), float(x[-1])).contiguous()
    right = torch.searchsorted(x, inside).clamp(1, len(x) - 1)
    left = right - 1
    return torch.lerp(y[left], y[right], (inside - x[left]) / (x[right] - x[left]))


def _events(probabilities: Array, labels: Array) -> list[tuple[Tensor, Tensor]]:
    """Probability and outcome `(N,)` of each class, of two the positive one alone."""
    rows = as_probabilities(probabilities)
    y, classes = as_labels(labels, rows), rows.shape[1]
    return [(rows[:, k].contiguous(), (y == k).double()) for k in (range(classes) if classes > 2 else (1,))]


def _paired(curves: Sequence[Tensor], probabilities: Array) -> list[tuple[Tensor, Tensor]]:
    """Each curve beside the probabilities that it is for.

    Raises:
        ValueError: if there is another number of classes than was fitted.
    """
    rows = as_probabilities(probabilities)
    columns = rows.T.contiguous() if rows.shape[1] > 2 else rows[:, 1:].T.contiguous()
    if len(columns) != len(curves):
        raise ValueError(f"There are {rows.shape[1]} classes, the recalibration was fitted to {max(2, len(curves))}.")
    return [(curve.to(rows.device), column) for curve, column in zip(curves, columns, strict=True)]


def _recombined(given: Array, columns: Sequence[Tensor]) -> Tensor:
    """Rows that sum to one, in the form in which the probabilities came."""
    shape = as_tensor(given).shape
    if len(columns) == 1:
        p = columns[0]
        return torch.stack((1 - p, p), dim=1) if len(shape) == 2 and shape[1] == 2 else p.reshape(shape)
    rows = torch.stack(list(columns), dim=1)
    total = rows.sum(1, keepdim=True)
    return torch.where(total > 0, rows / total.clamp(min=torch.finfo(rows.dtype).tiny), 1 / rows.shape[1])
