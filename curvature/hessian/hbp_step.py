"""The Newton-style step of Hessian backpropagation: one damped linear system for each block, by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lapkit.curvature.hessian.hbp_blocks import CurvatureBlocks
from lapkit.curvature.hessian.hbp_products import BlockProducts


@dataclass(frozen=True, eq=False)
class Solution:
    """What conjugate gradients found.

    Args:
        vector: the solution, `(P,)`.
        residuals: `|b - A x| / |b|` of each block.
        iterations: how many steps each block took.
    """

    vector: Tensor
    residuals: Tensor
    iterations: Tensor


def newton_step(
    curvature: CurvatureBlocks | BlockProducts,
    gradient: Tensor,
    *,
    damping: float,
    tolerance: float = 0.1,
    max_iterations: int = 50,
) -> Solution:
    """Solve `[alpha I + (1 - alpha) C / N] step = -gradient` for each block of a curvature C by itself.

    Args:
        curvature: blocks or their products, summed over N examples; of a positive mode, since conjugate gradients need
            a positive definite matrix.
        gradient: of the mean loss, `(P,)` in flat order.
        damping: alpha, between 0 and 1.
        tolerance: stop a block when its residual is this small relative to its gradient.
        max_iterations: stop a block after so many steps.

    Returns:
        The step, to be multiplied by a learning rate and added to the weights.

    Raises:
        ValueError: if the damping is out of range, or the gradient has a wrong shape.
        RuntimeError: if a block turns out not to be positive definite.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, eq. (4.10).
    """
    if not 0 <= damping <= 1:
        raise ValueError(f"The damping is a weight between 0 and 1, got {damping}.")

    def matmul(vector: Tensor) -> Tensor:
        return damping * vector + (1 - damping) / curvature.count * curvature.matmul(vector)

    return conjugate_gradients(matmul, -gradient, curvature.sizes, tolerance=tolerance, max_iterations=max_iterations)


def conjugate_gradients(
    matmul: Callable[[Tensor], Tensor],
    right: Tensor,
    sizes: Sequence[int],
    *,
    tolerance: float,
    max_iterations: int,
) -> Solution:
    """Solve `A_l x_l = b_l` for every block of a block-diagonal matrix at the same time.

    One product with the whole matrix serves a step of all blocks, each of which has its own step lengths and stops on
    its own.

    Args:
        matmul: `v -> A v`, `(P,) -> (P,)`, symmetric positive definite.
        right: b, `(P,)`.
        sizes: of the blocks.
        tolerance: relative residual at which a block stops.
        max_iterations: steps after which it stops.

    Returns:
        The solution.

    Raises:
        ValueError: if the sizes do not add up to that of b.
        RuntimeError: if a block turns out not to be positive definite.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([2.0, 4.0]), torch.tensor([2.0, 8.0])
        >>> conjugate_gradients(lambda v: a * v, b, [1, 1], tolerance=1e-6, max_iterations=5).vector
        tensor([1., 2.])
    """
    if right.shape != (sum(sizes),):
        raise ValueError(f"Expected a vector ({sum(sizes)},) for blocks of {list(sizes)}, got {tuple(right.shape)}.")
    owner = torch.repeat_interleave(torch.tensor(sizes, device=right.device))

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return right.new_zeros(len(sizes)).index_add_(0, owner, a * b)

    x, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), inner(right, right)
    goal, steps = tolerance**2 * square, torch.zeros_like(square, dtype=torch.long)
    for _ in range(max_iterations):
        active = square > goal
        if not active.any():
            break
        product = matmul(direction * active[owner])
        curvature = inner(direction, product)
        if (curvature[active] <= 0).any():
            raise RuntimeError(
                f"Block {int((active & (curvature <= 0)).nonzero()[0])} is not positive definite, so conjugate "
                "gradients do not apply. Use a positive mode ('pch-abs', 'pch-clip', 'ggn') and some damping."
            )
        length = torch.where(active, square / curvature, 0)
        x = x + length[owner] * direction
        residual = residual - length[owner] * product
        new = torch.where(active, inner(residual, residual), square)
        direction = torch.where(active[owner], residual + torch.where(active, new / square, 0)[owner] * direction, 0)
        square, steps = new, steps + active
    return Solution(x, (square / inner(right, right).clamp_min(torch.finfo(right.dtype).tiny)).sqrt(), steps)
