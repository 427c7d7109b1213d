"""Closed forms of parameters that meet the data entry by entry: shifts, scales, class tokens, positions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lapkit.curvature.capture.layout import Layout
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian, summable
from lapkit.curvature.rules.embedding import looked_up, looked_up_entries, looks_up, rows_of
from lapkit.curvature.rules.operand import signed
from lapkit.curvature.rules.site import FromCotangent, Site

Local = Callable[[Tensor], Tensor]


def entrywise(site: Site, local: Local, *, shape: tuple[int, ...] | None = None) -> FromCotangent | None:
    """The Jacobian of a parameter that stands, broadcast, beside every entry of a node's output.

    It is the cotangent times the local derivative, summed over the axes that the operand was broadcast along.

    Args:
        site: the use.
        local: from cotangents `(K, *shape)` to those of the operand before the sum, of the same number of axes.
        shape: the operand's shape as it is aligned with the output; by default with its last axes.

    Returns:
        A function from cotangents to the Jacobian, or None if the operand differs between examples.
    """
    axes, axis = len(site.shape), site.layout.axis
    own = list(shape or (1,) * (axes - len(site.operand_shape)) + site.operand_shape)
    if own[axis] != 1:  # one value for each example, unless it is the same that was expanded
        if site.view is None or shape is not None or site.view.stride(axis - axes) != 0:
            return None
        own[axis] = 1
    gather = _gather(site, axis - axes)
    if gather is None:
        return None
    rest = own[:axis] + own[axis + 1 :]

    def jacobian(c: Tensor) -> LayerJacobian:
        values = site.canonical(local(c))  # (K, N, R, *rest)
        values = values.squeeze(2) if values.shape[2] == 1 else values.sum(2)  # a view where there is nothing to sum
        values = values.sum_to_size(*values.shape[:2], *rest)
        return gather(values.flatten(2) if rest else values[..., None])

    return jacobian


def _gather(site: Site, axis: int) -> Callable[[Tensor], LayerJacobian] | None:
    """From values `(K, N, Q)` at the places of an operand, without its examples' axis, to the parameter's Jacobian."""
    if site.whole:
        return DenseJacobian
    if looks_up(site):
        index = looked_up(site)
        if index is not None:
            return rows_of(site, _without(index[..., None], axis).flatten())
    entries = looked_up_entries(site) if looks_up(site) else site.entries
    if entries is None:
        return None
    places = _without(entries, axis).flatten()
    size = site.parameter.numel()
    known = (places >= 0).nonzero()[:, 0]  # padding of an embedding is not

    def scattered(values: Tensor) -> DenseJacobian:
        zeros = values.new_zeros(*values.shape[:2], size)
        return DenseJacobian(zeros.index_add_(2, places[known], values[..., known]))

    return scattered


def _without(operand: Tensor, axis: int) -> Tensor:
    """An operand at the first example, where all are the same."""
    return operand.narrow(axis, 0, 1) if -axis <= operand.ndim else operand


def shift(site: Site) -> FromCotangent | None:
    """A parameter that is added: its Jacobian is the cotangent, times a number the operation may have."""
    if site.use.slot == 1:
        factor = site.factor("alpha", "AddBackward0", "SubBackward0")
        sign = -1.0 if site.name == "SubBackward0" else 1.0
    else:
        factor, sign = site.factor("beta", "AddmmBackward0", "BaddbmmBackward0"), 1.0
    if factor is None:
        return None
    total = sign * factor
    return entrywise(site, lambda c: c if total == 1 else total * c)


def scale(site: Site) -> FromCotangent | None:
    """A parameter that multiplies: the cotangent times the other operand."""
    x = site.saved("other" if site.use.slot == 0 else "self")
    return None if x is None else entrywise(site, times(x))


def times(x: Tensor) -> Local:
    """Multiplication by a tensor of the forward pass, in float32 at least."""
    x = summable(x.detach())
    return lambda c: summable(c) * x


def quotient(site: Site) -> FromCotangent | None:
    """`p / x` and `x / p`."""
    x, divisor = site.saved("self"), site.saved("other")
    if divisor is None:
        return None
    divisor = summable(divisor.detach())
    if site.use.slot == 0:
        return entrywise(site, lambda c: summable(c) / divisor)
    return None if x is None else entrywise(site, times(-summable(x.detach()) / divisor.square()))


def product_added(site: Site) -> FromCotangent | None:
    """Either factor of `y + value * p * x`."""
    x = site.saved("tensor2" if site.use.slot == 1 else "tensor1")
    value = site.factor("value", "AddcmulBackward0")
    return None if x is None or value is None else entrywise(site, times(value * x))


def choice(site: Site) -> FromCotangent | None:
    """A parameter that stands where a mask says so, such as a mask token."""
    condition = site.saved("condition")
    if condition is None:
        return None
    return entrywise(site, times(condition if site.use.slot == 0 else ~condition))


def slope(site: Site) -> FromCotangent | None:
    """The slope of a parametric ReLU multiplies negative inputs."""
    x = site.saved("self")
    return None if x is None else entrywise(site, times(x.clamp_max(0)))


def concatenation(site: Site) -> FromCotangent | None:
    """A parameter laid beside the data, such as a class token: the part of the cotangent at its place."""
    dim = site.saved("dim")
    if dim is None or signed(int(dim)) % len(site.shape) == site.layout.axis:
        return None
    axis = signed(int(dim)) % len(site.shape)
    shapes = [site.shape_below(slot) for slot in range(len(site.node.next_functions))]
    before, after = shapes[: site.use.slot], shapes[site.use.slot + 1 :]
    length = site.operand_shape[axis]
    if None not in before:
        start = sum(s[axis] for s in before if s)
    elif None not in after:
        start = site.shape[axis] - length - sum(s[axis] for s in after if s)
    else:
        return None
    return entrywise(site, lambda c: c.narrow(axis + 1, start, length))


def repetition(site: Site) -> FromCotangent | None:
    """`p.repeat(...)`: the cotangent summed over the copies that one example has."""
    repeats, axis = [int(r) for r in site.saved("repeats") or ()], site.layout.axis
    own = (1,) * (len(repeats) - len(site.operand_shape)) + site.operand_shape
    blocks = site.layout == Layout(axis) and repeats and repeats[axis] % site.examples == 0
    if not site.whole or not (blocks or own[axis] == 1):
        return None
    # An example has its copies along its axis, and all of those along the others.
    sizes = [(site.shape[axis] // site.examples // own[axis], own[axis])]
    sizes += [(r, d) for i, (r, d) in enumerate(zip(repeats, own, strict=True)) if i != axis]

    def jacobian(c: Tensor) -> DenseJacobian:
        values = site.canonical(c)  # (K, N, R, *rest)
        for i, size in enumerate(sizes):
            values = values.unflatten(2 + i, size).sum(2 + i)
        return DenseJacobian(values.movedim(2, 2 + axis).flatten(2))

    return jacobian
