"""From predictions and targets to pairs of numbers: how sure, and whether it came true.

Every binned or ranked metric is one of these pairings and a statistic of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from lapkit.calibration.event_inputs import as_events, as_flags, as_scores
from lapkit.calibration.inputs import Array, as_labels, as_rows
from lapkit.calibration.metrics import Result, RowMetric
from lapkit.calibration.top_label import top_label_outcome

Pairs: TypeAlias = Callable[[Any, Any], tuple[Tensor, Tensor]]


def top_label(probabilities: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """The confidence `max_k p_nk`, and whether `argmax_k p_nk` is the label.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N, C)` class probabilities; or `(N,)` or `(N, 1)`, of the positive class.
        labels: `(N,)` integers in [0, C).

    Returns:
        Confidences and outcomes, `(N,)` each, float64.
    """
    rows = as_rows(probabilities)
    return top_label_outcome(rows, as_labels(labels, rows))


def event(probabilities: Array, occurred: Array) -> tuple[Tensor, Tensor]:
    """The probability of one event, and whether it occurred.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        probabilities: `(N,)` probabilities of the event.
        occurred: `(N,)` booleans, or integers 0 and 1.

    Returns:
        Probabilities and outcomes, `(N,)` each, float64.
    """
    return as_events(probabilities, occurred)


def flagged(scores: Array, outside: Array) -> tuple[Tensor, Tensor]:
    """A score that is high out of distribution, and whether the example is from there.

    A wrong dtype raises TypeError, a wrong shape or value ValueError.

    Args:
        scores: `(N,)` finite numbers.
        outside: `(N,)` booleans, or integers 0 and 1.

    Returns:
        Scores and outcomes, `(N,)` each, float64.
    """
    values = as_scores(scores, "scores")
    return values, as_flags(outside, values, "outside")


@final
@dataclass(frozen=True)
class Ranked(RowMetric[Result]):
    """A statistic of ranks, or of bins that depend on the data: it keeps two numbers of each example.

    Args:
        statistic: of the first and second of the pairs, `(N,)` each.
        pairs: what is paired: `top_label`, `event` or `flagged`.

    Example:
        >>> from lapkit.calibration import EqualMass, Streaming
        >>> stream = Streaming(Ranked(EqualMass(bins=2)))
        >>> stream.update(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))
        >>> stream.compute().ece
        0.35
    """

    statistic: Callable[[Tensor, Tensor], Result]
    pairs: Pairs = top_label

    def summarise(self, predictions: Any, targets: Any) -> Tensor:
        """The pairs; see `Metric.summarise`.

        Args:
            predictions: what `pairs` takes.
            targets: what `pairs` takes.

        Returns:
            `(N, 2)` float64.
        """
        return torch.stack(self.pairs(predictions, targets), dim=1)

    def finish(self, summary: Tensor) -> Result:
        """The statistic; see `Metric.finish`.

        Args:
            summary: the pairs of all examples.

        Returns:
            The statistic's value.
        """
        return self.statistic(*summary.unbind(dim=1))
