"""Bootstrap intervals hold the truth as often as they say, and calibrated models pass the test of calibration."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lapkit.calibration import (
    SmoothCalibrationError,
    accuracy,
    bootstrap_interval,
    brier,
    consistency_test,
    event,
    event_reliability_curve,
    expected_calibration_error,
    reliability_curve,
)


def calibrated(count, seed, sharpness=2.0):
    generator = torch.Generator().manual_seed(seed)
    p = (sharpness * torch.randn(count, 3, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return p, torch.multinomial(p, 1, generator=generator).squeeze(1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_bootstrap_of_a_mean_has_its_standard_error():
    p, y = calibrated(400, 0)
    found = bootstrap_interval(brier, p, y, resamples=1000, generator=seeded())
    squares = [brier(p[n : n + 1], y[n : n + 1]) for n in range(400)]
    error = np.std(squares) / math.sqrt(400)
    assert found.value == pytest.approx(np.mean(squares), abs=1e-12)
    assert (found.upper - found.lower) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_bootstrap_agrees_with_scipy():
    p, y = calibrated(60, 1)
    table = p.numpy()

    def resampled(index):
        return accuracy(table[index], y.numpy()[index])

    for method in ("basic", "percentile"):
        found = bootstrap_interval(accuracy, table, y.numpy(), resamples=1500, method=method, generator=seeded())
        known = stats.bootstrap((np.arange(60),), resampled, vectorized=False, method=method, n_resamples=1500)
        ends = known.confidence_interval
        assert (found.lower, found.upper) == pytest.approx((ends.low, ends.high), abs=0.021)


def test_the_basic_interval_makes_good_for_the_bias_of_calibration_errors():
    hits = {"basic": 0, "percentile": 0}
    for seed in range(20):
        p, y = calibrated(300, seed)
        for method in hits:
            options = {"method": method, "resamples": 60, "generator": seeded(seed)}
            hits[method] += bootstrap_interval(expected_calibration_error, p, y, **options).lower <= 0.01
    # The true error is zero.
    assert hits["basic"] >= 12
    assert hits["percentile"] <= 2


def test_one_column_stays_one():
    p, y = torch.tensor([0.2, 0.6, 0.9, 0.7]), torch.tensor([0, 1, 1, 0])
    found = bootstrap_interval(SmoothCalibrationError(pairs=event), p, y, resamples=20, generator=seeded())
    assert found.value == SmoothCalibrationError(pairs=event)(p, y)
    tested = consistency_test(SmoothCalibrationError(pairs=event), p[:, None], y, resamples=20, generator=seeded())
    assert tested.value == found.value


def test_the_same_generator_gives_the_same_interval():
    p, y = calibrated(50, 2)
    for function in (bootstrap_interval, consistency_test):
        first, again, other = (
            function(expected_calibration_error, p, y, resamples=30, generator=seeded(seed)) for seed in (3, 3, 4)
        )
        assert first == again != other


def test_a_calibrated_model_passes_as_often_as_it_should():
    tests = []
    for seed in range(60):
        p, y = calibrated(100, seed)
        tests.append(consistency_test(expected_calibration_error, p, y, resamples=60, generator=seeded(seed)))
    # Uniform p-values: the share below u is u, within the binomial scatter of 60 of them.
    assert stats.kstest([test.p_value for test in tests], "uniform").pvalue > 0.01
    assert sum(test.value > test.upper for test in tests) <= 8
    errors = [test.value for test in tests]
    scatter = np.std(errors) / math.sqrt(60)
    assert np.mean(errors) == pytest.approx(np.mean([test.expected for test in tests]), abs=4 * scatter)


def test_an_overconfident_model_fails():
    p, y = calibrated(500, 0)
    sharp = p**3 / (p**3).sum(dim=1, keepdim=True)
    found = consistency_test(expected_calibration_error, sharp, y, resamples=99, generator=seeded())
    assert found.p_value == 0.01
    assert found.value > 2 * found.upper > 2 * found.expected
    assert str(found) == f"{found.value:.4g} ({found.expected:.4g} by chance, p = 0.01)"


def test_chance_agrees_with_the_formula_of_the_curve():
    p, y = calibrated(3000, 5)
    found = consistency_test(expected_calibration_error, p, y, resamples=100, generator=seeded())
    assert found.expected == pytest.approx(reliability_curve(p, y).expected_by_chance, rel=0.1)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_bands_are_binomial_quantiles(level):
    p = torch.tensor([0.2, 0.3, 0.8]).repeat_interleave(torch.tensor([30, 10, 7]))
    curve = event_reliability_curve(p, torch.arange(47) % 2 == 0, bins=10)
    lower, upper = curve.consistency_band(level)
    for m, (n, chance) in {1: (30, 0.2), 2: (10, 0.3), 7: (7, 0.8)}.items():
        inside = [k for k in range(n + 1) if lower[m] - 1e-9 <= k / n <= upper[m] + 1e-9]
        assert stats.binom.pmf(inside, n, chance).sum() >= level
        assert stats.binom.cdf(inside[0] - 1, n, chance) <= (1 - level) / 2
        assert stats.binom.cdf(inside[0], n, chance) > (1 - level) / 2 - 1e-9
        assert stats.binom.sf(inside[-1], n, chance) <= (1 - level) / 2
        assert stats.binom.sf(inside[-1] - 1, n, chance) > (1 - level) / 2 - 1e-9
    assert lower.isnan().tolist() == upper.isnan().tolist() == (curve.count == 0).tolist()


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_of_accuracies_are_exact(level):
    p = torch.tensor([0.15, 0.35, 0.55, 0.75]).repeat_interleave(torch.tensor([12, 5, 9, 1]))
    occurred = torch.cat((torch.zeros(12), torch.ones(5), torch.arange(9) % 3 == 0, torch.ones(1))) > 0
    curve = event_reliability_curve(p, occurred, bins=10)
    lower, upper = curve.accuracy_interval(level)
    for m, (k, n) in {1: (0, 12), 3: (5, 5), 5: (3, 9), 7: (1, 1)}.items():
        known = stats.binomtest(k, n).proportion_ci(level, method="exact")
        assert (lower[m].item(), upper[m].item()) == pytest.approx((known.low, known.high), abs=1e-12)
    assert lower.isnan().tolist() == upper.isnan().tolist() == (curve.count == 0).tolist()


def test_a_band_of_the_diagram_is_that_of_the_curve():
    import matplotlib as mpl

    mpl.use("agg")
    curve = reliability_curve(*calibrated(200, 0), bins=5)
    ax = curve.plot(band=0.9)
    (bars,) = [container for container in ax.containers if container.get_label() == "if calibrated"]
    segments = np.array(bars.lines[2][0].get_segments())
    filled = curve.count > 0
    for end, ends in zip((0, 1), curve.consistency_band(0.9), strict=True):
        np.testing.assert_allclose(segments[:, end, 1], ends[filled].numpy(), atol=1e-12)
    mpl.pyplot.close(ax.figure)


def test_what_is_refused():
    p, y = calibrated(10, 0)
    curve = reliability_curve(p, y)
    for level in (0, 1, -0.5, math.nan, 95):
        for function in (bootstrap_interval, consistency_test):
            with pytest.raises(ValueError, match=r"level is .*, expected a probability between 0 and 1"):
                function(accuracy, p, y, level=level, resamples=2)
        for function in (curve.consistency_band, curve.accuracy_interval):
            with pytest.raises(ValueError, match=r"level is .*, expected a probability between 0 and 1"):
                function(level)
    with pytest.raises(ValueError, match=r"method is 'bca', expected 'basic' or 'percentile'"):
        bootstrap_interval(accuracy, p, y, method="bca")
    for function in (bootstrap_interval, consistency_test):
        with pytest.raises(ValueError, match=r"resamples is 1, expected at least 2"):
            function(accuracy, p, y, resamples=1)
        with pytest.raises(ValueError, match=r"labels range from"):
            function(accuracy, p, y + 3)
