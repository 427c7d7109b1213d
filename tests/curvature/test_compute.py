"""Everything at once: shared passes, weights of examples, and what batches may be."""

import copy
import itertools
from functools import partial

import pytest
import torch
from compute_cases import EVERYTHING, MERGE, batches, close, data, everything, model, same
from torch import nn

from lapkit.curvature import (
    GGN,
    Categorical,
    EmpiricalFisher,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Gradients,
    GradientSum,
    Parameters,
    PerExample,
    accumulate,
    compute,
)
from lapkit.curvature.capture.backprop import Backprop
from lapkit.curvature.capture.engine import Engine


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 4], [4, 2], [5, 1]])
@pytest.mark.parametrize("options", [{}, {"memory_budget": 1}], ids=["memory", "no memory"])
def test_results_do_not_depend_on_batches_or_the_budget(sizes, options):
    x, y = data()
    found, expected = everything(batches(x, y, sizes), **options), everything([(x, y)])
    for name in EVERYTHING:
        same(found[name], expected[name])
    close(found.totals.loss, expected.totals.loss)


def test_results_do_not_depend_on_the_order_of_examples():
    (x, y), order = data(), torch.tensor([3, 0, 5, 1, 4, 2])
    found, expected = everything([(x[order], y[order])]), everything([(x, y)])
    for name, result in expected.items():
        if name == "gram":
            close(found[name].matrix(), result.matrix()[order][:, order])
        elif isinstance(result, PerExample):
            for key, tensor in result.tensors.items():
                close(found[name].tensors[key], tensor[order])
        else:
            same(found[name], result)


def test_one_forward_and_one_backward_for_equal_columns(monkeypatch):
    """Columns are equal by value, not by identity."""
    forwards, backwards = [], []
    forward, backward = Engine.__call__, Backprop.__call__
    monkeypatch.setattr(Engine, "__call__", lambda self, x: forwards.append(1) or forward(self, x))
    net, (x, y) = model(), data()
    wanted = {
        "one": GGNDiagonal,
        "two": partial(GGNDiagonal, columns=GGN()),
        "three": partial(GGNBlocks, columns=EmpiricalFisher()),
        "four": partial(GGNDense, columns=EmpiricalFisher()),
    }

    def seen():
        yield x, y
        monkeypatch.setattr(Backprop, "__call__", lambda *a, **o: backwards.append(1) or backward(*a, **o))
        yield x, y  # after the first batch, on which the engine verifies itself

    compute(net, Categorical(), seen(), wanted)
    assert (len(forwards), len(backwards)) == (2, 2)


def test_nothing_is_left_on_the_model(unchanged):
    net, (x, y) = model(), data()
    with unchanged(net):
        compute(net, Categorical(), batches(x, y, [2, 4]), EVERYTHING)


def test_a_selection_by_name_or_object():
    net, (x, y) = model(), data()
    by_name = compute(net, Categorical(), [(x, y)], {"d": GGNDiagonal}, parameters=["2"])
    by_object = compute(net, Categorical(), [(x, y)], {"d": GGNDiagonal}, parameters=Parameters.of(net, ["2"]))
    same(by_name["d"], by_object["d"])
    assert by_name["d"].names == ("2.weight", "2.bias")


def test_results_by_parameter_and_layer():
    result = everything([data()])["diagonal"]
    assert {name: tuple(t.shape) for name, t in result.by_layer()["0"].items()} == {"weight": (5, 4), "bias": (5,)}
    close(result.by_layer()["2"]["bias"], result["2.bias"])
    with pytest.raises(KeyError, match=r"No value of a parameter '3.weight'"):
        result["3.weight"]
    with pytest.raises(KeyError, match="No tensors of the sort 'sum'"):
        result.by_layer("sum")


# -- weights of examples


def test_weights_are_repetitions():
    """A curvature is linear in the weight, and so are the loss and the sum of gradients; zero leaves an example out."""
    x, y = data()
    repeats = torch.tensor([2, 0, 1, 3, 1, 0])
    wanted = {
        "ggn": GGNDense,
        "kronecker": GGNKronecker,
        "fisher": partial(GGNDense, columns=EmpiricalFisher()),
        "sum": GradientSum,
    }
    weights = repeats.double()
    batch = [(x[:4], y[:4], weights[:4]), (x[4:], y[4:], weights[4:])]
    found = compute(model(), Categorical(), batch, wanted)
    repeated = compute(
        model(), Categorical(), [(x.repeat_interleave(repeats, 0), y.repeat_interleave(repeats))], wanted
    )
    for name in wanted:
        for key, tensor in repeated[name].tensors.items():
            close(found[name].tensors[key], tensor)
    close(found.totals.loss, repeated.totals.loss)
    assert (found.count, found.totals.weight, repeated.totals.weight) == (6, 7.0, 7)


