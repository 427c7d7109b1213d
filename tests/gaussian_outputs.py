"""Gaussians over logits to try functions of them on, and expectations under them by dense grids."""

import math

import numpy as np
import torch

from lapkit.posteriors import FunctionDistribution


def random(*batch, classes=3, scale=1.0):
    B = torch.randn(*batch, classes, classes)
    return FunctionDistribution(2 * torch.randn(*batch, classes), scale * B @ B.mT / classes)


def on_grid(function, f, nodes=36):
    """`E[function(z)]` for `z ~ N(mean, covariance)` of each input, by a product of Gauss-Hermite rules."""
    axis, weight = (torch.as_tensor(v) for v in np.polynomial.hermite_e.hermegauss(nodes))
    classes = f.mean.shape[-1]
    grid = torch.cartesian_prod(*[axis] * classes).reshape(-1, classes)
    weights = torch.cartesian_prod(*[weight / weight.sum()] * classes).reshape(-1, classes).prod(1)
    roots = torch.linalg.cholesky(f.covariance)
    values = [function(m + grid @ L.T) for m, L in zip(f.mean, roots, strict=True)]
    return torch.stack([torch.tensordot(weights, v, dims=1) for v in values])


def on_line(function, mean, variance, step=1e-3):
    """`E[function(z)]` for one number `z ~ N(mean, variance)`, by the trapezoidal rule over ten deviations."""
    x = torch.arange(-10, 10, step)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    return step * (density * function(mean + math.sqrt(variance) * x)).sum()


def entropy(p):
    return torch.special.entr(p).sum(-1)
