"""A fitted Laplace comes back from a file as it was, for its own network only."""

import copy
import io
import json

import pytest
import torch
from dense_laplace import problem, untouched
from safetensors import safe_open
from torch import nn

from lapkit import Laplace
from lapkit.checkpoint import VERSION
from lapkit.curvature import (
    Bernoulli,
    Categorical,
    FromLogProb,
    HeteroscedasticGaussian,
    MonteCarloGGN,
    PerOutputGaussian,
    Poisson,
)
from lapkit.subnetworks import LargestMagnitude

STRUCTURES = {
    "diag": {"hessian_structure": "diag"},
    "kron": {"hessian_structure": "kron"},
    "ekfac": {"hessian_structure": "ekfac"},
    "blockdiag": {"hessian_structure": "blockdiag"},
    "full": {"hessian_structure": "full"},
    "lowrank": {"hessian_structure": "lowrank"},
    "columns": {"hessian_structure": "lowrank", "space": "weights"},
    "columns of blocks": {"hessian_structure": "lowrank", "space": "weights", "per_parameter": True},
    "rank": {"hessian_structure": "lowrank", "rank": 4},
    "functions": {"hessian_structure": "lowrank", "space": "functions"},
    "functions of blocks": {"hessian_structure": "lowrank", "space": "functions", "per_parameter": True},
    "gp": {"hessian_structure": "gp"},
}


def same(one, two):
    """The numbers in a file are those in memory, but not their strides, on which the order of sums may depend."""
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


def answers(la, x):
    generator = torch.Generator().manual_seed(0)
    answer = la(x)
    return (
        *(answer if isinstance(answer, tuple) else (answer,)),
        la.function_distribution(x).covariance,
        la.functional_samples(x, 3, generator, pred_type="nn"),
        la.log_marginal_likelihood(),
        la.log_marginal_likelihood(0.3),
        la.posterior.variance,
        la.mean,
        la.prior_precision,
        la.sigma_noise,
    )


def moments(la, x):
    f = la.function_distribution(x)
    return f.mean, f.covariance


def fitted(kind="classification", model=None, net="mlp", subset="all", **options):
    case = problem(kind, net)
    la = Laplace(case.fresh if model is None else model, kind, subset, **{"prior_precision": 0.7, **options})
    return case, la.fit(case.data)


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("options", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_every_structure_comes_back(kind, options, net, tmp_path):
    noise = {"sigma_noise": 0.4} if kind == "regression" else {}
    case, la = fitted(kind, net=net, temperature=1.2, **options, **noise)
    la.save(tmp_path / "la.safetensors")
    model = copy.deepcopy(la.model)
    with untouched(model):
        found = Laplace.load(tmp_path / "la.safetensors", model)
    same(answers(found, case.new_x), answers(la, case.new_x))
    assert found.temperature == 1.2
    assert type(found.fitted.curvature) is type(la.fitted.curvature)
    for key, t in la.state_dict()["tensors"].items():
        assert torch.equal(found.state_dict()["tensors"][key], t)
    first, second = found.optimize_prior_precision(), la.optimize_prior_precision()
    assert first.log_evidence == pytest.approx(second.log_evidence, rel=1e-10)


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "lowrank"])
def test_more_data_can_come_to_what_was_loaded(structure, tmp_path):
    case, la = fitted(hessian_structure=structure)
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", la.model)
    for each in (la, found):
        each.fit(case.data[:1], override=False)
    same(answers(found, case.new_x), answers(la, case.new_x))
    assert found.fitted.count == 18


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_it_can_be_fitted_anew(structure, tmp_path):
    case, la = fitted(hessian_structure=structure, subset="last_layer")
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", la.model).fit(case.data)
    same(answers(found, case.new_x), answers(la, case.new_x))
    assert found.fitted.parameters.names == tuple(case.head)


@pytest.mark.parametrize("subset", ["last_layer", ["0.weight", "2"]])
def test_subsets(subset, tmp_path):
    case, la = fitted(subset=subset)
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", la.model)
    assert found.fitted.parameters.names == la.fitted.parameters.names
    same(answers(found, case.new_x), answers(la, case.new_x))


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
@pytest.mark.parametrize("chosen", [torch.tensor([1, 7, 30]), LargestMagnitude(9)])
def test_subnetworks(structure, chosen, tmp_path):
    case, la = fitted(hessian_structure=structure, subset="subnetwork", subnetwork=chosen)
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", la.model)
    same(answers(found, case.new_x), answers(la, case.new_x))
    same(answers(found.fit(case.data), case.new_x), answers(la, case.new_x))


