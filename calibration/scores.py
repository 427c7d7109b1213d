"""Scores of probabilities against labels: accuracy, negative log-likelihood, Brier score.

All are means over examples, so batches of different sizes must not be averaged; for batches there is
`Streaming(Mean(...))` of the values for each example. Negative log-likelihood and Brier score are strictly proper: in
expectation only the true distribution attains the minimum.
"""

from __future__ import annotations

from lapkit.calibration.inputs import Array
from lapkit.calibration.metrics import Mean
from lapkit.calibration.per_example import TopKCorrect, brier_scores, correct, log_losses, log_losses_from_logits


def accuracy(probabilities: Array, labels: Array) -> float:
    """Fraction of examples whose most probable class is the label.

        1/N sum_n 1[argmax_k p_nk = y_n]

    Of several equally probable classes the first counts as predicted. In batches: `Mean(correct)`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        The accuracy, in [0, 1].

    Example:
        >>> import torch
        >>> accuracy(torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]), torch.tensor([0, 1, 1]))
        0.667
    """
    return Mean(correct)(probabilities, labels)


def top_k_accuracy(probabilities: Array, labels: Array, *, k: int) -> float:
    """Fraction of examples whose label is among the k most probable classes. In batches: `Mean(TopKCorrect(k))`.

    Of equally probable classes the earlier ones rank higher. A wrong dtype raises TypeError, a wrong shape or value
    ValueError, as does a k outside [1, C].

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).
        k: how many classes count.

    Returns:
        The accuracy, in [0, 1].

    Example:
        >>> import torch
        >>> top_k_accuracy(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]]), torch.tensor([1, 0]), k=2)
        0.5
    """
    return Mean(TopKCorrect(k))(probabilities, labels)


def nll(probabilities: Array, labels: Array) -> float:
    """Mean negative log-likelihood of the labels, in nats.

        -1/N sum_n log p_n[y_n]

    A single label of probability zero makes it infinite. A float32 softmax underflows to such zeros: where
    there are logits, use `nll_from_logits`. In batches: `Mean(log_losses)`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        The negative log-likelihood in nats per example; inf if a label has probability zero.

    Example:
        >>> import torch
        >>> nll(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
        1.0397

    Reference:
        I. J. Good (1952), Rational decisions; Gneiting and Raftery (2007), section 3.1 (logarithmic score).
    """
    return Mean(log_losses)(probabilities, labels)


def nll_from_logits(logits: Array, labels: Array) -> float:
    """Mean negative log-likelihood of the labels, in nats, computed stably from logits.

        1/N sum_n ( log sum_k exp f_nk - f_n[y_n] )

    In batches: `Mean(log_losses_from_logits)`. A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        logits: `(N, C)` logits, or `(N,)` or `(N, 1)` log-odds of the positive class; -inf rules a class out.
        labels: `(N,)` integers in [0, C).

    Returns:
        The negative log-likelihood in nats per example; inf if a label's logit is -inf.

    Example:
        >>> import torch
        >>> nll_from_logits(torch.tensor([[1000.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 0]))
        500.3466

    Reference:
        I. J. Good (1952), Rational decisions; Gneiting and Raftery (2007), section 3.1 (logarithmic score).
    """
    return Mean(log_losses_from_logits)(logits, labels)


def brier(probabilities: Array, labels: Array) -> float:
    """Mean Brier score, summed over the classes.

        1/N sum_n sum_k (p_nk - 1[y_n = k])^2

    This is Brier's own definition, in [0, 2]. The one-column score that is common for two classes,
    `1/N sum_n (p_n - y_n)^2` in [0, 1], is half of it; other libraries divide by C. In batches: `Mean(brier_scores)`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        The Brier score, in [0, 2].

    Example:
        >>> import torch
        >>> brier(torch.tensor([0.9, 0.2]), torch.tensor([1, 1]))
        0.65

    Reference:
        G. W. Brier (1950), Verification of forecasts expressed in terms of probability.
    """
    return Mean(brier_scores)(probabilities, labels)
