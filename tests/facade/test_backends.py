"""`Laplace(..., backend=...)`: BackPACK and curvlinops compute what lapkit's own engine computes, entry by entry."""

import copy

import pytest
import torch
from torch import nn

from lapkit import Laplace
from lapkit.backends import BACKENDS
from lapkit.curvature import Bernoulli, Categorical, Gaussian, MonteCarloGGN

pytestmark = pytest.mark.peer("backpack", "curvlinops")

OFFERS = {
    "backpack": {"diag": "ggn mc ef", "kron": "ggn mc", "blockdiag": "ggn mc ef", "full": "ggn mc ef",
                 "lowrank": "ggn mc ef"},
    "curvlinops": {"kron": "ggn mc ef", "ekfac": "ggn mc ef", "full": "ggn mc ef", "diag": "ggn mc ef"},
}  # fmt: skip
CELLS = [(b, s, c) for b, offer in OFFERS.items() for s, kinds in offer.items() for c in kinds.split()]
KINDS = ["classification", "regression", "binary"]
SAMPLES, NOISE, COUNT = 2, 0.7, 31


def mlp(kind):
    outputs = {"classification": 3, "regression": 2, "binary": 1}[kind]
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))


def targets(kind, model, x):
    if kind == "classification":
        return torch.arange(len(x)) % 3
    return torch.randn(len(x), 2) if kind == "regression" else torch.randint(2, (len(x), 1)).double()


def batches(kind, model, shape=(4,)):
    x = torch.randn(COUNT, *shape)
    y = targets(kind, model, x)
    return [(x[:17], y[:17]), (x[17:], y[17:])]


def made(model, kind, structure, curvature="ggn", subset="all", **options):
    noise = {"sigma_noise": NOISE} if kind == "regression" else {}
    columns = MonteCarloGGN(SAMPLES) if curvature == "mc" else curvature
    return Laplace(model, kind, subset, structure, curvature=columns, **noise, **options)


def drawn(f, scale):
    """Targets that stand for draws, the same for everyone."""
    f = f.detach()
    if f.shape[-1] == 3:
        return f.argmin(-1)
    return (f > 0).to(f) if f.shape[-1] == 1 else f + scale * torch.cos(1 + 7 * f)


@pytest.fixture
def same_draws(monkeypatch):
    """All three draw these."""
    import curvlinops
    from backpack.core.derivatives import bcewithlogitsloss, crossentropyloss, mseloss

    for kind in (Categorical, Bernoulli):
        monkeypatch.setattr(kind, "sample", lambda self, f, draws, draw=0: drawn(f, 0))
    monkeypatch.setattr(Gaussian, "sample", lambda self, f, draws, draw=0: drawn(f, self.noise))

    class Drawn:
        def __init__(self, f):
            self.f = f

        def sample(self, sample_shape):
            return drawn(self.f, 0.5**0.5).expand(*sample_shape, *drawn(self.f, 0.5**0.5).shape)

    for kind in (
        bcewithlogitsloss.BCELossWithLogitsDerivatives,
        crossentropyloss.CrossEntropyLossDerivatives,
        mseloss.MSELossDerivatives,
    ):
        monkeypatch.setattr(kind, "_make_distribution", lambda self, f: Drawn(f))
    monkeypatch.setattr(curvlinops.KFACLinearOperator, "draw_label", lambda self, f: drawn(f, 0.5**0.5))

    def sampler(loss):
        def gradients(f, count, y, generator):
            y = drawn(f, 0.5**0.5)
            of_loss = {
                nn.CrossEntropyLoss: lambda: f.softmax(-1) - nn.functional.one_hot(y, 3),
                nn.MSELoss: lambda: 2 * (f - y),
                nn.BCEWithLogitsLoss: lambda: f.sigmoid() - y,
            }
            return of_loss[type(loss)]().expand(count, *f.shape)

        return gradients

    monkeypatch.setattr(curvlinops.fisher, "make_grad_output_sampler", sampler)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8 * float(two.abs().max()))


