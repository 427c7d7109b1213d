"""The reference's constructor arguments: read in the order of each class, and said what has become of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from typing import Any

from torch import Tensor

from lapkit.compat.laplace.curvature import CurvatureInterface, GGNInterface
from lapkit.curvature import Columns
from lapkit.curvature.inputs import check_batches

PRIOR = ("sigma_noise", "prior_precision", "prior_mean", "temperature")
KEYS = ("dict_key_x", "dict_key_y")
BACKEND = ("backend", "backend_kwargs", "asdl_fisher_kwargs")


@dataclass(frozen=True, eq=False)
class Options:
    """What the constructors of the reference take beside model and likelihood, with its defaults."""

    sigma_noise: float | Tensor = 1.0
    prior_precision: float | Tensor = 1.0
    prior_mean: float | Tensor = 0.0
    temperature: float = 1.0
    enable_backprop: bool = False
    dict_key_x: str = "input_ids"
    dict_key_y: str = "labels"
    backend: type[CurvatureInterface] | None = None
    backend_kwargs: Mapping[str, Any] | None = None
    asdl_fisher_kwargs: Mapping[str, Any] | None = None
    damping: bool = False
    feature_reduction: str | None = None
    last_layer_name: str | None = None
    subnetwork_indices: Tensor | None = None
    n_subset: int | None = None
    independent_outputs: bool = False
    seed: int = 0

    @classmethod
    def read(cls, name: str, order: tuple[str, ...], args: tuple[Any, ...], named: Mapping[str, Any]) -> Options:
        """Bind arguments as a signature would.

        Args:
            name: of the class that is called.
            order: of its arguments after model and likelihood.
            args: by position.
            named: by name.

        Returns:
            All options.

        Raises:
            TypeError: if there are too many, one is unknown, or one is given twice.
        """
        given = dict(zip(order, args, strict=False))
        unknown, twice = sorted(set(named) - set(order)), sorted(set(named) & set(given))
        if len(args) > len(order) or unknown or twice:
            wrong = f"unknown: {unknown}; " * bool(unknown) + f"given twice: {twice}; " * bool(twice)
            raise TypeError(f"{name} takes model, likelihood, {', '.join(order)}. {wrong}{len(args)} by position.")
        return cls(**given, **named)

    def __post_init__(self) -> None:
        if self.damping:
            notice("damping=True has no effect in laplace-torch 0.3 either: the flag is lost there. It is ignored.")
        if self.feature_reduction is not None:
            notice("feature_reduction is not needed: the last layer is differentiated where the network applies it.")
        if self.asdl_fisher_kwargs and self.asdl_fisher_kwargs.get("kfac_approx", "expand") != "expand":
            raise ValueError(
                "kfac_approx='reduce' is a quantity of the engine, lapkit.curvature.GGNKronecker(..., "
                "setting='reduce'); the posterior takes 'expand'."
            )

    @property
    def columns(self) -> Columns:
        """Lapkit's name for backend and backend_kwargs.

        Raises:
            TypeError: if the backend is not one of `lapkit.compat.laplace.curvature`, or options are unknown.
        """
        backend = GGNInterface if self.backend is None else self.backend
        if not (isinstance(backend, type) and issubclass(backend, CurvatureInterface)):
            raise TypeError(
                f"The backend {backend!r} is none of lapkit.compat.laplace.curvature. Import it from there; lapkit has "
                "one engine, and a backend only says GGN or EF."
            )
        fisher = {k: v for k, v in (self.asdl_fisher_kwargs or {}).items() if k != "kfac_approx"}
        return backend.columns({**(self.backend_kwargs or {}), **fisher})


def notice(text: str, stacklevel: int = 6) -> None:
    """Warn of an argument that does nothing here, at the caller's line; Python shows it once for each line."""
    warnings.warn(text, UserWarning, stacklevel=stacklevel)


class Batches:
    """The batches of a loader as lapkit has them.

    The reference hands a mapping to the model whole, as its only argument, and reads the targets under a name of the
    user's choice; lapkit spreads mappings over arguments.

    Args:
        loader: batches `(inputs, targets)`, or mappings.
        dict_key_y: name of the targets in a mapping.
    """

    def __init__(self, loader: Iterable[Any], dict_key_y: str) -> None:
        check_batches(loader)
        self.loader, self.dict_key_y = loader, dict_key_y

    def __length_hint__(self) -> int:
        return length_hint(self.loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            if not isinstance(batch, Mapping):
                yield batch
            elif self.dict_key_y in batch:
                yield whole(batch), batch[self.dict_key_y]
            else:
                raise KeyError(f"No targets {self.dict_key_y!r} in a batch of {list(batch)}: give dict_key_y.")


def whole(x: Any) -> Any:
    """Inputs such that a mapping reaches the model as one argument."""
    return (x,) if isinstance(x, Mapping) else x
