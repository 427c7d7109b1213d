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


def add_second_moment(total: Tensor, rows: Tensor, stripes: int = 4) -> None:
    """Add `X^T X` of `X` `(R, D)` to a sum `(D, D)`, in place; left of the stripes it is wrong until `mirrored`."""
    for start, stop in _stripes(len(total), stripes):
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirrored(total: Tensor, stripes: int = 4) -> Tensor:
    """A sum with the part that `add_second_moment` left out, in place: the mirror image of the other."""
    for start, stop in _stripes(len(total), stripes):
        total[stop:, start:stop] = total[start:stop, stop:].T
    return total


def _stripes(size: int, number: int) -> Iterator[tuple[int, int]]:
    """Where each stripe begins and ends; a small matrix is one."""
    width = -(-size // (number if size >= STRIPED else 1))
    return ((start, start + width) for start in range(0, size, width))
