"""Products with the curvature of a data set against dense matrices from autograd, on the contract networks."""

import copy

import oracles
import pytest
import reference_problem as ref
import torch
from fitting import fit
from product_cases import PRODUCTS, close, flat, reference, seeded, slow_ggn, slow_hessian, uneven
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _WeightNorm

from lapkit.curvature import (
    Bernoulli,
    Categorical,
    EmpiricalFisher,
    EmpiricalFisherProduct,
    FisherProduct,
    Gaussian,
    GGNDense,
    GGNProduct,
    HessianProduct,
    HeteroscedasticGaussian,
    MonteCarloGGN,
    Parameters,
)


def test_ggn_of_every_network(network, slow_jacobian):
    model, inputs = network
    x = inputs(5)
    f = model(x).detach().reshape(5, -1)
    expected = slow_ggn(slow_jacobian(model, x), f, lambda f, y: (f - y).square().sum() / 2)
    product = GGNProduct(model, Gaussian(), uneven(x, torch.zeros_like(f)))
    vectors = torch.randn(product.size, 3)
    close(product @ vectors, expected @ vectors)
    close(product @ vectors[:, 0], expected @ vectors[:, 0])


def test_hessian_of_every_network(network):
    model, inputs = network
    if any(isinstance(module, _WeightNorm) for module in model.modules()):
        pytest.skip("torch's second derivative is wrong: see test_wrong_second_derivatives_are_refused")
    x = inputs(5)
    y = torch.randn_like(model(x).detach()).reshape(5, -1)
    expected = slow_hessian(model, lambda m: (m(x).reshape(5, -1) - y).square().sum() / 2)
    product = HessianProduct(model, Gaussian(), uneven(x, y))
    vectors = torch.randn(product.size, 3)
    close(product @ vectors, expected @ vectors)
    close(product @ vectors[:, 0], expected @ vectors[:, 0])


def test_golden_numbers():
    ggn, hessian = (torch.linalg.eigvalsh(reference(kind).to_dense()) / ref.EXAMPLES for kind in PRODUCTS[:2])
    assert ggn.flip(0)[:5].tolist() == pytest.approx(ref.GGN_MEAN_TOP_EIGENVALUES, rel=1e-9, abs=1e-10)
    assert hessian[[0, -1]].tolist() == pytest.approx(ref.HESSIAN_MEAN_EXTREME_EIGENVALUES, rel=1e-9)
    for kind, traces in ((GGNProduct, ref.GGN_MEAN_TRACES), (HessianProduct, ref.HESSIAN_MEAN_TRACES)):
        product = reference(kind)
        parts = (product.to_dense().diagonal() / ref.EXAMPLES).split(product.chosen.sizes)
        assert [float(p.sum()) for p in parts] == pytest.approx(traces, rel=1e-9, abs=1e-10)


