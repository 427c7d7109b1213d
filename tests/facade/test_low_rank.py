"""The posterior of low rank: that of the full matrix, in weight space and in function space, for everything asked."""

import pytest
import reference_problem as ref
import torch
from networks.attention import Attention
from oracles import ggn, jacobian, output_hessian
from torch import nn
from torch.nn import functional as F

from lapkit import Laplace
from lapkit.curvature import BlockDiagonal, Factored, LowRank
from lapkit.pruning import obd_saliency, obs_saliency, predicted_increase, pruning_masks

SPACES = ("weights", "functions", "auto")
KINDS = ("classification", "regression", "binary")
SUBSETS = ("all", "last_layer", "names")
PRIORS = ("scalar", "layerwise", "diag")


class Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(2, 4), Attention(4, 2), nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.embed(x.unflatten(1, (3, 2)))
        return self.head((tokens + self.attention(tokens)).mean(1))


NETS = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
    ),
    "attention": Attentive,
}
NAMES = {"mlp": ["2", "0.bias"], "cnn": ["1", "4.bias"], "attention": ["attention.qkv", "head.bias"]}


class Case:
    """Two fits of one network, of the full matrix and of its columns."""

    def __init__(self, net="mlp", kind="classification", subset="all", examples=7, **options):
        torch.manual_seed(0)
        self.net, self.kind = net, kind
        self.model = NETS[net]().double()
        self.subset = NAMES[net] if subset == "names" else subset
        x = torch.randn(examples, 6)
        y = {
            "classification": torch.arange(examples) % 3,
            "regression": torch.randn(examples, 3),
            "binary": torch.randint(2, (examples, 3)) * 1.0,
        }[kind]
        self.data, self.new_x = list(zip(x.split(3), y.split(3), strict=True)), torch.randn(4, 6)
        self.options = ({"sigma_noise": 0.6} if kind == "regression" else {}) | options

    def fit(self, structure="full", **options):
        return Laplace(self.model, self.kind, self.subset, structure, **self.options | options).fit(self.data)

    def pair(self, space, **options):
        return self.fit("full", **options), self.fit("lowrank", space=space, **options)


def close(actual, expected, rtol=1e-8, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def prior_of(la, structure):
    sizes = la.fitted.parameters.sizes
    count = {"scalar": 1, "layerwise": len(sizes), "diag": sum(sizes)}[structure]
    return torch.linspace(0.5, 2.0, count) if count > 1 else torch.tensor(0.7)


# -- the golden numbers


@pytest.fixture(params=SPACES)
def golden(request):
    la = Laplace(ref.model(), "classification", "all", "lowrank", space=request.param)
    return la.fit([(ref.inputs()[:4], ref.labels()[:4]), (ref.inputs()[4:], ref.labels()[4:])])


def test_golden_numbers(golden):
    assert float(golden.log_det_posterior_precision) == pytest.approx(ref.LOG_DET_PRECISION["full"], rel=1e-11)
    assert float(golden.log_det_ratio) == pytest.approx(ref.LOG_DET_PRECISION["full"], rel=1e-11)
    assert float(golden.log_marginal_likelihood()) == pytest.approx(ref.LOG_EVIDENCE["full"], rel=1e-11)
    variance = golden.function_distribution(ref.inputs()).variance[0]
    assert variance.tolist() == pytest.approx(list(ref.PREDICTIVE_VARIANCE["full"]), rel=2e-9)
    found = golden.optimize_prior_precision()
    assert float(golden.prior_precision) == pytest.approx(ref.BEST_PRIOR_PRECISION["full"], rel=1e-6)
    assert found.log_evidence == pytest.approx(ref.BEST_LOG_EVIDENCE["full"], rel=1e-10)


def test_golden_numbers_of_pruning(golden):
    """Of the mean loss with damping 0.1, which is a prior precision of 0.6 for the sum of six."""
    golden.prior_precision = 0.1 * ref.EXAMPLES
    squares, posterior = golden.mean.square(), golden.posterior
    surgeon = squares / (2 * posterior.variance) / ref.EXAMPLES
    damage = squares * posterior.precision.diagonal() / 2 / ref.EXAMPLES
    undamped = squares * golden.fitted.curvature.diagonal() / 2 / ref.EXAMPLES
    assert float(surgeon.sum()) == pytest.approx(3.288303330504, rel=1e-11)
    assert float(damage.sum()) == pytest.approx(4.478899738049, rel=1e-11)
    assert float(undamped.sum()) == pytest.approx(1.349260625323, rel=1e-11)
    assert surgeon.argsort()[:5].tolist() == [2, 30, 3, 13, 37]
    assert damage.argsort()[:5].tolist() == [2, 30, 3, 13, 32]
    assert float(surgeon.min()) == pytest.approx(2.98944e-7, rel=1e-5)
    assert float(damage.min()) == pytest.approx(3.23649e-7, rel=1e-5)
    scores = torch.cat([s.flatten() for s in obs_saliency(golden).values()])
    close(scores / ref.EXAMPLES, torch.cat([surgeon[:12], surgeon[16:36], surgeon[41:56]]))


def test_the_evidence_is_that_of_exact_curvature():
    """As an oracle of its own: full and low rank could share a mistake."""
    case = Case(examples=5)
    J = jacobian(case.model, torch.cat([x for x, _ in case.data]))
    f, y = case.model(torch.cat([x for x, _ in case.data])), torch.cat([y for _, y in case.data])
    H = ggn(J, output_hessian(lambda f, y: F.cross_entropy(f[None], y[None]), f, y))
    for space in SPACES:
        la = case.fit("lowrank", space=space)
        close(la.posterior_precision.to_dense(), H + torch.eye(len(H)))
        close(la.log_det_posterior_precision, torch.linalg.slogdet(H + torch.eye(len(H))).logabsdet)


# -- equal to the full matrix


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS)
def test_equal_to_the_full_matrix(net, kind, subset, space):
    case = Case(net, kind, subset, temperature=0.8, prior_mean=0.1)
    full, low = case.pair(space)
    for number, prior in enumerate(PRIORS):
        full.prior_precision = low.prior_precision = prior_of(full, prior)
        close(low.log_marginal_likelihood(), full.log_marginal_likelihood())
        close(low.log_det_posterior_precision, full.log_det_posterior_precision)
        close(low.posterior.variance, full.posterior.variance)
        one, two = (la.function_distribution(case.new_x) for la in (full, low))
        close(two.mean, one.mean)
        close(two.covariance, one.covariance)
        if number:
            continue
        weights = full.sample(3, torch.Generator().manual_seed(0))
        close(low.posterior.log_prob(weights), full.posterior.log_prob(weights))
        eye = torch.eye(full.n_params)
        root = low.posterior_precision.inverse_root_transpose(eye)
        close(root @ root.T @ full.posterior_precision.to_dense(), eye)


