"""What Hessian backpropagation refuses, by which name and with which remedy; and what its results can do."""

import pytest
import torch
from torch import nn

from lapkit.curvature import (
    BlockDiagonal,
    Categorical,
    CurvatureBlocks,
    Gaussian,
    Parameters,
    Residual,
    hessian_blocks,
    hessian_products,
    kfra,
)
from lapkit.curvature.hessian import hbp_derivatives
from lapkit.curvature.hessian.hbp_derivatives import Derivatives


@pytest.fixture
def data():
    return [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Forward(nn.Module):
    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(self.parts, x)


def two(function):
    return Forward(function, nn.Linear(3, 3), nn.Linear(3, 2))


@pytest.mark.parametrize(
    "function",
    [
        lambda parts, x: parts[1](parts[0](x).tanh()),
        lambda parts, x: parts[1](x + parts[0](x)),
        lambda parts, x: parts[1](parts[0](x)) * 2,
        lambda parts, x: parts[1](parts[0](2 * x)),
    ],
)
def test_networks_that_are_no_chain(function, data, unchanged):
    model = two(function)
    with unchanged(model), pytest.raises(ValueError, match=r"Forward is not sequential.*HessianProduct"):
        hessian_blocks(model, Categorical(), data)
    with pytest.raises(ValueError, match="Forward is not sequential"):
        hessian_products(model, Categorical(), data)
    with pytest.raises(ValueError, match="Forward is not sequential"):
        kfra(model, Categorical(), data)


def test_something_in_place_between_modules(data):
    model = two(lambda parts, x: parts[1](parts[0](x).tanh_()))
    with pytest.raises(ValueError, match=r"Forward computes something else than the chain.*parts.0"):
        hessian_blocks(model, Categorical(), data)


def test_hooks(model, data):
    model[1].register_full_backward_hook(lambda module, received, sent: (2 * received[0],))
    with pytest.raises(ValueError, match="or a hook on one of its modules"):
        hessian_blocks(model, Categorical(), data)


def test_gradients_are_compared_with_autograd(model, data, monkeypatch):
    right = Derivatives.pull_weight
    monkeypatch.setattr(Derivatives, "pull_weight", lambda self, weight, v: 1.01 * right(self, weight, v))
    with pytest.raises(RuntimeError, match="is not autograd's"):
        hessian_blocks(model, Categorical(), data)


def test_forward_derivatives_are_compared_with_backward_ones(model, data, monkeypatch):
    right = hbp_derivatives._directional
    monkeypatch.setattr(hbp_derivatives, "_directional", lambda f, at, u: 1.01 * right(f, at, u))
    with pytest.raises(RuntimeError, match=r"module '0' \(Linear\) contradict each other"):
        hessian_blocks(model, Categorical(), data)


def test_weights_used_twice(data):
    shared = nn.Linear(3, 3)
    for model in (
        nn.Sequential(shared, nn.Tanh(), shared),
        nn.Sequential(shared, nn.Tanh(), Residual(shared)),
        nn.Sequential(Residual(shared, nn.Tanh(), shared), nn.Linear(3, 2)),
    ):
        with pytest.raises(ValueError, match=r"'0(.inner.0)?.weight' is used by several modules"):
            hessian_blocks(model, Categorical(), data)
    tied = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="used by several modules"):
        hessian_blocks(tied, Categorical(), data)


def test_modules_without_weights_may_be_used_twice(data):
    act = nn.Tanh()
    hessian_blocks(nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act, nn.Linear(3, 2)), Categorical(), data)


def test_weights_that_are_never_used(model, data):
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match=r"No module of the chain uses parameter 'spare'"):
        hessian_blocks(model, Categorical(), data)


def test_examples_that_mix(data):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="changes with the other examples"):
        hessian_blocks(model, Categorical(), data)


def test_pch_of_modules_not_linear_in_their_weights(data):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x * self.log_scale.exp()

    model = nn.Sequential(Scale(), nn.Linear(3, 2))
    for averaging in (None, "outer", "inner"):
        with pytest.raises(ValueError, match=r"Scale is not linear in its parameter '0.log_scale'"):
            hessian_blocks(model, Categorical(), data, mode="pch-abs", averaging=averaging)
    hessian_blocks(model, Categorical(), data)
    hessian_blocks(model, Categorical(), data, mode="ggn")


def test_second_derivatives_in_weights_are_kept_in_averages():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.w.square()

    model, data = nn.Sequential(Square()), [(torch.randn(1, 3), torch.randn(1, 3))]
    exact = hessian_blocks(model, Gaussian(), data).to_dense()
    for averaging in ("outer", "inner"):
        averaged = hessian_blocks(model, Gaussian(), data, averaging=averaging).to_dense()
        torch.testing.assert_close(averaged, exact)
    assert not torch.allclose(exact, hessian_blocks(model, Gaussian(), data, mode="ggn").to_dense())