def test_gradients_are_of_weighted_losses():
    x, y = data()
    w = torch.rand(6)
    plain = everything([(x, y)], {"g": Gradients})["g"].matrix() * w[:, None]
    found = everything([(x, y, w)], EVERYTHING)
    close(found["gradients"].matrix(), plain)
    close(found["norms"].squares(), plain.square().sum(1))
    close(torch.cat([t.flatten() for t in found["moments"].second_moment().values()]), plain.square().mean(0))
    factors = (0.5 / plain[:, :25].norm(dim=1)).clamp_max(1)
    close(found["clipped"]["0.bias"], (factors[:, None] * plain[:, 20:25]).sum(0))


def test_weights_of_one_change_nothing():
    x, y = data()
    for weights in (torch.ones(6), torch.ones(6).half()):
        weighted = everything([(x, y, weights)], EVERYTHING)
        plain = everything([(x, y)])
        for name, result in weighted.items():
            same(result, plain[name])


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (torch.ones(5), ValueError, "Got 5 weights for a batch of 6 examples"),
        (-torch.ones(6), ValueError, "negative, NaN or infinite"),
        (torch.full((6,), float("nan")), ValueError, "negative, NaN or infinite"),
        (torch.ones(6, 1), TypeError, r"length 3 whose last part is torch.float\d\d \(6, 1\)"),
        (torch.ones(6, dtype=torch.int64), TypeError, "length 3 whose last part is torch.int64"),
        ([1.0] * 6, TypeError, "length 3 whose last part is list"),
    ],
)
def test_weights_that_are_none(weights, error, words):
    x, y = data()
    with pytest.raises(error, match=words):
        compute(model(), Categorical(), [(x, y, weights)], {"d": GGNDiagonal})


def test_no_data_no_result():
    with pytest.raises(ValueError, match="no batch"):
        compute(model(), Categorical(), [], {"d": GGNDiagonal})
    for make in EVERYTHING.values():
        with pytest.raises(ValueError, match="No data has been seen"):
            make(Parameters.of(model())).result()


def test_results_do_not_change_when_more_data_come():
    net, (x, y) = model(), data()
    parameters = Parameters.of(net)
    quantities = {name: make(parameters) for name, make in EVERYTHING.items()}
    accumulate(net, parameters, Categorical(), GGN(), [(x, y)], list(quantities.values()))
    before = {name: quantity.result() for name, quantity in quantities.items()}
    copies = {name: {k: t.clone() for k, t in result.tensors.items()} for name, result in before.items()}
    accumulate(net, parameters, Categorical(), GGN(), [(x, y)], list(quantities.values()))
    for name, result in before.items():
        for key, tensor in result.tensors.items():
            assert torch.equal(tensor, copies[name][key])


def test_a_parameter_that_some_batches_do_not_reach():
    """A branch taken by half of the batches: zeros elsewhere, by whatever way."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.one(x) + (0 * self.two(x) if x[0, 0] > 0 else self.two(x))

    net, (x, y) = Branch(), data()
    x = x[x[:, 0].argsort()]
    x[:, 0] = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0])
    wanted = {n: m for n, m in EVERYTHING.items() if n not in ("dots", "sampled", "kronecker")}
    found = compute(net, Categorical(), batches(x, y, [3, 3]), wanted)
    gradients = found["gradients"].matrix()
    assert float(gradients[3:, 15:].abs().max()) == 0
    close(found["norms"].squares(), gradients.square().sum(1))
    close(found["gram"].matrix(), gradients @ gradients.T)
    close(found["mean_dots"].tensors["dot"], gradients @ gradients.mean(0))


def test_loaders_may_use_the_same_memory_for_every_batch():
    x, y = data()

    def overwritten():
        x_memory, y_memory = torch.empty(2, 4), torch.empty(2, dtype=torch.int64)
        for x_part, y_part in batches(x, y, [2, 2, 2]):
            x_memory.copy_(x_part)
            y_memory.copy_(y_part)
            yield x_memory, y_memory

    found, expected = everything(overwritten()), everything([(x, y)])
    for name in EVERYTHING:
        same(found[name], expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_are_summed_in_single_precision(dtype):
    x, y = data(40)
    net = model().to(dtype)
    found = compute(net, Categorical(), batches(x.to(dtype), y, 8), MERGE)
    exact = compute(copy.deepcopy(net).double(), Categorical(), [(x.to(dtype).double(), y)], MERGE)
    for name in set(MERGE) - {"sampled", "clipped"}:
        for key, tensor in found[name].tensors.items():
            if tensor.is_floating_point() and not key.startswith("positions/"):  # a count, in double precision
                expected = exact[name].tensors[key]
                error = (tensor.double() - expected).norm() / expected.norm()
                assert tensor.dtype == torch.float32
                assert error < (1e-5 if dtype == torch.float32 else 5e-2), (name, key)


def test_any_combination_gives_what_each_alone_gives():
    whole = everything([data()])
    for pair in itertools.combinations(["dense", "fisher", "moments", "clipped", "sampled"], 2):
        found = everything([data()], {name: EVERYTHING[name] for name in pair})
        for name in pair:
            same(found[name], whole[name])
