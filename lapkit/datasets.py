"""Small real data for the demo, the notebooks and the tests; it ships with scikit-learn, nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Handwritten digits, 8 x 8 pixels in [0, 1], shape `(N, 1, 8, 8)`.

    Args:
        train_x: images to train on.
        train_y: their classes.
        test_x: images of the same classes, of other writers' hands in part.
        test_y: their classes.
        ood_x: images of the classes that were held out.
        classes: the digits that stand for classes 0, 1, ...
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    ood_x: Tensor
    classes: tuple[int, ...]


def digits(train: int = 1000, held_out: tuple[int, ...] = (8, 9), *, noise: float = 0.0, seed: int = 0) -> Digits:
    """The optical recognition of handwritten digits data, some classes held out as out-of-distribution data.

    Args:
        train: number of training images.
        held_out: digits that training never sees.
        noise: standard deviation of Gaussian noise added to every pixel, as of a poor sensor.
        seed: of the split and the noise.

    Returns:
        A split, the same for the same seed.

    Raises:
        ValueError: if there are not so many images.

    Reference:
        Alpaydin and Kaynak, Cascading classifiers, 1998.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(data.target)
    classes = tuple(d for d in range(10) if d not in held_out)
    out = torch.isin(labels, torch.tensor(held_out))
    inside = (~out).nonzero()[:, 0]
    if not 0 < train < len(inside):
        raise ValueError(f"There are {len(inside)} images of digits {classes}; cannot train on {train} of them.")
    random = np.random.default_rng(seed)
    order = inside[torch.from_numpy(random.permutation(len(inside)))]
    images = images + noise * torch.tensor(random.standard_normal(images.shape), dtype=images.dtype)
    index = torch.full((10,), -1)
    index[list(classes)] = torch.arange(len(classes))
    first, rest = order[:train], order[train:]
    return Digits(images[first], index[labels[first]], images[rest], index[labels[rest]], images[out], classes)
