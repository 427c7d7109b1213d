"""All that a pass over the data leaves: everything else about a posterior is a function of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.operators.operator import SymmetricOperator
from lapkit.curvature.parameters import Parameters


@dataclass(frozen=True, eq=False)
class Fit:
    """Curvature and loss at the MAP estimate, both summed over the data and free of dispersion, prior and temperature.

    Args:
        parameters: the random weights.
        mean: their values, `(P,)`.
        curvature: of the loss.
        loss: summed over examples, in nats.
        count: sum of the examples' weights, their number where they have none.
        outputs: number of outputs of an example.
        dispersion_power: how the curvature scales with the likelihood's precision: 1, or 2 for the empirical Fisher.
    """

    parameters: Parameters
    mean: Tensor
    curvature: SymmetricOperator
    loss: Tensor
    count: float
    outputs: float
    dispersion_power: int = 1

    def log_likelihood(self, likelihood: Likelihood, temperature: float = 1.0) -> Tensor:
        """`(1 / T) sum_n log p(y_n | f_n)`; the normaliser is tempered like the rest."""
        return likelihood.log_likelihood(self.loss, self.count, self.outputs) / temperature

    def curvature_scale(self, likelihood: Likelihood, temperature: float = 1.0) -> Tensor | float:
        """What the curvature is multiplied by: `(precision / T)^power`."""
        return (likelihood.precision / temperature) ** self.dispersion_power
