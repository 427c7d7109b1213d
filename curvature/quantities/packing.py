"""Frozen dataclasses as tensors and plain values, and back, without running what a file says.

A Jacobian, a likelihood or a prior is made of tensors, numbers, words and others of its kind: its name and its fields
say everything. What comes back is of classes that derive from some roots, and of no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor

PLAIN = (type(None), bool, int, float, str)
Roots = tuple[type, ...]


class NotStorable(TypeError):
    """A value, such as a function, that no file can hold."""


class Packer:
    """Takes values apart and collects their tensors; one that is used several times is there once.

    Args:
        roots: instances of dataclasses that derive from one of these may be taken apart, and such classes named.

    Example:
        >>> import torch
        >>> from lapkit.curvature import Gaussian, Likelihood
        >>> packer = Packer((Likelihood,))
        >>> packed = packer.pack(Gaussian(torch.tensor(0.5)), "noise")
        >>> packed, packer.tensors
        ({'kind': 'Gaussian', 'fields': {'noise': {'tensor': 'noise.noise'}}}, {'noise.noise': tensor(0.5000)})
        >>> unpack(packed, packer.tensors, (Likelihood,))
        Gaussian(noise=tensor(0.5000))
    """

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[object, ...], str] = {}

    def pack(self, value: Any, key: str) -> Any:
        """A value for JSON, with its tensors put aside.

        Args:
            value: made of numbers, words, tensors, tuples, mappings by words, classes (partial ones too), and
                dataclasses.
            key: what its tensors' names begin with.

        Returns:
            Numbers, words, and lists and dicts of them.

        Raises:
            NotStorable: if there is anything else in it.
        """
        if isinstance(value, PLAIN):
            return value
        if isinstance(value, Tensor):
            return {"tensor": self._put(value.detach(), key)}
        if type(value) in (tuple, list):
            return {"tuple": [self.pack(v, f"{key}.{i}") for i, v in enumerate(value)]}
        if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
            return {"mapping": {k: self.pack(v, f"{key}.{k}") for k, v in value.items()}}
        if isinstance(value, type) and issubclass(value, self.roots):
            return {"class": value.__name__}
        if isinstance(value, partial) and not value.args:
            return {"partial": self.pack(value.func, key), "options": self.pack(value.keywords, key)}
        if isinstance(value, self.roots) and is_dataclass(value) and not isinstance(value, type):
            parts = {f.name: self.pack(getattr(value, f.name), f"{key}.{f.name}") for f in fields(value) if f.init}
            return {"kind": type(value).__name__, "fields": parts}
        raise NotStorable(f"{key} is {value!r}, which cannot be stored: only tensors, numbers, words and classes can.")

    def _put(self, value: Tensor, key: str) -> str:
        """The name under which a tensor is among the others; it is kept, so that no other takes its memory."""
        place = value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
        if value.numel() and place in self._names:
            return self._names[place]
        self.tensors[key], self._names[place] = value, key
        return key


def unpack(packed: Any, tensors: Mapping[str, Tensor], roots: Roots) -> Any:
    """The value that a `Packer` has taken apart.

    Args:
        packed: its result.
        tensors: those put aside.
        roots: what classes may derive from.

    Returns:
        A value equal to the packed one; lists have become tuples.

    Raises:
        ValueError: if it speaks of a class that there is not, or not only once.
    """
    if isinstance(packed, PLAIN):
        return packed
    if "tensor" in packed:
        return tensors[packed["tensor"]]
    if "tuple" in packed:
        return tuple(unpack(p, tensors, roots) for p in packed["tuple"])
    if "mapping" in packed:
        return {k: unpack(p, tensors, roots) for k, p in packed["mapping"].items()}
    if "class" in packed:
        return _named(packed["class"], roots)
    if "partial" in packed:
        return partial(unpack(packed["partial"], tensors, roots), **unpack(packed["options"], tensors, roots))
    return _named(packed["kind"], roots)(**{k: unpack(p, tensors, roots) for k, p in packed["fields"].items()})


def _named(name: str, roots: Roots) -> type:
    """The class of that name.

    Raises:
        ValueError: if there is not exactly one.
    """
    found = {kind for root in roots for kind in _descendants(root) if kind.__name__ == name}
    if len(found) != 1:
        what = "no class" if not found else f"{len(found)} classes"
        raise ValueError(
            f"The class {name!r} is needed, and there is {what} of that name. If it is one of your own, import its "
            "module first; if it is lapkit's, this was written by another version."
        )
    return found.pop()


def _descendants(kind: type) -> Iterator[type]:
    yield kind
    children: list[type] = kind.__subclasses__()
    for child in children:
        yield from _descendants(child)
