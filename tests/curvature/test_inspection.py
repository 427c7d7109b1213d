"""The table before a long fit: what it says of each parameter, and that its figures are those of the results."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    Categorical,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Parameters,
    accumulate,
    inspect,
)
from lapkit.curvature.inspection import inspection


class Mixture(nn.Module):
    """One parameter of every sort: looked up, grouped, shared, tied, without a closed form, without effect."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.convolve = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.tied = nn.Linear(8, 8)
        self.centres = nn.Parameter(torch.randn(3, 8))
        self.head = nn.Linear(8, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        h = self.convolve(self.embed(x).mT).mT.contiguous().tanh()
        h = self.tied(self.tied(h).tanh()).tanh().mean(1)
        return self.scale * self.head(h) - torch.cdist(h, self.centres)


def rows(found):
    return {row.name: row for row in found.rows}


@pytest.fixture
def mixture():
    return Mixture(), torch.randint(7, (5, 6))


@pytest.mark.filterwarnings("ignore:Some operation of this model cannot be differentiated")
def test_every_parameter_has_its_form(mixture):
    found = rows(inspection(*mixture))
    forms = {name: (row.shape, row.operations, row.closed_form, row.kronecker) for name, row in found.items()}
    assert forms == {
        "centres": ((3, 8), ("Cdist",), False, "exact"),
        "scale": ((), ("Mul",), True, forms["scale"][3]),
        "embed.weight": ((7, 4), ("Embedding",), True, "diagonal 7 (x) 4"),
        "convolve.weight": ((8, 2, 3), ("Convolution",), True, "2 x (4 (x) 6)"),
        "convolve.bias": ((8,), ("Convolution",), True, "exact"),
        "tied.weight": ((8, 8), ("Addmm", "Addmm"), True, "8 (x) 8"),
        "tied.bias": ((8,), ("Addmm", "Addmm"), True, "exact"),
        "head.weight": ((3, 8), ("Mm",), True, "3 (x) 8"),
    }


@pytest.mark.filterwarnings("ignore:Some operation of this model cannot be differentiated")
def test_the_table_is_printed_and_given_back(mixture, capsys):
    found = inspect(*mixture)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    lines = printed.splitlines()
    assert lines[0] == f"parameters: 8, weights: {Parameters.of(mixture[0]).numel}, outputs: 3, columns: up to 3"
    assert lines[2].split() == ["parameter", "shape", "used", "by", "Jacobian", "Kronecker", "block"]
    body = {line.split()[0]: line for line in lines[3:11]}
    assert set(body) == set(Parameters.of(mixture[0]).names)
    assert "generic (slow)" in body["centres"]
    assert "2 x Addmm" in body["tied.weight"]
    assert "8 x 2 x 3" in body["convolve.weight"]
    assert "scalar" in body["scale"]
    assert [line.split()[0] for line in lines[12:]] == ["structure", "diag", "kron", "blocks", "full"]
    assert all(line == line.rstrip() for line in lines)
    assert {line.index("closed form") for line in body.values() if "closed form" in line} == {
        lines[2].index("Jacobian")
    }


def test_only_exact_blocks_are_called_exact():
    """A layer of one output or one input is a product of two factors all the same, where both act."""
    found = rows(inspection(nn.Sequential(nn.Linear(3, 1), nn.Tanh(), nn.Linear(1, 2)), torch.randn(4, 3)))
    assert [row.kronecker for row in found.values()] == ["1 (x) 3", "exact", "2 (x) 1", "exact"]


def test_looking_without_printing(mixture, capsys):
    model = nn.Linear(3, 2)
    found = inspection(model, torch.randn(4, 3))
    assert str(found).startswith("parameters: 2")
    assert repr(found) == "Inspection(parameters=2, outputs=(2,), columns=2)"  # a notebook shows it below the table
    assert capsys.readouterr().out == ""


def results(model, x, y, **arguments):
    parameters = Parameters.of(model)
    kinds = {"diag": GGNDiagonal, "kron": GGNKronecker, "blocks": GGNBlocks, "full": GGNDense}
    quantities = {name: kind(parameters) for name, kind in kinds.items()}
    accumulate(model, parameters, Categorical(), GGN(), [(x, y)], list(quantities.values()), **arguments)
    return {name: q.result() for name, q in quantities.items()}


def kept(result):
    """Bytes of a result's matrices; what Kronecker factors say in single numbers beside them is left out."""
    matrices = ("value/", "block/", "matrix", "output/", "input/")
    return sum(t.numel() * t.element_size() for key, t in result.tensors.items() if key.startswith(matrices))


class Wide(nn.Module):
    """More weights than an exact block is kept for, used in a way without Kronecker structure."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(30, 40))
        self.head = nn.Linear(40, 3)

    def forward(self, x):
        return self.head((x[:, :, None] * self.shift).sum(1))


MODELS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)),
    "mixture": lambda: (Mixture(), torch.randint(7, (5, 6))),
    "wide": lambda: (Wide(), torch.randn(4, 30)),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)),
        torch.randn(5, 2, 4, 4),
    ),
    "float32": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).float(), torch.randn(6, 4).float()),
    "bfloat16": lambda: (nn.Linear(4, 3).bfloat16(), torch.randn(6, 4).bfloat16()),
    "attention": lambda: (
        nn.Sequential(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Flatten(), nn.Linear(12, 3)),
        torch.randn(4, 3, 4),
    ),
}


@pytest.mark.filterwarnings("ignore:Some operation of this model cannot be differentiated")
@pytest.mark.parametrize("name", MODELS)
def test_memory_is_that_of_the_results(name):
    model, x = MODELS[name]()
    found = inspection(model, x)
    for structure, result in results(model, x, torch.randint(3, (len(x),))).items():
        assert found.memory(structure) == kept(result), structure


def test_the_costs_of_a_network_counted_by_hand():
    """Linear(5, 4) and Linear(4, 3), N = 6: products for each sum of the engine's, for weights and biases."""
    model, x = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 5)
    found = inspection(model, x)
    assert found.forward == 2 * 6 * (5 * 4 + 4 * 3)
    assert (found.columns, found.examples, found.outputs, found.itemsize) == (3, 6, (3,), 8)
    one, two = rows(found)["0.weight"], rows(found)["2.weight"]
    assert one.numbers == {"diag": 20, "kron": 16 + 25, "blocks": 400}
    assert two.numbers == {"diag": 12, "kron": 9 + 16, "blocks": 144}
    # The diagonal is one product of squares, a factor one product of each side, a block one of the outer products.
    assert one.once == {"diag": 6 * 20, "kron": 6 * 25, "blocks": 6 * 400}
    assert one.each_column == {"diag": 6 * 4, "kron": 6 * 16, "blocks": 6 * 16}
    assert two.once == {"diag": 6 * 12, "kron": 6 * 16, "blocks": 6 * 144}
    assert two.each_column == {"diag": 6 * 3, "kron": 6 * 9, "blocks": 6 * 9}
    # A column goes through the last layer only, since nobody wants the derivative in the inputs; so does a gradient.
    assert found.column == 2 * 6 * 4 * 3
    assert found.gradient == 2 * found.forward + found.column
    biases = 6 * 4 + 6 * 3
    diagonal = found.forward + 3 * found.column + 2 * (6 * 32 + 3 * (6 * 7 + biases) + biases)
    assert found.gradients("diag") == pytest.approx(diagonal / found.gradient, rel=0.2)
    assert found.gradients("diag", columns=1) < found.gradients("diag") < found.gradients("diag", columns=9)
    assert found.gradients("full", 2) == pytest.approx(
        (found.forward + 2 * found.column + 2 * 2 * 6 * 39**2) / found.gradient
    )