LIKELIHOODS = {
    "weighted classes": (Categorical(class_weights=torch.tensor([1.0, 2.0]), label_smoothing=0.1), "classes"),
    "missing answers": (Bernoulli(missing=-1), "answers"),
    "counts": (Poisson(), "answers"),
    "noise by output": (PerOutputGaussian(torch.tensor([0.5, 2.0]), 1.3), "numbers"),
    "predicted noise": (HeteroscedasticGaussian(), "one number"),
}


@pytest.mark.parametrize(("likelihood", "targets"), LIKELIHOODS.values(), ids=LIKELIHOODS.keys())
def test_likelihoods_keep_their_settings(likelihood, targets, tmp_path):
    model, x = nn.Linear(3, 2), torch.randn(7, 3)
    y = {
        "classes": torch.arange(7) % 2,
        "answers": torch.randint(2, (7, 2)) * 1.0,
        "numbers": torch.randn(7, 2),
        "one number": torch.randn(7, 1),
    }[targets]
    la = Laplace(model, likelihood, "all", "full").fit([(x, y)])
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", model)
    assert type(found.likelihood) is type(likelihood)
    same(found.log_marginal_likelihood(), la.log_marginal_likelihood())
    same(found.likelihood.loss(model(x).detach(), found.likelihood.check(model(x), y)).sum(), la.fitted.loss)
    same(found.likelihood.expectation(*moments(found, x)), la.likelihood.expectation(*moments(la, x)))


def test_columns_priors_and_dispersion_come_back(tmp_path):
    prior = {"prior_precision": torch.linspace(1, 2, 6), "prior_mean": torch.linspace(-1, 1, 54)}
    case, la = fitted("regression", curvature="ef", sigma_noise=0.4, **prior)
    la.sigma_noise = 0.3
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", la.model)
    same(answers(found, case.new_x), answers(la, case.new_x))
    _, la = fitted(curvature=MonteCarloGGN(samples=3, seed=1))
    la.save(tmp_path / "la")
    assert Laplace.load(tmp_path / "la", la.model).columns == MonteCarloGGN(samples=3, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_floating_types_come_back(dtype, tmp_path):
    case = problem("classification")
    model, data = case.fresh.to(dtype), [(x.to(dtype), y) for x, y in case.data]
    la = Laplace(model, "classification", "all", "kron").fit(data)
    la.save(tmp_path / "la")
    found = Laplace.load(tmp_path / "la", model)
    assert found.fitted.curvature.dtype == la.fitted.curvature.dtype == torch.float32
    x = case.new_x.to(dtype)
    same(found(x), la(x))
    with pytest.raises(ValueError, match="has the type float64"):
        Laplace.load(tmp_path / "la", model.double())


def test_a_state_is_plain_and_shares_memory():
    case, la = fitted(hessian_structure="full")
    state = la.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=True)
    json.dumps({k: v for k, v in back.items() if k != "tensors"})
    other = Laplace(la.model, "classification")  # of another structure and subset: the state has its own
    other.load_state_dict(back)
    same(answers(other, case.new_x), answers(la, case.new_x))


def test_a_frozen_network_can_be_loaded_for_use(tmp_path):
    case, la = fitted()
    la.save(tmp_path / "la")
    model = copy.deepcopy(la.model).requires_grad_(False).train()
    with untouched(model):
        same(Laplace.load(tmp_path / "la", model)(case.new_x), la(case.new_x))


def test_the_file_holds_no_weights_and_a_version(tmp_path):
    _, la = fitted("classification", hessian_structure="diag")
    la.save(tmp_path / "la")
    with safe_open(tmp_path / "la", framework="pt") as file:
        assert json.loads(file.metadata()["header"])["version"] == VERSION
        numbers = torch.cat([file.get_tensor(k).flatten().double() for k in file.keys()])  # noqa: SIM118
    assert not torch.isin(la.mean, numbers).any()


