"""Pruning by curvature: which weights the loss will not miss, and masks that torch's own pruning understands."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lapkit.laplace import Laplace

Scores = dict[tuple[nn.Module, str], Tensor]


def obd_saliency(la: Laplace) -> Scores:
    """Optimal brain damage: `H_ii w_i^2 / 2`, by how many nats the loss rises when a weight alone is set to zero.

    H is the curvature of the fitted Laplace, summed over the data and without the prior. Vectors (biases,
    normalisation) are left out: they are few and costly to lose.

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
    return _by_module(la.model, fit.parameters.split(saliency))


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
    return _by_module(la.model, la.fitted.parameters.split(posterior.mean.square() / (2 * posterior.variance)))


def magnitude_saliency(model: nn.Module) -> Scores:
    """The absolute value of each weight, the usual baseline; vectors are left out.

    Args:
        model: any network.

    Returns:
        Scores by `(module, parameter name)`.
    """
    return _by_module(model, {name: p.detach().abs() for name, p in model.named_parameters() if p.requires_grad})


def _by_module(model: nn.Module, values: Mapping[str, Tensor]) -> Scores:
    scores: Scores = {}
    for name, value in values.items():
        owner, _, attribute = name.rpartition(".")
        if value.ndim > 1:
            scores[model.get_submodule(owner), attribute] = value
    return scores


def pruning_masks(scores: Scores, amount: float) -> Scores:
    """Masks that remove the weights with the smallest scores, over all layers together.

    Args:
        scores: by `(module, parameter name)`.
        amount: fraction to remove, in [0, 1). The count is exact, also where scores tie: of equal ones the first are
            removed.

    Returns:
        Ones and zeros in the shape of the scores.

    Raises:
        ValueError: if the amount is no such fraction, there is nothing to prune, or a score is NaN.
    """
    if not 0 <= amount < 1:
        raise ValueError(f"The amount to prune is a fraction in [0, 1), got {amount}.")
    if not scores:
        raise ValueError("There are no scores: the model has no trainable weight matrix.")
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    if flat.isnan().any():
        raise ValueError("Some scores are NaN; the ranking would be arbitrary.")
    keep = torch.ones_like(flat)
    keep[flat.argsort(stable=True)[: round(amount * len(flat))]] = 0
    pieces = keep.split([s.numel() for s in scores.values()])
    return {key: piece.reshape(s.shape) for (key, s), piece in zip(scores.items(), pieces, strict=True)}


def predicted_increase(saliency: Scores, masks: Scores) -> float:
    """The loss increase that a diagonal quadratic model predicts, in nats: the saliencies of what the masks remove."""
    return float(sum((saliency[key] * (1 - mask)).sum() for key, mask in masks.items()))


def apply_masks(model: nn.Module, masks: Scores, *, permanent: bool = False) -> nn.Module:
    """Prune a model in place, in the form of `torch.nn.utils.prune`: `weight_orig` times `weight_mask`.

    Args:
        model: the network whose modules the masks name; copy it first (`copy.deepcopy`) to keep the original, and
            compute scores from the copy, since masks refer to modules.
        masks: from `pruning_masks`.
        permanent: write the zeros into the weights instead, and leave no trace of the pruning.

    Returns:
        The same model.

    Raises:
        ValueError: if a mask belongs to a module of another model.
    """
    own = set(model.modules())
    for (module, name), mask in masks.items():
        if module not in own:
            raise ValueError(f"A mask belongs to a {type(module).__name__} that is not in this model.")
        prune.custom_from_mask(module, name, mask)
        if permanent:
            prune.remove(module, name)
    return model
