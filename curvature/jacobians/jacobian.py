"""The central object and its algebra: the Jacobian of K output columns in the weights, for each of N examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.jacobians.inner_products import filled
from lapkit.curvature.memory import chunk_length

DENSE_LIMIT = 1024  # weights up to which a parameter without Kronecker structure keeps an exact block


def summable(tensor: Tensor) -> Tensor:
    """The tensor in float32 at least: sums of products kept in half precision lose positive definiteness."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def averaged(moment: Tensor, count: float | Tensor) -> Tensor:
    """`LayerJacobian.input_moment` divided: A; zero for a group without positions, whose B is zero, too.

    Args:
        moment: `(G, I, I)` or `(G, I)`.
        count: of all groups, or of each, `(G,)`.
    """
    number = torch.as_tensor(count)
    if number.ndim:
        number = number.to(moment).reshape(-1, *[1] * (moment.ndim - 1))
    return moment / torch.where(number > 0, number, 1)


class Jacobian(ABC):
    """`J[k, n]`: the derivative of column k of example n with respect to P weights, kept in whatever form is small.

    Shapes are written with K columns, N examples, P weights.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""

    @property
    def budget(self) -> int:
        """Bytes that an intermediate may take."""
        return 2**28

    @abstractmethod
    def to_dense(self) -> Tensor:
        """The expanded Jacobian `(K, N, P)`: the oracle of every other method."""

    @abstractmethod
    def square_sum(self) -> Tensor:
        """`sum_{k,n} J[k,n]^2`, `(P,)`: with the columns of a likelihood, the diagonal of the GGN."""

    def square_norms(self) -> Tensor:
        """`|J[k,n]|^2`, `(K, N)`: with the gradient of the loss, squared norms of each example's gradient."""
        return self.to_dense().square().sum(-1)

    def squares(self) -> Tensor:
        """`sum_k J[k,n]^2`, `(N, P)`: with the columns of a likelihood, the GGN's diagonal for each example."""
        return self.to_dense().square().sum(0)

    @abstractmethod
    def weighted_gram(self, weights: Tensor) -> Tensor:
        """`J_n diag(weights) J_n^T`, `(P,) -> (N, K, K)`: with unit columns, a covariance of the outputs."""

    def gram(self, other: Jacobian | None = None) -> Tensor:
        """All inner products `J[k,n] . J'[l,m]`: ViViT's Gram matrix, or the neural tangent kernel.

        Args:
            other: a Jacobian in the same weights, of other examples, other columns, other positions or of another
                class; itself by default, and then half of a symmetric matrix is computed.

        Returns:
            `(K, N, L, M)` for L columns and M examples of the other.

        Raises:
            ValueError: if the numbers of weights differ.

        Reference:
            Dangel et al., ViViT, 2022, appendix C.1.
        """
        if other is not None and other.shape[2] != self.shape[2]:
            raise ValueError(
                f"Inner products need Jacobians in the same weights, got {self.shape[2]} and {other.shape[2]} of them. "
                "Compute both for the same selection of the same model."
            )
        return self._gram(None if other is self else other)

    def _gram(self, other: Jacobian | None) -> Tensor:
        """`gram` from the expanded Jacobians of some examples of both at a time, which any two have."""
        second = self if other is None else other
        columns, examples, size = self.shape

        def block(one: slice, two: slice) -> Tensor:
            left = self.select(one).to_dense()
            right = left if other is None and one == two else second.select(two).to_dense()
            product = left.flatten(0, 1) @ right.flatten(0, 1).T
            return product.unflatten(1, right.shape[:2]).unflatten(0, left.shape[:2])

        each = 8 * (columns + second.shape[0]) * size  # bytes of doubles, the largest there are
        step = chunk_length(max(examples, second.shape[1]), each, min(self.budget, second.budget))
        return filled(block, examples, None if other is None else other.shape[1], step)

    @abstractmethod
    def project(self, vectors: Tensor) -> Tensor:
        """`J v` for R vectors, `(P, R) -> (K, N, R)`."""

    @abstractmethod
    def pull_back(self, cotangent: Tensor) -> Tensor:
        """`sum_{k,n} u[k,n] J[k,n]`, `(K, N) -> (P,)`: `J^T u`."""

    def pull_back_all(self, cotangents: Tensor) -> Tensor:
        """`J^T u` for R cotangents, `(K, N, R) -> (P, R)`: the transpose of `project`."""
        return torch.stack([self.pull_back(u) for u in cotangents.unbind(-1)]).T

    @abstractmethod
    def select(self, part: slice) -> Jacobian:
        """The Jacobian of some of the examples."""

    @abstractmethod
    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """The Jacobians of consecutive groups of weights, of these sizes."""

    def block(self) -> Tensor:
        """`sum_{k,n} J[k,n] J[k,n]^T`, `(P, P)`: with the columns of a likelihood, the GGN of these weights."""
        rows = self.to_dense().flatten(0, 1)
        return rows.T @ rows


