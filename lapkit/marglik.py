"""Training with the evidence in the loop: weights by gradient descent, prior and noise by the marginal likelihood."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lapkit.curvature import Gaussian, Likelihood, Parameters
from lapkit.curvature.inputs import numbered, to_device, unpack
from lapkit.laplace import Laplace
from lapkit.marglik_settings import laplace_arguments, plain
from lapkit.marglik_state import CheckpointFile, State, checkpoint_path, remember
from lapkit.training import negative_log_posterior


@dataclass(repr=False)
class MarglikTraining:
    """The result of `marglik_training`.

    Args:
        laplace: fitted at the best network found, with the prior and noise of that moment.
        log_evidences: at every evaluation, in nats.
        losses: negative log posterior of each epoch, summed over examples, without the prior's constants, in nats.
        best_epoch: after which the best network was found, from 1.
        epochs: that were trained.
        stopped_early: whether the evidence had stopped rising.
    """

    laplace: Laplace
    log_evidences: list[float]
    losses: list[float]
    best_epoch: int
    epochs: int
    stopped_early: bool

    @property
    def model(self) -> nn.Module:
        """The network, with the best weights."""
        return self.laplace.model

    def __repr__(self) -> str:
        best, ended = max(self.log_evidences), "stopped early" if self.stopped_early else "not stopped"
        return (
            f"MarglikTraining(log evidence {best:.6g} after {self.best_epoch} of {self.epochs} epochs, {ended}; "
            f"{self.laplace!r})"
        )


def marglik_training(
    model: nn.Module,
    train_loader: Iterable[Any],
    likelihood: str | Likelihood = "classification",
    hessian_structure: str = "kron",
    *,
    subset_of_weights: str | Iterable[str] = "all",
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    optimizer_options: dict[str, Any] | None = None,
    scheduler: Callable[..., Any] | None = None,
    scheduler_options: dict[str, Any] | None = None,
    n_epochs: int = 300,
    burn_in: int = 0,
    frequency: int = 1,
    prior_structure: str = "layerwise",
    prior_precision: float | Tensor = 1.0,
    sigma_noise: float | Tensor = 1.0,
    tune_noise: bool = True,
    temperature: float = 1.0,
    n_hypersteps: int = 10,
    patience: int | None = None,
    n_data: int | None = None,
    checkpoint: str | pathlib.Path | None = None,
    progress_bar: bool = False,
    after_fit: Callable[[Laplace], None] | None = None,
    kept: Mapping[str, Any] | None = None,
    **laplace_options: Any,
) -> MarglikTraining:
    """Train a network while the evidence sets the prior precision and the noise: no validation set, no weight decay.

    The loss is `-(1/T) sum_n log p(y_n|f_n) + (w - m)^T diag(prior precision) (w - m) / 2`. After the burn-in, every
    `frequency` epochs, the curvature is summed over the data, prior and noise are moved towards the largest evidence,
    and the network of the largest evidence is remembered. Epochs run in train mode (dropout, batch statistics), the
    curvature is that of eval mode.

    Args:
        model: trained in place; afterwards it holds the best weights, in the mode it came in.
        train_loader: batches as for `Laplace.fit`, in a loader or a list; gone through twice an epoch.
        likelihood: as for `Laplace`.
        hessian_structure: as for `Laplace`.
        subset_of_weights: whose prior is tuned and counted in the evidence; other weights are trained without one.
        optimizer: class, of all trainable weights.
        optimizer_options: for it, such as `{"lr": 1e-3}`; `weight_decay` would be a second prior.
        scheduler: class of a learning-rate schedule, stepped every epoch.
        scheduler_options: for it.
        n_epochs: at most.
        burn_in: epochs before the first evidence.
        frequency: epochs between evidences.
        prior_structure: "scalar", "layerwise" (one precision for each parameter tensor), "unit" or "diag".
        prior_precision: at the start.
        sigma_noise: at the start, for "regression".
        tune_noise: tune the noise of a `Gaussian` likelihood too.
        temperature: T, of the likelihood.
        n_hypersteps: iterations of L-BFGS for prior and noise after each fit.
        patience: stop after so many evidences without a new largest one; never by default.
        n_data: number of examples, where the loader leaves some out at random; those of one pass by default.
        checkpoint: a file in which to keep the state after every epoch, and to go on from if it is there: with the same
            network, settings (functions by their names) and number of examples. `n_epochs`, `patience`, `progress_bar`
            and `memory_budget` may be others.
        progress_bar: show one.
        after_fit: called after each evidence with the posterior it is of; it may move what the network has frozen, such
            as the transform of `lapkit.invariance`.
        kept: what the checkpoint keeps beside: objects with `state_dict` and `load_state_dict`, such as an optimiser
            that `after_fit` uses, by name.
        laplace_options: more for `Laplace`, such as `rank`, `curvature`, `prior_mean` or `memory_budget`.

    Returns:
        The fitted posterior with the history. Its prior is the one that the best network was judged by.

    Raises:
        ValueError: if a number is out of range, the loss becomes NaN or infinite, a checkpoint is none or of another
            training, or `Laplace` refuses something.
        TypeError: if the data can be gone through only once, or `Laplace` refuses something.
        FileNotFoundError: if there is no folder for the checkpoint.
        IsADirectoryError: if the checkpoint is a folder itself.

    Reference:
        Immer, Bauer, Fortuin, Rätsch and Khan, Scalable marginal likelihood estimation for model selection in deep
        learning, 2021, algorithm 1.
    """
    if n_epochs < 1 or burn_in < 0 or frequency < 1 or n_hypersteps < 1 or (patience is not None and patience < 1):
        raise ValueError(
            "n_epochs, frequency, n_hypersteps and patience are at least 1 and burn_in at least 0, got "
            f"{n_epochs}, {frequency}, {n_hypersteps}, {patience} and {burn_in}."
        )
    if n_data is not None and n_data < 1:
        raise ValueError(f"n_data is the number of examples, got {n_data}.")
    if (optimizer_options or {}).get("weight_decay"):
        raise ValueError("weight_decay would be a second prior beside the one that is tuned: leave it out.")
    if burn_in + frequency > n_epochs:
        raise ValueError(f"With burn_in={burn_in} and frequency={frequency}, {n_epochs} epochs see no evidence.")
    check_repeatable(train_loader)
    path = None if checkpoint is None else checkpoint_path(checkpoint)
    subset = subset_of_weights if isinstance(subset_of_weights, str) else tuple(subset_of_weights)
    options = {"temperature": temperature, **laplace_options}

    def approximation(precision: float | Tensor, noise: Tensor | None) -> Laplace:
        made = Laplace(model, likelihood, subset, hessian_structure, prior_precision=precision, **options)
        if noise is not None:
            made.sigma_noise = noise
        return made

    at_start = {"sigma_noise": sigma_noise, "prior_precision": prior_precision, **options}
    start = Laplace(model, likelihood, subset, hessian_structure, **at_start)
    tuned_noise = tune_noise and isinstance(start.likelihood, Gaussian)
    noise = start.sigma_noise if isinstance(start.likelihood, Gaussian) else None
    state = State(torch.as_tensor(prior_precision), noise)
    parameters = start.select(train_loader)
    trainer = optimizer(Parameters.of(model).tensors, **(optimizer_options or {}))
    schedule = None if scheduler is None else scheduler(trainer, **(scheduler_options or {}))
    batches, examples, counted = _count(train_loader)
    file = None
    if path is not None:
        settings = laplace_arguments(likelihood, hessian_structure, **at_start) | {
            "subset_of_weights": subset if isinstance(subset, str) else parameters.names,
            "trainable parameters": Parameters.of(model).names,
            "optimizer": optimizer,
            "optimizer_options": optimizer_options or {},
            "scheduler": scheduler,
            "scheduler_options": scheduler_options or {},
            "burn_in": burn_in,
            "frequency": frequency,
            "prior_structure": prior_structure,
            "tune_noise": tuned_noise,
            "n_hypersteps": n_hypersteps,
            "n_data": n_data,
            "batches of the data": batches if n_data is None else None,  # else each pass may have others
            "examples of the data": examples if n_data is None else None,
            "after_fit": after_fit,
        }
        file = CheckpointFile(path, model, trainer, schedule, kept or {}, plain(settings))
        if path.exists():  # last, as loaders draw random numbers
            state = file.restore()
    mode = model.training
    bar = tqdm(total=n_epochs, initial=state.epoch, desc="marglik", disable=not progress_bar, leave=False)
    stopped = patience is not None and state.since_best >= patience
    try:
        while state.epoch < n_epochs and not stopped:
            la = approximation(state.precision, state.noise)
            state.losses.append(
                _epoch(model.train(), train_loader, la, parameters, trainer, batches, counted, n_data or counted)
            )
            if schedule is not None:
                schedule.step()
            state.epoch += 1
            if state.epoch > burn_in and (state.epoch - burn_in) % frequency == 0:
                la.model.eval()
                la.fit(train_loader)
                la.optimize_prior_precision(
                    prior_structure=prior_structure, tune_noise=tuned_noise, n_steps=n_hypersteps
                )
                remember(state, la, model)
                stopped = patience is not None and state.since_best >= patience
                if after_fit is not None:
                    after_fit(la)
            if file is not None:
                file.save(state)
            shown = {"log evidence": state.log_evidences[-1]} if state.log_evidences else {}
            bar.set_postfix(loss=state.losses[-1], **shown)
            bar.update()
    finally:
        bar.close()
        model.train(mode)
    assert state.best is not None  # the first evidence is a best one
    model.load_state_dict(state.best["weights"])
    la = approximation(state.best["precision"], state.best["noise"]).fit(train_loader)
    return MarglikTraining(la, state.log_evidences, state.losses, state.best["epoch"], state.epoch, stopped)


def _epoch(
    model: nn.Module,
    loader: Iterable[Any],
    la: Laplace,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    batches: int,
    counted: float,
    examples: float,
) -> float:
    """One pass of gradient descent on the negative log posterior, divided by the number of examples.

    Batches count by their size: each stands for `1 / batches` of the data, whatever it weighs.

    Raises:
        ValueError: if the loss becomes NaN or infinite.
    """
    terms = negative_log_posterior(
        model,
        parameters,
        la.likelihood,
        la.prior,
        la.temperature,
        forward_fn=la.forward_fn,
        output_axis=la.output_axis,
    )
    total = 0.0
    for number, batch in numbered(loader):
        x, y, weights = to_device(unpack(batch, number), parameters.device)
        misfit, complexity = terms(x, y, weights)
        objective = misfit * batches / counted + complexity / examples
        if not torch.isfinite(objective):
            raise ValueError(
                f"The training loss became {float(objective.detach())} in batch {number}: lower the learning rate, or "
                "check the data."
            )
        optimizer.zero_grad(set_to_none=True)
        objective.backward()
        optimizer.step()
        total += float((misfit + complexity / batches).detach())
    optimizer.zero_grad(set_to_none=True)
    return total


def check_repeatable(data: Iterable[Any]) -> None:
    """Refuse what can be gone through only once.

    Raises:
        TypeError: if the data is an iterator, such as a generator.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            f"The data is a {type(data).__name__}, which is used up after one pass, and training reads the data many "
            "times. Give a data loader or a list of batches, such as list(batches)."
        )


def _count(loader: Iterable[Any]) -> tuple[int, int, float]:
    """The number of batches of one pass, and of examples, and the sum of their weights.

    Raises:
        ValueError: if nothing is left to learn from.
    """
    batches, examples, total = 0, 0, 0.0
    for number, batch in numbered(loader):
        _, y, weights = unpack(batch, number)
        batches, examples = batches + 1, examples + len(y)
        total += len(y) if weights is None else float(weights.sum())
    if not total > 0:
        raise ValueError(f"The {batches} batches of the data hold {total:g} examples, counted by their weights.")
    return batches, examples, total
