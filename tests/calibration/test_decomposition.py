"""Decompositions add up to the score, and their parts are what direct sums and other forecasts say."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from sklearn.metrics import brier_score_loss, log_loss

from lapkit.calibration import (
    brier,
    brier_decomposition,
    event_reliability_curve,
    event_score_decomposition,
    murphy_decomposition,
)


def problem(kind="continuous", count=200, classes=3):
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(dim=1)
    if kind == "ties":
        p = (p * 5).round() + 1
        p = p / p.sum(dim=1, keepdim=True)
    return p, torch.multinomial(p**0.5, 1, generator=generator).squeeze(1)


def recalibrated(p, y):
    """Isotonic regression by scipy, of the mean outcome of equal forecasts with their number as weight."""
    _, group, count = np.unique(p, return_inverse=True, return_counts=True)
    means = np.bincount(group, weights=y) / count
    return isotonic_regression(means, weights=count).x[group]


@pytest.mark.parametrize("kind", ["continuous", "ties"])
@pytest.mark.parametrize("score", ["brier", "log"])
def test_parts_are_scores_of_forecasts(kind, score):
    p, y = problem(kind, classes=2)
    p, y = p[:, 1].numpy(), (y == 1).numpy()
    measure = {"brier": brier_score_loss, "log": lambda y, p: log_loss(y, p, labels=[0, 1])}[score]
    # log_loss cuts zeros off, which only meet outcomes that did not occur: no harm to 1e-12.
    best, climate = recalibrated(p, y), np.full(len(p), y.mean())
    parts = event_score_decomposition(p, y, score=score)
    assert parts.score == pytest.approx(measure(y, p), abs=1e-10)
    assert parts.miscalibration == pytest.approx(measure(y, p) - measure(y, best), abs=1e-10)
    assert parts.discrimination == pytest.approx(measure(y, climate) - measure(y, best), abs=1e-10)
    assert parts.uncertainty == pytest.approx(measure(y, climate), abs=1e-10)
    assert min(parts.miscalibration, parts.discrimination) >= 0


@pytest.mark.parametrize("kind", ["continuous", "ties"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_all_classes_add_up_to_the_brier_score(kind, classes):
    p, y = problem(kind, classes=classes)
    parts = brier_decomposition(p, y)
    singles = [event_score_decomposition(p[:, k], y == k) for k in range(classes)]
    for name in ("miscalibration", "discrimination", "uncertainty"):
        assert getattr(parts, name) == pytest.approx(sum(getattr(s, name) for s in singles), abs=1e-12)
    assert parts.score == pytest.approx(brier(p, y), abs=1e-12)
    assert murphy_decomposition(p, y, bins=7).score == pytest.approx(brier(p, y), abs=1e-12)


def test_murphys_parts_are_sums_over_bins():
    p, y = problem()
    found = murphy_decomposition(p, y, bins=6)
    totals = np.zeros(5)
    for k in range(3):
        forecast, outcome = p[:, k].numpy(), (y == k).double().numpy()
        base = outcome.mean()
        totals[2] += base * (1 - base)
        for m in range(6):
            inside = (forecast > m / 6) & (forecast <= (m + 1) / 6)
            if inside.any():
                f, o, weight = forecast[inside], outcome[inside], inside.mean()
                totals[0] += weight * (o.mean() - f.mean()) ** 2
                totals[1] += weight * (o.mean() - base) ** 2
                totals[3] += weight * ((f - f.mean()) ** 2).mean()
                totals[4] += weight * 2 * ((o - o.mean()) * (f - f.mean())).mean()
    parts = (found.reliability, found.resolution, found.uncertainty)
    assert (*parts, found.within_bin_variance, found.within_bin_covariance) == pytest.approx(totals, abs=1e-12)


def test_discrete_forecasts_hide_nothing_within_bins():
    p, y = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]).repeat(40), torch.arange(200) % 3 == 0
    found = murphy_decomposition(p, y.long(), bins=5)
    assert found.within_bin_variance == pytest.approx(0, abs=1e-15)
    assert found.within_bin_covariance == pytest.approx(0, abs=1e-15)
    rmsce = event_reliability_curve(p, y, bins=5).rmsce
    assert found.reliability == pytest.approx(2 * rmsce**2, abs=1e-9)


def test_extremes():
    alike = event_score_decomposition(torch.full((4,), 0.25), torch.tensor([1, 0, 0, 0]))
    assert (alike.miscalibration, alike.discrimination, alike.uncertainty) == (0, 0, 0.1875)
    perfect = event_score_decomposition(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), score="log")
    assert (perfect.score, perfect.discrimination) == (0, pytest.approx(math.log(2)))
    never = event_score_decomposition(torch.tensor([0.3, 0.6]), torch.tensor([0, 0]))
    assert (never.uncertainty, never.discrimination) == (0, 0)
    assert never.miscalibration == pytest.approx((0.09 + 0.36) / 2, abs=1e-7)
    impossible = event_score_decomposition(torch.tensor([0.0, 1.0]), torch.tensor([1, 1]), score="log")
    assert impossible.score == impossible.miscalibration == math.inf
    assert murphy_decomposition(torch.tensor([0.3]), torch.tensor([1])).score == pytest.approx(2 * 0.49, abs=1e-7)


def test_what_is_refused():
    p, y = torch.tensor([0.3, 0.6]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"score is 'crps', expected one of 'brier', 'log'"):
        event_score_decomposition(p, y, score="crps")
    with pytest.raises(ValueError, match=r"bins is -1, expected at least 1"):
        murphy_decomposition(p, y, bins=-1)
    with pytest.raises(ValueError, match=r"shape of probabilities is \(2, 2\), expected \(N,\)"):
        event_score_decomposition(torch.eye(2), y)
