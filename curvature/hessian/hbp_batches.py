"""The pass over the data, in pieces whose matrices fit into memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lapkit.curvature.hessian.hbp_trace import Trace, Tracer
from lapkit.curvature.inputs import can_be_cut, numbered, to_device, unpack
from lapkit.curvature.memory import chunk_length
from lapkit.curvature.parameters import Parameters

EMPTY = "The data is empty: there was no batch. Check the data loader (drop_last with few examples?)."
FREE = 4  # the budget is a quarter of what is free
LIVE = 4  # matrices of the largest size that live at the same time


def pieces(tracer: Tracer, data: Iterable[Any], budget: int, *, weighted: bool = True) -> Iterator[Trace]:
    """Traces of consecutive examples, few enough for one matrix `(h, h)` each.

    Args:
        tracer: reads the model.
        data: batches.
        budget: bytes that the matrices may take.
        weighted: whether examples may have weights.

    Yields:
        One trace for each piece.

    Raises:
        ValueError: if there is no data, the matrix of a single example would not fit, or weights are not wanted.
    """
    empty = True
    for number, batch in numbered(data):
        x, y, weights = unpack(batch, number)
        if weights is not None and not weighted:
            raise ValueError(
                "Averages between modules are defined for examples of equal weight. Leave the weights out, or use "
                "exact blocks (averaging=None)."
            )
        if weights is not None and len(weights) != len(y):
            raise ValueError(f"Got {len(weights)} weights for a batch of {len(y)} examples: one weight an example.")
        x, y = to_device(x, tracer.parameters.device), to_device(y, tracer.parameters.device)
        empty = False
        if not tracer.stages:
            tracer.prepare(x, y, weights)
        each = LIVE * tracer.widest**2 * tracer.parameters.dtype.itemsize
        if each > FREE * budget:
            raise ValueError(
                f"Between two modules an example has up to {tracer.widest} values, so that its Hessian takes "
                f"{each / LIVE / 2**30:.2f} GiB, {LIVE} of them more than is free. Use hessian_products, which form no "
                "such matrix."
            )
        count = len(y)
        step = chunk_length(count, each, budget) if can_be_cut(x, count) else count
        for start in range(0, count, step):
            part = slice(start, start + step)
            yield tracer(x[part] if step < count else x, y[part], None if weights is None else weights[part])
    if empty:
        raise ValueError(EMPTY)


def check_block_sizes(parameters: Parameters, parts: Mapping[str, Sequence[slice]], budget: int) -> None:
    """Refuse blocks that would not fit.

    Raises:
        ValueError: if the blocks take more memory than is free.
    """
    sizes = {name: sum((s.stop - s.start) ** 2 for s in slices) for name, slices in parts.items()}
    needed = 2 * sum(sizes.values()) * max(parameters.dtype.itemsize, 4)
    if needed > FREE * budget:
        worst = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"Dense blocks would take {needed / 2 / 2**30:.2f} GiB, most of it for {worst!r}, more than is free. Use "
            "hessian_products, which form no matrix, more sub_blocks, or fewer parameters."
        )
