"""A likelihood from nothing but a user's own log density; autograd does the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, MixtureSameFamily

from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.likelihood import ALL, Likelihood, classes_last, same_length

ROUNDING = 64  # eigenvalues below zero by less than this many units in the last place, for each output, count as zero


@dataclass(frozen=True, eq=False)
class FromLogProb(Likelihood):
    """A likelihood of which only `log p(y|f)` is known.

    All functions take outputs `(B, C)`, and targets as given with examples, or examples and positions, along the first
    axis: for outputs `(N, T, C)` and targets `(N, T, ...)`, B is `N T`. They work row by row, and in the type of
    `f`, which is float64 where the Hessian is computed. A Hessian that is indefinite somewhere has no root: use Monte
    Carlo columns, whose mean is the Fisher information, or a root of your own.

    Args:
        log_prob_fn: `(f, y) -> (B,)`, the log density of each row.
        sample_fn: `(f, draws, draw) -> y`, a target for each row from counter-based numbers, which Monte Carlo columns
            need.
        inverse_link_fn: `f -> E[y|f]`, `(..., C) -> (..., D)`, which expectations need.
        distribution_fn: `f -> p(y|f)`, `(..., C)` to a distribution of torch of batch shape `(...)`, which predictive
            distributions need.
        hessian_root_fn: `(f, y) -> (K, B, C)`, a root to be used instead of the Hessian's by autograd.
        samples: how many outputs f are drawn to average over, for expectation and predictive distribution.

    Raises:
        ValueError: if there is not at least one sample.

    Example:
        Laplace's distribution with a soft edge:

        >>> import torch
        >>> soft = FromLogProb(lambda f, y: -torch.nn.functional.huber_loss(f, y, reduction="none").sum(-1))
        >>> soft.hessian_root(torch.zeros(1, 1), torch.full((1, 1), 0.5))
        tensor([[[1.]]])
    """

    log_prob_fn: Callable[[Tensor, Tensor], Tensor]
    sample_fn: Callable[[Tensor, Draws, int], Tensor] | None = None
    inverse_link_fn: Callable[[Tensor], Tensor] | None = None
    distribution_fn: Callable[[Tensor], Distribution] | None = None
    hessian_root_fn: Callable[[Tensor, Tensor], Tensor] | None = None
    samples: int = 256

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"A mean needs at least one sample, got samples={self.samples}.")

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """The targets beside the outputs, floating ones in their type; positions of an image are flattened.

        Raises:
            ValueError: if there is not one target for each example and position.
        """
        same_length(f, y)
        y = y.to(f) if y.is_floating_point() else y.to(f.device)
        if f.ndim == 2:
            return y
        moved = y.reshape(f.shape[:2]) if y.numel() == len(f) * f.shape[1] else classes_last(y, output_axis)
        if moved.shape[1:2] != f.shape[1:2]:
            raise ValueError(
                f"Expected targets of {len(f)} examples at {f.shape[1]} positions for outputs {tuple(f.shape)}, got "
                f"{tuple(y.shape)}."
            )
        return moved

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`-log p(y|f)`, summed over positions.

        Raises:
            ValueError: if the log density is not one number for each row.
        """
        return -self._each(*_rows(f, y)).reshape(len(f), -1).sum(-1)

    def _each(self, f: Tensor, y: Tensor) -> Tensor:
        log_prob = self.log_prob_fn(f, y)
        if log_prob.shape != f.shape[:1]:
            raise ValueError(
                f"log_prob_fn must return one number for each row of f, {tuple(f.shape[:1])}; it returned "
                f"{tuple(log_prob.shape)}. Sum over outputs, not over rows."
            )
        return log_prob

    def hessian_root(self, f: Tensor, y: Tensor | None = None, columns: slice = ALL) -> Tensor:
        """The user's root, or `U sqrt(Lambda)` of the Hessian `U Lambda U^T` by autograd.

        Raises:
            ValueError: if there are no targets, the Hessian is indefinite, or rows of the log density influence each
                other.
        """
        if y is None:
            raise ValueError("The Hessian of a log density depends on the targets: give them, hessian_root(f, y).")
        rows, targets = _rows(f, y)
        root = _root(self._hessian(rows, targets)) if self.hessian_root_fn is None else self._own_root(rows, targets)
        return root.to(f)[columns].unflatten(1, f.shape[:-1])

    def _own_root(self, f: Tensor, y: Tensor) -> Tensor:
        """The user's columns, and zeros up to C of them.

        Raises:
            ValueError: if they do not have the shape of columns.
        """
        root, outputs = self.hessian_root_fn(f, y), f.shape[-1]  # type: ignore[misc]
        if root.ndim != 3 or root.shape[1:] != f.shape or len(root) > outputs:
            raise ValueError(
                f"hessian_root_fn must return columns (K, {len(f)}, {outputs}), K at most {outputs}; it returned "
                f"{tuple(root.shape)}."
            )
        return torch.cat([root, root.new_zeros(outputs - len(root), *f.shape)])

    def _hessian(self, f: Tensor, y: Tensor) -> Tensor:
        """`-d^2 log p / df^2` of each row, `(B, C, C)`: one more backward pass of all rows for each output."""
        y = y.double() if y.is_floating_point() else y
        with torch.enable_grad():
            f = f.detach().double().requires_grad_()
            loss = -self._each(f, y)
            gradient = _gradient(loss.sum(), f, create_graph=True)
            _check_finite(gradient)
            _check_apart(loss, gradient, f)
            rows = [_gradient(gradient[:, c].sum(), f) for c in range(f.shape[-1])]
        hessian = torch.stack(rows, dim=1).detach()
        return (hessian + hessian.mT) / 2

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """What the user's `sample_fn` draws.

        Raises:
            ValueError: if there is none.
        """
        if self.sample_fn is None:
            raise ValueError("Monte Carlo needs samples of y: give FromLogProb a sample_fn=(f, draws, draw) -> y.")
        return self.sample_fn(f, draws, draw)

    def inverse_link(self, f: Tensor) -> Tensor:
        """What the user's `inverse_link_fn` says.

        Raises:
            ValueError: if there is none.
        """
        if self.inverse_link_fn is None:
            raise ValueError("The mean of y is not known: give FromLogProb an inverse_link_fn=f -> E[y|f].")
        return self.inverse_link_fn(f)

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The mean of `inverse_link` over samples of f, the same for every call."""
        return self.inverse_link(self._outputs(mean, covariance)).mean(0)

    def predictive(self, mean: Tensor, covariance: Tensor) -> Distribution:
        """The mixture of `p(y|f)` over samples of f, with equal weights.

        Raises:
            ValueError: if there is no `distribution_fn`.
        """
        if self.distribution_fn is None:
            raise ValueError("p(y|f) is not known: give FromLogProb a distribution_fn=f -> torch Distribution.")
        components = self.distribution_fn(self._outputs(mean, covariance).movedim(0, -2))
        return MixtureSameFamily(Categorical(logits=mean.new_zeros(*mean.shape[:-1], self.samples)), components)

    def _outputs(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Samples of f, `(S, N, C)`, from the same standard normal numbers for every input."""
        noise = Draws(0, torch.arange(self.samples, device=mean.device)).normal(0, mean.shape[-1], dtype=mean.dtype)
        values, vectors = torch.linalg.eigh(covariance)
        root = vectors * values.clamp_min(0).sqrt()[..., None, :]
        return mean + torch.einsum("...cd,sd->s...c", root, noise)


