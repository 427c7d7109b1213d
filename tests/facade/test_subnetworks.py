"""Single weights: every structure is the principal submatrix of that over all weights, however they are chosen."""

import pytest
import torch
from dense_laplace import problem, untouched
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace, curvature
from lapkit.subnetworks import (
    LargestMagnitude,
    LargestSwagVariance,
    LargestVariance,
    Named,
    RandomWeights,
    Task,
    swag_variance,
)

STRUCTURES = ("diag", "kron", "ekfac", "blockdiag", "full", "lowrank", "gp")
KINDS = ("classification", "regression")
DELTA, NOISE = 0.7, 0.6


def flat(case):
    return case.mean()


def scattered(case, seed=0, share=0.4):
    """Indices in every tensor, in no order."""
    size = len(flat(case))
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: int(share * size)]


def separable(case):
    """Rows 0 and 2 of columns 1 and 2 of the first weight, and the whole of the last bias."""
    first = dict(case.model.named_parameters())[case.all[0]]
    mask = torch.zeros(first.shape, dtype=torch.bool).flatten(1)
    mask[0, 1:3] = mask[1, 1:3] = True
    size = len(flat(case))
    return torch.cat([mask.flatten().nonzero()[:, 0], torch.arange(size - 2, size)])


def laplace(case, structure, indices, **options):
    noise = {"sigma_noise": NOISE} if case.kind == "regression" else {}
    options = {"prior_precision": DELTA} | noise | options
    return Laplace(case.model, case.kind, "subnetwork", structure, subnetwork=indices, **options).fit(case.data)


def submatrix(case, structure, chosen):
    """H over the chosen weights, from that of all of them."""
    if structure == "ekfac":
        model = curvature.ekfac(
            case.model, curvature.Categorical() if case.kind == "classification" else curvature.Gaussian(), case.data
        )
        H = model.operator().to_dense()
    else:
        H = case.curvature({"gp": "full"}.get(structure, structure))
    return H[chosen][:, chosen]


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", [scattered, separable])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_everything_is_that_of_the_submatrix(net, kind, choice, structure):
    case = problem(kind, net)
    chosen = choice(case).sort().values
    with untouched(case.model):
        la = laplace(case, structure, choice(case))
        f = la.function_distribution(case.new_x)
    scale = NOISE**-2 if kind == "regression" else 1.0
    H = scale * submatrix(case, structure, chosen)
    P = H + DELTA * torch.eye(len(H))
    J = case.new_jacobian[:, :, chosen]
    torch.testing.assert_close(la.mean, flat(case)[chosen])
    torch.testing.assert_close(la.posterior_precision.to_dense(), P, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(f.covariance, J @ torch.linalg.solve(P, J.mT), rtol=1e-7, atol=1e-9)
    ratio = torch.logdet(P) - len(P) * torch.tensor(DELTA).log()
    torch.testing.assert_close(la.log_det_ratio, ratio)
    noise = NOISE if kind == "regression" else 1.0
    evidence = case.log_likelihood(noise) - (ratio + DELTA * flat(case)[chosen].square().sum()) / 2
    torch.testing.assert_close(la.log_marginal_likelihood(), evidence)
    if kind == "regression":
        joint = la(case.new_x, joint=True)[1]
        rows = J.flatten(0, 1)
        torch.testing.assert_close(joint, rows @ torch.linalg.solve(P, rows.T), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_weights_are_a_subnetwork(structure):
    case = problem("classification", "cnn")
    size = len(flat(case))
    one = laplace(case, structure, torch.ones(size, dtype=torch.bool))
    two = Laplace(case.model, case.kind, "all", structure, prior_precision=DELTA).fit(case.data)
    torch.testing.assert_close(one.log_marginal_likelihood(), two.log_marginal_likelihood(), rtol=1e-12, atol=0)
    torch.testing.assert_close(one(case.new_x), two(case.new_x))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_priors_may_differ_between_tensors_and_weights(structure):
    """Dense blocks add any prior exactly; a Kronecker product that is left as one keeps its eigenvectors."""
    case = problem("classification")
    chosen = scattered(case).sort().values
    la = laplace(case, structure, chosen)
    sizes = la.fitted.parameters.sizes
    assert len(sizes) == len(case.all)
    assert sum(sizes) == len(chosen)
    delta = torch.linspace(0.5, 2.0, len(sizes))
    la.prior_precision = delta
    H = submatrix(case, structure, chosen)
    each = delta.repeat_interleave(torch.tensor(sizes))
    torch.testing.assert_close(la.posterior_precision.to_dense(), H + each.diag(), rtol=1e-8, atol=1e-9)
    for prior in ("scalar", "layerwise", "diag"):
        assert la.optimize_prior_precision(prior_structure=prior).log_evidence >= la.log_marginal_likelihood() - 1e-6
    mean = torch.linspace(-1, 1, len(chosen))
    la = laplace(case, structure, chosen, prior_mean=mean)
    torch.testing.assert_close(la.scatter, DELTA * (flat(case)[chosen] - mean).square().sum())


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "gp"])
def test_samples_move_the_chosen_weights_alone(structure):
    case = problem("regression")
    chosen = scattered(case, share=0.2).sort().values
    la = laplace(case, structure, chosen)
    samples = la.sample(5, torch.Generator().manual_seed(1))
    assert samples.shape == (5, len(chosen))
    whole = la._engine.complete(samples)
    held = [p for n, p in case.model.named_parameters() if n in la._engine.parameters.names]
    torch.testing.assert_close(la._engine.complete(la.mean), torch.cat([p.detach().flatten() for p in held]))
    assert whole.shape[1] == sum(p.numel() for p in held)
    functions = la.functional_samples(case.new_x, 5, torch.Generator().manual_seed(1), joint=True)
    J = case.new_jacobian[:, :, chosen]
    expected = case.model(case.new_x).detach() + torch.einsum("ncp,sp->snc", J, samples - la.mean)
    torch.testing.assert_close(functions, expected, rtol=1e-8, atol=1e-10)


