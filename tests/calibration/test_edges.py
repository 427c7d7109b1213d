"""Predictions at the edge of what is sensible: a defined value or a clear error, never NaN."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch.distributions import (
    AffineTransform,
    Cauchy,
    Exponential,
    HalfNormal,
    Laplace,
    LogNormal,
    SigmoidTransform,
    TransformedDistribution,
    Uniform,
)

from lapkit.calibration import (
    ClasswiseReliability,
    ConformalIntervals,
    EqualWidthReliability,
    IntervalScores,
    PinballLosses,
    Samples,
    SigmaScaling,
    SmoothCalibrationError,
    Streaming,
    TemperatureScaling,
    VectorScaling,
    accuracy,
    auroc,
    bootstrap_interval,
    brier,
    calibration_curve,
    consistency_test,
    crps,
    entropy,
    event,
    event_score_decomposition,
    expected_calibration_error,
    interval_width,
    mean_squared_z,
    nll,
    nll_from_logits,
    pit,
    predictive_nll,
    report,
    risk_coverage_curve,
    rmse,
    smooth_calibration_error,
    thresholded_adaptive_calibration_error,
    variance_calibration_error,
)


def problem(count=40, classes=3):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(count, classes, generator=generator, dtype=torch.float32).softmax(1)
    return p, torch.multinomial(p, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_taken_by_all_that_call_metrics(dtype):
    p, y = problem()
    p = p.to(dtype)
    assert bootstrap_interval(accuracy, p, y, resamples=3).value == accuracy(p, y)
    assert consistency_test(brier, p, y, resamples=3).value == brier(p, y)
    assert report({"MAP": p}, y, ood={"MAP": p}).rows["MAP"]["NLL"] == nll(p, y)


def test_lists():
    p, y = problem()
    p = p.double()
    assert bootstrap_interval(brier, p.tolist(), y.tolist(), resamples=3).value == brier(p, y)
    assert brier(p.tolist(), y.tolist()) == brier(p, y)


def test_arrays_that_are_reversed_or_of_the_other_byte_order():
    p, y = problem()
    expected = nll(p, y)
    assert nll(p.numpy()[::-1], y.numpy()[::-1]) == pytest.approx(expected, abs=1e-15)
    assert nll(p.numpy().astype(">f4"), y.numpy().astype(">i8")) == expected
    scores = np.sort(np.random.default_rng(0).normal(size=9))
    assert auroc(scores, scores[::-1] + 1) == auroc(scores, scores + 1)
    assert nll(p.numpy()[:1][::-1], y.numpy()[:1][::-1]) == nll(p[:1], y[:1])


def test_probabilities_a_little_above_one():
    p = torch.tensor([1.0005, 0.2], dtype=torch.float32)
    sure = torch.tensor([[1.0005, 0.0]], dtype=torch.float32)
    parts = event_score_decomposition(p, torch.tensor([1, 0]), score="log")
    assert parts.miscalibration == pytest.approx(-math.log(1 - 0.2) / 2, abs=1e-7)
    assert event_score_decomposition(p, torch.tensor([0, 0]), score="log").miscalibration == math.inf
    assert entropy(sure) == 0
    assert nll(sure, torch.tensor([0])) == 0
    assert SmoothCalibrationError(pairs=event)(p[:1], torch.tensor([0])) == 1
    assert smooth_calibration_error(sure, torch.tensor([1])) == 1
    assert "nan" not in report({"MAP": p}, torch.tensor([1, 0])).to_html()


def test_the_threshold_of_ace_at_many_classes():
    p, y = problem(50, 1000)
    assert 0 < thresholded_adaptive_calibration_error(p, y) < 1


def test_an_infinite_metric_has_no_bootstrap_interval():
    p, y = torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 1, 0, 0])
    with pytest.raises(ValueError, match="The metric is inf of the data"):
        bootstrap_interval(nll, p, y, resamples=5)


def test_coverage_at_a_risk_that_ties_share():
    for examples in range(2, 30):
        for wrong in range(examples):
            labels = (torch.arange(examples) < wrong).long()
            curve = risk_coverage_curve(torch.full((examples, 2), 0.5), labels)
            assert curve.coverage_at(wrong / examples) == 1


def test_samples_without_spread():
    draws, y = Samples(torch.zeros(5, 3)), torch.tensor([0.0, 1.0, 2.0])
    assert crps(draws, y) == 1
    assert variance_calibration_error(draws, y, relative=False) == pytest.approx(5 / 3)
    for score in (mean_squared_z, variance_calibration_error, SigmaScaling.fit, ConformalIntervals.fit):
        with pytest.raises(ValueError, match="standard deviation of example 0 is zero"):
            score(draws, y)
    lower, upper = ConformalIntervals.fit(draws, y, coverage=0.5, normalised=False)(draws)
    assert (upper - lower == 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("y", [0.001, 0.7, 20.0, 150.0, -150.0])
@pytest.mark.parametrize(
    ("kind", "parameters", "reference"),
    [
        (Laplace, (0.0, 1.0), stats.laplace),
        (Exponential, (1.0,), stats.expon),
        (HalfNormal, (1.0,), stats.halfnorm),
        (LogNormal, (0.0, 1.0), stats.lognorm(1)),
        (Cauchy, (0.0, 1.0), stats.cauchy),
    ],
)
def test_crps_where_the_distribution_function_is_zero_or_one_to_rounding(kind, parameters, reference, y, dtype):
    given = kind(*(torch.tensor([value], dtype=dtype) for value in parameters))
    if y < reference.support()[0]:
        return  # outside the support, which torch refuses
    expected = quad(lambda t: reference.cdf(t) ** 2, -np.inf, y, limit=1000)[0]
    expected += quad(lambda t: reference.sf(t) ** 2, y, np.inf, limit=1000)[0]
    assert crps(given, torch.tensor([y])) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_distributions_without_moments():
    cauchy, y = Cauchy(torch.zeros(2), torch.ones(2)), torch.tensor([0.0, 1.0])
    assert predictive_nll(cauchy, y) == pytest.approx(-stats.cauchy.logpdf(y.numpy()).mean(), abs=1e-6)
    assert pit(cauchy, y)[1] == pytest.approx(0.75)
    for score in (rmse, mean_squared_z):
        with pytest.raises(ValueError, match="Cauchy has no mean"):
            score(cauchy, y)
    base = Uniform(torch.zeros(2), torch.ones(2))
    logistic = TransformedDistribution(base, [SigmoidTransform().inv, AffineTransform(0.0, 1.0)])
    with pytest.raises(TypeError, match=r"has no mean in torch. Draw from it"):
        crps(logistic, y)


def test_temperatures_of_extreme_logits():
    with pytest.warns(UserWarning, match="all labels are the most probable classes"):
        assert TemperatureScaling.fit(torch.eye(3) * 1e6, torch.arange(3)).temperature == 0.01
    with pytest.warns(UserWarning, match="far too much"):
        assert TemperatureScaling.fit(torch.eye(3) * 1e6, torch.tensor([1, 2, 0])).temperature == 100
    with pytest.warns(UserWarning, match="all the same"):
        assert TemperatureScaling.fit(torch.full((4, 3), 1e6), torch.tensor([1, 2, 0, 0])).temperature == 1


def test_vector_scaling_finds_the_minimum_wherever_the_logits_lie():
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(200, 3, generator=generator, dtype=torch.float64)
    y = torch.multinomial((z / 2).softmax(1), 1, generator=generator)[:, 0]
    best = nll(VectorScaling.fit(z, y)(z), y)
    assert best < nll_from_logits(z, y)
    for moved in (z + 1e4, z - 1e6, z * 1e6, z * 1e-6 + 7):
        assert nll(VectorScaling.fit(moved, y)(moved), y) == pytest.approx(best, abs=1e-8)


def test_vector_scaling_says_that_a_class_is_missing():
    z = torch.randn(60, 3)
    with pytest.warns(UserWarning, match="1 of 3 classes have no held-out example"):
        scaling = VectorScaling.fit(z, torch.arange(60) % 2)
    assert (scaling(z)[:, 2] < 1e-6).all()


def test_vector_scaling_of_equal_logits_gives_the_frequencies_without_a_warning():
    scaling = VectorScaling.fit(torch.full((20, 3), 0.1), torch.arange(20) % 3)
    assert torch.allclose(scaling(torch.full((1, 3), 0.1)), torch.tensor([[0.35, 0.35, 0.3]]).double(), atol=1e-6)


def test_a_batch_of_other_classes_is_refused_and_leaves_the_stream():
    stream, (p, y) = Streaming(ClasswiseReliability(5)), problem()
    stream.update(p, y)
    with pytest.raises(ValueError, match="the same number of classes"):
        stream.update(torch.tensor([0.3, 0.6]), torch.tensor([0, 1]))
    assert stream.compute()[0].ece == ClasswiseReliability(5)(p, y)[0].ece
    other = Streaming(EqualWidthReliability(5))
    other.update(torch.tensor([0.3]), torch.tensor([1]))  # top labels of any number of classes go together
    other.update(p, y)
    assert other.compute().count.sum() == 41


def test_settings_and_bounds_that_would_give_nan():
    y = torch.zeros(2)
    with pytest.raises(ValueError, match="between 0 and 1"):
        IntervalScores(1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        PinballLosses(1.5)
    with pytest.raises(ValueError, match="ascending"):
        calibration_curve((y, 1.0), y, levels=[math.nan])
    with pytest.raises(ValueError, match="same infinity"):
        interval_width((y + math.inf, y + math.inf))
    assert interval_width((y - math.inf, y + math.inf)) == math.inf


def test_all_wrong_and_all_right():
    p, y = torch.eye(3)[torch.arange(9) % 3], torch.arange(9) % 3
    assert (expected_calibration_error(p, y), smooth_calibration_error(p, y), brier(p, y)) == (0, 0, 0)
    wrong = (y + 1) % 3
    assert (expected_calibration_error(p, wrong), smooth_calibration_error(p, wrong), brier(p, wrong)) == (1, 1, 2)
