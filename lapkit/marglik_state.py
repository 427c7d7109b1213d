"""What training with the evidence in the loop knows beside the network, and its checkpoints."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lapkit.laplace import Laplace

FORMAT = 2  # of checkpoints; the first did not keep the settings
SHOWN = 200  # characters of a setting that an error shows


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


# -- checkpoints


@dataclass(frozen=True, eq=False)
class CheckpointFile:
    """Where a training is kept, and what is: all that it changes, and the settings that it must go on with.

    Args:
        path: the file.
        model: the network.
        optimizer: of its weights.
        schedule: of the optimiser's learning rate, or None.
        kept: others that have a state, by name.
        settings: by name, as `plain` makes them.
    """

    path: pathlib.Path
    model: nn.Module
    optimizer: Any
    schedule: Any
    kept: Mapping[str, Any]
    settings: dict[str, Any]

    def save(self, state: State) -> None:
        """Written beside and moved into place, so that an interruption leaves the last one whole.

        Args:
            state: hyper-parameters and history.
        """
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "state": vars(state),
            "weights": self.model.state_dict(),
            "optimizer": _without_numpy(self.optimizer.state_dict()),
            "schedule": None if self.schedule is None else _without_numpy(self.schedule.state_dict()),
            "kept": {name: _without_numpy(value.state_dict()) for name, value in self.kept.items()},
            "random": torch.get_rng_state(),
        }
        beside = self.path.with_name(f"{self.path.name}.part")
        torch.save(content, beside)
        beside.replace(self.path)

    def restore(self) -> State:
        """Everything as it was after the last epoch, torch's global random numbers included.

        Returns:
            Hyper-parameters and history.

        Raises:
            ValueError: if the file is of another kind, format or training; nothing is changed then.
        """
        found = _read(self.path)
        self._check(found)
        try:
            self.model.load_state_dict(found["weights"])
            self.optimizer.load_state_dict(found["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} is the checkpoint of another network or optimiser ({error}).") from error
        if self.schedule is not None:
            self.schedule.load_state_dict(found["schedule"])
        for name, value in self.kept.items():
            value.load_state_dict(found["kept"][name])
        torch.set_rng_state(found["random"])
        return State(**found["state"])

    def _check(self, found: Mapping[str, Any]) -> None:
        """Refuse what another training has left, before anything is written to.

        Raises:
            ValueError: if network, settings or what is kept differ.
        """
        if found["kept"].keys() != self.kept.keys():
            raise ValueError(
                f"{self.path} is the checkpoint of a training that keeps {list(found['kept'])}, not {list(self.kept)}."
            )
        then, now = _forms(found["weights"]), _forms(self.model.state_dict())
        if odd := sorted(name for name in then | now if then.get(name) != now.get(name)):
            first = f"{odd[0]!r} is {now.get(odd[0], 'missing')} and was {then.get(odd[0], 'missing')}"
            raise ValueError(
                f"{self.path} is the checkpoint of another network: {first}, the first of {len(odd)} differences in "
                "its parameters and buffers. Build it in the same way, or give another path to begin anew."
            )
        given, stored = self.settings, found["settings"]
        if odd := sorted(name for name in given | stored if given.get(name) != stored.get(name)):
            told = "; ".join(f"{n}, given {_short(given.get(n))}, stored {_short(stored.get(n))}" for n in odd)
            raise ValueError(
                f"{self.path} is the checkpoint of another training: {told}. Give what is stored to go on with it, or "
                "another path to begin anew. Only n_epochs, patience, progress_bar and memory_budget may change."
            )


def checkpoint_path(given: str | pathlib.Path) -> pathlib.Path:
    """Where a checkpoint can be written.

    Raises:
        FileNotFoundError: if there is no such folder.
        IsADirectoryError: if it is a folder itself.
    """
    path = pathlib.Path(given)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} for the checkpoint {path.name!r}: make it first.")
    if path.is_dir():
        raise IsADirectoryError(f"The checkpoint is a file, and {path} is a folder: give a name in it.")
    return path


def _read(path: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint holds.

    Raises:
        ValueError: if the file is of another kind or format, or damaged.
        OSError: if it cannot be opened.
    """
    advice = "Give the path of a checkpoint, or one where there is no file yet to begin anew."
    try:
        found = torch.load(path, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of whatever type the bytes happen to lead to
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}"
        raise ValueError(
            f"{path}, of {path.stat().st_size} bytes, is no checkpoint of marglik_training, or a damaged one; it "
            f"cannot be read ({reason}). {advice}"
        ) from error
    form = found.get("format") if isinstance(found, dict) else None
    if not isinstance(form, int) or not {"state", "weights"} <= found.keys():
        inside = f" of {list(found)[:4]}" if isinstance(found, dict) else ""
        raise ValueError(
            f"{path} holds a {type(found).__name__}{inside}, which is no checkpoint of marglik_training. {advice}"
        )
    if form != FORMAT:
        raise ValueError(
            f"{path} is a checkpoint of format {form}; this version of lapkit reads format {FORMAT}, which keeps the "
            "settings of the training too. Go on with the version that has written it, or give another path to begin "
            "anew."
        )
    return found


def _without_numpy(state: Any) -> Any:
    """Numbers of numpy, such as a learning rate from `np.geomspace`, as Python's: others could not be read again."""
    if isinstance(state, np.generic):
        return state.item()
    if type(state) is dict:
        return {key: _without_numpy(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(_without_numpy, state))
    return state


def _forms(weights: Mapping[str, Any]) -> dict[str, str]:
    """Shape and type of parameters and buffers."""
    return {name: f"{tuple(t.shape)} {t.dtype}" for name, t in weights.items() if isinstance(t, Tensor)}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
