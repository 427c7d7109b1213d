"""Forward functions, axes of outputs, mappings for inputs, and networks in half precision."""

import copy

import pytest
import torch
from dense_laplace import problem, untouched
from torch import nn

from lapkit import Laplace
from lapkit.marglik import marglik_training

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank", "gp")


def same(one, two, x, new_x=None, **tolerance):
    torch.testing.assert_close(one.log_marginal_likelihood(), two.log_marginal_likelihood(), **tolerance)
    f, g = one.function_distribution(x), two.function_distribution(x if new_x is None else new_x)
    torch.testing.assert_close(f.mean, g.mean, **tolerance)
    torch.testing.assert_close(f.covariance, g.covariance, **tolerance)


class Parts(nn.Module):
    """Two inputs in, several things out."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs, offset):
        return {"scores": self.network(inputs + offset), "inputs": inputs}


def scores(model, x):
    return model(x["inputs"], x["offset"])["scores"]


@pytest.mark.parametrize("subset", ["all", "last_layer", "subnetwork"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_forward_function_and_mappings(structure, subset):
    case = problem("classification")
    model = Parts(case.fresh)
    chosen = {"subnetwork": torch.tensor([0, 4, 21, 44])} if subset == "subnetwork" else {}
    data = [({"inputs": x / 2, "offset": x / 2}, y) for x, y in case.data]
    new_x = {"inputs": case.new_x / 2, "offset": case.new_x / 2}
    with untouched(model):
        la = Laplace(model, "classification", subset, structure, forward_fn=scores, **chosen).fit(data)
        samples = la.functional_samples(new_x, 2, torch.Generator().manual_seed(0), joint=True)
    other = Laplace(case.model, "classification", subset, structure, **chosen).fit(case.data)
    same(la, other, new_x, case.new_x)
    expected = other.functional_samples(case.new_x, 2, torch.Generator().manual_seed(0), joint=True)
    torch.testing.assert_close(samples, expected)
    torch.testing.assert_close(la(new_x), other(case.new_x))


class Encoded(nn.Module):
    """The names of arguments of language models."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        h = self.table(input_ids) * attention_mask[..., None]
        return self.head(h.sum(1) / attention_mask.sum(1, keepdim=True))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_tokenised_batches(structure):
    transformers = pytest.importorskip("transformers")
    model = Encoded().double()
    ids, mask, y = torch.arange(30).reshape(6, 5) % 9, torch.ones(6, 5), torch.arange(6) % 3
    mask[2, 3:] = 0
    encoded = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, "labels": y})
    inputs = transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})
    one = Laplace(model, "classification", "all", structure).fit([encoded])
    two = Laplace(model, "classification", "all", structure).fit([((ids, mask), y)])
    same(one, two, inputs, (ids, mask))


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_an_axis_of_outputs(structure, subset):
    """Positions before classes in four axes, which would be read the other way round."""

    class Last(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x).movedim(1, -1)

    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()
    x, y = torch.randn(4, 1, 2, 2), torch.arange(16).reshape(4, 2, 2) % 3
    one = Laplace(Last(network), "classification", subset, structure, output_axis=-1).fit([(x, y)])
    two = Laplace(network, "classification", subset, structure).fit([(x, y)])
    same(one, two, x)
    with pytest.raises(ValueError, match="output_axis=7 is no axis"):
        Laplace(network, "classification", subset, structure, output_axis=7).fit([(x, y)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_has_curvature_in_single(structure, kind, dtype):
    """Activations are rounded, sums of curvature are not: numbers agree as far as the type of the network allows."""
    case = problem(kind)
    half = copy.deepcopy(case.model).to(dtype)
    rounded = copy.deepcopy(half).double()
    x, new_x = case.x.to(dtype), case.new_x.to(dtype)
    y = case.y if kind == "classification" else case.y.to(dtype)
    la = Laplace(half, kind, "all", structure).fit([(x, y)])
    exact = Laplace(rounded, kind, "all", structure).fit([(x.double(), y.double() if y.is_floating_point() else y)])
    assert la.posterior_precision.dtype == la.mean.dtype == torch.float32
    loose = {"rtol": 0.1, "atol": 0.02, "check_dtype": False}
    torch.testing.assert_close(la.posterior_precision.to_dense(), exact.posterior_precision.to_dense(), **loose)
    f, g = la.function_distribution(new_x), exact.function_distribution(new_x.double())
    assert f.mean.dtype == f.covariance.dtype == torch.float32
    torch.testing.assert_close(f.covariance, g.covariance, **loose)
    evidence, expected = float(la.log_marginal_likelihood()), float(exact.log_marginal_likelihood())
    assert evidence == pytest.approx(expected, rel=0.02)
    assert la.optimize_prior_precision().converged
    assert la.sample(2).dtype == torch.float32
    assert la.functional_samples(new_x, 2, joint=True).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_single_weights(dtype):
    case = problem("classification")
    half = copy.deepcopy(case.model).to(dtype)
    la = Laplace(half, "classification", "subnetwork", "kron", subnetwork=torch.arange(3, 40, 2))
    la.fit([(case.x.to(dtype), case.y)])
    assert la.posterior_precision.dtype == torch.float32
    assert la(case.new_x.to(dtype)).dtype == torch.float32
    assert la(case.new_x.to(dtype), pred_type="nn").dtype == torch.float32


def test_training_by_evidence_uses_the_forward_function():
    case = problem("regression")
    x, y = case.x, case.y
    found = []
    for wrapped in (False, True):
        model = Parts(case.fresh) if wrapped else case.fresh
        data = [({"inputs": x / 2, "offset": x / 2}, y)] if wrapped else [(x, y)]
        options = {"forward_fn": scores} if wrapped else {}
        done = marglik_training(
            model, data, "regression", subset_of_weights="all", n_epochs=4, optimizer=torch.optim.SGD, **options
        )
        found.append(torch.tensor([*done.losses, *done.log_evidences]))
    torch.testing.assert_close(*found)
