"""Models inside of wrappers, recomputed, in mixed precision, one example: the numbers are those of the plain model."""

import contextlib
import copy

import oracles
import pytest
import torch
from fitting import fit
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.utils.checkpoint import checkpoint

from lapkit.curvature import (
    GGN,
    Categorical,
    Engine,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Parameters,
    accumulate,
    borrowed,
    inspect,
    verify,
)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()


def dense(model, x, **arguments):
    """The Jacobian `(N, C, P)`."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        return Engine(model, parameters, **arguments).jacobian(x)[1].to_dense().transpose(0, 1)


def fit_halves(model, x, y, *kinds):
    return fit(model, [(x[:4], y[:4]), (x[4:], y[4:])], *kinds)


@pytest.fixture
def data():
    return torch.randn(7, 4), torch.randint(3, (7,))


def compiled(model, _):
    return torch.compile(model, backend="eager")


def compiled_in_place(model, _):
    model.compile(backend="eager")
    return model


def compiled_layer(model, _):
    """By a backend whose graphs are opaque to the tape, as those of the default one are."""
    model[0] = torch.compile(model[0], backend="aot_eager")
    return model


def layer_compiled_in_place(model, _):
    model[3].compile(backend="eager")
    return model


def parallel(model, _):
    return nn.DataParallel(model)


def distributed(model, _):
    return nn.parallel.DistributedDataParallel(model)


def compiled_and_distributed(model, _):
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager")


def distributed_and_compiled(model, _):
    return nn.parallel.DistributedDataParallel(torch.compile(model, backend="eager"))


WRAPPERS = [compiled, compiled_in_place, compiled_layer, layer_compiled_in_place, parallel]
DISTRIBUTED = [distributed, compiled_and_distributed, distributed_and_compiled]


@pytest.fixture(params=[*WRAPPERS, *DISTRIBUTED], ids=lambda w: w.__name__)
def wrapped(request, tmp_path):
    """A plain model, and a wrapped copy of it."""
    plain = network()
    group = request.param in DISTRIBUTED
    if group:
        init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield plain, request.param(copy.deepcopy(plain), None)
    finally:
        if group:
            destroy_process_group()
        torch.compiler.reset()


def test_wrapped_models(wrapped, data, unchanged):
    plain, model = wrapped
    x, y = data
    with unchanged(model):
        close(dense(model, x), oracles.jacobian(plain, x))
        one, other = (fit_halves(m, x, y, GGNDiagonal, GGNDense, GGNKronecker) for m in (plain, model))
    for expected, actual in zip(one, other, strict=True):
        close(actual.operator().to_dense(), expected.operator().to_dense())


def test_wrapped_models_after_they_have_been_run(wrapped, data):
    """Something is compiled by then."""
    plain, model = wrapped
    x, _ = data
    model(x).sum().backward()
    model.zero_grad()
    close(dense(model, x), oracles.jacobian(plain, x))
    torch.testing.assert_close(model(x), plain(x))


def test_wrapped_models_are_looked_at_and_verified(wrapped, data):
    _, model = wrapped
    assert verify(model, data[0]).passed
    assert all(row.closed_form for row in inspect(model, data[0]).rows)


def test_a_second_fit_adds_to_the_first(wrapped, data):
    """Names of parameters are those of the model that is given, wrapper or not, and stay the same."""
    _, model = wrapped
    x, y = data
    parameters = Parameters.of(model)
    quantity = GGNDiagonal(parameters)
    for _ in range(2):
        accumulate(model, parameters, Categorical(), GGN(), [(x, y)], [quantity])
    first, second = (fit_halves(model, x, y, GGNDiagonal)[0] for _ in range(2))
    close((first + second).operator().values, quantity.result().operator().values)
    assert Parameters.of(model).names == parameters.names


def test_names_do_not_depend_on_the_wrapper(wrapped, data):
    """So that a selection by name, and results that were saved, stay valid when a model is compiled."""
    plain, model = wrapped
    inside = [name for name in model.state_dict() if name.startswith("0._orig_mod")]
    if inside:
        pytest.skip("a compiled layer is a module of the user's model, with a name of its own")
    assert Parameters.of(model).names == Parameters.of(plain).names
    chosen = Parameters.of(model, ["3"])
    assert chosen.numel == 18
    both = fit_halves(model, *data, GGNDiagonal)[0] + fit_halves(plain, *data, GGNDiagonal)[0]
    assert both.count == 14


def test_the_parameters_of_the_module_inside_do_as_well(data):
    plain = network()
    model = torch.compile(plain, backend="eager")
    parameters = Parameters.of(plain, ["3"])
    with borrowed(model, parameters):
        actual = Engine(model, parameters).jacobian(data[0])[1].to_dense().transpose(0, 1)
    close(actual, oracles.jacobian(plain, data[0], ["3.weight", "3.bias"]))
    torch.compiler.reset()


class Recomputed(nn.Module):
    """What lies between the two ends is thrown away and computed again on the way back."""

    def __init__(self, *, reentrant, recompute=True):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 5), network_inside(), nn.Linear(5, 3)
        self.reentrant, self.recompute = reentrant, recompute

    def forward(self, x):
        h = self.first(x)
        h = checkpoint(self.inner, h, use_reentrant=self.reentrant) if self.recompute else self.inner(h)
        return self.last(h)


def network_inside():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 5), nn.Tanh())


def test_recomputed_activations(data):
    model = Recomputed(reentrant=False)
    x, y = data
    plain = copy.deepcopy(model)
    plain.recompute = False
    expected = oracles.jacobian(plain, x)
    close(dense(model, x), expected)
    close(dense(model, x, memory_budget=1), expected)
    for one, other in zip(
        *(fit_halves(m, x, y, GGNDiagonal, GGNDense, GGNKronecker) for m in (model, plain)), strict=True
    ):
        close(one.operator().to_dense(), other.operator().to_dense())


def test_weights_hidden_by_reentrant_recomputation_are_refused_by_name(data, unchanged):
    """Their operations are not on the tape at all."""
    model = Recomputed(reentrant=True)
    with unchanged(model), pytest.raises((ValueError, RuntimeError), match="use_reentrant"):
        dense(model, data[0])


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # torch, where the first is frozen
@pytest.mark.parametrize("names", [["last"], ["first", "last"]])
def test_weights_outside_of_reentrant_recomputation(names, data):
    """Behind it they are exact; before it torch refuses, with words of its own."""
    model = Recomputed(reentrant=True)
    parameters = Parameters.of(model, names)
    plain = copy.deepcopy(model)
    plain.recompute = False
    with borrowed(model, parameters):
        if "first" in names:
            with pytest.raises((ValueError, RuntimeError), match="use_reentrant"):
                Engine(model, parameters).jacobian(data[0])
        else:
            jacobian = Engine(model, parameters).jacobian(data[0])[1]
            expected = oracles.jacobian(plain, data[0], [f"{n}.{k}" for n in names for k in ("weight", "bias")])
            close(jacobian.to_dense().transpose(0, 1), expected)


# Batch norm over bfloat16 inputs with float32 weights has no batched backward in torch.
@pytest.mark.filterwarnings("ignore:Some operation of this model")
def test_mixed_precision(data):
    """The forward pass in bfloat16 by autocast around the whole call: weights in float32, numbers as exact as that."""
    model, x = network().float(), data[0].float()
    expected = oracles.jacobian(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = dense(model, x)
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.03 * expected.norm()
    assert (actual - expected).norm() > 1e-5 * expected.norm()  # it was indeed run in bfloat16
    plain = dense(model, x)
    assert (plain - expected).norm() < 1e-5 * expected.norm()


# Batch norm over bfloat16 inputs with float32 weights has no batched backward in torch.
@pytest.mark.filterwarnings("ignore:Some operation of this model")
def test_sums_in_mixed_precision(data):
    model, (x, y) = network().float(), data
    results = []
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with context:
            results.append([r.operator() for r in fit_halves(model, x.float(), y, GGNDiagonal, GGNKronecker, GGNDense)])
    for exact, coarse in zip(*results, strict=True):
        exact, coarse = exact.to_dense(), coarse.to_dense()
        assert coarse.dtype == torch.float32
        assert (coarse - exact).norm() < 0.05 * exact.norm()


def test_sums_over_many_batches_in_mixed_precision_do_not_stall():
    """In bfloat16 a sum of equal terms stops growing at 256 of them."""
    model, x, y = nn.Linear(4, 3).float(), torch.randn(2, 4).float(), torch.randint(3, (2,))
    parameters = Parameters.of(model)
    found = []
    for batches in (1, 300):
        quantities = [GGNDiagonal(parameters), GGNKronecker(parameters)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            accumulate(model, parameters, Categorical(), GGN(), [(x, y)] * batches, quantities)
        found.append((quantities[0].result().operator().values, quantities[1].result().factors("weight")[0]))
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, 300 * one, rtol=1e-4, atol=1e-6)


def test_inputs_made_in_inference_mode(data):
    model = network()
    with torch.inference_mode():
        x, y = data[0].clone(), data[1].clone()
        inside = fit_halves(model, x, y, GGNDense)[0]
    outside = fit_halves(model, x, y, GGNDense)[0]
    expected = fit_halves(model, *data, GGNDense)[0]
    assert torch.equal(inside.operator().to_dense(), expected.operator().to_dense())
    assert torch.equal(outside.operator().to_dense(), expected.operator().to_dense())
    close(dense(model, x), oracles.jacobian(model, data[0]))


def test_one_example_in_every_wrapper(wrapped, data):
    plain, model = wrapped
    for x in (data[0][:1], data[0], data[0][1:2]):
        close(dense(model, x), oracles.jacobian(plain, x))


def test_batches_of_one_example_add_up(data):
    model = network()
    x, y = data
    parameters = Parameters.of(model)
    results = []
    for size in (1, 3, 7):
        quantities = [kind(parameters) for kind in (GGNDiagonal, GGNDense, GGNKronecker)]
        accumulate(model, parameters, Categorical(), GGN(), zip(x.split(size), y.split(size), strict=True), quantities)
        results.append([q.result().operator().to_dense() for q in quantities])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            close(actual, expected)
