"""The block of a layer with one position, of which a quarter is kept, against the product of expanded rows."""

import pytest
import torch
from torch import nn

from lapkit.curvature import GGN, Categorical, GGNDense, OuterProduct, Parameters, accumulate
from lapkit.curvature.quantities import cross
from lapkit.curvature.quantities.cross import OwnBlock


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (1, 20), (3, 7), (4, 8), (5, 67), (13, 2)])
@pytest.mark.parametrize("near", [1, 2**24])
def test_the_block_is_that_of_the_expanded_rows(outputs, inputs, transposed, near, monkeypatch):
    monkeypatch.setattr(cross, "NEAR", near)
    block = OwnBlock(outputs, inputs, transposed=transposed, like=torch.zeros(()))
    expected = 0
    for examples in (6, 1):
        g, a = torch.randn(2, examples, outputs), torch.randn(examples, inputs)
        block.add(g, a)
        expected = expected + OuterProduct(a[:, None, None], g[:, :, None, None], transposed).block()
    held = torch.randn_like(expected)
    surrounded = torch.nn.functional.pad(held, (2, 1, 3, 0))
    block.add_to(surrounded[3:, 2:-1])
    torch.testing.assert_close(surrounded, torch.nn.functional.pad(held + expected, (2, 1, 3, 0)))


@pytest.mark.parametrize("batch", [5, 40])
def test_every_layer_of_a_network(batch):
    model = nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    x, y, parameters = torch.randn(40, 11), torch.arange(40) % 4, Parameters.of(model)
    quantity = GGNDense(parameters)
    accumulate(model, parameters, Categorical(), GGN(), zip(x.split(batch), y.split(batch), strict=True), [quantity])
    assert quantity.own  # else this tests nothing
    weights = dict(model.named_parameters())
    J = torch.func.vmap(torch.func.jacrev(lambda w, x: torch.func.functional_call(model, w, (x,))), in_dims=(None, 0))(
        weights, x
    )
    J = torch.cat([J[name].flatten(2) for name in weights], dim=2).detach()
    p = model(x).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.einsum("ncp,ncd,ndq->pq", J, hessian, J)
    for _ in range(2):  # asking does not change the sum
        torch.testing.assert_close(quantity.result().tensors["matrix"], expected)
