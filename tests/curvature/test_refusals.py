"""What the engine refuses, with what words, and that the model it borrowed comes back bit by bit, error or not."""

import pytest
import torch
from fitting import fit
from networks.registry import Model
from torch import nn

from lapkit.curvature import (
    GGN,
    Categorical,
    Engine,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    MonteCarloGGN,
    Parameters,
    accumulate,
    borrowed,
)


class Centred(nn.Module):
    """Subtracts the mean of the batch, as a hand-written normalisation does."""

    def forward(self, x):
        return x - x.mean(0)


class Running(nn.Module):
    """Sums over the examples before: the later ones do not act on the earlier ones."""

    def forward(self, x):
        return x.cumsum(0)


class Backwards(nn.Module):
    def forward(self, x):
        return x.flip(0).cumsum(0).flip(0)


def between(*middle):
    return nn.Sequential(nn.Linear(4, 3), *middle, nn.Linear(3, 3))


def with_nan():
    model = between(nn.Tanh())
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    return model


def fits(model, x=None, y=None, data=None):
    x = torch.randn(6, 4) if x is None else x
    y = torch.randint(3, (6,)) if y is None else y
    return fit(model, [(x, y)] if data is None else data, GGNDiagonal, GGNBlocks, GGNDense, GGNKronecker)


INPUTS = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])

