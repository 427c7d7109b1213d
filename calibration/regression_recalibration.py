"""Recalibration of regressions: the spread by one factor, and all quantiles by a monotone curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.calibration.binned_recalibration import interpolated
from lapkit.calibration.forecast_inputs import Prediction, as_forecast, as_level, as_targets, in_form_of, z_scores
from lapkit.calibration.inputs import Array
from lapkit.calibration.pit import pit
from lapkit.calibration.recalibration import Recalibration
from lapkit.calibration.regression import quantiles


@final
@dataclass(frozen=True, eq=False, repr=False)
class SigmaScaling(Recalibration):
    """All standard deviations times one factor, or one for each target; means stay.

    Attributes:
        factor: `()` or `(K,)`; above 1 for an overconfident network.

    Example:
        >>> scaling = SigmaScaling.fit((torch.zeros(4), 0.5), torch.tensor([1.0, -1.0, 1.0, -1.0]))
        >>> scaling
        SigmaScaling(factor=2)

    Reference:
        Laves, Ihler, Fast, Kahrs and Ortmaier (2020), Well-calibrated regression uncertainty in medical imaging
        with deep learning, section 2.3.
    """

    factor: Tensor

    @classmethod
    def fit(cls, prediction: Prediction, targets: Array, *, per_target: bool = False) -> SigmaScaling:
        """The factor of the smallest Gaussian NLL.

            s^2 = 1/N sum_n (y_n - E[y_n])^2 / Var[y_n]

        Args:
            prediction: of held-out examples, of any form; its means and standard deviations are taken.
            targets: `(N,)` or `(N, K)`.
            per_target: a factor for each of K targets.

        Returns:
            The scaling.

        Raises:
            ValueError: if all targets are predicted exactly, so that the best factor is zero.
        """
        forecast = as_forecast(prediction)
        z = z_scores(forecast, as_targets(targets, forecast))
        factor = z.square().mean(0 if per_target else (0, 1)).sqrt()
        if not (factor > 0).all():
            raise ValueError(
                "Every target equals its predicted mean, so the best factor is zero. Fit on held-out data."
            )
        return cls(factor)

    def __call__(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation after scaling.

        Args:
            prediction: of any form.

        Returns:
            The pair, `(N,)` or `(N, K)` each, as the prediction is, float64: a prediction again.
        """
        forecast = as_forecast(prediction)
        std = self.factor.to(forecast.mean.device) * forecast.std
        return in_form_of(prediction, forecast.mean), in_form_of(prediction, std)


@final
@dataclass(frozen=True, eq=False, repr=False)
class QuantileRecalibration(Recalibration):
    """The distribution function after a monotone curve, `R(F(y))`: predicted quantiles come true as often as they say.

    Attributes:
        predicted: `(M,)` probabilities, ascending from 0 to 1.
        observed: `(M,)` how often the target was below.

    Reference:
        Kuleshov, Fenner and Ermon (2018), Accurate uncertainties for deep learning using calibrated regression,
        algorithm 1.
    """

    predicted: Tensor
    observed: Tensor

    @classmethod
    def fit(cls, prediction: Prediction, targets: Array) -> QuantileRecalibration:
        """Isotonic regression of the PIT's empirical distribution function on the PIT, joined by straight lines.

        That function is monotone already, so it is its own isotonic regression.

        Args:
            prediction: of held-out examples, of any form.
            targets: `(N,)` or `(N, K)`, all targets counting alike.

        Returns:
            The recalibration.

        Raises:
            ValueError: if every target is beyond what the predictions hold possible.
        """
        u, count = pit(prediction, targets).flatten().unique(return_counts=True)
        observed = count.cumsum(0).double() / count.sum()
        inner = (u > 0) & (u < 1)
        if not inner.any():
            raise ValueError("Every target has F(y) of 0 or 1: nothing is left of the distributions to recalibrate.")
        ends = u.new_tensor([0.0, 1.0])
        return cls(torch.cat((ends[:1], u[inner], ends[1:])), torch.cat((ends[:1], observed[inner], ends[1:])))

    def __call__(self, probabilities: Tensor) -> Tensor:
        """What becomes of values of the distribution function, such as `pit(prediction, targets)`.

        Args:
            probabilities: of any shape, in [0, 1].

        Returns:
            `R(p)`, float64.
        """
        x, y = (t.to(probabilities.device) for t in (self.predicted, self.observed))
        return interpolated(x, y, probabilities.double())

    def quantile(self, prediction: Prediction, level: float) -> Tensor:
        """The recalibrated quantile, `F^{-1}(R^{-1}(level))`.

        Args:
            prediction: of any form.
            level: in (0, 1); beyond what the held-out data reach, the quantile is the outermost that they do.

        Returns:
            `(N,)` or `(N, K)`, as the prediction is, float64.
        """
        at = interpolated(self.observed, self.predicted, self.observed.new_tensor([as_level(level, "level")]))
        edge = float(self.predicted[1]), float(self.predicted[-2])
        return quantiles(prediction, min(max(float(at), edge[0]), edge[1]))

    def interval(self, prediction: Prediction, *, coverage: float) -> tuple[Tensor, Tensor]:
        """The recalibrated central interval.

        Args:
            prediction: of any form.
            coverage: in (0, 1).

        Returns:
            Lower and upper ends, `(N,)` or `(N, K)` each, as the prediction is.
        """
        tail = (1 - as_level(coverage, "coverage")) / 2
        return self.quantile(prediction, tail), self.quantile(prediction, 1 - tail)
