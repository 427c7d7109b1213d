"""Invariances learned by the evidence: how far inputs may be moved without another answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.quasirandom import SobolEngine

from lapkit.curvature import Likelihood, borrowed
from lapkit.curvature.capture.forward import canonical
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.products.vectors import twice_differentiable
from lapkit.laplace import Laplace
from lapkit.marglik import MarglikTraining, marglik_training
from lapkit.posteriors import Fit
from lapkit.transforms import Transform


class InvariantModel(nn.Module):
    """A network whose outputs are averaged over transforms of its input, `f(x) = (1/S) sum_s g(T(x, u_s; range))`.

    The places u_s are fixed, the same for all inputs, and evenly spread over [-1, 1]^d: on a regular grid for d = 1,
    otherwise a scrambled Sobol sequence. The average is a network like any other, for `Laplace` and for training.

    Args:
        model: the network g.
        transform: T, of `lapkit.transforms`, or your own. Its parameters are no weights, and are frozen here; they take
            the type and the device of the network's.
        n_samples: S. Wide ranges need more: neighbouring places should look alike to the network.
        seed: of the Sobol sequence.

    Raises:
        ValueError: if there is no sample.

    Reference:
        Immer, van der Ouderaa, Rätsch, Fortuin and van der Wilk, Invariance learning in deep neural networks with
        differentiable Laplace approximations, 2022, section 3.
    """

    places: Tensor  # (S, d)

    def __init__(self, model: nn.Module, transform: Transform, n_samples: int = 16, seed: int = 0) -> None:
        super().__init__()
        if n_samples < 1:
            raise ValueError(f"Expected at least one transform of each input, got n_samples={n_samples}.")
        like = next(model.parameters(), torch.empty(0))
        self.model, self.transform = model, transform.requires_grad_(False).to(like.device, like.dtype)
        self.register_buffer("places", _spread(n_samples, transform.dimension, seed).to(like))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the shape of the network's own."""
        moved = self.transform(x, self.places)
        return self.model(moved.flatten(0, 1)).unflatten(0, moved.shape[:2]).mean(1)


def _spread(n: int, dimension: int, seed: int) -> Tensor:
    """`(n, d)`, between -1 and 1."""
    if dimension == 1:
        return (2 * torch.arange(n)[:, None] + 1) / n - 1
    return 2 * SobolEngine(dimension, scramble=True, seed=seed).draw(n) - 1


