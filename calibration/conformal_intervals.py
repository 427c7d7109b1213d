"""Split conformal prediction of real targets: intervals that hold them as often as asked; see `conformal`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.calibration.conformal import conformal_quantile
from lapkit.calibration.forecast_inputs import Prediction, as_columns, as_forecast, as_targets, in_form_of, positive_std
from lapkit.calibration.inputs import Array, as_tensor
from lapkit.calibration.prediction_intervals import Bounds
from lapkit.calibration.recalibration import Recalibration


@final
@dataclass(frozen=True, eq=False, repr=False)
class ConformalIntervals(Recalibration):
    """Intervals that hold the target with the probability asked for, around predictions of any kind.

        absolute:    E[y] -+ t;    normalised:  E[y] -+ t Std[y];    of intervals (CQR):  [lower - t, upper + t]

    Attributes:
        margin: t, `(K,)`; in units of the targets, or of standard deviations if normalised.
        coverage: asked for, of each of the K targets by itself.
        normalised: intervals grow with the predicted standard deviation.

    Example:
        >>> y = torch.tensor([1.0, -2.0, 3.0, 0.5])
        >>> intervals = ConformalIntervals.fit((torch.zeros(4), 1.0), y, coverage=0.6, normalised=False)
        >>> intervals((torch.tensor([10.0]), 1.0))
        (tensor([8.], dtype=torch.float64), tensor([12.], dtype=torch.float64))

    Reference:
        Lei, G'Sell, Rinaldo, Tibshirani and Wasserman (2018), Distribution-free predictive inference for regression,
        sections 2.2 and 5.2.
    """

    margin: Tensor
    coverage: float
    normalised: bool = True

    @classmethod
    def fit(
        cls, prediction: Prediction, targets: Array, *, coverage: float = 0.9, normalised: bool = True
    ) -> ConformalIntervals:
        """The conformal quantile of the held-out errors.

        Args:
            prediction: of held-out examples, of any form.
            targets: `(N,)` or `(N, K)`.
            coverage: in (0, 1).
            normalised: errors in units of the predicted standard deviation; otherwise in those of the targets.

        Returns:
            The rule for intervals; it warns where there are too few examples, and then they are the whole line.
        """
        forecast = as_forecast(prediction)
        error = (as_targets(targets, forecast) - forecast.mean).abs()
        scale = positive_std(forecast) if normalised else 1.0
        return cls(conformal_quantile(error / scale, coverage), coverage, normalised)

    def __call__(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Lower and upper ends.

        Args:
            prediction: of any form.

        Returns:
            `(N,)` or `(N, K)` each, as the prediction is, float64.
        """
        forecast = as_forecast(prediction)
        margin = self.margin.to(forecast.mean.device).expand_as(forecast.mean)
        margin = margin * positive_std(forecast) if self.normalised else margin
        return in_form_of(prediction, forecast.mean - margin), in_form_of(prediction, forecast.mean + margin)


@final
@dataclass(frozen=True, eq=False, repr=False)
class ConformalBounds(Recalibration):
    """Intervals made wider or narrower until they hold the target with the probability asked for (CQR).

    Attributes:
        margin: t, `(K,)`, by which both ends go out; negative ones go in.
        coverage: asked for, of each of the K targets by itself.

    Reference:
        Romano, Patterson and Candes (2019), Conformalized quantile regression, equations 6 to 8.
    """

    margin: Tensor
    coverage: float

    @classmethod
    def fit(cls, bounds: Bounds, targets: Array, *, coverage: float = 0.9) -> ConformalBounds:
        """The conformal quantile of how far held-out targets lie outside.

            max( lower - y, y - upper )

        Args:
            bounds: lower and upper ends, `(N,)` or `(N, K)` each, of held-out examples: two quantiles.
            targets: `(N,)` or `(N, K)`.
            coverage: in (0, 1).

        Returns:
            The rule for intervals; it warns where there are too few examples, and then they are the whole line.
        """
        lower = as_columns(bounds[0], "lower ends")
        upper = as_columns(bounds[1], "upper ends", lower, "lower ends")
        y = as_columns(targets, "targets", lower, "lower ends")
        return cls(conformal_quantile(torch.maximum(lower - y, y - upper), coverage), coverage)

    def __call__(self, bounds: Bounds) -> tuple[Tensor, Tensor]:
        """Lower and upper ends; where they would cross, both are the middle.

        Args:
            bounds: lower and upper ends.

        Returns:
            `(N,)` or `(N, K)` each, as the lower ends are, float64.
        """
        lower = as_columns(bounds[0], "lower ends")
        upper = as_columns(bounds[1], "upper ends", lower, "lower ends")
        margin, shape = self.margin.to(lower.device), as_tensor(bounds[0]).shape
        middle = (lower + upper) / 2
        ends = torch.minimum(lower - margin, middle), torch.maximum(upper + margin, middle)
        return ends[0].reshape(shape), ends[1].reshape(shape)
