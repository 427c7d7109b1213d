"""The report of predictive distributions of real targets: scores, and what its pictures show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapkit.calibration.detection import auroc
from lapkit.calibration.forecast_inputs import Prediction, as_forecast, as_targets
from lapkit.calibration.forecasts import Forecast, Samples
from lapkit.calibration.inputs import Array
from lapkit.calibration.pit import pit_histogram
from lapkit.calibration.prediction_intervals import central_interval, interval_coverage, interval_score, interval_width
from lapkit.calibration.quantile_calibration import calibration_curve
from lapkit.calibration.regression import crps, mae, mean_squared_z, predictive_nll, rmse
from lapkit.calibration.regression_diagrams import draw_intervals
from lapkit.calibration.report_diagrams import caption, draw_spread
from lapkit.calibration.report_examples import examples
from lapkit.calibration.report_page import panels
from lapkit.calibration.report_table import Column, Report, Section

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Examples that a page shows, and those whose intervals it draws.
SHOWN, DRAWN = 12, 60
COVERAGE = 0.9

RMSE, MAE, NLL, CRPS, HELD, WIDTH, WINKLER, QCE, CHI = (
    "RMSE",
    "MAE",
    "NLL",
    "CRPS",
    "in 90 %",
    "width 90 %",
    "interval score",
    "quantile error",
    "z^2",
)
AUROC = Column(
    "OOD AUROC", "", "larger", "Chance that an example from outside has a larger spread than one from inside."
)


def _columns(unit: str) -> tuple[Column, ...]:
    return (
        Column(RMSE, unit, "smaller", "Root mean squared error of the predicted mean."),
        Column(MAE, unit, "smaller", "Mean absolute error of the predicted mean."),
        Column(
            NLL, "nats", "smaller", "Mean negative log density of the targets; none for samples, which have no density."
        ),
        Column(CRPS, unit, "smaller", "Continuous ranked probability score: an absolute error that counts the spread."),
        Column(HELD, "", COVERAGE, "Share of targets inside their central 90 % interval; it should be 0.9."),
        Column(
            WIDTH, unit, None, "Mean width of these intervals: the narrower, the sharper, if they hold their share."
        ),
        Column(WINKLER, unit, "smaller", "Winkler's score of them: the width, and a penalty for targets outside."),
        Column(QCE, "", "smaller", "Mean gap between how often quantiles held the target and how often they should."),
        Column(
            CHI, "", 1.0, "Squared error over predicted variance, averaged: 1 if calibrated, above if overconfident."
        ),
    )


def regression_report(
    predictions: Mapping[str, Prediction],
    targets: Array,
    *,
    ood: Mapping[str, Prediction],
    inputs: Array | None,
    feature_names: Sequence[str] | None,
    unit: str,
    title: str,
    notes: Sequence[str],
    focus: str,
) -> Report:
    """The report of several predictions of the same targets; for the arguments see `report`."""
    forecasts = {name: as_forecast(prediction) for name, prediction in predictions.items()}
    y = {name: as_targets(targets, forecast) for name, forecast in forecasts.items()}
    outside = {name: as_forecast(prediction) for name, prediction in ood.items()}
    scores = {name: _scores(forecast, y[name], outside.get(name)) for name, forecast in forecasts.items()}
    sections = [
        Section(
            "Intervals",
            f"Central 90 % intervals of {DRAWN} examples at most, the first target, by predicted mean. "
            "Nine targets in ten should be inside.",
            lambda: panels(_intervals(forecasts, y), size=(5.0, 3.8), wide=False),
        ),
        Section(
            "Where the targets fell (PIT)",
            "How often the target fell into each tenth of its predictive distribution. Calibrated bars keep to the "
            "grey band; high ends mean that the spread is too small, a high middle that it is too large, a slope that "
            "means are off to one side.",
            lambda: panels(_pits(forecasts, y), size=(4.4, 3.6), wide=False),
        ),
        Section(
            "Quantiles",
            "How often predicted quantiles held the target, over how often they should; calibrated is the diagonal.",
            lambda: panels([_quantiles(forecasts, y)], size=(5.2, 5.0), wide=True),
        ),
        Section(
            "Spread" + (" in and out of distribution" if outside else ""),
            "Predicted standard deviations"
            + (": of examples from elsewhere they should be larger." if outside else " of the examples."),
            lambda: panels(_spreads(forecasts, outside, unit), size=(4.4, 3.4), wide=False),
        ),
    ]
    if inputs is not None:
        sections.append(_uncertain(inputs, forecasts[focus], y[focus], focus, feature_names))
    count, outputs = y[focus].shape
    of_several = f" of {outputs} targets each" if outputs > 1 else ""
    elsewhere = f", and {len(next(iter(outside.values())).mean)} from outside" if outside else ""
    columns = (*_columns(unit), *((AUROC,) if outside else ()))
    return Report(title, f"{count} examples{of_several}{elsewhere}.", columns, scores, tuple(notes), tuple(sections))


def _scores(forecast: Forecast, y: Tensor, outside: Forecast | None) -> dict[str, float]:
    bounds = central_interval(forecast, coverage=COVERAGE)
    found = {
        RMSE: rmse(forecast, y),
        MAE: mae(forecast, y),
        NLL: float("nan") if isinstance(forecast, Samples) else predictive_nll(forecast, y),
        CRPS: crps(forecast, y),
        HELD: interval_coverage(bounds, y),
        WIDTH: interval_width(bounds),
        WINKLER: interval_score(bounds, y, coverage=COVERAGE),
        QCE: calibration_curve(forecast, y).mean_error,
        CHI: mean_squared_z(forecast, y),
    }
    if outside is not None:
        found[AUROC.name] = auroc(_spread(forecast), _spread(outside))
    return found


def _spread(forecast: Forecast) -> Tensor:
    """One standard deviation for each example, the root mean square over its targets."""
    return forecast.std.square().mean(1).sqrt()


_Drawing = tuple[str, Callable[["Axes"], object]]


def _intervals(forecasts: Mapping[str, Forecast], y: Mapping[str, Tensor]) -> list[_Drawing]:
    def draw(ax: Axes, name: str) -> None:
        forecast = forecasts[name]
        # Spread evenly over the examples: no choice to be made.
        at = torch.linspace(0, len(y[name]) - 1, min(DRAWN, len(y[name]))).long()
        lower, upper = central_interval(forecast, coverage=COVERAGE)
        drawn = (forecast.mean, lower, upper, y[name])
        mean, low, high, target = (v.reshape(len(v), -1)[:, 0].cpu()[at].tolist() for v in drawn)
        draw_intervals(ax, mean=mean, lower=low, upper=high, targets=target, label="90 % interval").set_title(
            caption(name)
        )

    return [(f"Intervals of {name}", partial(draw, name=name)) for name in forecasts]


def _pits(forecasts: Mapping[str, Forecast], y: Mapping[str, Tensor]) -> list[_Drawing]:
    def draw(ax: Axes, name: str) -> None:
        pit_histogram(forecasts[name], y[name]).plot(ax).set_title(caption(name))

    return [(f"PIT of {name}", partial(draw, name=name)) for name in forecasts]


def _quantiles(forecasts: Mapping[str, Forecast], y: Mapping[str, Tensor]) -> _Drawing:
    def draw(ax: Axes) -> None:
        for name, forecast in forecasts.items():
            calibration_curve(forecast, y[name]).plot(ax, label=caption(name))

    return f"Calibration of the quantiles of {', '.join(forecasts)}", draw


def _spreads(forecasts: Mapping[str, Forecast], outside: Mapping[str, Forecast], unit: str) -> list[_Drawing]:
    every = torch.cat([_spread(forecast).cpu() for forecast in (*forecasts.values(), *outside.values())])
    limits = (0.0, 1.05 * float(every.max()))

    def draw(ax: Axes, name: str) -> None:
        draw_spread(
            ax,
            inside=_spread(forecasts[name]).tolist(),
            outside=_spread(outside[name]).tolist() if name in outside else None,
            title=caption(name),
            label="standard deviation" + (f" ({unit})" if unit else ""),
            limits=limits,
        )

    return [(f"Standard deviations of {name}", partial(draw, name=name)) for name in forecasts]


def _uncertain(
    inputs: Array, forecast: Forecast, y: Tensor, focus: str, feature_names: Sequence[str] | None
) -> Section:
    places = _spread(forecast).argsort(descending=True, stable=True)[:SHOWN].tolist()
    lower, upper = central_interval(forecast, coverage=COVERAGE)
    captions = [
        (f"{float(forecast.mean[i, 0]):.4g}", f"{float(forecast.std[i, 0]):.3g}", f"{float(y[i, 0]):.4g}")
        for i in places
    ]
    missed = [bool(((y[i] < lower[i]) | (y[i] > upper[i])).any()) for i in places]
    return Section(
        "Most uncertain examples",
        f"The examples of the largest standard deviation under {focus}, with the predicted mean, that deviation and "
        "the target. Orange: outside the 90 % interval.",
        lambda: examples(inputs, places, captions, ("mean", "std", "target"), missed, feature_names),
    )
