"""Training with the evidence in the loop, and the facade's ways from outputs to probabilities."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace
from lapkit.marglik import marglik_training
from lapkit.posteriors import LINKS


def sine(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=generator) * 6 - 3
    return x, x.sin() + 0.2 * torch.randn(n, 1, generator=generator)


def regressor():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))


def loader(x, y, batch_size=20):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)


SETTINGS = {"optimizer_options": {"lr": 0.02}, "n_epochs": 60, "burn_in": 20, "frequency": 10}


@pytest.mark.parametrize("structure", ["full", "kron", "diag", "lowrank"])
@pytest.mark.parametrize("prior", ["scalar", "layerwise"])
def test_evidence_rises_and_noise_is_found(structure, prior):
    x, y = sine()
    found = marglik_training(regressor(), loader(x, y), "regression", structure, prior_structure=prior, **SETTINGS)
    assert len(found.losses) == found.epochs == 60
    assert len(found.log_evidences) == 4
    if (structure, prior) != ("diag", "scalar"):  # which is best for the constant function of the beginning
        assert max(found.log_evidences[2:]) > found.log_evidences[0] + 5
    assert float(found.laplace.log_marginal_likelihood()) == pytest.approx(max(found.log_evidences), rel=1e-6)
    assert found.best_epoch == 20 + 10 * (1 + found.log_evidences.index(max(found.log_evidences)))
    if structure != "diag":  # which has hardly an evidence for any function but a constant one
        assert 0.1 < float(found.laplace.sigma_noise) < 0.5


@pytest.mark.parametrize("wanted", [True, False])
def test_progress_is_shown_where_it_is_asked_for(wanted, capsys):
    marglik_training(
        regressor(),
        [sine(40)],
        "regression",
        "diag",
        tune_noise=False,
        n_epochs=4,
        burn_in=2,
        n_hypersteps=1,
        progress_bar=wanted,
    )
    shown = capsys.readouterr().err
    assert bool(shown) == wanted
    if wanted:
        assert "marglik" in shown
        assert "/4 [" in shown
        assert "log evidence=" in shown
        assert "None" not in shown


def test_the_first_objective_is_the_negative_log_posterior():
    """One batch of all examples and no step of gradient descent: the loss by hand."""
    x, y = sine(10)
    model = regressor()
    weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    expected = (model(x) - y).square().sum() / (2 * 0.3**2) / 0.5 + 3.0 * (weights - 0.1).square().sum() / 2
    found = marglik_training(
        model,
        [(x, y)],
        "regression",
        "full",
        optimizer=torch.optim.SGD,
        optimizer_options={"lr": 0.0},
        n_epochs=1,
        sigma_noise=0.3,
        tune_noise=False,
        prior_precision=3.0,
        prior_mean=0.1,
        temperature=0.5,
    )
    assert found.losses == [pytest.approx(float(expected.detach()), rel=1e-10)]
    assert torch.equal(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), weights)
    assert float(found.laplace.sigma_noise) == pytest.approx(0.3)


@pytest.mark.parametrize("weighted", [False, True], ids=["sizes", "weights"])
def test_uneven_batches_count_by_what_they_weigh(weighted):
    """The minimum of a linear regression, which small batches and light examples must not pull away from."""
    x, noise = torch.randn(20, 3), torch.randn(20, 1)
    y, weights = x @ torch.tensor([[1.0], [2.0], [-1.0]]) + noise, torch.ones(20)
    parts = [slice(0, 19), slice(19, 20)]
    if weighted:
        parts, weights[10:] = [slice(0, 10), slice(10, 20)], 0.01
    data = [(x[part], y[part], weights[part]) if weighted else (x[part], y[part]) for part in parts]
    model = nn.Linear(3, 1, bias=False)
    marglik_training(
        model,
        data,
        "regression",
        "full",
        optimizer=torch.optim.SGD,
        optimizer_options={"lr": 0.2},
        scheduler=torch.optim.lr_scheduler.ExponentialLR,
        scheduler_options={"gamma": 0.99},
        n_epochs=600,
        burn_in=599,
        prior_precision=2.0,
        tune_noise=False,
    )
    exact = torch.linalg.solve(x.T @ (weights[:, None] * x) + 2.0 * torch.eye(3), x.T @ (weights[:, None] * y))
    torch.testing.assert_close(model.weight.T, exact, rtol=1e-3, atol=1e-3)


def test_classification_stays_in_train_mode_while_it_trains():
    x = torch.randn(45, 2)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3)).eval()
    modes = []
    model[3].register_forward_hook(lambda module, *_: modes.append(module.training))
    found = marglik_training(model, loader(x, y, 15), n_epochs=30, frequency=10, optimizer_options={"lr": 0.05})
    assert set(modes) == {True, False}
    assert not found.model.training
    assert (found.laplace(x).argmax(-1) == y).double().mean() > 0.8
    assert all(p.grad is None for p in model.parameters())


def test_the_best_network_is_given_back():
    x, y = sine()
    model = regressor()
    found = marglik_training(model, loader(x, y), "regression", "full", **SETTINGS)
    la = Laplace(model, "regression", "all", "full", sigma_noise=float(found.laplace.sigma_noise))
    la.prior_precision = found.laplace.prior_precision
    assert float(la.fit([(x, y)]).log_marginal_likelihood()) == pytest.approx(max(found.log_evidences), rel=1e-6)


def test_patience_stops():
    x, y = sine()
    found = marglik_training(
        regressor(), loader(x, y), "regression", "full", n_epochs=500, patience=3, optimizer_options={"lr": 0.0}
    )
    assert found.stopped_early
    assert found.epochs < 500


def test_a_training_goes_on_where_it_was_interrupted(tmp_path):
    x, y = sine()
    settings = SETTINGS | {
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR,
        "scheduler_options": {"T_max": 60},
        "prior_structure": "layerwise",
    }
    torch.manual_seed(3)
    start = copy.deepcopy(regressor())
    torch.manual_seed(3)
    whole = marglik_training(copy.deepcopy(start), loader(x, y), "regression", "kron", **settings)

    class Interrupted(Exception):
        pass

    class Breaks(nn.Module):
        def __init__(self, inner, after):
            super().__init__()
            self.inner, self.after = inner, after

        def forward(self, x):
            self.after -= 1
            if self.after == 0:
                raise Interrupted
            return self.inner(x)

    torch.manual_seed(3)
    file = tmp_path / "training.pt"
    with pytest.raises(Interrupted):
        marglik_training(
            Breaks(copy.deepcopy(start), 150), loader(x, y), "regression", "kron", checkpoint=file, **settings
        )
    torch.manual_seed(99)  # whatever happens in between
    again = marglik_training(Breaks(regressor(), -1), loader(x, y), "regression", "kron", checkpoint=file, **settings)
    assert again.losses == pytest.approx(whole.losses, rel=1e-10)
    assert again.log_evidences == pytest.approx(whole.log_evidences, rel=1e-8)
    with pytest.raises(ValueError, match="another network"):
        marglik_training(nn.Linear(1, 1), loader(x, y), "regression", checkpoint=file, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_epochs": 0}, "at least 1"),
        ({"n_epochs": 5, "burn_in": 5}, "see no evidence"),
        ({"n_data": -3}, "number of examples, got -3"),
        ({"optimizer_options": {"weight_decay": 1e-2}}, "second prior"),
        ({"hessian_structure": "dense"}, "Unknown hessian_structure"),
        ({"optimizer_options": {"lr": 1e300}, "n_epochs": 3}, "learning rate|NaN or infinite|not finite"),
    ],
)
def test_what_it_refuses(settings, words):
    x, y = sine(10)
    model = regressor().train()
    with pytest.raises(ValueError, match=words):
        marglik_training(model, [(x, y)], "regression", **settings)
    assert model.training


# -- links


@pytest.fixture
def fitted():
    x = torch.randn(40, 2)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return Laplace(nn.Linear(2, 3), "classification", "all", "full").fit([(x, y)])


@pytest.mark.parametrize("name", [name for name in LINKS if name != "gauss_hermite"])
def test_every_link_gives_probabilities(fitted, name):
    x = torch.randn(6, 2)
    generator = lambda: torch.Generator().manual_seed(0)  # noqa: E731
    found = fitted(x, link_approx=name, n_samples=4096, generator=generator())
    torch.testing.assert_close(found.sum(-1), torch.ones(6))
    torch.testing.assert_close(found, fitted.predictive_distribution(x, name, 4096, generator()).probs)
    exact = fitted(x, link_approx="mc", n_samples=200_000, generator=generator())
    assert float((found - exact).abs().max()) < (0.25 if "bridge" in name else 0.05)


def test_two_classes_are_integrated_exactly():
    x = torch.randn(30, 2)
    la = Laplace(nn.Linear(2, 1), "binary", "all", "full").fit([(x, (x[:, :1] > 0).double())])
    f = la.function_distribution(x)
    grid = torch.linspace(-12, 12, 40_001)
    values = torch.sigmoid(f.mean[..., None] + f.variance.sqrt()[..., None] * grid)
    density = torch.exp(-grid.square() / 2) / (2 * torch.pi) ** 0.5
    expected = torch.trapezoid(values * density, grid, dim=-1)
    torch.testing.assert_close(la(x, link_approx="gauss_hermite"), expected, rtol=1e-9, atol=1e-10)


def test_uncertainty_is_split(fitted):
    x = torch.randn(6, 2)
    split = fitted.uncertainty(x, generator=torch.Generator().manual_seed(0))
    samples = fitted.predictive_samples(x, 100_000, torch.Generator().manual_seed(1))
    information = (samples * (samples / samples.mean(0)).log()).sum(-1).mean(0)
    torch.testing.assert_close(split.epistemic, information, atol=5e-4, rtol=2e-2)
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    torch.testing.assert_close(split.total, entropy(samples.mean(0)), atol=5e-3, rtol=0)
    torch.testing.assert_close(split.aleatoric, entropy(samples).mean(0), atol=5e-3, rtol=0)
