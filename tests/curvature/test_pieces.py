"""Large batches are predicted in pieces: as whole, and only where the examples stand along the first axis."""

import pytest
import torch
from dense_laplace import untouched
from torch import nn

from lapkit import Laplace
from lapkit.curvature import Engine, Parameters, borrowed
from lapkit.curvature.capture import pieces

N = 100


@pytest.fixture(autouse=True)
def near(monkeypatch):
    """So little that a piece has 15 examples of a layer of 8 doubles."""
    monkeypatch.setattr(pieces, "NEAR", 15 * 8 * 8)


def lengths(model, x):
    parameters = Parameters.of(model)
    engine = Engine(model, parameters)
    with borrowed(model, parameters):
        parts = engine.pieces(x)
        assert [p is x for p in parts] == [True] or not any(p is x for p in parts)
    return [len(p if isinstance(p, torch.Tensor) else next(iter(p.values()))) for p in parts], parts


def network():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def test_pieces_are_nearly_equal_and_complete():
    x = torch.randn(N, 3, dtype=torch.float64)
    found, parts = lengths(network(), x)
    assert found == [15, 15, 15, 15, 15, 15, 10]
    assert torch.equal(torch.cat(parts), x)
    assert lengths(network(), x[:60])[0] == [15] * 4
    assert lengths(network(), x[:62])[0] == [13, 13, 13, 13, 10]
    assert lengths(network(), x[: pieces.FEW])[0] == [pieces.FEW]


class Watching(nn.Module):
    """Notes how many examples it sees."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, x):
        self.seen.append(len(x))
        return self.inner(x)


def test_what_was_tried_is_remembered():
    model, x = Watching(network()), torch.randn(N, 3, dtype=torch.float64)
    parameters = Parameters.of(model)
    engine = Engine(model, parameters)
    with borrowed(model, parameters):
        engine.pieces(x)
        engine.pieces(x[:50])
        assert model.seen == [2, 3]
        engine.pieces(x.float())  # of another type, which this model refuses
        assert len(engine.pieces(x.float())) == 1


CALLS = {
    "glm": lambda la, x: la(x),
    "functions": lambda la, x: la.function_distribution(x).covariance,
    "nn": lambda la, x: la(x, pred_type="nn", n_samples=6, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("structure", ["diag", "kron", "full", "lowrank"])
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_predictions_are_those_of_the_whole(call, structure, subset, monkeypatch):
    model, x = Watching(network()), torch.randn(N, 3, dtype=torch.float64)
    la = Laplace(model, "classification", subset, structure).fit([(x[:20], torch.arange(20) % 2)])
    with untouched(model):
        model.seen.clear()
        found = CALLS[call](la, x)
    assert max(model.seen) == 15
    monkeypatch.setattr(pieces, "NEAR", 2**40)
    la._engine._pieces = pieces.Pieces()
    model.seen.clear()
    torch.testing.assert_close(found, CALLS[call](la, x), rtol=1e-12, atol=1e-12)
    assert max(model.seen) == N


def test_gradients_in_the_inputs_and_joint_predictions():
    model, x = network(), torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    la = Laplace(model, "regression", "all", "full").fit([(x.detach(), torch.randn(40, 2).double())])
    for call in (
        lambda x: la(x)[1].sum(),
        lambda x: la(x, pred_type="nn", n_samples=3, generator=torch.Generator().manual_seed(0))[1].sum(),
    ):
        (whole,) = torch.autograd.grad(call(x), x)
        parts = [part.clone().requires_grad_() for part in x.detach().split(10)]
        few = [torch.autograd.grad(call(part), part)[0] for part in parts]
        torch.testing.assert_close(whole, torch.cat(few))
    mean, covariance = la(x.detach(), joint=True)
    assert mean.shape == (80,)
    blocks = covariance.reshape(40, 2, 40, 2).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    torch.testing.assert_close(blocks, la(x.detach())[1])


# -- what is not cut


class Steps(nn.Module):
    """Steps first, examples second."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 8).double(), nn.Linear(8, 2).double()

    def forward(self, x):
        return self.head(self.body(x).tanh().mean(0))


class Fixed(nn.Module):
    """For batches of one length, as a graph has its own number of vertices."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()
        self.register_buffer("gates", torch.ones(N, 1, dtype=torch.float64))

    def forward(self, x):
        return self.linear(self.gates * x)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 8).double(), nn.Linear(8, 2).double()

    def forward(self, x, beside):
        return self.two((self.one(x) + beside.sum()).tanh())


WHOLE = {
    "steps first": (Steps, torch.randn(N, 6, 3, dtype=torch.float64)),
    "a batch of one length": (Fixed, torch.randn(N, 3, dtype=torch.float64)),
    "a tensor of another length": (Two, {"x": torch.randn(N, 3).double(), "beside": torch.randn(7).double()}),
}


@pytest.mark.parametrize(("build", "x"), WHOLE.values(), ids=WHOLE.keys())
def test_other_inputs_stay_whole(build, x):
    model = build()
    assert lengths(model, x)[0] == [N]
    outputs = model(**x) if isinstance(x, dict) else model(x)
    la = Laplace(model, "regression", "all", "diag").fit([(x, torch.zeros_like(outputs))])
    torch.testing.assert_close(la(x)[0], outputs.detach())


def test_a_number_beside_the_examples_belongs_to_all():
    x = {"x": torch.randn(N, 3).double(), "beside": torch.tensor(0.3).double()}
    found, parts = lengths(Two(), x)
    assert found == [15, 15, 15, 15, 15, 15, 10]
    assert all(part["beside"] == 0.3 for part in parts)


class Attending(nn.Module):
    """Looks up a memory that all examples share, of as many rows as there are examples by accident."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, inputs):
        found = torch.softmax(inputs["x"] @ inputs["memory"].T, 1) @ inputs["memory"]
        return self.layer(found)


def test_a_shared_input_of_the_same_length_stays_whole():
    model = Attending()
    inputs = {name: torch.randn(N, 3, dtype=torch.float64) for name in ("x", "memory")}
    parameters = Parameters.of(model)
    engine = Engine(model, parameters)
    with borrowed(model, parameters):
        (found,) = engine.pieces(inputs)
    assert all(torch.equal(found[name], inputs[name]) for name in inputs)
