"""Second moments `sum_r x_r x_r^T` of rows: symmetric matrices, of which a half need not be computed.

Torch has no symmetric rank-k update. Stripes of rows, each from the diagonal to the right, need 5/8 of the
multiplications where there are four, and cost no speed. The rest is the mirror image, which running sums put off until
they are read.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

STRIPED = 256  # columns from which on it pays to compute a half


def second_moment(rows: Tensor) -> Tensor:
    """`sum_r x_r x_r^T` for each group, `(R, G, D) -> (G, D, D)`."""
    count, groups, size = rows.shape
    if groups > 1:
        rows = rows.transpose(0, 1)
        return rows.mT @ rows
    rows = rows[:, 0]
    if size < STRIPED or count < size:  # of few rows the mirror image costs more than it saves
        return (rows.T @ rows)[None]
    total = rows.new_zeros(size, size)
    add_second_moment(total, rows)
    return mirrored(total)[None]


def add_moments(total: Tensor, piece: Tensor) -> None:
    """Add `sum_{n,t} x_nt x_nt^T` for each group to a sum, in place, `(n, T, G, D)` to `(G, D, D)`; until `mirrored`.

    Where positions are neighbours in memory and many, the moment of each example is made without a copy.
    """
    positions, groups, size = piece.shape[1:]
    if piece.stride(1) == 1 and positions >= size:
        rows = piece.permute(0, 2, 3, 1)  # (n, G, D, T)
        total += (rows @ rows.mT).sum(0)
    elif groups > 1:
        rows = piece.flatten(0, 1).transpose(0, 1)
        total.baddbmm_(rows.mT, rows)
    else:
        add_second_moment(total[0], piece.flatten(0, 1)[:, 0])


def add_second_moment(total: Tensor, rows: Tensor, stripes: int = 4) -> None:
    """Add `X^T X` of `X` `(R, D)` to a sum `(D, D)`, in place; left of the stripes it is wrong until `mirrored`."""
    for start, stop in _stripes(len(total), stripes):
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirrored(total: Tensor, stripes: int = 4) -> Tensor:
    """A sum with the part that `add_second_moment` left out, in place: the mirror image of the other."""
    for start, stop in _stripes(total.shape[-1], stripes):
        total[..., stop:, start:stop] = total[..., start:stop, stop:].mT
    return total


def _stripes(size: int, number: int) -> Iterator[tuple[int, int]]:
    """Where each stripe begins and ends; a small matrix is one."""
    width = -(-size // (number if size >= STRIPED else 1))
    return ((start, start + width) for start in range(0, size, width))
