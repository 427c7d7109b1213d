"""Lapkit's likelihoods as the losses that other libraries know."""

from __future__ import annotations

from torch import Tensor, nn

from lapkit.curvature import Bernoulli, Categorical, Gaussian, Likelihood

# The loss, summed over examples and outputs, and how many times lapkit's it is: squares have no half there.
LOSSES: dict[type[Likelihood], tuple[type[nn.Module], float]] = {
    Categorical: (nn.CrossEntropyLoss, 1.0),
    Bernoulli: (nn.BCEWithLogitsLoss, 1.0),
    Gaussian: (nn.MSELoss, 2.0),
}


def loss_of(likelihood: Likelihood, name: str) -> tuple[nn.Module, float]:
    """The library's loss for a likelihood, and what it is of lapkit's.

    Args:
        likelihood: plain: without weights of classes, smoothing or missing targets.
        name: of the library, for the error.

    Returns:
        The loss summed over examples, and the factor. A Gaussian's noise is in neither: it joins after the fit.

    Raises:
        ValueError: if the library has no such loss.
    """
    if type(likelihood) not in LOSSES or not _plain(likelihood):
        raise ValueError(
            f"{name} has no loss for {likelihood}. It takes plain Categorical, Bernoulli and Gaussian likelihoods; "
            "backend='lapkit' takes every one."
        )
    make, factor = LOSSES[type(likelihood)]
    return make(reduction="sum"), factor


def _plain(likelihood: Likelihood) -> bool:
    """Whether no example or class counts otherwise than the others."""
    if isinstance(likelihood, Categorical):
        return likelihood.class_weights is None and not likelihood.label_smoothing
    return not isinstance(likelihood, Bernoulli) or (likelihood.pos_weight is None and likelihood.missing is None)


def check_targets(likelihood: Likelihood, y: Tensor, name: str) -> None:
    """Refuse missing targets.

    Raises:
        ValueError: if there are any.
    """
    missing = likelihood.ignore_index if isinstance(likelihood, Categorical) else None
    if missing is not None and (y == missing).any():
        raise ValueError(
            f"Some targets are missing (ignore_index={missing}), which {name} does not leave out everywhere. "
            "backend='lapkit' does."
        )
