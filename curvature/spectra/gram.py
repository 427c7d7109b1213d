"""The pass that sums Gram matrices: each layer's Jacobian comes, leaves its inner products and goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.spectra.factors import Factors
from lapkit.curvature.spectra.layers import Layers, inner_products
from lapkit.curvature.spectra.sections import deliver, restricted


@dataclass(frozen=True, eq=False)
class GramSum:
    """Inner products over one group of weights.

    Args:
        matrix: `V^T V`, `(K N_c, K N_c)`.
        gradients: `V^T g_n`, `(K N_c, N)`, or None.
    """

    matrix: Tensor
    gradients: Tensor | None


@dataclass(frozen=True, eq=False)
class WrittenOut:
    """V itself, where a group has so few weights that it is smaller than its Gram matrix.

    Args:
        columns: `V^T`, `(K N_c, P)`.
        gradients: `g_n`, `(N, P)`, or None.
    """

    columns: Tensor
    gradients: Tensor | None


def inner_sums(
    factors: Factors, backprop: Backprop, groups: Mapping[str, Parameters]
) -> dict[str, GramSum | WrittenOut]:
    """What each group's eigenpairs are made of: the Gram matrix, or V where there are less than half as many weights.

    Args:
        factors: what is sent back; the model is borrowed.
        backprop: the pass of all examples, or of the part if gradients are not wanted.
        groups: each parameter in one.

    Returns:
        The sums by label.
    """
    few = {label: g for label, g in groups.items() if 2 * g.numel < len(factors.columns) * len(factors.index)}
    many = {label: group for label, group in groups.items() if label not in few}
    found: dict[str, GramSum | WrittenOut] = {}
    if few:
        part = factors.network.backprop(factors.part) if _two_batches(factors) else backprop
        for label, group in few.items():
            columns = _rows(part, factors.in_part(factors.columns), group)[:, factors.places].flatten(0, 1)
            residuals = factors.residuals
            found[label] = WrittenOut(
                columns, None if residuals is None else _rows(backprop, residuals[None], group)[0]
            )
    if many:
        names = {name for group in many.values() for name in group.names}
        found |= gram_sums(factors, restricted(backprop, names) if few else backprop, many)
    return {label: found[label] for label in groups}


def _two_batches(factors: Factors) -> bool:
    """Whether gradients come from other examples than columns."""
    return factors.separate and factors.residuals is not None


def _rows(backprop: Backprop, columns: Tensor, group: Parameters) -> Tensor:
    """What columns `(K, N, *, C)` become in the space of a group's weights, `(K, N, P)`."""
    rows = summable(columns).new_zeros(*columns.shape[:2], group.numel)
    of = dict(zip(group.names, rows.split(list(group.sizes), dim=2), strict=True))

    def write(name: str, jacobian: LayerJacobian) -> None:
        of[name].copy_(jacobian.to_dense())

    deliver(restricted(backprop, group.names), columns, write)
    return rows


def gram_sums(factors: Factors, backprop: Backprop, groups: Mapping[str, Parameters]) -> dict[str, GramSum]:
    """The Gram matrix of each group, layer by layer, with the gradients in the same pass where they can be.

    Args:
        factors: what is sent back; the model is borrowed.
        backprop: the pass of all examples, or of the part if gradients are not wanted.
        groups: each parameter in one.

    Returns:
        The sums by label.

    Reference:
        Dangel et al., ViViT, 2022, section 3 and appendix C.1.
    """
    label_of = {name: label for label, group in groups.items() for name in group.names}
    if _two_batches(factors):
        return _of_two_batches(factors, backprop, label_of)
    return _of_one_batch(factors, backprop, label_of)


def _of_one_batch(factors: Factors, backprop: Backprop, label_of: Mapping[str, str]) -> dict[str, GramSum]:
    """Columns and gradients side by side: one symmetric matrix of inner products has both."""
    columns, like = factors.in_part(factors.columns), summable(factors.columns)
    count, examples = len(columns), len(factors.part)
    if factors.residuals is not None:
        columns = torch.cat([columns, factors.residuals[None]])
    shape = (len(columns), examples, len(columns), examples)
    totals = {label: like.new_zeros(shape) for label in dict.fromkeys(label_of.values())}

    def add(names: list[str], jacobians: list[LayerJacobian]) -> None:
        total = totals[label_of[names[0]]]
        total += inner_products(jacobians)

    layers = Layers(add, label_of.__getitem__)
    deliver(backprop, columns, layers)
    layers.flush()
    return {label: _parts(totals.pop(label), count, factors) for label in list(totals)}


def _parts(total: Tensor, count: int, factors: Factors) -> GramSum:
    """Columns with columns, and columns with gradients."""
    rows = total[:count]
    if len(factors.places) < len(factors.part):
        rows = rows[:, factors.places]
        matrix = rows[:, :, :count][..., factors.places]
    else:
        matrix = rows[:, :, :count]
    size = matrix.shape[0] * matrix.shape[1]
    gradients = None if factors.residuals is None else rows[:, :, count].reshape(size, -1)
    return GramSum(matrix.reshape(size, size), gradients)


def _of_two_batches(factors: Factors, backprop: Backprop, label_of: Mapping[str, str]) -> dict[str, GramSum]:
    """Gradients of all examples, kept in factored form, meet the columns of some."""
    assert factors.residuals is not None
    like, size = summable(factors.columns), len(factors.columns) * len(factors.index)
    labels = dict.fromkeys(label_of.values())
    matrices = {label: like.new_zeros(size, size) for label in labels}
    products = {label: like.new_zeros(size, len(factors.batch)) for label in labels}
    kept: dict[str, LayerJacobian] = {}
    deliver(backprop, factors.residuals[None], kept.__setitem__)

    def add(names: list[str], jacobians: list[LayerJacobian]) -> None:
        label = label_of[names[0]]
        matrices[label] += inner_products(jacobians).reshape(size, size)
        both = [(kept.pop(name), jacobian) for name, jacobian in zip(names, jacobians, strict=True) if name in kept]
        if both:
            products[label] += inner_products([j for _, j in both], [g for g, _ in both]).reshape(size, -1)

    layers = Layers(add, label_of.__getitem__)
    deliver(factors.network.backprop(factors.part), factors.columns, layers)
    layers.flush()
    return {label: GramSum(matrices[label], products[label]) for label in labels}
