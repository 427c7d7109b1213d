"""The likelihood of a preference between two: what reward models are trained with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Categorical as CategoricalDistribution

from lapkit.curvature.columns.sampling import Draws
from lapkit.curvature.likelihoods.classification import Categorical, probit_scaled
from lapkit.curvature.likelihoods.likelihood import ALL, Likelihood

_PAIR = Categorical()


@dataclass(frozen=True)
class BradleyTerry(Likelihood):
    """Which of two is preferred, `p(y=1|r) = sigmoid(r_1 - r_0)` by their rewards; targets are 0 or 1, `(N,)`.

    A reward model is fitted to pairs, for which it gives two rewards `(N, 2)`, one for each of the two, and predicts
    the reward `(N, 1)` of a single input. So the loss is that of two classes, while predictions are those of a
    regression: mean and variance of rewards, which have no noise of their own. Preferences do not depend on a constant
    that is added to all rewards; how well it is known, by the prior alone, is part of a reward's variance.

    Example:
        >>> import torch
        >>> BradleyTerry().log_prob(torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        tensor([-0.1269])

    Reference:
        Bradley and Terry, Rank analysis of incomplete block designs, 1952; Christiano et al., Deep reinforcement
        learning from human preferences, 2017, eq. (1).
    """

    def check(self, f: Tensor, y: Tensor, output_axis: int | None = None) -> Tensor:
        """0 or 1, `(N,)`: which one of a pair is preferred.

        Raises:
            ValueError: if there are not two rewards for each example, or a target is neither 0 nor 1.
        """
        if f.ndim != 2 or f.shape[1] != 2:
            raise ValueError(
                "A reward model is fitted to pairs: for inputs (N, 2, ...) it has to give the rewards of both, (N, 2), "
                f"got {tuple(f.shape)} (positions flattened). Put the pairs into the batch, rewards = "
                "model(x.flatten(0, 1)).reshape(-1, 2)."
            )
        return _PAIR.check(f, y, output_axis)

    def loss(self, f: Tensor, y: Tensor) -> Tensor:
        """`-log sigmoid(r_y - r_other)`."""
        return _PAIR.loss(f, y)

    def rank(self, f: Tensor) -> int:
        """1: only the difference counts."""
        return _PAIR.rank(f)

    def hessian_root(self, f: Tensor, y: Tensor | None = None, columns: slice = ALL) -> Tensor:
        """`sqrt(p_0 p_1) (1, -1)`."""
        return _PAIR.hessian_root(f, y, columns)

    def hessian_product(self, f: Tensor, y: Tensor | None, vectors: Tensor) -> Tensor:
        """See `Categorical.hessian_product`."""
        return _PAIR.hessian_product(f, y, vectors)

    def class_root(self, f: Tensor, y: Tensor | None, classes: Tensor) -> Tensor:
        """See `Categorical.class_root`; the classes are the two of a pair."""
        return _PAIR.class_root(f, y, classes)

    def sample(self, f: Tensor, draws: Draws, draw: int = 0) -> Tensor:
        """Which one is preferred."""
        return _PAIR.sample(f, draws, draw)

    def inverse_link(self, f: Tensor) -> Tensor:
        """The identity: what is predicted are rewards."""
        return f

    def expectation(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """The rewards' mean."""
        return mean

    def predictive(self, mean: Tensor, covariance: Tensor) -> CategoricalDistribution:
        """Which one of a pair is preferred, by MacKay's approximation for the difference of the two rewards.

        Raises:
            ValueError: if there are not two rewards.
        """
        if mean.shape[-1] != 2:
            raise ValueError(
                f"A preference is one between two, got {mean.shape[-1]} reward for each input. Give pairs, or ask for "
                "the reward itself, la(x) or la.function_distribution(x)."
            )
        signs = torch.tensor([-1.0, 1.0]).to(mean)
        difference, variance = mean @ signs, signs @ covariance @ signs
        logit = probit_scaled(difference[..., None], variance[..., None, None])
        return CategoricalDistribution(logits=torch.cat([torch.zeros_like(logit), logit], dim=-1))

    def predicted_outputs(self, fitted: float) -> tuple[float, ...]:
        """One reward, or those of a pair."""
        return 1, fitted
