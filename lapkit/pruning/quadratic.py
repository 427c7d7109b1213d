"""The quadratic model of the objective around trained weights: what pruning predicts with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapkit.curvature import Parameters, Subnetwork, SymmetricOperator
from lapkit.curvature.parameters import unwrapped
from lapkit.laplace import Laplace
from lapkit.pruning.restriction import compact, restricted_solve
from lapkit.subsets import places_among

STALE = (
    "The network's weights are not those that were fitted: it was pruned, masked or trained since. Make its masks "
    "permanent, torch.nn.utils.prune.remove(module, 'weight'), and call fit again."
)


@dataclass(frozen=True, eq=False)
class Quadratic:
    """`objective(w + d) ~ objective(w) + d^T P d / 2`, for weights w at a minimum of the objective.

    The objective is a negative log posterior, `-log p(y|w) - log p(w)` in nats summed over the data, so that P is the
    posterior precision. All is in double precision.

    Args:
        model: the network.
        whole: the tensors that hold the weights.
        places: of the weights in the flat vector of `whole`, ascending, `(S,)`; all of them as a rule.
        weights: `(S,)`.
        precision: P, positive definite, of size S.
        curvature: the part of P that comes from the data.
        prior_precision: the rest of P, `(S,)`; zero where P is no posterior precision.
        prior_mean: `(S,)`.
    """

    model: nn.Module
    whole: Parameters
    places: Tensor
    weights: Tensor
    precision: SymmetricOperator
    curvature: SymmetricOperator
    prior_precision: Tensor
    prior_mean: Tensor

    @classmethod
    def of(cls, la: Laplace, names: Iterable[str] | None = None) -> Quadratic:
        """That of a fitted posterior.

        Args:
            la: fitted, on whole parameters or on single weights that were given by indices.
            names: of the tensors in which units are counted; by default those that hold a fitted weight.

        Returns:
            The model of its negative log posterior.

        Raises:
            RuntimeError: before `fit`, or if the network's weights are not those that were fitted.
            ValueError: if the weights were chosen by a mask that needs data.
        """
        fit, prior, wide = la.fitted, la.prior, torch.float64
        present = {name for name, _ in unwrapped(la.model).named_parameters()}
        if not present.issuperset(fit.parameters.names):
            raise RuntimeError(STALE)
        whole, places = _location(la, names)
        weights = fit.mean.to(wide)
        if not torch.equal(whole.vector()[places].to(wide), weights):
            raise RuntimeError(STALE)
        scale = fit.curvature_scale(la.likelihood, la.temperature)
        return cls(
            la.model,
            whole,
            places,
            weights,
            compact(la.posterior.precision),
            fit.curvature.scale(scale).to(wide),
            prior.diagonal(fit.parameters).to(wide).expand_as(weights),
            prior.centre(fit.parameters).to(wide).expand_as(weights),
        )

    @property
    def size(self) -> int:
        """The number of weights S."""
        return len(self.weights)

    def local(self, places: Tensor) -> Tensor:
        """Where flat places of `whole` stand among the S weights; -1 for those that are not among them."""
        where = self.places.new_full((self.whole.numel,), -1)
        where[self.places] = torch.arange(self.size, device=where.device)
        return where[places]

    def increase(self, change: Tensor) -> Tensor:
        """`d^T P d / 2` for a change of the weights `(S,)`, in nats."""
        return self.precision.quadratic(change) / 2

    def zeroed(self, gone: Tensor) -> Tensor:
        """The change that sets weights to zero and leaves the others.

        Args:
            gone: which, Boolean, `(S,)`.

        Returns:
            The change, `(S,)`.
        """
        return torch.where(gone, -self.weights, 0.0)

    def compensated(self, gone: Tensor) -> Tensor:
        """The change that sets weights to zero and raises the objective least: the surgeon's, for a group.

            d_Q = -w_Q,   d_K = P_KK^{-1} P_KQ w_Q

        Args:
            gone: which weights are Q, Boolean, `(S,)`; K are the others.

        Returns:
            The change, `(S,)`.

        Reference:
            Hassibi and Stork, Second order derivatives for network pruning: optimal brain surgeon, 1992, eq. (5), for
            several weights.
        """
        change = self.zeroed(gone)
        kept = (~gone).nonzero()[:, 0]
        if not len(kept) or not gone.any():
            return change
        change[kept] = restricted_solve(self.precision, kept, -self.precision.matmul(change)[kept])
        return change


def _location(la: Laplace, names: Iterable[str] | None) -> tuple[Parameters, Tensor]:
    """The tensors of the network that hold the fitted weights, or those named, and where the weights stand in them.

    Raises:
        ValueError: if that is not known.
    """
    weights = la.subset.known(la.model)
    if weights is None and la.subset.subnetwork is not None:
        raise ValueError(
            "The posterior is over single weights that a mask has chosen by the data. Give the indices themselves: "
            "Laplace(..., 'subnetwork', subnetwork=mask.choose(task))."
        )
    if isinstance(weights, Subnetwork):
        whole = Parameters.of(la.model, weights.whole.names if names is None else names)
        chosen = Parameters.of(la.model).split(places_among(weights, la.model))
        return whole, torch.cat([chosen[name].flatten() for name in whole.names]).nonzero()[:, 0]
    whole = Parameters.of(la.model, la.fitted.parameters.names)
    return whole, torch.arange(whole.numel, device=whole.device)
