"""The likelihood of one of several classes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical as CategoricalDistribution

from lapkit.curvature.callers import callers_level
from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.likelihood import ALL, Likelihood, same_length

PROBABILITIES = 1e-3  # how far rows may be from a sum of one, in any floating type
NEEDS_TARGETS = "With weights the Hessian depends on the targets: give them, hessian_root(f, y)."


def probit_scaled(mean: Tensor, covariance: Tensor) -> Tensor:
    """Logits `m / sqrt(1 + pi v / 8)`, whose sigmoid is within 0.018 of `E[sigmoid(f)]`, `f ~ N(m, v)`.

    Only the marginal variances v enter.

    Reference:
        MacKay, The evidence framework applied to classification networks, 1992, eq. (10).
    """
    return mean / (1 + math.pi / 8 * covariance.diagonal(dim1=-2, dim2=-1)).sqrt()


def check_weights(weights: Tensor | None) -> None:
    """Refuse what cannot weigh classes.

    Raises:
        ValueError: if a weight is negative or not finite, or there is no vector of them.
    """
    if weights is not None and (weights.ndim != 1 or not ((weights >= 0) & torch.isfinite(weights)).all()):
        raise ValueError(f"Expected weights (C,), none of them negative, got {weights.tolist()}.")


def check_count(weights: Tensor | None, f: Tensor) -> None:
    """Refuse outputs for which there are not as many weights.

    Raises:
        ValueError: if their numbers differ.
    """
    if weights is not None and len(weights) != f.shape[-1]:
        raise ValueError(f"The likelihood has {len(weights)} weights for {f.shape[-1]} outputs.")


def _warn_of_probabilities(f: Tensor) -> None:
    """Tell that outputs are no logits, where a softmax has been taken already."""
    f = f.detach()
    if bool((f >= 0).all()) and bool(((f.sum(-1) - 1).abs() < PROBABILITIES).all()):
        warnings.warn(
            "The model's outputs look like probabilities: none is negative, and those of each example sum to one. "
            "Classification takes logits, of which it takes the softmax itself: leave out the last nn.Softmax, "
            "or give logarithms, as nn.LogSoftmax does.",
            stacklevel=callers_level(),
        )


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """One of C classes, `p(y=c|f) = softmax(f)_c`; targets are class indices `(N,)`, or `(N, T)` for T positions.

    The options mean what they mean for `torch.nn.functional.cross_entropy(reduction="sum")`. With class weights or
    label smoothing the loss is no negative log probability; its Hessian is that of the plain one times a number that
    depends on the target.

    Args:
        ignore_index: targets of this value are missing: no loss and no curvature.
        class_weights: `(C,)`, multiply the loss of the targets of each class.
        label_smoothing: how much of each target is spread evenly over all classes, between 0 and 1.

    Raises:
        ValueError: if a weight is negative, or the smoothing is not between 0 and 1.

    Example:
        >>> import torch
        >>> Categorical().log_prob(torch.zeros(1, 4), torch.tensor([2]))
        tensor([-1.3863])

    Reference:
        The root of the Hessian with C - 1 columns: K. Tanabe and M. Sagae, An exact Cholesky decomposition and the
        generalized inverse of the variance-covariance matrix of the multinomial distribution, 1992.
    """

    ignore_index: int = -100
    class_weights: Tensor | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_weights(self.class_weights)
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie between 0 and 1, got {self.label_smoothing}.")

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """Class indices `(N,)` or `(N, 1)`, for positions `(N, T)` or `(N, H, W)`, between 0 and C - 1 or missing.

        Raises:
            ValueError: if there is a single output, or shape, values or the number of weights do not fit.
            TypeError: if the type is no integer.
        """
        if f.shape[-1] < 2:
            raise ValueError(
                f"The model has {f.shape[-1]} output; classification needs one for each of at least two classes. "
                "For a single logit use the likelihood lapkit.curvature.Bernoulli()."
            )
        check_count(self.class_weights, f)
        same_length(f, y)
        if y.numel() != f.shape[:-1].numel():
            raise ValueError(
                f"Expected class indices of shape {tuple(f.shape[:-1])}, got {tuple(y.shape)}. "
                "One-hot rows become indices by .argmax over the axis of the classes."
            )
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"Expected class indices of an integer type, got {y.dtype}. Convert them with .long().")
        y = y.reshape(f.shape[:-1]).to(f.device, torch.long)
        self._check_range(y[y != self.ignore_index], f.shape[-1])
        _warn_of_probabilities(f)
        return y

    def _check_range(self, labels: Tensor, outputs: int) -> None:
        low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
        if low < 0 or high >= outputs:
            raise ValueError(
                f"Labels lie between {low} and {high}, but the model has {outputs} outputs: labels must lie in "
                f"0 ... {outputs - 1}, or be {self.ignore_index} where missing. Renumber the labels or widen the last "
                "layer."
            )

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy `-log softmax(f)_y`, weighted and smoothed, summed over positions."""
        each = torch.nn.functional.cross_entropy(
            f.flatten(0, -2),
            y.flatten(),
            weight=None if self.class_weights is None else self.class_weights.to(f),
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return each.reshape(len(f), -1).sum(-1)

    def _root_weight(self, f: Tensor, y: Tensor | None) -> Tensor:
        """`sqrt(a)` in the Hessian `a (diag(p) - p p^T)`, of the shape of f with one class.

        Raises:
            ValueError: if it depends on targets that are not given.
        """
        if y is None:
            if self.class_weights is not None:
                raise ValueError(NEEDS_TARGETS)
            return f.new_ones((*f.shape[:-1], 1))
        observed = y != self.ignore_index
        weight = observed.to(f)
        if self.class_weights is not None:
            w = self.class_weights.to(f)
            weight = weight * ((1 - self.label_smoothing) * w[y * observed] + self.label_smoothing * w.mean())
        return weight.sqrt()[..., None]

    def rank(self, f: Tensor) -> int:
        """C - 1: adding a constant to all logits changes nothing."""
        return f.shape[-1] - 1

    def hessian_root(self, f: Tensor, y: Tensor | None = None, columns: slice = ALL) -> Tensor:
        r"""The Cholesky factor of `diag(p) - p p^T`, which has rank C - 1, times the root of the target's weight.

        Column k has `sqrt(p_k q_{k+1} / q_k)` at k and `-p_c sqrt(p_k / (q_k q_{k+1}))` at c > k, `q_k = p_k + ... +
        p_C`. Without targets, all count as observed.

        Raises:
            ValueError: if there are class weights but no targets.
        """
        log_p = f.log_softmax(-1)
        # Tail sums in logarithms: a difference 1 - p_1 - ... would lose all digits for a confident network.
        log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
        c = torch.arange(f.shape[-1], device=f.device)
        k = c[:-1][columns]
        here, tail, rest = log_p[..., :-1][..., columns], log_q[..., :-1][..., columns], log_q[..., 1:][..., columns]
        at_k = torch.exp((here + rest - tail) / 2)[..., None]  # (N, K, 1)
        after = -torch.exp(log_p[..., None, :] + ((here - tail - rest) / 2)[..., None])  # (N, K, C)
        root = torch.where(c > k[:, None], after, torch.where(c == k[:, None], at_k, 0.0))
        return (root * self._root_weight(f, y)[..., None]).movedim(-2, 0)

    def hessian_product(self, f: Tensor, y: Tensor | None, vectors: Tensor) -> Tensor:
        """`a (diag(p) - p p^T) v` in O(C).

        It does not change with a constant added to v. Measured from the likeliest class, v loses no digits to the
        difference where a network is confident.

        Raises:
            ValueError: if there are class weights but no targets.
        """
        p = f.softmax(-1)
        v = vectors - vectors.gather(-1, p.argmax(-1, keepdim=True))
        return self._root_weight(f, y).square() * p * (v - (p * v).sum(-1, keepdim=True))

    def class_root(self, f: Tensor, y: Tensor | None, classes: Tensor) -> Tensor:
        """Columns `sqrt(p_c) (e_c - p)` of the symmetric factor `diag(sqrt(p)) - p sqrt(p)^T`.

        Reference:
            Dangel, Backpropagation Beyond the Gradient, eq. (5.6).
        """
        log_p = f.log_softmax(-1)
        here = log_p[..., classes, None]  # (N, k, 1)
        own = torch.arange(f.shape[-1], device=f.device) == classes[:, None]
        root = (here / 2).exp() * torch.where(own, -torch.expm1(here), -log_p.exp()[..., None, :])
        return (root * self._root_weight(f, y)[..., None]).movedim(-2, 0)

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """Class indices drawn from softmax(f), where the cumulated probabilities pass a uniform number."""
        cumulated = f.softmax(-1).cumsum(-1)
        # They may end below one; scaled by their end, no number passes all of them.
        level = draws.uniform(draw, *f.shape[1:-1], 1, dtype=f.dtype) * cumulated[..., -1:]
        return torch.searchsorted(cumulated.contiguous(), level)[..., 0]

    def sampled_column(self, f: Tensor, y: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """`sqrt(a) (p - onehot(c))`, c ~ p, with a the weight of the data's own target.

        A weight must not depend on the sampled class: the mean would not be the Hessian.
        """
        sampled = torch.nn.functional.one_hot(self.sample(f, draws, draw), f.shape[-1])
        return (f.softmax(-1) - sampled) * self._root_weight(f, y)

    def inverse_link(self, f: Tensor) -> Tensor:
        """Softmax."""
        return f.softmax(-1)

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Softmax of the probit-scaled means; see `probit_scaled`."""
        return probit_scaled(mean, covariance).softmax(-1)

    def predictive(self, mean: Tensor, covariance: Tensor) -> CategoricalDistribution:
        """Classes with the probabilities of `expectation`."""
        return CategoricalDistribution(probs=self.expectation(mean, covariance))
