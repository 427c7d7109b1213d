"""Hessian backpropagation with averages over the data between modules: one matrix instead of one for each example.

The average at a module's input needs that at its output for all the data, so the data is gone through once a module.

Reference:
    Dangel, Backpropagation Beyond the Gradient, eq. (4.8) and (4.9).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lapkit.curvature.hessian.hbp_batches import pieces
from lapkit.curvature.hessian.hbp_chain import Stage
from lapkit.curvature.hessian.hbp_modes import Mode
from lapkit.curvature.hessian.hbp_propagation import Matrices, ModuleLink
from lapkit.curvature.hessian.hbp_residuals import unit_columns, weight_hessian
from lapkit.curvature.hessian.hbp_trace import Tracer
from lapkit.curvature.hessian.hbp_weights import add_blocks, check_linear_in_weight, link_blocks

Blocks = dict[str, list[Tensor]]
Parts = Mapping[str, Sequence[slice]]


class Average(ABC):
    """One module's pass over the data: the mean Hessian at its output is known.

    Args:
        top: that matrix, `(h, h)`.
    """

    def __init__(self, top: Tensor) -> None:
        self.top = top

    @abstractmethod
    def take_input(self, link: ModuleLink) -> None:
        """Add what the mean Hessian at the module's input needs of some examples."""

    @abstractmethod
    def input(self, count: int) -> Tensor:
        """The mean of `J^T H J` at the module's input, without residual."""

    @abstractmethod
    def take_weights(self, link: ModuleLink, parts: Parts, budget: int) -> None:
        """Add what the blocks of the module's weights need of some examples."""

    @abstractmethod
    def blocks(self, count: int) -> Blocks:
        """The blocks, times the number of examples."""


@final
class Outer(Average):
    """`E[J^T H J]`."""

    def __init__(self, top: Tensor) -> None:
        super().__init__(top)
        self.total: Tensor | None = None
        self.sums: Blocks = {}

    def _spread(self, link: ModuleLink) -> Matrices:
        return Matrices(self.top.expand(len(link.derivatives.delta), *self.top.shape))

    def take_input(self, link: ModuleLink) -> None:
        """See `Average.take_input`."""
        found = self._spread(link).below(link.derivatives, None).values.sum(0)
        self.total = found if self.total is None else self.total + found

    def input(self, count: int) -> Tensor:
        """See `Average.input`."""
        assert self.total is not None  # a pass has at least one batch
        return self.total / count

    def take_weights(self, link: ModuleLink, parts: Parts, budget: int) -> None:
        """See `Average.take_weights`."""
        add_blocks(self.sums, link_blocks(link, self._spread(link), parts, budget))

    def blocks(self, count: int) -> Blocks:
        """See `Average.blocks`."""
        return self.sums


@final
class Inner(Average):
    """`E[J]^T H E[J]`."""

    def __init__(self, top: Tensor) -> None:
        super().__init__(top)
        self.jacobian: Tensor | None = None  # sum over examples, (h_out, h_in)
        self.weights: dict[str, Tensor] = {}  # likewise, (h_out, P)
        self.bends: Blocks = {}
        self.parts: Parts = {}

    def take_input(self, link: ModuleLink) -> None:
        """See `Average.take_input`."""
        found = link.derivatives.pull(self._unit(link)).flatten(2).sum(1)
        self.jacobian = found if self.jacobian is None else self.jacobian + found

    def _unit(self, link: ModuleLink) -> Tensor:
        return unit_columns(link.derivatives.delta, slice(0, len(self.top)))

    def input(self, count: int) -> Tensor:
        """See `Average.input`."""
        assert self.jacobian is not None  # a pass has at least one batch
        mean = self.jacobian / count
        return mean.T @ self.top @ mean

    def take_weights(self, link: ModuleLink, parts: Parts, budget: int) -> None:
        """See `Average.take_weights`."""
        self.parts = parts
        for name, local in link.weights.items():
            found = link.derivatives.pull_weight(local, self._unit(link)).flatten(1)
            self.weights[name] = self.weights[name] + found if name in self.weights else found
        zero = Matrices(torch.zeros_like(self.top).expand(len(link.derivatives.delta), *self.top.shape))
        bent = {n: local for n, local in link.weights.items() if _bends(link, n, local)}
        if bent:  # the weights' own second derivatives are what is left without the modules above
            add_blocks(self.bends, link_blocks(ModuleLink(link.derivatives, bent, link.mode), zero, parts, budget))

    def blocks(self, count: int) -> Blocks:
        """See `Average.blocks`."""
        found: Blocks = {}
        for name, total in self.weights.items():
            mean = [total[:, part] / count for part in self.parts[name]]
            found[name] = [count * (m.T @ self.top @ m) for m in mean]
        for name, bends in self.bends.items():
            found[name] = [a + b for a, b in zip(found[name], bends, strict=True)]
        return found


