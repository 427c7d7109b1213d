"""The likelihood of independent answers yes or no."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Distribution, Independent

from lapkit.curvature.callers import callers_level
from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.classification import NEEDS_TARGETS, check_count, check_weights, probit_scaled
from lapkit.curvature.likelihoods.likelihood import DiagonalLikelihood, like_outputs

MANY = 16  # outputs between 0 and 1, one after the other, are no chance


@dataclass(frozen=True, eq=False)
class Bernoulli(DiagonalLikelihood):
    """C independent yes-or-no answers, `p(y_c=1|f) = sigmoid(f_c)`.

    Targets are 0 or 1 in the shape of the outputs, or `(N,)` for C = 1.

    Args:
        pos_weight: `(C,)`, multiply the loss of the answers "yes", as for `torch.nn.BCEWithLogitsLoss`; the loss is
            then no negative log probability.
        missing: the value, -1 or NaN for instance, of answers that are not known: no loss and no curvature.

    Raises:
        ValueError: if a weight is negative, or 0 or 1 stand for missing answers.

    Example:
        >>> import torch
        >>> Bernoulli().log_prob(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([-1.3863])
        >>> Bernoulli(missing=-1).log_prob(torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]))
        tensor([-0.6931])
    """

    pos_weight: Tensor | None = None
    missing: float | None = None

    def __post_init__(self) -> None:
        check_weights(self.pos_weight)
        if self.missing in {0, 1}:
            raise ValueError(f"missing={self.missing} is an answer; choose another value, -1 or NaN for instance.")

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """Zeros and ones in the shape of the outputs, or missing; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if shape, values or the number of weights do not fit.
        """
        check_count(self.pos_weight, f)
        y = like_outputs(f, y, "(one for each logit)", output_axis=output_axis)
        known = y[self._observed(y)]
        if not ((known == 0) | (known == 1)).all():
            if known.isnan().any():
                raise ValueError(
                    "The targets hold NaN. Remove or impute these examples first, or let NaN stand for missing "
                    'answers: Bernoulli(missing=float("nan")).'
                )
            expected = "0 or 1" if self.missing is None else f"0 or 1, or {self.missing:g} where missing"
            raise ValueError(f"Expected targets {expected}, got values between {known.min():g} and {known.max():g}.")
        if f.numel() >= MANY and bool(((f > 0) & (f < 1)).all()):
            warnings.warn(
                "The model's outputs look like probabilities: all lie between 0 and 1. The binary likelihood takes "
                "logits, of which it takes the sigmoid itself: leave out the last nn.Sigmoid.",
                stacklevel=callers_level(),
            )
        return y

    def _observed(self, y: Tensor) -> Tensor:
        if self.missing is None:
            return torch.ones_like(y, dtype=torch.bool)
        return ~y.isnan() if math.isnan(self.missing) else y != self.missing

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy, summed over outputs and positions."""
        observed = self._observed(y)
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            f,
            torch.where(observed, y, 0.0),
            reduction="none",
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(f),
        )
        return (each * observed).flatten(1).sum(-1)

    def _root_weight(self, f: Tensor, y: Tensor | None) -> Tensor:
        """`sqrt(a)` in the Hessian `a p (1 - p)`.

        Raises:
            ValueError: if it depends on targets that are not given.
        """
        if y is None:
            if self.pos_weight is not None:
                raise ValueError(NEEDS_TARGETS)
            return f.new_ones(())
        weight = f.new_ones(()) if self.pos_weight is None else torch.where(y == 1, self.pos_weight.to(f), 1.0)
        return torch.where(self._observed(y), weight.sqrt(), 0.0)

    def root_diagonal(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """`sqrt(a p (1 - p))` with a the target's weight; without targets, all count as observed.

        Raises:
            ValueError: if there are weights but no targets.
        """
        root = torch.exp((torch.nn.functional.logsigmoid(f) + torch.nn.functional.logsigmoid(-f)) / 2)
        return root * self._root_weight(f, y)

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """Zeros and ones of the shape of `f`."""
        return (draws.uniform(draw, *f.shape[1:], dtype=f.dtype) < f.sigmoid()).to(f)

    def sampled_column(self, f: Tensor, y: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """`sqrt(a) (p - y')`, y' ~ p(y|f), with a the weight of the data's own target."""
        return (f.sigmoid() - self.sample(f, draws, draw)) * self._root_weight(f, y)

    def inverse_link(self, f: Tensor) -> Tensor:
        """Sigmoid."""
        return f.sigmoid()

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Sigmoid of the probit-scaled means; see `probit_scaled`."""
        return probit_scaled(mean, covariance).sigmoid()

    def predictive(self, mean: Tensor, covariance: Tensor) -> Distribution:
        """Independent answers with the probabilities of `expectation`."""
        return Independent(BernoulliDistribution(probs=self.expectation(mean, covariance)), 1)
