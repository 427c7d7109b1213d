"""Accuracy, negative log-likelihood and Brier score against scikit-learn and by hand."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from lapkit.calibration import (
    accuracy,
    brier,
    brier_scores,
    correct,
    log_losses,
    log_losses_from_logits,
    nll,
    nll_from_logits,
    top_k_accuracy,
)
from lapkit.calibration.top_label import TIES_UP_TO, top_label_outcome

CLASSES = [2, 3, 10]


def problem(classes, count=500, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("classes", CLASSES)
def test_scores_agree_with_scikit_learn(classes):
    logits, y = problem(classes)
    p = logits.softmax(dim=1)
    known = list(range(classes))
    log_loss = metrics.log_loss(y.numpy(), p.numpy(), labels=known)
    assert nll(p, y) == pytest.approx(log_loss, abs=1e-12)
    assert nll_from_logits(logits, y) == pytest.approx(log_loss, abs=1e-12)
    squares = metrics.brier_score_loss(y.numpy(), p.numpy(), labels=known, scale_by_half=False)
    assert brier(p, y) == pytest.approx(squares, abs=1e-12)
    assert accuracy(p, y) == pytest.approx(metrics.accuracy_score(y, p.argmax(dim=1)), abs=1e-15)


def test_binary_brier_is_twice_the_one_column_score():
    logits, y = problem(2)
    p = logits.softmax(dim=1)[:, 1]
    assert brier(p, y) == pytest.approx(2 * metrics.brier_score_loss(y.numpy(), p.numpy()), abs=1e-12)


def test_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    y = torch.tensor([0, 2])
    assert accuracy(p, y) == 0.5
    assert nll(p, y) == pytest.approx((math.log(2) + math.log(8)) / 2, abs=1e-15)
    assert brier(p, y) == ((0.25 + 2 * 0.0625) + (0.015625 + 0.5625 + 0.765625)) / 2


def test_extremes():
    sure = torch.eye(3)
    right, wrong = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    assert (accuracy(sure, right), nll(sure, right), brier(sure, right)) == (1, 0, 0)
    assert (accuracy(sure, wrong), nll(sure, wrong), brier(sure, wrong)) == (0, math.inf, 2)


def test_one_impossible_label_makes_the_nll_infinite():
    p = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    assert nll(p, torch.tensor([0, 2])) == math.inf
    assert nll(p, torch.tensor([0, 1])) == pytest.approx(math.log(2))


def test_logits_do_not_underflow():
    logits = torch.tensor([[0.0, 200.0, -300.0]], dtype=torch.float32)
    assert nll(logits.softmax(dim=1), torch.tensor([0])) == math.inf
    assert nll_from_logits(logits, torch.tensor([0])) == pytest.approx(200, abs=1e-12)
    assert nll_from_logits(logits, torch.tensor([2])) == pytest.approx(500, abs=1e-12)


def test_logits_of_minus_infinity_rule_classes_out():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert nll_from_logits(logits, torch.tensor([0])) == pytest.approx(math.log(2), abs=1e-15)
    assert nll_from_logits(logits, torch.tensor([1])) == math.inf


def test_the_first_of_equal_classes_is_predicted():
    p = torch.tensor([[0.4, 0.4, 0.2]])
    assert [accuracy(p, torch.tensor([k])) for k in range(3)] == [1, 0, 0]
    assert [accuracy(torch.tensor([0.5]), torch.tensor([k])) for k in range(2)] == [1, 0]


@pytest.mark.parametrize("score", [accuracy, nll, brier])
def test_order_does_not_matter(score):
    logits, y = problem(5)
    p = logits.softmax(dim=1)
    shuffle = torch.from_numpy(np.random.default_rng(1).permutation(len(y)))
    assert score(p[shuffle], y[shuffle]) == pytest.approx(score(p, y), abs=1e-13)


@pytest.mark.parametrize("classes", CLASSES)
def test_top_k_agrees_with_scikit_learn(classes):
    logits, y = problem(classes)
    p = logits.softmax(dim=1)
    assert top_k_accuracy(p, y, k=1) == accuracy(p, y)
    assert top_k_accuracy(p, y, k=classes) == 1
    for k in range(1, classes):
        known = metrics.top_k_accuracy_score(y.numpy(), (p if classes > 2 else p[:, 1]).numpy(), k=k)
        assert top_k_accuracy(p, y, k=k) == pytest.approx(known, abs=1e-15)


def test_of_equal_classes_the_earlier_rank_higher():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25]])
    assert [[top_k_accuracy(p, torch.tensor([y]), k=k) for k in (1, 2, 3)] for y in range(4)] == [
        [1, 1, 1],
        [0, 1, 1],
        [0, 0, 1],
        [0, 0, 0],
    ]


@pytest.mark.parametrize("k", [0, -1, 4])
def test_numbers_of_classes_that_are_none_are_refused(k):
    with pytest.raises(ValueError, match=rf"k is {k}, expected at (least 1|most the number of classes, 3)"):
        top_k_accuracy(torch.eye(3), torch.tensor([0, 1, 2]), k=k)


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("count", [300, 17_000])  # few, and many
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_top_label_is_that_of_a_search(classes, count, dtype):
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(count, classes, generator=generator).softmax(dim=1)
    for rows in (p, (p * 4).round() + 1, torch.ones_like(p)):
        table = (rows / rows.sum(dim=1, keepdim=True)).to(dtype)
        y = torch.randint(classes, (count,), generator=generator)
        confidence, right = top_label_outcome(table, y)
        top, predicted = table.max(dim=1)
        assert torch.equal(confidence, top.double())
        # torch promises no order among equals of max; argmax of numpy gives the first.
        first = torch.from_numpy(table.double().numpy().argmax(axis=1))
        assert torch.equal(right > 0, first == y)
        assert accuracy(table, y) == (first == y).double().mean().item()
        assert predicted.shape == y.shape


def test_no_tie_is_above_the_bound():
    # The largest row sum that is let through, of two equal classes in bfloat16.
    assert TIES_UP_TO > (1 + 3e-2) / 2


def test_scores_are_means_of_those_of_each_example():
    logits, y = problem(4)
    p = logits.softmax(dim=1)
    pairs = {accuracy: correct, nll: log_losses, brier: brier_scores}
    for mean, each in pairs.items():
        values = each(p, y)
        assert values.shape == y.shape
        singles = [mean(p[n : n + 1], y[n : n + 1]) for n in range(20)]
        assert values[:20].tolist() == pytest.approx(singles, abs=1e-14)
    assert log_losses_from_logits(logits, y).tolist() == pytest.approx(log_losses(p, y).tolist(), abs=1e-12)