@pytest.mark.parametrize("space", ["weights", "functions"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_predict(kind, space):
    case = Case("cnn", kind)
    full, low = case.pair(space)

    def predictions(la):
        def seeded():
            return torch.Generator().manual_seed(1)

        yield la.functional_samples(case.new_x, 4, seeded())
        yield la.predictive_samples(case.new_x, 4, seeded())
        predictive = la.predictive_distribution(case.new_x)
        yield predictive.probs if kind == "classification" else predictive.mean
        if kind == "regression":
            yield from la(case.new_x)
            yield la(case.new_x, diagonal_output=True)[1]
            yield from la(case.new_x, joint=True)
        else:
            yield la(case.new_x)
            yield la(case.new_x, link_approx="mc", n_samples=5, generator=seeded())

    for one, two in zip(predictions(full), predictions(low), strict=True):
        close(two, one)


@pytest.mark.parametrize("prior", PRIORS)
def test_joint_covariance_in_function_space(prior):
    case = Case("cnn", "regression")
    full, low = case.pair("functions")
    full.prior_precision = low.prior_precision = prior_of(full, prior)
    close(low(case.new_x, joint=True)[1], full(case.new_x, joint=True)[1])


@pytest.mark.parametrize("space", ["weights", "functions"])
@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("prior", PRIORS)
def test_gradients_of_the_evidence(prior, kind, space):
    full, low = Case("cnn", kind).pair(space)

    def gradient(la):
        delta = prior_of(la, prior).requires_grad_()
        noise = torch.tensor(0.6, requires_grad=True)
        given = {"prior_precision": delta} | ({"sigma_noise": noise} if kind == "regression" else {})
        leaves = [delta, noise] if kind == "regression" else [delta]
        return torch.autograd.grad(la.log_marginal_likelihood(**given), leaves)

    for one, two in zip(gradient(full), gradient(low), strict=True):
        close(two, one)


@pytest.mark.parametrize("space", ["weights", "functions"])
@pytest.mark.parametrize("prior", PRIORS)
def test_tuning(prior, space):
    case = Case("mlp", "regression", examples=5)
    full, low = case.pair(space)
    steps = 5 if prior == "diag" else 100
    settings = {"prior_structure": prior, "tune_noise": True, "n_steps": steps}
    one, two = (la.optimize_prior_precision(**settings) for la in (full, low))
    assert two.log_evidence == pytest.approx(one.log_evidence, rel=1e-7)
    close(low.sigma_noise, full.sigma_noise, rtol=1e-4)


@pytest.mark.parametrize("space", ["weights", "functions"])
@pytest.mark.parametrize("curvature", ["ef", "mc"])
def test_other_curvatures(curvature, space):
    case = Case("cnn", "regression")
    pair = [
        Laplace(case.model, "regression", "all", structure, curvature=curvature, sigma_noise=0.6, **options)
        for structure, options in (("full", {}), ("lowrank", {"space": space}))
    ]
    full, low = (la.fit(case.data, generator=torch.Generator().manual_seed(0)) for la in pair)
    close(low.posterior_precision.to_dense(), full.posterior_precision.to_dense())
    close(low.log_marginal_likelihood(), full.log_marginal_likelihood())


@pytest.mark.parametrize("space", ["weights", "functions"])
def test_pruning(space):
    full, low = Case("cnn").pair(space)
    for saliency in (obd_saliency, obs_saliency):
        one, two = saliency(full), saliency(low)
        assert [(m, n) for m, n in one] == [(m, n) for m, n in two]
        for key in one:
            close(two[key], one[key])
        masks = pruning_masks(one, 0.5), pruning_masks(two, 0.5)
        assert all(torch.equal(masks[0][key], masks[1][key]) for key in one)
        assert predicted_increase(two, masks[1]) == pytest.approx(predicted_increase(one, masks[0]))


def test_surgeon_never_exceeds_damage_of_the_same_matrix():
    la = Case("cnn").fit("lowrank")
    damage = la.mean.square() * la.posterior_precision.diagonal() / 2
    surgeon = la.mean.square() / (2 * la.posterior.variance)
    assert (surgeon <= damage * (1 + 1e-12)).all()
    assert (surgeon < 0.9 * damage).any()
    diagonal = Case("cnn").fit("diag")
    alone = torch.cat([s.flatten() for s in obs_saliency(diagonal).values()])
    parts = diagonal.mean.square() * diagonal.posterior_precision.diagonal() / 2
    weights = [part.flatten() for part in diagonal.fitted.parameters.split(parts).values() if part.ndim > 1]
    close(alone, torch.cat(weights))


# -- blocks


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("net", NETS)
def test_blocks_of_parameters(net, space):
    case = Case(net)
    exact, low = case.fit("blockdiag"), case.fit("lowrank", space=space, per_parameter=True)
    for prior in PRIORS:
        exact.prior_precision = low.prior_precision = prior_of(exact, prior)
        close(low.posterior_precision.to_dense(), exact.posterior_precision.to_dense())
        close(low.log_marginal_likelihood(), exact.log_marginal_likelihood())
        close(low.function_distribution(case.new_x).covariance, exact.function_distribution(case.new_x).covariance)
    tuned = [la.optimize_prior_precision(prior_structure="layerwise").log_evidence for la in (exact, low)]
    assert tuned[0] == pytest.approx(tuned[1], rel=1e-8)


# -- ranks


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("per_parameter", [False, True])
def test_a_lower_rank_can_only_make_the_posterior_wider(per_parameter, prior):
    """`V V^T` loses a positive matrix, so that the precision falls and the covariance rises in Loewner's order."""
    case = Case("cnn", examples=9)
    exact = case.fit("lowrank", per_parameter=per_parameter)
    delta = prior_of(exact, prior)
    last = None
    for rank in (12, 6, 3, 1):
        la = case.fit("lowrank", rank=rank, per_parameter=per_parameter)
        la.prior_precision = exact.prior_precision = delta
        below, above = (torch.linalg.inv(a.posterior_precision.to_dense()) for a in (exact, la))
        assert torch.linalg.eigvalsh(above - below).min() > -1e-10
        assert (la.posterior.variance >= exact.posterior.variance - 1e-12).all()
        wide, narrow = (a.function_distribution(case.new_x).covariance for a in (la, exact))
        assert torch.linalg.eigvalsh(wide - narrow).min() > -1e-10
        assert la.log_det_posterior_precision <= exact.log_det_posterior_precision + 1e-10
        if last is not None:  # of one batch the ranks are nested
            assert la.log_det_posterior_precision <= last + 1e-10
        last = la.log_det_posterior_precision
    assert (wide.diagonal(dim1=1, dim2=2) > 1.01 * narrow.diagonal(dim1=1, dim2=2)).any()


def test_a_rank_that_loses_nothing():
    case = Case("cnn", examples=5)
    close(case.fit("lowrank", rank=15).posterior_precision.to_dense(), case.fit().posterior_precision.to_dense())


# -- which form


def test_the_smaller_form_is_chosen():
    """Activations beat columns where layers are wide; a few weights and many examples turn that around."""
    wide = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3))
    x, y = torch.randn(60, 6), torch.arange(60) % 3
    data = list(zip(x.split(10), y.split(10), strict=True))
    assert isinstance(Laplace(wide, "classification", "all", "lowrank").fit(data).fitted.curvature, Factored)
    small = Laplace(nn.Linear(6, 3), "classification", "all", "lowrank").fit(data).fitted.curvature
    assert isinstance(small, LowRank)
    assert small.rank <= small.size
    blocks = Laplace(wide, "classification", "all", "lowrank", per_parameter=True, space="functions").fit(data)
    assert isinstance(blocks.fitted.curvature, BlockDiagonal)
    kinds = [type(block) for block in blocks.fitted.curvature.blocks]
    assert kinds == [Factored, LowRank, LowRank, LowRank]  # 120 columns are as many as a block has weights, or more
    for space, kind in (("weights", LowRank), ("functions", Factored)):
        la = Laplace(wide, "classification", "all", "lowrank", space=space).fit(data[:1])
        assert isinstance(la.fitted.curvature, kind)


