"""`verify` agrees on every sort of network and fails as soon as the engine is a little wrong somewhere."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from lapkit.curvature import DenseJacobian, Engine, OuterProduct, Parameters, verify
from lapkit.curvature.capture import backprop as backprop_module
from lapkit.curvature.verification import Verification

SOME = [
    *("mlp", "in_place_relu", "residual", "raw_parameters", "conv1d", "conv2d_stride_dilation_groups", "conv3d"),
    *("batch_norm", "layer_and_group_norm_prelu", "time_major", "weight_used_twice", "embedding_and_attention"),
    *("tied_embedding_and_head", "weight_norm", "lstm", "single_output_vector"),
]


@pytest.mark.parametrize("network", SOME, indirect=True)
@pytest.mark.parametrize("examples", [1, 4])
def test_networks_are_verified(network, examples, unchanged):
    model, inputs = network
    x = inputs(examples)
    with unchanged(model):
        found = verify(model, x)
    assert found.passed
    assert set(found.errors) == set(Parameters.of(model).names)
    assert max(found.errors.values()) < 1e-10
    outputs = model(x)[0].numel()
    assert found.compared == min(64, examples * outputs)
    assert str(found).splitlines()[-1].startswith("The captured Jacobian agrees with autograd")


class Moved(nn.Module):
    """Each row of two is sent to one of two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        left = x[:, 0] > 0
        out = x.new_zeros(len(x), 2).index_add(0, left.nonzero()[:, 0], self.one(x[left]))
        return out.index_add(0, (~left).nonzero()[:, 0], self.two(x[~left])).tanh()


class Ragged(nn.Module):
    """Inputs that cannot be cut into examples; outputs of all of them are differentiated together."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, nodes, graph, graphs):
        h = self.one(nodes).tanh()
        return self.two(h.new_zeros(len(graphs), 4).index_add(0, graph, h))


OTHERS = {
    "positions": lambda: (nn.Linear(3, 2), torch.randn(4, 5, 3)),
    "image": lambda: (nn.Conv2d(1, 2, 2), torch.randn(3, 1, 3, 4)),
    "routed": lambda: (Moved(), torch.randn(9, 3)),
    "ragged": lambda: (Ragged(), (torch.randn(6, 3), torch.tensor([0, 1, 1, 0, 2, 1]), torch.zeros(3))),
    "two inputs": lambda: (nn.Bilinear(3, 2, 2), {"input1": torch.randn(4, 3), "input2": torch.randn(4, 2)}),
    "more examples than are studied": lambda: (nn.Sequential(nn.Linear(3, 2), nn.Tanh()), torch.randn(40, 3)),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_forms_of_inputs_and_outputs(case):
    model, x = OTHERS[case]()
    found = verify(model, x, rows=1000)
    assert found.passed
    assert max(found.errors.values()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_has_its_own_tolerance(dtype):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    found = verify(model, torch.randn(6, 4).to(dtype))
    assert found.passed
    assert found.tolerance >= 1e-3


def test_rows_are_spread_over_examples_and_outputs():
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    assert [verify(model, x, rows=r).compared for r in (1, 3, 10, 11)] == [1, 3, 10, 10]
    with pytest.raises(ValueError, match="rows=0"):
        verify(model, x, rows=0)


def test_some_parameters_another_axis_and_another_pass():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 6, 3)
    found = verify(model, x, parameters=Parameters.of(model, ["2"]), output_axis=1, memory_budget=1)
    assert list(found.errors) == ["2.weight", "2.bias"]
    assert found.passed
    found = verify(model, {"x": x}, forward_fn=lambda m, b: m(b["x"])[:, 0].exp())
    assert found.passed
    assert found.compared == 10


def test_what_the_engine_refuses_is_refused():
    with pytest.raises(ValueError, match="other examples in its batch"):
        verify(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False)), torch.randn(6, 3))


# Wrong by a little. The first check of the engine's own, with its coarser net, must let these pass for a fair trial.

MODELS = {
    "linear": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)),
    "convolution": lambda: (
        nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)),
        torch.randn(5, 2, 6),
    ),
    "positions": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 3, 4)),
}


@pytest.fixture
def unchecked(monkeypatch):
    """The engine without its own check of gradients."""
    monkeypatch.setattr(Engine, "_verify", lambda *_: True)


def wrong_rules(monkeypatch, parameter, change):
    """The closed form of one parameter, changed."""
    right = backprop_module.closed_form

    def wrong(site):
        rule = right(site)
        return rule if rule is None or site.use.parameter != parameter else lambda c: change(rule(c))

    monkeypatch.setattr(backprop_module, "closed_form", wrong)


def scaled(jacobian, factor):
    """The same form, times a factor."""
    if isinstance(jacobian, OuterProduct):
        return dataclasses.replace(jacobian, g=factor * jacobian.g)
    return DenseJacobian(factor * jacobian.to_dense())


@pytest.mark.parametrize("factor", [1.01, 1 + 1e-5, 0.99, -1.0, 0.0])
@pytest.mark.parametrize("parameter", ["0.weight", "0.bias"])
@pytest.mark.parametrize("model", MODELS)
def test_a_wrong_rule_is_found(model, parameter, factor, monkeypatch, unchecked):
    network, x = MODELS[model]()
    wrong_rules(monkeypatch, parameter, lambda jacobian: scaled(jacobian, factor))
    found = verify(network, x)
    assert not found.passed
    assert found.errors[parameter] == pytest.approx(abs(factor - 1), rel=1e-6)
    others = [error for name, error in found.errors.items() if name != parameter]
    assert max(others) < 1e-12
    lines = str(found).splitlines()
    assert [line for line in lines if line.endswith("WRONG")] == [line for line in lines if line.startswith(parameter)]
    assert "DIFFERS from" in lines[-1]


@pytest.mark.parametrize("parameter", ["0.weight", "0.bias"])
def test_examples_that_are_mistaken_for_each_other_are_found(parameter, monkeypatch, unchecked):
    network, x = MODELS["linear"]()
    wrong_rules(monkeypatch, parameter, lambda j: DenseJacobian(j.to_dense().flip(1)))
    assert not verify(network, x).passed


def test_outputs_that_are_mistaken_for_each_other_are_found(monkeypatch, unchecked):
    network, x = MODELS["linear"]()
    wrong_rules(monkeypatch, "0.weight", lambda j: DenseJacobian(j.to_dense().flip(0)))
    assert not verify(network, x).passed


def test_a_single_wrong_number_among_many_is_found(monkeypatch, unchecked):
    network, x = MODELS["linear"]()

    def change(jacobian):
        values = jacobian.to_dense().clone()
        values[2, 5, 7] *= 1.001
        return DenseJacobian(values)

    wrong_rules(monkeypatch, "0.weight", change)
    assert not verify(network, x).passed
    assert verify(network, x, rows=1).passed  # which looks at the first row only


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_jacobian_that_is_not_finite_does_not_pass(wrong, monkeypatch, unchecked):
    network, x = MODELS["linear"]()
    wrong_rules(monkeypatch, "0.weight", lambda jacobian: scaled(jacobian, wrong))
    assert not verify(network, x).passed


def test_a_wrong_method_of_the_algebra_is_found(monkeypatch):
    """After the engine's own check, which uses the same method."""
    network, x = MODELS["linear"]()
    right, own_check = OuterProduct.pull_back, Engine._verify

    def check_then_break(self, *others):
        together = own_check(self, *others)
        monkeypatch.setattr(OuterProduct, "pull_back", lambda self, u: 1.01 * right(self, u))
        return together

    monkeypatch.setattr(Engine, "_verify", check_then_break)
    found = verify(network, x)
    assert not found.passed
    assert {name for name, error in found.errors.items() if error > found.tolerance} == {"0.weight", "2.weight"}


