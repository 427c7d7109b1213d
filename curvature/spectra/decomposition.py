"""From inner products to eigenpairs: those of the small Gram matrix are those of the curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.parameters import Parameters
from lapkit.curvature.spectra.directions import Directions
from lapkit.curvature.spectra.gram import GramSum, WrittenOut
from lapkit.curvature.spectra.passage import Combination
from lapkit.curvature.spectra.selection import EVERYTHING, Which, chosen


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The eigenpairs of `G = V V^T` with eigenvalues above a threshold, by what `V` is multiplied by.

    Args:
        eigenvalues: `(R,)`, descending.
        coefficients: `e~_k / sqrt(lambda_k)`, `(K, N_c, R)`: eigenvectors are `e_k = V c_k`.
        curvatures: `lambda_nk`, `(N_c, R)`.
        gradients: `gamma_nk`, `(N, R)`, or None.
        trace: of G.
        size: how many eigenvalues were looked at.
        threshold: below which they were left out.
    """

    eigenvalues: Tensor
    coefficients: Tensor
    curvatures: Tensor
    gradients: Tensor | None
    trace: Tensor
    size: int
    threshold: float

    @classmethod
    def of(cls, sums: GramSum | WrittenOut, examples: int, threshold: float | None) -> Decomposition:
        """That of a Gram matrix, or of V.

        Args:
            sums: `V^T V` and `V^T g_n`, or V and g_n.
            examples: the number `N_c` of examples with curvature.
            threshold: smaller eigenvalues are left out; by default what rounding makes of zeros, see `noise`.

        Returns:
            The eigenpairs that are left.

        Reference:
            Dangel et al., ViViT, 2022, equations (4), (5) and (8).
        """
        given = sums.matrix if isinstance(sums, GramSum) else sums.columns
        precise = given.to(_precise(given))
        matrix = precise if isinstance(sums, GramSum) else precise.T @ precise
        values, vectors = (found.flip(-1) for found in torch.linalg.eigh(matrix))
        if threshold is None:
            threshold = noise(given.dtype, matrix) * float(values[0])
        rank = int((values >= threshold).logical_and(values > 0).sum())
        values, vectors = values[:rank], vectors[:, :rank]
        if isinstance(sums, GramSum):
            coefficients = (vectors / values.sqrt()).to(given)
            gradients = None if sums.gradients is None else sums.gradients.T @ coefficients
        else:  # `c_k = V^T e_k / lambda_k`
            coefficients = (precise @ vectors / values).to(given)
            gradients = None if sums.gradients is None else sums.gradients @ vectors.to(given)
        values, trace = values.to(given, copy=True), matrix.diagonal().sum().to(given)
        coefficients = coefficients.unflatten(0, (-1, examples))
        # V_n^T V e~_k are rows of V^T (V e~_k) = lambda_k e~_k.
        curvatures = examples * values.square() * coefficients.square().sum(0)
        return cls(values, coefficients, curvatures, gradients, trace, len(matrix), threshold)


def noise(kept: torch.dtype, matrix: Tensor) -> float:
    """Bound on what rounding makes of a zero eigenvalue, in units of the largest.

    Measured on matrices of deficient rank with up to 2000 rows, sums of the type in which they were kept leave 0.6 of
    its eps, and the decomposition a third of `sqrt(size)` eps of the matrix that it is done on. In double precision
    zeros of a float32 Gram matrix are smaller by a factor of ten than those that a float32 decomposition leaves.
    """
    return 4 * torch.finfo(kept).eps + len(matrix) ** 0.5 * torch.finfo(matrix.dtype).eps


def _precise(given: Tensor) -> torch.dtype:
    """The type to decompose a matrix in: double, where the device has it."""
    return given.dtype if given.device.type == "mps" else torch.float64


@dataclass(frozen=True, eq=False)
class Block:
    """One group of weights and the eigenpairs of its part of G.

    Args:
        label: the group's.
        parameters: its weights.
        decomposition: the eigenpairs.
    """

    label: str
    parameters: Parameters
    decomposition: Decomposition

    def chosen(self, which: Which) -> Tensor:
        """Indices of eigenpairs.

        Raises:
            TypeError: if they are given in another form.
            ValueError: if there are no such eigenpairs.
        """
        where = "" if self.label == EVERYTHING else f" of the group {self.label!r}"
        values = self.decomposition.eigenvalues
        return chosen(which, len(values), f"eigenvalues above the threshold{where}").to(values.device)

    def directions(self, which: Which) -> Directions:
        """What is known along some eigenvectors."""
        index, found = self.chosen(which), self.decomposition
        gradients = None if found.gradients is None else found.gradients[:, index]
        return Directions(found.eigenvalues[index], found.curvatures[:, index], gradients)

    def combination(self, weights: Tensor, which: Which = None) -> Combination:
        """`sum_k w_kr e_k`, from `(k, R)`, to be made of the columns."""
        return Combination(self.parameters, self.decomposition.coefficients[..., self.chosen(which)] @ weights)

    def coordinates(self, inner: Tensor, which: Which = None) -> Tensor:
        """`e_k^T v`, `(k, R)`, from `V^T v`, `(K, N_c, R)`."""
        return torch.einsum("cnk,cnr->kr", self.decomposition.coefficients[..., self.chosen(which)], inner)
