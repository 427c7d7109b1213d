"""How far two eigenspaces coincide."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-3  # of the inner products of a basis that single precision may have rounded


def eigenspace_overlap(one: Tensor, other: Tensor) -> float:
    """`tr(P P') / sqrt(tr P tr P') = |U^T U'|_F^2 / sqrt(k k')` of the projections on two spaces, from 0 to 1.

    Args:
        one: an orthonormal basis U, `(P, k)`.
        other: another, `(P, k')`.

    Returns:
        1 for equal spaces, 0 for orthogonal ones.

    Raises:
        ValueError: if the shapes do not fit, or a basis is not orthonormal.

    Example:
        >>> import torch
        >>> eigenspace_overlap(torch.eye(4)[:, :2], torch.eye(4)[:, 1:3])
        0.5

    Reference:
        Dangel et al., ViViT, 2022, equation (9).
    """
    for basis in (one, other):
        _check_orthonormal(basis)
    if len(one) != len(other):
        raise ValueError(f"Expected bases over the same weights, got {len(one)} and {len(other)} of them.")
    inner = one.double().T @ other.to(one.device).double()
    return float(inner.square().sum() / (one.shape[1] * other.shape[1]) ** 0.5)


def _check_orthonormal(basis: Tensor) -> None:
    """Refuse what is no basis.

    Raises:
        ValueError: if it is none.
    """
    if basis.ndim != 2 or not 0 < basis.shape[1] <= len(basis):
        raise ValueError(f"Expected an orthonormal basis (P, k) of 1 to P columns, got shape {tuple(basis.shape)}.")
    inner = basis.double().T @ basis.double()
    error = float((inner - torch.eye(len(inner), dtype=inner.dtype, device=inner.device)).abs().max())
    if not error <= TOLERANCE:
        raise ValueError(
            f"The columns are not orthonormal (by {error:.1e}). Take fewer leading eigenvectors, a coarser threshold "
            "or float64, since small eigenvalues have few digits; or make them so by torch.linalg.qr."
        )
