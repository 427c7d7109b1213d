"""What products with the curvature refuse, and where they take a slower way."""

import pytest
import reference_problem as ref
import torch
from networks.functions import NoBatch
from networks.registry import Model
from product_cases import PRODUCTS, close, reference, uneven
from torch import nn
from torch.nn.utils import parametrizations

from lapkit.curvature import Categorical, GGNProduct, HessianProduct


@pytest.mark.parametrize(
    "blocks", [[["0", "2"]], [["0", "2", "4"], ["4.bias"]], [["0", "2", "4", "nothing"]], [["0", "2", "4"], []]]
)
def test_groups_that_do_not_fit(blocks):
    with pytest.raises(ValueError, match=r"Groups|Each parameter"):
        reference(GGNProduct, blocks=blocks)


def test_data_read_once_is_refused():
    data = uneven(ref.inputs(), ref.labels())
    for once in (iter(data), (batch for batch in data), map(tuple, data)):
        with pytest.raises(TypeError, match="only once"):
            GGNProduct(ref.model(), Categorical(), once)
    with pytest.raises(ValueError, match="no batch"):
        GGNProduct(ref.model(), Categorical(), [])


def test_changing_data_is_refused_shuffled_is_not():
    class Augmented:
        def __iter__(self):
            return iter([(ref.inputs() + 0.1 * torch.randn(6, 3), ref.labels())])

    class Shrinking(list):
        def __iter__(self):
            return iter([self.pop()])

    batch = (ref.inputs(), ref.labels())
    with pytest.raises(ValueError, match="disagree"):
        GGNProduct(ref.model(), Categorical(), Augmented())
    with pytest.raises(ValueError, match="disagree"):
        GGNProduct(ref.model(), Categorical(), Shrinking([(batch[0][:2], batch[1][:2]), batch]))
    GGNProduct(ref.model(), Categorical(), Augmented(), check=False)
    dataset = torch.utils.data.TensorDataset(*batch)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    product = HessianProduct(ref.model(), Categorical(), loader)
    close(product.to_dense(), reference(HessianProduct).to_dense())


def test_vectors_that_do_not_fit():
    product = reference(GGNProduct)
    with pytest.raises(ValueError, match="59"):
        product @ torch.ones(58)
    with pytest.raises(TypeError, match="float64"):
        product @ torch.ones(59, dtype=torch.float32)
    with pytest.raises(ValueError, match="NaN"):
        product @ torch.full((59,), torch.nan)


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.two(NoBatch.apply(self.one(x)))


class PlainSquares(Squares):
    def forward(self, x):
        return self.two(self.one(x).square())


@pytest.mark.parametrize("kind", [GGNProduct, HessianProduct])
def test_operations_that_fail_in_batches_go_one_by_one(kind):
    model, plain = Squares(), PlainSquares()
    plain.load_state_dict(model.state_dict())
    data = uneven(ref.inputs(), ref.labels())
    vectors = torch.randn(31, 4)
    product = kind(model, Categorical(), data)
    with pytest.warns(UserWarning, match="one by one"):
        found = product @ vectors
    close(found, kind(plain, Categorical(), data) @ vectors)
    close(product @ vectors[:, :1], found[:, :1])  # one vector needs no batch, and warns of nothing


def test_wrong_rules_for_batches_are_seen(monkeypatch):
    product = reference(GGNProduct)
    vectors = torch.randn(product.size, 3)
    expected = product @ vectors
    right = torch.func.vmap
    monkeypatch.setattr(torch.func, "vmap", lambda f: lambda v: tuple(1.001 * t for t in right(f)(v)))
    with pytest.warns(UserWarning, match="a wrong product"):
        close(product @ vectors, expected)


def test_operations_without_second_derivative_are_refused(unchanged):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    class Negative(torch.autograd.Function):
        """Its backward pass cuts the graph."""

        @staticmethod
        def forward(ctx, x):
            return -x

        @staticmethod
        def backward(ctx, g):
            return -g.detach()

    class Distances(nn.Linear):
        def forward(self, x):
            return torch.cdist(x, self.weight)

    once, negative = (Model(lambda m, x, f=f: f.apply(m.layer(x)), layer=nn.Linear(3, 3)) for f in (Once, Negative))
    for model in (once, negative, Distances(3, 3, bias=False)):
        for kind in PRODUCTS:
            with unchanged(model), pytest.raises(RuntimeError, match=r"differentiated twice|are wrong"):
                kind(model, Categorical(), uneven(ref.inputs(), ref.labels()))


def test_wrong_second_derivatives_are_refused():
    """That of weight_norm misses the derivative of the norm, which the GGN does not need."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    data = uneven(ref.inputs(), ref.labels())
    GGNProduct(model, Categorical(), data)
    with pytest.raises(RuntimeError, match="are wrong"):
        HessianProduct(model, Categorical(), data)


def test_detached_outputs_are_refused():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="does not depend"):
        GGNProduct(Detached(3, 3), Categorical(), uneven(ref.inputs(), ref.labels())) @ torch.ones(12)
