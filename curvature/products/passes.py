"""Passes over a data set in which each batch keeps its graph, for products that read the data again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.accumulate import EMPTY
from lapkit.curvature.capture.forward import ForwardFunction, forward
from lapkit.curvature.capture.self_check import check_examples_apart
from lapkit.curvature.columns.sampling import Draws, example_keys
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.parameters import Parameters, unwrapped


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch after its forward pass.

    Args:
        output: `(N, C)` or `(N, T, C)`, with its graph.
        y: checked targets.
        weights: of the examples, `(N,)`, or None for ones.
        raw: inputs and targets as they came, and how many examples came before, which tell the examples apart.
        model: the network.
        run: its forward pass over this batch, or others given as `x`.
    """

    output: Tensor
    y: Tensor
    weights: Tensor | None
    raw: tuple[Any, Any, int]
    model: nn.Module
    run: Callable[..., Tensor]

    @property
    def f(self) -> Tensor:
        """The outputs without a graph, in a type that can be summed."""
        return summable(self.output.detach())

    @property
    def draws(self) -> Draws:
        """Random numbers of the examples, the same in every pass."""
        x, y, before = self.raw
        return Draws(0, example_keys((x, y), len(self.output), before).to(self.output.device))

    def losses(self, likelihood: Likelihood) -> Tensor:
        """The weighted losses of the examples, `(N,)`."""
        return self.weighted(likelihood.loss(summable(self.output), self.y))

    def weighted(self, vectors: Tensor) -> Tensor:
        """Each example's part of `(N, *)` times its weight."""
        return vectors if self.weights is None else vectors * self.weights.reshape(-1, *[1] * (vectors.ndim - 1))


@dataclass(frozen=True, eq=False)
class Pass:
    """The batches of a data set, one forward pass at a time; to be iterated over while the model is borrowed.

    Args:
        model: the network.
        parameters: the selected weights.
        likelihood: of targets given outputs.
        data: batches.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
    """

    model: nn.Module
    parameters: Parameters
    likelihood: Likelihood
    data: Iterable[Any]
    forward_fn: ForwardFunction | None = None
    output_axis: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Every batch of one pass.

        Raises:
            ValueError: if there is none, or the outputs have no graph.
        """
        count = 0
        for number, batch in numbered(self.data):
            result = self._forward(batch, number, count)
            count += len(result.output)
            yield result
        if not count:
            raise ValueError(EMPTY)

    def _forward(self, batch: Any, number: int, count: int) -> Batch:
        x, y, weights = unpack(batch, number)
        device = self.parameters.device
        model = unwrapped(self.model)
        run = partial(
            forward,
            x=to_device(x, device),
            parameters=self.parameters,
            forward_fn=self.forward_fn,
            output_axis=self.output_axis,
        )
        output = run(model, y=y)
        if torch.is_grad_enabled() and not output.requires_grad:
            raise ValueError(
                f"The model's output does not depend on the selected parameters {list(self.parameters.names)}: it was "
                "detached, computed under torch.no_grad() or by another library."
            )
        f = summable(output.detach())
        if weights is not None and len(weights) != len(f):
            raise ValueError(f"Got {len(weights)} weights for a batch of {len(f)} examples: one weight an example.")
        checked = self.likelihood.check(f, y, self.output_axis)
        return Batch(output, checked, None if weights is None else weights.detach().to(f), (x, y, count), model, run)

    def check_repeatable(self) -> None:
        """Compare the losses of two passes.

        Raises:
            ValueError: if they are not the same, because the data or the model changes from pass to pass.
        """
        with torch.no_grad():
            first, again = self._summary(), self._summary()
        unlike = torch.finfo(self.parameters.dtype).eps ** 0.5 * (first[2] + again[2])
        if first[0] != again[0] or abs(first[1] - again[1]) > unlike:
            raise ValueError(
                f"Two passes over the data disagree: {first[0]} examples with a loss of {first[1]:.8g}, then "
                f"{again[0]} with {again[1]:.8g}. A product must see the same examples each time: leave out random "
                "augmentation, noise in the model and drop_last with shuffling. check=False skips this test."
            )

    def check_examples_apart(self) -> None:
        """Look at the first batch with more than one example, or the first.

        Raises:
            ValueError: if the outputs of an example depend on which others stand in the batch.
        """
        batch = next((b for b in self if len(b.output) > 1), None) or next(iter(self))
        x = to_device(batch.raw[0], self.parameters.device)
        check_examples_apart(batch.model, x, batch.output, lambda other: batch.run(batch.model, x=other))

    def _summary(self) -> tuple[int, float, float]:
        """The number of examples, the sum of their losses and that of the losses' magnitudes."""
        count, loss, magnitude = 0, 0.0, 0.0
        for batch in self:
            losses = batch.losses(self.likelihood).double()
            count, loss = count + len(losses), loss + float(losses.sum())
            magnitude += float(losses.abs().sum())
        return count, loss, magnitude
