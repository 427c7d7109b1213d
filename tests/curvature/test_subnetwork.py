"""Jacobians and operators cut down to single weights, against those of all weights."""

import pytest
import torch
from torch import nn

from lapkit.curvature import (
    Dense,
    Diagonal,
    Engine,
    GGNDiagonal,
    Kronecker,
    KroneckerProduct,
    OuterProduct,
    Parameters,
    Subnetwork,
    SubnetworkEngine,
    borrowed,
    principal,
)
from lapkit.curvature.subnetwork import OfSubnetwork


def chosen(size, share=0.5, seed=0):
    return (
        torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: max(1, int(share * size))].sort().values
    )


class Words(nn.Module):
    """A table, attention, normalisation, and weights that are tied."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        h = self.table(x)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return h.mean(1) @ self.table.weight.T


NETWORKS = {
    "linear": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3)),
    "grouped": (nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(24, 2)), (3, 4, 4, 4)),
    "transposed": (nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2)), (3, 2, 4)),
    "norm": (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 2)), (5, 3)),
    "words": (Words(), None),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_jacobian_has_the_columns_of_the_chosen_weights(name):
    model, shape = NETWORKS[name]
    model = model.double()
    x = torch.arange(15).reshape(3, 5) % 7 if shape is None else torch.randn(shape)
    parameters = Parameters.of(model)
    for share in (0.1, 0.9):
        indices = chosen(parameters.numel, share)
        subnetwork = Subnetwork.of(parameters, indices)
        with borrowed(model, parameters):
            f, whole = Engine(model, parameters).jacobian(x)
        with borrowed(model, subnetwork.whole):
            g, part = SubnetworkEngine(model, subnetwork).jacobian(x)
        torch.testing.assert_close(f, g)
        torch.testing.assert_close(part.to_dense(), whole.to_dense()[..., indices], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("budget", [1, 2**28])
def test_outer_products_at_some_weights(transposed, groups, positions, budget):
    product = OuterProduct(
        torch.randn(6, positions, groups, 3), torch.randn(2, 6, positions, groups, 4), transposed, budget
    )
    for share in (0.1, 0.3, 1.0):
        places = chosen(12 * groups, share)
        torch.testing.assert_close(product.at(places).values, product.to_dense()[..., places])


def spd(*shape):
    root = torch.randn(*shape, shape[-1] + 2)
    return root @ root.mT


def operators():
    yield Diagonal(torch.rand(24))
    yield Dense(spd(24))
    yield KroneckerProduct(spd(2, 3), spd(2, 4))
    yield KroneckerProduct(torch.rand(2, 3), spd(2, 4))
    yield KroneckerProduct(spd(24, 1), torch.ones(24, 1, 1))
    yield KroneckerProduct(spd(1, 24), torch.ones(1, 1, 1))
    yield Kronecker.from_factors(spd(2, 3), spd(2, 4))
    yield Kronecker.from_factors(torch.rand(2, 3), spd(2, 4))


@pytest.mark.parametrize("number", range(len(list(operators()))))
def test_principal_submatrices(number):
    operator = list(operators())[number]
    second_group = torch.arange(12, 24)
    rows = torch.cat([torch.tensor([0, 2, 8, 10]), 12 + torch.tensor([0, 2, 8, 10])])  # rows 0, 2 of columns 0, 2
    for places in (chosen(24, 0.4), second_group, rows, rows[:4], rows[:3], torch.arange(24), torch.tensor([7])):
        found = principal(operator, places)
        torch.testing.assert_close(found.to_dense(), operator.to_dense()[places][:, places], rtol=1e-9, atol=1e-11)
        shifted = found.shift(0.3)
        torch.testing.assert_close(shifted.logdet(), torch.logdet(shifted.to_dense()))


def test_whole_rows_of_whole_columns_leave_a_product():
    operator = KroneckerProduct(spd(2, 3), spd(2, 4))
    rows = torch.tensor([0, 2, 8, 10])
    for places in (rows, torch.cat([rows, 12 + rows]), torch.arange(12, 24)):
        assert isinstance(principal(operator, places), KroneckerProduct)
    assert isinstance(principal(operator, rows[:3]), Dense)
    assert isinstance(principal(operator, torch.cat([rows, 13 + rows])), Dense)
    assert principal(operator, torch.arange(24)) is operator
    assert isinstance(principal(operator.eigen, torch.arange(12)), Kronecker)


def test_numbers_of_chosen_weights_among_the_others():
    model = nn.Linear(3, 2)
    subnetwork = Subnetwork.of(Parameters.of(model), torch.tensor([4, 1]))
    assert subnetwork.whole.names == ("weight",)
    assert subnetwork.weights.sizes == (2,)
    vectors = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    embedded = subnetwork.embed(vectors, torch.full((6,), 9.0))
    assert embedded.tolist() == [[9, 1, 9, 9, 2, 9], [9, 3, 9, 9, 4, 9]]
    whole = Subnetwork.of(Parameters.of(model), torch.arange(6))
    assert whole.weights.tensors[0].shape == (2, 3)


def test_places_must_ascend():
    parameters = Parameters.of(nn.Linear(3, 2, bias=False))
    for places in ([1, 0], [1, 1], [-1, 2], [6], []):
        with pytest.raises(ValueError, match="must ascend"):
            Subnetwork(parameters, (torch.tensor(places, dtype=torch.long),))
    with pytest.raises(ValueError, match="2 sets of places for 1 tensors"):
        Subnetwork(parameters, (torch.tensor([0]), torch.tensor([0])))


def test_sums_over_other_weights_do_not_add_up():
    model = nn.Linear(3, 2, bias=False)
    parameters = Parameters.of(model)

    def digest(indices):
        return OfSubnetwork(Subnetwork.of(parameters, torch.tensor(indices)), GGNDiagonal).inner.about["subnetwork"]

    assert digest([0, 3]) == digest([3, 0])
    assert len({digest([0, 3]), digest([1, 2]), digest([0, 4])}) == 3
