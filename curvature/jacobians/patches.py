"""What a convolution sees of its input, cut out for a few examples at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lapkit.curvature.jacobians.jacobian import summable


@dataclass(frozen=True, eq=False)
class Patches:
    """The patches `(N, T, G, I)` of an input, which take as many times its memory as a kernel has positions.

    They stand for that tensor wherever examples can be taken a few at a time.

    Args:
        x: the padded input, `(N, R, channels, *spatial)`.
        kernel: its extent in each spatial dimension.
        stride: of the output positions.
        dilation: of the kernel.
        groups: of channels.
        kept: whether all of them are kept from when some are asked for a second time: what is read once is best cut out
            and read within the cache.
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    kept: bool = False

    @property
    def _outputs(self) -> list[int]:
        sizes = zip(self.x.shape[3:], self.kernel, self.stride, self.dilation, strict=True)
        return [(length - d * (k - 1) - 1) // s + 1 for length, k, s, d in sizes]

    @property
    def shape(self) -> torch.Size:
        """`(N, T, G, I)`, T counting rounds and output positions, I the numbers of a patch."""
        examples, rounds, channels = self.x.shape[:3]
        inputs = channels // self.groups * math.prod(self.kernel)
        return torch.Size((examples, rounds * math.prod(self._outputs), self.groups, inputs))

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the numbers, float32 at least."""
        return summable(self.x[:0]).dtype

    @property
    def nbytes(self) -> int:
        """Bytes that all patches together take."""
        return self.shape.numel() * self.dtype.itemsize

    def __getitem__(self, part: slice) -> Tensor:
        """The patches of some examples; neighbouring positions are neighbours in memory."""
        if self.kept and part.start in self._asked_for:
            return self._all[part]
        self._asked_for.add(part.start)
        return self._cut(part)

    @cached_property
    def _asked_for(self) -> set[int | None]:
        """Where parts began that were cut out before."""
        return set()

    @cached_property
    def _all(self) -> Tensor:
        return self._cut(slice(None))

    def _cut(self, part: slice) -> Tensor:
        """Views of the input with overlapping strides, for any number of dimensions; copied once, by the reshaping."""
        x = self.x[part].contiguous()
        within, along = self._steps(x.stride()[3:])
        sizes, steps = (*x.shape[:3], *self.kernel, *self._outputs), (*x.stride()[:3], *within, *along)
        cut = x.as_strided(sizes, steps, x.storage_offset()).reshape(*x.shape[:2], self.groups, self.shape[3], -1)
        return summable(cut).permute(0, 1, 4, 2, 3).flatten(1, 2)

    def rows(self, part: slice) -> Tensor:
        """Patches for a single use, the numbers of each side by side, in another order: the kernel before channels.

        They are copied faster, by whole runs of channels. `in_order` undoes the order where it is of consequence.
        """
        x = self.x[part].movedim(2, -1).contiguous()  # (n, R, *spatial, channels)
        within, along = self._steps(x.stride()[2:-1])
        channels = x.shape[-1] // self.groups
        sizes = (*x.shape[:2], *self._outputs, self.groups, *self.kernel, channels)
        steps = (*x.stride()[:2], *along, channels, *within, 1)
        return summable(x.as_strided(sizes, steps, x.storage_offset()).reshape(len(x), *self.shape[1:]))

    def in_order(self, matrix: Tensor) -> Tensor:
        """A matrix `(G, I, I)` of what `rows` gives, as one of the patches: channels before the kernel."""
        kernel = math.prod(self.kernel)
        four = matrix.unflatten(2, (kernel, -1)).unflatten(1, (kernel, -1))  # (G, kernel, channels, kernel, channels)
        return four.permute(0, 2, 1, 4, 3).reshape(matrix.shape)

    def _steps(self, spatial: Sequence[int]) -> tuple[list[int], list[int]]:
        """Strides from those of the input: within the kernel, and from one output position to the next."""
        within = [n * d for n, d in zip(spatial, self.dilation, strict=True)]
        return within, [n * s for n, s in zip(spatial, self.stride, strict=True)]