def weighted_sequences():
    """Two outputs at each of three positions, some targets missing, examples weighted, batches uneven."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4))
    x, y, w = torch.randn(5, 3, 2), torch.randint(4, (5, 3)), torch.rand(5)
    y[0, 1] = y[3, 2] = -100
    return model, [(x[:2], y[:2], w[:2]), (x[2:], y[2:], w[2:])]


def test_sequences_and_weights():
    model, data = weighted_sequences()

    def loss(m):
        return sum(
            (F.cross_entropy(m(x).flatten(0, 1), y.flatten(), reduction="none").reshape(y.shape).sum(1) * w).sum()
            for x, y, w in data
        )

    close(HessianProduct(model, Categorical(), data).to_dense(), slow_hessian(model, loss))
    jacobian = oracles.jacobian(model, torch.cat([x for x, _, _ in data])).reshape(5, 3, 4, -1)
    expected = torch.zeros(jacobian.shape[-1], jacobian.shape[-1])
    n = 0
    for x, y, w in data:
        for i in range(len(x)):
            p = model(x[i]).softmax(-1).detach()
            for t in range(3):
                if y[i, t] >= 0:
                    J = jacobian[n, t]
                    expected += w[i] * J.T @ (torch.diag(p[t]) - torch.outer(p[t], p[t])) @ J
            n += 1
    close(GGNProduct(model, Categorical(), data).to_dense(), expected)


def test_empirical_fisher():
    model, data = weighted_sequences()
    product = EmpiricalFisherProduct(model, Categorical(), data)
    expected = 0
    for x, y, w in data:
        for i in range(len(x)):
            g = flat(torch.autograd.grad(F.cross_entropy(model(x[i]), y[i], reduction="sum"), model.parameters()))
            expected = expected + w[i] * torch.outer(g, g)
    close(product.to_dense(), expected)
    (result,) = fit(model, data, GGNDense, columns=EmpiricalFisher())
    close(product.to_dense(), result.operator().to_dense())


def test_monte_carlo_fisher_is_one_matrix():
    model, data = weighted_sequences()
    product = FisherProduct(model, Categorical(), data, samples=3, generator=torch.Generator().manual_seed(1))
    dense = product.to_dense()
    v = torch.randn(product.size)
    close(product @ v, dense @ v)
    x, y, w = (torch.cat(part).flip(0) for part in zip(*data, strict=True))
    again = FisherProduct(model, Categorical(), [(x, y, w)], samples=3, generator=torch.Generator().manual_seed(1))
    close(again.to_dense(), dense)
    other = FisherProduct(model, Categorical(), data, samples=3, generator=torch.Generator().manual_seed(2))
    assert (other.to_dense() - dense).norm() > 0.01 * dense.norm()


def test_monte_carlo_fisher_is_unbiased():
    dense, exact = reference(FisherProduct, samples=1000).to_dense(), reference(GGNProduct).to_dense()
    assert 0 < (dense - exact).norm() < 0.06 * exact.norm()


def test_monte_carlo_fisher_is_the_accumulated_one():
    product = reference(FisherProduct, samples=5)
    columns = MonteCarloGGN(5, seed=product._columns.seed)
    data = uneven(ref.inputs(), ref.labels())
    (result,) = fit(ref.model(), data, GGNDense, columns=columns)
    close(product.to_dense(), result.operator().to_dense())


@pytest.mark.parametrize("kind", PRODUCTS)
def test_blocks(kind):
    product = reference(kind, **seeded(kind))
    names, whole = product.chosen.names, product.to_dense()
    for blocks in (True, [["0"], ["4.weight", "2.bias"], ["4.bias", "2.weight"]]):
        groups = [[n] for n in names] if blocks is True else blocks
        belongs = [next(g for g, group in enumerate(groups) if n in group or n[0] in group) for n in names]
        group_of = torch.tensor(belongs).repeat_interleave(torch.tensor(product.chosen.sizes))
        close(reference(kind, blocks=blocks, **seeded(kind)).to_dense(), whole * (group_of[:, None] == group_of))


@pytest.mark.parametrize("kind", PRODUCTS)
def test_some_parameters(kind, unchanged):
    model = ref.model()
    model[0].bias.requires_grad_(False)
    data = uneven(ref.inputs(), ref.labels())
    with unchanged(model):
        product = kind(model, Categorical(), data, parameters=Parameters.of(model, ["0", "4.bias"]), **seeded(kind))
        assert product.chosen.names == ("0.weight", "4.bias")
        part = product.to_dense()
    index = torch.cat([torch.arange(12), torch.arange(56, 59)])
    close(part, reference(kind, **seeded(kind)).to_dense()[index][:, index])


@pytest.mark.parametrize("kind", PRODUCTS)
def test_chunks_do_not_matter(kind):
    vectors = torch.randn(ref.PARAMETERS, 7)
    whole, *chunked = (reference(kind, memory_budget=budget, **seeded(kind)) for budget in (None, 1, 10_000, 20_000))
    for product in chunked:
        close(product @ vectors, whole @ vectors)


def test_symmetric_and_quadratic():
    product = reference(HessianProduct)
    dense, v = product.to_dense(), torch.randn(ref.PARAMETERS)
    close(dense, dense.T)
    close(product.quadratic(v), v @ dense @ v)


def test_model_comes_back(unchanged):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).train()
    data = uneven(ref.inputs(), ref.labels())
    for kind in PRODUCTS:
        with unchanged(model):
            kind(model, Categorical(), data) @ torch.ones(sum(p.numel() for p in model.parameters()))
    product = GGNProduct(model, Categorical(), [*data, (ref.inputs(), ref.labels()[:2])], check=False)
    with unchanged(model), pytest.raises(ValueError, match="target"):
        product @ torch.ones(product.size)


def test_unused_parameters_have_no_curvature():
    model = ref.model()
    model.spare = nn.Parameter(torch.ones(2))
    plain = model[:5]
    model.forward = lambda x: plain(x)
    for kind in (GGNProduct, HessianProduct):
        whole = kind(model, Categorical(), uneven(ref.inputs(), ref.labels()), blocks=True).to_dense()
        assert not whole[:2].any()
        assert not whole[:, :2].any()
        close(whole[2:, 2:], reference(kind, blocks=True).to_dense())


def test_sparse_gradients():
    words, y = torch.randint(5, (6, 2)), ref.labels()
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    plain = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    plain.load_state_dict(model.state_dict())
    for kind in (GGNProduct, HessianProduct):
        v = torch.randn(47)
        close(kind(model, Categorical(), uneven(words, y)) @ v, kind(plain, Categorical(), uneven(words, y)) @ v)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_in_single_precision(cell):
    """The fused kernels of float32 have no second derivative."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = cell(2, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.cell(x)[0][:, -1])

    model = Model()
    single = copy.deepcopy(model).float()
    x, y = torch.randn(6, 4, 2), ref.labels()
    for kind in (GGNProduct, HessianProduct):
        expected = kind(model, Categorical(), uneven(x, y))
        vectors = torch.randn(expected.size, 2)
        found = kind(single, Categorical(), uneven(x.float(), y)) @ vectors.float()
        close(found.double(), expected @ vectors, 1e-4)