def test_a_last_layer_needs_no_passes():
    """Its columns are not sent anywhere."""
    model, x = nn.Sequential(nn.Linear(50, 40), nn.Tanh(), nn.Linear(40, 3)), torch.randn(6, 50)
    found = inspection(model, x, parameters=Parameters.of(model, ["2"]))
    assert found.column == 0
    assert found.gradients("diag") < 2


def test_the_costs_of_a_shared_weight_counted_by_hand():
    """Linear(5, 4) at 7 positions, N = 6: the Jacobian of each example and column is written out."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Flatten(), nn.Linear(28, 3))
    shared = rows(inspection(model, torch.randn(6, 7, 5)))["0.weight"]
    assert shared.once == {"diag": 0, "kron": 42 * 25, "blocks": 0}
    assert shared.each_column == {"diag": 42 * 20, "kron": 42 * 16, "blocks": 6 * 400}


def test_costs_are_at_least_those_of_the_passes_and_ordered():
    for name in ("mlp", "convolutions", "attention"):
        found = inspection(*MODELS[name]())
        passes = [found.gradients(structure) for structure in ("diag", "blocks", "full")]
        assert passes == sorted(passes)
        assert found.gradients("kron") >= 1 / 3
        assert passes[0] >= 1 / 3


def test_costs_follow_the_batch():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    small, large = inspection(model, torch.randn(6, 5)), inspection(model, torch.randn(12, 5))
    for structure in ("diag", "kron", "blocks", "full"):
        assert small.memory(structure) == large.memory(structure)
        assert small.gradients(structure) == pytest.approx(large.gradients(structure))


def test_structured_outputs_have_a_column_for_each_number():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1))
    found = inspection(model, torch.randn(2, 1, 4, 5))
    assert (found.outputs, found.columns) == ((20, 3), 60)
    assert "outputs: 20 x 3, columns: up to 60" in str(found)
    axis = inspection(nn.Linear(2, 3), torch.randn(4, 7, 2), output_axis=1)
    assert (axis.outputs, axis.columns) == ((3, 7), 21)


def test_some_of_the_parameters_and_another_forward_pass():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    found = inspection(
        model, {"x": x}, parameters=Parameters.of(model, ["2"]), forward_fn=lambda m, b: m(b["x"])[:, :2]
    )
    assert [row.name for row in found.rows] == ["2.weight", "2.bias"]
    assert found.outputs == (2,)


def test_a_parameter_whose_derivative_is_zero():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    found = rows(inspection(model, torch.randn(6, 4), forward_fn=lambda m, x: m[1](x[:, :3]) + Blind.apply(m[0](x))))
    assert found["0.weight"].kronecker == "always zero"
    assert found["1.weight"].kronecker == "3 (x) 3"
    assert set(found["0.weight"].once.values()) == set(found["0.weight"].each_column.values()) == {0}


class Blind(torch.autograd.Function):
    """Passes nothing back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None


