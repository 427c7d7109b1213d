"""Recalibration of logits by a few numbers: temperature, vector and Platt scaling.

The log of probabilities will do for logits, as of a predictive that has none: the softmax gives them back.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.calibration.forecasts import as_finite
from lapkit.calibration.inputs import Array, as_events, as_labels, as_log_probabilities, as_scores, as_tensor
from lapkit.calibration.recalibration import Recalibration

# Inverse temperatures that are searched.
BOUNDS = (0.01, 100.0)
# The largest number of vector and Platt scaling, for logits of standard deviation one.
LARGEST = 100.0
# An NLL so small, in nats, is on its way to zero: nothing held out is wrong.
PERFECT = 1e-6


@final
@dataclass(frozen=True, eq=False, repr=False)
class TemperatureScaling(Recalibration):
    """All logits divided by one number, which changes no decision: `softmax(z / T)`.

    Attributes:
        temperature: T; above 1 for an overconfident network.

    Example:
        >>> scaling = TemperatureScaling.fit(torch.tensor([[3.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
        >>> scaling
        TemperatureScaling(temperature=2.731)
        >>> scaling(torch.tensor([[3.0, 0.0]]))
        tensor([[0.7500, 0.2500]], dtype=torch.float64)

    Reference:
        Guo, Pleiss, Sun and Weinberger (2017), On calibration of modern neural networks, section 4.2.
    """

    temperature: float

    @classmethod
    def fit(cls, logits: Array, labels: Array) -> TemperatureScaling:
        """The temperature of the smallest NLL; the NLL is convex in 1 / T, so it is found by the root of its slope.

            sum_n ( E_{p_n}[z_n] - z_n[y_n] ) = 0,   p_n = softmax(z_n / T)

        Warns if no temperature between 0.01 and 100 is best, as when all examples are right (T would go to 0), or if it
        makes no difference.

        Args:
            logits: `(N, C)`, or `(N,)` log-odds of the positive class, of held-out examples.
            labels: `(N,)` integers in [0, C).

        Returns:
            The scaling.

        Raises:
            ValueError: if a label's logit is -inf: its probability is zero at any temperature.
        """
        # Slow to import, for fits alone.
        from scipy.optimize import brentq

        z = as_log_probabilities(logits)
        right = z.gather(1, as_labels(labels, z)[:, None])
        if right.isinf().any():
            raise ValueError(
                "A label has the logit -inf, that is probability zero at any temperature. Give logits instead of the "
                "log of probabilities that have underflowed."
            )
        gap = z - right  # (N, C), 0 at the labels
        finite = gap.where(~gap.isinf(), 0.0)

        def slope(log_b: float) -> float:
            return float(((math.exp(log_b) * gap).softmax(1) * finite).sum())

        low, high = (math.log(b) for b in BOUNDS)
        at_low, at_high = slope(low), slope(high)
        if at_low < 0 < at_high:
            return cls(math.exp(-brentq(slope, low, high, xtol=1e-14)))
        if not finite.any():
            found, reason = 1.0, "the logits of each example are all the same"
        elif at_low <= 0 and at_high <= 0:
            found, reason = 1 / BOUNDS[1], "all labels are the most probable classes: the smaller, the better"
        else:
            found, reason = (
                1 / BOUNDS[0],
                "the logits say nothing of the labels, or far too much: the larger, the better",
            )
        warnings.warn(
            f"No temperature is best, because {reason}; {found:g} was taken. Fit on more held-out data.", stacklevel=2
        )
        return cls(found)

    def __call__(self, logits: Array) -> Tensor:
        """Probabilities of classes.

        Args:
            logits: as for `fit`.

        Returns:
            `softmax(z / T)`, `(N, C)`; of one column, the positive class in the form it came in. Float64.
        """
        return _probabilities(as_log_probabilities(logits) / self.temperature, logits)


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

        Classes without a held-out example have no bound either.

        Args:
            logits: `(N, C)`, finite, or `(N,)` log-odds of the positive class, of held-out examples.
            labels: `(N,)` integers in [0, C).

        Returns:
            The scaling.
        """
        z = _finite_logits(logits)
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
        return _probabilities(self.scale.to(z.device) * z + self.bias.to(z.device), logits)


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


def _probabilities(logits: Tensor, given: Array) -> Tensor:
    """The softmax, of two columns that came as one the second."""
    p, shape = logits.softmax(1), as_tensor(given).shape
    return p if len(shape) == 2 and shape[1] > 1 else p[:, 1].reshape(shape)
