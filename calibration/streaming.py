"""Metrics over batches and processes: the number of all data, without keeping all predictions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, final

import torch
from torch import Tensor

from lapkit.calibration.metrics import Metric, Result

# Summaries are put together when there are so many, so that sums stay few and rows are not copied at every batch.
PARTS = 100


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
