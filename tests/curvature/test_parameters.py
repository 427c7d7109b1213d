"""One flat order, the choice of parameters, and the last layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from lapkit.curvature import Parameters, last_layer
from lapkit.curvature.inputs import can_be_cut, map_tensors, shapes_of_one, tensors, to_device
from lapkit.curvature.memory import chunk_length, default_budget


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)  # registered first, used last
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.BatchNorm1d(3))
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x):
        return self.head(self.body(x + self.shift))


def test_the_order_is_that_of_the_model():
    net = Net()
    parameters = Parameters.of(net)
    assert parameters.names == tuple(name for name, _ in net.named_parameters())
    assert torch.equal(parameters.vector(), parameters_to_vector(net.parameters()).detach())
    assert parameters.numel == sum(parameters.sizes) == len(parameters.vector())
    assert not parameters.vector().requires_grad
    parameters.vector().zero_()
    assert parameters.vector().abs().sum() > 0  # a copy


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_split_gives_each_parameter_its_shape(shape):
    net = Net()
    parameters = Parameters.of(net)
    vector = torch.randn(*shape, parameters.numel)
    parts = parameters.split(vector)
    assert {name: part.shape for name, part in parts.items()} == {
        name: (*shape, *p.shape) for name, p in net.named_parameters()
    }
    assert torch.equal(torch.cat([part.reshape(*shape, -1) for part in parts.values()], dim=-1), vector)
    with pytest.raises(ValueError, match=f"length {parameters.numel}"):
        parameters.split(vector[..., 1:])


CHOICES = {
    "all": (
        None,
        ["shift", "head.weight", "head.bias", "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"],
    ),
    "a module": (["head"], ["head.weight", "head.bias"]),
    "a deep module": (["body.2"], ["body.2.weight", "body.2.bias"]),
    "a module and a parameter": (["body.2.bias", "head"], ["head.weight", "head.bias", "body.2.bias"]),
    "a scalar": (["shift"], ["shift"]),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice_by_names_keeps_the_models_order(case):
    names, expected = CHOICES[case]
    net = Net()
    order = [name for name, _ in net.named_parameters()]
    assert list(Parameters.of(net, names).names) == sorted(expected, key=order.index)


def test_frozen_parameters_are_left_out():
    net = Net()
    net.body.requires_grad_(False)
    assert Parameters.of(net).names == ("shift", "head.weight", "head.bias")
    with pytest.raises(ValueError, match=r"\['body'\] name no trainable"):
        Parameters.of(net, ["body", "head"])


def test_names_that_pick_nothing():
    with pytest.raises(ValueError, match=r"\['hea', 'body.1'\] name no trainable parameter"):
        Parameters.of(Net(), ["hea", "body.1", "head"])
    with pytest.raises(ValueError, match=r"No parameter is selected.*requires_grad"):
        Parameters.of(Net().requires_grad_(False))
    with pytest.raises(ValueError, match=r"must pair up"):
        Parameters(("a",), ())


def test_tied_parameters_count_once():
    shared = nn.Linear(3, 3)
    assert Parameters.of(nn.Sequential(shared, nn.Tanh(), shared)).numel == 12


def test_finite():
    net = Net()
    Parameters.of(net).check_finite()
    with torch.no_grad():
        net.body[0].weight[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"\['body.0.weight'\].*diverged"):
        Parameters.of(net).check_finite()
    Parameters.of(net, ["head"]).check_finite()


def last(net, x):
    return last_layer(net(x), Parameters.of(net)).names


def test_last_layer():
    x = torch.randn(4, 4)
    assert last(Net(), x) == ("head.weight", "head.bias")
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.LogSoftmax(1))
    assert last(plain, x) == ("2.weight", "2.bias")
    plain[2].weight.requires_grad_(False)
    assert last(plain, x) == ("2.bias",)
    plain[2].bias.requires_grad_(False)
    assert last(plain, x) == ("0.weight", "0.bias")


def test_last_layer_without_a_bias_and_through_a_reshape():
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 6, bias=False), nn.Unflatten(1, (2, 3)), nn.Flatten())
    assert last(net, torch.randn(4, 4)) == ("2.weight",)


def test_last_layer_that_is_no_module():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(4, 3)
            self.weight = nn.Parameter(torch.randn(3, 2))

        def forward(self, x):
            return self.one(x).tanh() @ self.weight

    assert last(Raw(), torch.randn(4, 4)) == ("weight",)


def test_last_layer_of_an_output_without_parameters():
    net = Net()
    with pytest.raises(ValueError, match=r"None of the trainable|does not depend"):
        last_layer(torch.ones(2, requires_grad=True) * 2, Parameters.of(net))


class Pair(tuple):
    __slots__ = ()

    def __new__(cls, a, b):
        return super().__new__(cls, (a, b))


def test_inputs_of_any_structure():
    x, y = torch.randn(4, 3), torch.tensor(2.0)
    nested = {"a": [x, "text"], "b": (y, {"c": None}), "d": Pair(x, y)}
    doubled = map_tensors(lambda t: 2 * t, nested)
    assert torch.equal(doubled["a"][0], 2 * x)
    assert doubled["a"][1] == "text"
    assert float(doubled["b"][0]) == 4
    assert type(doubled["d"]) is Pair
    assert [t.shape for t in tensors(nested)] == [(4, 3), (), (4, 3), ()]
    assert shapes_of_one(nested, 4) == ((3,), (), (3,), ())
    assert shapes_of_one(nested, 3) == ((4, 3), (), (4, 3), ())
    assert can_be_cut([x, x], 4)
    assert not can_be_cut([x, x], 3)
    assert can_be_cut([x, y], 4)  # a single number belongs to all of them
    assert not can_be_cut([], 4)


def test_tensors_made_under_inference_mode_are_copied():
    with torch.inference_mode():
        x = torch.randn(3)
    moved = to_device({"a": x}, torch.device("cpu"))["a"]
    assert not moved.is_inference()
    assert torch.equal(moved, x)


def test_chunks():
    assert chunk_length(10, 100, 1000) == 10
    assert chunk_length(10, 100, 350) == 3
    assert chunk_length(10, 100, 0) == 1
    assert chunk_length(10, 0, 5) == 5
    assert default_budget(torch.device("cpu")) > 2**20
