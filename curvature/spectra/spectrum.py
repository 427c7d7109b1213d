"""The spectrum of one block of a mini-batch's curvature, its eigenvectors on demand, and what they are good for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, final

import torch
from torch import Generator, Tensor

from lapkit.curvature.parameters import Parameters
from lapkit.curvature.products.estimators import Estimate
from lapkit.curvature.products.matrix_free import MatrixFree
from lapkit.curvature.spectra import solutions
from lapkit.curvature.spectra.damping import Damping
from lapkit.curvature.spectra.decomposition import Block
from lapkit.curvature.spectra.directions import Directions
from lapkit.curvature.spectra.factors import Factors
from lapkit.curvature.spectra.overlap import eigenspace_overlap
from lapkit.curvature.spectra.passage import pulled
from lapkit.curvature.spectra.plots import plot_spectrum
from lapkit.curvature.spectra.selection import Which

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, eq=False)
class Spectrum(MatrixFree):
    """Eigenpairs of `G = V V^T`, the MEAN curvature of the examples with curvature, in one group of weights.

    Eigenvalues, gradients and curvatures along eigenvectors are there at once. Whatever has the length of the weights
    runs the model again, which must not have changed: a forward pass, and a backward pass for each vector. Nothing of
    the size of V is ever kept.

    It is a matrix, too: G, which is multiplied by through its columns, with small eigenvalues and all.

    Args:
        block: the group and its eigenpairs.
        factors: what V is made of.

    Reference:
        Dangel et al., ViViT, 2022.
    """

    block: Block = field(repr=False)
    factors: Factors = field(repr=False)

    def __repr__(self) -> str:
        """Name, size, the ends of the spectrum and what is missing from it."""
        ends = [f"{float(v):.4g}" for v in self.eigenvalues[[0, -1]]] if self.rank else ["none", "none"]
        missing = self.trace_left_out > torch.finfo(self.dtype).eps
        left = f"; {self.left_out} with {self.trace_left_out:.2g} of the trace left out" if missing else ""
        start = f"Spectrum({self.label!r}, {self.size} weights, {self.rank} eigenvalues"
        return f"{start} from {ends[0]} to {ends[1]}{left})"

    @property
    def label(self) -> str:
        """The group's."""
        return self.block.label

    @property
    def parameters(self) -> Parameters:
        """The group's weights, whose flat order vectors follow."""
        return self.block.parameters

    @property
    def eigenvalues(self) -> Tensor:
        """Those above the threshold, `(R,)`, descending; of the mean over examples, not the sum."""
        return self.block.decomposition.eigenvalues

    @property
    def rank(self) -> int:
        """Their number R."""
        return len(self.eigenvalues)

    @property
    def gram_trace(self) -> Tensor:
        """The trace of G, of eigenvalues below the threshold too."""
        return self.block.decomposition.trace

    @property
    def left_out(self) -> int:
        """How many of the `min(P, K N_c)` eigenvalues that need not be zero are below the threshold; zeros, too."""
        return min(self.size, self.block.decomposition.size) - self.rank

    @property
    def trace_left_out(self) -> float:
        """The share of the trace that they have, between 0 and 1."""
        total = float(self.gram_trace)
        return max(0.0, 1 - float(self.eigenvalues.double().sum()) / total) if total > 0 else 0.0

    @property
    def size(self) -> int:
        """The number of weights P."""
        return self.parameters.numel

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of vectors, float32 at least."""
        return self.eigenvalues.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.eigenvalues.device

    def trace(self, products: int = 48, *, generator: Generator | None = None) -> Estimate:
        """The exact trace of G, which takes no product."""
        return Estimate(self.gram_trace, torch.zeros_like(self.gram_trace), 0)

    def directions(self, which: Which = None) -> Directions:
        """Gradients and curvatures of single examples along eigenvectors.

        Args:
            which: how many leading ones, a slice or indices; all by default.

        Returns:
            Plain numbers.

        Raises:
            ValueError: if there are no such eigenvalues.
        """
        return self.block.directions(which)

    def eigenvectors(self, which: Which = None) -> Tensor:
        """Orthonormal `e_k = V e~_k / sqrt(lambda_k)` as columns `(P, k)`; e~_k are eigenvectors of the Gram matrix.

        Rounding leaves inner products of the order of `eps lambda_1 / sqrt(lambda_j lambda_k)`.

        Args:
            which: how many leading ones, a slice or indices; all by default.

        Returns:
            One column for each, in flat order; their signs have no meaning.

        Raises:
            ValueError: if there are no such eigenvalues.
            RuntimeError: if the model has changed.
        """
        count = len(self.block.chosen(which))
        weights = torch.eye(count, dtype=self.dtype, device=self.device)
        return pulled(self.factors, [self.block.combination(weights, which)])[0]

    def by_parameter(self, vectors: Tensor) -> dict[str, Tensor]:
        """Vectors of weights by parameter and in its shape.

        Args:
            vectors: `(P,)` or `(P, k)`.

        Returns:
            Views `(*shape)` or `(k, *shape)` by name.

        Raises:
            ValueError: if the vectors have another length.
        """
        return dict(self.parameters.split(vectors if vectors.ndim == 1 else vectors.mT))

    def gradient(self) -> Tensor:
        """The mean gradient of all examples, `(P,)`.

        Raises:
            ValueError: if the analysis was made without gradients.
            RuntimeError: if the model has changed.
        """
        return solutions.mean_gradients(self.factors, [self.block])[0]

    def coordinates(self, vectors: Tensor, which: Which = None) -> Tensor:
        """`e_k^T v` of one vector `(P,)`, giving `(k,)`, or several `(P, R)`, giving `(k, R)`.

        Raises:
            ValueError: if the shape does not fit, or there are no such eigenvalues.
            TypeError: if the vectors are of another type.
            RuntimeError: if the model has changed.
        """
        return self._solved(partial(solutions.coordinates, which=which), vectors)

    def newton_step(self, damping: Damping, which: Which = None, *, complement: float | None = None) -> Tensor:
        """`-sum_k gamma_k / (lambda_k + delta_k) e_k - g_rest / delta`, with one backward pass.

        g_rest is what the chosen eigenvectors leave of the mean gradient g. It is left out by default, as in ViViT. For
        all eigenvectors of the exact GGN of the same examples it is zero but for rounding in double precision only: in
        single precision the default threshold takes away small eigenvalues (`left_out`, `trace_left_out`) and what the
        gradient has along them, which matters where damping is not far above the threshold. `complement=damping` puts
        that back; a model in float64 has them all.

        Args:
            damping: one number, one for each direction, or a function of `Directions` that gives them, such as
                `NoiseAwareDamping`.
            which: along how many leading eigenvectors, a slice or indices; all by default.
            complement: the damping delta of the rest; None leaves the rest out.

        Returns:
            What is to be added to the weights, `(P,)`.

        Raises:
            TypeError: if damping is none.
            ValueError: if damping is not positive, or there are no such eigenvalues or no gradients, or no eigenvalue
                at all is above the threshold and the rest is not wanted.
            RuntimeError: if the model has changed.

        Reference:
            Dangel et al., ViViT, 2022, equation (S.10).
        """
        return solutions.newton_steps(self.factors, [self.block], damping, which, complement)[0]

    def inverse_product(self, vectors: Tensor, damping: float) -> Tensor:
        """`(G + delta I)^{-1} v` by Woodbury, of one vector `(P,)` or several `(P, R)`.

        Eigenvalues below the threshold count as zero.

        Raises:
            ValueError: if the shape does not fit, or damping is not positive.
            TypeError: if the vectors are of another type.
            RuntimeError: if the model has changed.
        """
        return self._solved(partial(solutions.inverse_products, damping=damping), vectors)

    def pseudo_inverse_product(self, vectors: Tensor, which: Which = None) -> Tensor:
        """`sum_k e_k e_k^T v / lambda_k` of one vector `(P,)` or several `(P, R)`.

        Raises:
            ValueError: if the shape does not fit, or there are no such eigenvalues, or none above the threshold.
            TypeError: if the vectors are of another type.
            RuntimeError: if the model has changed.
        """
        return self._solved(partial(solutions.pseudo_inverse_products, which=which), vectors)

    def overlap(self, other: Spectrum | Tensor, which: Which = None, other_which: Which = None) -> float:
        """How far eigenspaces coincide; see `lapkit.curvature.spectra.overlap.eigenspace_overlap`.

        Args:
            other: another spectrum over the same weights, or an orthonormal basis `(P, k)`, such as the Hessian's
                `largest_eigenpairs(...).vectors`.
            which: of which eigenvectors.
            other_which: of which of the other spectrum; as many leading ones, or the same, by default.

        Returns:
            1 for equal spaces, 0 for orthogonal ones.

        Raises:
            ValueError: if the weights differ in number, or bases are not orthonormal.
            RuntimeError: if a model has changed.
        """
        if isinstance(other, Spectrum):
            other = other.eigenvectors(which if other_which is None else other_which)
        return eigenspace_overlap(self.eigenvectors(which), other)

    def plot(self, ax: Axes | None = None, *, bins: int | None = None) -> Axes:
        """Draw the eigenvalues; see `lapkit.curvature.spectra.plots.plot_spectrum`."""
        return plot_spectrum({self.label: self}, ax, bins=bins)

    def _matmul(self, vectors: Tensor) -> Tensor:
        return solutions.products(self.factors, [self.block], [vectors])[0]

    def _solved(self, solve: solutions.Solve, vectors: Tensor) -> Tensor:
        """One result for one vector, columns for columns."""
        (found,) = solve(self.factors, [self.block], [solutions.as_columns(self.size, self.dtype, vectors)])
        return found[:, 0] if vectors.ndim == 1 else found
