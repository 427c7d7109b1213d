"""Scores of regressions against the committed oracle, scipy, quadrature and what the definitions say."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import (
    Categorical,
    Gumbel,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    StudentT,
)

from lapkit.calibration import (
    Samples,
    calibration_curve,
    central_interval,
    crps,
    interval_coverage,
    interval_score,
    interval_width,
    mae,
    mean_squared_z,
    pinball_loss,
    pit,
    pit_distance,
    pit_histogram,
    predictive_nll,
    quantile_calibration_error,
    quantiles,
    rmse,
    sharpness,
    variance_calibration_error,
)

ORACLE = json.loads((Path(__file__).parents[1] / "data" / "calibration.json").read_text())
MEAN, STD, Y = (torch.tensor(ORACLE["inputs"]["reg"][key], dtype=torch.float64) for key in ("mu", "sigma", "y"))
# 16 draws for each of the first 20 targets
DRAWS = torch.tensor(ORACLE["inputs"]["crps_samples"]["x"], dtype=torch.float64).T
GAUSSIAN = (MEAN, STD)


def case(metric, **arguments):
    found = [c for c in ORACLE["cases"] if c["metric"] == metric and c["args"] == arguments]
    assert len(found) == 1, (metric, arguments)
    return pytest.approx(found[0]["value"], rel=0, abs=found[0]["tol"])


def mixture():
    """Two Gaussians for each of four examples, and targets."""
    random = np.random.default_rng(0)
    weights, means = random.dirichlet([1, 1], 4), random.normal(size=(4, 2))
    stds, y = random.uniform(0.2, 1.5, (4, 2)), random.normal(size=4)
    return [torch.tensor(a) for a in (weights, means, stds, y)]


def test_oracle_scores():
    assert crps(GAUSSIAN, Y) == case("crps_gaussian_mean")
    assert crps(Samples(DRAWS), Y[:20]) == case("crps_ensemble_fair(1/m(m-1))_mean")
    assert pit_distance(GAUSSIAN, Y) == case("pit_ks_statistic")
    assert mean_squared_z(GAUSSIAN, Y) == case("mean_z2 (=MSE/var ratio; 1 if calibrated)")
    for level in (0.5, 0.9, 0.95):
        assert interval_width(central_interval(GAUSSIAN, coverage=level)) == case(
            "mean_prediction_interval_width", level=level
        )
        assert pinball_loss(GAUSSIAN, Y, level=level) == case("pinball_loss", q=level)


def test_oracle_calibration():
    hundred = [i / 99 for i in range(100)]
    assert quantile_calibration_error(GAUSSIAN, Y, levels=hundred) == case(
        "mean_abs_calibration_error_quantile(100 levels)", kind="quantile"
    )
    intervals = calibration_curve(GAUSSIAN, Y, levels=hundred, intervals=True)
    assert intervals.area == case("miscalibration_area_interval")
    name = "qce_interval_levels_linspace(.05,.95,15)_mean"
    levels = next(c["args"]["levels"] for c in ORACLE["cases"] if c["metric"] == name)
    assert calibration_curve(GAUSSIAN, Y, levels=levels, intervals=True).mean_error == case(name, levels=levels)
    for binning, metric in (("equal_width", "uce_equal_width_var_8bins"), ("equal_mass", "uce_equal_mass_8bins")):
        found = variance_calibration_error(GAUSSIAN, Y, bins=8, binning=binning, relative=False)
        assert found == case(metric, bins=8)


def test_the_nll_is_scipys_for_one_target_and_several():
    assert predictive_nll(GAUSSIAN, Y) == pytest.approx(-stats.norm(MEAN, STD).logpdf(Y).mean(), abs=1e-12)
    mean, y, root = torch.randn(5, 3), torch.randn(5, 3), torch.randn(5, 3, 3)
    covariance = root @ root.mT + torch.eye(3)
    expected = [-stats.multivariate_normal(*row[:2]).logpdf(row[2]) for row in zip(mean, covariance, y, strict=True)]
    joint = MultivariateNormal(mean, covariance)
    assert predictive_nll(joint, y) == pytest.approx(np.mean(expected), abs=1e-12)
    spread = covariance.diagonal(dim1=1, dim2=2).sqrt()
    apart = -stats.norm(mean, spread).logpdf(y).sum(1).mean()
    for independent in ((mean, spread), Normal(mean, spread), Independent(Normal(mean, spread), 1)):
        assert predictive_nll(independent, y) == pytest.approx(apart, abs=1e-12)
    assert crps(joint, y) == pytest.approx(crps((mean, spread), y), abs=1e-14)  # of each target by itself


def crps_by_quadrature(cdf, y):
    below = integrate.quad(lambda t: cdf(t) ** 2, y - 40, y, epsabs=1e-12, limit=200)[0]
    return below + integrate.quad(lambda t: (1 - cdf(t)) ** 2, y, y + 40, epsabs=1e-12, limit=200)[0]


def test_the_crps_is_the_integral_that_defines_it():
    for m, s, y in zip(MEAN[:5].tolist(), STD[:5].tolist(), Y[:5].tolist(), strict=True):
        expected = crps_by_quadrature(stats.norm(m, s).cdf, y)
        assert crps((torch.tensor([m]), torch.tensor([s])), torch.tensor([y])) == pytest.approx(expected, abs=1e-9)


def test_a_mixture_has_its_own_crps_quantiles_density_and_moments():
    weights, means, stds, y = mixture()
    for parts in (
        Normal(means, stds),
        Independent(Normal(means[..., None], stds[..., None]), 1),
        MultivariateNormal(means[..., None], torch.diag_embed(stds[..., None] ** 2)),
    ):
        given = MixtureSameFamily(Categorical(weights), parts)
        for n in range(4):

            def cdf(t, n=n):
                return float(weights[n].numpy() @ stats.norm(means[n].numpy(), stds[n].numpy()).cdf(t))

            one = MixtureSameFamily(Categorical(weights[n : n + 1]), Normal(means[n : n + 1], stds[n : n + 1]))
            assert crps(one, y[n : n + 1]) == pytest.approx(crps_by_quadrature(cdf, float(y[n])), abs=1e-8)
            assert cdf(float(quantiles(given, 0.3)[n])) == pytest.approx(0.3, abs=1e-12)
        density = (weights.numpy() * stats.norm(means.numpy(), stds.numpy()).pdf(y[:, None].numpy())).sum(1)
        assert predictive_nll(given, y) == pytest.approx(-np.log(density).mean(), abs=1e-12)
        assert rmse(given, y) == pytest.approx(rmse((weights * means).sum(1), y), abs=1e-12)
        assert sharpness(given) == pytest.approx(float(given.variance.mean().sqrt()), abs=1e-12)


@pytest.mark.parametrize(("kind", "peer"), [(Laplace, stats.laplace), (Gumbel, stats.gumbel_r)])
def test_other_distributions_of_torch(kind, peer):
    for shape in ((6,), (3, 2)):
        location, scale, y = torch.randn(shape), torch.rand(shape) + 0.3, torch.randn(shape)
        given, frozen = kind(location, scale), peer(location, scale)
        each = -frozen.logpdf(y).reshape(len(y), -1).sum(1)
        assert predictive_nll(given, y) == pytest.approx(each.mean(), abs=1e-12)
        assert pit(given, y).numpy() == pytest.approx(frozen.cdf(y), abs=1e-12)
        assert quantiles(given, 0.2).numpy() == pytest.approx(frozen.ppf(0.2), abs=1e-12)
        triples = torch.stack((location, scale, y)).flatten(1).T.tolist()
        one = [crps_by_quadrature(peer(m, s).cdf, t) for m, s, t in triples]
        assert crps(given, y) == pytest.approx(np.mean(one), abs=1e-6)


def test_without_a_distribution_function_the_density_and_the_mean_remain():
    given, y = StudentT(5.0, torch.randn(4), 1.0), torch.randn(4)
    assert predictive_nll(given, y) == pytest.approx(-float(given.log_prob(y).mean()))
    assert rmse(given, y) == rmse(given.mean, y)
    for score in (crps, pit):
        with pytest.raises(TypeError, match=r"Samples\(distribution\.sample"):
            score(given, y)


def test_samples_are_scored_by_all_pairs():
    draws, y = torch.randn(7, 5, 2), torch.randn(5, 2)
    near = (draws - y).abs().mean(0)
    pairs = (draws[:, None] - draws).abs().sum((0, 1))
    assert crps(Samples(draws, fair=False), y) == pytest.approx(float((near - pairs / 98).mean()), abs=1e-12)
    assert crps(Samples(draws), y) == pytest.approx(float((near - pairs / 84).mean()), abs=1e-12)
    assert rmse(Samples(draws), y) == pytest.approx(float((draws.mean(0) - y).square().mean().sqrt()), abs=1e-12)
    assert sharpness(Samples(draws)) == pytest.approx(float(draws.var(0).mean().sqrt()), abs=1e-12)
    for level in (0.01, 0.5, 0.77):
        assert quantiles(Samples(draws), level).numpy() == pytest.approx(np.quantile(draws, level, axis=0), abs=1e-12)
    assert pit(Samples(torch.tensor([[1.0], [2.0], [2.0]])), torch.tensor([2.0])).item() == pytest.approx(2.5 / 4)
    with pytest.raises(TypeError, match="no density"):
        predictive_nll(Samples(draws), y)


def test_fair_samples_are_right_on_average_whatever_their_number():
    generator = torch.Generator().manual_seed(1)
    y, draws = torch.full((20_000,), 0.4), torch.randn(3, 20_000, generator=generator)
    true = crps((torch.zeros(1), 1.0), torch.tensor([0.4]))
    assert crps(Samples(draws), y) == pytest.approx(true, abs=0.015)
    assert crps(Samples(draws, fair=False), y) > true + 0.1


def test_intervals():
    lower, upper = central_interval(GAUSSIAN, coverage=0.8)
    low, high = stats.norm(MEAN, STD).interval(0.8)
    assert lower.numpy() == pytest.approx(low, abs=1e-12)
    assert upper.numpy() == pytest.approx(high, abs=1e-12)
    y = Y.numpy()
    inside = (low <= y) & (y <= high)
    assert interval_coverage((lower, upper), Y) == inside.mean()
    score = np.where(inside, high - low, (high - low) + 2 / 0.2 * np.maximum(low - y, y - high))
    assert interval_score((lower, upper), Y, coverage=0.8) == pytest.approx(score.mean(), abs=1e-12)
    everything = (torch.full((1,), -math.inf), torch.full((1,), math.inf))
    assert interval_coverage(everything, torch.tensor([3.0])) == 1
    assert interval_score(everything, torch.tensor([3.0]), coverage=0.5) == math.inf


def test_the_pit_of_the_truth_is_uniform_and_that_of_the_overconfident_is_not():
    generator = torch.Generator().manual_seed(2)
    mean, y = torch.randn(4000, generator=generator), None
    y = mean + 2 * torch.randn(4000, generator=generator)
    right, narrow = (mean, 2.0), (mean, 1.0)
    assert pit_distance(right, y) == pytest.approx(stats.kstest(pit(right, y), "uniform").statistic, abs=1e-12)
    assert pit_distance(right, y) < 1.36 / math.sqrt(4000) < pit_distance(narrow, y)
    flat, u_shaped = pit_histogram(right, y, bins=8), pit_histogram(narrow, y, bins=8)
    low, high = flat.band
    assert (int(stats.binom.ppf(0.025, 4000, 1 / 8)), int(stats.binom.ppf(0.975, 4000, 1 / 8))) == (low, high)
    assert ((flat.count < low) | (flat.count > high)).sum() <= 1
    assert u_shaped.count[0] > high
    assert u_shaped.count[4] < low
    assert flat.count.sum() == 4000
    assert quantile_calibration_error(right, y) < 0.01 < 0.1 < quantile_calibration_error(narrow, y)
    assert mean_squared_z(right, y) == pytest.approx(1, abs=0.1)
    # A single bin of variance compares the two averages.
    ratio = variance_calibration_error(narrow, y, bins=1)
    assert ratio == pytest.approx(abs(1 - rmse(mean, y)), abs=1e-12)


def test_the_distance_is_seen_from_both_sides_and_ties_count_as_below():
    for y in (torch.tensor([1.0, 1.5, 2.0]), -torch.tensor([1.0, 1.5, 2.0])):
        u = pit((torch.zeros(3), 1.0), y)
        assert pit_distance((torch.zeros(3), 1.0), y) == pytest.approx(stats.kstest(u, "uniform").statistic, abs=1e-12)
    at_the_median = calibration_curve((torch.zeros(2), 1.0), torch.tensor([0.0, 1.0]), levels=[0.5])
    assert at_the_median.observed.tolist() == [0.5]


def test_the_median_absolute_error_is_twice_the_pinball_loss_at_one_half():
    assert 2 * pinball_loss(GAUSSIAN, Y, level=0.5) == pytest.approx(mae(GAUSSIAN, Y), abs=1e-12)
    assert mae(MEAN.numpy(), Y.numpy()) == mae(GAUSSIAN, Y)


@pytest.mark.peer("scoringrules")
def test_scoringrules_agrees():
    scoringrules = pytest.importorskip("scoringrules")
    m, s, y = MEAN.numpy(), STD.numpy(), Y.numpy()
    assert crps(GAUSSIAN, Y) == pytest.approx(scoringrules.crps_normal(y, m, s).mean(), abs=1e-10)
    for fair, estimator in ((True, "fair"), (False, "nrg")):
        expected = scoringrules.crps_ensemble(y[:20], DRAWS.numpy().T, estimator=estimator).mean()
        assert crps(Samples(DRAWS, fair=fair), Y[:20]) == pytest.approx(expected, abs=1e-10)
    low, high = (end.numpy() for end in central_interval(GAUSSIAN, coverage=0.9))
    expected = scoringrules.interval_score(y, low, high, 0.1).mean()  # takes alpha
    assert interval_score((low, high), Y, coverage=0.9) == pytest.approx(expected, abs=1e-10)
