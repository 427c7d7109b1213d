"""The posterior over the surviving weights alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature import Parameters
from lapkit.curvature.parameters import unwrapped
from lapkit.laplace import Laplace
from lapkit.pruning.result import PruneResult


def surviving(
    la: Laplace,
    result: PruneResult,
    data: Iterable[Any],
    model: nn.Module | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Laplace:
    """A posterior like the one that was pruned, over the weights that are left; those that have gone are fixed.

    Its evidence compares with that of the dense network: it is that of a smaller model. Only with "kron" or "ekfac"
    and a prior precision for each weight it does not: they approximate such a prior for whole layers, and take it as it
    is for single weights.

    Args:
        la: that was pruned; likelihood, structure, prior and all other settings are its.
        result: of `prune`.
        data: the batches to fit.
        model: the pruned network, trained further if you like, with the zeros written into its weights; by default a
            pruned copy of the one that was fitted.
        generator: for Monte Carlo curvature.

    Returns:
        Fitted, with `subset_of_weights="subnetwork"`; tune its prior anew.

    Raises:
        ValueError: if a weight that has gone is not zero in the model, or nothing is left.
    """
    model = result.pruned() if model is None else model
    quadratic = result.quadratic
    left = ~result.gone[quadratic.places]
    alive = torch.zeros_like(result.gone)
    alive[quadratic.places[left]] = True
    _check_zeros(model, result)
    everything = Parameters.of(model)
    own = quadratic.whole.split(alive)
    parts = [own[n].flatten() if n in own else torch.zeros(s, dtype=torch.bool) for n, s in _sizes(everything)]
    names = [name for name in everything.names if name in own and own[name].any()]
    made = Laplace(
        model,
        la.likelihood,
        "subnetwork",
        subnetwork=torch.cat([p.to(alive.device) for p in parts]),
        prior_precision=_of_survivors(la.prior_precision, la.fitted.parameters, left, names),
        prior_mean=_of_survivors(torch.as_tensor(la.prior.mean), la.fitted.parameters, left, names),
        temperature=la.temperature,
        curvature=la.columns,
        memory_budget=la.memory_budget,
        forward_fn=la.forward_fn,
        output_axis=la.output_axis,
    )
    made.structure, made.subset_of_data = la.structure, la.subset_of_data
    return made.fit(data, generator=generator)


def _sizes(parameters: Parameters) -> Iterable[tuple[str, int]]:
    return zip(parameters.names, parameters.sizes, strict=True)


def _check_zeros(model: nn.Module, result: PruneResult) -> None:
    """Refuse a network in which pruned weights have come back.

    Raises:
        ValueError: if one is not zero.
    """
    own = dict(unwrapped(model).named_parameters())
    for name, gone in result.parameters.split(result.gone).items():
        if name not in own:
            raise ValueError(
                f"The network has no parameter {name!r}. Make its masks permanent first: "
                "torch.nn.utils.prune.remove(module, 'weight')."
            )
        if (own[name].detach()[gone] != 0).any():
            raise ValueError(f"Weights of {name!r} that were pruned are not zero in this network: keep the masks on.")


def _of_survivors(value: Tensor, parameters: Parameters, left: Tensor, names: list[str]) -> Tensor:
    """A prior's numbers for the weights that are left: one, one for each tensor, or one for each weight.

    Args:
        value: before.
        parameters: the weights before.
        left: which of them are left.
        names: of the tensors that still have some, in the network's order, which may be another by now.

    Returns:
        The numbers now.
    """
    if value.numel() == 1:
        return value
    if len(value) == len(left):
        parts, kept = (dict(zip(parameters.names, v.split(parameters.sizes), strict=True)) for v in (value, left))
        return torch.cat([parts[n][kept[n].to(value.device)] for n in names])
    return torch.stack([value[parameters.names.index(n)] for n in names])