# -- refusals


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x)


def other_models():
    case = problem("classification")
    trained = case.fresh
    with torch.no_grad():
        trained[0].weight[1, 2] += 1e-12
    swapped = case.fresh
    with torch.no_grad():
        swapped[0].bias.copy_(swapped[0].bias.flip(0))
    wider = case.fresh
    wider[4] = nn.Linear(4, 5)
    return {
        "0.weight.* missing.*linear.bias.* new": Wide(),
        "'5.weight' new": nn.Sequential(*case.fresh, nn.Linear(3, 3, bias=False)),
        r"'4.weight' has the shape \[5, 4\], it had \[3, 4\]": wider,
        "not those that were fitted: '0.weight'": trained,
        "not those that were fitted: '0.bias'": swapped,
    }


@pytest.mark.parametrize("message", other_models())
def test_another_model_is_refused(message, tmp_path):
    _, la = fitted()
    la.save(tmp_path / "la")
    with pytest.raises(ValueError, match=message):
        Laplace.load(tmp_path / "la", other_models()[message])


def test_running_statistics_belong_to_the_model(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    _, la = fitted(model=model)
    la.save(tmp_path / "la")
    model[1].running_mean += 1
    with pytest.raises(ValueError, match=r"'1\.running_mean'"):
        Laplace.load(tmp_path / "la", model)


def test_a_refused_state_changes_nothing():
    case, la = fitted()
    _, other = fitted("regression")
    before = answers(la, case.new_x)
    with pytest.raises(ValueError, match="not the one that was fitted"):
        la.load_state_dict(other.state_dict())
    same(answers(la, case.new_x), before)


def test_refusals(tmp_path):
    case, la = fitted()
    with pytest.raises(RuntimeError, match="not been fitted"):
        Laplace(case.model, "classification").save(tmp_path / "la")
    with pytest.raises(FileNotFoundError, match="no folder"):
        la.save(tmp_path / "none" / "la")
    with pytest.raises(FileNotFoundError):
        Laplace.load(tmp_path / "la", la.model)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match="no safetensors file"):
        Laplace.load(tmp_path / "junk", la.model)
    la.save(tmp_path / "la")
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        Laplace.load(tmp_path / "la", la.model.state_dict())
    with pytest.raises(TypeError, match=r"load\(path, model\)"):
        Laplace.load(la.model, tmp_path / "la")
    state = la.state_dict()
    with pytest.raises(ValueError, match=r"version 1.*got .* version 99"):
        la.load_state_dict({**state, "version": 99})
    with pytest.raises(ValueError, match="no class of that name"):
        la.load_state_dict({**state, "settings": {**state["settings"], "columns": {"kind": "Path", "fields": {}}}})
    with torch.no_grad():
        la.model[0].weight += 1
    with pytest.raises(RuntimeError, match="not those that were fitted"):
        la.save(tmp_path / "la")


def log_prob(f, y):
    return -(f - y).square().sum(-1)


def doubled(model, x):
    return 2 * model(x)


def test_functions_are_given_again(tmp_path):
    model, x, y = nn.Linear(3, 2), torch.randn(7, 3), torch.randn(7, 2)
    own = FromLogProb(log_prob)
    la = Laplace(model, own, "all", "full", forward_fn=doubled).fit([(x, y)])
    la.save(tmp_path / "la")
    with pytest.raises(ValueError, match=r"The likelihood was a FromLogProb.*got Categorical"):
        Laplace.load(tmp_path / "la", model, forward_fn=doubled)
    with pytest.raises(ValueError, match=r"The forward_fn was a function.*got NoneType"):
        Laplace.load(tmp_path / "la", model, likelihood=own)
    found = Laplace.load(tmp_path / "la", model, likelihood=own, forward_fn=doubled)
    same(found.function_distribution(x).covariance, la.function_distribution(x).covariance)
    same(found.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.gpu
def test_a_file_of_another_device_comes_to_that_of_the_network(tmp_path):
    case, la = fitted()
    la.save(tmp_path / "la")
    model = copy.deepcopy(la.model).cuda()
    found = Laplace.load(tmp_path / "la", model)
    assert found.mean.is_cuda
    torch.testing.assert_close(found(case.new_x.cuda()).cpu(), la(case.new_x))
