"""The GGN by its columns, `H = V V^T`: what low-rank posteriors and ViViT are made of."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.jacobian import LayerJacobian, summable
from lapkit.curvature.memory import default_budget
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.low_rank import LowRank, compressed
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity, add_to
from lapkit.curvature.quantities.results import CurvatureSum


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
            return LowRank(self.tensors["columns"].clone())
        columns = self.part("columns")
        return BlockDiagonal(tuple(LowRank(columns[name].clone()) for name in self.shapes))


@final
class SqrtGGN(Quantity):
    """The columns `V` of the GGN, `v_{kn} = J_n^T s_{kn}`, with `H = V V^T`, summed over examples and not averaged.

    They take `K N P` numbers, and never more than `P^2` for as many weights, since more columns than weights are
    compressed without loss.

    Args:
        parameters: the weights.
        rank: keep no more columns than this: the nearest matrix of that rank, batch by batch, which depends on the
            order of the data as soon as something is lost (`LowRankSum.dropped`). All by default.
        per_parameter: columns of each parameter by itself, for the diagonal blocks of H, instead of those of the whole.
        memory_limit: bytes that the columns may take, by default half of what is free.
        columns: which columns of the likelihood it wants, if not those of the call.

    Raises:
        ValueError: if the rank or the limit is not positive.

    Reference:
        Dangel et al., ViViT, 2022, equation (3); Dangel, Backpropagation Beyond the Gradient, chapter 7 (SqrtGGN).
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
        self.pieces: dict[str, list[Tensor]] = {}
        self.traces: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        if not self._rows:
            self._check_fits(*jacobian.shape[:2])
        self._rows[name] = jacobian.to_dense()

    def end_columns(self) -> None:
        """Keep what the layers have left."""
        if not self._rows:
            return
        if self.per_parameter:
            for name, rows in self._rows.items():
                self._keep(f"/{name}", rows)
        else:
            like = next(iter(self._rows.values()))
            sizes = zip(self.parameters.names, self.parameters.sizes, strict=True)
            self._keep("", torch.cat([self._rows.get(n, like.new_zeros(*like.shape[:2], s)) for n, s in sizes], dim=-1))
        self._rows = {}

    def _keep(self, key: str, rows: Tensor) -> None:
        """Take `(K, N, P)`; compress when there are twice as many columns as are wanted."""
        pieces = self.pieces.setdefault(key, [])
        pieces.append(rows.flatten(0, 1).T)
        add_to(self.traces, f"trace{key}", torch.linalg.vector_norm(rows, dtype=torch.float64).square())
        limit = min(rows.shape[-1], self.rank or rows.shape[-1])
        if sum(piece.shape[1] for piece in pieces) > 2 * limit:
            self.pieces[key] = [limited(torch.cat(pieces, dim=1), self.rank)]

    def _check_fits(self, columns: int, examples: int) -> None:
        """Refuse before memory runs out.

        Raises:
            ValueError: if the next columns would not fit beside those that are kept.
        """
        held = sum(piece.nbytes for pieces in self.pieces.values() for piece in pieces)
        each = self.parameters.numel * max(self.parameters.dtype.itemsize, 4)
        needed = held + columns * examples * each
        if needed > self.memory_limit:
            raise ValueError(
                f"The columns of the GGN over {self.parameters.numel} weights take {each / 2**20:.3g} MiB each; with "
                f"{columns} x {examples} more they would take {needed / 2**30:.3g} GiB after {self.count} examples, "
                f"beyond the limit of {self.memory_limit / 2**30:.3g} GiB. Give a rank and smaller batches, fewer "
                "columns (MonteCarloGGN), fewer examples or weights, or a larger memory_limit."
            )

    def result(self) -> LowRankSum:
        """See `Quantity.result`."""
        like = summable(self.parameters.tensors[0].detach())
        names = [f"/{name}" for name in self.parameters.names] if self.per_parameter else [""]
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        tensors = {}
        for key, size in zip(names, sizes if self.per_parameter else [sum(sizes)], strict=True):
            columns = torch.cat([like.new_zeros(size, 0), *self.pieces.get(key, [])], dim=1)
            tensors[f"columns{key}"] = limited(columns, self.rank)
            tensors[f"trace{key}"] = self.traces.get(f"trace{key}", like.new_zeros((), dtype=torch.float64)).clone()
        return LowRankSum(self.shapes, tensors, self.count, self.about)


def limited(columns: Tensor, rank: int | None) -> Tensor:
    """No more columns than weights, nor than the rank."""
    limit = min(len(columns), rank or len(columns))
    return columns if columns.shape[1] <= limit else compressed(columns, rank)
