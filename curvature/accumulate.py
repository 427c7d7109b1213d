"""The pass over the data: batches in, the sum of the loss and any set of quantities out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.engine import Engine
from lapkit.curvature.capture.forward import ForwardFunction, check_positions
from lapkit.curvature.capture.tape import never_used
from lapkit.curvature.columns.columns import Columns, ColumnSet
from lapkit.curvature.columns.sampling import Draws, example_keys, seed_from
from lapkit.curvature.inputs import check_batches, to_device, unpack
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.quantities.quantity import Quantity

EMPTY = "The data is empty: there was no batch. Check the data loader (drop_last with few examples?)."


@dataclass(frozen=True)
class Totals:
    """What one pass over the data leaves beside the quantities.

    Args:
        loss: the likelihood's loss, summed over examples with their weights, in nats.
        count: the number of examples that were seen.
        outputs: the number of outputs of an example, `C` or `T C`; their weighted mean, where examples differ in T.
        weight: the sum of the examples' weights, their number where they have none.
    """

    loss: Tensor
    count: int
    outputs: float
    weight: float

    def __add__(self, other: Totals) -> Totals:
        """The totals for the examples of both."""
        weight = self.weight + other.weight
        terms = self.weight * self.outputs + other.weight * other.outputs
        outputs = self.outputs if self.outputs == other.outputs else terms / max(weight, 1e-300)
        return Totals(self.loss + other.loss, self.count + other.count, outputs, weight)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Totals:
        """The same with the loss on another device or of another type."""
        return replace(self, loss=self.loss.to(device, dtype))


def accumulate(
    model: nn.Module,
    parameters: Parameters,
    likelihood: Likelihood,
    columns: Columns,
    data: Iterable[Any],
    quantities: Sequence[Quantity],
    *,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    progress_bar: bool = False,
    total: int | None = None,
) -> Totals:
    """Sum curvature over a data set: one forward a batch, and one backward for all quantities of equal columns.

    Args:
        model: the network; it is given back as it was.
        parameters: the weights to differentiate with respect to.
        likelihood: of targets given outputs.
        columns: which curvature, for quantities that do not have columns of their own.
        data: batches `(inputs, targets)`, or `(inputs, targets, weights)` with weights `(N,)` that multiply the
            examples' losses.
        quantities: which structures; they are updated in place.
        generator: for Monte Carlo columns.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        progress_bar: show one.
        total: number of batches, for the progress bar, where `data` does not tell.

    Returns:
        Loss, number of examples and of outputs.

    Raises:
        TypeError: if the likelihood is none, or the data is no series of batches.
        ValueError: if there is no data, or the engine or the likelihood refuses a batch, or a parameter is never used.
    """
    parameters.check_finite()
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"Expected a likelihood such as lapkit.curvature.Categorical() or Gaussian(), got {likelihood!r}. A loss "
            "of your own becomes one by lapkit.curvature.FromLogProb."
        )
    check_batches(data)
    groups = _by_columns(quantities, columns)
    for wanted, group in groups:
        for quantity in group:
            quantity.begin(wanted, likelihood)
    totals: Totals | None = None
    seed = seed_from(generator) if any(wanted.random for wanted, _ in groups) else None
    with borrowed(model, parameters):
        engine = Engine(model, parameters, memory_budget=memory_budget, forward_fn=forward_fn, output_axis=output_axis)
        for number, batch in enumerate(
            tqdm(data, desc="curvature", total=total, disable=not progress_bar, leave=False)
        ):
            x, y, weights = unpack(batch, number)
            x, y, weights = to_device((x, y, weights), parameters.device)
            backprop = engine(x)
            f = summable(backprop.output.detach())
            seen = 0 if totals is None else totals.count
            draws = None if seed is None else Draws(seed, example_keys((x, y), len(f), seen).to(f.device))
            check_positions(backprop.returned_shape, output_axis, y)
            y = likelihood.check(f, y, output_axis)
            weights = _checked(weights, f)
            own = _totals(likelihood.loss(f, y), f, weights)
            totals = own if totals is None else totals + own
            with _whole_batch(quantities):
                for wanted, group in groups:
                    sent = wanted(likelihood, f, y, draws)
                    _backward(backprop, sent, _factors(weights, wanted, f), group, weights)
    if totals is None:
        raise ValueError(EMPTY)
    if engine.unreached:  # the experts that no example was sent to, say
        raise ValueError(never_used(sorted(engine.unreached)))
    return totals.to(dtype=torch.promote_types(parameters.dtype, torch.float32))


def _totals(losses: Tensor, f: Tensor, weights: Tensor | None) -> Totals:
    """Those of one batch, the loss in double precision."""
    if weights is None:
        return Totals(losses.double().sum(), len(f), f[0].numel(), len(f))
    return Totals((losses * weights).double().sum(), len(f), f[0].numel(), float(weights.double().sum()))


def _by_columns(quantities: Sequence[Quantity], default: Columns) -> list[tuple[Columns, list[Quantity]]]:
    """Quantities that want equal columns, which share a backward pass."""
    groups: list[tuple[Columns, list[Quantity]]] = []
    for quantity in quantities:
        wanted = default if quantity.columns is None else quantity.columns
        for columns, group in groups:
            if columns == wanted:
                group.append(quantity)
                break
        else:
            groups.append((wanted, [quantity]))
    return groups


def _checked(weights: Tensor | None, f: Tensor) -> Tensor | None:
    """Weights beside the outputs.

    Raises:
        ValueError: if they are not one for each example.
    """
    if weights is None:
        return None
    if len(weights) != len(f):
        raise ValueError(f"Got {len(weights)} weights for a batch of {len(f)} examples: one weight an example.")
    return weights.detach().to(f)


@contextmanager
def _whole_batch(quantities: Sequence[Quantity]) -> Iterator[None]:
    """What has seen a part of a batch when an error comes, or an interrupt, has no result any more."""
    try:
        yield
    except BaseException:
        for quantity in quantities:
            quantity.abandon()
        raise


def _factors(weights: Tensor | None, columns: Columns, f: Tensor) -> Tensor | None:
    """What multiplies the columns `(K, N, *, C)` of weighted examples."""
    return None if weights is None else (weights**columns.weight_power).reshape(-1, *[1] * (f.ndim - 1))


def _backward(
    backprop: Backprop,
    columns: ColumnSet,
    factors: Tensor | None,
    quantities: Sequence[Quantity],
    weights: Tensor | None,
) -> None:
    """Send the columns back in chunks and hand every Jacobian to every quantity."""
    plan = backprop.plan(len(columns))
    for quantity in quantities:
        quantity.begin_batch(backprop.examples, weights)
    for start in range(0, len(columns), plan.chunk):

        def consume(name: str, jacobian: LayerJacobian, first: bool = start == 0) -> None:
            for quantity in quantities:
                quantity.update(name, jacobian, first=first)

        chunk = columns[start : start + plan.chunk]
        backprop((chunk if factors is None else chunk * factors).to(backprop.output.dtype), consume, plan)
        for quantity in quantities:
            quantity.end_columns()
    for quantity in quantities:
        quantity.end_batch()
