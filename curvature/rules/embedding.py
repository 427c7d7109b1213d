"""Closed forms of embeddings: rows of a table that are looked up, for each example or for all alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.capture.internals import saved
from lapkit.curvature.jacobians.embedding import EmbeddingJacobian
from lapkit.curvature.jacobians.jacobian import LayerJacobian
from lapkit.curvature.rules.operand import replay
from lapkit.curvature.rules.site import FromCotangent, Site


def embedding(site: Site) -> FromCotangent | None:
    """A table indexed by the data: each token's cotangent belongs to its row.

    Raises:
        ValueError: if the module divides gradients by the frequency of tokens.
    """
    if not site.direct or site.layout.axis == len(site.shape) - 1:
        return None
    index = _indices(site.saved)
    if index is None:
        return None
    # Where examples are padded to as many positions, the padding must not look like row 0.
    index = site.layout.canonical(1 + index[None, ..., None], site.examples)[0].flatten(1) - 1  # (N, T)
    size = len(site.parameter)
    return lambda c: EmbeddingJacobian(index, site.canonical(c).flatten(2, -2), size, site.budget)


def looks_up(site: Site) -> bool:
    """Whether the operand is made of rows of the parameter."""
    return any(node.name() == "EmbeddingBackward0" for node, _ in (site.steps or ())[:1])


def looked_up(site: Site) -> Tensor | None:
    """The rows that the operand is made of, in the operand's shape without its last axis; None if they were cut up.

    Raises:
        ValueError: if the module divides gradients by the frequency of tokens.
    """
    rows, columns = _rows_and_columns(site)
    size = site.parameter.shape[-1]
    if rows is None or columns is None or rows.shape[-1] != size:
        return None
    return rows[..., 0] if bool((columns == torch.arange(size, device=columns.device)).all()) else None


def looked_up_entries(site: Site) -> Tensor | None:
    """The entry of the table that stands at each place of the operand, -1 for padding.

    Raises:
        ValueError: if the module divides gradients by the frequency of tokens.
    """
    rows, columns = _rows_and_columns(site)
    if rows is None or columns is None:
        return None
    return torch.where(rows < 0, -1, rows * site.parameter.shape[-1] + columns)


def _rows_and_columns(site: Site) -> tuple[Tensor | None, Tensor | None]:
    """The row and the column of the table that stand at each place of the operand.

    Raises:
        ValueError: if the module divides gradients by the frequency of tokens.
    """
    assert site.steps  # or it would not look up
    (node, _), *rest = site.steps
    index, size = _indices(partial(saved, node)), site.parameter.shape[-1]
    if index is None:
        return None, None
    columns = torch.arange(size, device=index.device).expand(*index.shape, size)
    return replay(rest, index[..., None].expand(*index.shape, size)), replay(rest, columns)


def rows_of(site: Site, index: Tensor) -> Callable[[Tensor], LayerJacobian]:
    """From values `(K, N, T D)` at the same rows `(T,)` for all examples to the table's Jacobian."""
    index = index.expand(site.examples, -1)

    def jacobian(values: Tensor) -> EmbeddingJacobian:
        g = values.unflatten(-1, (index.shape[1], -1))
        return EmbeddingJacobian(index, g, len(site.parameter), site.budget)

    return jacobian


def _indices(read: Callable[[str], Any]) -> Tensor | None:
    """What was looked up, -1 where it was padding, which has no gradient; None if the node does not show it.

    Raises:
        ValueError: if the module divides gradients by the frequency of tokens.
    """
    index, padding, by_frequency = (read(name) for name in ("indices", "padding_idx", "scale_grad_by_freq"))
    if index is None or padding is None or by_frequency is None:
        return None
    if by_frequency:
        raise ValueError(
            "An embedding with scale_grad_by_freq=True divides its gradient by how often a token occurs in the batch, "
            "which is not a derivative. Set scale_grad_by_freq=False on the module; its outputs do not change."
        )
    none = int(padding) >= 2**63  # unsigned: -1
    found: Tensor = index if none else torch.where(index == int(padding), -1, index)
    return found
