"""Saliencies of single weights, layer by layer, as `torch.nn.utils.prune` takes them for `importance_scores`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lapkit.curvature import Parameters, hessian_diagonal
from lapkit.laplace import Laplace
from lapkit.pruning.criteria import criterion_named
from lapkit.pruning.kinds import weight_units
from lapkit.pruning.masks import Scores, by_module
from lapkit.pruning.quadratic import Quadratic


def obd_saliency(la: Laplace) -> Scores:
    """Optimal brain damage: `H_ii w_i^2 / 2`, by how many nats the loss rises when a weight alone is set to zero.

    H is the curvature of the fitted Laplace, summed over the data, without the prior, at temperature one. Vectors
    (biases, normalisation) are left out: they are few and costly to lose.

    Args:
        la: fitted, on all weights that may be pruned.

    Returns:
        Scores by `(module, parameter name)`: what `torch.nn.utils.prune.global_unstructured` takes as
        `importance_scores`.

    Raises:
        RuntimeError: before `fit`.

    Reference:
        LeCun, Denker, Solla, Optimal brain damage, 1990; Dangel, Backpropagation Beyond the Gradient, section 3.3.2.
    """
    fit = la.fitted
    saliency = fit.curvature_scale(la.likelihood) * fit.curvature.diagonal() * fit.mean.square() / 2
    return by_module(la.model, fit.parameters.split(saliency))


def obs_saliency(la: Laplace) -> Scores:
    """Optimal brain surgeon: `w_i^2 / (2 [P^-1]_ii)`, the rise if all other weights make up for the loss of one.

    P is the posterior precision: the curvature, and the prior that makes it invertible. No score exceeds that of
    optimal brain damage for the same matrix. Vectors are left out.

    Args:
        la: fitted, on all weights that may be pruned.

    Returns:
        Scores as of `obd_saliency`.

    Raises:
        RuntimeError: before `fit`.

    Reference:
        Hassibi and Stork, Second order derivatives for network pruning: optimal brain surgeon, 1992; Dangel,
        Backpropagation Beyond the Gradient, eq. (3.34c).
    """
    posterior = la.posterior
    return by_module(la.model, la.fitted.parameters.split(posterior.mean.square() / (2 * posterior.variance)))


def magnitude_saliency(model: nn.Module) -> Scores:
    """The absolute value of each weight, the usual baseline; vectors are left out.

    Args:
        model: any network.

    Returns:
        Scores by `(module, parameter name)`.
    """
    return by_module(model, {name: p.detach().abs() for name, p in model.named_parameters() if p.requires_grad})


def hessian_saliency(la: Laplace, data: Iterable[Any]) -> Scores:
    """Optimal brain damage by the exact Hessian: `[d^2 loss / dw_i^2] w_i^2 / 2`, negative where the loss bends down.

    Args:
        la: fitted; says which network, weights and likelihood.
        data: the batches that were fitted.

    Returns:
        Scores as of `obd_saliency`, in nats.

    Raises:
        RuntimeError: before `fit`, or if an operation has no second derivative.
        ValueError: if the engine or the likelihood refuses a batch.

    Reference:
        LeCun, Denker, Solla, Optimal brain damage, 1990, eq. (5).
    """
    parameters = Parameters.of(la.model, la.fitted.parameters.names)
    found = hessian_diagonal(
        la.model,
        la.likelihood,
        data,
        parameters=parameters,
        memory_budget=la.memory_budget,
        forward_fn=la.forward_fn,
        output_axis=la.output_axis,
    )
    values = la.likelihood.precision * found.diagonal() * parameters.vector().square() / 2
    return by_module(la.model, parameters.split(values))


def saliency(la: Laplace | Quadratic, criterion: str = "obs") -> Scores:
    """The saliency of each weight by any criterion, smallest first to go.

    Args:
        la: fitted on whole parameters, or a quadratic model such as that of `woodfisher`.
        criterion: a key of `CRITERIA`.

    Returns:
        Scores by `(module, parameter name)`, for `torch.nn.utils.prune` as `importance_scores`.

    Raises:
        RuntimeError: before `fit`.
        ValueError: if the criterion is unknown, or the posterior is over single weights of tensors.
    """
    quadratic = la if isinstance(la, Quadratic) else Quadratic.of(la)
    if len(quadratic.places) != quadratic.whole.numel:
        raise ValueError(
            f"The model is over {len(quadratic.places)} of the {quadratic.whole.numel} weights of its tensors, and "
            "scores are wanted of whole tensors. Use prune(...), which takes such a posterior."
        )
    units = weight_units(quadratic.whole, range(len(quadratic.whole.names)))
    scores = criterion_named(criterion).score(quadratic, units)
    dtype = torch.promote_types(quadratic.whole.dtype, torch.float32)
    return by_module(quadratic.model, quadratic.whole.split(scores.to(dtype)))
