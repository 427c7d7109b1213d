"""Closed forms of a stack of matrices whose rows come by expert: selected, gathered for each row, or sorted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lapkit.curvature.capture.internals import saved
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.jacobians.routed import RoutedJacobian
from lapkit.curvature.rules.operand import replay, scaled, signed, whole
from lapkit.curvature.rules.site import FromCotangent, Site


def selected(view: Tensor, parameter: Tensor) -> tuple[int, bool] | None:
    """Which one of a stack of matrices an operand (inputs x outputs) is, and whether it is stored that way round.

    Args:
        view: the operand as a view of the parameter, without data.
        parameter: the weight.

    Returns:
        Its number and whether it is stored as inputs x outputs; None if it is no single one of several.
    """
    if parameter.ndim < 3 or math.prod(parameter.shape[:-2]) == 1:
        return None
    shape = parameter.shape[-2:]
    number, rest = divmod(int(view.storage_offset()), shape.numel())
    for transposed, matrix in ((False, view.mT), (True, view)):
        if not rest and matrix.shape == shape and matrix.is_contiguous():
            return number, transposed
    return None


def selected_matrix(site: Site, matrix: tuple[int, bool], a: Tensor, alpha: float) -> FromCotangent:
    """`x W_e` or `W_e x` for one expert e; rows of x stand along the axis of the examples.

    Args:
        site: the use.
        matrix: what `selected` found.
        a: the other operand.
        alpha: what the product is multiplied by.
    """
    flip, (number, transposed) = site.layout.axis == 1, matrix
    rows = scaled(summable(a.detach().mT if flip else a.detach()), alpha)
    expert = torch.full((len(rows),), number, device=a.device)
    owner = site.layout.owners(len(rows), site.examples).to(a.device)
    return lambda c: _jacobian(site, rows, c.mT if flip else c, owner, expert, transposed=transposed)


def batched_experts(site: Site, x: Tensor, alpha: float, *, flip: bool) -> FromCotangent | None:
    """`x_b W_e(b)`: batches of rows of which each has an expert, or all the same; `W_e(b) x_b` if `flip`."""
    rows = site.along(0) or site.along(2 if flip else 1)
    found = _gathered(site, flip=flip) or _the_same(site, flip=flip)
    if found is None or rows is None:
        return None
    number, transposed = found
    x = x.detach().mT if flip else x.detach()  # (B, M, I)
    a, expert = scaled(summable(x.flatten(0, 1)), alpha), number[:, None].expand(x.shape[:2]).flatten()
    axis = min(rows.layout.axis, 1)
    owner = rows.layout.owners(x.shape[axis], site.examples).to(x.device)
    owner = (owner if axis else owner[:, None]).expand(x.shape[:2]).flatten()
    return lambda c: _jacobian(site, a, (c.mT if flip else c).flatten(1, 2), owner, expert, transposed=transposed)


def grouped_right_operand(site: Site) -> FromCotangent | None:
    """`x[rows of e] W_e`: tokens sorted by expert, a stretch of rows for each expert's weight."""
    x, ends = site.saved("self"), site.saved("offs")
    if x is None or ends is None or site.view is None or site.layout.axis != 0 or x.ndim != 2 or site.view.ndim != 3:
        return None
    transposed = whole(site.view, site.parameter)  # (E, I, O)
    if not transposed and not whole(site.view.mT, site.parameter):
        return None
    owner = site.layout.owners(len(x), site.examples).to(x.device)
    expert = torch.searchsorted(ends.to(torch.int64), torch.arange(len(x), device=x.device), right=True)
    kept = (expert < site.view.shape[0]).nonzero()[:, 0]
    a, owner, expert = summable(x.detach()[kept]), owner[kept], expert[kept]
    return lambda c: _jacobian(site, a, c[:, kept], owner, expert, transposed=transposed)


def _jacobian(site: Site, a: Tensor, g: Tensor, owner: Tensor, expert: Tensor, *, transposed: bool) -> RoutedJacobian:
    experts = math.prod(site.parameter.shape[:-2])
    return RoutedJacobian(a, summable(g), owner, expert, site.examples, experts, transposed, site.budget)


def _the_same(site: Site, *, flip: bool) -> tuple[Tensor, bool] | None:
    """The number of the one expert of the whole batch, `(B,)`, and whether it is stored as inputs x outputs."""
    if site.view is None or (site.view.shape[0] > 1 and site.view.stride(0) != 0):
        return None
    found = selected(site.view[0].mT if flip else site.view[0], site.parameter)
    if found is None:
        return None
    return torch.full(site.view.shape[:1], found[0], device=site.parameter.device), found[1]


def _gathered(site: Site, *, flip: bool) -> tuple[Tensor, bool] | None:
    """The expert of each matrix of the batch, `(B,)`, where copies of theirs were looked up, and how it is stored."""
    if not site.steps or site.parameter.ndim != 3:
        return None
    (node, _), *rest = site.steps
    if node.name() == "IndexBackward0":
        first, *others = saved(node, "indices")
        index = first if not any(isinstance(other, Tensor) for other in others) else None
    elif node.name() == "IndexSelectBackward0" and signed(int(saved(node, "dim"))) == 0:
        index = saved(node, "index")
    else:
        return None
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        return None
    matrices = replay(rest, torch.empty(*index.shape, *site.parameter.shape[1:], device="meta"))
    if matrices is None or matrices.ndim != 3 or matrices.shape[0] != index.numel() or matrices.storage_offset():
        return None
    matrices = matrices.mT if flip else matrices
    transposed = matrices.shape[1:] == site.parameter.shape[1:] and matrices.is_contiguous()
    if not transposed and not (matrices.shape[:0:-1] == site.parameter.shape[1:] and matrices.mT.is_contiguous()):
        return None
    return index.flatten().long() % len(site.parameter), transposed