class LayerJacobian(Jacobian):
    """The Jacobian of one parameter, which also has second moments for a Kronecker-factored block `B (x) A`.

    The weights are seen as G groups of matrices; B is the second moment of what comes back at the outputs of the
    layer, A that of what went in. `transposed` layers store their weights as inputs x outputs, so that their block is
    `A (x) B`.
    """

    transposed: bool = False

    @abstractmethod
    def output_moment(self) -> Tensor:
        """`B = sum_{k,n,t} g g^T`, `(G, O, O)`; adds up over columns and examples."""

    @abstractmethod
    def sole_cotangent(self) -> Tensor | None:
        """The cotangent `(K, N, O)` if B is its second moment and nothing else, so that two parameters can share it."""

    @abstractmethod
    def input_moment(self, weights: Tensor | None = None) -> tuple[Tensor, float | Tensor]:
        """`sum_{n,t} w a a^T`, `(G, I, I)`, and the number of examples and positions summed, `sum_{n,t} w`.

        The number is that of each group, `(G,)` in double precision, where groups see positions of their own. Both are
        the same for all columns. Only the diagonal `(G, I)` where the moment has no other entries. Weights `(N,)` of
        examples are one by default.
        """

    def sole_input(self) -> Tensor | None:
        """What went in, `(N, I)`, if A is its second moment and nothing else."""
        return None

    def add_square_sum(self, total: Tensor) -> None:
        """Add `square_sum` to a contiguous sum `(P,)`, in place."""
        total += self.square_sum()

    def single_position(self) -> tuple[Tensor, Tensor] | None:
        """Cotangents `(K, N, O)` and inputs `(N, I)`, where the Jacobian is one outer product of them."""
        return None

    def reduced(self) -> LayerJacobian:
        """As if the layer had one position, inputs averaged over positions and cotangents summed: KFAC-reduce.

        A Jacobian without positions is what it is.
        """
        return self

    @abstractmethod
    def select(self, part: slice) -> LayerJacobian:
        """The Jacobian of some of the examples."""

    def at(self, places: Tensor) -> DenseJacobian:
        """The derivatives in some of the weights only, `(S,)` flat places; a few examples at a time are expanded."""
        columns, examples, size = self.shape
        step = chunk_length(examples, 2 * 8 * columns * size, self.budget)
        parts = (self.select(slice(i, min(i + step, examples))) for i in range(0, examples, step))
        return DenseJacobian(torch.cat([part.to_dense()[..., places] for part in parts], dim=1))

    @abstractmethod
    def rotate(self, left: Tensor | None, right: Tensor) -> LayerJacobian:
        """`J (left (x) right)`, in a Kronecker basis of the weights: `(G, R, R)`, `(G, C, C)`, rows first as stored.

        None leaves the rows as they are.
        """


@dataclass(frozen=True, eq=False)
class DenseJacobian(LayerJacobian):
    """The expanded form, for biases, scales and whatever has no closed form.

    Args:
        values: `(K, N, P)`.
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(K, N, P)`."""
        return tuple(self.values.shape)  # type: ignore[return-value]

    def to_dense(self) -> Tensor:
        """The values themselves."""
        return self.values

    def square_sum(self) -> Tensor:
        """See `Jacobian.square_sum`."""
        return self.values.square().sum((0, 1))

    def weighted_gram(self, weights: Tensor) -> Tensor:
        """See `Jacobian.weighted_gram`."""
        rows = self.values.movedim(0, 1)
        return (rows * weights) @ rows.mT

    def project(self, vectors: Tensor) -> Tensor:
        """See `Jacobian.project`."""
        return self.values @ vectors

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """See `Jacobian.pull_back`."""
        return cotangent.reshape(-1) @ self.values.flatten(0, 1)

    def pull_back_all(self, cotangents: Tensor) -> Tensor:
        """See `Jacobian.pull_back_all`."""
        return (cotangents.flatten(0, 1).T @ self.values.flatten(0, 1)).T

    def split(self, sizes: Sequence[int]) -> Iterator[Jacobian]:
        """See `Jacobian.split`."""
        yield from (DenseJacobian(part) for part in self.values.split(list(sizes), dim=-1))

    def output_moment(self) -> Tensor:
        """The exact block, `(1, P, P)`; only its diagonal, `(P, 1, 1)`, for more than `DENSE_LIMIT` weights."""
        if self.values.shape[-1] > DENSE_LIMIT:
            return self.square_sum()[:, None, None]
        return self.block()[None]

    def single_position(self) -> tuple[Tensor, Tensor]:
        """The values, and ones for inputs."""
        return self.values, self.values.new_ones(self.shape[1], 1)

    def sole_cotangent(self) -> Tensor | None:
        """The values, where they have an exact block."""
        return self.values if self.values.shape[-1] <= DENSE_LIMIT else None

    def input_moment(self, weights: Tensor | None = None) -> tuple[Tensor, float]:
        """Ones: nothing but the outputs' moment is kept."""
        _, examples, size = self.shape
        groups = size if size > DENSE_LIMIT else 1
        count = examples if weights is None else float(weights.sum())
        return self.values.new_full((groups, 1, 1), count), count

    def select(self, part: slice) -> DenseJacobian:
        """See `LayerJacobian.select`."""
        return DenseJacobian(self.values[:, part])

    def at(self, places: Tensor) -> DenseJacobian:
        """See `LayerJacobian.at`."""
        return DenseJacobian(self.values[..., places])

    def rotate(self, left: Tensor | None, right: Tensor) -> DenseJacobian:
        """See `LayerJacobian.rotate`; for exact blocks `right` is one by one."""
        values = self.values.unflatten(-1, (len(right), -1, right.shape[1]))
        if left is not None:
            values = torch.einsum("kngij,gir->kngrj", values, left)
        return DenseJacobian(torch.einsum("kngrj,gjs->kngrs", values, right).flatten(2))
