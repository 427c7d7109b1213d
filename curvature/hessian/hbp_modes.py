"""Which curvature is propagated: what becomes of the second derivatives of the modules themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mode:
    """A choice of residual, the term `sum_k (nabla^2 z_k) delta_k` of each module.

    Args:
        name: how it is asked for.
        change: what is done to the residual's eigenvalues; None drops the residual.
        positive: whether the curvature is positive semi-definite, so that it starts from the likelihood's own root of
            the loss Hessian, `S S^T`, and not from second derivatives of the loss.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, section 4.3.1.
    """

    name: str
    change: Callable[[Tensor], Tensor] | None
    positive: bool = True

    def matrix(self, residual: Tensor) -> Tensor:
        """The change on symmetric matrices `(*, h, h)`: diagonal for diagonal ones."""
        assert self.change is not None  # a dropped residual is never computed
        if not self.positive:
            return residual
        values, vectors = torch.linalg.eigh((residual + residual.mT) / 2)
        return (vectors * self.change(values)[..., None, :]) @ vectors.mT

    def diagonal(self, residual: Tensor) -> Tensor:
        """The change on the entries of diagonal matrices."""
        assert self.change is not None
        return self.change(residual)


def _as_is(values: Tensor) -> Tensor:
    return values


def _clip(values: Tensor) -> Tensor:
    return values.clamp_min(0)


MODES = {
    mode.name: mode
    for mode in (
        Mode("hessian", _as_is, positive=False),
        Mode("ggn", None),
        Mode("pch-abs", torch.abs),
        Mode("pch-clip", _clip),
    )
}


def mode_of(name: str) -> Mode:
    """The mode of a name.

    Raises:
        ValueError: if there is none.
    """
    if name not in MODES:
        raise ValueError(f"Unknown mode {name!r}; choose one of {sorted(MODES)}.")
    return MODES[name]
