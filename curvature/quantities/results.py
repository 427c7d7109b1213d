"""What a pass over the data leaves: plain tensors, free of the model, that add up, move and are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from lapkit.curvature.inputs import all_finite
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.curvature.quantities.storage import read, write

if TYPE_CHECKING:
    from typing_extensions import Self

SHOWN = 8  # tensors that a result names when it is printed
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class Result(ABC):
    """The state of one quantity after some examples.

    Results of parts of a data set merge into that of the whole by `a + b`. Each tensor has a key `what/parameter`,
    or `what` alone if it belongs to all parameters together.

    A result reads like a mapping: `result[name]`, `keys()`, `items()` give the main tensor of each parameter, where the
    kind has one, and otherwise the tensors by key.

    Args:
        shapes: the shape of each parameter by name, in flat order.
        tensors: the sums by key, detached.
        count: the number of examples.
        about: what else two results must have in common to be added: columns, likelihood, settings.

    Raises:
        ValueError: if there is no example, or a number is NaN or infinite.
    """

    shapes: Shapes
    tensors: Mapping[str, Tensor]
    count: int
    about: Mapping[str, str] = field(default_factory=dict)

    main: ClassVar[str] = ""  # the sort of tensor that `result[name]` means
    kinds: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        Result.kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError("No data has been seen: there is no result.")
        bad = [key for key, tensor in self.tensors.items() if tensor.is_floating_point() and not all_finite(tensor)]
        if bad:
            raise ValueError(
                f"The result {bad[0]!r} is NaN or infinite: some number, such as the square of a gradient, is beyond "
                f"the range of {self.tensors[bad[0]].dtype}. Compute in double precision: model.double() and inputs."
            )

    def __repr__(self) -> str:
        """The kind, the number of examples, and the shape and type of each tensor, but no numbers."""
        shown = [f"{k}: {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for k, t in self.tensors.items()]
        if len(shown) > SHOWN:
            shown[SHOWN - 1 : -1] = [f"... {len(shown) - SHOWN} more"]
        return f"{type(self).__name__}(count={self.count}, tensors={{{', '.join(shown)}}})"

    def keys(self) -> tuple[str, ...]:
        """What `result[...]` takes: the parameters that have a main tensor, or the tensors' own keys."""
        return tuple(self.part(self.main)) if self.main else tuple(self.tensors)

    def values(self) -> tuple[Tensor, ...]:
        """The tensors of `keys()`."""
        return tuple(self[key] for key in self.keys())

    def items(self) -> tuple[tuple[str, Tensor], ...]:
        """Pairs of `keys()` and `values()`."""
        return tuple(zip(self.keys(), self.values(), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in flat order."""
        return tuple(self.shapes)

    def part(self, what: str) -> dict[str, Tensor]:
        """The tensors of one sort by parameter, those that are there."""
        return {n: self.tensors[f"{what}/{n}"] for n in self.shapes if f"{what}/{n}" in self.tensors}

    def __getitem__(self, name: str) -> Tensor:
        """The main tensor of one parameter; of kinds without one the tensor with this key.

        Raises:
            KeyError: if there is none of that name.
        """
        key = f"{self.main}/{name}" if self.main else name
        if key not in self.tensors:
            raise KeyError(f"No {self.main or 'tensor'} of a parameter {name!r}; there are {list(self.tensors)}.")
        return self.tensors[key]

    def by_layer(self, what: str | None = None) -> dict[str, dict[str, Tensor]]:
        """The tensors of one sort, the main one by default, by module and the parameter's own name in it.

        Raises:
            KeyError: if there is no tensor of this sort.

        Example:
            >>> from lapkit.curvature.quantities.diagonal import DiagonalSum
            >>> DiagonalSum({"0.weight": (1,)}, {"value/0.weight": torch.ones(1)}, count=1).by_layer()
            {'0': {'weight': tensor([1.])}}
        """
        what = self.main if what is None else what
        if not self.part(what):
            raise KeyError(f"No tensors of the sort {what!r} by parameter; there are {list(self.tensors)}.")
        return by_layer(self.part(what))

    @abstractmethod
    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """One tensor of `self + other`, from those of both."""

    def __add__(self, other: Self) -> Self:
        """The result for the examples of both.

        Raises:
            TypeError: if the other is of another kind.
            ValueError: if parameters, settings or shapes differ.
        """
        self._check_addable(other)
        keys = [*self.tensors, *(k for k in other.tensors if k not in self.tensors)]
        merged = {}
        for key in keys:
            pair = [r.tensors[key] for r in (self, other) if key in r.tensors]
            merged[key] = pair[0] if len(pair) == 1 else self.joined(key, *pair)
        return replace(self, tensors=merged, count=self.count + other.count)

    def _check_addable(self, other: Result) -> None:
        if type(other) is not type(self):
            raise TypeError(
                f"A {type(self).__name__} and a {type(other).__name__} do not add up: add results of one kind."
            )
        if list(self.shapes.items()) != list(other.shapes.items()):
            raise ValueError(
                f"Results over other parameters do not add up: {_difference(self.shapes, other.shapes)}. "
                "Compute both for the same selection of the same model."
            )
        if dict(self.about) != dict(other.about):
            raise ValueError(
                f"Results of other settings do not add up: {_difference(self.about, other.about)}. "
                "Compute both in the same way."
            )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, with floating tensors of another type."""
        return replace(
            self,
            tensors={k: t.to(device, dtype if t.is_floating_point() else None) for k, t in self.tensors.items()},
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and everything else, which is plain enough for JSON."""
        rest = {"kind": type(self).__name__, "shapes": list(self.shapes.items()), "count": self.count}
        return dict(self.tensors), {**rest, "about": dict(self.about)}

    @staticmethod
    def from_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Result:
        """The inverse of `state`.

        Raises:
            ValueError: if the kind is not known.
        """
        if rest["kind"] not in Result.kinds:
            raise ValueError(f"Unknown kind of result {rest['kind']!r}; known are {sorted(Result.kinds)}.")
        shapes = {name: tuple(shape) for name, shape in rest["shapes"]}
        return Result.kinds[rest["kind"]].restored(shapes, tensors, rest)

    @classmethod
    def restored(cls, shapes: Shapes, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Self:
        """A result of this kind from its `state`."""
        return cls(shapes, dict(tensors), rest["count"], rest["about"])

    def save(self, path: str | PathLike[str]) -> None:
        """Write it to a safetensors file.

        Raises:
            FileNotFoundError: if there is no such folder.
        """
        write(path, *self.state())

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> Self:
        """Read what `save` has written.

        Args:
            path: the file.
            device: where the tensors go.

        Returns:
            The result, equal bit by bit.

        Raises:
            ValueError: if the file is none of lapkit's, or holds a result of another kind.
        """
        tensors, rest = read(path, device)
        found = Result.from_state(tensors, rest) if "kind" in rest else None
        if not isinstance(found, cls):
            held = rest.get("kind", f"several results {list(rest)}")
            raise ValueError(f"{path} holds {held}, expected {cls.__name__}. Read it by that class, or by Results.")
        return found


class Sum(Result):
    """Tensors that are sums over examples."""

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """Their sum.

        Raises:
            ValueError: if the shapes or devices differ; nothing is broadcast.
        """
        if one.shape != two.shape or one.device != two.device:
            raise ValueError(
                f"{key!r} is {tuple(one.shape)} on {one.device} in one result and {tuple(two.shape)} on {two.device} "
                "in the other; sums need equal shapes on one device. Move one by .to(device)."
            )
        return one + two


class PerExample(Result):
    """Tensors with one entry along the first axis for each example, in the order in which they were seen."""

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """One after the other."""
        return torch.cat([one, two])


class CurvatureSum(Sum):
    """A sum that stands for a symmetric matrix over the weights."""

    @abstractmethod
    def operator(self) -> SymmetricOperator:
        """The matrix, summed over examples, not averaged; it shares no memory with the sum."""


def by_layer(parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by parameter, grouped by the module that owns the parameter; `""` is the model itself."""
    layers: dict[str, dict[str, Any]] = {}
    for name, value in parts.items():
        layer, _, own = name.rpartition(".")
        layers.setdefault(layer, {})[own] = value
    return layers


def _difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """The first entry in which two mappings differ, or their order."""
    for key in [*one, *two]:
        if one.get(key) != two.get(key):
            return f"{key!r} is {one.get(key, 'missing')} in one and {two.get(key, 'missing')} in the other"
    return f"the order is {list(one)} in one and {list(two)} in the other"