def test_network_at_samples():
    case = problem("regression")
    chosen = scattered(case, share=0.3).sort().values
    la = laplace(case, "full", chosen)
    mean, _ = la(case.new_x, pred_type="nn", n_samples=3, generator=torch.Generator().manual_seed(4))
    samples = la.sample(3, torch.Generator().manual_seed(4))
    outputs = []
    for sample in samples:
        weights = flat(case).clone()
        weights[chosen] = sample
        other = case.fresh
        nn.utils.vector_to_parameters(weights, other.parameters())
        outputs.append(other(case.new_x).detach())
    torch.testing.assert_close(mean, torch.stack(outputs).mean(0))


@pytest.mark.peer("laplace")
@pytest.mark.filterwarnings("ignore:By default .link_approx. is .probit.:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["diag", "full"])
def test_against_laplace_torch(structure, kind):
    peer = pytest.importorskip("laplace")
    case = problem(kind)
    chosen = scattered(case).sort().values
    noise = {"sigma_noise": NOISE} if kind == "regression" else {}
    theirs = peer.Laplace(
        case.fresh, kind, "subnetwork", structure, subnetwork_indices=chosen, prior_precision=DELTA, **noise
    )
    theirs.fit(DataLoader(TensorDataset(case.x, case.y), batch_size=5))
    la = laplace(case, structure, chosen)
    expected = theirs.posterior_precision
    torch.testing.assert_close(
        la.posterior_precision.to_dense(), expected if structure == "full" else expected.diag(), rtol=1e-8, atol=1e-9
    )
    ours, their = la(case.new_x), theirs(case.new_x)
    for one, two in zip(ours, their, strict=True) if kind == "regression" else [(ours, their)]:
        torch.testing.assert_close(one, two.detach())


# -- how weights are chosen


def choose(mask, case, likelihood=None):
    return mask.choose(Task(case.model, likelihood or curvature.Categorical(), case.data))


def test_masks_choose_what_they_say():
    case = problem("classification")
    weights = flat(case)
    largest = weights.abs().argsort(descending=True)[:7].sort().values
    assert torch.equal(choose(LargestMagnitude(7), case), largest)
    whole = Laplace(case.model, "classification", "all", "diag").fit(case.data)
    widest = whole.posterior.variance.argsort(descending=True, stable=True)[:7].sort().values
    assert torch.equal(choose(LargestVariance(7, whole), case), widest)
    one, two = (choose(RandomWeights(9, torch.Generator().manual_seed(3)), case) for _ in range(2))
    assert torch.equal(one, two)
    assert len(one.unique()) == 9
    assert not torch.equal(one, choose(RandomWeights(9, torch.Generator().manual_seed(4)), case))
    assert torch.equal(choose(Named(("0.bias", "4")), case), case.columns(["0.bias", *case.head]))


def test_random_weights_are_equally_probable():
    case = problem("classification")
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(flat(case)))
    for _ in range(400):
        counts[choose(RandomWeights(10, generator), case)] += 1
    expected = 400 * 10 / len(counts)
    assert ((counts - expected).square() / expected).sum() < 2 * len(counts)


