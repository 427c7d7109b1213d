"""What a backend is, and the one that is lapkit's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, final

from torch import nn

from lapkit.curvature import Columns, Likelihood
from lapkit.curvature.accumulate import Totals
from lapkit.curvature.quantities.results import CurvatureSum
from lapkit.structures import Structure
from lapkit.subsets import Weights


class Backend(ABC):
    """A way to compute the curvature of a fit; predictions run on lapkit's engine whatever it is."""

    @abstractmethod
    def check(self, structure: Structure, likelihood: Likelihood, columns: Columns) -> None:
        """Refuse what it cannot compute, before data come.

        Raises:
            ValueError: if structure, likelihood or curvature are not offered.
            ImportError: if its library is not installed.
        """

    @abstractmethod
    def sum(
        self,
        structure: Structure,
        model: nn.Module,
        weights: Weights,
        likelihood: Likelihood,
        columns: Columns,
        data: Iterable[Any],
        **options: Any,
    ) -> tuple[CurvatureSum, Totals]:
        """Pass over the data; see `Structure.sum`."""


@final
class OwnEngine(Backend):
    """Lapkit's engine: every structure of every network."""

    def check(self, structure: Structure, likelihood: Likelihood, columns: Columns) -> None:
        """Nothing is refused."""

    def sum(
        self,
        structure: Structure,
        model: nn.Module,
        weights: Weights,
        likelihood: Likelihood,
        columns: Columns,
        data: Iterable[Any],
        **options: Any,
    ) -> tuple[CurvatureSum, Totals]:
        """See `Structure.sum`."""
        return structure.sum(model, weights, likelihood, columns, data, **options)
