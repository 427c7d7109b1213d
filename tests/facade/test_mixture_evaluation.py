"""`LaplaceMixture.evaluate` (rows of its first member, of the plain ensemble and of the mixture), and its samples."""

import pytest
import torch
from torch import nn

from lapkit import Laplace
from lapkit.calibration import Samples, auroc, crps, entropy, expected_calibration_error, nll, predictive_nll, rmse
from lapkit.ensemble import LaplaceMixture

WEIGHTS = [1.0, 2.0, 3.0]


def net(outputs, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))


def mixture(likelihood, outputs, x, y, **options):
    members = [Laplace(net(outputs, s), likelihood, "all", **options).fit([(x[:40], y[:40])]) for s in (1, 2, 3)]
    return LaplaceMixture(members, WEIGHTS)


def batches(x, y, size=13):
    return list(zip(x.split(size), y.split(size), strict=True))


def test_rows_of_classes():
    x, far = torch.randn(100, 3), 5 * torch.randn(17, 3)
    with torch.no_grad():  # labels of which the first network knows something
        y = (net(3, 1)(x) + 0.3 * torch.randn(100, 3)).argmax(1)
    mine = mixture("classification", 3, x, y)
    found = mine.evaluate(batches(x[40:], y[40:]), validation=[(x[:40], y[:40])], ood=[far])
    assert list(found.rows) == ["MAP", "MAP + temperature", "Laplace", "ensemble of 3", "mixture of 3"]
    first = mine.members[0]
    alone = first.evaluate(batches(x[40:], y[40:]), validation=[(x[:40], y[:40])], ood=[far])
    for name, row in alone.rows.items():
        assert found.rows[name] == pytest.approx(row)
    with torch.no_grad():
        p = sum(m.model(x[40:]).softmax(1) for m in mine.members) / 3
    for name, expected in {"ensemble of 3": p, "mixture of 3": mine(x[40:])}.items():
        assert found.rows[name]["NLL"] == pytest.approx(nll(expected, y[40:]), abs=1e-10)
        assert found.rows[name]["ECE"] == pytest.approx(expected_calibration_error(expected, y[40:]), abs=1e-10)
    apart = auroc(entropy(mine(x[40:])), entropy(mine(far)))
    assert found.rows["mixture of 3"]["OOD AUROC"] == pytest.approx(apart)


def test_rows_of_a_regression_are_those_of_the_density():
    x = torch.randn(100, 3)
    y = x.sum(1, keepdim=True) + 0.3 * torch.randn(100, 1)
    mine = mixture("regression", 1, x, y, sigma_noise=0.4)
    found = mine.evaluate(batches(x[40:], y[40:]))
    each = [m.predictive_distribution(x[40:]) for m in mine.members]
    logs = torch.stack([d.log_prob(y[40:]) for d in each])
    shares = torch.tensor(WEIGHTS)[:, None] / 6
    assert found.rows["mixture of 3"]["NLL"] == pytest.approx(
        -float((shares.log() + logs).logsumexp(0).mean()), abs=1e-9
    )
    assert found.rows["mixture of 3"]["RMSE"] == pytest.approx(rmse(mine(x[40:])[0], y[40:]), abs=1e-9)
    assert found.rows["mixture of 3"]["NLL"] == pytest.approx(
        predictive_nll(mine.predictive_distribution(x[40:]), y[40:]), abs=1e-9
    )
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(torch.tensor(WEIGHTS), 4000, replacement=True, generator=generator)
    noise = torch.randn(4000, 60, 1, generator=generator)
    mean, std = (torch.stack([getattr(d, what) for d in each]) for what in ("mean", "stddev"))
    draws = Samples(mean[chosen] + std[chosen] * noise)
    assert found.rows["mixture of 3"]["CRPS"] == pytest.approx(crps(draws, y[40:]), rel=0.01)
    with torch.no_grad():
        modes = torch.stack([m.model(x[40:]) for m in mine.members])
    density = torch.distributions.Normal(modes, 0.4).log_prob(y[40:]).exp().mean(0)
    assert found.rows["ensemble of 3"]["NLL"] == pytest.approx(float(-density.log().mean()), abs=1e-9)