@pytest.mark.parametrize("name", ["mlp", "convolutions", "attention"])
def test_the_model_comes_back_as_it_was(name, unchanged):
    model, x = MODELS[name]()
    model.train()
    next(model.parameters()).requires_grad_(False)
    with unchanged(model):
        inspection(model, x)


def test_errors_are_those_of_the_engine_and_leave_the_model_alone(unchanged):
    norm = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with unchanged(norm), pytest.raises(ValueError, match="other examples in its batch"):
        inspection(norm, torch.randn(6, 4))
    tuples = nn.LSTM(4, 3, batch_first=True)
    with unchanged(tuples), pytest.raises(TypeError, match="it returned tuple"):
        inspection(tuples, torch.randn(6, 2, 4))
    linear = nn.Linear(4, 3)
    with unchanged(linear), pytest.raises(TypeError, match=r"x\.to"):
        inspection(linear, torch.ones(6, 4).long())
    with pytest.raises(ValueError, match="No parameter is selected"):
        inspection(linear.requires_grad_(False), torch.randn(6, 4))
    with pytest.raises(KeyError):
        inspection(linear.requires_grad_(True), torch.randn(6, 4)).memory("dense")


def test_inputs_made_in_inference_mode():
    with torch.inference_mode():
        x = torch.randn(4, 3)
    assert len(inspection(nn.Linear(3, 2), x).rows) == 2


def test_functional_and_wrapped_models():
    weight = nn.Linear(3, 2)
    found = inspection(nn.DataParallel(weight), torch.randn(4, 3))
    assert [row.shape for row in found.rows] == [(2, 3), (2,)]
    found = inspection(weight, torch.randn(4, 3), forward_fn=lambda m, x: F.linear(x, m.weight) * m.bias)
    assert [row.operations for row in found.rows] == [("Mm",), ("Mul",)]
