"""Transforms of inputs within ranges that can be learned, such as rotations and shifts of images."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

KINDS = ("rotation", "shift_x", "shift_y", "stretch_x", "stretch_y", "shear")
# One step along a generator: radians, half widths, half heights, and logarithms of factors.
LARGEST = {"rotation": math.pi, "shift_x": 1.0, "shift_y": 1.0, "stretch_x": 0.7, "stretch_y": 0.7, "shear": 1.0}


class Transform(nn.Module, ABC):
    """Ways to change an input, numbered by places `u` in [-1, 1]^d.

    Subclass it for transforms of your own data; what is to be learned of them are its parameters.
    """

    dimension: int  # d

    @abstractmethod
    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Each input in S ways, differentiable in the transform's parameters.

        Args:
            x: inputs `(N, ...)`.
            u: places `(S, d)`, between -1 and 1.

        Returns:
            `(N, S, ...)`.
        """


class AffineTransform(Transform):
    """Images moved, turned and stretched at random, each kind within a range that can be learned.

    At `u` in [-1, 1]^d the coordinates, from -1 to 1 along each side, are mapped by `exp(sum_i range_i u_i G_i)`, with
    G_i the generators of the kinds. What comes from outside the image is zero.

    Args:
        kinds: of "rotation" (range in radians), "shift_x", "shift_y" (in half widths and heights), "stretch_x",
            "stretch_y" (logarithms of factors), "shear".
        initial: all ranges at the start, as shares of the largest ones: pi, 1, 1, 0.7, 0.7, 1.

    Raises:
        ValueError: if there is no kind, one is unknown or given twice, or the share is not between 0 and 1.

    Example:
        >>> AffineTransform(("rotation", "shift_x"), initial=0.5).ranges
        {'rotation': 1.5707..., 'shift_x': 0.5}

    Reference:
        Benton, Finzi, Izmailov and Wilson, Learning invariances in neural networks, 2020, section 4.
    """

    largest: Tensor  # (d,)
    generators: Tensor  # (d, 3, 3)

    def __init__(self, kinds: Iterable[str] = ("rotation",), initial: float = 0.1) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        each_once = len(set(self.kinds)) == len(self.kinds) > 0
        if not each_once or set(self.kinds) - set(KINDS) or not 0 < initial < 1:
            raise ValueError(
                f"Expected kinds of {KINDS}, each at most once, and a share between 0 and 1, got {self.kinds} and "
                f"{initial}."
            )
        self.dimension = len(self.kinds)
        share = torch.full((self.dimension,), math.log(initial / (1 - initial)))
        self.logit = nn.Parameter(share, requires_grad=False)  # of the share of the largest range
        self.register_buffer("largest", torch.tensor([LARGEST[kind] for kind in self.kinds]), persistent=False)
        self.register_buffer("generators", torch.stack([_generator(kind) for kind in self.kinds]), persistent=False)

    @property
    def ranges(self) -> dict[str, float]:
        """The range of each kind: the largest parameter of that kind which occurs."""
        return dict(zip(self.kinds, (self.logit.sigmoid() * self.largest).tolist(), strict=True))

    def extra_repr(self) -> str:
        """The kinds, with their ranges."""
        return ", ".join(f"{kind}={value:.4g}" for kind, value in self.ranges.items())

    def matrices(self, u: Tensor, aspect: float = 1.0) -> Tensor:
        """Of points `(x, y, 1)` of an image, both coordinates between -1 and 1.

        Args:
            u: places within the ranges, `(S, d)`, between -1 and 1.
            aspect: width over height, so that a rotation keeps shapes.

        Returns:
            `(S, 3, 3)`.
        """
        along = u * self.logit.sigmoid() * self.largest
        sides = along.new_tensor([[1, 1 / aspect, 1], [aspect, 1, 1], [1, 1, 1]])
        return torch.matrix_exp(torch.einsum("sd,dij->sij", along, self.generators) * sides)

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Images, each moved in S ways.

        Args:
            x: images `(N, C, H, W)`.
            u: places within the ranges, `(S, d)`, between -1 and 1.

        Returns:
            `(N, S, C, H, W)`.

        Raises:
            ValueError: if the images have another number of axes.
        """
        if x.ndim != 4:
            raise ValueError(f"Expected images (N, C, H, W), got {tuple(x.shape)}: unflatten them before.")
        matrices = self.matrices(u, aspect=x.shape[-1] / x.shape[-2])
        grid = nn.functional.affine_grid(matrices[:, :2], [len(u), *x.shape[1:]], align_corners=False)
        each = grid.repeat(len(x), 1, 1, 1)
        moved = nn.functional.grid_sample(x.repeat_interleave(len(u), 0), each, align_corners=False)
        return moved.unflatten(0, (len(x), len(u)))


def _generator(kind: str) -> Tensor:
    """Of the one-parameter group of a kind, `(3, 3)`."""
    entries = {
        "rotation": {(0, 1): -1.0, (1, 0): 1.0},
        "shift_x": {(0, 2): 1.0},
        "shift_y": {(1, 2): 1.0},
        "stretch_x": {(0, 0): 1.0},
        "stretch_y": {(1, 1): 1.0},
        "shear": {(0, 1): 1.0},
    }[kind]
    matrix = torch.zeros(3, 3)
    for place, value in entries.items():
        matrix[place] = value
    return matrix