def test_names(model, data):
    with pytest.raises(ValueError, match=r"Unknown mode 'gn'.*pch-abs"):
        hessian_blocks(model, Categorical(), data, mode="gn")
    with pytest.raises(ValueError, match=r"Unknown averaging 'both'.*inner"):
        hessian_blocks(model, Categorical(), data, averaging="both")
    with pytest.raises(ValueError, match=r"names \['1.weight'\]"):
        hessian_blocks(model, Categorical(), data, sub_blocks={"1.weight": 2})
    for wrong in (0, {"0.weight": -1}):
        with pytest.raises(ValueError, match="at least one block"):
            hessian_blocks(model, Categorical(), data, sub_blocks=wrong)


def test_data(model, data):
    (x, y) = data[0]
    for compute in (hessian_blocks, hessian_products, kfra):
        with pytest.raises(ValueError, match="data is empty"):
            compute(model, Categorical(), [])
        with pytest.raises(ValueError, match=r"labels must lie in"):
            compute(model, Categorical(), [(x, y + 5)])
    with pytest.raises(ValueError, match="used up after the first time"):
        hessian_products(model, Categorical(), iter(data))
    with pytest.raises(ValueError, match="used up after the first time"):
        hessian_blocks(model, Categorical(), iter(data), averaging="outer")
    hessian_blocks(model, Categorical(), iter(data))
    with pytest.raises(ValueError, match="equal weight"):
        hessian_blocks(model, Categorical(), [(x, y, torch.ones(4))], averaging="inner")
    with pytest.raises(ValueError, match="1 weights for a batch of 4"):
        hessian_blocks(model, Categorical(), [(x, y, torch.ones(1))])


def test_data_that_changes(model):
    class Noisy:
        def __iter__(self):
            yield torch.randn(4, 3), torch.tensor([0, 1, 1, 0])

    with pytest.raises(ValueError, match="passes over the data disagree"):
        hessian_blocks(model, Categorical(), Noisy(), averaging="outer")
    with pytest.raises(ValueError, match="passes over the data disagree"):
        hessian_products(model, Categorical(), Noisy(), memory_budget=1)


def test_memory(model, data):
    with pytest.raises(ValueError, match=r"Dense blocks would take .* GiB, most of it for '0.weight'"):
        hessian_blocks(model, Categorical(), data, memory_budget=100)
    wide = nn.Sequential(nn.Linear(3, 2), nn.ZeroPad1d((0, 200)), nn.Tanh(), nn.Linear(202, 2))
    chosen = Parameters.of(wide, ["0"])
    for compute in (hessian_blocks, kfra):
        with pytest.raises(ValueError, match=r"up to 202 values, so that its Hessian takes 0.00 GiB"):
            compute(wide, Categorical(), data, parameters=chosen, memory_budget=50_000)


def test_products_of_weights_that_have_changed(model, data):
    products = hessian_products(model, Categorical(), data)
    vector = torch.randn(products.size)
    products.matmul(vector)
    with torch.no_grad():
        model[0].bias.add_(1)
    with pytest.raises(RuntimeError, match="weights have changed"):
        products.matmul(vector)
    with pytest.raises(ValueError, match="Expected a vector"):
        products.matmul(vector[:-1])


def test_models_are_given_back(model, data, unchanged):
    model.train()
    for compute in (hessian_blocks, kfra):
        with unchanged(model):
            compute(model, Categorical(), data)
    with unchanged(model):
        products = hessian_products(model, Categorical(), data)
        products.matmul(torch.ones(products.size))


def test_results(model, data, tmp_path):
    (x, y) = data[0]
    one, two, both = (
        hessian_blocks(model, Categorical(), part, mode="pch-abs", sub_blocks=2)
        for part in ([(x[:1], y[:1])], [(x[1:], y[1:])], data)
    )
    total = one + two
    assert total.count == both.count == 4
    torch.testing.assert_close(total.to_dense(), both.to_dense())
    operator = both.operator()
    assert isinstance(operator, BlockDiagonal)
    torch.testing.assert_close(operator.to_dense(), both.to_dense())
    torch.testing.assert_close(both.diagonal(), both.to_dense().diagonal())
    vectors = torch.randn(operator.size, 2)
    torch.testing.assert_close(both.matmul(vectors), both.to_dense() @ vectors)
    with pytest.raises(ValueError, match="Expected a vector"):
        both.matmul(vectors[:3])
    both.save(tmp_path / "blocks.safetensors")
    loaded = CurvatureBlocks.load(tmp_path / "blocks.safetensors")
    assert torch.equal(loaded.to_dense(), both.to_dense())
    assert both.to(dtype=torch.float32).to_dense().dtype == torch.float32
    hessian = hessian_blocks(model, Categorical(), data)
    assert hessian["0.weight"].shape == (12, 12)
    with pytest.raises(ValueError, match="negative eigenvalues"):
        hessian.operator()
    with pytest.raises(ValueError, match="do not add up"):
        hessian + both


def test_single_precision(model, data):
    wanted = hessian_blocks(model, Categorical(), data, mode="pch-clip").to_dense()
    small = model.float()
    (x, y) = data[0]
    found = hessian_blocks(small, Categorical(), [(x.float(), y)], mode="pch-clip").to_dense()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
