"""What the outputs of a network say about the targets: p(y|f), its curvature in f, and samples from it.

Every likelihood is written as an exponential dispersion

    log p(y|f) = -precision * loss(f, y) + log_normaliser(count)

so that a fit, which needs only the loss, stays valid when the dispersion (a Gaussian's noise) is tuned afterwards.
Without a dispersion the loss is `-log p(y|f)` itself, and precision and normaliser are 1 and 0.

Outputs are `(N, C)`, or `(N, T, C)` where an example has targets at T positions, pixels or words, which are independent
given the outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.distributions import Distribution

from lapkit.curvature.columns.sampling import Draws

ALL = slice(None)


class Likelihood(ABC):
    """A conditional distribution of targets given a network's outputs f of shape `(N, C)` or `(N, T, C)`."""

    @abstractmethod
    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """The targets in the form that the other methods take, or an error that says what is wrong with them.

        Args:
            f: outputs `(N, C)` or `(N, T, C)`, positions flattened.
            y: targets as the user's data loader gives them, in the shape of an image if the model's outputs have it.
            output_axis: the axis of classes or channels in the model's own outputs, and in targets of their shape; the
                last one of up to three axes and 1 of more by default.

        Returns:
            Targets on the device of `f`.

        Raises:
            ValueError: if shape or values do not fit.
            TypeError: if the type does not fit.
        """

    @abstractmethod
    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Loss of each example in nats, summed over positions, without dispersion and normaliser, `(N,)`."""

    @abstractmethod
    def hessian_root(self, f: Tensor, y: Tensor | None = None, columns: slice = ALL) -> Tensor:
        """Columns `S` with `sum_k S_k S_k^T = d^2 loss / df^2`, of each position by itself.

        Args:
            f: outputs `(N, C)` or `(N, T, C)`.
            y: checked targets, for the likelihoods whose Hessian depends on them.
            columns: which of the K columns to compute.

        Returns:
            `(K, N, C)` or `(K, N, T, C)`.
        """

    def rank(self, f: Tensor) -> int:
        """The number K of columns of `hessian_root`."""
        return f.shape[-1]

    def hessian_product(self, f: Tensor, y: Tensor | None, vectors: Tensor) -> Tensor:
        """`S S^T v` of each example and position with the columns S of `hessian_root`, in the shape of `f`.

        Args:
            f: outputs `(N, C)` or `(N, T, C)`.
            y: checked targets, for the likelihoods whose Hessian depends on them.
            vectors: one in the shape of `f`.
        """
        root = self.hessian_root(f, y)
        return (root * (root * vectors).sum(-1, keepdim=True)).sum(0)

    def class_root(self, f: Tensor, y: Tensor | None, classes: Tensor) -> Tensor:
        """Those columns of a root with one column for each output that belong to some of the outputs.

        Args:
            f: outputs `(N, C)` or `(N, T, C)`.
            y: checked targets, for the likelihoods whose Hessian depends on them.
            classes: indices `(k,)` between 0 and C - 1.

        Returns:
            `(k, N, C)` or `(k, N, T, C)`.

        Raises:
            ValueError: if the likelihood has no such root.
        """
        raise ValueError(f"{type(self).__name__} has no root of its Hessian with one column for each output.")

    @abstractmethod
    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """One target for each example and position, y ~ p(y|f).

        Args:
            f: outputs `(N, C)` or `(N, T, C)`.
            draws: the only source of randomness.
            draw: which one; different draws are independent.

        Returns:
            Targets as `check` returns them.
        """

    def sampled_column(self, f: Tensor, y: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """A random s with `E[s s^T] = d^2 loss / df^2`: the gradient `sqrt(precision) d loss(f, y') / df`, y' ~ p(y|f).

        Args:
            f: outputs `(N, C)` or `(N, T, C)`.
            y: the checked targets of the data: which are missing, and what they weigh.
            draws: the only source of randomness.
            draw: which one.

        Returns:
            A column in the shape of `f`.

        Reference:
            Dangel, Backpropagation Beyond the Gradient, eq. (5.8), (5.9).
        """
        return self.loss_gradient(f, self.sample(f, draws, draw)) * self.precision**0.5

    def loss_gradient(self, f: Tensor, y: Tensor) -> Tensor:
        """`d loss / df` of each example, in the shape of `f`."""
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            return torch.autograd.grad(self.loss(leaf, y).sum(), leaf)[0]

    @abstractmethod
    def inverse_link(self, f: Tensor) -> Tensor:
        """The mean of y given f: probabilities, rates, or f itself."""

    @abstractmethod
    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """`E[y]` for Gaussian outputs `f ~ N(mean, covariance)`: probabilities or means.

        Means of f are `(N, C)` or `(N, T, C)`, covariances `(N, C, C)` or `(N, T, C, C)`.
        """

    @abstractmethod
    def predictive(self, mean: Tensor, covariance: Tensor) -> Distribution:
        """`p(y)` for Gaussian outputs `f ~ N(mean, covariance)`, of shapes as for `expectation`."""

    def predicted_outputs(self, fitted: float) -> tuple[float, ...]:
        """How many outputs an input may have when predicting: as many as those that were fitted, as a rule."""
        return (fitted,)

    @property
    def precision(self) -> Tensor | float:
        """What multiplies the loss, 1 unless the likelihood has a dispersion."""
        return 1.0

    def with_noise(self, noise: Tensor | float) -> Likelihood:
        """The same with another dispersion, `precision = 1 / noise^2`.

        Args:
            noise: a positive number; the result is differentiable in it.

        Raises:
            ValueError: if there is no dispersion, or the noise is not positive.
        """
        raise ValueError(f"{type(self).__name__} has no observation noise; only regression has.")

    def log_normaliser(self, count: float, outputs: float) -> Tensor | float:
        """What the normaliser adds to the log likelihood of `count` examples with `outputs` numbers each, `T C`.

        Both may be fractions: `count` is a sum of weights where examples have any, and `outputs` a mean over examples.
        """
        return 0.0

    def log_likelihood(self, loss: Tensor, count: float, outputs: float) -> Tensor:
        """Log likelihood of data whose summed loss is known: `-precision * loss + log_normaliser`."""
        return -self.precision * loss + self.log_normaliser(count, outputs)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Log density `log p(y|f)` of each example, `(N,)`, normalised unless targets are weighted or smoothed."""
        return -self.precision * self.loss(f, y) + self.log_normaliser(1, math.prod(f.shape[1:]))


