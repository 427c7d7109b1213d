"""What most tests of curvature begin with: one pass over batches, and a likelihood for the network at hand."""

import copy

import torch
from torch.nn import functional as F

from lapkit.curvature import GGN, Bernoulli, Categorical, Parameters, accumulate


def fit(model, batches, *makes, likelihood=None, columns=None, **options):
    """The results of the quantities that these functions make of all parameters."""
    parameters = Parameters.of(model)
    quantities = [make(parameters) for make in makes]
    accumulate(model, parameters, likelihood or Categorical(), columns or GGN(), batches, quantities, **options)
    return [quantity.result() for quantity in quantities]


def likelihood_for(model, x):
    """A likelihood of the fitting kind, targets, and the loss of one example."""
    outputs = copy.deepcopy(model)(x).reshape(len(x), -1).shape[1]
    if outputs == 1:
        loss = lambda f, y: F.binary_cross_entropy_with_logits(f, y[None].to(f))  # noqa: E731
        return Bernoulli(), torch.arange(len(x)) % 2, loss
    return Categorical(), torch.arange(len(x)) % outputs, lambda f, y: F.cross_entropy(f[None], y[None])