def test_swag_is_the_variance_along_descent():
    case = problem("classification")
    task = Task(case.model, curvature.Categorical(), case.data)
    with untouched(case.model):
        found = swag_variance(task, snapshots=4, every=2, lr=0.05, momentum=0.8, weight_decay=1e-3)
    model = case.fresh
    descent = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8, weight_decay=1e-3)
    seen = []
    for epoch in range(8):
        for x, y in case.data:
            descent.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            descent.step()
        if epoch % 2:
            seen.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found, torch.stack(seen).var(0, correction=0), rtol=1e-8, atol=1e-14)
    chosen = choose(LargestSwagVariance(5, snapshots=4, every=2, lr=0.05, momentum=0.8, weight_decay=1e-3), case)
    assert torch.equal(chosen, found.argsort(descending=True)[:5].sort().values)


def test_weights_of_examples_are_those_of_descent():
    """Twice the weights are twice the steps."""
    case = problem("classification")
    data = [(x, y, torch.full((len(x),), 2.0)) for x, y in case.data]
    options = {"snapshots": 3, "momentum": 0.5, "weight_decay": 0.0}
    doubled = swag_variance(Task(case.model, curvature.Categorical(), data), lr=0.02, **options)
    plain = swag_variance(Task(case.model, curvature.Categorical(), case.data), lr=0.04, **options)
    torch.testing.assert_close(doubled, plain)


@pytest.mark.parametrize("mask", [LargestMagnitude(6), LargestSwagVariance(6, snapshots=2), Named(("2.weight",))])
def test_a_mask_is_asked_when_data_come(mask):
    case = problem("classification")
    la = laplace(case, "full", mask)
    chosen = choose(mask, case)
    chosen = chosen.nonzero()[:, 0] if chosen.dtype == torch.bool else chosen
    torch.testing.assert_close(la.mean, flat(case)[chosen])


# -- what is refused


@pytest.mark.parametrize(
    ("subnetwork", "error", "message"),
    [
        (torch.tensor([0.5]), TypeError, "integers or a Boolean mask"),
        (torch.tensor([1, 1]), ValueError, "distinct indices"),
        (torch.tensor([[1], [2]]), ValueError, "distinct indices"),
        (torch.tensor([0, 10**6]), ValueError, "Indices of weights are 0 to"),
        (torch.tensor([-1]), ValueError, "Indices of weights are 0 to"),
        (torch.zeros(0, dtype=torch.long), ValueError, "empty"),
        (torch.ones(3, dtype=torch.bool), ValueError, "Expected a mask over"),
        (None, ValueError, "belong together"),
        ("largest", TypeError, r"subnetwork='largest'.*LargestMagnitude"),
    ],
)
def test_a_bad_choice_is_refused_at_once(subnetwork, error, message):
    with pytest.raises(error, match=message):
        Laplace(problem("classification").model, "classification", "subnetwork", subnetwork=subnetwork)


def test_a_mask_is_refused_where_it_does_not_apply():
    case = problem("classification")
    with pytest.raises(ValueError, match="belong together"):
        Laplace(case.model, "classification", "all", subnetwork=LargestMagnitude(3))
    last = Laplace(case.model, "classification", "last_layer", "diag").fit(case.data)
    with pytest.raises(ValueError, match="subset_of_weights='all'"):
        choose(LargestVariance(3, last), case)
    with pytest.raises(ValueError, match=r"1 to \d+ of them, got 0"):
        choose(LargestMagnitude(0), case)
    with pytest.raises(TypeError, match="used up after one"):
        LargestSwagVariance(3).choose(Task(case.model, curvature.Categorical(), iter(case.data)))
    la = laplace(case, "diag", LargestMagnitude(3))
    with pytest.raises(ValueError, match="parts of parameters"):
        la.select(case.data)


def test_kronecker_blocks_that_have_to_be_written_out_may_not_fit(monkeypatch):
    monkeypatch.setattr("lapkit.curvature.operators.principal.default_budget", lambda device: 8)
    case = problem("classification")
    laplace(case, "kron", separable(case))
    with pytest.raises(ValueError, match="cut a Kronecker product into something that is none"):
        laplace(case, "kron", scattered(case))
