"""From the Hessian at a module's output to that of its weights, `J_w^T H_z J_w + sum_k (nabla^2_w z_k) delta_k`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lapkit.curvature.hessian.hbp_modes import Mode
from lapkit.curvature.hessian.hbp_propagation import ActivationHessian, ModuleLink
from lapkit.curvature.hessian.hbp_residuals import weight_hessian
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.memory import chunk_length


def weight_product(link: ModuleLink, name: str, top: ActivationHessian) -> Callable[[Tensor], Tensor]:
    """The block of one parameter by its products, summed over the examples of the link.

    Args:
        link: the module.
        name: the parameter's name in the model.
        top: the Hessian at the module's output.

    Returns:
        A function of vectors `(K, P) -> (K, P)`.

    Raises:
        ValueError: if the module is not linear in the parameter and the mode is a positive-curvature Hessian.
    """
    derivatives, local = link.derivatives, link.weights[name]
    shape = derivatives.values[local].shape
    bend = None if link.mode.change is None else weight_hessian(derivatives, local)
    if bend is not None:
        check_linear_in_weight(link.mode, link, name)

    def product(vectors: Tensor) -> Tensor:
        boxed = vectors.reshape(len(vectors), *shape)
        out = derivatives.pull_weight(local, top.matmul(derivatives.push_weight(local, boxed)))
        if bend is not None:
            out = out + derivatives.each(bend, boxed)
        return out.reshape(len(vectors), -1)

    return product


def check_linear_in_weight(mode: Mode, link: ModuleLink, name: str) -> None:
    """Refuse what is not defined.

    Raises:
        ValueError: if the mode is a positive-curvature Hessian.
    """
    if mode.positive:
        raise ValueError(
            f"The output of {type(link.derivatives.module).__name__} is not linear in its parameter {name!r}, and how "
            f"mode={mode.name!r} would make its second derivative positive is not defined. Write the module as a chain "
            "of simpler ones (nn.Sequential, lapkit.curvature.Residual), or use mode='hessian' or 'ggn'."
        )


def weight_block(product: Callable[[Tensor], Tensor], like: Tensor, part: slice, step: int) -> Tensor:
    """The rows and columns `part` of a matrix `(P, P)` known by its products.

    Args:
        product: of vectors `(K, P)`.
        like: the parameter.
        part: a range of flat positions.
        step: how many rows at a time.

    Returns:
        The symmetric matrix `(p, p)`.
    """
    size = part.stop - part.start
    block = like.new_empty(size, size)
    for start in range(0, size, step):
        rows = torch.arange(start, min(start + step, size), device=like.device)
        unit = like.new_zeros(len(rows), like.numel())
        unit[rows - start, part.start + rows] = 1
        block[rows] = product(unit)[:, part]
    return (block + block.T) / 2


def link_blocks(
    link: ModuleLink, top: ActivationHessian, parts: Mapping[str, Sequence[slice]], budget: int
) -> dict[str, list[Tensor]]:
    """The blocks of all weights of a module, summed over its examples.

    Args:
        link: the module at a batch.
        top: the Hessian at its output.
        parts: how each parameter is cut.
        budget: bytes that intermediates may take.

    Returns:
        Blocks by the parameter's name in the model.
    """
    found = {}
    for name, local in link.weights.items():
        product, like = weight_product(link, name, top), link.derivatives.values[local]
        # What lies between a weight and the module's output, for each row.
        each = 4 * like.element_size() * (link.derivatives.delta.numel() + like.numel())
        step = chunk_length(like.numel(), each, budget)
        found[name] = [weight_block(product, like, part, step) for part in parts[name]]
    return found


def add_blocks(sums: dict[str, list[Tensor]], blocks: Mapping[str, Sequence[Tensor]]) -> None:
    """Add in float32 at least."""
    for name, found in blocks.items():
        wide = [summable(block) for block in found]
        sums[name] = [a + b for a, b in zip(sums[name], wide, strict=True)] if name in sums else wide
