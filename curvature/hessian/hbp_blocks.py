"""What Hessian backpropagation leaves: one dense block for each parameter, or one for each group of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from lapkit.curvature.hessian.hbp_modes import mode_of
from lapkit.curvature.operators.block_diagonal import BlockDiagonal
from lapkit.curvature.operators.dense import Dense
from lapkit.curvature.quantities.results import CurvatureSum


@final
class CurvatureBlocks(CurvatureSum):
    """Diagonal blocks of a curvature that may be indefinite, summed over examples.

    Each parameter has a tensor `block/NAME`, or `block0/NAME`, `block1/NAME`, ... for groups of consecutive rows.
    Divide by `count` for the curvature of the mean loss.
    """

    main = "block"

    @classmethod
    def of(
        cls, blocks: Mapping[str, Sequence[Tensor]], shapes: Mapping[str, torch.Size], count: int, about: dict[str, str]
    ) -> CurvatureBlocks:
        """The result from each parameter's blocks."""
        tensors = {
            f"block{i if len(blocks[name]) > 1 else ''}/{name}": block
            for name in shapes
            for i, block in enumerate(blocks[name])
        }
        return cls({name: tuple(shape) for name, shape in shapes.items()}, tensors, count, about)

    @property
    def blocks(self) -> dict[str, tuple[Tensor, ...]]:
        """The dense blocks `(p, p)` of each parameter, in flat order."""
        found: dict[str, dict[int, Tensor]] = {name: {} for name in self.shapes}
        for key, block in self.tensors.items():
            kind, _, name = key.partition("/")
            found[name][int(kind.removeprefix("block") or 0)] = block
        return {name: tuple(parts[i] for i in sorted(parts)) for name, parts in found.items()}

    def _all(self) -> list[Tensor]:
        return [block for parts in self.blocks.values() for block in parts]

    @property
    def sizes(self) -> list[int]:
        """The sizes of all blocks, in flat order."""
        return [len(block) for block in self._all()]

    def to_dense(self) -> Tensor:
        """The whole block-diagonal matrix."""
        return torch.block_diag(*self._all())

    def diagonal(self) -> Tensor:
        """Its diagonal, `(P,)`."""
        return torch.cat([block.diagonal() for block in self._all()])

    def traces(self) -> dict[str, Tensor]:
        """The trace of each parameter's block."""
        return {name: torch.stack([block.trace() for block in parts]).sum() for name, parts in self.blocks.items()}

    def matmul(self, vectors: Tensor) -> Tensor:
        """Products with one vector `(P,)` or several `(P, R)`.

        Raises:
            ValueError: if the shape does not fit.
        """
        size = sum(self.sizes)
        if vectors.ndim not in (1, 2) or len(vectors) != size:
            raise ValueError(
                f"Expected a vector ({size},) or several as columns ({size}, R), got shape {tuple(vectors.shape)}."
            )
        pieces = zip(self._all(), vectors.split(self.sizes), strict=True)
        return torch.cat([block @ v for block, v in pieces])

    def operator(self) -> BlockDiagonal:
        """The blocks as an operator with inverses and determinants, for a positive semi-definite mode.

        Raises:
            ValueError: if the mode is "hessian", whose blocks may have negative eigenvalues.
        """
        if not mode_of(self.about["mode"]).positive:
            raise ValueError(
                "Blocks of the Hessian may have negative eigenvalues, so they are no precision. Use mode='pch-abs', "
                "'pch-clip' or 'ggn', or read the blocks themselves."
            )
        return BlockDiagonal(tuple(Dense(block.clone()) for block in self._all()))


def rows_of(name: str, shape: torch.Size, sub_blocks: int | Mapping[str, int] | None) -> list[slice]:
    """How a parameter is cut, along its first axis, into groups of weights that are consecutive in flat order.

    Args:
        name: the parameter.
        shape: its shape.
        sub_blocks: how many groups, for all parameters or by name (1 where it is not named); at most one for each row.

    Returns:
        Ranges of flat positions.

    Raises:
        ValueError: if the number is not positive.

    Reference:
        Dangel, Backpropagation Beyond the Gradient, section 4.4 (sub-blocking).
    """
    wanted = sub_blocks.get(name, 1) if isinstance(sub_blocks, Mapping) else 1 if sub_blocks is None else sub_blocks
    if wanted < 1:
        raise ValueError(f"sub_blocks={sub_blocks!r}: each parameter needs at least one block.")
    rows = shape[0] if shape else 1
    each = shape.numel() // max(rows, 1)
    groups = torch.arange(rows).tensor_split(min(wanted, rows))
    return [slice(int(g[0]) * each, (int(g[-1]) + 1) * each) for g in groups]


def parts_of(
    shapes: Mapping[str, torch.Size], sub_blocks: int | Mapping[str, int] | None
) -> dict[str, tuple[slice, ...]]:
    """How each parameter is cut.

    Raises:
        ValueError: if a number of blocks is not positive, or a name is no selected parameter's.
    """
    unknown = [name for name in sub_blocks if name not in shapes] if isinstance(sub_blocks, Mapping) else []
    if unknown:
        raise ValueError(f"sub_blocks names {unknown}, which are not among the selected parameters {list(shapes)}.")
    return {name: tuple(rows_of(name, shape, sub_blocks)) for name, shape in shapes.items()}
