"""A Laplace approximation in function space: a Gaussian process of gpytorch whose kernel is the tangent kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Size, Tensor

from lapkit.curvature.accumulate import Totals
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.likelihoods.likelihood import Likelihood
from lapkit.curvature.likelihoods.regression import Gaussian
from lapkit.curvature.memory import chunk_length
from lapkit.posteriors.function_space.joint import JointPosterior, let_botorch_draw
from lapkit.posteriors.function_space.kernel import TangentKernel
from lapkit.posteriors.function_space.noise import WhitenedNoise, target_noise
from lapkit.posteriors.function_space.observed import ObservedProcess
from lapkit.posteriors.function_space.rows import TangentRows
from lapkit.posteriors.function_space.tangents import Tangents
from lapkit.posteriors.functions import FunctionDistribution
from lapkit.posteriors.priors import GaussianPrior


@final
class LaplaceGP(ObservedProcess):
    """The Laplace approximation with the full GGN as a Gaussian process over functions, `N(f(x), J P^{-1} J^T)`.

    With the prior covariance `Theta = J P0^{-1} J^T` and the whitened observations' rows `V = S^T J`,

        J P^{-1} J^T = Theta - J P0^{-1} V^T (noise I + V P0^{-1} V^T)^{-1} V P0^{-1} J^T,

    exactly the weight-space posterior, from matrices of the size of the data instead of the number of weights squared.
    It is an `ExactGP`: `gp(x)` is its posterior at inputs `(*, q, D)`, `gp.train()` and gpytorch's
    `ExactMarginalLogLikelihood(gp.likelihood, gp)` tune the prior precision and a Gaussian's noise, whose value times
    the number of observations is the Laplace evidence. Its observations are columns of examples, not inputs:
    `train_inputs` counts them, and all targets are zero, since the mean is the network's.

    All results of gpytorch are in double precision, whatever the type of inputs `(*, q, D)`, which the network gets in
    that of its weights, and of the parameters, which BoTorch casts to that of the inputs. Make it by `laplace_gp`.

    Args:
        tangents: the network at the mode.
        observations: the rows V, of unit dispersion.
        totals: of the pass over the data.
        likelihood: of targets given outputs.
        prior: over the weights; its precision is where the parameter `covar_module.prior_precision` starts.
        temperature: of the likelihood.
        input_shape: the shape of an example, where inputs are one tensor.
        iterative: leave the choice of solvers to gpytorch's settings, which for more than `max_cholesky_size` rows
            means conjugate gradients and Lanczos' method, within their tolerances. Cholesky by default.

    Raises:
        ValueError: if the temperature is not positive, or the prior does not fit the weights.

    Reference:
        Khan et al., Approximate inference turns deep networks into Gaussian processes, 2019; Immer, Korzepa, Bauer,
        Improving predictions of Bayesian neural nets via local linearization, 2021, section 3.2.
    """

    def __init__(
        self,
        tangents: Tangents,
        observations: TangentRows,
        totals: Totals,
        likelihood: Likelihood,
        prior: GaussianPrior,
        *,
        temperature: float = 1.0,
        input_shape: tuple[int, ...] | None = None,
        iterative: bool = False,
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"The temperature must be positive and finite, got {temperature}.")
        prior.centre(tangents.parameters)
        noise = WhitenedNoise(
            float(temperature / torch.as_tensor(likelihood.precision, dtype=torch.float64)),
            len(observations),
            tuned=isinstance(likelihood, Gaussian),
            device=tangents.parameters.device,
        )
        kernel = TangentKernel(tangents, prior.precision, input_shape=input_shape)
        super().__init__(kernel, observations, noise, iterative=iterative)
        self.totals, self.temperature = totals, temperature
        self._given, self._prior_mean = likelihood, prior.mean
        self._weights = tangents.parameters.vector().double()

    # -- hyper-parameters and evidence

    @property
    def prior(self) -> GaussianPrior:
        """The prior over the weights at the present precision."""
        return GaussianPrior(self.covar_module.prior_precision, self._prior_mean)

    @property
    def target_likelihood(self) -> Likelihood:
        """The likelihood of targets given outputs, at the present noise. `likelihood` is that of the observations."""
        if not isinstance(self._given, Gaussian):
            return self._given
        return Gaussian((self.likelihood.noise / self.temperature).sqrt().reshape(()))

    def log_marginal_likelihood(self) -> Tensor:
        """The Laplace approximation of the log evidence, in nats, differentiable in precision and noise.

        `log p(D) ~ log p(D|w*) - [(w* - m)^T P0 (w* - m) + log det(I + V P0^{-1} V^T / noise)] / 2`, equal to that of
        the weights with their full GGN; the data count once.
        """
        with self.solvers():
            normal = self.likelihood(self.whitened())
            _, logdet = normal.lazy_covariance_matrix.inv_quad_logdet(logdet=True)
        return self.at_the_mode() - (logdet + len(self.observations) * math.log(2 * math.pi)) / 2

    def at_the_mode(self) -> Tensor:
        """All of the evidence but the observations' density; their own normaliser does not count."""
        likelihood, totals = self.target_likelihood, self.totals
        data = likelihood.log_likelihood(totals.loss.double(), totals.weight, totals.outputs) / self.temperature
        scatter = self.prior.scatter(self.tangents.parameters, self._weights)
        normaliser = len(self.observations) * (2 * math.pi * self.likelihood.noise).log().sum()
        return data - scatter / 2 + normaliser / 2

    # -- predictions

    def functions(self, x: Any) -> FunctionDistribution:
        """The outputs' distribution at each input by itself, `N(f, J P^{-1} J^T)`, as every posterior of lapkit has it.

        Args:
            x: inputs, whatever the model takes; cut into pieces that fit the memory budget.

        Returns:
            Means `(N, C)` and covariances `(N, C, C)`, or `(N, T, C)` and `(N, T, C, C)`, of the model's type.
        """
        means, covariances = [], []
        for outputs, rows in self.tangents.pieces(x):
            means.append(summable(outputs))
            each = 8 * outputs[0].numel() * 2 * len(self.observations)
            step = chunk_length(len(outputs), each, self.tangents.engine.budget)
            parts = [self._blocks(rows.examples(a, a + step)) for a in range(0, len(outputs), step)]
            covariances.append(_of_positions(torch.cat(parts), outputs).to(means[-1].dtype))
        return FunctionDistribution(torch.cat(means), torch.cat(covariances))

    def joint(self, x: Any) -> JointPosterior:
        """The Gaussian over the outputs at all inputs together.

        Args:
            x: a batch of N inputs, whatever the model takes, differentiable if it is a tensor.

        Returns:
            Mean `(N, C)` and covariance `(N C, N C)`, C counting all the numbers that an example has for outputs.
        """
        return self._joint(*self.tangents(x), Size())

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool = False,
        posterior_transform: Callable[[JointPosterior], Any] | None = None,
    ) -> Any:
        """The joint Gaussian over the outputs at q inputs, as BoTorch's acquisition functions ask for it.

        Args:
            X: `(*batch, q, D)`, examples as vectors, of any floating type; differentiable.
            output_indices: only these outputs.
            observation_noise: of targets instead of outputs, where these are real numbers with noise.
            posterior_transform: applied to the result.

        Returns:
            A `JointPosterior` with mean `(*batch, q, C)`, or what the transform makes of it.

        Raises:
            ValueError: if the inputs are no such tensor, or noise is asked for and the likelihood has none.
        """
        let_botorch_draw()
        self.check_inputs(X)
        found = self._joint(*self.tangents(self.covar_module.examples(X)), X.shape[:-2])
        if observation_noise:
            noise = target_noise(self.target_likelihood, found.mean)
            found = JointPosterior(found.mean, found.covariance + torch.block_diag(*[noise] * X.shape[-2]))
        if output_indices is not None:
            found = found.of_outputs(output_indices)
        return found if posterior_transform is None else posterior_transform(found)

    @property
    def num_outputs(self) -> int:
        """C, or T C; for BoTorch."""
        return round(self.totals.outputs)

    @property
    def batch_shape(self) -> Size:
        """One process, not several; for BoTorch."""
        return Size()

    def _joint(self, outputs: Tensor, rows: TangentRows, batch: Size) -> JointPosterior:
        with self.solvers():
            mean, own, cross = self.prior_at(outputs, rows, batch)
            mean, covariance = self.strategy().exact_prediction(mean, own, cross)
        covariance = covariance.to_dense()
        mean = mean.unflatten(-1, (-1, outputs[0].numel()))
        return JointPosterior(mean, (covariance + covariance.mT) / 2)

    def _blocks(self, rows: TangentRows) -> Tensor:
        """The covariance of each example's outputs, `(N, K, K)`."""
        with self.solvers():
            strategy = self.strategy()
            before = rows.blocks(self.variance)
            cross = rows.inner_products(self.observations, self.variance)
            half = strategy.half(cross).unflatten(0, before.shape[:2])
            after = before - half @ half.mT
            strategy.check_digits(half, after.diagonal(dim1=1, dim2=2))
        return (after + after.mT) / 2


def _of_positions(covariance: Tensor, outputs: Tensor) -> Tensor:
    """The blocks `(N, T, C, C)` of each position of `(N, T C, T C)`, where outputs are `(N, T, C)`."""
    if outputs.ndim == 2:
        return covariance
    boxed = covariance.unflatten(2, outputs.shape[1:]).unflatten(1, outputs.shape[1:])
    return boxed.diagonal(dim1=1, dim2=3).movedim(-1, 1)