def test_events_and_an_ensemble_of_ones_own():
    x, y = torch.randn(100, 3), torch.randint(0, 2, (100, 1))
    mine, others = mixture("binary", 1, x, y), [net(1, 7), net(1, 8)]
    found = mine.evaluate(batches(x[40:], y[40:]), ensemble=others, link_approx="gauss_hermite")
    assert list(found.rows) == ["MAP", "Laplace", "ensemble of 2", "mixture of 3"]
    with torch.no_grad():
        p = sum(m(x[40:]).sigmoid() for m in others) / 2
    assert found.rows["ensemble of 2"]["NLL"] == pytest.approx(nll(p[:, 0], y[40:, 0]), abs=1e-10)
    p = mine(x[40:], link_approx="gauss_hermite")
    assert found.rows["mixture of 3"]["NLL"] == pytest.approx(nll(p[:, 0], y[40:, 0]), abs=1e-10)


def test_the_page_is_about_the_mixture(tmp_path):
    pytest.importorskip("matplotlib")
    x, y = torch.randn(60, 3), torch.randint(0, 3, (60,))
    mine = mixture("classification", 3, x, y)
    mine.evaluate([(x[40:], y[40:])]).save(tmp_path / "report.html")
    assert "under mixture of 3" in (tmp_path / "report.html").read_text()


def test_what_has_no_mixture_is_refused_as_by_its_members():
    x, y = torch.randn(50, 3), torch.randint(0, 3, (50,))
    mine = mixture("classification", 3, x, y)
    with pytest.raises(ValueError, match="no batch in the data"):
        mine.evaluate([])
    with pytest.raises(ValueError, match="link_approx"):
        mine.evaluate([(x, y)], link_approx="bridges")


# -- samples: their standard errors are those of 20,000 draws, and tolerances about five of them


def drawn(mine, what, new, seed=0, n_samples=20_000, **options):
    return getattr(mine, what)(new, n_samples, torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"diagonal_output": True}])
def test_samples_have_the_moments_of_the_mixture(options):
    x, new = torch.randn(100, 3), torch.randn(4, 3)
    mine = mixture("regression", 2, x, torch.randn(100, 2), sigma_noise=0.4)
    mean, covariance = mine(new)
    found = drawn(mine, "functional_samples", new, **options)
    apart = found - mean
    second = torch.einsum("snc,snd->ncd", apart, apart) / len(found)
    scale = covariance.diagonal(dim1=-2, dim2=-1).amax().sqrt()
    torch.testing.assert_close(found.mean(0), mean, rtol=0, atol=float(5 * scale / len(found) ** 0.5))
    if options.get("diagonal_output"):  # within a member; what its mean is apart from the others' stays
        covariance = mine(new, diagonal_output=True)[1]
        second = second.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(second, covariance, rtol=0, atol=float(10 * scale**2 / len(found) ** 0.5))
    assert torch.equal(found, drawn(mine, "predictive_samples", new, **options))


def test_samples_of_probabilities_average_to_those_of_the_mixture():
    x, new = torch.randn(100, 3), torch.randn(4, 3)
    mine = mixture("classification", 3, x, torch.randint(0, 3, (100,)))
    found = drawn(mine, "predictive_samples", new)
    torch.testing.assert_close(found.mean(0), mine(new, link_approx="qmc", n_samples=4096), rtol=0, atol=0.01)
    torch.testing.assert_close(found, drawn(mine, "functional_samples", new).softmax(-1))


def test_each_sample_is_one_of_a_member_that_the_weights_have_drawn():
    """Members as good as without variance, so that a sample says whose it is; every stretch of them has them all."""
    x = torch.randn(100, 3)
    mine = mixture("regression", 1, x, torch.randn(100, 1), prior_precision=1e12)
    with torch.no_grad():
        modes = torch.stack([m.model(x[:2]) for m in mine.members])
    state = torch.random.get_rng_state()
    found = drawn(mine, "functional_samples", x[:2], joint=True, n_samples=3000)
    assert torch.equal(torch.random.get_rng_state(), state)
    owner = (found[None] - modes[:, None]).abs().sum((2, 3)).argmin(0)
    torch.testing.assert_close(found, modes[owner], rtol=0, atol=1e-4)
    for stretch in owner.chunk(3):
        shares = stretch.bincount(minlength=3) / len(stretch)
        torch.testing.assert_close(shares, torch.tensor(WEIGHTS) / 6, rtol=0, atol=0.08)
    assert not torch.equal(found, drawn(mine, "functional_samples", x[:2], seed=1, joint=True, n_samples=3000))
    nothing = LaplaceMixture(mine.members, [0.0, 0.0, 1.0]).functional_samples(x[:2], 5)
    torch.testing.assert_close(nothing, modes[2].expand(5, 2, 1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="at least one sample, got n_samples=0"):
        mine.predictive_samples(x, 0)
    with pytest.raises(ValueError, match="whole functions"):
        mine.functional_samples(x, joint=True, diagonal_output=True)
