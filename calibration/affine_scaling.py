"""Recalibration of logits by an affine map: a scale and a bias for each class, or Platt's curve over a score."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.calibration.event_inputs import as_events, as_scores
from lapkit.calibration.inputs import Array, as_finite, as_labels, as_log_probabilities
from lapkit.calibration.recalibration import Recalibration
from lapkit.calibration.scaling import softmax_like, warn_of_probabilities

# The largest number of a map, for logits of standard deviation one.
LARGEST = 100.0
# An NLL so small, in nats, is on its way to zero: nothing held out is wrong.
PERFECT = 1e-6


@final
@dataclass(frozen=True, eq=False, repr=False)
class VectorScaling(Recalibration):
    """A scale and a bias for each class: `softmax(w * z + b)`. Decisions may change.

    Attributes:
        scale: w, `(C,)`.
        bias: b, `(C,)`, which sum to zero.

    Reference:
        Guo, Pleiss, Sun and Weinberger (2017), On calibration of modern neural networks, section 4.2.
    """

    scale: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, logits: Array, labels: Array) -> VectorScaling:
        """Scales and biases of the smallest NLL, which is convex in them; warns where they grow without bound.

        Classes without a held-out example have no bound either. Warns, too, if log-odds look like probabilities.

        Args:
            logits: `(N, C)`, finite, or `(N,)` log-odds of the positive class, of held-out examples.
            labels: `(N,)` integers in [0, C).

        Returns:
            The scaling.
        """
        z = _finite_logits(logits)
        warn_of_probabilities(logits)
        y, classes = as_labels(labels, z), z.shape[1]
        standard, centre, unit = _standardised(z)
        absent = classes - len(y.unique())
        if absent:
            warnings.warn(
                f"{absent} of {classes} classes have no held-out example, so their probabilities go to zero. Fit on "
                "more held-out data, or use TemperatureScaling.",
                stacklevel=2,
            )

        def loss(theta: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(theta[:classes] * standard + theta[classes:], y)

        found = _minimum(loss, torch.cat((torch.full_like(centre, unit), centre - centre.mean())))
        scale = found[:classes] / unit
        bias = found[classes:] - scale * centre
        return cls(scale, bias - bias.mean())

    def __call__(self, logits: Array) -> Tensor:
        """Probabilities of classes.

        Args:
            logits: as for `fit`.

        Returns:
            `(N, C)`; of one column, the positive class in the form it came in. Float64.
        """
        z = _finite_logits(logits)
        return softmax_like(self.scale.to(z.device) * z + self.bias.to(z.device), logits)


@final
@dataclass(frozen=True, eq=False, repr=False)
class PlattScaling(Recalibration):
    """A logistic curve over any score of an event: `sigmoid(a s + b)`.

    Attributes:
        slope: a.
        intercept: b.

    Reference:
        Platt (1999), Probabilistic outputs for support vector machines; Lin, Lin and Weng (2007).
    """

    slope: float
    intercept: float

    @classmethod
    def fit(cls, scores: Array, occurred: Array, *, smooth: bool = True) -> PlattScaling:
        """The curve of the smallest NLL; warns where it grows without bound.

        Args:
            scores: `(N,)`, such as log-odds, of held-out examples.
            occurred: `(N,)` booleans, or integers 0 and 1.
            smooth: Platt's targets, `(N+ + 1) / (N+ + 2)` and `1 / (N- + 2)`, instead of 1 and 0: a finite curve also
                where scores tell the events apart without error.

        Returns:
            The scaling.
        """
        s = as_scores(scores, "scores")
        standard, centre, unit = _standardised(s)
        _, y = as_events(standard.sigmoid(), occurred)
        if smooth:
            positive, negative = y.sum(), (1 - y).sum()
            y = torch.where(y > 0, (positive + 1) / (positive + 2), 1 / (negative + 2))

        def loss(theta: Tensor) -> Tensor:
            return torch.nn.functional.binary_cross_entropy_with_logits(theta[0] * standard + theta[1], y)

        slope, intercept = _minimum(loss, s.new_tensor([unit, float(centre)])).tolist()
        return cls(slope / unit, intercept - slope / unit * float(centre))

    def __call__(self, scores: Array) -> Tensor:
        """Probabilities of the event.

        Args:
            scores: `(N,)`.

        Returns:
            `(N,)`, float64.
        """
        return (self.slope * as_scores(scores, "scores") + self.intercept).sigmoid()


def _minimum(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Where a convex loss is smallest within bounds; warns at the bounds."""
    # Slow to import, for fits alone.
    from scipy.optimize import minimize

    def value_and_slope(point: Array) -> tuple[float, Array]:
        theta = torch.as_tensor(point, device=start.device).requires_grad_()
        with torch.enable_grad():
            value = loss(theta)
        return float(value.detach()), torch.autograd.grad(value, theta)[0].cpu().numpy()

    limits = [(-LARGEST, LARGEST)] * len(start)
    options = {"maxiter": 10_000, "maxfun": 100_000, "ftol": 1e-16, "gtol": 1e-10}
    first = start.clamp(-LARGEST, LARGEST).cpu().numpy()
    found = minimize(value_and_slope, first, jac=True, method="L-BFGS-B", bounds=limits, options=options)
    theta = torch.as_tensor(found.x, device=start.device)
    if found.fun < PERFECT or (theta.abs() >= LARGEST).any():
        warnings.warn(
            "The recalibration grows without bound, because the logits tell some classes apart without error; it was "
            "stopped. Fit on more held-out data, or use TemperatureScaling.",
            stacklevel=3,
        )
    return theta


def _standardised(z: Tensor) -> tuple[Tensor, Tensor, float]:
    """Numbers `(N, *)` about their means and in units of their spread, with both: well conditioned.

    Equal numbers differ from their mean by rounding, which is no spread.
    """
    centre = z.mean(0)
    spread, rounding = float((z - centre).square().mean().sqrt()), 1e-12 * float(z.abs().max())
    unit = spread if spread > rounding else 1.0
    return (z - centre) / unit, centre, unit


def _finite_logits(logits: Array) -> Tensor:
    """Logits `(N, C)` as they are, float64; of one column f the two columns 0, f."""
    as_log_probabilities(logits)  # its checks
    z = as_finite(logits, "logits")
    if z.ndim == 1 or z.shape[1] == 1:
        z = torch.stack((torch.zeros_like(z.reshape(-1)), z.reshape(-1)), dim=1)
    return z
