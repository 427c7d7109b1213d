"""The GGN by its columns, `H = V V^T`, kept as what went into the layers and what came back: V is not written out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.conversion import beside, converted, mapped
from lapkit.curvature.jacobians.jacobian import DenseJacobian, LayerJacobian, summable
from lapkit.curvature.jacobians.patches import Patches
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.memory import default_budget
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.factored import Batch, Factored
from lapkit.curvature.operators.woodbury import Woodbury
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.packing import Packer, unpack
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import CurvatureSum, Shapes
from lapkit.curvature.quantities.sqrt_ggn import LowRankSum, SqrtGGN

if TYPE_CHECKING:
    from typing_extensions import Self


@final
@dataclass(frozen=True, eq=False)
class FactoredSum(CurvatureSum):
    """The Jacobians of all examples with the columns of the GGN, for each batch those of all parameters.

    Args:
        batches: in the order in which they were seen.
    """

    batches: tuple[Batch, ...] = ()

    def __add__(self, other: Self) -> Self:
        """The Jacobians of both.

        Raises:
            TypeError: if the other is of another kind.
            ValueError: if parameters or settings differ.
        """
        self._check_addable(other)
        return replace(self, batches=(*self.batches, *other.batches), count=self.count + other.count)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, or of another floating type."""
        place = None if device is None else torch.device(device)
        return replace(self, batches=tuple(tuple(converted(p, dtype, place) for p in b) for b in self.batches))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `Result.state`: the Jacobians as they are, not written out."""
        packer = Packer((LayerJacobian, Patches))
        batches = packer.pack(self.batches, "batches")
        return packer.tensors, {**super().state()[1], "batches": batches}

    @classmethod
    def restored(cls, shapes: Shapes, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Self:
        """See `Result.restored`."""
        batches = unpack(rest["batches"], tensors, (LayerJacobian, Patches))
        return cls(shapes, {}, rest["count"], rest["about"], batches)

    def operator(self) -> Factored | BlockDiagonal:
        """`V V^T` over all weights, or one such block for each parameter, written out where it has fewer weights."""
        if self.about["blocks"] == "none":
            return Factored(self.batches)
        parts = [Factored(tuple((batch[index],) for batch in self.batches)) for index in range(len(self.shapes))]
        blocks: list[Woodbury] = [part.expanded() if part.rank >= part.size else part for part in parts]
        return BlockDiagonal(tuple(blocks))


@final
class FactoredGGN(Quantity):
    """The factored Jacobians of all examples with the columns of the GGN: curvature in function space.

    They take `N T (I + K O)` numbers for a layer from I to O numbers at T positions, where `SqrtGGN` takes `N K I O`.

    Args:
        parameters: the weights.
        per_parameter: the diagonal blocks of H, one for each parameter, instead of the whole.
        memory_limit: bytes that the Jacobians may take, by default half of what is free.
        columns: which columns of the likelihood it wants, if not those of the call.

    Raises:
        ValueError: if the limit is not positive.

    Reference:
        Dangel et al., ViViT, 2022, equation (3) and appendix C.1.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        per_parameter: bool = False,
        memory_limit: int | None = None,
        columns: Columns | None = None,
    ) -> None:
        if memory_limit is not None and memory_limit < 1:
            raise ValueError(f"The memory limit is at least 1, got {memory_limit}.")
        super().__init__(parameters, columns=columns)
        self.memory_limit = memory_limit or 2 * default_budget(parameters.device)
        self.about["blocks"] = "parameters" if per_parameter else "none"
        self.batches: list[Batch] = []
        self.nbytes = 0  # of what is kept
        self.rank = 0  # the number of columns
        self._arrived: dict[str, LayerJacobian] = {}
        self._chunks: list[Batch] = []
        self._kept: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self._arrived[name] = mapped(jacobian, self._own)

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy, one of each tensor in a batch: a view would keep all that it was cut from, or change with it."""
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._kept:
            self._check_fits(tensor.nbytes)
            self._kept[key] = tensor, tensor.detach().clone(memory_format=torch.contiguous_format)
            self.nbytes += tensor.nbytes
        return self._kept[key][1]

    def _check_fits(self, more: int) -> None:
        """Refuse before memory runs out.

        Raises:
            ValueError: if more bytes would not fit beside what is kept.
        """
        if self.nbytes + more > self.memory_limit:
            raise ValueError(
                f"The factored Jacobians take {(self.nbytes + more) / 2**30:.3g} GiB after {self.count} examples, "
                f"beyond the limit of {self.memory_limit / 2**30:.3g} GiB. Give fewer examples or weights, fewer "
                "columns (MonteCarloGGN), a rank (SqrtGGN), or a larger memory_limit."
            )

    def end_columns(self) -> None:
        """Keep what the layers have left, beside earlier columns of the batch."""
        if not self._arrived:
            return
        columns, examples, _ = next(iter(self._arrived.values())).shape
        nothing = summable(self.parameters.tensors[0].detach()).new_zeros(1, 1, 1)
        sizes = zip(self.parameters.names, self.parameters.sizes, strict=True)
        batch = tuple(
            self._arrived.get(name) or DenseJacobian(nothing.expand(columns, examples, size)) for name, size in sizes
        )
        self.rank += columns * examples
        self._arrived = {}
        self._chunks.append(batch)

    def end_batch(self) -> None:
        """Put the columns of the batch side by side where they have a common form."""
        self.batches += _joined(self._chunks)
        self._chunks, self._kept = [], {}

    def result(self) -> FactoredSum:
        """See `Quantity.result`."""
        return FactoredSum(self.shapes, {}, self.count, self.about, tuple(self.batches))


def _joined(chunks: list[Batch]) -> list[Batch]:
    """One batch instead of several chunks of its columns, if every parameter's Jacobians have a common form."""
    whole = chunks[:1]
    for chunk in chunks[1:]:
        pairs = [beside(one, two) for one, two in zip(whole[-1], chunk, strict=True)]
        found = [pair for pair in pairs if pair is not None]
        if len(found) == len(chunk):
            whole[-1] = tuple(found)
        else:
            whole.append(chunk)
    return whole


