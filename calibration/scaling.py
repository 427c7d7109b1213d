"""Recalibration of logits by one number, the temperature; by a few, see `affine_scaling`.

The log of probabilities will do for logits, as of a predictive that has none: the softmax gives them back.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import final

from torch import Tensor

from lapkit.calibration.inputs import Array, as_labels, as_log_probabilities, as_tensor
from lapkit.calibration.recalibration import Recalibration

# Inverse temperatures that are searched.
BOUNDS = (0.01, 100.0)


@final
@dataclass(frozen=True, eq=False, repr=False)
class TemperatureScaling(Recalibration):
    """All logits divided by one number, which changes no decision: `softmax(z / T)`.

    Attributes:
        temperature: T; above 1 for an overconfident network.

    Example:
        >>> import torch
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

        Warns if no temperature between 0.01 and 100 is best, as when all examples are right (T would go to 0), if it
        makes no difference, or if log-odds look like probabilities.

        Args:
            logits: `(N, C)`, or `(N,)` log-odds of the positive class, of held-out examples.
            labels: `(N,)` integers in [0, C).

        Returns:
            The scaling.

        Raises:
            ValueError: if the logits are probabilities, or a label's logit is -inf: its probability is zero at any
                temperature.
        """
        # Slow to import, for fits alone.
        from scipy.optimize import brentq

        z = as_log_probabilities(logits)
        warn_of_probabilities(logits)
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
        return softmax_like(as_log_probabilities(logits) / self.temperature, logits)


def warn_of_probabilities(logits: Array) -> None:
    """Warn where one column has numbers from 0 to 1 alone, which log-odds hardly are; several columns are refused.

    Args:
        logits: `(N, C)`, `(N, 1)` or `(N,)`.
    """
    given = as_tensor(logits)
    if (given.ndim == 1 or given.shape[1] == 1) and given.min() >= 0 and given.max() <= 1:
        warnings.warn(
            "All logits lie between 0 and 1, as probabilities do, expected log-odds of the positive class. Of "
            "probabilities pass probabilities.logit().",
            stacklevel=3,
        )


def softmax_like(logits: Tensor, given: Array) -> Tensor:
    """The softmax, of two columns that came as one the second.

    Args:
        logits: `(N, C)`.
        given: the logits as they came, `(N, C)`, `(N, 1)` or `(N,)`.

    Returns:
        Probabilities in the shape of what was given.
    """
    p, shape = logits.softmax(1), as_tensor(given).shape
    return p if len(shape) == 2 and shape[1] > 1 else p[:, 1].reshape(shape)
