"""Errors that make good for chance: by simulation, and the sweep against a loop over numbers of bins."""

import itertools
import math

import numpy as np
import pytest
import torch

from lapkit.calibration import (
    debiased_calibration_error,
    event_reliability_curve,
    reliability_curve,
    sweep_calibration_error,
)
from lapkit.calibration.debiased import monotone_bins, swept_error


def calibrated(count, seed):
    generator = torch.Generator().manual_seed(seed)
    p = (2 * torch.randn(count, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return p, torch.multinomial(p, 1, generator=generator).squeeze(1)


def test_by_hand():
    p = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.9])
    curve = event_reliability_curve(p, torch.tensor([0, 0, 0, 1, 1]), bins=2)
    # The bin of a single example adds nothing.
    expected = 4 / 5 * (0.05**2 - 0.25 * 0.75 / 3)
    assert curve.debiased_squared_error == pytest.approx(expected, abs=1e-8)
    assert curve.debiased_rmsce == 0
    assert curve.average_calibration_error == pytest.approx((0.05 + 0.1) / 2, abs=1e-7)


def test_the_square_of_a_calibrated_model_has_mean_zero():
    curves = [reliability_curve(*calibrated(300, seed), binning="equal_mass") for seed in range(400)]
    squares = np.array([curve.debiased_squared_error for curve in curves])
    error = squares.std() / math.sqrt(len(squares))
    assert abs(squares.mean()) < 3 * error
    # The plain square is far from zero on the same scale.
    assert np.mean([curve.rmsce**2 for curve in curves]) > 30 * error


def test_a_miscalibrated_model_shows_its_own_error():
    # Confidence 0.8 and accuracy 0.7: a true error of 0.1, which the plain one overstates.
    generator = torch.Generator().manual_seed(0)
    p = 0.8 + 1e-6 * torch.rand(200, generator=generator, dtype=torch.float64)
    table = torch.stack((1 - p, p), dim=1)
    plain, debiased = [], []
    for _ in range(300):
        y = (torch.rand(200, generator=generator) < 0.7).long()
        plain.append(reliability_curve(table, y, binning="equal_mass").rmsce ** 2)
        debiased.append(reliability_curve(table, y, binning="equal_mass").debiased_squared_error)
    assert np.mean(debiased) == pytest.approx(0.01, abs=3 * np.std(debiased) / math.sqrt(300))
    assert np.mean(plain) > 0.02


def loop_sweep(confidence, outcome):
    """One number of bins after the other; equals go to the part of the middle one of them."""
    order = sorted(range(len(confidence)), key=lambda n: confidence[n])
    groups = {}
    for rank, n in enumerate(order):
        groups.setdefault(confidence[n], []).append((rank, outcome[n]))

    def bins_of(number):
        home = {rank: m for m, part in enumerate(np.array_split(range(len(order)), number)) for rank in part}
        bins = [[] for _ in range(number)]
        for value, members in groups.items():
            middle = members[(len(members) - 1) // 2][0]
            bins[home[middle]] += [(value, o) for _, o in members]
        return [(np.mean([c for c, _ in b]), np.mean([o for _, o in b]), len(b)) for b in bins if b]

    def rising(bins):
        return all(after[1] >= before[1] - 1e-12 for before, after in itertools.pairwise(bins))

    best = bins_of(1)
    for number in range(2, len(order) + 1):
        if not rising(bins_of(number)):
            break
        best = bins_of(number)
    return sum(n * abs(a - c) for c, a, n in best) / len(order)


@pytest.mark.parametrize("lattice", [None, 7, 20], ids=["all different", "many ties", "ties"])
@pytest.mark.parametrize("sharp", [1, 5, 50])
def test_the_sweep_agrees_with_the_loop(lattice, sharp):
    rng = np.random.default_rng(sharp)
    for count in [1, 2, 20, 90]:
        confidence = rng.uniform(size=count)
        outcome = (rng.uniform(size=count) < 1 / (1 + np.exp(-sharp * (confidence - 0.4)))).astype(float)
        confidence = confidence if lattice is None else np.round(confidence * lattice) / lattice
        found = swept_error(torch.from_numpy(confidence), torch.from_numpy(outcome))
        assert found == pytest.approx(loop_sweep(confidence.tolist(), outcome.tolist()), abs=1e-12)


def test_the_ends_of_the_sweep():
    rising = torch.tensor([0.1, 0.2, 0.8, 0.9], dtype=torch.float64)
    assert monotone_bins(rising, torch.tensor([0.0, 0.0, 1.0, 1.0])) == 4
    assert monotone_bins(rising, torch.tensor([1.0, 1.0, 0.0, 0.0])) == 1
    alike = torch.full((4,), 0.5, dtype=torch.float64)
    assert swept_error(alike, torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)) == 0.25
    # All right: the error is what is missing from one on average.
    p, y = torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 1])
    assert sweep_calibration_error(p, y) == pytest.approx(0.2, abs=1e-7)


def test_the_sweep_of_many_separated_examples_ends():
    p = torch.linspace(0.5, 1, 200_000, dtype=torch.float64)
    assert swept_error(p, (p > 0.7).double()) == pytest.approx((0.2 * 0.6 / 0.5 + 0.3 * 0.15 / 0.5), abs=1e-2)


def nearly_sorted(count, wrong):
    """Confidence tells right from wrong but for two neighbours, which only the finest bins tell apart."""
    outcome = (torch.arange(count) >= wrong).double()
    outcome[wrong - 1 : wrong + 1] = torch.tensor([1.0, 0.0])
    return torch.linspace(0.5, 1, count, dtype=torch.float64), outcome


@pytest.mark.parametrize("wrong", [1, 2, 7, 20, 39, 40])
def test_the_sweep_of_nearly_sorted_examples_agrees_with_the_loop(wrong):
    confidence, outcome = nearly_sorted(41, wrong)
    assert swept_error(confidence, outcome) == pytest.approx(
        loop_sweep(confidence.tolist(), outcome.tolist()), abs=1e-12
    )


@pytest.mark.parametrize("wrong", [1, 150_000, 299_999])
def test_the_sweep_of_many_nearly_sorted_examples_ends(wrong):
    """The loop over numbers of bins, of which each has as many bins, took minutes."""
    confidence, outcome = nearly_sorted(300_000, wrong)
    found = monotone_bins(confidence, outcome)
    assert 50_000 < found < 300_000


def test_less_bias_than_the_plain_error():
    samples = [calibrated(300, seed) for seed in range(100)]
    plain = np.mean([reliability_curve(*s, bins=15, binning="equal_mass").ece for s in samples])
    assert np.mean([sweep_calibration_error(*s) for s in samples]) < 0.8 * plain
    assert np.mean([debiased_calibration_error(*s) for s in samples]) < 0.8 * plain