@pytest.mark.parametrize("space", ["weights", "functions"])
def test_batches_and_budgets_do_not_matter(space):
    case = Case("cnn")
    whole = case.fit("lowrank", space=space)
    x, y = (torch.cat(parts) for parts in zip(*case.data, strict=True))
    for data, budget in ([(x, y)], None), ([(x[i : i + 1], y[i : i + 1]) for i in range(7)], None), (case.data, 2000):
        la = Laplace(case.model, "classification", "all", "lowrank", space=space, memory_budget=budget).fit(data)
        close(la.posterior_precision.to_dense(), whole.posterior_precision.to_dense())
        close(la(case.new_x), whole(case.new_x))


def test_inputs_that_change_after_the_fit_do_not_change_it():
    case = Case("mlp")
    la = case.fit("lowrank", space="functions")
    before = la.posterior_precision.to_dense()
    for x, _ in case.data:
        x.zero_()
    close(case.fit("lowrank", space="functions").posterior_precision.to_dense().diagonal()[:30], torch.ones(30))
    close(la.posterior_precision.to_dense(), before)


@pytest.mark.parametrize("space", ["weights", "functions"])
def test_single_precision_beside_a_small_prior(space):
    """Where the data leave a 1e-8 of the prior's variance, single precision has nothing left of the difference."""
    case = Case("mlp", "regression", examples=12, sigma_noise=0.02, prior_precision=1e-3)
    exact = case.fit().function_distribution(case.data[0][0])
    single = Laplace(case.model.float(), "regression", "all", "lowrank", space=space, **case.options)
    single.fit([(x.float(), y.float()) for x, y in case.data])
    found = single.function_distribution(case.data[0][0].float())
    assert found.covariance.dtype == torch.float32
    torch.testing.assert_close(found.variance.double(), exact.variance, rtol=2e-2, atol=0)
    root = case.model.double().float()
    assert root is case.model


