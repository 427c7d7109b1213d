"""From inner products to eigenpairs: those of the small Gram matrix are those of the curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.parameters import Parameters
from lapkit.curvature.spectra.directions import Directions
from lapkit.curvature.spectra.gram import GramSum
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
    """

    eigenvalues: Tensor
    coefficients: Tensor
    curvatures: Tensor
    gradients: Tensor | None
    trace: Tensor

    @classmethod
    def of(cls, gram: GramSum, examples: int, threshold: float | None) -> Decomposition:
        """That of a Gram matrix.

        Args:
            gram: `V^T V` and `V^T g_n`.
            examples: the number `N_c` of examples with curvature.
            threshold: smaller eigenvalues are left out; by default what rounding makes of zeros.

        Returns:
            The eigenpairs that are left.

        Reference:
            Dangel et al., ViViT, 2022, equations (4), (5) and (8).
        """
        values, vectors = torch.linalg.eigh(gram.matrix)
        values, vectors = values.flip(0), vectors.flip(1)
        if threshold is None:
            threshold = len(values) * torch.finfo(values.dtype).eps * float(values[0])
        rank = int((values >= threshold).logical_and(values > 0).sum())
        values = values[:rank].clone()
        coefficients = vectors[:, :rank] / values.sqrt()
        gradients = None if gram.gradients is None else gram.gradients.T @ coefficients
        coefficients = coefficients.unflatten(0, (-1, examples))
        # V_n^T V e~_k are rows of V^T (V e~_k) = lambda_k e~_k.
        curvatures = examples * values.square() * coefficients.square().sum(0)
        return cls(values, coefficients, curvatures, gradients, gram.matrix.diagonal().sum())


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
