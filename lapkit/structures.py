"""From data to the curvature in one structure: one pass, or two, over all weights of tensors or over single ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lapkit.curvature import (
    BlockDiagonal,
    Columns,
    Factored,
    Likelihood,
    LowRankSum,
    Parameters,
    Quantity,
    SqrtGGN,
    Subnetwork,
    SymmetricOperator,
    accumulate,
)
from lapkit.curvature.accumulate import Totals
from lapkit.curvature.quantities.factored_ggn import FactoredSum
from lapkit.curvature.quantities.results import CurvatureSum
from lapkit.curvature.subnetwork import OfSubnetwork


@dataclass(frozen=True)
class Structure:
    """How curvature is kept.

    Args:
        make: makes what is summed over the data, of a selection of weights.
        refine: makes what is summed in a second pass, from the weights and the result of the first.
        factored: whether the structure is that of whole tensors, so that single weights are cut out of the matrix of
            their tensors; of other structures, the Jacobian is cut.
    """

    make: Callable[[Parameters], Quantity]
    refine: Callable[[Parameters, Any], Quantity] | None = None
    factored: bool = False

    def __str__(self) -> str:
        """What is summed, by its names in `lapkit.curvature`."""
        return " + ".join(_called(make) for make in (self.make, self.refine) if make is not None)

    def sum(
        self,
        model: nn.Module,
        weights: Parameters | Subnetwork,
        likelihood: Likelihood,
        columns: Columns,
        data: Iterable[Any],
        *,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> tuple[CurvatureSum, Totals]:
        """Pass over the data.

        Args:
            model: the network.
            weights: whole tensors, or single weights of some.
            likelihood: of targets given outputs.
            columns: which curvature.
            data: batches; where there are two passes, of a kind that can be run through twice.
            generator: for Monte Carlo columns, of which both passes see the same.
            options: see `accumulate`.

        Returns:
            The curvature and the other sums.

        Raises:
            TypeError: if there are two passes and the data can be run through only once, or data are of a wrong type.
            ValueError: if the passes see different numbers of examples, or `accumulate` refuses.
        """
        if self.refine is not None and isinstance(data, Iterator):
            raise TypeError(
                f"This structure takes two passes over the data, and a {type(data).__name__} is used up after one. "
                "Give a data loader or a list of batches."
            )
        whole = weights.whole if isinstance(weights, Subnetwork) else weights
        source = torch.default_generator if generator is None else generator

        def run(quantity: Quantity) -> Totals:
            return accumulate(model, whole, likelihood, columns, data, [quantity], generator=source, **options)

        quantity = self._quantity(weights)
        state = source.get_state()
        totals = run(quantity)
        with torch.inference_mode(False):  # whoever calls, results are for any use
            found: Any = quantity.result()
        if self.refine is not None:
            source.set_state(state)
            refined = self.refine(whole, found)
            again = run(refined)
            if again.count != totals.count:
                raise ValueError(
                    f"The first pass over the data saw {totals.count} examples and the second {again.count}: this "
                    "structure needs data that are the same each time."
                )
            with torch.inference_mode(False):
                found = refined.result()
        return found, totals

    def _quantity(self, weights: Parameters | Subnetwork) -> Quantity:
        """What the first pass sums."""
        if not isinstance(weights, Subnetwork):
            return self.make(weights)
        return self.make(weights.whole) if self.factored else OfSubnetwork(weights, self.make)

    def operator(self, sums: CurvatureSum, weights: Parameters | Subnetwork) -> SymmetricOperator:
        """The matrix over the weights that `sum` has found, by no more columns than weights."""
        found = sums.operator()
        if self.factored and isinstance(weights, Subnetwork):
            assert isinstance(found, BlockDiagonal)  # what factors are of
            return weights.principal(found)
        if isinstance(found, Factored) and found.rank > found.size:  # else what is factored grows with the data
            return found.expanded()
        return found


def _called(make: Callable[..., Quantity]) -> str:
    if not isinstance(make, partial):
        return getattr(make, "__name__", repr(make))
    return f"{_called(make.func)}({', '.join(f'{name}={value!r}' for name, value in make.keywords.items())})"


def added(one: CurvatureSum, two: CurvatureSum, parameters: Parameters) -> CurvatureSum:
    """The curvature of the examples of both; columns in different forms are written out first.

    Args:
        one: of some examples.
        two: of others.
        parameters: the weights of both.

    Returns:
        Their sum.

    Raises:
        TypeError: if they are of different kinds.
        ValueError: if settings or weights differ, or the kind does not add up.
    """
    if type(one) is not type(two):
        one, two = (_written_out(s, parameters) if isinstance(s, FactoredSum) else s for s in (one, two))
    return one + two


def _written_out(sums: FactoredSum, parameters: Parameters) -> LowRankSum:
    """The columns themselves."""
    quantity = SqrtGGN(parameters, per_parameter=sums.about["blocks"] != "none")
    quantity.about = dict(sums.about)
    quantity.begin_batch(sums.count, None)
    for batch in sums.batches:
        for name, part in zip(parameters.names, batch, strict=True):
            quantity.update(name, part, first=True)
        quantity.end_columns()
    quantity.end_batch()
    return quantity.result()
