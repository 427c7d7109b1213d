"""The last layer: found or named, with closed forms and without a backward pass through what comes before."""

import pytest
import torch
from dense_laplace import problem, untouched
from torch import nn

from lapkit import Laplace

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank", "gp")


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_name_stands_for_the_layer(structure):
    case = problem("classification")
    named = Laplace(case.model, "classification", "last_layer", structure, last_layer_name="4").fit(case.data)
    found = Laplace(case.model, "classification", "last_layer", structure).fit(case.data)
    assert named.fitted.parameters.names == found.fitted.parameters.names == ("4.weight", "4.bias")
    torch.testing.assert_close(named.log_marginal_likelihood(), found.log_marginal_likelihood())
    other = Laplace(case.model, "classification", "last_layer", structure, last_layer_name="2").fit(case.data)
    assert other.fitted.parameters.names == ("2.weight", "2.bias")


def test_names_that_do_not_go_together():
    model = problem("classification").model
    with pytest.raises(ValueError, match=r"\['body'\] name no trainable parameter"):
        Laplace(model, "classification", last_layer_name="body")
    with pytest.raises(ValueError, match="belongs to subset_of_weights='last_layer'"):
        Laplace(model, "classification", "all", last_layer_name="4")


class Watched(torch.autograd.Function):
    """Passes on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise AssertionError("a backward pass went through the body")


class Body(nn.Module):
    """Its graph is never made: gradients are off, or an operation refuses them."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.graphs = []

    def forward(self, x):
        h = Watched.apply(self.layer(x).tanh())
        self.graphs.append(h.requires_grad)
        return h


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_goes_back_through_the_body(structure):
    body = Body()
    model = nn.Sequential(body, nn.Linear(4, 3)).double()
    data = [(torch.randn(5, 3), torch.arange(5) % 3) for _ in range(3)]
    with untouched(body.layer):
        la = Laplace(model, "classification", "last_layer", structure, last_layer_name="1").fit(data)
        la(data[0][0])
    assert len(body.graphs) > 3
    assert not any(body.graphs)


@pytest.mark.parametrize("inputs", [3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_the_full_matrix_by_its_closed_form(inputs, bias):
    """`sum_n Lambda_n (x) a_n a_n^T`, for few inputs and for many, which take different routes."""
    model = nn.Linear(inputs, 4, bias=bias).double()
    x = torch.randn(70, inputs)
    data = [(x[:33], torch.arange(33) % 4), (x[33:], torch.arange(37) % 4)]
    la = Laplace(model, "classification", "last_layer", "full").fit(data)
    p = model(x).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    H = torch.einsum("nop,ni,nj->oipj", hessian, x, x).reshape(4 * inputs, 4 * inputs)
    found = la.fitted.curvature.to_dense()
    torch.testing.assert_close(found[: 4 * inputs, : 4 * inputs], H)
    if bias:
        torch.testing.assert_close(found[4 * inputs :, 4 * inputs :], hessian.sum(0))
        cross = torch.einsum("nop,ni->oip", hessian, x).reshape(4 * inputs, 4)
        torch.testing.assert_close(found[: 4 * inputs, 4 * inputs :], cross)
        torch.testing.assert_close(found[4 * inputs :, : 4 * inputs], cross.T)