def _bends(link: ModuleLink, name: str, local: str) -> bool:
    if link.mode.change is None or weight_hessian(link.derivatives, local) is None:
        return False
    check_linear_in_weight(link.mode, link, name)
    return True


AVERAGES: dict[str, type[Outer] | type[Inner]] = {"outer": Outer, "inner": Inner}


def check_averaging(averaging: str | None) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: if it is neither None nor known.
    """
    if averaging is not None and averaging not in AVERAGES:
        raise ValueError(f"Unknown averaging {averaging!r}; choose None or one of {sorted(AVERAGES)}.")


def averaged_blocks(
    tracer: Tracer, data: Iterable[Any], parts: Parts, averaging: str, budget: int
) -> tuple[Blocks, int]:
    """The blocks of all weights, summed over examples.

    Args:
        tracer: reads the model.
        data: batches that can be gone through several times.
        parts: how each parameter is cut.
        averaging: "outer" or "inner".
        budget: bytes that intermediates may take.

    Returns:
        Blocks of each parameter, and the number of examples.

    Raises:
        ValueError: if the data can be gone through only once, or changes.
    """
    sums: Blocks = {}
    count = 0
    for _, average, links, count in passes(tracer, data, AVERAGES[averaging], budget):
        for link in links():
            average.take_weights(link, parts, budget)
        sums.update(average.blocks(count))
    return sums, count


def passes(
    tracer: Tracer, data: Iterable[Any], kind: type[Outer] | type[Inner], budget: int
) -> Iterator[tuple[Stage, Average, Callable[[], Iterator[ModuleLink]], int]]:
    """Go down the chain: for each module with weights the average at its output, and its links over the data.

    Args:
        tracer: reads the model, skip connections closed.
        data: batches that can be gone through several times.
        kind: of average.
        budget: bytes that intermediates may take.

    Yields:
        The stage, its average, a function that goes over the data and yields the module at each piece of it, and the
        number of examples.

    Raises:
        ValueError: if the data can be gone through only once, or changes.
    """
    if isinstance(data, Iterator):
        raise ValueError(
            "Averages between modules go through the data once for each module, but this data is an iterator that is "
            "used up after the first time. Give a list of batches or a data loader."
        )
    tracer.check_repeatable(data)
    top, count, depth = _at_the_output(tracer, data, budget)
    for back in range(1, depth + 1):

        def links(back: int = back) -> Iterator[ModuleLink]:
            for trace in pieces(tracer, data, budget, weighted=False):
                link = trace.links[-back]
                assert isinstance(link, ModuleLink)  # skip connections are closed
                yield link

        average = kind(top)
        stage = tracer.stages[-back]
        if stage.weights:
            yield stage, average, links, count
        if back < depth:
            top = _below(average, links, tracer.mode, count)


def _at_the_output(tracer: Tracer, data: Iterable[Any], budget: int) -> tuple[Tensor, int, int]:
    """The mean Hessian of the loss, the number of examples and that of modules down to the first weights."""
    total: Tensor | None = None
    count = depth = 0
    for trace in pieces(tracer, data, budget, weighted=False):
        found = trace.top.values.sum(0)
        total = found if total is None else total + found
        count, depth = count + trace.count, len(trace.links)
    assert total is not None  # empty data was refused
    return total / count, count, depth


def _below(average: Average, links: Callable[[], Iterator[ModuleLink]], mode: Mode, count: int) -> Tensor:
    """The mean Hessian at the module's input, residual included."""
    residual: Tensor | None = None
    for link in links():
        average.take_input(link)
        if link.raw_residual is not None:
            found = link.raw_residual.total()
            residual = found if residual is None else residual + found
    below = average.input(count)
    return below if residual is None else below + _changed(residual / count, mode)


def _changed(residual: Tensor, mode: Mode) -> Tensor:
    """What a mode makes of a mean residual; that of elementwise modules is exactly diagonal and stays so."""
    diagonal = residual.diagonal()
    if torch.equal(residual, torch.diag(diagonal)):
        return torch.diag(mode.diagonal(diagonal))
    return mode.matrix(residual)
