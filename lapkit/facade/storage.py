"""A fit kept: as a dictionary, or as a file."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from lapkit.checkpoint import Checkpoint, write_state
from lapkit.facade.fitting import Fitting
from lapkit.subsets import Subset, places_among


class Storage(Fitting):
    """All but the network, in plain form."""

    def state_dict(self) -> dict[str, Any]:
        """All but the network, as tensors and plain values: fit, settings, hyper-parameters, and what the model was.

        Returns:
            `tensors` by name, sharing memory with what they are taken from, beside numbers, words, and lists and dicts
            of them, which `torch.load(weights_only=True)` reads as well.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
        """
        self.fitted  # noqa: B018 (an error before the fit)
        self._checked_engine()
        assert self._sums is not None
        return Checkpoint(self._settings(), self._weights, *self._sums).state(self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what another `Laplace` was when `state_dict` was called.

        Args:
            state: made by `state_dict`.

        Raises:
            ValueError: if the state is of another kind or version, the model is not the one that was fitted or was
                trained since, or functions that a setting holds (such as `forward_fn`) are not this object's own.
        """
        found = Checkpoint.of(state, self.model, self._settings())
        self._fit = None  # what was fitted is replaced, and with it the likelihood
        for name, value in found.settings.items():
            setattr(self, name, value)
        with torch.inference_mode(False):
            self._adopt(found.weights, found.sums, found.totals, self._likelihood_of_fit)

    def save(self, path: str | PathLike[str]) -> None:
        """Write `state_dict` to a safetensors file; the network's weights are not in it.

        With "gp", or "lowrank" in the space of functions, what the training examples were to the layers is.

        Args:
            path: the file.

        Raises:
            RuntimeError: before `fit`, or if the network's weights have changed since.
            FileNotFoundError: if there is no such folder.
        """
        write_state(path, self.state_dict())

    def _settings(self) -> dict[str, Any]:
        """What is stored of an object, by the names of its attributes; a mask as the weights that it has chosen."""
        subset = self.subset
        if self._subnetwork is not None:
            subset = Subset("subnetwork", places_among(self._subnetwork, self.model))
        return {
            "likelihood": self.likelihood,
            "_likelihood_of_fit": self._likelihood_of_fit,
            "columns": self.columns,
            "structure": self.structure,
            "prior": self.prior,
            "temperature": self.temperature,
            "subset": subset,
            "subset_of_weights": self.subset_of_weights,
            "subset_of_data": self.subset_of_data,
            "forward_fn": self.forward_fn,
            "output_axis": self.output_axis,
            "backend": self.backend,
        }
