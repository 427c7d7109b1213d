"""The empirical Fisher in small blocks along each tensor, whose inverses are cheap: WoodFisher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from lapkit.curvature import BlockDiagonal, Columns, Dense, EmpiricalFisher, LayerJacobian, Likelihood, Parameters
from lapkit.curvature.accumulate import accumulate
from lapkit.curvature.capture.forward import ForwardFunction
from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.quantities.quantity import Quantity
from lapkit.curvature.quantities.results import CurvatureSum
from lapkit.pruning.quadratic import Quadratic


@final
class ChunkSum(CurvatureSum):
    """Blocks of consecutive weights of a matrix, those of each parameter `chunks/NAME`, `(B, size, size)`."""

    main = "chunks"

    def operator(self) -> BlockDiagonal:
        """One dense block for each chunk; the last of a tensor is smaller where they do not divide it."""
        blocks = []
        for name, chunks in self.part("chunks").items():
            shape = self.shapes[name]
            left = torch.Size(shape).numel()
            for chunk in chunks:
                size = min(left, chunk.shape[-1])
                blocks.append(Dense(chunk[:size, :size].clone()))
                left -= size
        return BlockDiagonal(tuple(blocks))


@final
class GGNChunks(Quantity):
    """The blocks of consecutive weights of each tensor, whatever the curvature.

    Args:
        parameters: the weights.
        size: of a block.
        columns: which curvature, if not that of the call.
    """

    def __init__(self, parameters: Parameters, size: int, *, columns: Columns | None = None) -> None:
        super().__init__(parameters, columns=columns)
        self.size, self.sums = size, dict[str, Tensor]()
        self.about["chunks"] = str(size)

    def update(self, name: str, jacobian: LayerJacobian, *, first: bool) -> None:
        """See `Quantity.update`."""
        columns, examples, weights = jacobian.shape
        step = chunk_length(examples, 4 * 8 * columns * weights, jacobian.budget)
        for start in range(0, examples, step):
            rows = jacobian.select(slice(start, min(start + step, examples))).to_dense().flatten(0, 1)  # (K n, P)
            rows = torch.nn.functional.pad(rows, (0, -weights % self.size)).unflatten(1, (-1, self.size))
            found = torch.einsum("nbi,nbj->bij", rows, rows)
            self.sums[name] = self.sums[name] + found if name in self.sums else found

    def result(self) -> ChunkSum:
        """See `Quantity.result`."""
        like = summable(self.parameters.tensors[0].detach())
        pairs = zip(self.parameters.names, self.parameters.sizes, strict=True)
        empty = {n: like.new_zeros(-(-size // self.size), self.size, self.size) for n, size in pairs}
        tensors = {f"chunks/{n}": self.sums.get(n, zeros).clone() for n, zeros in empty.items()}
        return ChunkSum(self.shapes, tensors, self.count, self.about)


def woodfisher(
    model: nn.Module,
    likelihood: Likelihood,
    data: Iterable[Any],
    *,
    parameters: Parameters | Iterable[str] | None = None,
    block_size: int = 50,
    damping: float = 1e-5,
    memory_budget: int | None = None,
    forward_fn: ForwardFunction | None = None,
    output_axis: int | None = None,
) -> Quadratic:
    """A quadratic model for `prune` by the block-wise empirical Fisher, `N damping I + sum_n g_n g_n^T`.

    The paper's matrix is the mean `damping I + sum_n g_n g_n^T / N`, with the same ranking; here it is a sum, so that
    predictions are in nats of the summed loss. A block is inverted by its Cholesky factor, which equals the paper's
    recursion over examples.

    Args:
        model: trained.
        likelihood: of targets given outputs.
        data: batches.
        parameters: the weights, or names of parameters or modules; all trainable ones by default.
        block_size: weights in a block; the paper takes 50 to 2000.
        damping: added to the diagonal of the mean.
        memory_budget: bytes that intermediates may take.
        forward_fn: `forward_fn(model, inputs)` to be called instead of the model.
        output_axis: the axis of classes or channels in the outputs.

    Returns:
        The quadratic model; without a prior, so not for the criterion "evidence".

    Raises:
        ValueError: if a number is not positive, or the engine or the likelihood refuses a batch.

    Reference:
        Singh and Alistarh, WoodFisher: efficient second-order approximation for neural network compression, 2020,
        eq. (3) and (4).
    """
    if block_size < 1 or not damping > 0:
        raise ValueError(f"Block size and damping are positive, got {block_size} and {damping}.")
    chosen = Parameters.selected(model, parameters)
    quantity = GGNChunks(chosen, block_size)
    totals = accumulate(
        model,
        chosen,
        likelihood,
        EmpiricalFisher(),
        data,
        [quantity],
        memory_budget=memory_budget,
        forward_fn=forward_fn,
        output_axis=output_axis,
    )
    curvature = quantity.result().operator().to(torch.float64).scale(likelihood.precision**2)
    weights = chosen.vector().double()
    zero, places = torch.zeros_like(weights), torch.arange(chosen.numel, device=chosen.device)
    precision = curvature.shift(totals.weight * damping)
    return Quadratic(model, chosen, places, weights, precision, curvature, zero, zero)
