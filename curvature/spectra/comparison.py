"""How far an approximate spectrum is from another: curvature along its eigenvectors, and its eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.curvature.products.estimators import Matrix
from lapkit.curvature.spectra.selection import Which
from lapkit.curvature.spectra.spectrum import Spectrum


def magnitude_error(spectrum: Spectrum, matrix: Matrix, which: Which = None, *, count: float = 1.0) -> float:
    """`mean_k |lambda_k - q_k| / |q_k|` with the Rayleigh quotients `q_k = e_k^T A e_k / count` of another matrix.

    Args:
        spectrum: whose eigenvalues and eigenvectors are compared; eigenvalues are of a mean over examples.
        matrix: A, over the same weights, such as `GGNProduct` over all the data or another spectrum.
        which: along how many leading eigenvectors, a slice or indices; all by default.
        count: the number of examples that A is a sum over, as products are; 1 for a mean.

    Returns:
        The relative error.

    Raises:
        ValueError: if the weights differ in number, the count is not positive, or A has no curvature along a direction.
        RuntimeError: if the model has changed.

    Reference:
        Dangel et al., ViViT, 2022, appendix B.5.
    """
    if not count > 0:
        raise ValueError(f"The number of examples is positive, got count={count}.")
    if matrix.size != spectrum.size:
        raise ValueError(f"Expected a matrix over {spectrum.size} weights, got one over {matrix.size}.")
    vectors = spectrum.eigenvectors(which).to(matrix.device, matrix.dtype)
    quotients = (vectors * matrix.matmul(vectors)).sum(0) / vectors.square().sum(0) / count
    if not (quotients != 0).all():
        raise ValueError("The matrix has no curvature along some of the directions: compare along fewer leading ones.")
    return 1 - eigenvalue_accuracy(spectrum.directions(which).eigenvalues, quotients)


def eigenvalue_accuracy(estimate: Tensor, exact: Tensor) -> float:
    """`1 - mean_k |estimate_k - exact_k| / |exact_k|`: one for the same eigenvalues.

    Args:
        estimate: `(k,)`.
        exact: `(k,)`, none of them zero.

    Returns:
        At most 1; negative where the errors are larger than the values.

    Raises:
        ValueError: if the shapes differ, or a value is zero.

    Reference:
        Dangel et al., ViViT, 2022, appendix B.1.
    """
    if estimate.shape != exact.shape or exact.ndim != 1 or not len(exact):
        raise ValueError(f"Expected as many estimates as values, got {tuple(estimate.shape)} and {tuple(exact.shape)}.")
    if not (exact != 0).all():
        raise ValueError("A relative error needs exact eigenvalues that are not zero; compare fewer leading ones.")
    estimate = estimate.to(exact.device, torch.float64)
    return float(1 - ((estimate - exact.double()) / exact.double()).abs().mean())
