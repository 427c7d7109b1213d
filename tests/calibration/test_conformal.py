"""Conformal sets and intervals: exact coverage over exchangeable examples, and their definitions by hand."""

import math

import numpy as np
import pytest
import torch

from lapkit.calibration import (
    ConformalBounds,
    ConformalIntervals,
    ConformalSets,
    central_interval,
    interval_coverage,
)


def classes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 5, generator=generator)
    return logits.softmax(1), torch.multinomial((0.5 * logits).softmax(1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("score", ["threshold", "adaptive"])
def test_one_example_left_out_of_many_is_covered_as_often_as_the_rank_says(coverage, score):
    """Exchangeability made exact: each of n + 1 examples is left out in turn; ceil((n + 1) coverage) are covered."""
    p, y = classes(41)
    covered = 0
    for i in range(41):
        rest = torch.arange(41) != i
        sets = ConformalSets.fit(p[rest], y[rest], coverage=coverage, score=score)
        covered += int(sets(p[i : i + 1])[0, y[i]])
    assert covered == math.ceil(41 * coverage)


@pytest.mark.parametrize("normalised", [True, False])
def test_intervals_cover_one_left_out_as_often_as_the_rank_says(normalised):
    mean, std, y = torch.randn(30), torch.rand(30) + 0.1, 3 * torch.randn(30)
    covered = 0
    for i in range(30):
        rest, one = torch.arange(30) != i, slice(i, i + 1)
        rule = ConformalIntervals.fit((mean[rest], std[rest]), y[rest], coverage=0.83, normalised=normalised)
        covered += interval_coverage(rule((mean[one], std[one])), y[one])
    assert covered == math.ceil(30 * 0.83)


def test_bounds_cover_one_left_out_as_often_as_the_rank_says():
    mean, y = torch.randn(30), 3 * torch.randn(30)
    covered = 0
    for i in range(30):
        rest, one = torch.arange(30) != i, slice(i, i + 1)
        rule = ConformalBounds.fit((mean[rest] - 1, mean[rest] + 2), y[rest], coverage=0.83)
        covered += interval_coverage(rule((mean[one] - 1, mean[one] + 2)), y[one])
    assert covered == math.ceil(30 * 0.83)


def test_an_overconfident_network_gets_sets_that_hold_the_truth():
    p, y = classes(20_000)
    for score in ("threshold", "adaptive"):
        sets = ConformalSets.fit(p[:2000], y[:2000], coverage=0.9, score=score)
        held = sets(p[2000:]).gather(1, y[2000:, None]).double().mean()
        assert float(held) == pytest.approx(0.9, abs=0.02)


def test_scores_are_those_of_the_papers():
    p, y = classes(50)
    table = p.numpy()
    threshold = ConformalSets.fit(p, y, coverage=0.7)
    rank = math.ceil(51 * 0.7)
    assert threshold.threshold == pytest.approx(np.sort(1 - table[np.arange(50), y])[rank - 1], abs=1e-12)

    def adaptive(row, k, penalty):
        place = int((row > row[k]).sum()) + 1
        return row[row >= row[k]].sum() + penalty * max(0, place - 2)

    for penalty in (0.0, 0.3):
        scores = [adaptive(row, k, penalty) for row, k in zip(table, y.tolist(), strict=True)]
        found = ConformalSets.fit(p, y, coverage=0.7, score="adaptive", penalty=penalty, rank=2)
        assert found.threshold == pytest.approx(np.sort(scores)[rank - 1], abs=1e-12)
        members = [[adaptive(row, k, penalty) <= found.threshold + 1e-12 for k in range(5)] for row in table]
        assert found(p).tolist() == members
    long, short = (ConformalSets.fit(p, y, score="adaptive", penalty=penalty)(p).sum(1) for penalty in (0.0, 0.5))
    assert short.max() <= long.max()


def test_binary_probabilities_have_sets_of_two_classes():
    p, y = torch.rand(30), torch.randint(0, 2, (30,))
    two = torch.stack((1 - p, p), 1)
    assert torch.equal(ConformalSets.fit(p, y)(p), ConformalSets.fit(two, y)(two))


def test_intervals_are_the_quantiles_of_the_errors():
    mean, std, y = torch.randn(99, 2), torch.rand(99, 2) + 0.1, torch.randn(99, 2)
    for normalised in (True, False):
        unit = std if normalised else torch.ones_like(std)
        error = ((y - mean).abs() / unit).numpy()
        rule = ConformalIntervals.fit((mean, std), y, coverage=0.9, normalised=normalised)
        assert rule.margin.numpy() == pytest.approx(np.sort(error, axis=0)[89], abs=1e-12)
        low, high = rule((mean, std))
        assert torch.allclose(high - low, 2 * rule.margin * unit)


def test_intervals_that_are_too_wide_are_narrowed():
    mean, y = torch.zeros(200), torch.randn(200)
    wide = central_interval((mean, 3.0), coverage=0.9)
    rule = ConformalBounds.fit(wide, y, coverage=0.9)
    assert float(rule.margin) < 0
    assert interval_coverage(rule(wide), y) == pytest.approx(181 / 200)
    low, high = rule((torch.tensor([0.0]), torch.tensor([1.0])))  # narrower than what is taken off
    assert low == high == 0.5


def test_too_few_examples_give_everything_and_warn():
    p, y = classes(8)
    with pytest.warns(UserWarning, match="at least 9 are needed") as record:
        sets = ConformalSets.fit(p, y, coverage=0.9)
    assert record[0].filename == __file__
    assert sets(p).all()
    with pytest.warns(UserWarning, match="too few"):
        low, high = ConformalIntervals.fit((torch.zeros(3), 1.0), torch.zeros(3))((torch.zeros(1), 1.0))
    assert (low, high) == (-math.inf, math.inf)
    p, y = classes(9)
    assert ConformalSets.fit(p, y, coverage=0.9).threshold < 1


def test_bad_settings():
    p, y = classes(20)
    with pytest.raises(ValueError, match="'threshold' or 'adaptive'"):
        ConformalSets.fit(p, y, score="aps")
    with pytest.raises(ValueError, match="coverage is 90"):
        ConformalSets.fit(p, y, coverage=90)
    with pytest.raises(ValueError, match="shape of upper ends"):
        ConformalBounds.fit((torch.zeros(3), torch.zeros(2)), torch.zeros(3))
