"""What training with the evidence in the loop knows beside the network, and its checkpoints."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.laplace import Laplace

FORMAT = 1  # of checkpoints


@dataclass
class State:
    """All that a checkpoint holds beside weights, optimiser and schedule."""

    precision: Tensor
    noise: Tensor | None
    epoch: int = 0
    log_evidences: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: dict[str, Any] | None = None
    since_best: int = 0


def remember(state: State, la: Laplace, model: nn.Module) -> None:
    """Note the evidence; keep weights and hyper-parameters if it is the largest so far.

    Args:
        state: written to.
        la: fitted, with the hyper-parameters that were found.
        model: the network.
    """
    evidence = float(la.log_marginal_likelihood())
    state.precision = la.prior_precision.detach()
    state.noise = la.sigma_noise.detach() if state.noise is not None else None
    state.since_best += 1
    if not state.log_evidences or evidence > max(state.log_evidences):
        weights = copy.deepcopy(model.state_dict())
        state.best = {"weights": weights, "precision": state.precision, "noise": state.noise, "epoch": state.epoch}
        state.since_best = 0
    state.log_evidences.append(evidence)


def save(
    path: pathlib.Path, state: State, model: nn.Module, optimizer: Any, schedule: Any, kept: Mapping[str, Any]
) -> None:
    """Written beside and moved into place, so that an interruption leaves the last one whole.

    Args:
        path: the file.
        state: hyper-parameters and history.
        model: the network.
        optimizer: of its weights.
        schedule: of the optimiser's learning rate, or None.
        kept: others that have a state, by name.
    """
    content = {
        "format": FORMAT,
        "state": vars(state),
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": None if schedule is None else schedule.state_dict(),
        "kept": {name: value.state_dict() for name, value in kept.items()},
        "random": torch.get_rng_state(),
    }
    beside = path.with_name(f"{path.name}.part")
    torch.save(content, beside)
    beside.replace(path)


def restore(path: pathlib.Path, model: nn.Module, optimizer: Any, schedule: Any, kept: Mapping[str, Any]) -> State:
    """Everything as it was after the last epoch, torch's global random numbers included.

    Args:
        path: the file.
        model: the network, which is written to, as all that follows.
        optimizer: of its weights.
        schedule: of the optimiser's learning rate, or None.
        kept: others that have a state, by name.

    Returns:
        Hyper-parameters and history.

    Raises:
        ValueError: if the file is of another format or training.
    """
    found = torch.load(path, weights_only=True)
    if found.get("format") != FORMAT:
        raise ValueError(f"{path} is a checkpoint of format {found.get('format')}; this version reads {FORMAT}.")
    stored = found.get("kept", {})
    if stored.keys() != kept.keys():
        raise ValueError(f"{path} is the checkpoint of a training that keeps {list(stored)}, not {list(kept)}.")
    try:
        model.load_state_dict(found["weights"])
        optimizer.load_state_dict(found["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is the checkpoint of another network or optimiser ({error}).") from error
    if schedule is not None:
        schedule.load_state_dict(found["schedule"])
    for name, value in kept.items():
        value.load_state_dict(stored[name])
    torch.set_rng_state(found["random"])
    return State(**found["state"])
