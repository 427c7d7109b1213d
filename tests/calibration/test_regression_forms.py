"""Batches give the number of all data; predictions and targets that do not fit are refused and say why."""

import math

import pytest
import torch
from torch.distributions import MixtureSameFamily, Normal, StudentT

from lapkit.calibration import (
    CalibrationCounts,
    IntervalScores,
    PinballLosses,
    PITCounts,
    PITDistance,
    Samples,
    VarianceCalibration,
    absolute_errors,
    calibration_curve,
    central_interval,
    covered,
    crps,
    crps_scores,
    density_losses,
    interval_score,
    mae,
    pit_histogram,
    predictive_nll,
    quantiles,
    rmse,
    squared_errors,
    squared_z_scores,
    variance_calibration_error,
)
from lapkit.calibration.metrics import Mean
from lapkit.calibration.streaming import Streaming

GAUSSIAN_METRICS = [
    Mean(density_losses),
    Mean(crps_scores),
    Mean(squared_errors, then=math.sqrt),
    Mean(absolute_errors),
    Mean(squared_z_scores),
    Mean(PinballLosses(0.3)),
    PITDistance(),
    VarianceCalibration(5),
    VarianceCalibration(5, "equal_width", relative=False),
]


def problem(outputs=()):
    mean, std = torch.randn(53, *outputs), torch.rand(53, *outputs) + 0.2
    return mean, std, mean + std * torch.randn(53, *outputs)


@pytest.mark.parametrize("metric", GAUSSIAN_METRICS, ids=lambda metric: type(metric).__name__)
@pytest.mark.parametrize("outputs", [(), (2,)])
def test_batches_give_the_number_of_all_data(metric, outputs):
    mean, std, y = problem(outputs)
    expected = metric((mean, std), y)
    for size in (1, 7, 53):
        stream = Streaming(metric)
        for part in torch.arange(53).split(size):
            stream.update((mean[part], std[part]), y[part])
        assert stream.compute() == pytest.approx(expected, abs=1e-12)


def test_curves_and_intervals_stream_too():
    mean, std, y = problem()
    curves, counts, scores, inside = (
        Streaming(m)
        for m in (CalibrationCounts(intervals=True), PITCounts(4), Mean(IntervalScores(0.8)), Mean(covered))
    )
    for part in torch.arange(53).split(10):
        given = (mean[part], std[part])
        bounds = central_interval(given, coverage=0.8)
        curves.update(given, y[part])
        counts.update(given, y[part])
        scores.update(bounds, y[part])
        inside.update(bounds, y[part])
    whole = central_interval((mean, std), coverage=0.8)
    assert torch.equal(curves.compute().observed, calibration_curve((mean, std), y, intervals=True).observed)
    assert torch.equal(counts.compute().count, pit_histogram((mean, std), y, bins=4).count)
    assert scores.compute() == pytest.approx(interval_score(whole, y, coverage=0.8), abs=1e-12)
    assert inside.compute() == pytest.approx(float(covered(whole, y).mean()), abs=1e-15)


def test_forms_of_one_prediction_agree():
    mean, std, y = problem()
    expected = crps((mean, std), y)
    for given in (
        (mean[:, None], std),
        (mean.numpy(), std.numpy()),
        Normal(mean, std),
        Normal(mean[:, None], std[:, None]),
    ):
        assert crps(given, y) == expected
        assert crps(given, y[:, None]) == expected
    assert crps((mean, 0.5), y) == crps((mean, torch.full_like(mean, 0.5)), y)
    assert crps((mean.float(), std.float()), y.float()) == pytest.approx(expected, abs=1e-6)


def test_the_error_of_a_curve_that_crosses_the_diagonal_is_two_triangles():
    given, y = (torch.zeros(4), 1.0), torch.tensor([-0.1, 0.1, -0.1, 0.1])
    curve = calibration_curve(given, y, levels=[0.25, 0.75])  # observed 0 and 1
    assert curve.area == pytest.approx(2 * 0.25 * 0.25 / 2)
    assert (curve.mean_error, curve.rms_error, curve.max_error) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("prediction", "targets", "words"),
    [
        ((torch.zeros(3), 1.0), torch.zeros(3, 2), r"shape of targets is \(3, 2\).*Nothing is broadcast"),
        ((torch.zeros(3), 1.0), torch.zeros(1), "Nothing is broadcast"),
        ((torch.zeros(3), torch.ones(1)), torch.zeros(3), "shape of std"),
        ((torch.zeros(3), 0.0), torch.zeros(3), "smallest standard deviation is 0"),
        ((torch.tensor([0.0, math.nan]), 1.0), torch.zeros(2), "mean at .1,. is nan"),
        ((torch.zeros(2), 1.0), torch.tensor([0.0, math.inf]), "targets at .1,. is inf"),
        ((torch.zeros(0), 1.0), torch.zeros(0), "N > 0"),
        ((torch.zeros(2, 2, 2), 1.0), torch.zeros(2, 2, 2), "Flatten"),
        (Normal(torch.zeros(2, 2, 2), 1.0), torch.zeros(2, 2, 2), "Flatten"),
        (StudentT(torch.ones(2, 2, 2)), torch.zeros(2, 2, 2), "batch shape"),
    ],
)
def test_what_does_not_fit_is_refused(prediction, targets, words):
    with pytest.raises(ValueError, match=words):
        crps(prediction, targets)


def test_other_errors_say_what_is_expected():
    y = torch.zeros(2)
    with pytest.raises(TypeError, match=r"is a Tensor, expected a pair \(mean, std\)"):
        crps(torch.zeros(2), y)
    mixture = MixtureSameFamily(torch.distributions.Categorical(torch.ones(2, 2)), StudentT(torch.ones(2, 2)))
    with pytest.raises(TypeError, match="mixture of StudentT"):
        predictive_nll(mixture, y)
    with pytest.raises(ValueError, match=r"\(S, N\)"):
        Samples(torch.zeros(1, 3))
    with pytest.raises(TypeError, match="real numbers"):
        mae(torch.zeros(2), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        quantiles((y, 1.0), 95)
    with pytest.raises(ValueError, match=r"coverage is 1\.5"):
        interval_score((y, y), y, coverage=1.5)
    with pytest.raises(ValueError, match="above its upper end"):
        interval_score((y + 1, y), y, coverage=0.5)
    with pytest.raises(ValueError, match=r"above its upper end|is nan"):
        interval_score((y * math.nan, y), y, coverage=0.5)
    with pytest.raises(ValueError, match="expected the same"):
        interval_score((y[:1], y), y, coverage=0.5)
    with pytest.raises(ValueError, match="ascending"):
        calibration_curve((y, 1.0), y, levels=[0.5, 0.1])
    with pytest.raises(ValueError, match="bins is 0"):
        pit_histogram((y, 1.0), y, bins=0)


def test_equal_variances_are_one_bin():
    y = torch.tensor([1.0, -1.0, 1.0])
    assert variance_calibration_error((torch.zeros(3), 2.0), y, binning="equal_width") == pytest.approx(0.5)
    assert rmse(Samples(torch.zeros(2, 3)), y) == 1
