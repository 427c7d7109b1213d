"""The first examples of a large batch stand for all of it: read and verified once, refused where they mix."""

import oracles
import pytest
import torch
from torch import nn

from lapkit.curvature import GGN, Categorical, Engine, GGNDense, GGNDiagonal, Parameters, accumulate, borrowed

NETWORKS = [
    *("mlp", "in_place_relu", "residual", "raw_parameters", "conv1d", "conv2d_stride_dilation_groups", "conv3d"),
    *("batch_norm", "layer_and_group_norm_prelu", "time_major", "weight_used_twice", "embedding_and_attention"),
    *("tied_embedding_and_head", "weight_norm", "lstm", "single_output_vector"),
]


class Counted(nn.Module):
    """Remembers how many examples every pass had."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        output = self.inner(x)
        self.seen.append(len(output))
        return output


def layers(*between):
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3))


def jacobian_of(model, x):
    """Of every example alone, `(N, C, P)`."""
    weights, rows = list(model.parameters()), []
    for one in x:
        f = model(one[None]).flatten()
        found = [torch.autograd.grad(c, weights, retain_graph=True, materialize_grads=True) for c in f]
        rows.append(torch.stack([torch.cat([part.flatten() for part in g]) for g in found]))
    return torch.stack(rows)


def check(engine, model, x):
    actual = engine.jacobian(x)[1].to_dense().transpose(0, 1)
    torch.testing.assert_close(actual, jacobian_of(model, x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", [(20,), (20, 7, 20, 1, 9), (8, 20), (9, 8), (1, 20), (3, 20), (64, 65)])
@pytest.mark.parametrize("network", NETWORKS, indirect=True)
def test_large_batches_of_every_network(network, sizes):
    model, inputs = network
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        for examples in sizes:
            x = inputs(min(examples, 20))
            check(engine, model, x)


def test_a_pass_is_studied_once():
    model = Counted(layers(nn.Tanh()))
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        engine(torch.randn(20, 4))
        first = list(model.seen)
        assert first[0] == 20
        assert set(first[1:]) == {8}  # the study, which need not look at all examples
        assert len(first) <= 4
        for examples in (20, 20, 9, 8, 3, 70):
            model.seen.clear()
            engine(torch.randn(examples, 4))
            assert model.seen == [examples]


def test_other_kinds_are_studied_for_themselves():
    """A single example, another number of positions and a path of its own are each read once more."""
    model = Counted(layers(nn.Tanh()))
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        for shape in ((20, 4), (20, 6, 4), (20, 5, 4), (1, 4)):
            model.seen.clear()
            engine(torch.randn(*shape))
            assert len(model.seen) > 1, shape
            model.seen.clear()
            engine(torch.randn(*shape))
            assert model.seen == [shape[0]], shape


class ByNumber(nn.Module):
    """Takes another path for large batches."""

    def __init__(self, *, threshold, mixing=False):
        super().__init__()
        self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)
        self.threshold, self.mixing = threshold, mixing

    def forward(self, x):
        h = self.one(x)
        if len(x) <= self.threshold:
            return self.two(h.tanh())
        return self.two((h - h.mean(0)).tanh() if self.mixing else h.tanh().square())


@pytest.mark.parametrize("threshold", [7, 8, 9, 19])
def test_a_graph_that_depends_on_the_number_of_examples(threshold):
    model = ByNumber(threshold=threshold)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        for examples in (20, 8, 9, 20):
            x = torch.randn(examples, 4)
            actual = engine.jacobian(x)[1].to_dense().transpose(0, 1)
            h = (lambda h: h.tanh()) if examples <= threshold else (lambda h: h.tanh().square())
            plain = Plain(model, h)
            torch.testing.assert_close(actual, jacobian_of(plain, x), rtol=1e-9, atol=1e-10)


class Plain(nn.Module):
    def __init__(self, model, between):
        super().__init__()
        self.one, self.two, self.between = model.one, model.two, between

    def forward(self, x):
        return self.two(self.between(self.one(x)))


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


class Neighbours(nn.Module):
    """Adds the example before, so that each acts on another only."""

    def forward(self, x):
        return x + x.roll(1, 0)


class Running(nn.Module):
    def forward(self, x):
        return x.cumsum(0)


class AcrossTheBatch(nn.Module):
    """Attention whose axes were mistaken for each other."""

    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(5, 1)

    def forward(self, x):
        return self.mix(x[:, None], x[:, None], x[:, None])[0][:, 0]


MIXING = [Centred, Neighbours, Running, AcrossTheBatch, lambda: nn.BatchNorm1d(5, track_running_stats=False)]


@pytest.mark.parametrize("make", MIXING)
@pytest.mark.parametrize("examples", [9, 20])
def test_mixing_is_refused_in_large_batches_too(make, examples, unchanged):
    model = layers(make())
    parameters = Parameters.of(model)
    for shape in ((examples, 4),):
        with unchanged(model), borrowed(model, parameters), pytest.raises(ValueError, match="other examples"):
            Engine(model, parameters)(torch.randn(*shape))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.mix, self.two = nn.Linear(4, 5), Centred(), nn.Linear(5, 3)

    def forward(self, x, scale):
        return self.two(self.mix(self.one(x)) * scale)


@pytest.mark.parametrize("given", [tuple, dict, "function"])
@pytest.mark.parametrize("examples", [6, 20])
def test_mixing_of_spread_inputs_is_named(given, examples, unchanged):
    model, x, scale = TwoInputs(), torch.randn(examples, 4), torch.randn(examples, 1)
    batch = {"x": x, "scale": scale} if given is dict else (x, scale)
    function = (lambda m, b: m(b[0], scale=b[1])) if given == "function" else None
    parameters = Parameters.of(model)
    with unchanged(model), borrowed(model, parameters), pytest.raises(ValueError, match=r"module mix \(Centred\)"):
        Engine(model, parameters, forward_fn=function)(batch)


@pytest.mark.parametrize("threshold", [8, 10])
def test_mixing_among_many_only_is_refused(threshold):
    """The first eight do not show it, but their pass is of another kind."""
    model = ByNumber(threshold=threshold, mixing=True)
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        engine(torch.randn(8, 4))
        with pytest.raises(ValueError, match="other examples"):
            engine(torch.randn(20, 4))


class Grouped(nn.Module):
    """Normalises groups of some examples, as devices do that share a batch, written in two ways."""

    def __init__(self, size, *, reshaped):
        super().__init__()
        self.size, self.reshaped = size, reshaped

    def forward(self, x):
        if self.reshaped:
            groups = x.unflatten(0, (-1, self.size))
            return (groups - groups.mean(1, keepdim=True)).flatten(0, 1)
        return torch.cat([part - part.mean(0) for part in x.split(self.size)])


@pytest.mark.parametrize("reshaped", [True, False])
@pytest.mark.parametrize(
    ("examples", "size"), [(4, 2), (8, 2), (8, 4), (16, 2), (16, 4), (16, 8), (20, 5), (20, 10), (12, 4)]
)
def test_mixing_in_groups_is_refused(examples, size, reshaped):
    """Also where half of the batch, which the check moves, is a whole number of groups."""
    model = layers(Grouped(size, reshaped=reshaped))
    parameters = Parameters.of(model)
    with borrowed(model, parameters), pytest.raises((ValueError, RuntimeError), match="example"):
        Engine(model, parameters)(torch.randn(examples, 4))


@pytest.mark.parametrize(("examples", "size"), [(8, 2), (16, 4), (20, 10)])
def test_mixing_of_examples_far_apart_is_refused(examples, size):
    class Far(nn.Module):
        def forward(self, x):
            groups = x.unflatten(0, (size, -1))
            return (groups - groups.mean(0)).flatten(0, 1)

    model = layers(Far())
    parameters = Parameters.of(model)
    with borrowed(model, parameters), pytest.raises((ValueError, RuntimeError), match="example"):
        Engine(model, parameters)(torch.randn(examples, 4))


def test_sums_over_large_batches():
    model, x, y = layers(nn.Tanh()), torch.randn(45, 4), torch.randint(3, (45,))
    parameters = Parameters.of(model)
    quantities = [kind(parameters) for kind in (GGNDiagonal, GGNDense)]
    accumulate(model, parameters, Categorical(), GGN(), [(x[:20], y[:20]), (x[20:], y[20:])], quantities)
    p = model(x).detach().softmax(-1)
    expected = oracles.ggn(jacobian_of(model, x), torch.diag_embed(p) - p[:, :, None] * p[:, None])
    torch.testing.assert_close(quantities[0].result().operator().values, expected.diagonal(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(quantities[1].result().operator().to_dense(), expected, rtol=1e-9, atol=1e-10)
