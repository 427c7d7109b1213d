"""The engine against plain autograd, one example and one output at a time, over the networks of networks.contract."""

import re
import warnings

import oracles
import pytest
import torch
from networks.registry import Model
from torch import nn

from lapkit.curvature import Engine, OuterProduct, Parameters, borrowed
from lapkit.curvature.capture import backprop as backprop_module
from lapkit.curvature.capture import internals


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def dense(engine, x):
    """The engine's Jacobian, (N, C, P)."""
    return engine.jacobian(x)[1].to_dense().transpose(0, 1)


def test_the_slow_jacobian_is_the_oracle(slow_jacobian):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 3)
    close(slow_jacobian(model, x), oracles.jacobian(model, x))


def test_jacobian_of_every_network_also_through_the_cache(network, slow_jacobian):
    model, inputs = network
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        for examples in (4, 3, 1, 5):
            x = inputs(examples)
            f, jacobian = engine.jacobian(x)
            expected = slow_jacobian(model, x)
            close(f, model(x).detach().reshape(expected.shape[:2]))
            close(jacobian.to_dense().transpose(0, 1), expected)


def test_a_single_example_first(network, slow_jacobian):
    model, inputs = network
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        for examples in (1, 4):
            x = inputs(examples)
            close(dense(engine, x), slow_jacobian(model, x))


def test_jacobian_without_private_names_of_torch(network, slow_jacobian, monkeypatch):
    monkeypatch.setattr(internals, "CAN_UNBATCH", False)
    model, inputs = network
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        x = inputs(3)
        close(dense(Engine(model, parameters), x), slow_jacobian(model, x))


def test_jacobian_of_some_of_the_parameters(slow_jacobian):
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(4, 3)
    full = slow_jacobian(model, x)
    for names, columns in {("2",): slice(16, 41), ("0.bias", "4"): [*range(12, 16), *range(41, 53)]}.items():
        parameters = Parameters.of(model, names)
        with borrowed(model, parameters):
            close(dense(Engine(model, parameters), x), full[..., columns])


def test_sequential_columns_and_small_budgets_change_nothing(network):
    model, inputs = network
    parameters = Parameters.of(model)
    x = inputs(4)
    with borrowed(model, parameters):
        expected = dense(Engine(model, parameters), x)
        close(dense(Engine(model, parameters, memory_budget=1), x), expected)
        backprop = Engine(model, parameters)(x)
        backprop.may_batch = False
        close(backprop.jacobian().to_dense().transpose(0, 1), expected)


def test_vmapped_columns_through_convolutions(network):
    """Which the planner does not choose on a CPU, but does elsewhere."""
    model, inputs = network
    parameters = Parameters.of(model)
    x = inputs(3)
    with borrowed(model, parameters):
        backprop = Engine(model, parameters)(x)
        expected = backprop.jacobian().to_dense()
        parts = {}
        outputs = backprop.output.shape[1]
        columns = torch.eye(outputs)[:, None, :].expand(outputs, 3, outputs)
        backprop(columns, parts.__setitem__, backprop_module.Plan(together=True, chunk=2), whole=True)
    close(torch.cat([parts[name].to_dense() for name in parameters.names], dim=-1), expected)


LAYERS_WITH_FACTORS = {  # networks whose every weight matrix or kernel must keep its factored form
    "mlp": 3,
    "conv1d": 2,
    "conv2d_stride_dilation_groups": 2,
    "conv2d_depthwise_same": 2,
    "conv3d": 2,
    "sequence_pooled": 2,
    "time_major": 2,
    "examples_in_the_middle": 2,
    "transposed_views": 8,
    "raw_parameters": 2,
    "weight_used_twice": 2,
    "transformer_layer": 5,
    "lstm": 3,
}


@pytest.mark.parametrize("network", LAYERS_WITH_FACTORS, indirect=True)
@pytest.mark.parametrize("examples", [1, 4])
def test_weights_are_kept_factored(network, examples, request):
    model, inputs = network
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        _, jacobian = Engine(model, parameters).jacobian(inputs(examples))
    factored = [name for name, p in zip(parameters.names, jacobian.parts, strict=True) if isinstance(p, OuterProduct)]
    assert len(factored) == LAYERS_WITH_FACTORS[request.node.callspec.params["network"]], factored


def same_order(m, x):
    """Rows sorted by their first entry, as sequences are sorted by length, and put back at the end."""
    order = x[:, 0].argsort()
    return m.two(m.one(x[order]).tanh())[order.argsort()]


def routed(m, x):
    """Each row is sent to one of two experts; one of them may receive nothing."""
    left = x[:, 0] > 0
    out = torch.zeros(len(x), 2).index_add(0, left.nonzero()[:, 0], m.one(x[left]))
    return out.index_add(0, (~left).nonzero()[:, 0], m.two(x[~left]))


def twice(m, x):
    """Two rows an example, which may arrive in any order."""
    order = x[:, 0].repeat(2).argsort()
    rows = m.two(m.one(torch.cat([x, x.flip(1)])[order]).tanh())
    return rows[order.argsort()].unflatten(0, (2, -1)).sum(0)


def time_major(m, x):
    return m.two(m.one(x.transpose(0, 1)).tanh().sum(0))


def rectified(m, x):
    return m.two(m.one(x.transpose(0, 1)).relu().sum(0))


def filled_with_ones(model):
    for p in model.parameters():
        nn.init.ones_(p)
    nn.init.zeros_(model.one.bias)
    return model


def middle(m, x):
    """Rows (S, N, T), of which S and T change places from one batch to the next."""
    return m.two(m.one(x.transpose(0, 1)).tanh().sum((0, 2)))


def table(*rows):
    return torch.tensor(rows, dtype=torch.float64)


