"""Mixtures of Laplace approximations around several trained networks: each mode with its own width."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution

from lapkit.calibration import Report
from lapkit.comparison import compare
from lapkit.curvature import Bernoulli as BernoulliLikelihood
from lapkit.curvature import Categorical as CategoricalLikelihood
from lapkit.evaluation import evaluate
from lapkit.laplace import Laplace
from lapkit.mixing import mixed, weighted
from lapkit.posteriors import Uncertainty


class LaplaceMixture:
    """`p(w|D) ~ sum_m pi_m N(w_m*, P_m^{-1})` from several networks, trained from different starts.

    Predictions are mixtures of the members' linearised predictives: a deep ensemble whose members know their own
    uncertainty. In the distribution of the training data a plain ensemble is often as good; far from it the mixture is
    more careful. A sample of the outputs (`functional_samples`) is one of a member that is drawn by the weights.

    Args:
        members: fitted, of one likelihood and one number of outputs; their architectures may differ.
        weights: "uniform"; "evidence", proportional to the members' evidences; or one positive number for each.

    Raises:
        TypeError: if a member is no `Laplace`, or they are in no list.
        ValueError: if there is none, they were fitted to different data, or the weights do not fit.
        RuntimeError: if one is not fitted.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> data = [(torch.randn(30, 2), torch.arange(30) % 3)]
        >>> members = [Laplace(nn.Linear(2, 3), "classification", "all").fit(data) for _ in range(3)]
        >>> LaplaceMixture(members)(torch.randn(4, 2)).shape
        torch.Size([4, 3])

    Reference:
        Eschenhagen, Daxberger, Hennig and Kristiadi, Mixtures of Laplace approximations for improved post-hoc
        uncertainty in deep learning, 2021.
    """

    def __init__(self, members: Sequence[Laplace], weights: str | Sequence[float] | Tensor = "uniform") -> None:
        if not isinstance(members, Sequence):
            kind = type(members).__name__
            raise TypeError(f"Expected fitted Laplace objects in a list, as in LaplaceMixture([a, b]); got a {kind}.")
        self.members = tuple(members)
        compared = compare(self.members)  # refuses what does not belong together
        if isinstance(weights, str):
            if weights not in ("uniform", "evidence"):
                raise ValueError(f"Unknown weights {weights!r}. Choose 'uniform', 'evidence', or numbers.")
            by_name = {row.name: row.probability for row in compared}
            even = 1 / len(self.members)
            found = [by_name[str(i)] if weights == "evidence" else even for i in range(len(self.members))]
        else:
            found = [float(w) for w in weights]
        self.weights = torch.tensor(found, dtype=torch.float64)
        if len(self.weights) != len(self.members) or not ((self.weights >= 0).all() and self.weights.sum() > 0):
            raise ValueError(
                f"Expected {len(self.members)} weights, none negative and not all zero, got {self.weights.tolist()}."
            )
        self.weights = self.weights / self.weights.sum()

    def __repr__(self) -> str:
        shares = ", ".join(f"{weight:.3g}" for weight in self.weights.tolist())
        return f"{type(self).__name__}({len(self.members)} members, weights {shares})"

    def __call__(self, x: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The mixture of the members' predictives.

        Args:
            x: a batch of inputs.
            options: for `Laplace.__call__`; a joint predictive is not a mixture's, and `pred_type` is "glm".

        Returns:
            For classes, probabilities `(N, C)`. For regression, the mean `(N, C)` of the outputs and their covariance
            `(N, C, C)`, or variances: that within the members and that between them.

        Raises:
            ValueError: if `joint` is asked for, or an option is refused by `Laplace`.
            RuntimeError: if a network's weights have changed since.
        """
        if options.get("joint"):
            raise ValueError("The joint predictive of a mixture is not Gaussian; ask the members one by one.")
        found = [member(x, **options) for member in self.members]
        if isinstance(found[0], Tensor):
            return self._mean(torch.stack(found))  # type: ignore[arg-type]
        means = torch.stack([mean for mean, _ in found])
        spreads = torch.stack([spread for _, spread in found])
        mean = self._mean(means)
        apart = means - mean
        between = apart.square() if options.get("diagonal_output") else apart[..., :, None] * apart[..., None, :]
        return mean, self._mean(spreads + between)

    def _mean(self, values: Tensor) -> Tensor:
        return weighted(self.weights, values)

    def uncertainty(self, x: Any, n_samples: int = 512, generator: torch.Generator | None = None) -> Uncertainty:
        """Aleatoric and epistemic parts, where what the members disagree about is epistemic, too.

        Args:
            x: a batch of inputs.
            n_samples: quasi-Monte Carlo samples of the outputs, for classes.
            generator: of these.

        Returns:
            As of `Laplace.uncertainty`: the means of the members' parts, and the relative entropy of their
            probabilities to the mixture's, or the variance of their means, added to the epistemic one.

        Raises:
            RuntimeError: if a network's weights have changed since.
            TypeError: if the split is not known for the likelihood.
        """
        parts = [member.uncertainty(x, n_samples, generator) for member in self.members]
        classes = isinstance(self.members[0].likelihood, (CategoricalLikelihood, BernoulliLikelihood))
        link = "qmc" if classes else "probit"  # in closed form for all others
        found = [member.predictive_distribution(x, link, n_samples, generator) for member in self.members]
        if isinstance(found[0], Categorical):
            p = torch.stack([each.probs for each in found])  # type: ignore[attr-defined]
            apart = (p.xlogy(p) - p.xlogy(self._mean(p))).sum(-1)
        else:
            p = torch.stack([each.mean for each in found])
            mean = self._mean(p)
            apart = (p - mean).square()
            if isinstance(self.members[0].likelihood, BernoulliLikelihood):
                apart = p.xlogy(p) - p.xlogy(mean) + (1 - p).xlogy(1 - p) - (1 - p).xlogy(1 - mean)
        aleatoric = self._mean(torch.stack([part.aleatoric for part in parts]))
        epistemic = self._mean(torch.stack([part.epistemic for part in parts]) + apart)
        return Uncertainty(aleatoric, epistemic)

    def predictive_distribution(self, x: Any) -> Distribution:
        """`p(y|x)`, the members' predictive distributions mixed.

        Args:
            x: a batch of inputs.

        Returns:
            `Categorical` or independent `Bernoulli` for classes, where a mixture of them is one again; a
            `MixtureSameFamily` of `MultivariateNormal` for regression, observation noise included.

        Raises:
            RuntimeError: if a network's weights have changed since.
            ValueError: if the likelihood has no closed-form predictive.
            TypeError: if a mixture of its predictives has none.
        """
        return mixed([member.predictive_distribution(x) for member in self.members], self.weights)

    def functional_samples(
        self, x: Any, n_samples: int = 100, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        """Samples of the outputs f, each from a member that is drawn by the weights, the same for all inputs.

        Args:
            x: a batch of inputs.
            n_samples: how many, S.
            generator: the only source of randomness, of members and samples.
            options: `joint=`, `pred_type=` and `diagonal_output=` of `Laplace.functional_samples`.

        Returns:
            `(S, N, C)`, in random order.

        Raises:
            RuntimeError: if the network of a member that was drawn has changed its weights since.
            ValueError: if there is not at least one sample, or an option is refused by `Laplace`.
        """
        draw = partial(Laplace.functional_samples, x=x, generator=generator, **options)
        return self._drawn(draw, n_samples, generator)

    def predictive_samples(
        self, x: Any, n_samples: int = 100, generator: torch.Generator | None = None, **options: Any
    ) -> Tensor:
        """Samples of the mean of y: class probabilities, or f for regression.

        Args:
            x: a batch of inputs.
            n_samples: how many, S.
            generator: as for `functional_samples`.
            options: as for `functional_samples`.

        Returns:
            `(S, N, C)`, in random order.

        Raises:
            RuntimeError: if the network of a member that was drawn has changed its weights since.
            ValueError: if there is not at least one sample, or an option is refused by `Laplace`.
        """
        draw = partial(Laplace.predictive_samples, x=x, generator=generator, **options)
        return self._drawn(draw, n_samples, generator)

    def _drawn(self, draw: Callable[..., Tensor], n_samples: int, generator: torch.Generator | None) -> Tensor:
        """Samples `(S, N, C)`, as many of each member as the weights have chosen it, at the places of the choice.

        Raises:
            ValueError: if there is not at least one sample.
        """
        if n_samples < 1:
            raise ValueError(f"Expected at least one sample, got n_samples={n_samples}.")
        weights = self.weights if generator is None else self.weights.to(generator.device)
        chosen = torch.multinomial(weights, n_samples, replacement=True, generator=generator)
        counts = chosen.bincount(minlength=len(self.members)).tolist()
        found = torch.cat([draw(m, n_samples=n) for m, n in zip(self.members, counts, strict=True) if n])
        return found[chosen.argsort(stable=True).argsort().to(found.device)]

    def evaluate(self, loader: Iterable[Any], **options: Any) -> Report:
        """How good and how honest the mixture is, beside its first member and the plain ensemble of the networks.

        Args:
            loader: batches `(inputs, targets)` that nothing was trained or tuned on.
            options: those of `Laplace.evaluate`; `ensemble=` other networks than the members' own.

        Returns:
            The report: the rows of the first member's, "ensemble of M" and "mixture of M".

        Raises:
            RuntimeError: if a network's weights have changed since.
            TypeError: if the likelihood is neither of classes nor Gaussian, or a batch has the wrong type.
            ValueError: if data or options do not fit.
        """
        first, *others = self.members
        return evaluate(first, loader, others=others, weights=self.weights, **options)
