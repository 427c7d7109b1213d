"""A fitted `Laplace` as plain tensors and values, which belong to one network and are refused by any other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.curvature import Columns, CurvatureSum, Likelihood, Parameters, Quantity, Result, Subnetwork
from lapkit.curvature.accumulate import Totals
from lapkit.curvature.parameters import unwrapped
from lapkit.curvature.quantities.packing import NotStorable, Packer, unpack
from lapkit.curvature.quantities.storage import read, write
from lapkit.posteriors import GaussianPrior
from lapkit.structures import Structure
from lapkit.subsets import Subset, Weights
from lapkit.version import __version__

FORMAT = "lapkit.laplace"
VERSION = 1
SHOWN = 4  # tensors that an error names
ROOTS = (Likelihood, Columns, GaussianPrior, Quantity, Structure, Subset)  # what settings are made of
SUMS = "sums/"  # what the names of the curvature's tensors begin with


@dataclass(frozen=True)
class Checkpoint:
    """What a fit leaves, and the settings that it was made with.

    Args:
        settings: by name.
        weights: the random ones.
        sums: of curvature.
        totals: of everything else.
    """

    settings: Mapping[str, Any]
    weights: Weights
    sums: CurvatureSum
    totals: Totals

    def state(self, model: nn.Module) -> dict[str, Any]:
        """Everything in plain form.

        Args:
            model: the fitted network, of which names, shapes, types and hashes are kept, but no weights.

        Returns:
            Numbers, words, and lists and dicts of them, and `tensors` by name.
        """
        of_sums, rest = self.sums.state()
        weights = self.weights
        whole, places = (weights.whole, weights.places) if isinstance(weights, Subnetwork) else (weights, None)
        others = Packer(ROOTS)
        return {
            "format": FORMAT,
            "version": VERSION,
            "lapkit": __version__,
            "model": _described(model),
            "settings": {name: _packed(value, others, name) for name, value in self.settings.items()},
            "names": list(whole.names),
            "places": others.pack(places, "places"),
            "sums": rest,
            "totals": others.pack(vars(self.totals), "totals"),
            "tensors": others.tensors | {f"{SUMS}{key}": t for key, t in of_sums.items()},
        }

    @staticmethod
    def of(state: Mapping[str, Any], model: nn.Module, given: Mapping[str, Any]) -> Checkpoint:
        """The inverse of `state`, beside the network.

        Args:
            state: in plain form.
            model: the network that was fitted, with the weights and buffers of that time, on any device.
            given: settings, for those that hold functions, which are not stored.

        Returns:
            The checkpoint, on the device of the network.

        Raises:
            TypeError: if the model is no module.
            ValueError: if the state is of another kind or version, the network is another one or was trained since, or
                a setting that holds functions is not given.
        """
        _check_format(state)
        check_model(state["model"], model)
        owned = dict(unwrapped(model).named_parameters())
        whole = Parameters(tuple(state["names"]), tuple(owned[name] for name in state["names"]))
        tensors = {key: t.to(whole.device) for key, t in state["tensors"].items()}
        of_sums = {key.removeprefix(SUMS): t for key, t in tensors.items() if key.startswith(SUMS)}
        sums, places = Result.from_state(of_sums, state["sums"]), unpack(state["places"], tensors, ROOTS)
        if not isinstance(sums, CurvatureSum):
            raise ValueError(f"The sums are a {type(sums).__name__}, which is no curvature.")
        return Checkpoint(
            settings={k: _unpacked(k, v, tensors, given) for k, v in state["settings"].items()},
            weights=whole if places is None else Subnetwork(whole, places),
            sums=sums,
            totals=Totals(**unpack(state["totals"], tensors, ROOTS)),
        )


def write_state(path: str | PathLike[str], state: Mapping[str, Any]) -> None:
    """Put a state into a safetensors file.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    rest = {key: value for key, value in state.items() if key != "tensors"}
    write(path, state["tensors"], rest, FORMAT)


def read_state(path: str | PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """A state out of a file.

    Args:
        path: the file.
        device: where the tensors go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file of a `Laplace`.
    """
    tensors, rest = read(path, device, FORMAT)
    return {**rest, "tensors": tensors}


def _check_format(state: Mapping[str, Any]) -> None:
    """Refuse what this version cannot read.

    Raises:
        ValueError: if the state is of another kind or version.
    """
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise ValueError(
            f"Expected a state of format {FORMAT!r} and version {VERSION}, as state_dict() and save() make it; got "
            f"{state.get('format')!r}, version {state.get('version')}, by lapkit {state.get('lapkit')}."
        )


def _packed(value: Any, packer: Packer, name: str) -> Any:
    """A setting; one that holds functions, by the name of its class."""
    try:
        return packer.pack(value, f"settings/{name}")
    except NotStorable:
        return {"given": type(value).__name__}


def _unpacked(name: str, packed: Any, tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> Any:
    """A setting, from the file or as it was given.

    Raises:
        ValueError: if it is in neither.
    """
    if not (isinstance(packed, Mapping) and "given" in packed):
        return unpack(packed, tensors, ROOTS)
    value = given.get(name)
    if type(value).__name__ != packed["given"]:
        raise ValueError(
            f"The {name} was a {packed['given']}, which holds functions and is not stored; got "
            f"{type(value).__name__}. Give it again: Laplace.load(path, model, ...) takes what the constructor takes."
        )
    return value


# -- the network


def _described(model: nn.Module) -> list[list[Any]]:
    """Name, shape, type and hash of each parameter and buffer."""
    inner = unwrapped(model)
    named = [*inner.named_parameters(), *inner.named_buffers()]
    return [[name, list(t.shape), str(t.dtype).removeprefix("torch."), _digest(t)] for name, t in named]


def _digest(t: Tensor) -> str:
    """Of all bits in their order, which does not depend on the device."""
    real = torch.view_as_real(t.detach()) if t.is_complex() else t.detach()
    return hashlib.sha1(real.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def check_model(stored: list[list[Any]], model: nn.Module) -> None:
    """Refuse a network that is not the one that was fitted, with the weights and buffers that it had then.

    Args:
        stored: name, shape, type and hash of each parameter and buffer.
        model: the network.

    Raises:
        TypeError: if it is no module.
        ValueError: if a name, a shape, a type or a value differs.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected the torch.nn.Module that was fitted, got {type(model).__name__}.")
    then, now = ({name: rest for name, *rest in rows} for rows in (stored, _described(model)))
    differences = ((then.keys() - now.keys(), "missing"), (now.keys() - then.keys(), "new"))
    if odd := [f"{_few(sorted(names))} {verb}" for names, verb in differences if names]:
        raise ValueError(
            f"The model is not the one that was fitted, which had other parameters or buffers: {', '.join(odd)}. Build "
            "it in the same way."
        )
    for place, what in enumerate(("shape", "type")):
        differ = [n for n in then if then[n][place] != now[n][place]]
        if differ:
            first = differ[0]
            raise ValueError(
                f"The model is not the one that was fitted: {first!r} has the {what} {now[first][place]}, it had "
                f"{then[first][place]}. Build it in the same way."
            )
    differ = [n for n in then if then[n] != now[n]]
    if differ:
        raise ValueError(
            f"The model's weights or buffers are not those that were fitted: {_few(differ)}. Load the state_dict that "
            "it had then into it first, or fit again."
        )


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:SHOWN])) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