def test_the_engines_own_check_comes_first(monkeypatch):
    network, x = MODELS["linear"]()
    wrong_rules(monkeypatch, "0.weight", lambda jacobian: scaled(jacobian, 1.01))
    with pytest.warns(UserWarning, match="one by one"), pytest.raises(RuntimeError, match="does not reproduce"):
        verify(network, x)


def test_a_small_parameter_is_held_to_its_own_scale(monkeypatch, unchecked):
    """Its derivative is a millionth of the others', and half of it is missing."""
    network, x = MODELS["linear"]()
    with torch.no_grad():
        network[2].weight.mul_(1e-4)
    wrong_rules(monkeypatch, "0.bias", lambda jacobian: scaled(jacobian, 0.5))
    found = verify(network, x)
    assert not found.passed
    assert found.errors["0.bias"] == pytest.approx(0.5)


def test_what_is_nothing_but_rounding_is_not_held_against_a_parameter():
    """A bias in front of a softmax over all of it: the derivative is zero but for the last digits."""

    def function(model, x):
        return (model[0](x) - model[0](x).mean(1, keepdim=True)) @ torch.ones(5, 3) + model[1](x)

    model, x = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 3)]), torch.randn(6, 4)
    found = verify(model, x, forward_fn=function)
    assert found.passed


def test_the_verdict_reads_as_one():
    found = Verification({"a": 1e-16, "long.name": 0.5}, 12, 1e-6)
    assert str(found) == (
        "a          1.0e-16\n"
        "long.name  5.0e-01  WRONG\n"
        "The captured Jacobian DIFFERS from autograd on 12 rows (tolerance 1e-06)."
    )
    assert not found.passed
    assert not Verification({"a": math.nan}, 1, 1e-6).passed
    assert Verification({"a": 0.0}, 1, 1e-6).passed