@final
class LowRankGGN(Quantity):
    """The GGN by its columns in the form that takes less memory: `FactoredGGN`, or `SqrtGGN` once that is smaller.

    Counted are the Jacobians, or `P min(R, P)` numbers for R columns, and the Gram matrix of the smaller side.

    Args:
        parameters: the weights.
        per_parameter: the diagonal blocks of H, one for each parameter, instead of the whole.
        memory_limit: bytes that it may take, by default half of what is free.
        columns: which columns of the likelihood it wants, if not those of the call.

    Raises:
        ValueError: if the limit is not positive.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        per_parameter: bool = False,
        memory_limit: int | None = None,
        columns: Columns | None = None,
    ) -> None:
        super().__init__(parameters, columns=columns)
        self.per_parameter, self.memory_limit = per_parameter, memory_limit
        self.form: FactoredGGN | SqrtGGN = FactoredGGN(
            parameters, per_parameter=per_parameter, memory_limit=memory_limit
        )

    def begin(self, columns: Columns, likelihood: Likelihood) -> None:
        """See `Quantity.begin`."""
        super().begin(columns, likelihood)
        self.form.begin(columns, likelihood)
        self._begun = columns, likelihood

    def begin_batch(self, examples: int, weights: Tensor | None) -> None:
        """See `Quantity.begin_batch`."""
        super().begin_batch(examples, weights)
        self.form.begin_batch(examples, weights)

    def abandon(self) -> None:
        """See `Quantity.abandon`."""
        super().abandon()
        self.form.abandon()

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        self.form.update(name, jacobian, first=first)

    def end_columns(self) -> None:
        """See `Quantity.end_columns`."""
        self.form.end_columns()

    def end_batch(self) -> None:
        """Write the columns out when they take less."""
        self.form.end_batch()
        if isinstance(self.form, FactoredGGN):
            rank = self.form.rank
            if self.form.nbytes + 8 * rank**2 > self._written_out(rank):
                self.form = self._expanded(self.form)

    def _written_out(self, rank: int) -> int:
        """Bytes of the columns and the smaller of their Gram matrices."""
        sizes = self.parameters.sizes if self.per_parameter else [self.parameters.numel]
        each = max(self.parameters.dtype.itemsize, 4)
        return sum(each * size * min(rank, size) + 8 * min(rank, size) ** 2 for size in sizes)

    def _expanded(self, form: FactoredGGN) -> SqrtGGN:
        columns = SqrtGGN(self.parameters, per_parameter=self.per_parameter, memory_limit=self.memory_limit)
        columns.begin(*self._begun)
        columns.begin_batch(form.count, None)
        for batch in form.batches:
            for name, part in zip(self.parameters.names, batch, strict=True):
                columns.update(name, part, first=True)
            columns.end_columns()
        columns.end_batch()
        return columns

    def result(self) -> FactoredSum | LowRankSum:
        """See `Quantity.result`."""
        return self.form.result()
