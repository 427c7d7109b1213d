"""A matrix that is a sum over the examples of a data set, multiplied by without being formed: what its kinds share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.memory import chunk_length, default_budget
from lapkit.curvature.parameters import Parameters, borrowed
from lapkit.curvature.products.forward_mode import ForwardMode
from lapkit.curvature.products.linearised import Linearised, Push, Restricted
from lapkit.curvature.products.matrix_free import MatrixFree
from lapkit.curvature.products.passes import Batch, Pass
from lapkit.curvature.products.vectors import CACHE, Passage, Vectors, bytes_each, twice_differentiable

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class DataProduct(MatrixFree):
    """`A v` for a matrix A that is a sum over the examples of a data set.

    It is that of the likelihood's loss, free of dispersion, and a sum, never a mean: divide by the number of examples
    for that. Weights of examples multiply their terms. Vectors are in the flat order of `Parameters`.

    Args:
        model: the network; it is borrowed during each product and given back as it was.
        likelihood: of targets given outputs.
        data: batches `(inputs, targets)` or `(inputs, targets, weights)`, read again for each product: a list or a data
            loader. The order may change, the examples may not.
        parameters: the rows and columns of the matrix; all trainable ones by default.
        blocks: keep only the blocks of single parameters on the diagonal, or those of groups, each a sequence of names
            of parameters or of modules; the whole matrix by default.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        memory_budget: bytes that intermediates may take; a quarter of what is free by default.
        check: first compare two passes over the data, which finds augmentation and other changing inputs, and test the
            derivatives of one batch, which finds operations that are wrong when they are differentiated twice.

    Raises:
        TypeError: if the data can be read only once.
        ValueError: if two passes over the data disagree, there is no data, or groups do not hold each parameter once.
        RuntimeError: if an operation of the model cannot be differentiated twice.
    """

    model: nn.Module
    likelihood: Likelihood
    data: Iterable[Any]
    _: KW_ONLY
    parameters: Parameters | Iterable[str] | None = None
    blocks: bool | Sequence[Sequence[str]] = False
    forward_fn: ForwardFunction | None = None
    output_axis: int | None = None
    memory_budget: int | None = None
    check: bool = True

    def __post_init__(self) -> None:
        chosen = self.chosen
        chosen.check_finite()
        self._groups  # noqa: B018 (groups that do not fit are refused here)
        if isinstance(self.data, Iterator):
            raise TypeError(
                f"The data is a {type(self.data).__name__}, which can be read only once, and every product reads it. "
                "Give a data loader or list(data)."
            )
        if self.check:
            with borrowed(self.model, chosen), twice_differentiable(self.model):
                self._pass.check_repeatable()
                self._pass.check_examples_apart()
                self._check_derivatives(next(iter(self._pass)))

    @abstractmethod
    def _prepare(self, batch: Batch, count: int) -> Restricted:
        """The product of one batch, ready for vectors, of which there will be so many."""

    def _check_derivatives(self, batch: Batch) -> None:
        Linearised(batch.output, self.chosen).check()

    @cached_property
    def _forward_mode(self) -> ForwardMode:
        return ForwardMode(self.chosen)

    def _pushed(self, batch: Batch, count: int) -> Push | None:
        """`J v` of a batch in forward mode, where that pays; a graph serves several blocks, a pass forward only one."""
        return self._forward_mode.push(batch, count) if len(self._groups) == 1 else None

    @cached_property
    def chosen(self) -> Parameters:
        """The parameters whose curvature it is."""
        return Parameters.selected(self.model, self.parameters)

    @cached_property
    def _groups(self) -> Groups:
        if self.blocks is False:
            return (tuple(range(len(self.chosen.names))),)
        if self.blocks is True:
            return tuple((i,) for i in range(len(self.chosen.names)))
        return grouped(self.chosen, self.blocks)

    @property
    def _pass(self) -> Pass:
        return Pass(self.model, self.chosen, self.likelihood, self.data, self.forward_fn, self.output_axis)

    def batches(self) -> Iterator[Batch]:
        """The batches of one pass over the data, each with its graph; to be iterated over inside `borrowed`."""
        yield from self._pass

    @property
    def size(self) -> int:
        """The number of weights P."""
        return self.chosen.numel

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, and at least float32: results are sums over the data."""
        return torch.promote_types(self.chosen.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return self.chosen.device

    def _matmul(self, vectors: Tensor) -> Tensor:
        rows = vectors.T.contiguous()
        tensors = self.chosen.tensors
        parts = tuple(v.to(t.dtype) for v, t in zip(self.chosen.split(rows).values(), tensors, strict=True))
        total = torch.zeros_like(rows)
        totals = tuple(self.chosen.split(total).values())
        budget = default_budget(self.device) if self.memory_budget is None else self.memory_budget
        passage, chunk = Passage(budget), 1
        with borrowed(self.model, self.chosen), twice_differentiable(self.model):
            for number, batch in enumerate(self._pass):
                if number == 0:
                    each = bytes_each(batch.output, self.chosen)
                    chunk = chunk_length(len(rows), each, budget)
                    passage.together = self.device.type != "cpu" or each <= CACHE
                product = self._prepare(batch, len(rows))
                self._add(totals, product, parts, passage, chunk, verify=number == 0)
        return total.T

    def _add(
        self, totals: Vectors, product: Restricted, parts: Vectors, passage: Passage, chunk: int, *, verify: bool
    ) -> None:
        """One batch's product with all vectors, block by block."""
        for group in self._groups:
            for start in range(0, len(parts[0]), chunk):
                here = slice(start, start + chunk)
                given, sums = (tuple(tensors[i][here] for i in group) for tensors in (parts, totals))
                passage.add(partial(product, group), given, sums, verify=verify and start == 0)


def grouped(parameters: Parameters, groups: Iterable[Iterable[str]]) -> Groups:
    """The indices of the parameters that each group of names picks.

    Args:
        parameters: the selection.
        groups: names of parameters or of modules, which stand for all parameters inside.

    Returns:
        One tuple of indices for each group.

    Raises:
        ValueError: if a name picks nothing, or a parameter is in no group or in several.
    """
    wanted = [tuple(group) for group in groups]
    found = [
        [any(n == w or n.startswith(f"{w}.") for n in parameters.names) for w in group] or [False] for group in wanted
    ]
    if not all(all(hits) for hits in found):
        raise ValueError(f"Groups {wanted} hold names of no selected parameter or module, or none at all.")
    result = tuple(
        tuple(i for i, n in enumerate(parameters.names) if any(n == w or n.startswith(f"{w}.") for w in group))
        for group in wanted
    )
    counts = [sum(i in group for group in result) for i in range(len(parameters.names))]
    wrong = [n for n, count in zip(parameters.names, counts, strict=True) if count != 1]
    if wrong:
        raise ValueError(f"Each parameter belongs into one group; {wrong} are in none or in several of {wanted}.")
    return result
