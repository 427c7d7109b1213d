"""The pass over the data: batches in, the sum of the loss and any set of quantities out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lapkit.curvature.columns import Columns
from lapkit.curvature.engine import Engine
from lapkit.curvature.inputs import to_device, unpack
from lapkit.curvature.jacobians import LayerJacobian, summable
from lapkit.curvature.likelihoods import Likelihood
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.quantities import Quantity

EMPTY = "The data is empty: there was no batch. Check the data loader (drop_last with few examples?)."


@dataclass(frozen=True)
class Totals:
    """What one pass over the data leaves beside the quantities.

    Args:
        loss: the likelihood's loss, summed over examples, in nats.
        count: the number of examples that were seen.
        outputs: the number of outputs C.
    """

    loss: Tensor
    count: int
    outputs: int


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
    progress_bar: bool = False,
    total: int | None = None,
) -> Totals:
    """Sum curvature over a data set: one forward and one backward of the columns a batch, shared by all quantities.

    Args:
        model: the network; it is given back as it was.
        parameters: the weights to differentiate with respect to.
        likelihood: of targets given outputs.
        columns: which curvature.
        data: batches `(inputs, targets)`.
        quantities: which structures; they are updated in place.
        generator: for Monte Carlo columns.
        memory_budget: bytes that intermediates may take.
        progress_bar: show one.
        total: number of batches, for the progress bar, where `data` does not tell.

    Returns:
        Loss, number of examples and of outputs.

    Raises:
        ValueError: if there is no data, or the engine or the likelihood refuses a batch.
    """
    parameters.check_finite()
    loss: Tensor | None = None
    count = outputs = 0
    with borrowed(model, parameters):
        engine = Engine(model, parameters, memory_budget=memory_budget)
        for number, batch in enumerate(
            tqdm(data, desc="curvature", total=total, disable=not progress_bar, leave=False)
        ):
            x, y = unpack(batch, number)
            backprop = engine(to_device(x, parameters.device))
            f = summable(backprop.output.detach())
            y = likelihood.check(f, y)
            batch_loss = likelihood.loss(f, y).double().sum()
            loss = batch_loss if loss is None else loss + batch_loss
            count, outputs = count + len(f), f.shape[-1]
            _backward(backprop, columns(likelihood, f, y, generator).to(backprop.output.dtype), quantities)
    if loss is None:
        raise ValueError(EMPTY)
    return Totals(loss.to(torch.promote_types(parameters.dtype, torch.float32)), count, outputs)


def _backward(backprop: Any, columns: Tensor, quantities: Sequence[Quantity]) -> None:
    """Send the columns back in chunks and hand every Jacobian to every quantity."""
    plan = backprop.plan(len(columns))
    for start in range(0, len(columns), plan.chunk):

        def consume(name: str, jacobian: LayerJacobian, first: bool = start == 0) -> None:
            for quantity in quantities:
                quantity.update(name, jacobian, first=first)

        backprop(columns[start : start + plan.chunk], consume, plan)
        for quantity in quantities:
            quantity.end_columns()
