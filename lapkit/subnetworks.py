"""Which single weights are random: those that matter most by some measure, random ones, or those of named modules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from lapkit.curvature import Likelihood, Parameters
from lapkit.curvature.capture.forward import ForwardFunction, forward
from lapkit.curvature.inputs import check_batches, to_device, unpack
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.posteriors import Fit, GaussianPosterior


class Fitted(Protocol):
    """A fitted `Laplace`."""

    @property
    def fitted(self) -> Fit:
        """What it was fitted to."""

    @property
    def posterior(self) -> GaussianPosterior:
        """Over the weights."""


@dataclass(frozen=True)
class Task:
    """What weights can be chosen by.

    Args:
        model: the trained network.
        likelihood: of the targets.
        data: batches.
        forward_fn: called instead of the model.
        output_axis: of the outputs.
    """

    model: nn.Module
    likelihood: Likelihood
    data: Iterable[Any]
    forward_fn: ForwardFunction | None = None
    output_axis: int | None = None


class SubnetworkMask(ABC):
    """A choice of single weights.

    A class of one's own needs `choose`.
    """

    @abstractmethod
    def choose(self, task: Task) -> Tensor:
        """The chosen weights.

        Args:
            task: network and data.

        Returns:
            Indices or a Boolean mask over the flat vector of the weights that require gradients.
        """


@final
@dataclass(frozen=True)
class LargestMagnitude(SubnetworkMask):
    """The weights with the largest absolute values.

    Args:
        count: how many.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lapkit.curvature import Gaussian
        >>> net = nn.Linear(3, 1, bias=False)
        >>> net.weight.data = torch.tensor([[1.0, -3.0, 2.0]])
        >>> LargestMagnitude(2).choose(Task(net, Gaussian(), []))
        tensor([1, 2])
    """

    count: int

    def choose(self, task: Task) -> Tensor:
        """See `SubnetworkMask.choose`."""
        return _largest(summable(Parameters.of(task.model).vector()).abs(), self.count)


@final
@dataclass(frozen=True)
class LargestVariance(SubnetworkMask):
    """The weights with the largest marginal variances under a posterior over all of them, a diagonal one as a rule.

    Args:
        count: how many.
        laplace: fitted, with `subset_of_weights="all"`.

    Reference:
        Daxberger et al., Bayesian deep learning via subnetwork inference, 2021, section 4.
    """

    count: int
    laplace: Fitted

    def choose(self, task: Task) -> Tensor:
        """See `SubnetworkMask.choose`.

        Raises:
            RuntimeError: if the posterior is not fitted.
            ValueError: if it is one of other weights.
        """
        fitted = self.laplace.fitted.parameters
        wanted = Parameters.of(task.model)
        if fitted.names != wanted.names or fitted.numel != wanted.numel:
            raise ValueError(
                f"The posterior whose variances are wanted is over {fitted.numel} weights of {list(fitted.names)}, "
                f"the network has {wanted.numel} in {list(wanted.names)}. Fit it with subset_of_weights='all'."
            )
        return _largest(self.laplace.posterior.variance, self.count)


@final
@dataclass(frozen=True)
class LargestSwagVariance(SubnetworkMask):
    """The weights that vary most along a trajectory of stochastic gradient descent; see `swag_variance`.

    Args:
        count: how many.
        snapshots: of the trajectory.
        every: epochs between two of them.
        lr: learning rate.
        momentum: of the descent.
        weight_decay: of the descent.

    Reference:
        Maddox et al., A simple baseline for Bayesian uncertainty in deep learning, 2019.
    """

    count: int
    snapshots: int = 40
    every: int = 1
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 3e-4

    def choose(self, task: Task) -> Tensor:
        """See `SubnetworkMask.choose`; the network is not touched."""
        variance = swag_variance(
            task,
            snapshots=self.snapshots,
            every=self.every,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        return _largest(variance, self.count)


@final
@dataclass(frozen=True)
class RandomWeights(SubnetworkMask):
    """Weights drawn without replacement, each as probable as any other.

    Args:
        count: how many.
        generator: on the CPU; the only source of randomness.
    """

    count: int
    generator: torch.Generator | None = None

    def choose(self, task: Task) -> Tensor:
        """See `SubnetworkMask.choose`."""
        return _largest(torch.rand(Parameters.of(task.model).numel, generator=self.generator), self.count)


@final
@dataclass(frozen=True)
class Named(SubnetworkMask):
    """All weights of some parameters or modules.

    Args:
        names: of parameters, or of modules, which stand for all parameters inside.
    """

    names: tuple[str, ...]

    def choose(self, task: Task) -> Tensor:
        """See `SubnetworkMask.choose`.

        Raises:
            ValueError: if a name picks nothing that can be trained.
        """
        everything, chosen = Parameters.of(task.model), set(Parameters.of(task.model, self.names).names)
        pairs = zip(everything.names, everything.sizes, strict=True)
        return torch.cat([torch.full((size,), name in chosen) for name, size in pairs])


def _largest(values: Tensor, count: int) -> Tensor:
    """The places of the largest values, ascending; of equal ones the first.

    Raises:
        ValueError: if there are not so many, or a value is NaN.
    """
    if not 1 <= count <= len(values):
        raise ValueError(f"A subnetwork of {len(values)} weights has 1 to {len(values)} of them, got {count}.")
    if values.isnan().any():
        raise ValueError("Weights cannot be ranked: a value is NaN.")
    return values.argsort(descending=True, stable=True)[:count].sort().values


def swag_variance(
    task: Task,
    *,
    snapshots: int = 40,
    every: int = 1,
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 3e-4,
) -> Tensor:
    """How much each weight varies along stochastic gradient descent that begins at the trained network.

    The descent is that of the mean loss of a batch, of a copy in the mode in which the network is; the variance is that
    of the weights after each `every` epochs.

    Args:
        task: network, likelihood and data; the data are run through `snapshots * every` times.
        snapshots: how many, two at least.
        every: epochs between two.
        lr: learning rate.
        momentum: of the descent.
        weight_decay: of the descent.

    Returns:
        Variances, `(P,)`.

    Raises:
        TypeError: if the data can be run through only once.
        ValueError: if a number is not positive, or the descent diverges.
    """
    check_batches(task.data)
    if isinstance(task.data, Iterator):
        raise TypeError(f"SWAG needs data for many epochs; a {type(task.data).__name__} is used up after one.")
    if snapshots < 2 or every < 1:
        raise ValueError(f"Expected two snapshots or more, and every >= 1; got {snapshots} and every={every}.")
    model = deepcopy(task.model)
    parameters = Parameters.of(model)
    optimizer = torch.optim.SGD(parameters.tensors, lr=lr, momentum=momentum, weight_decay=weight_decay)
    start = summable(parameters.vector())  # differences from it, whose squares keep their digits
    total, squares = torch.zeros_like(start), torch.zeros_like(start)
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(snapshots):
            for _ in range(every):
                _epoch(model, parameters, task, optimizer)
            moved = summable(parameters.vector()) - start
            total, squares = total + moved, squares + moved.square()
    if not torch.isfinite(squares).all():
        raise ValueError(f"The descent of SWAG has diverged; a learning rate below {lr} helps.")
    return (squares / snapshots - (total / snapshots).square()).clamp_min(0)


def _epoch(model: nn.Module, parameters: Parameters, task: Task, optimizer: torch.optim.Optimizer) -> None:
    """One pass of descent."""
    for number, batch in enumerate(task.data):
        x, y, weights = to_device(unpack(batch, number), parameters.device)
        f = summable(forward(model, x, parameters, forward_fn=task.forward_fn, output_axis=task.output_axis, y=y))
        losses = task.likelihood.loss(f, task.likelihood.check(f, y, task.output_axis))
        optimizer.zero_grad()
        (losses if weights is None else losses * weights.to(losses)).mean().backward()
        optimizer.step()
