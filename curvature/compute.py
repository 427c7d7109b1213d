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
from lapkit.curvature.quantities.results import Result, read, write

Make = Callable[[Parameters], Quantity]


@dataclass(frozen=True, eq=False)
class Results(Mapping[str, Result]):
    """Results by the names under which they were asked for.

    Args:
        entries: the results.
        totals: summed loss and number of examples.
    """

    entries: Mapping[str, Result]
    totals: Totals

    def __getitem__(self, name: str) -> Result:
        return self.entries[name]

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
        """Write all of them to one safetensors file."""
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
        One result for each name, and the loss.

    Raises:
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
    if any(":" in name or not name for name in quantities):
        raise ValueError(f"Names of quantities must not be empty or hold ':', got {list(quantities)}.")
    parameters = Parameters.selected(model, parameters)
    made = {name: make(parameters) for name, make in quantities.items()}
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
