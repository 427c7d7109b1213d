"""The GGN by its columns, none of which is written out: a posterior in function space, over factored Jacobians."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.jacobians.conversion import converted, floating_type, tensors
from lapkit.curvature.jacobians.jacobian import Jacobian, LayerJacobian
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.operators.low_rank import LowRank, columns_of, gram
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.curvature.operators.woodbury import Woodbury

Batch = tuple[LayerJacobian, ...]  # of one batch, a part for each parameter


@final
@dataclass(frozen=True, eq=False)
class Factored(Woodbury):
    """`factor V V^T + diag(offset)`, whose columns V are the rows of Jacobians that stay factored.

    What takes P x R numbers in `LowRank` takes here what went into the layers and what came back, and R x R numbers:
    for a linear layer `N (I + K O)` instead of `N K I O`. All is done by inner products between Jacobians (`gram`),
    products (`project`) and combinations of rows (`pull_back`). One number, or one for each parameter, is added to the
    diagonal at the cost of R x R matrices; one for each weight needs a weighted Gram matrix, for which some rows at a
    time are written out, within the Jacobians' memory budget.

    Args:
        batches: Jacobians with the columns of a likelihood, for each batch those of all parameters in flat order.
        offset: the diagonal, one number, `(L,)` for each parameter, or `(P,)`; zero by default.
        factor: of the columns' part.
        memo: inner products of the columns, shared by all operators with the same ones.

    Raises:
        ValueError: if there is no batch, batches differ in their parameters, or the offset does not fit.

    Example:
        >>> import torch
        >>> from lapkit.curvature import OuterProduct
        >>> jacobian = OuterProduct(torch.ones(2, 1, 1, 3), torch.ones(1, 2, 1, 1, 4))  # two rows of 12 ones
        >>> float(Factored(((jacobian,),)).shift(1.0).logdet())
        3.2189

    Reference:
        Dangel et al., ViViT, 2022, equation (3) and appendix C.1.
    """

    batches: tuple[Batch, ...]
    offset: Tensor | float = 0.0
    factor: Tensor | float = 1.0
    memo: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        sizes = {tuple(part.shape[2] for part in batch) for batch in self.batches}
        if len(sizes) != 1:
            raise ValueError(f"Batches must have Jacobians in the same parameters, got {sorted(sizes)} weights.")
        if self._diagonal.shape not in ((), (len(self.groups),), (self.size,)):
            raise ValueError(
                f"Expected an offset (), ({len(self.groups)},) or ({self.size},), got {tuple(self._diagonal.shape)}."
            )

    @cached_property
    def groups(self) -> list[int]:
        """How many weights each parameter has."""
        return [part.shape[2] for part in self.batches[0]]

    @cached_property
    def _slices(self) -> list[slice]:
        """Where the columns of each batch stand among all."""
        counts = [batch[0].shape[0] * batch[0].shape[1] for batch in self.batches]
        ends = torch.tensor(counts).cumsum(0).tolist()
        return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]

    @property
    def size(self) -> int:
        """The number of weights P."""
        return sum(self.groups)

    @property
    def rank(self) -> int:
        """The number of columns R, an upper bound of the rank without the diagonal."""
        return self._slices[-1].stop

    @property
    def nbytes(self) -> int:
        """What the Jacobians take."""
        found = {(t.data_ptr(), t.nbytes) for batch in self.batches for part in batch for t in tensors(part)}
        return sum(size for _, size in found)

    @cached_property
    def _like(self) -> Tensor:
        first = self.batches[0][0]
        return torch.empty(0, dtype=floating_type(first), device=tensors(first)[0].device)

    def expanded(self) -> LowRank:
        """The same matrix with its columns written out, no more of them than weights."""
        rows = (torch.cat([part.to_dense() for part in batch], dim=-1).flatten(0, 1) for batch in self.batches)
        if self.rank > self.size:
            columns = columns_of(_summed(gram(some) for some in rows)).to(self._like.dtype)
        else:
            columns = torch.cat([some.T for some in rows], dim=1)
        return LowRank(columns, self._diagonal, self.factor, tuple(self.groups))

    def scale(self, factor: Tensor | float) -> Factored:
        """See `SymmetricOperator.scale`."""
        offset = self._diagonal * torch.as_tensor(factor, dtype=self.dtype, device=self.device)
        return replace(self, offset=offset, factor=self._scale * factor)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Factored:
        """The Jacobians keep their type: what is computed from them has that of the offset."""
        device = function(self._like).device
        batches = self.batches
        if device != self._like.device:
            batches = tuple(tuple(converted(part, device=device) for part in batch) for batch in batches)
        memo = {key: value.to(device) for key, value in self.memo.items()}
        return Factored(batches, function(self._diagonal), self._scale.to(device), memo)

    def _add(self, other: SymmetricOperator) -> SymmetricOperator:
        """The batches of both.

        Raises:
            ValueError: if they were scaled differently.
        """
        if not isinstance(other, Factored):
            return super()._add(other)
        if not torch.equal(self._scale, other._scale.to(self.device)):
            raise ValueError("Factored columns that were scaled differently do not add up: add first, and then scale.")
        return Factored((*self.batches, *other.batches), self._shifted(other._diagonal), self.factor)

    def _shift(self, delta: Tensor) -> Factored:
        return replace(self, offset=self._shifted(delta))

    def _parts(self, index: int, dtype: torch.dtype) -> list[LayerJacobian]:
        """One parameter's Jacobian in all batches."""
        return [converted(batch[index], dtype) for batch in self.batches]

    def _down(self, vectors: Tensor) -> Tensor:
        total = vectors.new_zeros(self.rank, vectors.shape[1])
        for index, v in enumerate(vectors.split(self.groups)):
            for where, part in zip(self._slices, self._parts(index, vectors.dtype), strict=True):
                total[where] += part.project(v).flatten(0, 1)
        return total

    def _up(self, coefficients: Tensor) -> Tensor:
        indices = range(len(self.groups))
        return torch.cat([torch.stack(list(self._combined(index, coefficients)), dim=1) for index in indices])

    def _combined(self, index: int, coefficients: Tensor) -> Iterator[Tensor]:
        """One parameter's part of combinations of the columns, `(R, S)` to S times `(P_l,)`, one at a time."""
        parts = self._parts(index, coefficients.dtype)
        for column in coefficients.T:
            pairs = zip(self._slices, parts, strict=True)
            yield _summed(part.pull_back(column[here].view(part.shape[:2])) for here, part in pairs)

    def _squares(self, root: Tensor | None = None) -> Tensor:
        indices = range(len(self.groups))
        if root is None:
            return torch.cat([_summed(batch[i].square_sum().double() for batch in self.batches) for i in indices])
        return self._summed_squares(root, root.new_ones(root.shape[1]))

    def _summed_squares(self, root: Tensor, factors: Tensor) -> Tensor:
        """The diagonal of `V root diag(factors) root^T V^T`: each combination is squared and added up at once."""
        found = []
        for index in range(len(self.groups)):
            pairs = zip(factors, self._combined(index, root), strict=True)
            found.append(_summed(factor * combined.double().square() for factor, combined in pairs))
        return torch.cat(found)

    def inverse_gram(self, jacobian: Jacobian) -> Tensor:
        """By a difference of Gram matrices, as `inverse_quadratic`; in double precision from the start."""
        if self._lost:
            return super().inverse_gram(jacobian)
        jacobian, inverse = converted(jacobian, torch.float64), self._inverse_offset
        split = zip(jacobian.split(self.groups), self._of_parameters(inverse), strict=True)
        whole = _summed(_cross(part, part, weight) for part, weight in split).unflatten(2, jacobian.shape[:2])
        inner = self._inner(jacobian, inverse).transpose(0, 1).flatten(0, 1)  # (K N, R)
        half = torch.linalg.solve_triangular(self._cholesky, inner.T, upper=False)
        result = whole - self._scale * (half.T @ half).view_as(whole)
        left, total = (m.flatten(2).flatten(0, 1).diagonal() for m in (result, whole))
        enough = (left >= 10 * torch.finfo(torch.float64).eps ** 0.5 * total).all()
        return result.to(self.dtype) if enough else super().inverse_gram(jacobian).to(self.dtype)

    def _written(self) -> Tensor:
        rows = [torch.cat([part.to_dense().double() for part in batch], dim=-1).flatten(0, 1) for batch in self.batches]
        return torch.cat(rows).T

    def _of_parameters(self, values: Tensor) -> Sequence[Tensor]:
        """For each parameter, one number `()` or those of its weights."""
        if values.ndim == 0:
            return [values] * len(self.groups)
        return values.unbind() if len(values) == len(self.groups) else values.split(self.groups)

    def _inner(self, jacobian: Jacobian, weights: Tensor) -> Tensor:
        dtype = floating_type(jacobian)
        columns, examples, _ = jacobian.shape
        found = self._like.new_zeros(examples, columns, self.rank, dtype=dtype)
        split = zip(jacobian.split(self.groups), self._of_parameters(weights), strict=True)
        for index, (other, weight) in enumerate(split):
            for where, part in zip(self._slices, self._parts(index, dtype), strict=True):
                product = _cross(other, part, weight.to(dtype))  # (K, N, R of the batch)
                found[:, :, where] += product.transpose(0, 1)
        return found

    # -- inner products of the columns

    def _group_grams(self) -> Iterator[Tensor]:
        for index in range(len(self.groups)):
            yield self._filled(index, None)

    def _weighted_gram(self, weights: Tensor) -> Tensor:
        return _summed(self._filled(index, w) for index, w in enumerate(weights.split(self.groups)))

    def _weighted_gram_backward(self, middle: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(middle)
        return self._summed_squares(vectors, values)

    def _filled(self, index: int, weights: Tensor | None) -> Tensor:
        """One parameter's inner products, the half of which is computed."""
        parts = self._parts(index, torch.float64)
        found = self._like.new_zeros(self.rank, self.rank, dtype=torch.float64)
        for i, (one, left) in enumerate(zip(self._slices, parts, strict=True)):
            for two, right in zip(self._slices[: i + 1], parts[: i + 1], strict=True):
                if weights is None:
                    block = (left.gram() if left is right else left.gram(right)).flatten(2).flatten(0, 1)
                else:
                    block = _cross(left, right, weights).flatten(0, 1)
                found[one, two] = block
                if left is not right:
                    found[two, one] = block.T
        return found


def _cross(jacobian: Jacobian, other: Jacobian, weights: Tensor) -> Tensor:
    """`J diag(weights) J'^T`, `(K, N, L M)`, with weights `()` or `(P,)`.

    With a number for each weight J is written out for a few examples at a time, J' never.
    """
    if weights.ndim == 0:
        return weights * jacobian.gram(other).flatten(2)
    columns, examples, size = jacobian.shape
    step = chunk_length(examples, 3 * 8 * columns * size, jacobian.budget)
    parts = []
    for start in range(0, examples, step):
        rows = jacobian.select(slice(start, min(start + step, examples))).to_dense() * weights  # (K, n, P)
        products = other.project(rows.flatten(0, 1).T)  # (L, M, K n)
        parts.append(products.movedim(2, 0).flatten(1).unflatten(0, rows.shape[:2]))
    return torch.cat(parts, dim=1)


def _summed(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)
