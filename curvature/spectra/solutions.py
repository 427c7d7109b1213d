"""Steps and products with inverses of the curvature, for several blocks of weights in shared passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lapkit.curvature.spectra.damping import Damping, positive, resolved
from lapkit.curvature.spectra.decomposition import Block
from lapkit.curvature.spectra.factors import Factors
from lapkit.curvature.spectra.passage import Combination, pulled, pushed
from lapkit.curvature.spectra.selection import Which

Solve = Callable[[Factors, Sequence[Block], Sequence[Tensor]], list[Tensor]]  # of vectors (P, R) for each block


def as_columns(size: int, dtype: torch.dtype, vectors: Tensor) -> Tensor:
    """Vectors as `(P, R)`.

    Raises:
        ValueError: if the shape does not fit.
        TypeError: if the floating type is another.
    """
    if vectors.ndim not in (1, 2) or len(vectors) != size:
        raise ValueError(
            f"Expected a vector ({size},) or several as columns ({size}, R), got shape {tuple(vectors.shape)}."
        )
    if vectors.dtype != dtype:
        raise TypeError(f"Expected vectors of type {dtype}, got {vectors.dtype}: convert them with .to().")
    return vectors.detach().reshape(len(vectors), -1)


def _check_any(blocks: Sequence[Block]) -> None:
    """Refuse to give zeros where everything was left out.

    Raises:
        ValueError: if no eigenvalue of any block is above the threshold.
    """
    if not any(len(block.decomposition.eigenvalues) for block in blocks):
        threshold, trace = blocks[0].decomposition.threshold, sum(float(b.decomposition.trace) for b in blocks)
        raise ValueError(
            f"No eigenvalue is above the threshold of {threshold:.3g}, so that this would be zero; the curvature has "
            f"the trace {trace:.3g}. Call vivit with a smaller threshold=, or ask for a step with complement=."
        )


def mean_gradients(factors: Factors, blocks: Sequence[Block]) -> list[Tensor]:
    """`g = mean_n g_n`, `(P,)` for each block.

    Raises:
        ValueError: if gradients were not wanted.
        RuntimeError: if the model has changed.
    """
    count = len(factors.batch)
    for block in blocks:
        block.directions(None).each_gradient  # noqa: B018 (refuses where there are none)
    nothing = factors.columns.new_zeros(*factors.columns.shape[:2], 1)
    mean = factors.columns.new_full((count, 1), 1 / count)
    return [v[:, 0] for v in pulled(factors, [Combination(b.parameters, nothing, mean) for b in blocks])]


def newton_steps(
    factors: Factors, blocks: Sequence[Block], damping: Damping, which: Which, complement: float | None
) -> list[Tensor]:
    """`-sum_k gamma_k / (lambda_k + delta_k) e_k`, and `-g_rest / delta` where the rest is wanted, `(P,)` each.

    Raises:
        TypeError: if damping is none.
        ValueError: if damping is not positive, or there are no such eigenvalues or no gradients, or no eigenvalue at
            all is above the threshold and the rest is not wanted.
        RuntimeError: if the model has changed.

    Reference:
        Dangel et al., ViViT, 2022, equation (S.10).
    """
    if complement is None:
        _check_any(blocks)
    count, combinations = len(factors.batch), []
    for block in blocks:
        directions = block.directions(which)
        weights = -directions.gradient / (directions.eigenvalues + resolved(damping, directions))
        rest = None
        if complement is not None:
            weights = weights + directions.gradient / positive(complement)
            rest = weights.new_full((count, 1), -1 / (count * positive(complement)))
        combinations.append(replace(block.combination(weights[:, None], which), gradients=rest))
    return [v[:, 0] for v in pulled(factors, combinations)]


def products(factors: Factors, blocks: Sequence[Block], vectors: Sequence[Tensor]) -> list[Tensor]:
    """`V V^T v`."""
    inner = pushed(factors, [b.parameters for b in blocks], vectors)
    return pulled(factors, [Combination(b.parameters, i) for b, i in zip(blocks, inner, strict=True)])


def coordinates(factors: Factors, blocks: Sequence[Block], vectors: Sequence[Tensor], which: Which) -> list[Tensor]:
    """`e_k^T v`, `(k, R)`."""
    inner = pushed(factors, [b.parameters for b in blocks], vectors)
    return [b.coordinates(i, which) for b, i in zip(blocks, inner, strict=True)]


def inverse_products(
    factors: Factors, blocks: Sequence[Block], vectors: Sequence[Tensor], damping: float
) -> list[Tensor]:
    """`(G + delta I)^{-1} v = (v - sum_k lambda_k / (lambda_k + delta) e_k e_k^T v) / delta`.

    Raises:
        ValueError: if damping is not positive.
        RuntimeError: if the model has changed.

    Reference:
        Dangel et al., ViViT, 2022, equation (S.15), where `(delta I + V^T V)^{-1}` is applied.
    """
    delta, combinations = positive(damping), []
    for block, found in zip(blocks, coordinates(factors, blocks, vectors, None), strict=True):
        values = block.decomposition.eigenvalues[:, None]
        combinations.append(block.combination(-values / (values + delta) * found))
    return [(v + inside) / delta for v, inside in zip(vectors, pulled(factors, combinations), strict=True)]


def pseudo_inverse_products(
    factors: Factors, blocks: Sequence[Block], vectors: Sequence[Tensor], which: Which
) -> list[Tensor]:
    """`sum_k e_k e_k^T v / lambda_k`.

    Raises:
        ValueError: if no eigenvalue is above the threshold, or there are none such as asked for.
        RuntimeError: if the model has changed.
    """
    _check_any(blocks)
    combinations = []
    for block, found in zip(blocks, coordinates(factors, blocks, vectors, which), strict=True):
        values = block.decomposition.eigenvalues[block.chosen(which), None]
        combinations.append(block.combination(found / values, which))
    return pulled(factors, combinations)