# name: (model, arguments of `fits`, error, what the message must say)
REFUSALS = {
    "batch norm without running statistics": (
        lambda: between(nn.BatchNorm1d(3, track_running_stats=False)),
        {},
        ValueError,
        r"other examples in its batch.*module 1 \(BatchNorm1d\).*track_running_stats=True",
    ),
    "batch mean": (lambda: between(nn.Tanh(), Centred()), {}, ValueError, r"module 2 \(Centred\)"),
    "sum over earlier examples": (lambda: between(Running()), {}, ValueError, r"module 1 \(Running\)"),
    "sum over later examples": (lambda: between(Backwards()), {}, ValueError, r"module 1 \(Backwards\)"),
    "attention across the batch": (
        lambda: Model(
            lambda m, x: m.head(m.mix(x[:, None], x[:, None], x[:, None])[0][:, 0]),
            mix=nn.MultiheadAttention(4, 1),
            head=nn.Linear(4, 3),
        ),
        {},
        ValueError,
        r"module head \(Linear\)",  # attention returns a tuple, so the next module is the first that shows it
    ),
    "unused parameter": (
        lambda: Model(lambda m, x: m.used(x), used=nn.Linear(4, 3), spare=nn.Linear(4, 3)),
        {},
        ValueError,
        r"never uses .*\['spare.weight', 'spare.bias'\].*requires_grad_\(False\)",
    ),
    "detached output": (
        lambda: Model(lambda m, x: m.layer(x).detach(), layer=nn.Linear(4, 3)),
        {},
        ValueError,
        r"does not depend on .*'layer.weight'.*detached",
    ),
    "computed under no_grad": (
        lambda: Model(torch.no_grad()(lambda m, x: m.layer(x)), layer=nn.Linear(4, 3)),
        {},
        ValueError,
        "no_grad",
    ),
    "NaN weights": (with_nan, {}, ValueError, r"\['2.bias'\] hold NaN"),
    "NaN inputs": (between, {"x": torch.full_like(INPUTS, float("nan"))}, ValueError, "inputs hold NaN or infinite"),
    "infinite inputs": (between, {"x": INPUTS / 0}, ValueError, "inputs hold NaN or infinite"),
    "overflowing outputs": (lambda: between(Model(lambda m, x: x * 1e308 * 1e10)), {}, ValueError, "outputs are NaN"),
    "integer inputs": (between, {"x": INPUTS.long()}, TypeError, r"torch.int64.*x.to\(torch.float64\)"),
    "inputs of another precision": (between, {"x": INPUTS.float()}, TypeError, r"torch.float32.*x.to\(torch.float64\)"),
    "one output at each of several positions": (
        lambda: nn.Sequential(between(), nn.Unflatten(1, (3, 1))),
        {},
        ValueError,
        r"The model has 1 output; classification needs one for each of at least two classes",
    ),
    "no outputs": (lambda: Model(lambda m, x: m.layer(x)[:, :0], layer=nn.Linear(4, 3)), {}, ValueError, r"\(6, 0\)"),
    "a tuple of outputs": (
        lambda: Model(lambda m, x: (m.layer(x), None), layer=nn.Linear(4, 3)),
        {},
        TypeError,
        "returned tuple",
    ),
    "integer outputs": (
        lambda: Model(lambda m, x: m.layer(x).argmax(1), layer=nn.Linear(4, 3)),
        {},
        TypeError,
        "returned torch.int64",
    ),
    "no data": (between, {"data": []}, ValueError, "no batch"),
    "a batch without targets": (between, {"data": [INPUTS]}, TypeError, "Batch 0 of the data is a Tensor"),
    "a batch of three": (
        between,
        {"data": [(INPUTS, LABELS), (INPUTS, LABELS, LABELS)]},
        TypeError,
        "Batch 1 of the data is a tuple of length 3",
    ),
    "ragged targets": (between, {"data": [(INPUTS, [[0], [1, 2]])]}, ValueError, "make no tensor.*pad ragged"),
    "labels out of range": (between, {"y": LABELS + 1}, ValueError, "between 1 and 3.*3 outputs"),
    "an error of the model itself": (between, {"x": INPUTS[:, :3]}, RuntimeError, "shapes cannot be multiplied"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_say_why_and_leave_the_model_alone(case, unchanged):
    build, arguments, error, words = REFUSALS[case]
    model = build()
    with unchanged(model), pytest.raises(error, match=words):
        fits(model, **{"x": INPUTS, "y": LABELS, **arguments})


def test_every_network_comes_back_as_it_was(network, unchanged):
    """Also with some of it in train mode and some of it frozen, and with hooks of the user's own."""
    model, inputs = network
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
        module.register_forward_hook(lambda *_: None)
    weights = list(model.parameters())
    weights[0].requires_grad_(len(weights) == 1)
    weights[-1].register_hook(lambda g: g)
    parameters = Parameters.of(model)
    with unchanged(model), borrowed(model, parameters):
        Engine(model, parameters).jacobian(inputs(3))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_culprit_is_found_behind_modules_that_return_nested_tensors(unchanged):
    """As a frozen encoder does for padded sequences."""
    padding = (torch.arange(5) > 2) & (torch.arange(6) % 2 == 0)[:, None]  # at the end of every second sequence
    model = Model(
        lambda m, x: m.head(m.centre(m.encode(x, src_key_padding_mask=x[:, :, 0] > 5).sum(1))),
        encode=nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 2).requires_grad_(False),
        centre=Centred(),
        head=nn.Linear(4, 3),
    )
    x = torch.randn(6, 5, 4)
    x[padding] = 10.0
    with unchanged(model), pytest.raises(ValueError, match=r"module centre \(Centred\)"):
        fits(model, x, LABELS)


class Counting(nn.Module):
    """Buffers that a forward pass changes in eval mode, in place and by putting another tensor in their place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.in_place += 1
        self.replaced = self.replaced + 1
        return x


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_and_counters_come_back_as_they_were(training, unchanged):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), Counting(), nn.Dropout(), nn.Linear(3, 3))
    model[1].running_mean.normal_()
    model.train(training)
    model[3].train(not training)
    with unchanged(model):
        fits(model, INPUTS, LABELS)


def test_frozen_parts_stay_frozen_and_are_not_differentiated(unchanged):
    model = between(nn.Tanh())
    model[0].requires_grad_(False)
    with unchanged(model):
        fits(model, INPUTS, LABELS)
        parameters = Parameters.of(model, ["2.bias"])
        with borrowed(model, parameters):
            assert [p.requires_grad for p in model.parameters()] == [False, False, False, True]
            assert not model.training


def test_under_no_grad_and_inference_mode(unchanged):
    model = between(nn.Tanh())
    parameters = Parameters.of(model)
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        diagonal = GGNDiagonal(parameters)
        with unchanged(model), mode():
            x = INPUTS.clone()  # under inference mode: a tensor that autograd refuses
            accumulate(model, parameters, Categorical(), GGN(), [(x, LABELS.clone())], [diagonal])
        results.append(diagonal.result().operator().values)
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


def test_the_global_random_state_is_not_touched():
    model = between(nn.Tanh())
    parameters = Parameters.of(model)
    before = torch.get_rng_state()
    accumulate(model, parameters, Categorical(), GGN(), [(INPUTS, LABELS)], [GGNDiagonal(parameters)])
    columns = MonteCarloGGN(2)
    generator = torch.Generator().manual_seed(0)
    accumulate(
        model, parameters, Categorical(), columns, [(INPUTS, LABELS)], [GGNDense(parameters)], generator=generator
    )
    assert torch.equal(before, torch.get_rng_state())


def test_data_that_runs_out_of_a_broken_loader_gives_the_model_back(unchanged):
    def loader():
        yield INPUTS, LABELS
        raise OSError("disk")

    model = between(nn.Tanh())
    with unchanged(model), pytest.raises(OSError, match="disk"):
        fits(model, data=loader())
