"""Weights of examples: whole numbers stand for repetitions, in every number of a posterior."""

import pytest
import torch
from torch import nn

from lapkit import Laplace


@pytest.mark.parametrize("structure", ["diag", "kron", "blockdiag", "full"])
@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_weights_are_repetitions(structure, kind, subset):
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(7, 2)
    y = torch.randn(7, 3) if kind == "regression" else torch.arange(7) % 3
    repeats = torch.tensor([1, 2, 0, 3, 1, 1, 2])
    noise = {"sigma_noise": 0.7} if kind == "regression" else {}

    def fitted(data):
        return Laplace(model, kind, subset, structure, prior_precision=2.0, **noise).fit(data)

    weighted = fitted([(x[:3], y[:3], repeats[:3].double()), (x[3:], y[3:], repeats[3:].double())])
    repeated = fitted([(x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats, 0))])
    torch.testing.assert_close(weighted.log_marginal_likelihood(), repeated.log_marginal_likelihood())
    torch.testing.assert_close(
        weighted.posterior_precision.to_dense(), repeated.posterior_precision.to_dense(), rtol=1e-10, atol=1e-12
    )
    assert weighted.fitted.count == 10
