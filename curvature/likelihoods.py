"""What the outputs of a network say about the targets: p(y|f), its curvature in f, and samples from it.

Every likelihood is written as an exponential dispersion

    log p(y|f) = -precision * loss(f, y) + log_normaliser(count)

so that a fit, which needs only the loss, stays valid when the dispersion (a Gaussian's noise) is tuned afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Bernoulli as BernoulliDistribution
from torch.distributions import Categorical as CategoricalDistribution
from torch.distributions import Distribution, Independent, MultivariateNormal


class Likelihood(ABC):
    """A conditional distribution of targets given a network's outputs f of shape `(N, C)`."""

    @abstractmethod
    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """The targets in the form that the other methods take, or an error that says what is wrong with them.

        Args:
            f: outputs `(N, C)`.
            y: targets as the user's data loader gives them.

        Returns:
            Targets on the device of `f`.

        Raises:
            ValueError: if shape or values do not fit.
            TypeError: if the type does not fit.
        """

    @abstractmethod
    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Loss of each example in nats, `(N, C), checked targets -> (N,)`, without dispersion and normaliser."""

    @abstractmethod
    def hessian_root(self, f: Tensor) -> Tensor:
        """Columns `S` of shape `(K, N, C)` with `sum_k S_k S_k^T = d^2 loss / df^2` for each example."""

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One target for each example, y ~ p(y|f)."""

    @abstractmethod
    def inverse_link(self, f: Tensor) -> Tensor:
        """The mean of y given f: probabilities, rates, or f itself."""

    @abstractmethod
    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """`E[y]` for Gaussian outputs `f ~ N(mean, covariance)`, in closed form, `(N, C)`: probabilities or means."""

    @abstractmethod
    def predictive(self, mean: Tensor, covariance: Tensor) -> Distribution:
        """`p(y)` for Gaussian outputs `f ~ N(mean, covariance)`, `(N, C)` and `(N, C, C)`, in closed form."""

    @property
    def precision(self) -> Tensor | float:
        """What multiplies the loss, 1 unless the likelihood has a dispersion."""
        return 1.0

    def log_normaliser(self, count: int, outputs: int) -> Tensor | float:
        """What the normaliser adds to the log likelihood of `count` examples with `outputs` outputs each."""
        return 0.0

    def log_likelihood(self, loss: Tensor, count: int, outputs: int) -> Tensor:
        """Log likelihood of data whose summed loss is known: `-precision * loss + log_normaliser`."""
        return -self.precision * loss + self.log_normaliser(count, outputs)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """Normalised log p(y|f) of each example, `(N,)`."""
        return -self.precision * self.loss(f, y) + self.log_normaliser(1, f.shape[-1])


def probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logits `m / sqrt(1 + pi v / 8)`, whose sigmoid is within 0.018 of `E[sigmoid(f)]`, `f ~ N(m, v)`.

    Only the marginal variances v enter.

    Reference:
        MacKay, The evidence framework applied to classification networks, 1992, eq. (10).
    """
    return mean / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()


def _same_length(f: Tensor, y: Tensor) -> None:
    if y.ndim == 0 or len(y) != len(f):
        raise ValueError(
            f"Got {tuple(y.shape)} targets for outputs {tuple(f.shape)}: one target an example is expected."
        )


def _finite(y: Tensor) -> None:
    if not torch.isfinite(y).all():
        raise ValueError("The targets hold NaN or infinite values. Remove or impute these examples first.")


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
        _same_length(f, y)
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
        _same_length(f, y)
        y = y[:, None] if y.ndim == 1 and f.shape[-1] == 1 else y
        if y.shape != f.shape:
            raise ValueError(f"Expected targets of shape {tuple(f.shape)} (one for each logit), got {tuple(y.shape)}.")
        y = y.to(f.device, f.dtype)
        _finite(y)
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


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real targets with independent noise, `y ~ N(f, noise^2 I)`.

    Targets have the shape `(N, C)` of f, or `(N,)` for C = 1. The loss is `|y - f|^2 / 2`, the precision `1 / noise^2`.

    Args:
        noise: standard deviation of the observation noise, in the units of y.

    Raises:
        ValueError: if the noise is not positive.

    Example:
        >>> import torch
        >>> Gaussian(noise=1.0).log_prob(torch.zeros(1, 1), torch.zeros(1, 1))
        tensor([-0.9189])
    """

    noise: Tensor | float = 1.0

    def __post_init__(self) -> None:
        noise = torch.as_tensor(self.noise).detach()
        if noise.numel() != 1 or not 0 < float(noise) < math.inf:
            raise ValueError(f"The observation noise must be one positive number, got {noise.tolist()}.")

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """Real numbers in the shape of `f`; `(N,)` stands for `(N, 1)`.

        Raises:
            ValueError: if the shape does not fit, or a target is not finite.
        """
        _same_length(f, y)
        y = y[:, None] if y.ndim == 1 and f.shape[-1] == 1 else y
        if y.shape != f.shape:
            raise ValueError(f"Expected targets of shape {tuple(f.shape)} like the outputs, got {tuple(y.shape)}.")
        y = y.to(f.device, f.dtype)
        _finite(y)
        return y

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`|y - f|^2 / 2`."""
        return (y - f).square().sum(-1) / 2

    def hessian_root(self, f: Tensor) -> Tensor:
        """The identity, one column an output."""
        outputs = f.shape[-1]
        eye = torch.eye(outputs, dtype=f.dtype, device=f.device)
        return eye[:, None, :].expand(outputs, len(f), outputs)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """`f + noise * epsilon`."""
        return f + self.noise * torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)

    def inverse_link(self, f: Tensor) -> Tensor:
        """The identity."""
        return f

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The outputs' mean."""
        return mean

    def predictive(self, mean: Tensor, covariance: Tensor) -> MultivariateNormal:
        """`N(mean, covariance + noise^2 I)`, exactly."""
        noise = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device) * self.noise**2
        return MultivariateNormal(mean, covariance + noise)

    @property
    def precision(self) -> Tensor | float:
        """`1 / noise^2`."""
        return self.noise**-2

    def log_normaliser(self, count: int, outputs: int) -> Tensor | float:
        """`-count * outputs * log(noise * sqrt(2 pi))`."""
        log_noise = self.noise.log() if isinstance(self.noise, Tensor) else math.log(self.noise)
        return -count * outputs * (log_noise + math.log(2 * math.pi) / 2)
