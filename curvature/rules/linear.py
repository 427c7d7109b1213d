"""Closed forms of matrix products with the weight on either side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.jacobians.outer_product import OuterProduct
from lapkit.curvature.rules.experts import selected, selected_matrix
from lapkit.curvature.rules.operand import scaled, whole
from lapkit.curvature.rules.site import FromCotangent, Site


@dataclass(frozen=True)
class Place:
    """Where a matrix (inputs x outputs) stands in a weight: at which rows and columns, perhaps the other way round.

    Args:
        transposed: whether the weight is stored as inputs x outputs.
        inputs: how many inputs of the weight come before and after those of the matrix.
        outputs: likewise.
    """

    transposed: bool
    inputs: tuple[int, int] = (0, 0)
    outputs: tuple[int, int] = (0, 0)


def place_of(matrix: Tensor, parameter: Tensor) -> Place | None:
    """The place of a view, inputs x outputs, in the parameter; None if it is not all of some rows and columns."""
    ways = [(True, matrix), (False, matrix.mT)]
    ways.sort(key=lambda way: way[1].shape != parameter.shape)  # a single row or column could be stored either way
    for transposed, view in ways:
        if whole(view, parameter):
            return Place(transposed)
    for transposed, view in ways:
        length, step = view.stride()
        if min(view.shape) < 2 or step != 1 or length < view.shape[1] or parameter.numel() % length:
            continue
        first, column = divmod(int(view.storage_offset()), length)
        rows = (first, parameter.numel() // length - first - view.shape[0])
        columns = (column, length - column - view.shape[1])
        if columns[1] >= 0:
            return Place(transposed, rows, columns) if transposed else Place(transposed, columns, rows)
    return None


def padded(factor: Tensor, around: tuple[int, int]) -> Tensor:
    """A factor with zeros where the rest of the weight is."""
    return torch.nn.functional.pad(factor, around) if any(around) else factor


def right_operand(site: Site) -> FromCotangent | None:
    """`x W`: rows of x and of the cotangent are examples or positions."""
    a = site.saved("mat1" if site.name == "AddmmBackward0" else "self")
    rows = site.along(0)
    return None if a is None or rows is None or site.view is None else _product(rows, site.view, a)


def left_operand(site: Site) -> FromCotangent | None:
    """`W x`: columns of x and of the cotangent are examples or positions."""
    a = site.saved("mat2")
    columns = site.along(1)
    return None if a is None or columns is None or site.view is None else _product(columns, site.view.mT, a)


def _product(site: Site, matrix: Tensor, a: Tensor) -> FromCotangent | None:
    """A matrix product; the layout says along which axis the examples stand, in `a` as in the cotangent."""
    alpha = site.factor("alpha", "AddmmBackward0")
    if alpha is None:
        return None
    expert = selected(matrix, site.parameter)
    if expert is not None:
        return selected_matrix(site, expert, a, alpha)
    place = place_of(matrix, site.parameter)
    if place is None:
        return None
    a = padded(scaled(site.canonical_input(a), alpha), place.inputs).unsqueeze(2)  # (N, T, 1, I)

    def jacobian(c: Tensor) -> OuterProduct:
        g = padded(site.canonical(c), place.outputs).unsqueeze(3)
        return OuterProduct(a, g, place.transposed, site.budget, site.rows)

    return jacobian


def vector_operand(site: Site) -> FromCotangent | None:
    """`x w`, a matrix times a vector: one output."""
    a = site.saved("self")
    if a is None or not site.whole:
        return None
    a = site.canonical_input(a).unsqueeze(2)  # (N, T, 1, I)
    return lambda c: OuterProduct(a, site.canonical(c)[..., None, None], budget=site.budget, rows=site.rows)


def linear_weight(site: Site) -> FromCotangent | None:
    """`x W^T` where it is one operation for inputs of any number of axes."""
    x = site.saved("input")
    axis = site.layout.axis
    if x is None or not site.whole or site.parameter.ndim != 2 or x.ndim < 2 or axis == x.ndim - 1:
        return None
    a = site.canonical_input(x).flatten(1, -2).unsqueeze(2)  # (N, T, 1, I)
    return lambda c: OuterProduct(a, site.canonical(c).flatten(2, -2).unsqueeze(3), budget=site.budget)
