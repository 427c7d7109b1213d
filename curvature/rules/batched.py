"""Closed forms of batched matrix products: one weight for all, or one for each head or expert.

What `einsum` makes of a weight before the product, its axes permuted and merged, is read off the strides of a view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lapkit.curvature.capture.layout import Layout
from lapkit.curvature.jacobians.outer_product import OuterProduct
from lapkit.curvature.rules.experts import batched_experts
from lapkit.curvature.rules.linear import padded, place_of
from lapkit.curvature.rules.operand import scaled
from lapkit.curvature.rules.site import FromCotangent, Site


@dataclass(frozen=True)
class _Axis:
    """An axis of the weight: what it counts (batch, inputs or outputs), its number of those, its size and stride."""

    role: str
    number: int
    size: int
    stride: int


def batched_right_operand(site: Site) -> FromCotangent | None:
    """`x_b W_b`, x `(B, M, I)` and W `(B, I, O)`."""
    x = site.saved("batch1" if site.name == "BaddbmmBackward0" else "self")
    return _any(site, x, flip=False)


def batched_left_operand(site: Site) -> FromCotangent | None:
    """`W_b x_b`: the same, transposed."""
    x = site.saved("batch2" if site.name == "BaddbmmBackward0" else "mat2")
    return _any(site, x, flip=True)


def _any(site: Site, x: Tensor | None, *, flip: bool) -> FromCotangent | None:
    """Whichever form there is."""
    alpha = site.factor("alpha", "BaddbmmBackward0")
    if x is None or alpha is None:
        return None
    experts = batched_experts(site, x, alpha, flip=flip)
    return experts or _shared(site, x, alpha, flip=flip) or _grouped(site, x, alpha, flip=flip)


def _canonical(site: Site, tensor: Tensor, *, flip: bool) -> Tensor | None:
    """`(K, B, M, S)`, transposed if `flip`, as `(K, N, R, rest, S)`, where rest is B or M; None if S holds examples."""
    rows = 2 if flip else 1
    if site.layout.axis not in (0, rows):
        return None
    t = site.canonical(tensor)
    return t.movedim(3, -1) if flip and site.layout.axis == 0 else t


def _shared(site: Site, x: Tensor, alpha: float, *, flip: bool) -> FromCotangent | None:
    """One weight, or some rows and columns of one, for the whole batch."""
    if site.view is None or (site.view.shape[0] > 1 and site.view.stride(0) != 0):
        return None
    matrix = site.view[0].mT if flip else site.view[0]
    place, a = place_of(matrix, site.parameter), _canonical(site, x.detach()[None], flip=flip)
    if place is None or a is None:
        return None
    a = padded(scaled(a[0].flatten(1, 2), alpha), place.inputs).unsqueeze(2)  # (N, T, 1, I)
    # What shares the positions with the examples.
    beside = x.shape[0] if site.layout.axis else x.shape[2 if flip else 1]
    rows = None if site.rows is None else site.rows * beside

    def jacobian(c: Tensor) -> OuterProduct:
        g = _canonical(site, c, flip=flip)
        assert g is not None
        return OuterProduct(a, padded(g.flatten(2, 3), place.outputs).unsqueeze(3), place.transposed, site.budget, rows)

    return jacobian


def _grouped(site: Site, x: Tensor, alpha: float, *, flip: bool) -> FromCotangent | None:
    """A weight for each of several groups; groups may share their inputs, or add up to the same outputs."""
    axes = _axes(site, "boi" if flip else "bio")
    if axes is None or site.layout.axis not in (0, 2 if flip else 1) or site.rows is not None:
        return None
    order = "".join(axis.role for axis in axes)
    order = order if {*"io"} <= {*order} else order + "io".translate({ord(r): None for r in order})  # sizes of one
    if order.removeprefix("b") not in ("io", "oi", "oio", "ioi"):
        return None
    heads = math.prod(axis.size for axis in axes if axis.role == "b")
    extra = axes[-3] if len(order.removeprefix("b")) == 3 else None
    if site.layout.axis == 0 and (site.layout != Layout(0) or site.shape[0] % (site.examples * heads)):
        return None

    def factor(tensor: Tensor, role: str) -> Tensor:
        """`(K, N, T, G, size)`; the axis of an extra group is taken out of the others of its role, or repeated."""
        t = _canonical(site, tensor, flip=flip)
        assert t is not None
        if site.layout.axis == 0:  # (K, N, positions heads, M, S)
            t = t.unflatten(2, (-1, heads)).transpose(3, 4).flatten(2, 3)
        else:  # (K, N, R, positions heads, S)
            t = t.unflatten(3, (-1, heads)).flatten(2, 3)
        if extra is None:
            return t
        if extra.role != role:
            return t.unsqueeze(4).expand(*t.shape[:4], extra.size, t.shape[4]).flatten(3, 4)
        sizes = (extra.size, -1) if extra.number == 0 else (-1, extra.size)
        return t.unflatten(4, sizes).movedim(4 + extra.number, 4).flatten(3, 4)

    a = scaled(factor(x.detach()[None], "i")[0], alpha)
    transposed = order.removeprefix("b") in ("io", "oio")
    return lambda c: OuterProduct(a, factor(c, "o"), transposed, site.budget)


def _axes(site: Site, roles: str) -> list[_Axis] | None:
    """The axes of a weight in the order it is stored, neighbours of one role as one; None if it is not all there.

    Args:
        site: the use.
        roles: what the three axes of the operand count: batch, inputs, outputs.
    """
    view = site.unmerged
    if view is None:
        return None
    found, dimension = [], 0
    for role, size in zip(roles, site.operand_shape, strict=True):
        product, number = 1, 0
        while product < size or (dimension < view.ndim and view.shape[dimension] == 1):
            if dimension == view.ndim:
                return None
            product *= view.shape[dimension]
            if view.shape[dimension] > 1:
                found.append(_Axis(role, number, view.shape[dimension], view.stride(dimension)))
                number += 1
            dimension += 1
        if product != size:
            return None
    expanded = [axis for axis in found if axis.stride == 0]
    if any(axis.role != "b" or axis.number != n for n, axis in enumerate(expanded)):  # only the outermost of the batch
        return None
    stored = sorted((axis for axis in found if axis.stride), key=lambda axis: -axis.stride)
    remaining = site.parameter.numel()
    for axis in stored:
        remaining //= axis.size
        if axis.stride != remaining:
            return None
    return _merged(stored) if remaining == 1 and view.storage_offset() == 0 else None


def _merged(stored: list[_Axis]) -> list[_Axis]:
    """Neighbours that follow each other in their role as one axis."""
    runs: list[list[_Axis]] = []
    for axis in stored:
        if runs and (runs[-1][-1].role, runs[-1][-1].number + 1) == (axis.role, axis.number):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    firsts = [(run[0].role, run[0].number) for run in runs]
    return [
        _Axis(
            role=role,
            number=sum(r == role and n < number for r, n in firsts),
            size=math.prod(axis.size for axis in run),
            stride=run[-1].stride,
        )
        for run, (role, number) in zip(runs, firsts, strict=True)
    ]
