"""Joint Gaussians over the outputs at several inputs, in the form in which BoTorch asks for them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from types import ModuleType

import torch
from linear_operator import to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Size, Tensor

from lapkit.posteriors.function_space.gaussian_processes import gpytorch


@dataclass(frozen=True, eq=False)
class JointPosterior:
    """Gaussians over C outputs at q inputs together, one for each member of a batch; BoTorch's `Posterior` protocol.

    Everything is differentiable in what mean and covariance depend on, such as the inputs.

    Args:
        mean: `(*batch, q, C)`.
        covariance: `(*batch, q C, q C)`, by inputs, then by outputs.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> import torch
        >>> posterior = JointPosterior(torch.zeros(2, 1), torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> posterior.variance.squeeze(-1), posterior.rsample(torch.Size([5])).shape
        (tensor([2., 2.]), torch.Size([5, 2, 1]))

    Reference:
        Balandat et al., BoTorch: A framework for efficient Monte-Carlo Bayesian optimization, 2020, section 3.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        size = self.mean.shape[-2:].numel()
        if self.mean.ndim < 2 or self.covariance.shape != (*self.mean.shape[:-2], size, size):
            raise ValueError(
                f"Expected a mean (*batch, q, C) and a covariance (*batch, q C, q C), got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}."
            )

    @property
    def variance(self) -> Tensor:
        """Of each output, `(*batch, q, C)`."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).reshape(self.mean.shape)

    @property
    def batch_shape(self) -> Size:
        """The shape of the batch."""
        return self.mean.shape[:-2]

    @property
    def event_shape(self) -> Size:
        """`(q, C)`."""
        return self.mean.shape[-2:]

    @property
    def base_sample_shape(self) -> Size:
        """The shape of standard normal numbers for one draw, `(*batch, q, C)`."""
        return self.mean.shape

    @property
    def batch_range(self) -> tuple[int, int]:
        """Which axes of a base sample are the batch: samplers use the same numbers along them."""
        return (0, -2)

    @property
    def device(self) -> torch.device:
        """Where mean and covariance are."""
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Their floating type."""
        return self.mean.dtype

    @cached_property
    def distribution(self) -> gpytorch.distributions.MultivariateNormal:
        """The `MultitaskMultivariateNormal`, or `MultivariateNormal` for one output, of gpytorch."""
        operator = to_linear_operator(self.covariance)
        if self.mean.shape[-1] == 1:
            return gpytorch.distributions.MultivariateNormal(self.mean.squeeze(-1), operator)
        return gpytorch.distributions.MultitaskMultivariateNormal(self.mean, operator)

    @cached_property
    def _root(self) -> Tensor:
        """A lower triangular root of the covariance; a warning tells where it takes a jitter, being singular."""
        return psd_safe_cholesky(self.covariance)

    def rsample(self, sample_shape: Size | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Draws with a gradient, `(*sample_shape, *batch, q, C)`.

        Args:
            sample_shape: how many; BoTorch's default is `(1,)`.
            generator: the only source of randomness.

        Returns:
            `mean + root epsilon`, joint over inputs and outputs.
        """
        shape = Size((1,)) if sample_shape is None else Size(sample_shape)
        noise = torch.randn(
            (*shape, *self.base_sample_shape), generator=generator, dtype=self.dtype, device=self.device
        )
        return self.rsample_from_base_samples(shape, noise)

    def rsample_from_base_samples(self, sample_shape: Size, base_samples: Tensor) -> Tensor:
        """Draws from given standard normal numbers.

        Args:
            sample_shape: how many.
            base_samples: `(*sample_shape, *batch, q, C)`, or what expands to it.

        Returns:
            Draws of that shape.

        Raises:
            ValueError: if the numbers do not have it.
        """
        shape = self._extended_shape(Size(sample_shape))
        try:
            noise = base_samples.expand(shape)
        except RuntimeError as error:
            raise ValueError(f"Expected base samples {tuple(shape)}, got {tuple(base_samples.shape)}.") from error
        drawn = (self._root @ noise.flatten(-2)[..., None]).squeeze(-1)
        return self.mean + drawn.reshape(shape)

    def sample(self, sample_shape: Size | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """`rsample` without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator)

    def of_outputs(self, indices: Sequence[int]) -> JointPosterior:
        """The Gaussian of some of the outputs.

        Args:
            indices: which of the C.

        Raises:
            IndexError: if there is no such output.
        """
        (inputs, outputs), index = self.event_shape, torch.as_tensor(indices, device=self.device)
        places = (torch.arange(inputs, device=self.device)[:, None] * outputs + index).flatten()
        if not len(index) or int(index.min()) < 0 or int(index.max()) >= outputs:
            raise IndexError(f"There are outputs 0 to {outputs - 1}, got output_indices={list(indices)}.")
        return JointPosterior(self.mean[..., index], self.covariance[..., places, :][..., places])

    def _extended_shape(self, sample_shape: Size = Size()) -> Size:  # noqa: B008 (BoTorch's signature)
        """The shape of draws."""
        return Size((*sample_shape, *self.base_sample_shape))


def let_botorch_draw() -> None:
    """BoTorch, where it is imported, picks samplers by a posterior's class: for this one those of its own Gaussians."""
    samplers = sys.modules.get("botorch.sampling.get_sampler")
    if samplers is not None:
        _register(samplers)


@cache
def _register(samplers: ModuleType) -> None:
    kinds = samplers.GetSampler
    kinds.register(JointPosterior)(kinds.dispatch(gpytorch.distributions.MultivariateNormal))