def compared(model, data, backend, *settings, subset="all"):
    """Both fits, and that they are one: posterior precision, evidence, predictive."""
    theirs = made(model, *settings, subset=subset, backend=backend).fit(data)
    ours = made(model, *settings, subset=subset).fit(data)
    close(theirs.posterior_precision.to_dense(), ours.posterior_precision.to_dense())
    close(theirs.log_marginal_likelihood(), ours.log_marginal_likelihood())
    close(theirs.functional_variance(data[0][0]), ours.functional_variance(data[0][0]))
    return theirs, ours


@pytest.mark.usefixtures("same_draws")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "structure", "curvature"), CELLS)
def test_a_library_computes_what_lapkit_computes(backend, structure, curvature, kind):
    model = mlp(kind)
    compared(model, batches(kind, model), backend, kind, structure, curvature)


@pytest.mark.parametrize(("backend", "structure"), [(b, s) for b, s, c in CELLS if c == "ggn"])
def test_of_the_last_layer(backend, structure):
    model = mlp("classification")
    compared(model, batches("classification", model), backend, "classification", structure, subset="last_layer")


def convolutions(bias=True):
    return nn.Sequential(
        nn.Conv2d(1, 2, 2, bias=bias), nn.Tanh(), nn.Conv2d(2, 2, 2, stride=2, bias=bias), nn.Sigmoid(), nn.Flatten(),
        nn.Linear(2, 3),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "structure"),
    [("backpack", s) for s in ("diag", "blockdiag", "full", "lowrank")] + [("curvlinops", s) for s in ("full", "diag")],
)
def test_of_convolutions(backend, structure):
    model = convolutions()
    compared(model, batches("classification", model, (1, 4, 4)), backend, "classification", structure)


@pytest.mark.parametrize("structure", ["kron", "ekfac"])
def test_factors_of_convolutions(structure):
    """Weights have the same blocks. A bias has those of its weight's positions there, and its exact block here."""
    model = convolutions(bias=False)
    data = batches("classification", model, (1, 4, 4))
    compared(model, data, "curvlinops", "classification", structure)
    model = convolutions()
    la = made(model, "classification", structure, backend="curvlinops").fit(data)
    own = made(model, "classification", structure).fit(data)
    blocks = zip(la.fitted.parameters.names, la.fitted.curvature.blocks, own.fitted.curvature.blocks, strict=True)
    apart = [name for name, a, b in blocks if not torch.allclose(a.to_dense(), b.to_dense(), rtol=1e-8)]
    assert apart == ["0.bias", "2.bias"][: len(apart)]
    assert apart


@pytest.mark.parametrize(("backend", "structure"), [("backpack", "diag"), ("curvlinops", "kron")])
def test_a_fit_continues_and_is_stored(backend, structure, tmp_path):
    model = mlp("classification")
    one, two = batches("classification", model)
    whole = made(model, "classification", structure, backend=backend).fit([one, two])
    parts = made(model, "classification", structure, backend=backend).fit([one])
    parts.save(tmp_path / "la")
    loaded = Laplace.load(tmp_path / "la", model)
    assert loaded.backend == backend
    loaded.fit([two], override=False)
    assert loaded.fitted.count == COUNT
    close(loaded.posterior_precision.to_dense(), whole.posterior_precision.to_dense())


def test_sums_of_different_backends_do_not_mix():
    """Kronecker factors of a convolution are divided by other numbers."""
    model = mlp("classification")
    one, two = batches("classification", model)
    la = made(model, "classification", "kron", backend="curvlinops").fit([one])
    la.backend = "lapkit"
    with pytest.raises(ValueError, match="'backend' is"):
        la.fit([two], override=False)


