"""The spectra of all groups of weights of one mini-batch, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from lapkit.curvature.parameters import Parameters
from lapkit.curvature.spectra import solutions
from lapkit.curvature.spectra.damping import Damping
from lapkit.curvature.spectra.decomposition import Block
from lapkit.curvature.spectra.factors import Factors
from lapkit.curvature.spectra.selection import Which
from lapkit.curvature.spectra.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class ViViT(Mapping[str, Spectrum]):
    """One spectrum for each group of weights: those of the blocks on the diagonal of the curvature.

    Args:
        spectra: by label.
        parameters: of all groups, in flat order.
        factors: what the curvature is made of.
    """

    spectra: Mapping[str, Spectrum]
    parameters: Parameters = field(repr=False)
    factors: Factors = field(repr=False)

    def __getitem__(self, label: str) -> Spectrum:
        return self.spectra[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self.spectra)

    def __getattr__(self, name: str) -> NoReturn:
        where = f" Those of the only group are analysis.spectrum.{name}, of several analysis[label].{name}."
        raise AttributeError(
            f"A ViViT, with a spectrum for each group of weights, has no attribute {name!r}."
            f"{where if name in dir(Spectrum) else ''}"
        )

    def __len__(self) -> int:
        return len(self.spectra)

    @property
    def spectrum(self) -> Spectrum:
        """That of the only group.

        Raises:
            ValueError: if there are several.
        """
        if len(self) != 1:
            raise ValueError(
                f"There are {len(self)} groups, {list(self)}: pick one, as in analysis[{next(iter(self))!r}]."
            )
        return next(iter(self.spectra.values()))

    @property
    def count(self) -> int:
        """The number of examples N."""
        return len(self.factors.batch)

    @property
    def curvature_count(self) -> int:
        """The number of examples with curvature, `N_c`."""
        return len(self.factors.index)

    def eigenvalues(self) -> Tensor:
        """Those of all blocks together, descending: the spectrum of the block-diagonal curvature."""
        return torch.cat([s.eigenvalues for s in self.values()]).sort(descending=True).values

    def newton_step(self, damping: Damping, which: Which = None, *, complement: float | None = None) -> Tensor:
        """`Spectrum.newton_step` of every block, side by side in flat order, `(P,)`.

        Raises:
            ValueError: if damping is not positive, or a block has no such eigenvalues or no gradients.
            RuntimeError: if the model has changed.
        """
        return self._joined(solutions.newton_steps(self.factors, self._blocks, damping, which, complement))

    def inverse_product(self, vectors: Tensor, damping: float) -> Tensor:
        """`(G + delta I)^{-1} v` with the block-diagonal G, of one vector `(P,)` or several `(P, R)`.

        Raises:
            ValueError: if the shape does not fit, or damping is not positive.
            RuntimeError: if the model has changed.
        """
        return self._solved(partial(solutions.inverse_products, damping=damping), vectors)

    def pseudo_inverse_product(self, vectors: Tensor) -> Tensor:
        """`G^+ v` with the block-diagonal G, of one vector `(P,)` or several `(P, R)`.

        Raises:
            ValueError: if the shape does not fit.
            RuntimeError: if the model has changed.
        """
        return self._solved(partial(solutions.pseudo_inverse_products, which=None), vectors)

    @property
    def _blocks(self) -> list[Block]:
        return [s.block for s in self.values()]

    def _solved(self, solve: solutions.Solve, vectors: Tensor) -> Tensor:
        like = next(iter(self.values()))
        columns = solutions.as_columns(self.parameters.numel, like.dtype, vectors)
        names = self.parameters.names
        rows = dict(zip(names, columns.split(list(self.parameters.sizes)), strict=True))
        parts = [torch.cat([rows[n] for n in block.parameters.names]) for block in self._blocks]
        found = self._joined(solve(self.factors, self._blocks, parts))
        return found[:, 0] if vectors.ndim == 1 else found

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Vectors of the blocks, `(P_b, ...)`, as vectors of all weights in flat order."""
        rows: dict[str, Tensor] = {}
        for block, part in zip(self._blocks, parts, strict=True):
            rows |= zip(block.parameters.names, part.split(list(block.parameters.sizes)), strict=True)
        return torch.cat([rows[name] for name in self.parameters.names])
