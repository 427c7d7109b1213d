"""The same Jacobian in another type, place or memory, and Jacobians of several chunks of columns as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import Jacobian

J = TypeVar("J", bound=Jacobian)


def converted(jacobian: J, dtype: torch.dtype | None = None, device: torch.device | None = None) -> J:
    """A Jacobian with floating entries of another type, or on another device; itself where nothing changes."""
    return mapped(jacobian, lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))


def floating_type(jacobian: Jacobian) -> torch.dtype:
    """The type that results have: that of the entries, float32 at least."""
    return reduce(torch.promote_types, (t.dtype for t in tensors(jacobian) if t.is_floating_point()), torch.float32)


def tensors(jacobian: Jacobian) -> list[Tensor]:
    """Everything it is made of."""
    found: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        found.append(t)
        return t

    mapped(jacobian, keep)
    return found


def mapped(jacobian: J, function: Callable[[Tensor], Tensor]) -> J:
    """The same form with every tensor it is made of changed by a function."""
    result: J = _mapped(jacobian, function)
    return result


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_mapped(v, function) for v in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    old = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
    new = {name: _mapped(v, function) for name, v in old.items()}
    return value if all(new[name] is old[name] for name in old) else replace(value, **new)


def beside(one: J, two: Jacobian) -> J | None:
    """The Jacobian with the columns of both, for the same examples; None where they have no common form.

    Only what came back belongs to columns; everything else must be equal in both.
    """
    if type(one) is not type(two):
        return None
    try:
        joined: J = _beside(one, two, "")
    except _NoCommonFormError:
        return None
    return joined


class _NoCommonFormError(ValueError):
    """Two Jacobians differ in more than their columns."""


def _beside(one: Any, two: Any, name: str) -> Any:
    if isinstance(one, Tensor) and name in ("g", "values"):  # columns come first
        return torch.cat([one, two])
    if isinstance(one, tuple) and len(one) == len(two):
        return tuple(_beside(a, b, name) for a, b in zip(one, two, strict=True))
    if is_dataclass(one) and type(one) is type(two):
        pairs = {f.name: (getattr(one, f.name), getattr(two, f.name)) for f in fields(one) if f.init}
        return replace(one, **{key: _beside(a, b, key) for key, (a, b) in pairs.items()})  # type: ignore[type-var]
    both = isinstance(one, Tensor) and isinstance(two, Tensor)
    if one is two or (torch.equal(one, two) if both else not isinstance(one, Tensor) and one == two):
        return one
    raise _NoCommonFormError
