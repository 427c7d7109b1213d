"""Inner products of the Jacobians of two batches, filled in block by block within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

from torch import Tensor

from lapkit.curvature.memory import chunk_length

# What it costs to write a number out, multiply and add it up, in multiplications of a matrix product; measured.
WRITTEN = 64

Block = Callable[[slice, slice], Tensor]  # some examples of one batch with some of the other, `(K, n, L, m)`


def filled(block: Block, rows: int, columns: int | None, step: int) -> Tensor:
    """A Gram matrix `(K, N, L, M)`, `step` examples of each batch at a time.

    Args:
        block: makes a part of it.
        rows: the number N of examples of one batch.
        columns: the number M of the other's; None if both are the same, and then a half is computed and mirrored.
        step: the largest number of examples of a part.
    """
    symmetric, columns = columns is None, rows if columns is None else columns
    whole = block(slice(0, min(step, rows)), slice(0, min(step, columns)))
    if step >= max(rows, columns):
        return whole
    out = whole.new_empty(whole.shape[0], rows, whole.shape[2], columns)
    for start in range(0, rows, step):
        one = slice(start, min(start + step, rows))
        for begin in range(0, one.stop if symmetric else columns, step):
            two = slice(begin, min(begin + step, columns))
            part = whole if start == begin == 0 else block(one, two)
            out[:, one, :, two] = part
            if symmetric:
                out[:, two, :, one] = part.permute(2, 3, 0, 1)
    return out


def over_pairs(g: Tensor, h: Tensor | None, inner: Callable[[slice, slice], Tensor], budget: int) -> Tensor:
    """`sum_{s,t} (g_s . h_t) inner_{s,t}` over pairs of positions, `(K, N, L, M)`.

    Args:
        g: cotangents of one batch, `(K, N, S, G, O)`.
        h: those of the other, `(L, M, T, G, O)`; None for the same.
        inner: inner products of what went in for some examples of both, `(G, n, S, m, T)`.
        budget: bytes that an intermediate may take.
    """
    other = g if h is None else h

    def block(one: slice, two: slice) -> Tensor:
        left, right = (x[:, part].permute(3, 0, 1, 2, 4) for x, part in ((g, one), (other, two)))  # (G, K, n, S, O)
        products = left.flatten(1, 3) @ right.flatten(1, 3).mT
        products = products.unflatten(2, right.shape[1:4]).unflatten(1, left.shape[1:4])
        products *= inner(one, two)[:, None, :, :, None]
        return products.sum(-1).sum((0, 3))

    each = 2 * g.shape[3] * g.shape[0] * g.shape[2] * other.shape[0] * other.shape[2] * g.element_size()
    step = isqrt(chunk_length(max(g.shape[1], other.shape[1]) ** 2, each, budget))
    return filled(block, g.shape[1], None if h is None else h.shape[1], step)
