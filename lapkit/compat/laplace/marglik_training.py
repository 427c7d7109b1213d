"""The reference's training with the evidence, as a door to `lapkit.marglik`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from lapkit import marglik
from lapkit.compat.laplace.curvature import AsdlGGN, CurvatureInterface
from lapkit.compat.laplace.laplace import Laplace
from lapkit.compat.laplace.options import Batches, notice
from lapkit.compat.laplace.parametric import ParametricLaplace
from lapkit.compat.laplace.utils.enums import HessianStructure, Likelihood, PriorStructure, SubsetOfWeights


def marglik_training(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str = Likelihood.CLASSIFICATION,
    hessian_structure: str = HessianStructure.KRON,
    backend: type[CurvatureInterface] = AsdlGGN,
    optimizer_cls: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    optimizer_kwargs: dict[str, Any] | None = None,
    scheduler_cls: Callable[..., Any] | None = None,
    scheduler_kwargs: dict[str, Any] | None = None,
    n_epochs: int = 300,
    lr_hyp: float = 1e-1,
    prior_structure: str = PriorStructure.LAYERWISE,
    n_epochs_burnin: int = 0,
    n_hypersteps: int = 10,
    marglik_frequency: int = 1,
    prior_prec_init: float = 1.0,
    sigma_noise_init: float = 1.0,
    temperature: float = 1.0,
    fix_sigma_noise: bool = False,
    progress_bar: bool = False,
    enable_backprop: bool = False,
    dict_key_x: str = "input_ids",
    dict_key_y: str = "labels",
) -> tuple[ParametricLaplace, nn.Module, list[float], list[float]]:
    """Train weights by gradient descent, prior and noise by the evidence; see `lapkit.marglik.marglik_training`.

    Args:
        model: trained in place; it holds the best weights afterwards.
        train_loader: batches.
        likelihood: "classification" or "regression".
        hessian_structure: as for `Laplace`, over all weights.
        backend: GGN or EF.
        optimizer_cls: of the weights.
        optimizer_kwargs: for it; a weight decay is left out, since the prior is one.
        scheduler_cls: stepped after every epoch, in the reference after every batch.
        scheduler_kwargs: for it.
        n_epochs: at most.
        lr_hyp: not read: hyper-parameters move by L-BFGS, which has no learning rate.
        prior_structure: "scalar", "layerwise" or "diag".
        n_epochs_burnin: epochs before the first evidence.
        n_hypersteps: iterations of L-BFGS for each evidence.
        marglik_frequency: epochs between evidences.
        prior_prec_init: at the start.
        sigma_noise_init: at the start.
        temperature: of the likelihood.
        fix_sigma_noise: keep the noise.
        progress_bar: show one.
        enable_backprop: as for `Laplace`.
        dict_key_x: as for `Laplace`.
        dict_key_y: as for `Laplace`.

    Returns:
        The posterior at the best network; the network; negative log evidences, one for each evaluation; and negative
        log posteriors of each epoch, for one example, in nats.

    Raises:
        TypeError: if the data can be gone through only once.
    """
    marglik.check_repeatable(train_loader)  # before it is wrapped in what could be gone through again
    if lr_hyp != 0.1:
        notice("lr_hyp is not read: prior and noise are moved by L-BFGS, which has no learning rate.", stacklevel=3)
    settings = dict(optimizer_kwargs or {})
    if settings.pop("weight_decay", 0.0):
        notice("The prior is the weight decay here; weight_decay is left out.", stacklevel=3)
    la = Laplace(
        model,
        likelihood,
        SubsetOfWeights.ALL,
        hessian_structure,
        prior_precision=prior_prec_init,
        temperature=temperature,
        enable_backprop=enable_backprop,
        dict_key_x=dict_key_x,
        dict_key_y=dict_key_y,
        backend=backend,
    )
    found = marglik.marglik_training(
        model,
        Batches(train_loader, dict_key_y),
        la.likelihood.value,
        la.structure,
        optimizer=optimizer_cls,
        optimizer_options=settings,
        scheduler=scheduler_cls,
        scheduler_options=scheduler_kwargs,
        n_epochs=n_epochs,
        burn_in=n_epochs_burnin,
        frequency=marglik_frequency,
        prior_structure=PriorStructure(prior_structure).value,
        prior_precision=prior_prec_init,
        sigma_noise=sigma_noise_init,
        tune_noise=not fix_sigma_noise,
        temperature=temperature,
        n_hypersteps=n_hypersteps,
        progress_bar=progress_bar,
        curvature=la.options.columns,
    )
    la.laplace = found.laplace
    losses = [loss / found.laplace.fitted.count for loss in found.losses]
    return la, model, [-evidence for evidence in found.log_evidences], losses
