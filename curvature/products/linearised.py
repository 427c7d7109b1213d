"""A network made linear in a change of its weights: `J v` and `J^T u` of one batch, and whether to trust them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lapkit.curvature.parameters import Parameters
from lapkit.curvature.products.vectors import (
    NotTwiceDifferentiable,
    Vectors,
    differentiated,
    pulled_back,
    random_vectors,
)

Push = Callable[[Vectors], Tensor]  # J v, of a change of all parameters
Restricted = Callable[[Sequence[int], Vectors], Vectors]  # a product with one vector, over some of the parameters

WRONG = (
    "Derivatives of derivatives of this model are wrong ({measure} differ by {error:.1e}): an operation's backward "
    "cuts the graph (once_differentiable, detach), or its second derivative is mistaken, as that of torch's "
    "weight_norm is. Replace it by plain torch operations, leave the parameters before it out of the selection, or "
    "accumulate the curvature (GGNDense, GGNBlocks, GGNKronecker, ...), which needs one derivative."
)


class Linearised:
    """The Jacobian J of a batch's outputs.

    `J v` is the derivative in u of `J^T u`, which is linear in u: its graph is built once and serves all vectors, and
    no operation needs a rule for forward mode. Where another way is cheaper it is given.

    Args:
        output: `(N, *, C)`, with its graph.
        parameters: the weights.
        push: `J v` by other means, for a change of all the parameters.
    """

    def __init__(self, output: Tensor, parameters: Parameters, push: Push | None = None) -> None:
        self.output, self.tensors, self._push = output, parameters.tensors, push

    @cached_property
    def _adjoint(self) -> tuple[Tensor, Vectors]:
        """U and `J^T u`, with its graph."""
        cotangent = torch.zeros_like(self.output, requires_grad=True)
        return cotangent, differentiated(self.output, self.tensors, cotangent)

    def prepare(self) -> None:
        """Build the graph of `J^T u` if it is needed; it cannot be built while vectors are mapped over.

        Raises:
            NotTwiceDifferentiable: if an operation has no second derivative.
        """
        if self._push is None:
            self._adjoint  # noqa: B018

    def push(self, group: Sequence[int], vector: Vectors) -> Tensor:
        """`J v` for a change of some of the parameters, in the shape of the outputs."""
        if self._push is not None and len(group) == len(self.tensors):
            return self._push(vector)
        cotangent, transposed = self._adjoint
        return pulled_back([transposed[i] for i in group], [cotangent], vector)[0]

    def pull(self, group: Sequence[int], cotangent: Tensor) -> Vectors:
        """`J^T u`, those parameters' part of it."""
        return pulled_back([self.output], [self.tensors[i] for i in group], [cotangent])

    def check(self) -> None:
        """Compare `u^T (J v)` with `(J^T u)^T v`, which needs no second derivative, for random u and v.

        Raises:
            NotTwiceDifferentiable: if they differ.
        """
        everything = range(len(self.tensors))
        u, *v = random_vectors([self.output, *self.tensors])
        pushed, pulled = self.push(everything, tuple(v)), self.pull(everything, u)
        scale = _norm([u]) * _norm([pushed]) + _norm(pulled) * _norm(v)
        _refuse("u^T (J v) and (J^T u)^T v", _dot([u], [pushed]) - _dot(pulled, v), scale)


def check_symmetric(product: Restricted, parameters: Parameters) -> None:
    """Compare `a^T (H b)` with `b^T (H a)` for random a and b.

    Raises:
        NotTwiceDifferentiable: if they differ.
    """
    everything = range(len(parameters.tensors))
    vectors = random_vectors([*parameters.tensors, *parameters.tensors])
    a, b = vectors[: len(everything)], vectors[len(everything) :]
    ha, hb = product(everything, a), product(everything, b)
    scale = _norm(a) * _norm(hb) + _norm(b) * _norm(ha)
    _refuse("a^T (H b) and b^T (H a)", _dot(a, hb) - _dot(b, ha), scale)


def _refuse(measure: str, difference: Tensor, scale: Tensor) -> None:
    if not difference.abs() <= torch.finfo(difference.dtype).eps ** 0.5 * scale:
        raise NotTwiceDifferentiable(WRONG.format(measure=measure, error=float(difference.abs() / scale)))


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum(dtype=_summed(a)) for a, b in zip(left, right, strict=True)]).sum()


def _norm(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.norm(dtype=_summed(v)) for v in vectors]).norm()


def _summed(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
