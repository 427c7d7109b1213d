"""The one call: any set of quantities over a data set, from shared forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from os import PathLike
from typing import Any

import torch
from torch import nn

from lapkit.curvature.accumulate import Totals, accumulate
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.columns.columns import GGN, Columns
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import Result
from lapkit.curvature.quantities.storage import read, write

Make = Callable[[Parameters], Quantity]


@dataclass(frozen=True, eq=False, repr=False)
class Results(Mapping[str, Result]):
    """Results by the names under which they were asked for.

    Args:
        entries: the results.
        totals: summed loss and number of examples.
    """

    entries: Mapping[str, Result]
    totals: Totals

    def __getitem__(self, name: str) -> Result:
        """One result.

        Raises:
            KeyError: if nothing was computed under this name.
        """
        if name not in self.entries:
            raise KeyError(f"No result {name!r}; there are {list(self.entries)}.")
        return self.entries[name]

    def __repr__(self) -> str:
        """The results by name, without their numbers."""
        shown = "".join(f"\n  {name}: {result!r}" for name, result in self.entries.items())
        return f"Results(count={self.count}, loss={float(self.totals.loss):.6g}){shown}"

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def count(self) -> int:
        """The number of examples N."""
        return self.totals.count

    def __add__(self, other: Results) -> Results:
        """The results for the examples of both.

        Raises:
            ValueError: if other quantities were asked for, or one of them does not merge.
        """
        if set(self) != set(other):
            raise ValueError(f"Results {sorted(self)} and {sorted(other)} do not merge: ask for the same quantities.")
        return Results({name: self[name] + other[name] for name in self}, self.totals + other.totals)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Results:
        """The same on another device, with floating tensors of another type."""
        return Results({n: r.to(device, dtype) for n, r in self.entries.items()}, self.totals.to(device, dtype))

    def save(self, path: str | PathLike[str]) -> None:
        """Write all of them to one safetensors file.

        Raises:
            FileNotFoundError: if there is no such folder.
        """
        tensors, headers = {":loss": self.totals.loss}, {}
        for name, result in self.entries.items():
            own, headers[name] = result.state()
            tensors |= {f"{name}:{key}": t for key, t in own.items()}
        totals = {"count": self.totals.count, "outputs": self.totals.outputs, "weight": self.totals.weight}
        write(path, tensors, {"totals": totals, "results": headers})

    @classmethod
    def load(cls, path: str | PathLike[str], device: torch.device | str = "cpu") -> Results:
        """Read what `save` has written.

        Args:
            path: the file.
            device: where the tensors go.

        Returns:
            The results, equal bit by bit.

        Raises:
            ValueError: if the file is none of lapkit's, or holds a single result.
        """
        tensors, header = read(path, device)
        if "results" not in header:
            raise ValueError(f"{path} holds a single {header.get('kind')}. Read it by Result.load.")
        entries = {
            name: Result.from_state(
                {k.removeprefix(f"{name}:"): t for k, t in tensors.items() if k.startswith(f"{name}:")}, rest
            )
            for name, rest in header["results"].items()
        }
        return cls(entries, Totals(tensors[":loss"], **header["totals"]))


def compute(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    quantities: Mapping[str, Make],
    *,
    columns: Columns | None = None,
    parameters: Parameters | Iterable[str] | None = None,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    progress_bar: bool = False,
) -> Results:
    """Compute any set of quantities together: one forward a batch, one backward for each sort of columns.

    A quantity is given by its class, or by `functools.partial` of the class and its settings. Sums carry no factor
    1/N; each result knows the number of examples, adds to that of other examples, moves and is saved.

    Args:
        model: the network; it is run in eval mode and given back as it was.
        likelihood: of targets given outputs.
        data: batches `(inputs, targets)`, or `(inputs, targets, weights)` with weights `(N,)` that multiply the
            examples' losses.
        quantities: what to compute, by names of your choice.
        columns: which curvature, for quantities without columns of their own; the exact GGN by default.
        parameters: a selection, or names of parameters or modules; all that require gradients by default.
        generator: for Monte Carlo columns.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        progress_bar: show one.

    Returns:
        One result for each name; `results.totals` has the loss, summed over all examples, as `totals.loss`.

    Raises:
        TypeError: if quantities are no classes by name, or columns or data are not what they should be.
        ValueError: if there is no data, a name is empty or holds ":", or the engine or the likelihood refuses a batch.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from torch import nn
        >>> from lapkit.curvature import Categorical, EmpiricalFisher, GGNDiagonal, GradientNorms
        >>> _ = torch.manual_seed(0)
        >>> model, data = nn.Linear(2, 3), [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))]
        >>> wanted = {
        ...     "ggn": GGNDiagonal,
        ...     "fisher": partial(GGNDiagonal, columns=EmpiricalFisher()),
        ...     "norms": GradientNorms,
        ... }
        >>> results = compute(model, Categorical(), data, wanted)
        >>> results["ggn"]["weight"].shape, results["norms"].norms().shape
        (torch.Size([3, 2]), torch.Size([4]))
        >>> bool(results["norms"].squares().sum().isclose(results["fisher"].operator().trace()))
        True
    """
    _check_asked(quantities)
    if columns is not None and not isinstance(columns, Columns):
        raise TypeError(_no_columns(columns))
    parameters = Parameters.selected(model, parameters)
    made = {name: _made(name, make, parameters) for name, make in quantities.items()}
    totals = accumulate(
        model,
        parameters,
        likelihood,
        GGN() if columns is None else columns,
        data,
        list(made.values()),
        generator=generator,
        memory_budget=memory_budget,
        forward_fn=forward_fn,
        output_axis=output_axis,
        progress_bar=progress_bar,
        total=length_hint(data) or None,
    )
    with torch.inference_mode(False):  # results are for any use, whoever calls
        return Results({name: quantity.result() for name, quantity in made.items()}, totals)


def _check_asked(quantities: Mapping[str, Make]) -> None:
    """Refuse what is no mapping from names to quantities.

    Raises:
        TypeError: if there are no names.
        ValueError: if a name is empty or holds ":".
    """
    if not isinstance(quantities, Mapping):
        raise TypeError(
            f"Quantities are given by names of your choice, got a {type(quantities).__name__}. For example: "
            '{"diagonal": GGNDiagonal, "kfac": GGNKronecker}.'
        )
    if any(not isinstance(name, str) or ":" in name or not name for name in quantities):
        raise ValueError(f"Names of quantities must not be empty or hold ':', got {list(quantities)}.")


def _made(name: str, make: Make, parameters: Parameters) -> Quantity:
    """A quantity from its class or from a `partial` of it.

    Raises:
        TypeError: if it is something else, or its columns are.
    """
    kind = getattr(make, "func", make)  # inside of a partial
    if not callable(make) or (isinstance(kind, type) and not issubclass(kind, Quantity)):
        given = f"the class {kind.__name__}" if isinstance(kind, type) else f"an object of type {type(make).__name__}"
        raise TypeError(
            f"Quantity {name!r} is {given}; expected a class such as GGNDiagonal, or functools.partial(GGNDiagonal, "
            "columns=...) for settings. Products, ekfac, kfra and hessian_diagonal are calls of their own."
        )
    try:
        quantity = make(parameters)
    except TypeError as error:
        raise TypeError(
            f"Quantity {name!r} cannot be made of the parameters alone ({error}). Expected a class such as "
            "GGNDiagonal, or functools.partial(GGNDiagonal, columns=...)."
        ) from error
    if not isinstance(quantity, Quantity):
        raise TypeError(f"Quantity {name!r} makes a {type(quantity).__name__}; expected a lapkit.curvature.Quantity.")
    if quantity.columns is not None and not isinstance(quantity.columns, Columns):
        raise TypeError(_no_columns(quantity.columns))
    return quantity


def _no_columns(given: object) -> str:
    """The message for columns that are none."""
    return f"Columns are an object such as GGN() or MonteCarloGGN(samples=1), got {given!r}."
