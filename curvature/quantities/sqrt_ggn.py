"""The GGN by its columns, `H = V V^T`: what low-rank posteriors and ViViT are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.conversion import beside, tensors
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian, summable
from lapkit.curvature.memory import default_budget
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.low_rank import LowRank, compressed, gram
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import CurvatureSum
from lapkit.curvature.quantities.running_factor import RunningFactor, root


@final
class LowRankSum(CurvatureSum):
    """`V` of `H = V V^T`: `columns` `(P, R)`, or `columns/NAME` for each parameter by itself, and likewise `trace`.

    More columns than weights, or than the rank that was asked for, are compressed, also when results are added.
    """

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """Columns side by side; traces add up."""
        if not key.startswith("columns"):
            return super().joined(key, one, two)
        return limited(torch.cat([one, two], dim=1), self._rank)

    @property
    def _rank(self) -> int | None:
        return int(self.about["rank"]) if "rank" in self.about else None

    def dropped(self) -> dict[str, float]:
        """How much of the trace of H a limited rank has lost, as a fraction, for each key of columns."""
        lost = {}
        for key, columns in self.tensors.items():
            if key.startswith("columns"):
                trace = float(self.tensors[key.replace("columns", "trace", 1)])
                lost[key] = max(1 - float(columns.double().square().sum()) / trace, 0.0) if trace else 0.0
        return lost

    def operator(self) -> LowRank | BlockDiagonal:
        """`V V^T` over all weights, or one such block for each parameter."""
        if "columns" in self.tensors:
            sizes = tuple(math.prod(shape) for shape in self.shapes.values())
            return LowRank(self.tensors["columns"].clone(), sizes=sizes)
        columns = self.part("columns")
        return BlockDiagonal(tuple(LowRank(columns[name].clone()) for name in self.shapes))


@final
class SqrtGGN(Quantity):
    """The columns `V` of the GGN, `v_{kn} = J_n^T s_{kn}`, with `H = V V^T`, summed over examples and not averaged.

    All of them take `K N P` numbers for N examples in all, but never more than `P^2`: beyond as many columns as weights
    the matrix is summed instead, in float64 and without loss.

    With a rank k they take `P k` numbers, `2 P k` while a batch is added, and no batch of more than k columns is ever
    expanded. A single batch that is added at once leaves the best matrix of that rank. Several batches, or the parts
    into which a large one is cut where its inner products would exceed the memory limit, leave a matrix below H,
    `H - V V^T` being positive semi-definite with the trace that was dropped (`LowRankSum.dropped`): no eigenvalue, and
    no quadratic form of a unit vector, is off by more than that. What is kept depends on the order of the data as soon
    as something is dropped.

    Args:
        parameters: the weights.
        rank: keep no more columns than this. All by default.
        per_parameter: columns of each parameter by itself, for the diagonal blocks of H, instead of those of the whole.
        memory_limit: bytes that the columns may take, by default half of what is free.
        columns: which columns of the likelihood it wants, if not those of the call.

    Raises:
        ValueError: if the rank or the limit is not positive.

    Reference:
        Dangel et al., ViViT, 2022, equation (3) and section 2.2; Dangel, Backpropagation Beyond the Gradient, chapter 7
        (SqrtGGN).
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        rank: int | None = None,
        per_parameter: bool = False,
        memory_limit: int | None = None,
        columns: Columns | None = None,
    ) -> None:
        if (rank is not None and rank < 1) or (memory_limit is not None and memory_limit < 1):
            raise ValueError(f"Rank and memory limit are at least 1, got rank={rank}, memory_limit={memory_limit}.")
        super().__init__(parameters, columns=columns)
        self.rank, self.per_parameter = rank, per_parameter
        self.memory_limit = memory_limit or 2 * default_budget(parameters.device)
        self.about["blocks"] = "parameters" if per_parameter else "none"
        if rank is not None:
            self.about["rank"] = str(rank)
        sizes = {f"/{n}": [s] for n, s in zip(parameters.names, parameters.sizes, strict=True)}
        like = summable(parameters.tensors[0].detach())
        self.factors = {
            key: RunningFactor(each, rank, self.memory_limit, like)
            for key, each in (sizes if per_parameter else {"": parameters.sizes}).items()
        }
        self._chunk: dict[str, LayerJacobian] = {}
        self._chunks: list[dict[str, LayerJacobian]] = []  # those of one batch

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        if not self._chunk and not self._chunks:
            self._check_fits(*jacobian.shape[:2])
        self._chunk[name] = jacobian

    def end_columns(self) -> None:
        """Keep the factors of all columns of a batch, if they are to be compressed and if there is room for them."""
        if self._chunk:
            self._chunks.append(self._chunk)
        self._chunk = {}
        if self.rank is None or self._bytes() > self.memory_limit // 4:
            self._add()

    def end_batch(self) -> None:
        """Add the columns that wait for it."""
        self._add()

    def _bytes(self) -> int:
        """What the factors take that wait for the end of the batch; inputs are shared between columns."""
        held = (t for chunk in self._chunks for jacobian in chunk.values() for t in tensors(jacobian))
        return sum({t.data_ptr(): t.nbytes for t in held}.values())

    def _add(self) -> None:
        """Add the columns that have come since the last time, if there are any."""
        names = [name for name in self.parameters.names if any(name in chunk for chunk in self._chunks)]
        whole = {name: self._joined(name) for name in (names if self.per_parameter else self.parameters.names) if names}
        self._chunks = []
        if self.per_parameter:
            for name, jacobian in whole.items():
                self.factors[f"/{name}"].add([jacobian])
        elif whole:
            self.factors[""].add(list(whole.values()))

    def _joined(self, name: str) -> LayerJacobian:
        """One parameter's Jacobian in all columns, zero in those that autograd knows not to depend on it."""
        size = math.prod(self.shapes[name])
        return joined([chunk.get(name) or self._zeros(chunk, size) for chunk in self._chunks])

    def _zeros(self, chunk: dict[str, LayerJacobian], size: int) -> DenseJacobian:
        like = summable(self.parameters.tensors[0].detach())
        return DenseJacobian(like.new_zeros(1, 1, 1).expand(*next(iter(chunk.values())).shape[:2], size))

    def _check_fits(self, columns: int, examples: int) -> None:
        """Refuse before memory runs out.

        Raises:
            ValueError: if the next columns would not fit beside those that are kept.
        """
        each = self.parameters.numel * max(self.parameters.dtype.itemsize, 4)
        numbers = sum(factor.numbers(columns * examples) for factor in self.factors.values())
        needed = numbers * max(self.parameters.dtype.itemsize, 4)
        if needed > self.memory_limit:
            raise ValueError(
                f"The columns of the GGN over {self.parameters.numel} weights take {each / 2**20:.3g} MiB each; with "
                f"{columns} x {examples} more they would take {needed / 2**30:.3g} GiB after {self.count} examples, "
                f"beyond the limit of {self.memory_limit / 2**30:.3g} GiB. Give a rank, or a smaller one, fewer "
                "columns (MonteCarloGGN), fewer examples or weights, or a larger memory_limit."
            )

    def result(self) -> LowRankSum:
        """See `Quantity.result`."""
        found = {f"columns{key}": factor.columns().clone() for key, factor in self.factors.items()}
        traces = {f"trace{key}": factor.trace.clone() for key, factor in self.factors.items()}
        return LowRankSum(self.shapes, found | traces, self.count, self.about)


def joined(chunks: Sequence[LayerJacobian]) -> LayerJacobian:
    """All columns of the same examples, one chunk after the other; expanded where chunks have no common form."""
    if len(chunks) == 1:
        return chunks[0]
    one, two = joined(chunks[: len(chunks) // 2]), joined(chunks[len(chunks) // 2 :])
    return beside(one, two) or DenseJacobian(torch.cat([one.to_dense(), two.to_dense()]))


def limited(columns: Tensor, rank: int | None) -> Tensor:
    """No more columns than weights, nor than the rank."""
    limit = min(len(columns), rank or len(columns))
    if columns.shape[1] <= limit:
        return columns
    return root(gram(columns.T)).to(columns.dtype) if rank is None else compressed(columns, rank)
