"""From the space of outputs to that of weights and back: `V c`, with one backward pass a vector, and `V^T v`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.products.vectors import CACHE, Passage, Vectors, bytes_each, pulled_back
from lapkit.curvature.spectra.factors import Factors
from lapkit.curvature.spectra.sections import restricted


@dataclass(frozen=True, eq=False)
class Combination:
    """Sums over columns and gradients that are to become vectors of weights.

    Args:
        group: the weights.
        columns: what multiplies the columns, `(K, N_c, R)`.
        gradients: what multiplies the gradients, `(N, R)`; nothing by default.
    """

    group: Parameters
    columns: Tensor
    gradients: Tensor | None = None


def pulled(factors: Factors, combinations: Sequence[Combination]) -> list[Tensor]:
    """`sum_kn c_kn J_n^T s_kn + sum_n u_n g_n` of each, `(P, R)`: one forward pass for all, one backward for a vector.

    Raises:
        RuntimeError: if the model has changed.
    """
    whole = any(c.gradients is not None for c in combinations)
    with factors.network.lent():
        output = factors.network.outputs(factors.batch if whole else factors.part)
        return [_pulled(factors, output, c, whole=whole) for c in combinations]


def _pulled(factors: Factors, output: Tensor, combination: Combination, *, whole: bool) -> Tensor:
    """One group's vectors."""
    group = combination.group
    cotangents = torch.einsum("knr,kn...->rn...", combination.columns.to(factors.columns), factors.columns)
    cotangents = factors.in_batch(cotangents) if whole else factors.in_part(cotangents)
    if combination.gradients is not None and factors.residuals is not None:
        weights = combination.gradients.to(factors.residuals)
        cotangents = cotangents + torch.einsum("nr,n...->rn...", weights, factors.residuals)
    rows = [factors.columns.new_empty(0, group.numel)]
    rows += _sent(factors, output, group, cotangents.to(output.dtype)) if len(cotangents) else []
    return torch.cat(rows).T


def _sent(factors: Factors, output: Tensor, group: Parameters, cotangents: Tensor) -> list[Tensor]:
    """Rows `(r, P)`, as many at a time as the budget allows."""
    budget = factors.network.engine.budget

    def product(vector: Vectors) -> Vectors:
        return pulled_back([output], group.tensors, list(vector))

    passage, each = Passage(budget), bytes_each(output, group)
    passage.together = output.device.type != "cpu" or each <= CACHE
    rows = []
    for number, chunk in enumerate(cotangents.split(chunk_length(len(cotangents), each, budget))):
        found = passage(product, (chunk,), verify=number == 0)
        rows.append(torch.cat([summable(t).flatten(1) for t in found], dim=1))
    return rows


def pushed(factors: Factors, groups: Sequence[Parameters], vectors: Sequence[Tensor]) -> list[Tensor]:
    """`V^T v` of vectors `(P, R)` of each group, `(K, N_c, R)`: one forward pass, and one backward for a column.

    Layers' Jacobians are projected as they come, so that no operation needs a second derivative.

    Raises:
        RuntimeError: if the model has changed.
    """
    kinds = [v.shape[1] for v in vectors]
    totals = [factors.columns.new_zeros(len(factors.columns), len(factors.part), r) for r in kinds]
    pieces = {
        name: (number, piece)
        for number, (group, v) in enumerate(zip(groups, vectors, strict=True))
        for name, piece in zip(group.names, v.split(list(group.sizes)), strict=True)
    }
    with factors.network.lent():
        backprop = restricted(factors.network.backprop(factors.part), set(pieces))
        columns = factors.in_part(factors.columns).to(backprop.output.dtype)
        plan = backprop.plan(len(columns))
        for start in range(0, len(columns), plan.chunk):
            part = slice(start, start + plan.chunk)

            def consume(name: str, jacobian: LayerJacobian, part: slice = part) -> None:
                number, piece = pieces[name]
                totals[number][part] += jacobian.project(piece.to(totals[number]))

            backprop(columns[part], consume, plan)
    return [total[:, factors.places] for total in totals]
