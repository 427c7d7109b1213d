"""What a convolution sees of its input, cut out for a few examples at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """

    x: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

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
        """The patches of some examples.

        Views of the input with overlapping strides, so that any number of dimensions is one line; copied once, by
        the reshaping.
        """
        x = self.x[part].contiguous()
        steps = x.stride()[3:]
        view = x.as_strided(
            (*x.shape[:3], *self.kernel, *self._outputs),
            (
                *x.stride()[:3],
                *(n * d for n, d in zip(steps, self.dilation, strict=True)),
                *(n * s for n, s in zip(steps, self.stride, strict=True)),
            ),
            x.storage_offset(),
        )
        cut = view.reshape(*x.shape[:2], self.groups, self.shape[3], -1)  # (n, R, G, I, L)
        return summable(cut).permute(0, 1, 4, 2, 3).flatten(1, 2)