def _rows(f: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs `(B, C)` and their targets, positions among the examples."""
    return (f, y) if f.ndim == 2 else (f.flatten(0, 1), y.flatten(0, 1))


def _gradient(of: Tensor, f: Tensor, *, create_graph: bool = False) -> Tensor:
    """The gradient in f, zero where `of` does not depend on it."""
    if not of.requires_grad:
        return torch.zeros_like(f)
    (gradient,) = torch.autograd.grad(of, f, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(f) if gradient is None else gradient


def _check_finite(derivative: Tensor) -> None:
    """Refuse derivatives that do not exist.

    Raises:
        ValueError: if one is NaN or infinite.
    """
    if not torch.isfinite(derivative).all():
        raise ValueError("A derivative of log_prob_fn by autograd is NaN or infinite. Is it twice differentiable?")


def _check_apart(loss: Tensor, gradient: Tensor, f: Tensor) -> None:
    """Refuse a log density of which one row depends on another: its Hessian is not made of blocks.

    Raises:
        ValueError: if the first row depends on others, or others on it.
    """
    own = _gradient(loss[0], f)
    if own[1:].any() or not torch.allclose(own[0], gradient[0], rtol=1e-8, atol=0):
        raise ValueError(
            "log_prob_fn lets rows of f influence each other; each row must have its own log density. Do not average "
            "or normalise over the first axis."
        )


def _root(hessian: Tensor) -> Tensor:
    """Columns `(C, B, C)` of a root of positive semi-definite matrices `(B, C, C)`.

    Raises:
        ValueError: if one is indefinite beyond rounding, or not finite.
    """
    _check_finite(hessian)
    values, vectors = torch.linalg.eigh(hessian)
    rounding = ROUNDING * hessian.shape[-1] * torch.finfo(hessian.dtype).eps * values.abs().max()
    if values.min() < -rounding:
        row = int(values[:, 0].argmin())
        raise ValueError(
            f"The Hessian of -log_prob_fn is indefinite: it has an eigenvalue {float(values.min()):.3g} in row {row}. "
            "Give FromLogProb a hessian_root_fn, for instance of the Fisher information, or a sample_fn and use "
            "MonteCarloGGN."
        )
    return (vectors * values.clamp_min(0).sqrt()[:, None, :]).movedim(-1, 0)
