"""A tall matrix times itself plus a diagonal, inverted in the space of its columns: what all forms of it share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.jacobians.conversion import converted, floating_type
from lapkit.curvature.jacobians.jacobian import Jacobian
from lapkit.curvature.memory import chunk_length, default_budget
from lapkit.curvature.operators.graded import UNBEARABLE, log_det_one_plus
from lapkit.curvature.operators.log_det import logdet_from_one
from lapkit.curvature.operators.log_det_ratio import log_det_ratio_of
from lapkit.curvature.operators.operator import SymmetricOperator, spread
from lapkit.curvature.operators.whitened import Whitened

LARGEST = 1e7  # entries of `I + ...` beyond which fewer than nine digits of the identity are left


class Woodbury(SymmetricOperator):
    """`factor V V^T + diag(offset)` for P x R columns V, of which a form of V tells how to multiply with it.

    Everything but products goes through the matrix `I + factor V^T diag(offset)^{-1} V` (Woodbury), in float64 whatever
    the type of V: beside small offsets single precision has no digits left. With R below P it is the smaller side.
    Where its entries are so large that even double precision loses the identity, V is written out and orthogonalised.

    Attributes:
        offset: the diagonal, one number, `(P,)`, or `(L,)` for the groups of weights that the form of V has.
        factor: of the columns' part, one number.
        memo: inner products of the columns, which depend on neither and are shared by all that have the same V.
    """

    offset: Tensor | float
    factor: Tensor | float
    memo: dict[str, Tensor]

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of columns R, an upper bound of the rank without the diagonal."""

    @property
    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor of the type and on the device of V."""

    @abstractmethod
    def _group_grams(self) -> Iterator[Tensor]:
        """`V_l^T V_l` of the weights of each group, or of all where there are no groups, `(R, R)`, in float64."""

    @abstractmethod
    def _weighted_gram(self, weights: Tensor) -> Tensor:
        """`V^T diag(weights) V`, `(P,) -> (R, R)`, in float64."""

    @abstractmethod
    def _weighted_gram_backward(self, middle: Tensor) -> Tensor:
        """The diagonal of `V middle V^T`, `(P,)`, in float64; `middle` is symmetric."""

    @abstractmethod
    def _down(self, vectors: Tensor) -> Tensor:
        """`V^T v`, `(P, S) -> (R, S)`."""

    @abstractmethod
    def _up(self, coefficients: Tensor) -> Tensor:
        """`V c`, `(R, S) -> (P, S)`."""

    @abstractmethod
    def _squares(self, root: Tensor | None = None) -> Tensor:
        """The diagonal of `V root root^T V^T`, `(P,)`, in float64; without root, that of `V V^T`."""

    @abstractmethod
    def _inner(self, jacobian: Jacobian, weights: Tensor) -> Tensor:
        """`J_n diag(weights) V`, `(N, K, R)`, in the type of the Jacobian; weights `()`, `(L,)` or `(P,)`."""

    @abstractmethod
    def _written(self) -> Tensor:
        """V itself, `(P, R)`, in float64."""

    @cached_property
    def _diagonal(self) -> Tensor:
        if isinstance(self.offset, Tensor) and self.offset.is_floating_point():
            return self.offset.to(self._like.device)
        with torch.inference_mode(False):  # as all that is kept: gradients may be asked for later
            return torch.as_tensor(self.offset, dtype=self._like.dtype, device=self._like.device)

    @cached_property
    def _scale(self) -> Tensor:
        with torch.inference_mode(False):
            return torch.as_tensor(self.factor, dtype=torch.float64, device=self._like.device)

    @property
    def _entries(self) -> Tensor:
        return self._diagonal

    def _each(self, values: Tensor) -> Tensor:
        """One number for each weight."""
        grouped = self.groups is not None and values.shape == (len(self.groups),)
        return spread(values, self.groups or []) if grouped else values.expand(self.size)

    @property
    def gram(self) -> Tensor:
        """`factor V^T V`, `(R, R)`, in float64."""
        return self._scale * self._gram

    @property
    def _gram(self) -> Tensor:
        if "gram" not in self.memo:
            with torch.inference_mode(False):
                self.memo["gram"] = reduce(torch.add, self._group_grams())
        return self.memo["gram"]

    @property
    def eigenvalues(self) -> Tensor:
        """Those of `factor V^T V`, `(R,)`, in float64, ascending: all of `V V^T` that may differ from zero, if R <= P.

        They are computed once, whatever the number of shifts tried.
        """
        if "eigenvalues" not in self.memo:
            with torch.inference_mode(False):
                self.memo["eigenvalues"] = torch.linalg.eigvalsh(self._gram).clamp_min(0)
        return self._scale * self.memo["eigenvalues"]

    def diagonal(self) -> Tensor:
        """Squared rows of V, and the offset."""
        return (self._scale * self._squares()).to(self.dtype) + self._each(self._diagonal)

    def inverse_diagonal(self) -> Tensor:
        """`1 / offset - factor |L^{-1} V^T / offset|^2`, in float64."""
        inverse = self._each(self._inverse_offset)
        if self._lost:
            return (inverse * self._whitened.inverse_diagonal()).to(self.dtype)
        eye = torch.eye(self.rank, dtype=torch.float64, device=self.device)
        root = torch.linalg.solve_triangular(self._cholesky, eye, upper=False).mT
        return (inverse - self._scale * inverse.square() * self._squares(root)).to(self.dtype)

    def logdet(self) -> Tensor:
        """`sum log offset + log det(I + factor V^T diag(offset)^{-1} V)`."""
        offset = self._each(self._inverse_offset).log().sum()
        return (logdet_from_one(self._own_middle) - offset).to(self.dtype)

    def _shifted_logdet(self, delta: Tensor) -> Tensor:
        offset = _positive(self._shifted(delta))
        return (self._shifted_ratio(offset) + self._each(offset).log().sum()).to(self.dtype)

    def _logdet_ratio(self, delta: Tensor) -> Tensor:
        offset, delta = _positive(self._shifted(delta)), _positive(delta)
        ratio = self._shifted_ratio(offset) + (self._each(offset) / self._each(delta)).log().sum()
        return ratio.to(self.dtype)

    def _shifted_ratio(self, offset: Tensor) -> Tensor:
        """`log det(I + factor V^T diag(offset)^{-1} V)`; O(R) for one number, once the eigenvalues are known.

        Where the curvature exceeds the offset by more orders of magnitude than a sum of both can hold, from V itself.

        Raises:
            ValueError: if there is no room to write V out then, or V itself has too few digits.
        """
        if self.rank == 0:
            return offset.sum() * 0
        middle = self._middle(offset.reciprocal()) if offset.ndim else None
        largest = self.eigenvalues[-1] / offset if middle is None else middle.diagonal().max()
        if largest > UNBEARABLE and not self._like.requires_grad:  # as of columns that were computed with a graph
            self._check_room()
            return log_det_one_plus(self._scale * self._each(offset.reciprocal()), self._written())
        return log_det_ratio_of(self.eigenvalues, offset) if middle is None else logdet_from_one(middle)

    def _shifted(self, delta: Tensor) -> Tensor:
        """The offset after a shift: a number, one for each group or one for each weight, whatever both allow."""
        shapes = {self._diagonal.shape, delta.shape} - {torch.Size()}
        if len(shapes) < 2:
            return self._diagonal + delta
        return self._each(self._diagonal) + self._each(delta)

    def inverse_quadratic(self, jacobian: Jacobian) -> Tensor:
        """`J diag(offset)^{-1} J^T - factor |L^{-1} V^T diag(offset)^{-1} J^T|^2`, the Jacobian not expanded.

        Where this difference has too few digits left in single precision it is taken in double; where these are not
        enough, `|R J^T|^2` of the expanded Jacobian is taken instead, which costs more and keeps them.
        """
        if self._lost:
            return self._by_root(jacobian).to(self.dtype)
        found, certain = self._by_difference(jacobian)
        if not certain and floating_type(jacobian) != torch.float64:
            jacobian = converted(jacobian, torch.float64)
            found, certain = self._by_difference(jacobian)
        return (found if certain else self._by_root(jacobian)).to(self.dtype)

    def _by_difference(self, jacobian: Jacobian) -> tuple[Tensor, bool]:
        """The quadratic form, and whether its digits are enough."""
        inverse = self._inverse_offset
        whole = jacobian.weighted_gram(self._each(inverse).to(floating_type(jacobian)))
        inner = self._inner(jacobian, inverse)
        flat = inner.flatten(0, 1).T.double()  # (R, N K): one right-hand side, as a batch would copy the factor
        half = torch.linalg.solve_triangular(self._cholesky, flat, upper=False).T.reshape(inner.shape)
        result = whole - self._scale * (half @ half.mT)
        left, total = (m.diagonal(dim1=-2, dim2=-1) for m in (result, whole))
        return result, bool((left >= 10 * torch.finfo(whole.dtype).eps ** 0.5 * total).all())

    def _by_root(self, jacobian: Jacobian) -> Tensor:
        """`|R J^T|^2`, a few examples at a time."""
        columns, examples, size = jacobian.shape
        step = chunk_length(examples, 3 * 8 * columns * size, jacobian.budget)
        parts = []
        for start in range(0, examples, step):
            rows = jacobian.select(slice(start, min(start + step, examples))).to_dense().double()  # (K, n, P)
            root = self._inverse_root(rows.flatten(0, 1).T).unflatten(1, rows.shape[:2]).permute(2, 1, 0)
            parts.append(root @ root.mT)
        return torch.cat(parts)

    def prior_root(self) -> Tensor:
        """`diag(offset)^{-1/2}`, `(P,)`, in float64: what makes standard normal numbers draws of the prior."""
        return self._each(self._inverse_offset).sqrt()

    def conditioned(self, draws: Tensor, noise: Tensor) -> Tensor:
        """Matheron's rule: `t0 + D^{-1} W (I + W^T D^{-1} W)^{-1} (e - W^T t0)` with `W W^T = factor V V^T`.

        For draws `t0 ~ N(0, D^{-1})` of a prior with the offset D as its precision, and `e ~ N(0, I)`, these are draws
        of `N(0, A^{-1})`: the prior's, corrected by what the data say in R directions.

        Args:
            draws: `(P, S)`.
            noise: `(R, S)`.

        Returns:
            `(P, S)`.

        Reference:
            Wilson et al., Efficiently sampling functions from Gaussian process posteriors, 2020, eq. (13).
        """
        root, inverse = self._scale.sqrt(), self._each(self._inverse_offset)
        wide = draws.double()
        inner = noise.double() - root * self._down(wide)
        if self._lost:
            found = self._whitened
            shrunk = found.singular * found.shrinkage.square()
            step = inverse.sqrt()[:, None] * (found.left @ (shrunk[:, None] * (found.right.T @ inner)))
        else:
            step = inverse[:, None] * self._up(root * torch.cholesky_solve(inner, self._cholesky))
        return (wide + step).to(draws.dtype)

    def _matmul(self, vectors: Tensor) -> Tensor:
        columns = self._up((self._scale * self._down(vectors)).to(vectors.dtype))
        return columns + self._each(self._diagonal)[:, None] * vectors

    def _inverse_root(self, vectors: Tensor) -> Tensor:
        """`R = (I - W K^T W^T) diag(offset)^{-1/2}` with `W = (factor / diag(offset))^{1/2} V`, in float64."""
        root = self._each(self._inverse_offset).sqrt()[:, None]
        wide = root * vectors.double()
        if self._lost:
            return self._whitened.inverse_root(wide).to(vectors.dtype)
        return (wide - root * self._up(self._core.mT @ self._down(root * wide))).to(vectors.dtype)

    def _inverse_root_transpose(self, vectors: Tensor) -> Tensor:
        root, wide = self._each(self._inverse_offset).sqrt()[:, None], vectors.double()
        if self._lost:
            return (root * self._whitened.inverse_root(wide)).to(vectors.dtype)
        inner = root * self._up(self._core @ self._down(root * wide))
        return (root * (wide - inner)).to(vectors.dtype)

    def solve(self, vectors: Tensor) -> Tensor:
        """See `SymmetricOperator.solve`; nothing is rounded in between."""
        return super().solve(vectors.double()).to(vectors.dtype)

    @cached_property
    def _core(self) -> Tensor:
        """`factor K`, `(R, R)`, for which `(I - W K W^T)(I - W K^T W^T) = (I + W W^T)^{-1}`; in float64.

        `K = L^{-T} (I + L)^{-1}` with `L L^T = I + W^T W`: no eigenvectors, which have no derivatives where eigenvalues
        are equal.
        """
        eye = torch.eye(self.rank, dtype=torch.float64, device=self.device)
        inverse = torch.linalg.solve_triangular(self._cholesky + eye, eye, upper=False)
        return self._scale * torch.linalg.solve_triangular(self._cholesky.mT, inverse, upper=True)

    @property
    def _inverse_offset(self) -> Tensor:
        """The reciprocal of the diagonal, in float64."""
        return _positive(self._diagonal).reciprocal()

    @cached_property
    def _own_middle(self) -> Tensor:
        return self._middle(self._inverse_offset)

    @cached_property
    def _lost(self) -> bool:
        """Whether too few digits are left of the identity in `I + ...`."""
        return self.rank > 0 and bool(self._own_middle.diagonal().max() > LARGEST)

    @cached_property
    def _cholesky(self) -> Tensor:
        """`L` with `L L^T = I + factor V^T diag(offset)^{-1} V`, `(R, R)`, in float64."""
        return torch.linalg.cholesky(self._own_middle)

    @cached_property
    def _whitened(self) -> Whitened:
        """For curvature that exceeds the prior's by more than a difference can bear.

        Raises:
            ValueError: if there is no room to write the columns out.
        """
        self._check_room()
        columns = (self._scale * self._each(self._inverse_offset)).sqrt()[:, None] * self._written()
        left, singular, right = torch.linalg.svd(columns, full_matrices=False)
        return Whitened(left, singular, right.mT)

    def _check_room(self) -> None:
        """Refuse to write out more than there is room for.

        Raises:
            ValueError: if there is not.
        """
        needed = 3 * 8 * self.size * self.rank
        if needed > 2 * default_budget(self.device):
            raise ValueError(
                f"The curvature exceeds the prior precision by more than {LARGEST:g} times; to keep enough digits, "
                f"the {self.size} x {self.rank} columns have to be factored, which takes {needed / 2**30:.3g} "
                "GiB. Use a larger prior precision, a rank, or fewer weights."
            )

    def _middle(self, inverse: Tensor) -> Tensor:
        """`I + factor V^T diag(inverse) V`, `(R, R)`, in float64."""
        weighted = self._weighted(inverse) if inverse.ndim else inverse * self._gram
        return self._scale * weighted + torch.eye(self.rank, dtype=torch.float64, device=self.device)

    def _weighted(self, weights: Tensor) -> Tensor:
        """`V^T diag(weights) V`, differentiable in the weights, `(L,)` of groups or `(P,)`."""
        if self.groups is not None and weights.shape == (len(self.groups),):
            return reduce(torch.add, (w * gram for w, gram in zip(weights, self._kept_grams(), strict=True)))
        found: Tensor = _WeightedGram.apply(weights, self)
        return found

    def _kept_grams(self) -> Iterator[Tensor]:
        """The Gram matrices of the groups, computed once if there is room for all."""
        if "grams" not in self.memo:
            needed = 8 * len(self.groups or [0]) * self.rank**2
            if needed > default_budget(self.device):
                yield from self._group_grams()
                return
            with torch.inference_mode(False):
                self.memo["grams"] = torch.stack(list(self._group_grams()))
        yield from self.memo["grams"]


class _WeightedGram(torch.autograd.Function):
    """A weighted Gram matrix whose graph holds nothing of the size of V.

    It is linear in the weights, and its derivative is the adjoint, whose derivative is this again.
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, operator: Woodbury) -> Tensor:
        ctx.operator = operator
        return operator._weighted_gram(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _WeightedGramAdjoint.apply((gradient + gradient.mT) / 2, ctx.operator), None


class _WeightedGramAdjoint(torch.autograd.Function):
    """`diag(V M V^T)` of a symmetric M, `(P,)`."""

    @staticmethod
    def forward(ctx: Any, middle: Tensor, operator: Woodbury) -> Tensor:
        ctx.operator = operator
        return operator._weighted_gram_backward(middle)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _WeightedGram.apply(gradient, ctx.operator), None


def _positive(diagonal: Tensor) -> Tensor:
    """A diagonal in float64.

    Raises:
        ValueError: if an entry is not positive.
    """
    if not (diagonal > 0).all():
        raise ValueError(
            "A matrix of low rank has no inverse and no log determinant without a positive diagonal. "
            "Shift it by a positive prior precision first."
        )
    return diagonal.double()
