"""Scores of each example: what the scores of `scores.py` are means of.

For means over batches `Streaming(Mean(brier_scores))` and the like, for comparisons of two models example by example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lapkit.calibration.inputs import Array, as_labels, as_log_probabilities, as_probabilities, as_rows
from lapkit.calibration.top_label import top_label_outcome


def correct(probabilities: Array, labels: Array) -> Tensor:
    """Whether the most probable class is the label, for each example: `1[argmax_k p_nk = y_n]`.

    Of several equally probable classes the first counts as predicted.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        Ones and zeros `(N,)`, float64.

    Example:
        >>> correct(torch.tensor([[0.8, 0.2], [0.5, 0.5]]), torch.tensor([0, 1]))
        tensor([1., 0.], dtype=torch.float64)
    """
    rows = as_rows(probabilities)
    return top_label_outcome(rows, as_labels(labels, rows))[1]


@final
@dataclass(frozen=True)
class TopKCorrect:
    """Whether the label is among the k most probable classes, for each example.

    Of equally probable classes the earlier ones rank higher, so for k = 1 this is `correct`.

    Args:
        k: how many classes count, at least 1.

    Raises:
        ValueError: k is less than 1.

    Example:
        >>> TopKCorrect(2)(torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2]]), torch.tensor([1, 2]))
        tensor([1., 0.], dtype=torch.float64)
    """

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is {self.k}, expected at least 1; k = 1 is the accuracy.")

    def __call__(self, probabilities: Array, labels: Array) -> Tensor:
        """Ones where the label ranks below k.

        Args:
            probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
            labels: `(N,)` integers in [0, C).

        Returns:
            Ones and zeros `(N,)`, float64.

        Raises:
            ValueError: k exceeds the number of classes.
        """
        rows = as_rows(probabilities)
        targets = as_labels(labels, rows)[:, None]
        if self.k > rows.shape[1]:
            raise ValueError(f"k is {self.k}, expected at most the number of classes, {rows.shape[1]}.")
        own = rows.gather(1, targets)
        earlier = torch.arange(rows.shape[1], device=rows.device) < targets
        rank = ((rows > own) | (earlier & (rows == own))).sum(dim=1)
        return (rank < self.k).to(torch.float64)


def log_losses(probabilities: Array, labels: Array) -> Tensor:
    """Negative log-likelihood of each example's label, in nats: `-log p_n[y_n]`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        The values `(N,)`, float64; inf where a label has probability zero.

    Example:
        >>> log_losses(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
        tensor([0.6931, 1.3863], dtype=torch.float64)
    """
    rows = as_rows(probabilities)
    return -_at_labels(rows, as_labels(labels, rows)).to(torch.float64).clamp(max=1).log()


def log_losses_from_logits(logits: Array, labels: Array) -> Tensor:
    """Negative log-likelihood of each example's label, in nats: `log sum_k exp f_nk - f_n[y_n]`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        logits: `(N, C)` logits, or `(N,)` or `(N, 1)` log-odds of the positive class; -inf rules a class out.
        labels: `(N,)` integers in [0, C).

    Returns:
        The values `(N,)`, float64; inf where a label's logit is -inf.
    """
    log_probabilities = as_log_probabilities(logits)
    return -_at_labels(log_probabilities, as_labels(labels, log_probabilities))


def brier_scores(probabilities: Array, labels: Array) -> Tensor:
    """Brier score of each example, summed over the classes: `sum_k (p_nk - 1[y_n = k])^2`.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        The scores `(N,)` in [0, 2], float64.

    Example:
        >>> brier_scores(torch.tensor([0.9, 0.2]), torch.tensor([1, 1]))
        tensor([0.0200, 1.2800], dtype=torch.float64)
    """
    rows = as_probabilities(probabilities)
    targets = as_labels(labels, rows)
    residual = rows.scatter_add(1, targets[:, None], rows.new_full((len(rows), 1), -1.0))
    return residual.square().sum(dim=1)


def _at_labels(rows: Tensor, targets: Tensor) -> Tensor:
    return rows.gather(1, targets[:, None]).squeeze(1)
