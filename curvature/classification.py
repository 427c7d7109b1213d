"""Likelihoods of answers from a finite set: one of several classes, or yes and no."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution, Independent

from lapkit.curvature.likelihoods import Likelihood, one_for_each_output, same_length


def probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logits `m / sqrt(1 + pi v / 8)`, whose sigmoid is within 0.018 of `E[sigmoid(f)]`, `f ~ N(m, v)`.

    Only the marginal variances v enter.

    Reference:
        MacKay, The evidence framework applied to classification networks, 1992, eq. (10).
    """
    return mean / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()


@dataclass(frozen=True)
class Categorical(Likelihood):
    """One of C classes, `p(y=c|f) = softmax(f)_c`; targets are class indices `(N,)`.

    Example:
        >>> import torch
        >>> Categorical().log_prob(torch.zeros(1, 4), torch.tensor([2]))
        tensor([-1.3863])

    Reference:
        The root of the Hessian with C - 1 columns: K. Tanabe and M. Sagae, An exact Cholesky decomposition and the
        generalized inverse of the variance-covariance matrix of the multinomial distribution, 1992.
    """

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """Class indices `(N,)`, or `(N, 1)`, of an integer type and between 0 and C - 1.

        Raises:
            ValueError: if there is a single output, or shape or values do not fit.
            TypeError: if the type is no integer.
        """
        if f.shape[-1] < 2:
            raise ValueError(
                f"The model has {f.shape[-1]} output; classification needs one for each of at least two classes. "
                "For a single logit use the likelihood lapkit.curvature.Bernoulli()."
            )
        same_length(f, y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim != 1:
            raise ValueError(
                f"Expected class indices of shape ({len(f)},), got {tuple(y.shape)}. "
                "One-hot rows become indices by .argmax(1)."
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"Expected class indices of an integer type, got {y.dtype}. Convert them with .long().")
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= f.shape[-1]:
            raise ValueError(
                f"Labels lie between {low} and {high}, but the model has {f.shape[-1]} outputs: labels must lie in "
                f"0 ... {f.shape[-1] - 1}. Renumber the labels or widen the last layer."
            )
        return y.to(f.device, torch.long)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy `-log softmax(f)_y`."""
        return torch.nn.functional.cross_entropy(f, y, reduction="none")

    def hessian_root(self, f: Tensor) -> Tensor:
        r"""The Cholesky factor of `diag(p) - p p^T`, which has rank C - 1.

        Column k has `sqrt(p_k q_{k+1} / q_k)` at k and `-p_c sqrt(p_k / (q_k q_{k+1}))` at c > k, `q_k = p_k + ... +
        p_C`.
        """
        log_p = f.log_softmax(-1)
        # Tail sums in logarithms: a difference 1 - p_1 - ... would lose all digits for a confident network.
        log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
        here, tail, rest = log_p[:, :-1], log_q[:, :-1], log_q[:, 1:]
        on_diagonal = torch.exp((here + rest - tail) / 2)  # (N, C-1)
        below = -torch.exp(log_p[:, None, :] + ((here - tail - rest) / 2)[..., None])  # (N, C-1, C)
        columns = torch.triu(below, diagonal=1) + torch.nn.functional.pad(torch.diag_embed(on_diagonal), (0, 1))
        return columns.movedim(1, 0)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Class indices drawn from softmax(f)."""
        return torch.multinomial(f.softmax(-1), 1, generator=generator)[:, 0]

    def inverse_link(self, f: Tensor) -> Tensor:
        """Softmax."""
        return f.softmax(-1)

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Softmax of the probit-scaled means; see `probit_scaled`."""
        return probit_scaled(mean, covariance).softmax(-1)

    def predictive(self, mean: Tensor, covariance: Tensor) -> CategoricalDistribution:
        """Classes with the probabilities of `expectation`."""
        return CategoricalDistribution(probs=self.expectation(mean, covariance))


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """C independent yes-or-no answers, `p(y_c=1|f) = sigmoid(f_c)`.

    Targets are 0 or 1, of shape `(N, C)`, or `(N,)` for C = 1.

    Example:
        >>> import torch
        >>> Bernoulli().log_prob(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([-1.3863])
    """

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """Zeros and ones in the shape of `f`; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if shape or values do not fit.
        """
        y = one_for_each_output(f, y, "(one for each logit)")
        if ((y != 0) & (y != 1)).any():
            raise ValueError(f"Expected targets 0 or 1, got values between {y.min():g} and {y.max():g}.")
        return y

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Binary cross-entropy, summed over outputs."""
        return torch.nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(-1)

    def hessian_root(self, f: Tensor) -> Tensor:
        """`diag(sqrt(p (1 - p)))`, one column an output."""
        root = torch.exp((torch.nn.functional.logsigmoid(f) + torch.nn.functional.logsigmoid(-f)) / 2)
        return torch.diag_embed(root).movedim(1, 0)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones of the shape of `f`."""
        return torch.bernoulli(f.sigmoid(), generator=generator)

    def inverse_link(self, f: Tensor) -> Tensor:
        """Sigmoid."""
        return f.sigmoid()

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Sigmoid of the probit-scaled means; see `probit_scaled`."""
        return probit_scaled(mean, covariance).sigmoid()

    def predictive(self, mean: Tensor, covariance: Tensor) -> Distribution:
        """Independent answers with the probabilities of `expectation`."""
        return Independent(BernoulliDistribution(probs=self.expectation(mean, covariance)), 1)