@pytest.mark.parametrize(
    ("backend", "structure"), [("backpack", "full"), ("curvlinops", "kron"), ("curvlinops", "full")]
)
def test_the_network_is_left_alone(backend, structure):
    model = mlp("classification").train()
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    made(model, "classification", structure, backend=backend).fit(batches("classification", model))
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True]
    assert all(p.grad is None and not vars(p) for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("backend", ["backpack", "curvlinops"])
def test_draws_follow_the_generator(backend):
    model = mlp("classification")
    data = batches("classification", model)

    def fitted(seed):
        la = made(model, "classification", "kron", "mc", backend=backend)
        return la.fit(data, generator=torch.Generator().manual_seed(seed)).posterior_precision.to_dense()

    assert torch.equal(fitted(1), fitted(1))
    assert not torch.allclose(fitted(1), fitted(2))


class Functional(nn.Module):
    """What is no module is out of BackPACK's sight."""

    def __init__(self, twice=False):
        super().__init__()
        self.a, self.b, self.twice = nn.Linear(4, 4), nn.Linear(4, 3), twice

    def forward(self, x):
        x = torch.tanh(self.a(x)) if self.twice else x
        return self.b(torch.sigmoid(self.a(x)))


def refused(match, model, backend, structure, data=None, kind="classification", **options):
    with pytest.raises(ValueError, match=match):
        made(model, kind, structure, backend=backend, **options).fit(data or batches("classification", model))


@pytest.mark.parametrize(("backend", "structure"), [("backpack", "diag"), ("curvlinops", "kron")])
def test_what_a_library_cannot(backend, structure):
    net = mlp("classification")
    refused("used more than once|is used 2 times", Functional(twice=True), backend, structure)
    refused("the curvature 'ggn' in the structure 'gp'. It computes '(diag|kron)' of 'ggn'", net, backend, "gp")
    refused(r"the curvature 'ggn' in the structure SqrtGGN\(rank=2", net, backend, "lowrank", rank=2)
    refused("no loss for", net, backend, structure, kind=Categorical(label_smoothing=0.1))
    refused("no subnetwork", net, backend, structure, subset="subnetwork", subnetwork=torch.tensor([0, 3]))
    refused("forward_fn", net, backend, structure, forward_fn=lambda m, x: m(x))
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    refused("without weights", net, backend, structure, [(x, y, torch.ones(6))])
    refused("targets are missing", net, backend, structure, [(x, torch.where(y == 1, -100, y))])
    refused(r"outputs \(N, C\)", net, backend, structure, [(x.reshape(2, 3, 4), y.reshape(2, 3))])
    refused("no batch", net, backend, structure, iter([]))
    refused("Unknown backend", net, "asdl", structure)


def test_what_one_library_cannot():
    refused("could not compute 'diag'.*backend='lapkit'", Functional(), "backpack", "diag")
    refused("neither those of 'expand'", convolutions(), "backpack", "kron",
            batches("classification", None, (1, 4, 4)))  # fmt: skip
    refused("could not compute 'kron'", nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), "curvlinops", "kron")
    refused("the curvature 'ef' in the structure 'kron'", mlp("classification"), "backpack", "kron", curvature="ef")


def test_residual_networks():
    """By BackPACK's own reading of functions as modules, and by curvlinops' hooks."""
    model = nn.Sequential(nn.Linear(4, 4), Skip(), nn.Linear(4, 3))
    data = batches("classification", model)
    compared(model, data, "curvlinops", "classification", "kron")
    compared(Residual(), data, "backpack", "classification", "full")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(x + self.body(x))


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


def test_a_library_that_is_missing(monkeypatch):
    monkeypatch.setattr("lapkit.backends.library.find_spec", lambda name: None)
    for backend, package in (("backpack", "backpack-for-pytorch"), ("curvlinops", "curvlinops-for-pytorch")):
        with pytest.raises(ImportError, match=f"pip install {package}"):
            Laplace(nn.Linear(2, 2), "classification", backend=backend)
    Laplace(nn.Linear(2, 2), "classification", backend="lapkit")


def test_the_table_is_what_the_tests_compare():
    for name, offer in OFFERS.items():
        titles = {kernel.title: len(kernel.columns) for kernel in BACKENDS[name].kernels.values()}
        assert titles == {structure: len(kinds.split()) for structure, kinds in offer.items()}
