"""Metrics: what a batch leaves behind, how two of those are put together, and what number follows from the whole.

The functions of this folder are metrics applied to one batch, so that batches, by `Streaming`, share their formulas.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

Result = TypeVar("Result")


class Metric(ABC, Generic[Result]):
    """A number, curve or table that follows from a summary of the data. Metrics are frozen; equal settings are equal.

        metric(predictions, targets) = finish(combine([summarise(batch) for each batch]))

    A metric of your own is a frozen dataclass derived from `SumMetric` or `RowMetric`; a mean over examples needs none,
    see `Mean`.
    """

    @abstractmethod
    def summarise(self, predictions: Any, targets: Any) -> Tensor:
        """What one batch leaves behind, after its checks.

        Args:
            predictions: of a batch, in the form that the metric takes.
            targets: of the same batch.

        Returns:
            The summary, float64.
        """

    @abstractmethod
    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The summary of several batches.

        Args:
            parts: their summaries, in order, at least one, on one device.

        Returns:
            The summary of all their examples.
        """

    @abstractmethod
    def finish(self, summary: Tensor) -> Result:
        """What follows from the summary of all data.

        Args:
            summary: of at least one example.

        Returns:
            The metric's value.
        """

    def __call__(self, predictions: Any, targets: Any) -> Result:
        """The metric of one batch.

        Args:
            predictions: in the form that the metric takes.
            targets: the same number of them.

        Returns:
            The metric's value.
        """
        return self.finish(self.summarise(predictions, targets))


class SumMetric(Metric[Result]):
    """A metric that follows from sums over examples: its summary has the same size for any number of them."""

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of the summaries; see `Metric.combine`.

        Args:
            parts: tensors of one shape.

        Returns:
            Their sum.
        """
        return torch.stack(list(parts)).sum(dim=0)


class RowMetric(Metric[Result]):
    """A metric of ranks, such as an AUROC: its summary keeps a few numbers `(N, k)` of every example."""

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The rows of all summaries; see `Metric.combine`.

        Args:
            parts: tables of one width.

        Returns:
            One table.
        """
        return torch.cat(list(parts))


@final
@dataclass(frozen=True)
class Mean(SumMetric[float]):
    """The mean over examples of what a function gives for each.

        g( 1/N sum_n s(prediction_n, target_n) )

    Args:
        of_each: takes predictions and targets of a batch and returns a value for each example `(N,)`. A function of a
            module, or a frozen dataclass that can be called: two equal ones may be merged.
        then: g, such as `math.sqrt` for a root mean square.

    Example:
        >>> from lapkit.calibration import brier_scores
        >>> Mean(brier_scores)(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
        0.65
    """

    of_each: Callable[[Any, Any], Tensor]
    then: Callable[[float], float] = float

    def summarise(self, predictions: Any, targets: Any) -> Tensor:
        """Sum and number of the values.

        Args:
            predictions: what `of_each` takes.
            targets: what `of_each` takes.

        Returns:
            `(2,)` float64.

        Raises:
            ValueError: `of_each` does not return `(N,)` values, N > 0.
        """
        values = self.of_each(predictions, targets)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{self.of_each} returned shape {tuple(values.shape)}, expected (N,) with N > 0.")
        total = values.sum(dtype=torch.float64)
        return torch.stack((total, torch.full_like(total, len(values))))

    def finish(self, summary: Tensor) -> float:
        """The mean; see `Metric.finish`.

        Args:
            summary: sum and number.

        Returns:
            The mean, after `then`.
        """
        total, count = summary.tolist()
        return self.then(total / count)
