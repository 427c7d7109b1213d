"""Masks in the form of `torch.nn.utils.prune`, from scores and into a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lapkit.curvature.parameters import unwrapped

Scores = dict[tuple[nn.Module, str], Tensor]
NORMS = (
    *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.SyncBatchNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def is_prunable(model: nn.Module, name: str, shape: torch.Size) -> bool:
    """Whether a parameter is a weight matrix or a filter; biases and normalisation are few and costly to lose."""
    owner, _, attribute = name.rpartition(".")
    return len(shape) > 1 and "bias" not in attribute and not isinstance(model.get_submodule(owner), NORMS)


def by_module(model: nn.Module, values: Mapping[str, Tensor]) -> Scores:
    """Values by parameter name as torch's pruning names them, `(module, attribute)`; only those that may be pruned."""
    model = unwrapped(model)
    return {place(model, n): v for n, v in values.items() if is_prunable(model, n, v.shape)}


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and the parameter's name in it."""
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner), attribute


def pruning_masks(scores: Scores, amount: float) -> Scores:
    """Masks that remove the weights with the smallest scores, over all layers together.

    Args:
        scores: by `(module, parameter name)`.
        amount: fraction to remove, in [0, 1), the `sparsity` of `prune`. The count is exact, also where scores tie: of
            equal ones the first are removed.

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

    A weight that several modules share is masked in each of them.

    Args:
        model: the network whose modules the masks name; copy it first (`copy.deepcopy`) to keep the original, and
            compute scores from the copy, since masks refer to modules.
        masks: from `pruning_masks` or `PruneResult.masks`.
        permanent: write the zeros into the weights instead, and leave no trace of the pruning.

    Returns:
        The same model.

    Raises:
        TypeError: if masks are named otherwise.
        ValueError: if a mask belongs to a module of another model.
    """
    own = set(model.modules())
    if not all(isinstance(key, tuple) and len(key) == 2 for key in masks):
        raise TypeError(
            f"Masks are named by (module, parameter name), as those of pruning_masks are, got {list(masks)}."
        )
    for (module, name), mask in masks.items():
        if module not in own:
            raise ValueError(
                f"A mask belongs to a {type(module).__name__} that is not in this model. For a copy of the model "
                "use result.apply(copy); result.masks_by_name are those for one that is loaded again."
            )
        for sharer, attribute in _sharers(model, module, name):
            _apply(sharer, attribute, mask, permanent)
    return model


def _apply(module: nn.Module, name: str, mask: Tensor, permanent: bool) -> None:
    """One mask; a plain parameter that is to stay one keeps its place among the others, which torch's would not."""
    parameter = getattr(module, name)
    if permanent and isinstance(parameter, nn.Parameter):
        with torch.no_grad():
            parameter.mul_(mask)
        return
    prune.custom_from_mask(module, name, mask)
    if permanent:
        prune.remove(module, name)


def _sharers(model: nn.Module, owner: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Every module that holds a parameter, under the name that it has there; one with a mask already has one owner."""
    parameter = getattr(owner, name)
    held = [(m, n, p) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    return [(m, n) for m, n, p in held if p is parameter] or [(owner, name)]