@pytest.mark.parametrize("options", [{"rank": 3}, {"per_parameter": True}, {"space": "weights"}])
def test_settings_of_low_rank_are_refused_elsewhere(options):
    with pytest.raises(ValueError, match="they belong to 'lowrank' only"):
        Laplace(nn.Linear(2, 2), "classification", hessian_structure="kron", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "at least 1, got 0"),
        ({"rank": 3, "space": "functions"}, "choose space='weights', or no rank"),
        ({"space": "outer"}, "Unknown space 'outer'. Choose one of 'auto', 'weights', 'functions'"),
    ],
)
def test_settings_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        Laplace(nn.Linear(2, 2), "classification", hessian_structure="lowrank", **options)


# -- samples of whole functions


@pytest.mark.parametrize("samples", [2, 9])
@pytest.mark.parametrize("structure", ["lowrank", "kron", "diag"])
@pytest.mark.parametrize("net", NETS)
def test_joint_samples_of_functions(net, structure, samples):
    """`f + J (w - w*)` with the weights of `sample`: by the graph for few samples, by the Jacobian for many."""
    case = Case(net, "regression", prior_precision=3.0)
    la = case.fit(structure)
    found = la.functional_samples(case.new_x, samples, torch.Generator().manual_seed(3), joint=True)
    weights = la.sample(samples, torch.Generator().manual_seed(3))
    rows = jacobian(case.model, case.new_x)
    expected = case.model(case.new_x).detach() + torch.einsum("ncp,sp->snc", rows, weights - la.mean)
    close(found, expected)