class DiagonalLikelihood(Likelihood):
    """A likelihood of independent targets, one for each output: its Hessian in f is diagonal."""

    @abstractmethod
    def root_diagonal(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """Square roots of the Hessian's diagonal, in the shape of `f`, or one that expands to it."""

    def hessian_product(self, f: Tensor, y: Tensor | None, vectors: Tensor) -> Tensor:
        """See `Likelihood.hessian_product`; no column is formed."""
        return self.root_diagonal(f, y).square() * vectors

    def hessian_root(self, f: Tensor, y: Tensor | None = None, columns: slice = ALL) -> Tensor:
        """The diagonal matrix of `root_diagonal`, one column an output."""
        return self.class_root(f, y, torch.arange(f.shape[-1], device=f.device)[columns])

    def class_root(self, f: Tensor, y: Tensor | None, classes: Tensor) -> Tensor:
        """The columns of `hessian_root` that belong to these outputs."""
        unit = torch.nn.functional.one_hot(classes, f.shape[-1]).to(f)
        return unit.reshape(len(classes), *[1] * (f.ndim - 1), f.shape[-1]) * self.root_diagonal(f, y).expand_as(f)


def same_length(f: Tensor, y: Tensor) -> None:
    """Refuse targets that are not one for each example.

    Raises:
        ValueError: if their number differs from that of the outputs.
    """
    if y.ndim == 0 or len(y) != len(f):
        raise ValueError(
            f"Got {tuple(y.shape)} targets for outputs {tuple(f.shape)}: one target an example is expected."
        )


def check_finite(y: Tensor) -> None:
    """Refuse missing targets.

    Raises:
        ValueError: if one is NaN or infinite.
    """
    if not torch.isfinite(y).all():
        raise ValueError("The targets hold NaN or infinite values. Remove or impute these examples first.")


def like_outputs(
    f: Tensor, y: Tensor, meaning: str, *, output_axis: int | None = None, outputs: int | None = None
) -> Tensor:
    """Targets in type, place and form of the outputs: classes last, positions flattened.

    Args:
        f: outputs `(N, C)` or `(N, T, C)`.
        y: targets in the shape of `f` or of the model's own outputs; where C is 1, its axis may be missing.
        meaning: what the numbers are, for the error.
        output_axis: see `Likelihood.check`.
        outputs: C, if the targets do not have that of `f`.

    Returns:
        Targets `(N, C)` or `(N, T, C)`, finite or not.

    Raises:
        ValueError: if the shape does not fit.
    """
    same_length(f, y)
    shape = (*f.shape[:-1], f.shape[-1] if outputs is None else outputs)
    given = tuple(y.shape)
    if shape[-1] == 1 and math.prod(given) == math.prod(shape):
        y = y.reshape(shape)
    elif y.ndim > 2:
        y = classes_last(y, output_axis)
    if y.shape != shape:
        own = " or in that of the model's own outputs" if f.ndim > 2 else ""
        raise ValueError(f"Expected targets of shape {shape} {meaning}{own}, got {given}.")
    return y.to(f.device, f.dtype)


def classes_last(y: Tensor, output_axis: int | None) -> Tensor:
    """Targets of the shape of the model's own outputs, in the form the engine gives the outputs: `(N, T, C)`.

    Args:
        y: of at least three axes, otherwise they are given back.
        output_axis: see `Likelihood.check`.

    Returns:
        Classes last, positions flattened.
    """
    axis = output_axis if output_axis is not None else (1 if y.ndim > 3 else -1)
    if y.ndim < 3 or not -y.ndim < axis < y.ndim:
        return y
    return y.movedim(axis, -1).flatten(1, -2)
