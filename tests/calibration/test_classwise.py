"""Calibration errors over all classes against the curves of one class at a time and against loops."""

import math

import numpy as np
import pytest
import torch

from lapkit.calibration import (
    adaptive_calibration_error,
    classwise_calibration_error,
    classwise_reliability_curves,
    debiased_classwise_calibration_error,
    event_reliability_curve,
    thresholded_adaptive_calibration_error,
)

BINNINGS = ["equal_width", "equal_mass"]


def problem(count=300, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(count, classes, generator=generator)).softmax(dim=1)
    return p, torch.randint(classes, (count,), generator=generator)


def single_curves(p, y, bins, binning):
    return [event_reliability_curve(p[:, k], y == k, bins=bins, binning=binning) for k in range(p.shape[1])]


@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize("classes", [2, 4, 30])
def test_curves_are_those_of_each_class_by_itself(binning, classes):
    p, y = problem(classes=classes)
    curves = classwise_reliability_curves(p, y, bins=6, binning=binning)
    assert len(curves) == classes
    for curve, single in zip(curves, single_curves(p, y, 6, binning), strict=True):
        torch.testing.assert_close(curve.edges, single.edges)
        assert torch.equal(curve.count, single.count)
        torch.testing.assert_close(curve.confidence, single.confidence, equal_nan=True)
        torch.testing.assert_close(curve.accuracy, single.accuracy, equal_nan=True)


@pytest.mark.parametrize("binning", BINNINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_classwise_error_is_the_power_mean_over_classes(binning, order):
    p, y = problem()
    powers = [c.calibration_error(order) ** order for c in single_curves(p, y, 8, binning)]
    options = {"order": order, "bins": 8, "binning": binning}
    assert classwise_calibration_error(p, y, **options) == pytest.approx(np.mean(powers) ** (1 / order), abs=1e-13)
    total = classwise_calibration_error(p, y, reduction="sum", **options)
    assert total == pytest.approx(sum(powers) ** (1 / order), abs=1e-13)


@pytest.mark.parametrize("binning", BINNINGS)
def test_debiased_classwise_error(binning):
    p, y = problem(seed=3)
    squares = []
    for curve in single_curves(p, y, 5, binning):
        several = [m for m in range(5) if curve.count[m] > 1]
        n, acc, conf = (getattr(curve, name).numpy() for name in ("count", "accuracy", "confidence"))
        terms = [n[m] * ((acc[m] - conf[m]) ** 2 - acc[m] * (1 - acc[m]) / (n[m] - 1)) for m in several]
        squares.append(max(0, sum(terms) / len(p)))
    expected = math.sqrt(np.mean(squares))
    found = debiased_classwise_calibration_error(p, y, bins=5, binning=binning)
    assert found == pytest.approx(expected, abs=1e-13)
    assert 0 < found < classwise_calibration_error(p, y, order=2, bins=5, binning=binning)


def loop_adaptive(p, y, bins, threshold):
    """Mean gap over classes and parts of equal size, of the probabilities above a threshold."""
    gaps = []
    for k in range(p.shape[1]):
        chosen = [n for n in range(len(p)) if p[n, k] > threshold]
        order = sorted(chosen, key=lambda n: p[n, k])
        parts = [part for part in np.array_split(np.array(order, dtype=int), bins) if len(part)]
        gaps += [abs(p[part, k].mean().item() - (y[part] == k).double().mean().item()) for part in parts]
    return np.mean(gaps)


@pytest.mark.parametrize("count", [3, 100])
@pytest.mark.parametrize("bins", [1, 7])
def test_adaptive_errors_agree_with_the_loop(bins, count):
    p, y = problem(count)
    p = p.double()
    found = adaptive_calibration_error(p, y, bins=bins)
    assert found == pytest.approx(loop_adaptive(p, y, bins, -1), abs=1e-13)
    for threshold in [0.0, 1e-3, 0.05, 0.2]:
        found = thresholded_adaptive_calibration_error(p, y, bins=bins, threshold=threshold)
        assert found == pytest.approx(loop_adaptive(p, y, bins, threshold), abs=1e-13)


def test_a_class_without_a_probability_above_the_threshold_does_not_count():
    p = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0]])
    y = torch.tensor([0, 1])
    expected = (0.3 + 0.4 + 0.3 + 0.4) / 4
    assert thresholded_adaptive_calibration_error(p, y, bins=2) == pytest.approx(expected, abs=1e-7)
    # Without a threshold its bins count, with a gap of zero; both its probabilities are equal and share a bin.
    assert adaptive_calibration_error(p, y, bins=2) == pytest.approx((0.3 + 0.4 + 0.3 + 0.4) / 5, abs=1e-7)


def test_one_column_is_two_classes():
    p, y = problem(classes=2)
    assert classwise_calibration_error(p[:, 1], y) == pytest.approx(classwise_calibration_error(p, y), abs=1e-7)


def test_what_is_refused():
    p, y = problem(10)
    with pytest.raises(ValueError, match=r"binning is 'equal', expected one of 'equal_width', 'equal_mass'"):
        classwise_reliability_curves(p, y, binning="equal")
    with pytest.raises(ValueError, match=r"reduction is 'max', expected 'mean' or 'sum'"):
        classwise_calibration_error(p, y, reduction="max")
    for order in [0.5, math.inf, math.nan]:
        with pytest.raises(ValueError, match=r"order is .*, expected a finite one"):
            classwise_calibration_error(p, y, order=order)
    for threshold in [-0.1, 1.0, math.nan]:
        with pytest.raises(ValueError, match=r"threshold is .*, expected one from 0 to less than 1,"):
            thresholded_adaptive_calibration_error(p, y, threshold=threshold)
    with pytest.raises(ValueError, match=r"threshold is 0\.99999, and no probability is above it"):
        thresholded_adaptive_calibration_error(p, y, threshold=0.99999)
    for function in (adaptive_calibration_error, classwise_calibration_error, debiased_classwise_calibration_error):
        with pytest.raises(ValueError, match=r"bins is 0, expected at least 1"):
            function(p, y, bins=0)
        with pytest.raises(ValueError, match=r"labels range from 0 to 4"):
            function(p, torch.arange(10) % 5)