ROUTES = {
    "sorted rows": (
        lambda: Model(same_order, one=nn.Linear(2, 3), two=nn.Linear(3, 2)),
        [table([1, 2], [2, 1], [3, 1], [4, 2]), table([3, 2], [2, 1], [1, 1], [4, 2])],
    ),
    "experts": (
        lambda: Model(routed, one=nn.Linear(2, 2), two=nn.Linear(2, 2)),
        [
            table([1, 2], [2, 1], [3, 1], [-4, 2]),
            table([1, 2], [-2, 1], [-3, 1], [4, 2]),
            table([1, 1]),
            table([-1, 2]),
        ],
    ),
    "two rows an example": (
        lambda: Model(twice, one=nn.Linear(2, 3), two=nn.Linear(3, 2)),
        [table([1, 2], [2, 3], [3, 1]), table([3, 2], [2, 1], [1, 1])],
    ),
    "sequences of length one first": (
        lambda: Model(time_major, one=nn.Linear(2, 3), two=nn.Linear(3, 2)),
        [torch.ones(4, 1, 2).double(), torch.arange(24.0).double().reshape(4, 3, 2).sin()],
    ),
    "a batch without any gradient first": (
        lambda: filled_with_ones(Model(rectified, one=nn.Linear(2, 3), two=nn.Linear(3, 2))),
        [-torch.ones(2, 3, 2).double(), torch.arange(12.0).double().reshape(2, 3, 2)],
    ),
    "blocks, rounds and both": (
        lambda: Model(middle, one=nn.Linear(2, 3), two=nn.Linear(3, 2)),
        [
            torch.arange(48.0).double().reshape(2, *shape, 2).sin()
            for shape in ((1, 12), (2, 6), (3, 4), (6, 2), (12, 1))
        ],
    ),
}


@pytest.mark.parametrize("route", ROUTES)
def test_what_was_learned_from_one_batch_is_not_trusted_where_data_moves_examples(route, slow_jacobian):
    build, batches = ROUTES[route]
    model = build()
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        for x in batches:
            close(dense(engine, x), slow_jacobian(model, x))


def test_padded_sequences_through_a_transformer(slow_jacobian):
    """Without a graph this module takes a fused path, whose padded positions differ; the engine must not see it."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 1)
    forward = lambda m, x: m.two(m.one(x, src_key_padding_mask=x[:, :, 0] > 1).mean(1))  # noqa: E731
    model, x = Model(forward, one=encoder, two=nn.Linear(4, 2)), torch.randn(4, 5, 4)
    x[:, :, 0] = 0.0
    x[0, -2:, 0] = x[3, -1:, 0] = 2.0
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        close(dense(Engine(model, parameters), x), slow_jacobian(model, x))


def test_dictionaries_and_tuples_as_inputs():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            first, second = (x["a"], x["b"][0]) if isinstance(x, dict) else x
            return self.layer(first) * second

    model = TwoInputs()
    parameters = Parameters.of(model)
    a, b = torch.randn(4, 3), torch.randn(4, 1)
    expected = oracles.jacobian(
        Model(lambda m, z: m.layer(z[:, :3]) * z[:, 3:], layer=model.layer), torch.cat([a, b], 1)
    )
    with borrowed(model, parameters):
        close(dense(Engine(model, parameters), {"a": a, "b": (b, "a label")}), expected)
        close(dense(Engine(model, parameters), (a, b)), expected)


def test_a_deep_network_does_not_exceed_the_recursion_limit():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(600)]).requires_grad_(False)
    for layer in model:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    model[0].requires_grad_(True)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        close(dense(Engine(model, parameters), table([2], [3])), table([2, 1], [3, 1])[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", ["mlp", "time_major", "conv2d_circular", "lstm", "raw_parameters"], indirect=True)
def test_lower_precision(network, dtype):
    """Sums are kept in float32 at least; what remains is the rounding of weights, activations and cotangents.

    float32: some 1e-7 an operation. bfloat16 has 8 bits, 4e-3 an operation, and more after a few layers.
    """
    model, inputs = network
    x = inputs(4).to(dtype)
    parameters = Parameters.of(model.to(dtype))
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        actual = dense(engine, x)
        dense(engine, x[:3])
    model.to(torch.float64)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        expected = dense(Engine(model, parameters), x.to(torch.float64))
    assert actual.dtype == torch.float32
    assert torch.isfinite(actual).all()
    error = (actual - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 5e-2)


def test_autocast_does_not_raise_a_false_alarm():
    """Half of the pass in bfloat16: the weights are float32, and still only bfloat16 accuracy can be asked for."""

    def forward(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.two(m.one(x).tanh()).float()

    model, x = Model(forward, one=nn.Linear(4, 4), two=nn.Linear(4, 3)).float(), torch.randn(5, 4).float()
    parameters = Parameters.of(model)
    with borrowed(model, parameters), warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = dense(Engine(model, parameters), x)
    plain = Model(lambda m, x: m.two(m.one(x).tanh()), one=model.one, two=model.two).double()
    expected = oracles.jacobian(plain, x.double())
    assert (actual - expected).norm() < 0.05 * expected.norm()


def test_verification_catches_a_wrong_rule(monkeypatch):
    """A closed form that misreads the tape is refused, whichever way the columns go."""
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(4, 3)
    parameters = Parameters.of(model)
    right = backprop_module.closed_form

    def wrong(site):
        rule = right(site)
        if rule is None or site.use.parameter != "0.weight":
            return rule
        return lambda c: OuterProduct(rule(c).a.flip(0), rule(c).g)  # each input goes to another example

    monkeypatch.setattr(backprop_module, "closed_form", wrong)
    with borrowed(model, parameters), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=re.escape("['0.weight'] does not reproduce autograd's gradient")):
            Engine(model, parameters)(x)
