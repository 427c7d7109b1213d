"""KFAC: each parameter's block as a Kronecker product of second moments of what went in and of what came back."""

from __future__ import annotations

import math
from typing import Literal, final, get_args

import torch
from torch import Tensor

from lapkit.curvature.columns.columns import Columns
from lapkit.curvature.jacobians.jacobian import LayerJacobian, averaged
from lapkit.curvature.jacobians.moments import add_second_moment, mirrored
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.operators.kronecker_product import KroneckerProduct
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.quantity import Quantity, add_to, check_same_form
from lapkit.curvature.quantities.results import CurvatureSum

Setting = Literal["expand", "reduce"]


@final
class KroneckerSum(CurvatureSum):
    """Kronecker factors before they are divided.

    `output/NAME` is B, `input/NAME` is A times `positions/NAME`, a number or one for each group, `(G,)`, as for
    experts, each of which sees rows of its own; `transposed/NAME` is there for parameters that are
    stored as inputs x outputs. An embedding tied to a product has both its factors in `output/NAME`; see
    `TiedJacobian.output_moment`.
    """

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """Sums add up; that a parameter is stored as inputs x outputs stays as it is."""
        return one if key.startswith("transposed/") else super().joined(key, one, two)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The two factors of one parameter's block, rows of the weight first: `(G, R, R)` and `(G, C, C)`.

        A diagonal factor of rows is `(G, R)`.

        Raises:
            KeyError: if the outputs do not depend on this parameter.
        """
        b, a = self.tensors[f"output/{name}"], self.tensors[f"input/{name}"]
        if b.ndim == 2:
            return _tied_factors(b, a.shape[1])
        a, b = averaged(a, self.tensors[f"positions/{name}"]), b.clone()
        return (a, b) if f"transposed/{name}" in self.tensors else (b, a)

    def operator(self) -> BlockDiagonal:
        """One Kronecker block for each parameter, zero for those that the outputs do not depend on."""
        like = next(iter(self.tensors.values()), torch.zeros(()))
        known = self.part("output")
        return BlockDiagonal(
            tuple(
                KroneckerProduct(*self.factors(n)) if n in known else Diagonal(like.new_zeros(math.prod(shape)))
                for n, shape in self.shapes.items()
            )
        )


@final
class GGNKronecker(Quantity):
    """`B (x) A` for each weight, group by group; exact blocks for biases and other small parameters.

    With N examples, T positions t that share a weight, and cotangents g of all columns, sums over whatever an index is
    not left free of:

    - expand: `B = sum g_t g_t^T`, `A = (sum a_t a_t^T) / (N T)`; exact for deep linear networks whose loss is that of
      each position by itself.
    - reduce: `B = sum (sum_t g_t) (sum_t g_t)^T`, `A = (sum (mean_t a_t) (mean_t a_t)^T) / N`; exact for deep linear
      networks that average over positions before the loss.

    The two are equal for T = 1. With the exact columns this is KFLR, with Monte Carlo columns KFAC. The division by T
    keeps the trace of convolutions near that of the exact block; without it the product is tens to hundreds of times
    too large. Several uses of a weight count as further positions. An example's weight counts it as that many examples.
    Embeddings have a diagonal A, how often each row is read, in either setting. Experts that are matrices of one weight
    have a block each, `B_e (x) A_e` over the rows that were sent there, divided by their own number; an expert without
    rows has B = 0. With reduce, the rows that one example sends to one expert are its positions there, and N counts the
    examples that sent any.

    Positions without a target (`ignore_index`, padding) count in A like all others, since a layer's positions need not
    be those of the outputs: blocks are off by the ratio of the mean of `a a^T` over all positions to that over those
    with a target. Exact structures and EKFAC's trace are not affected. Leave padding out of the batches where inputs
    there are of another size.

    Args:
        parameters: the weights.
        setting: what is assumed of positions.
        columns: which columns it wants, if not those of the call.

    Raises:
        ValueError: if the setting is another.

    Reference:
        Martens and Grosse, 2015; Grosse and Martens, A Kronecker-factored approximate Fisher matrix for convolution
        layers, 2016; Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network
        architectures, 2023 (expand and reduce); Dangel, Backpropagation Beyond the Gradient, table 5.1.
    """

    def __init__(self, parameters: Parameters, setting: Setting = "expand", *, columns: Columns | None = None) -> None:
        if setting not in get_args(Setting):
            raise ValueError(f"The setting of Kronecker factors is 'expand' or 'reduce', got {setting!r}.")
        super().__init__(parameters, columns=columns)
        self.setting = setting
        self.about["setting"] = setting
        self.sums: dict[str, Tensor] = {}
        self.halves: dict[str, Tensor] = {}  # sums of second moments, see `add_second_moment`
        self._weights: Tensor | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def begin_batch(self, examples: int, weights: Tensor | None) -> None:
        """See `Quantity.begin_batch`."""
        super().begin_batch(examples, weights)
        self._weights = weights

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`; inputs are the same for all columns and count once."""
        if self.setting == "reduce":
            jacobian = jacobian.reduced()
        self._add_outputs(f"output/{name}", jacobian)
        if first:
            count = self._add_inputs(f"input/{name}", jacobian)
            add_to(self.sums, f"positions/{name}", torch.as_tensor(count, dtype=torch.float64))
            if jacobian.transposed:
                self.sums[f"transposed/{name}"] = torch.tensor(True)

    def _add_outputs(self, key: str, jacobian: LayerJacobian) -> None:
        """Weight and bias of a layer are sent the same cotangent, one after the other: its moment is computed once."""
        cotangent = jacobian.sole_cotangent()
        if cotangent is None:
            self._add(key, jacobian.output_moment())
            return
        total = self._half(key, cotangent)
        if self._last is None or not _same_memory(self._last[0], cotangent):
            moment = torch.zeros_like(total)
            add_second_moment(moment, cotangent.flatten(0, 1))
            self._last = cotangent, moment
        total += self._last[1]

    def _add_inputs(self, key: str, jacobian: LayerJacobian) -> float | Tensor:
        """Add A's moment, and return the number of its rows."""
        rows = jacobian.sole_input() if self._weights is None else None
        if rows is None:
            moment, count = jacobian.input_moment(self._weights)
            self._add(key, moment)
            return count
        add_second_moment(self._half(key, rows), rows)
        return len(rows)

    def _half(self, key: str, rows: Tensor) -> Tensor:
        """The sum that second moments of such rows are added to."""
        size = rows.shape[-1]
        total = self.halves.get(key)
        if total is None:
            if key in self.sums:
                check_same_form(key, self.sums[key].shape, torch.Size((1, size, size)))
            total = self.halves[key] = rows.new_zeros(size, size)
        check_same_form(key, total.shape, torch.Size((size, size)))
        return total

    def _add(self, key: str, moment: Tensor) -> None:
        """Add moments of any form."""
        if key in self.halves:
            check_same_form(key, self.halves[key][None].shape, moment.shape)
        add_to(self.sums, key, moment)

    def end_columns(self) -> None:
        """Let go of the cotangent."""
        self._last = None

    def result(self) -> KroneckerSum:
        """See `Quantity.result`."""
        tensors = {key: total.clone() for key, total in self.sums.items()}
        for key, half in self.halves.items():
            moment = mirrored(half.clone())[None]
            tensors[key] = tensors[key] + moment if key in tensors else moment
        return KroneckerSum(self.shapes, tensors, self.count, self.about)


def _same_memory(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same place."""
    return one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.stride() == two.stride()


def _tied_factors(packed: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`diag(p / sum p)` by its diagonal `(1, V)` and `M` `(1, D, D)`, from `(1, D D + V)`."""
    moment, reads = packed[:, :-rows], packed[:, -rows:]
    width = math.isqrt(moment.shape[1])
    total = reads.sum()
    return reads / torch.where(total > 0, total, 1), moment.reshape(1, width, width).clone()
