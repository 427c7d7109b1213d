"""EKFAC: the eigenvectors of KFAC with the eigenvalues that fit the exact block best, which takes a second pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from operator import length_hint
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from lapkit.curvature.accumulate import accumulate
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.columns.columns import GGN, Columns
from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.diagonal import Diagonal
from lapkit.curvature.operators.kronecker import Kronecker
from lapkit.curvature.operators.kronecker_product import KroneckerProduct
from lapkit.curvature.parameters import Parameters
from lapkit.curvature.quantities.kfac import GGNKronecker, KroneckerSum, Setting
from lapkit.curvature.quantities.quantity import Quantity, add_to
from lapkit.curvature.quantities.results import CurvatureSum


@final
class EigenvalueSum(CurvatureSum):
    """Blocks in a Kronecker eigenbasis: `values/NAME` `(G, R, C)`, `right/NAME` and, unless it is one, `left/NAME`.

    Two of them add up in one basis, which `EKFACCorrection` takes; each call of `ekfac` makes a basis of its own.
    """

    main: ClassVar[str] = "values"

    def joined(self, key: str, one: Tensor, two: Tensor) -> Tensor:
        """Eigenvalues add up in one basis.

        Raises:
            ValueError: if the bases differ.
        """
        if key.startswith("values/"):
            return super().joined(key, one, two)
        if not torch.equal(one, two):
            raise ValueError(
                f"{key!r} differs: eigenvalues in different bases do not add up, and each call of ekfac makes its own. "
                "Give it all the data at once; or sum GGNKronecker over all parts, and use EKFACCorrection with that "
                "basis for each of them."
            )
        return one

    def operator(self) -> BlockDiagonal:
        """One block for each parameter, zero for those that the outputs do not depend on."""
        values, left, right = self.part("values"), self.part("left"), self.part("right")
        like = next(iter(self.tensors.values()), torch.zeros(()))
        return BlockDiagonal(
            tuple(
                Kronecker(left.get(n), right[n], values[n].clone())
                if n in values
                else Diagonal(like.new_zeros(math.prod(shape)))
                for n, shape in self.shapes.items()
            )
        )


@final
class EKFACCorrection(Quantity):
    """The diagonal of each exact block in a Kronecker eigenbasis, `E = sum_{k,n} (Q_B^T (sum_t g_t a_t^T) Q_A)^2`.

    Of all matrices with these eigenvectors that with eigenvalues E is nearest to the exact block in Frobenius norm, and
    it has its trace. Each example's positions are summed before the square.

    Args:
        parameters: the weights.
        basis: Kronecker factors of all data, from a pass before.
        columns: which columns it wants, if not those of the call; those of the basis, as a rule.

    Raises:
        ValueError: if the basis is one of other weights.

    Reference:
        George et al., Fast approximate natural gradient descent in a Kronecker-factored eigenbasis, 2018.
    """

    def __init__(self, parameters: Parameters, basis: KroneckerSum, *, columns: Columns | None = None) -> None:
        super().__init__(parameters, columns=columns)
        if dict(basis.shapes) != self.shapes:
            raise ValueError(
                f"The basis has weights {list(basis.shapes)} and the correction {list(self.shapes)}: "
                "compute both for the same selection of the same model."
            )
        self.basis: dict[str, Kronecker] = {}
        for name, block in zip(self.shapes, basis.operator().blocks, strict=True):
            if isinstance(block, KroneckerProduct):
                self.basis[name] = block.eigen
        self.sums: dict[str, Tensor] = {}

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`.

        Raises:
            ValueError: if the basis knows no derivative of this parameter.
        """
        if name not in self.basis:
            raise ValueError(f"The outputs depend on {name!r} now, but did not when the basis was computed.")
        basis = self.basis[name]
        squares = jacobian.rotate(basis.left, basis.right).square_sum()
        add_to(self.sums, f"values/{name}", squares.reshape(basis.values.shape))

    def result(self) -> EigenvalueSum:
        """See `Quantity.result`."""
        tensors = {key: value.clone() for key, value in self.sums.items()}
        for name in (key.removeprefix("values/") for key in self.sums):
            basis = self.basis[name]
            tensors[f"right/{name}"] = basis.right
            if basis.left is not None:
                tensors[f"left/{name}"] = basis.left
        return EigenvalueSum(self.shapes, tensors, self.count, self.about)


def ekfac(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    *,
    columns: Columns | None = None,
    parameters: Parameters | Iterable[str] | None = None,
    setting: Setting = "expand",
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
    progress_bar: bool = False,
) -> EigenvalueSum:
    """KFAC with corrected eigenvalues, by two passes over the data with the same random numbers.

    Args:
        model: the network; it is run in eval mode and given back as it was.
        likelihood: of targets given outputs.
        data: batches `(inputs, targets)` or `(inputs, targets, weights)` that can be run through twice: a data loader,
            or a list, perhaps of one batch.
        columns: which curvature, the exact GGN by default.
        parameters: a selection, or names of parameters or modules; all that require gradients by default.
        setting: of the Kronecker factors, see `GGNKronecker`.
        generator: for Monte Carlo columns.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.
        progress_bar: show one.

    Returns:
        Eigenvalues and eigenvectors of one block for each parameter, summed over examples; `operator()` is the matrix.

    Raises:
        TypeError: if the data can be run through only once.
        ValueError: if the second pass sees another number of examples than the first.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"EKFAC passes over the data twice, and a {type(data).__name__} is used up after once. "
            "Give a data loader or a list of batches."
        )
    parameters = Parameters.selected(model, parameters)
    source = torch.default_generator if generator is None else generator
    state = source.get_state()
    run = partial(
        accumulate,
        model,
        parameters,
        likelihood,
        GGN() if columns is None else columns,
        data,
        generator=source,
        memory_budget=memory_budget,
        forward_fn=forward_fn,
        output_axis=output_axis,
        progress_bar=progress_bar,
        total=length_hint(data) or None,
    )
    factors = GGNKronecker(parameters, setting)
    first = run([factors])
    source.set_state(state)
    corrected = EKFACCorrection(parameters, factors.result())
    second = run([corrected])
    if first.count != second.count:
        raise ValueError(
            f"The first pass over the data saw {first.count} examples and the second {second.count}: EKFAC needs data "
            "that are the same each time."
        )
    return corrected.result()
