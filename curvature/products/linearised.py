"""A network made linear in a change of its weights: `J v` and `J^T u` of one batch, and whether to trust them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lapkit.curvature.parameters import Parameters
from lapkit.curvature.products.vectors import NotTwiceDifferentiable, Vectors, differentiated, pulled_back

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
    no operation needs a rule for forward mode.

    Args:
        output: `(N, *, C)`, with its graph.
        parameters: the weights.

    Raises:
        NotTwiceDifferentiable: if an operation has no second derivative.
    """

    def __init__(self, output: Tensor, parameters: Parameters) -> None:
        self.output, self.tensors = output, parameters.tensors
        self.cotangent = torch.zeros_like(output, requires_grad=True)
        self.transposed = differentiated(output, self.tensors, self.cotangent)

    def push(self, group: Sequence[int], vector: Vectors) -> Tensor:
        """`J v` for a change of some of the parameters, in the shape of the outputs."""
        return pulled_back([self.transposed[i] for i in group], [self.cotangent], vector)[0]

    def pull(self, group: Sequence[int], cotangent: Tensor) -> Vectors:
        """`J^T u`, those parameters' part of it."""
        return pulled_back([self.output], [self.tensors[i] for i in group], [cotangent])

    def check(self) -> None:
        """Compare `u^T (J v)` with `(J^T u)^T v`, which needs no second derivative, for random u and v.

        Raises:
            NotTwiceDifferentiable: if they differ.
        """
        everything = range(len(self.tensors))
        u, *v = _random([self.output, *self.tensors])
        pushed, pulled = self.push(everything, tuple(v)), self.pull(everything, u)
        scale = _norm([u]) * _norm([pushed]) + _norm(pulled) * _norm(v)
        _refuse("u^T (J v) and (J^T u)^T v", _dot([u], [pushed]) - _dot(pulled, v), scale)


def check_symmetric(product: Restricted, parameters: Parameters) -> None:
    """Compare `a^T (H b)` with `b^T (H a)` for random a and b.

    Raises:
        NotTwiceDifferentiable: if they differ.
    """
    everything = range(len(parameters.tensors))
    vectors = _random([*parameters.tensors, *parameters.tensors])
    a, b = vectors[: len(everything)], vectors[len(everything) :]
    ha, hb = product(everything, a), product(everything, b)
    scale = _norm(a) * _norm(hb) + _norm(b) * _norm(ha)
    _refuse("a^T (H b) and b^T (H a)", _dot(a, hb) - _dot(b, ha), scale)


def _refuse(measure: str, difference: Tensor, scale: Tensor) -> None:
    if not difference.abs() <= torch.finfo(difference.dtype).eps ** 0.5 * scale:
        raise NotTwiceDifferentiable(WRONG.format(measure=measure, error=float(difference.abs() / scale)))


def _random(like: Sequence[Tensor]) -> Vectors:
    """Normal numbers that leave torch's own generators alone."""
    generator = torch.Generator(like[0].device).manual_seed(0)
    return tuple(torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in like)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum(dtype=_summed(a)) for a, b in zip(left, right, strict=True)]).sum()


def _norm(vectors: Sequence[Tensor]) -> Tensor:
    return torch.stack([v.norm(dtype=_summed(v)) for v in vectors]).norm()


def _summed(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
