"""The closed form of a grouped matrix product: tokens sorted by expert, a stretch of rows for each expert's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import summable
from lapkit.curvature.jacobians.outer_product import OuterProduct
from lapkit.curvature.rules.operand import whole
from lapkit.curvature.rules.site import FromCotangent, Site


def grouped_right_operand(site: Site) -> FromCotangent | None:
    """`x[rows of e] W_e`: experts are groups; the tokens an example sends to one are the positions it has there.

    Groups have as many positions as the busiest needs, the others are padded with zeros. For Kronecker factors all
    experts count as equally often used, so that their blocks carry their shares of the tokens.
    """
    x, ends = site.saved("self"), site.saved("offs")
    if x is None or ends is None or site.view is None or site.layout.axis != 0 or x.ndim != 2 or site.view.ndim != 3:
        return None
    transposed = whole(site.view, site.parameter)  # (E, I, O)
    if not transposed and not whole(site.view.mT, site.parameter):
        return None
    experts, tokens = site.view.shape[0], x.shape[0]
    owner = site.layout.owners(tokens, site.examples).to(x.device)
    expert = torch.searchsorted(ends.to(torch.int64), torch.arange(tokens, device=x.device), right=True)
    kept = ((expert < experts) & (owner >= 0)).nonzero()[:, 0]
    place, positions = _places(owner[kept] * experts + expert[kept], site.examples * experts)
    shape = (site.examples, experts, positions)

    def sorted_in(rows: Tensor) -> Tensor:
        """Rows `(K, tokens, size)` as `(K, N, T, E, size)`."""
        rows = summable(rows)
        out = rows.new_zeros(len(rows), shape[0] * shape[1] * shape[2], rows.shape[2])
        return out.index_copy_(1, place, rows[:, kept]).unflatten(1, shape).transpose(2, 3)

    a = sorted_in(x.detach()[None])[0]
    count = -(-len(kept) // experts)
    return lambda c: OuterProduct(a, sorted_in(c), transposed, site.budget, count)


def _places(group: Tensor, groups: int) -> tuple[Tensor, int]:
    """A place for each row, those of one group side by side, and how many places a group has."""
    counts = torch.bincount(group, minlength=groups)
    order = group.argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(group), device=group.device) - (counts.cumsum(0) - counts)[group[order]]
    positions = max(int(counts.max()), 1)
    return group * positions + rank, positions
