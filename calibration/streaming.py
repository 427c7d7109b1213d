"""Metrics over batches and processes: the number of all data, without keeping all predictions.

A metric says what a batch leaves behind, how two of those are put together, and what number follows from the whole.
The functions of this folder are metrics applied to one batch, so both ways share one formula.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor

Result = TypeVar("Result")

# Summaries are put together when there are so many, so that sums stay few and rows are not copied at every batch.
PARTS = 100


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


@final
class Streaming(Generic[Result]):
    """A metric on its way through the data, batch by batch, and over the processes of a group.

    Batches of any size and order, merged streams and processes give the number of one pass over all data, up to
    rounding in float64.

    Args:
        metric: what to compute.

    Example:
        >>> from lapkit.calibration import EqualWidthReliability
        >>> stream = Streaming(EqualWidthReliability(bins=10))
        >>> for p, y in [([[0.9, 0.1], [0.4, 0.6]], [0, 0]), ([[0.3, 0.7]], [1])]:
        ...     stream.update(torch.tensor(p), torch.tensor(y))
        >>> stream.compute().ece
        0.3333
    """

    def __init__(self, metric: Metric[Result]) -> None:
        self.metric = metric
        self._parts: list[Tensor] = []

    def update(self, predictions: Any, targets: Any) -> None:
        """Take in a batch. One that is refused leaves the stream as it was.

        Args:
            predictions: of the batch, on any device.
            targets: of the batch.

        Raises:
            ValueError: it has another number of classes or targets than the batches before, or is none of the metric.
        """
        self._append(self.metric.summarise(predictions, targets))

    def compute(self) -> Result:
        """The metric of everything so far; more may follow.

        Returns:
            The metric's value.

        Raises:
            ValueError: there has been no example.
        """
        if not self._parts:
            raise ValueError("The stream has seen no example, expected at least one. Call update first.")
        return self.metric.finish(self._compact())

    def state(self) -> dict[str, Tensor]:
        """Everything seen so far, to be stored or sent.

        Returns:
            `{"summary": tensor}`; empty before the first batch.
        """
        return {"summary": self._compact()} if self._parts else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, of a stream of the same metric; what was seen before is forgotten.

        Args:
            state: from `state`.

        Raises:
            ValueError: it is no state of a stream.
        """
        if set(state) - {"summary"}:
            raise ValueError(f"state has the keys {sorted(state)}, expected what state() returned.")
        self._parts = [state["summary"]] if state else []

    def __add__(self, other: Streaming[Result]) -> Streaming[Result]:
        """The stream of both streams' examples; neither is changed.

        Args:
            other: a stream of an equal metric.

        Returns:
            A new stream, on the device of the first.

        Raises:
            ValueError: the metrics differ.
        """
        if self.metric != other.metric:
            raise ValueError(f"A stream of {self.metric} and one of {other.metric}: expected equal metrics.")
        both = Streaming(self.metric)
        for part in (*self._parts, *other._parts):
            both._append(part)
        return both

    def all_reduce(self, group: torch.distributed.ProcessGroup | None = None) -> Streaming[Result]:
        """The stream of all processes' examples, the same on each; this one is not changed, so call it once at the end.

        Every process of the group must call it, those without examples as well. The states are gathered and merged
        in the order of the ranks, so that the result does not depend on who is first.

        Args:
            group: of `torch.distributed`; all processes if None.

        Returns:
            A new stream, on the device of this one (on the CPU if this one is empty).
        """
        device = self._parts[0].device if self._parts else torch.device("cpu")
        mine = {key: value.cpu() for key, value in self.state().items()}
        states: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(states, mine, group=group)
        everything = Streaming(self.metric)
        for summary in (state["summary"] for state in states if state):
            everything._append(summary.to(device))
        return everything

    def __repr__(self) -> str:
        return f"Streaming({self.metric!r})"

    def _append(self, part: Tensor) -> None:
        if self._parts and part.shape[1:] != self._parts[0].shape[1:]:
            raise ValueError(
                f"A batch left a summary of shape {tuple(part.shape)}, those before it {tuple(self._parts[0].shape)}; "
                "expected batches with the same number of classes, or of targets."
            )
        self._parts.append(part.to(self._parts[0].device) if self._parts else part)
        if len(self._parts) >= PARTS:
            self._compact()

    def _compact(self) -> Tensor:
        if len(self._parts) > 1:
            self._parts = [self.metric.combine(self._parts)]
        return self._parts[0]
