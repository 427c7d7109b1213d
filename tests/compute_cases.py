"""Every quantity by name, on a small network and data; and whether two results are the same."""

from functools import partial

import torch
from torch import nn

from lapkit.curvature import (
    Categorical,
    ClippedGradients,
    EmpiricalFisher,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNDiagonals,
    GGNKronecker,
    GGNTraces,
    GradientCovariance,
    GradientDots,
    GradientGram,
    GradientMoments,
    GradientNorms,
    Gradients,
    GradientSum,
    MonteCarloGGN,
    compute,
)

EVERYTHING = {
    "diagonal": GGNDiagonal,
    "blocks": GGNBlocks,
    "dense": GGNDense,
    "kronecker": GGNKronecker,
    "fisher": partial(GGNDiagonal, columns=EmpiricalFisher()),
    "sampled": partial(GGNDiagonal, columns=MonteCarloGGN(2)),
    "diagonals": GGNDiagonals,
    "traces": GGNTraces,
    "gradients": Gradients,
    "norms": GradientNorms,
    "sum": GradientSum,
    "moments": GradientMoments,
    "covariance": GradientCovariance,
    "clipped": partial(ClippedGradients, bound=0.5, each="layer"),
    "dots": partial(GradientDots, vectors=torch.linspace(-1, 1, 43, dtype=torch.float64)),
    "gram": GradientGram,
    "mean_dots": GradientDots,
}
MERGE = {name: make for name, make in EVERYTHING.items() if name not in ("gram", "mean_dots")}


def close(actual, expected, tolerance=1e-11):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(examples=6):
    torch.manual_seed(2)
    return torch.randn(examples, 4), torch.arange(examples) % 3


def batches(x, y, sizes):
    return list(zip(x.split(sizes), y.split(sizes), strict=True))


def everything(batches, quantities=EVERYTHING, **options):
    return compute(model(), Categorical(), batches, quantities, generator=torch.Generator().manual_seed(3), **options)


def same(one, two, tolerance=1e-11):
    assert (type(one), one.names, one.count, one.about) == (type(two), two.names, two.count, two.about)
    assert one.tensors.keys() == two.tensors.keys()
    for key in one.tensors:
        close(one.tensors[key], two.tensors[key], tolerance)