def test_half_precision_gives_single():
    model = ref.model().to(torch.bfloat16)
    product = GGNProduct(model, Categorical(), [(ref.inputs().bfloat16(), ref.labels())])
    assert product.dtype == torch.float32
    v = torch.randn(ref.PARAMETERS, 2)
    expected = reference(GGNProduct) @ v
    assert (product @ v.float() - expected).norm() < 0.1 * expected.norm()


def test_trace():
    product = reference(GGNProduct)
    assert float(product.trace(48).value) / ref.EXAMPLES == pytest.approx(ref.GGN_MEAN_TRACE, rel=1e-10)  # rank 12


@pytest.mark.peer("curvlinops")
@pytest.mark.filterwarnings("ignore")
def test_curvlinops():
    import curvlinops

    data = uneven(ref.inputs(), ref.labels())
    model = ref.model()
    peers = {
        GGNProduct: curvlinops.GGNLinearOperator,
        HessianProduct: curvlinops.HessianLinearOperator,
        EmpiricalFisherProduct: curvlinops.EFLinearOperator,
    }
    loss = nn.CrossEntropyLoss(reduction="sum")
    vectors = torch.randn(ref.PARAMETERS, 3)
    for kind, peer in peers.items():
        theirs = peer(model, loss, list(model.parameters()), data, check_deterministic=False)
        close(kind(model, Categorical(), data) @ vectors, theirs @ vectors, 1e-10)
    blocks = curvlinops.HessianLinearOperator(
        model, loss, list(model.parameters()), data, check_deterministic=False, block_sizes=[2, 2, 2]
    )
    ours = HessianProduct(model, Categorical(), data, blocks=[["0"], ["2"], ["4"]])
    close(ours @ vectors, blocks @ vectors, 1e-10)


@pytest.mark.peer("backpack")
@pytest.mark.filterwarnings("ignore")
def test_backpack():
    """Products for single parameters, of the blocks on the diagonal."""
    import backpack

    model = backpack.extend(ref.model())
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    vectors = torch.randn(ref.PARAMETERS, 3)
    for kind, extension, name in (
        (GGNProduct, backpack.extensions.GGNMP(), "ggnmp"),
        (HessianProduct, backpack.extensions.HMP(), "hmp"),
    ):
        with backpack.backpack(extension):
            loss(model(ref.inputs()), ref.labels()).backward()
        parts = zip(model.parameters(), vectors.split([p.numel() for p in model.parameters()]), strict=True)
        theirs = torch.cat([getattr(p, name)(v.T.reshape(3, *p.shape)).flatten(1).T for p, v in parts])
        close(reference(kind, blocks=True) @ vectors, theirs.detach(), 1e-10)


@pytest.mark.parametrize("shape", [(5, 4), (5, 3, 4)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_hessians_of_likelihoods_by_products(shape, scale):
    """They are those of the roots, also where a network is sure of itself."""
    f, v = scale * torch.randn(shape), torch.randn(shape)
    labels = torch.randint(4, shape[:-1])
    labels[0] = -100
    answers = torch.randint(2, shape).double()
    answers[1] = -1
    for likelihood, y in (
        (Categorical(class_weights=torch.rand(4), label_smoothing=0.1), labels),
        (Categorical(), labels),
        (Bernoulli(pos_weight=torch.rand(4), missing=-1), answers),
        (Gaussian(), torch.randn(shape)),
        (HeteroscedasticGaussian(), torch.randn(*shape[:-1], 2)),
    ):
        y = likelihood.check(f, y)
        root = likelihood.hessian_root(f, y)
        expected = torch.einsum("k...c,k...d,...d->...c", root, root, v)
        torch.testing.assert_close(likelihood.hessian_product(f, y, v), expected, rtol=1e-9, atol=1e-300)