def evidence_over_transform(
    la: Laplace, train_loader: Iterable[Any], directions: Tensor, transform: Mapping[str, Tensor] | None = None
) -> tuple[float, dict[str, Tensor]]:
    r"""A lower bound on the log evidence of an `InvariantModel` as a function of the transform, with its gradient.

    The posterior `N(w*, Q^{-1})` is that of the fit; H is the GGN at any other transform, P0 the prior precision:

        log p(D) >= log p(D|w*) - (w* - m)^T P0 (w* - m) / 2 - [log det(Q) - log det(P0) + tr(Q^{-1} (H + P0) - I)] / 2

    since the logarithm of the determinant is concave. At the transform that was fitted, and with a structure in which H
    is exact ("full", "lowrank"), both sides are equal, and so are their gradients at the weights w*. It is a sum over
    examples, and one over directions: with random ones it is the bound in expectation.

    Args:
        la: of an `InvariantModel`, fitted.
        train_loader: the batches that were fitted, with tensors for inputs.
        directions: rows whose outer products sum up to `Q^{-1}`, `(M, P)`; see `posterior_directions`.
        transform: values of the transform's parameters, by name; those now by default.

    Returns:
        The bound in nats, and its derivatives by parameter of the transform.

    Raises:
        TypeError: if the model is no `InvariantModel`.
        RuntimeError: before `fit`, or if the network's weights have changed since.
        ValueError: if the bound is not finite, the directions are not over the weights of the fit, these are single
            weights, or the model is called by a `forward_fn`.
    """
    model, fit = _checked(la, directions)
    given = dict(model.transform.named_parameters()) if transform is None else transform
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    scale = torch.as_tensor(la.likelihood.precision).detach() / la.temperature
    effective = la.n_params - float((la.prior.diagonal(fit.parameters).detach() * la.posterior.variance).sum())
    bound = float(la.log_marginal_likelihood()) + float(scale * fit.loss) + effective / 2
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    with borrowed(model, fit.parameters), torch.enable_grad(), twice_differentiable(model):
        for term in _terms(la, train_loader, directions, leaves):
            term = scale * term
            gradients = torch.autograd.grad(term, list(leaves.values()), allow_unused=True, materialize_grads=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                total[name] -= gradient
            bound -= float(term.detach())
    if not math.isfinite(bound) or not all(torch.isfinite(g).all() for g in total.values()):
        raise ValueError("The evidence is not finite at these values of the transform: check inputs and transform.")
    return bound, total


def _checked(la: Laplace, directions: Tensor) -> tuple[InvariantModel, Fit]:
    """Model and fit.

    Raises:
        RuntimeError: if the network's weights have changed.
        ValueError: if the fit is over single weights, the directions are of another length, or the model is called by
            a `forward_fn`.
    """
    model, fit = _invariant(la.model), la.fitted
    size, named = fit.parameters.numel, dict(model.named_parameters())
    if any(named[name] is not p for name, p in zip(fit.parameters.names, fit.parameters.tensors, strict=True)):
        raise ValueError("The fit is over single weights, a subnetwork; fit whole parameters, such as 'all'.")
    if directions.ndim != 2 or directions.shape[1] != size or not len(directions):
        raise ValueError(f"Expected directions (M, {size}) in all fitted weights, got {tuple(directions.shape)}.")
    if la.forward_fn is not None:
        raise ValueError("An InvariantModel calls its network itself: wrap what forward_fn does in a module.")
    if not torch.equal(summable(fit.parameters.vector()), fit.mean):
        raise RuntimeError("The network's weights are not those that were fitted: call fit again.")
    return model, fit


def _terms(
    la: Laplace, train_loader: Iterable[Any], directions: Tensor, leaves: Mapping[str, Tensor]
) -> Iterator[Tensor]:
    """Per batch and direction v, `loss / M + v^T H v / 2`, with the graph in the transform; one at a time in memory."""
    parameters = la.fitted.parameters
    weights = {name: p.detach() for name, p in zip(parameters.names, parameters.tensors, strict=True)}
    moved = {f"transform.{name}": leaf for name, leaf in leaves.items()}
    for number, batch in numbered(train_loader):
        x, y, example_weights = to_device(unpack(batch, number), parameters.device)

        def outputs(at: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return canonical(functional_call(la.model, at | moved, (x,)), la.output_axis)

        for row in directions.to(parameters.tensors[0]):
            found = jvp(outputs, (weights,), (parameters.split(row),))
            f, along = found[0], found[1]  # the type of the result has a third part
            targets = la.likelihood.check(f.detach(), y, la.output_axis)
            square = (along * la.likelihood.hessian_product(f, targets, along)).flatten(1).sum(1)
            each = la.likelihood.loss(f, targets) / len(directions) + square / 2
            yield each.sum() if example_weights is None else (each * example_weights).sum()


def posterior_directions(la: Laplace, n_samples: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Rows v_m with `sum_m v_m v_m^T` the posterior's covariance: exactly, or in expectation.

    Args:
        la: fitted.
        n_samples: random ones, M; by default as many as weights, which is exact.
        generator: of the random ones.

    Returns:
        `(M, P)`.

    Raises:
        RuntimeError: before `fit`.
        ValueError: if there is not at least one.
    """
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"Expected at least one direction, got n_samples={n_samples}.")
    mean, precision = la.posterior.mean, la.posterior.precision
    if n_samples is None:
        noise = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    else:
        noise = torch.randn(len(mean), n_samples, generator=generator, dtype=mean.dtype, device=mean.device)
        noise = noise / n_samples**0.5
    return precision.inverse_root_transpose(noise).T.detach()


@dataclass(frozen=True)
class InvarianceLearning:
    """The result of `learn_invariance`.

    Args:
        training: of weights, prior and noise; its model is at the best evidence.
        transforms: values of the transform's parameters after every evidence, by name.
    """

    training: MarglikTraining
    transforms: list[dict[str, Tensor]]

    @property
    def laplace(self) -> Laplace:
        """Fitted at the network and transform of the largest evidence."""
        return self.training.laplace


@dataclass
class _Progress:
    """What a checkpoint keeps of the transform's side of the training.

    Args:
        optimizer: of the transform's parameters.
        generator: of the directions, if it is not torch's own, which a checkpoint keeps anyway.
        transforms: so far.
    """

    optimizer: torch.optim.Optimizer
    generator: torch.Generator | None
    transforms: list[dict[str, Tensor]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        random = None if self.generator is None else self.generator.get_state()
        return {"optimizer": self.optimizer.state_dict(), "random": random, "transforms": self.transforms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.transforms = state["transforms"]
        if self.generator is not None and state["random"] is not None:
            self.generator.set_state(state["random"])


def learn_invariance(
    model: InvariantModel,
    train_loader: Iterable[Any],
    likelihood: str | Likelihood = "classification",
    hessian_structure: str = "kron_reduce",
    *,
    n_steps: int = 5,
    learning_rate: float = 0.1,
    n_directions: int | None = 10,
    generator: torch.Generator | None = None,
    **options: Any,
) -> InvarianceLearning:
    """Train a network while the evidence sets prior, noise and the transforms that it is averaged over.

    `marglik_training`, and after each of its evidences some steps of Adam on `evidence_over_transform`, by the
    transform's parameters. No held-out data, and no choice of augmentation beyond its kinds. Start from small ranges:
    the evidence widens those that help, and lets the others go. And let `burn_in` last until the network has learned
    something, for one that is constant has all invariances there are.

    Args:
        model: trained in place, weights and transform; afterwards it holds those of the largest evidence.
        train_loader: batches as for `Laplace.fit`, with tensors for inputs.
        likelihood: as for `Laplace`.
        hessian_structure: as for `Laplace`. The bound holds for all; but "kron" takes the transformed inputs for
            examples of their own, and misses most of the curvature of an average that "kron_reduce" has.
        n_steps: of Adam after each evidence.
        learning_rate: of Adam.
        n_directions: draws from the posterior that the bound's trace is over; None for the exact trace.
        generator: of these draws.
        options: for `marglik_training`, such as `n_epochs`, `burn_in` and `frequency`.

    Returns:
        The training, with the values of the transform along it.

    Raises:
        TypeError: if the model is no `InvariantModel`.
        ValueError: if a number is out of range, or the training refuses something.

    Reference:
        Immer, van der Ouderaa, Rätsch, Fortuin and van der Wilk, Invariance learning in deep neural networks with
        differentiable Laplace approximations, 2022; the bound is that of their posterior's linearised network.
    """
    parameters = dict(_invariant(model).transform.named_parameters())
    if n_steps < 1 or not learning_rate > 0 or (n_directions is not None and n_directions < 1) or not parameters:
        raise ValueError(
            "n_steps, learning_rate and n_directions are positive and the transform has parameters, got "
            f"{n_steps}, {learning_rate}, {n_directions} and {len(parameters)} parameters."
        )
    optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate, maximize=True)
    progress = _Progress(optimizer, generator)

    def move(la: Laplace) -> None:
        directions = posterior_directions(la, n_directions, generator)
        for _ in range(n_steps):
            _, gradient = evidence_over_transform(la, train_loader, directions)
            for name, parameter in parameters.items():
                parameter.grad = gradient[name]
            optimizer.step()
        optimizer.zero_grad()
        progress.transforms.append({name: p.detach().clone() for name, p in parameters.items()})

    trained = marglik_training(
        model, train_loader, likelihood, hessian_structure, after_fit=move, kept={"transform": progress}, **options
    )
    return InvarianceLearning(trained, progress.transforms)


def _invariant(model: nn.Module) -> InvariantModel:
    """The model.

    Raises:
        TypeError: if it is another one.
    """
    if not isinstance(model, InvariantModel):
        raise TypeError(f"Expected an InvariantModel, got {type(model).__name__}: wrap your network in one.")
    return model
