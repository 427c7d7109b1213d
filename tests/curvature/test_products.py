"""Products with the curvature of a data set against dense matrices from autograd, on the contract networks."""

import copy

import oracles
import pytest
import reference_problem as ref
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
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
    accumulate,
)
from lapkit.curvature.products.recording import CannotReplay
from lapkit.curvature.products.tangents import Tangents

PRODUCTS = (GGNProduct, HessianProduct, FisherProduct, EmpiricalFisherProduct)


def close(actual, expected, tolerance=1e-9):
    """Relative to the largest entry: an entry of zero is a sum that cancels."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()) + 1e-14)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def slow_hessian(model, loss):
    """Row by row, each from a graph of its own."""
    weights = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = flat(torch.autograd.grad(loss(model), weights, create_graph=True, materialize_grads=True))
        rows = [
            flat(torch.autograd.grad(g, weights, retain_graph=True, materialize_grads=True))
            if g.requires_grad
            else torch.zeros_like(gradient)
            for g in gradient
        ]
    return torch.stack(rows).detach()


def slow_ggn(jacobian, f, loss):
    return oracles.ggn(jacobian, oracles.output_hessian(loss, f, torch.zeros(len(f), 1)))


def seeded(kind):
    """The same samples each time."""
    return {"generator": torch.Generator().manual_seed(0)} if kind is FisherProduct else {}


def uneven(x, y):
    """Batches of one, of three and of the rest."""
    return [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]


def reference(kind, **options):
    model = ref.model()
    return kind(model, Categorical(), uneven(ref.inputs(), ref.labels()), **options)


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


def accumulated(columns, model, data, likelihood):
    parameters = Parameters.of(model)
    quantity = GGNDense(parameters)
    accumulate(model, parameters, likelihood, columns, data, [quantity])
    return quantity.result().operator().to_dense()


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
    close(product.to_dense(), accumulated(EmpiricalFisher(), model, data, Categorical()))


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
    close(product.to_dense(), accumulated(columns, ref.model(), data, Categorical()))


@pytest.mark.parametrize("kind", PRODUCTS)
def test_blocks(kind):
    product = reference(kind, **seeded(kind))
    names, whole = product.chosen.names, product.to_dense()
    for blocks in (True, [["0"], ["4.weight", "2.bias"], ["4.bias", "2.weight"]]):
        groups = [[n] for n in names] if blocks is True else blocks
        belongs = [next(g for g, group in enumerate(groups) if n in group or n[0] in group) for n in names]
        group_of = torch.tensor(belongs).repeat_interleave(torch.tensor(product.chosen.sizes))
        close(reference(kind, blocks=blocks, **seeded(kind)).to_dense(), whole * (group_of[:, None] == group_of))


@pytest.mark.parametrize(
    "blocks", [[["0", "2"]], [["0", "2", "4"], ["4.bias"]], [["0", "2", "4", "nothing"]], [["0", "2", "4"], []]]
)
def test_groups_that_do_not_fit(blocks):
    with pytest.raises(ValueError, match=r"Groups|Each parameter"):
        reference(GGNProduct, blocks=blocks)


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


def test_data_read_once_is_refused():
    data = uneven(ref.inputs(), ref.labels())
    for once in (iter(data), (batch for batch in data), map(tuple, data)):
        with pytest.raises(TypeError, match="only once"):
            GGNProduct(ref.model(), Categorical(), once)
    with pytest.raises(ValueError, match="no batch"):
        GGNProduct(ref.model(), Categorical(), [])


def test_changing_data_is_refused_shuffled_is_not():
    class Augmented:
        def __iter__(self):
            return iter([(ref.inputs() + 0.1 * torch.randn(6, 3), ref.labels())])

    class Shrinking(list):
        def __iter__(self):
            return iter([self.pop()])

    batch = (ref.inputs(), ref.labels())
    with pytest.raises(ValueError, match="disagree"):
        GGNProduct(ref.model(), Categorical(), Augmented())
    with pytest.raises(ValueError, match="disagree"):
        GGNProduct(ref.model(), Categorical(), Shrinking([(batch[0][:2], batch[1][:2]), batch]))
    GGNProduct(ref.model(), Categorical(), Augmented(), check=False)
    dataset = torch.utils.data.TensorDataset(*batch)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
    product = HessianProduct(ref.model(), Categorical(), loader)
    close(product.to_dense(), reference(HessianProduct).to_dense())


def test_vectors_that_do_not_fit():
    product = reference(GGNProduct)
    with pytest.raises(ValueError, match="59"):
        product @ torch.ones(58)
    with pytest.raises(TypeError, match="float64"):
        product @ torch.ones(59, dtype=torch.float32)
    with pytest.raises(ValueError, match="NaN"):
        product @ torch.full((59,), torch.nan)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class NoBatch(torch.autograd.Function):
    """The square, whose derivatives look at numbers and so cannot be mapped over."""

    generate_vmap_rule = False

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return NoBatchProduct.apply(g, x)


class NoBatchProduct(torch.autograd.Function):
    """`2 g x`."""

    @staticmethod
    def forward(g, x):
        return 2 * g * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, h):
        g, x = ctx.saved_tensors
        assert float(h.sum()) == float(h.sum())
        return 2 * h * x, 2 * h * g

    @staticmethod
    def vmap(info, in_dims, g, x):
        """Wrong by a factor."""
        return 4 * g * x, in_dims[0]


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.two(NoBatch.apply(self.one(x)))


class PlainSquares(Squares):
    def forward(self, x):
        return self.two(self.one(x).square())


@pytest.mark.parametrize("kind", [GGNProduct, HessianProduct])
def test_operations_that_fail_in_batches_go_one_by_one(kind):
    model, plain = Squares(), PlainSquares()
    plain.load_state_dict(model.state_dict())
    data = uneven(ref.inputs(), ref.labels())
    vectors = torch.randn(31, 4)
    product = kind(model, Categorical(), data)
    with pytest.warns(UserWarning, match="one by one"):
        found = product @ vectors
    close(found, kind(plain, Categorical(), data) @ vectors)
    close(product @ vectors[:, :1], found[:, :1])  # one vector needs no batch, and warns of nothing


def test_wrong_rules_for_batches_are_seen(monkeypatch):
    product = reference(GGNProduct)
    vectors = torch.randn(product.size, 3)
    expected = product @ vectors
    right = torch.func.vmap
    monkeypatch.setattr(torch.func, "vmap", lambda f: lambda v: tuple(1.001 * t for t in right(f)(v)))
    with pytest.warns(UserWarning, match="a wrong product"):
        close(product @ vectors, expected)


def test_operations_without_second_derivative_are_refused(unchanged):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    class Model(nn.Linear):
        def forward(self, x):
            return Once.apply(super().forward(x))

    class Negative(torch.autograd.Function):
        """Its backward pass cuts the graph."""

        @staticmethod
        def forward(ctx, x):
            return -x

        @staticmethod
        def backward(ctx, g):
            return -g.detach()

    class Distances(nn.Linear):
        def forward(self, x):
            return torch.cdist(x, self.weight)

    for model in (Model(3, 3), nn.Sequential(nn.Linear(3, 3), Lambda(Negative.apply)), Distances(3, 3, bias=False)):
        for kind in PRODUCTS:
            with unchanged(model), pytest.raises(RuntimeError, match=r"differentiated twice|are wrong"):
                kind(model, Categorical(), uneven(ref.inputs(), ref.labels()))


def test_wrong_second_derivatives_are_refused():
    """That of weight_norm misses the derivative of the norm, which the GGN does not need."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    data = uneven(ref.inputs(), ref.labels())
    GGNProduct(model, Categorical(), data)
    with pytest.raises(RuntimeError, match="are wrong"):
        HessianProduct(model, Categorical(), data)


def test_detached_outputs_are_refused():
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(ValueError, match="does not depend"):
        GGNProduct(Detached(3, 3), Categorical(), uneven(ref.inputs(), ref.labels())) @ torch.ones(12)


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


def convolutional(*layers):
    """Six examples of one channel, three classes."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), *layers, nn.Flatten(), nn.Linear(32, 3))


class Rows(nn.Module):
    """A layer for sequences, over the rows of an image."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        result = self.layer(x.flatten(0, 1))
        return (result[0] if isinstance(result, tuple) else result).reshape(x.shape)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)


def swapped(x):
    """The two channels exchanged, by writing into memory that was made beforehand."""
    result = torch.zeros_like(x)
    result[:, :1] += x[:, 1:]
    result[:, 1:].copy_(x[:, :1])
    return result * 1.5


FORWARD = {
    "plain": convolutional,
    "pooling": lambda: convolutional(nn.Upsample(scale_factor=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "transposed, in place": lambda: convolutional(
        Lambda(lambda x: (x + 1).transpose(2, 3).mul_(2)), nn.GroupNorm(2, 2)
    ),
    "batch norm": lambda: convolutional(nn.BatchNorm2d(2), nn.Softplus()),
    "attention": lambda: convolutional(Rows(SelfAttention(4, 2, batch_first=True))),
    "transformer": lambda: convolutional(Rows(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True))),
    "written into zeros": lambda: convolutional(Lambda(swapped), nn.Tanh()),
}
RECURRENT = {  # overwrite parts of what they have read other parts of, which cannot be told from the same part
    "lstm": lambda: convolutional(Rows(nn.LSTM(4, 4, batch_first=True))),
    "gru": lambda: convolutional(Rows(nn.GRU(4, 4, batch_first=True))),
}
BACKWARD = {
    "no rule": lambda: convolutional(Lambda(NoBatch.apply), nn.Tanh()),
    "wrong rule": lambda: convolutional(Lambda(WrongForward.apply)),
}


class WrongForward(torch.autograd.Function):
    """The square, whose derivative in forward mode is wrong."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x

    @staticmethod
    def jvp(ctx, v):
        (x,) = ctx.saved_tensors
        return 2.001 * v * x


@pytest.mark.filterwarnings("ignore:Some operation of this model cannot be differentiated in a batch")
@pytest.mark.parametrize("name", [*FORWARD, *RECURRENT, *BACKWARD])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("together", [True, False])
def test_forward_mode(name, count, together, monkeypatch, unchanged, slow_jacobian):
    """Convolutions go forward where operations allow it, and are exact either way."""
    if not together:
        monkeypatch.setattr("lapkit.curvature.products.data_product.CACHE", 0)
    model = (FORWARD | RECURRENT | BACKWARD)[name]().eval()
    x, y = torch.randn(6, 1, 6, 6), ref.labels()
    data = uneven(x, y)
    product = GGNProduct(model, Categorical(), data)
    vectors = torch.randn(product.size, count)
    with unchanged(model):
        found = product @ vectors
    assert product._forward_mode.possible == (name in FORWARD or (name in RECURRENT and count == 1))
    f = model(x).detach()
    targets = iter(y)
    expected = slow_ggn(slow_jacobian(model, x), f, lambda f, y: F.cross_entropy(f, next(targets)))
    close(found, expected @ vectors)
    close(product @ vectors, found)


def test_graphs_of_a_new_form_are_compared_again():
    """Large inputs take an operation whose rule for forward mode is wrong."""

    class Model(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return WrongForward.apply(y) if float(x.abs().max()) > 100 else y.square()

    model, x = Model(*convolutional()), torch.randn(6, 1, 6, 6)
    x[4] *= 1000
    v = torch.randn(sum(p.numel() for p in model.parameters()), 3)
    product = GGNProduct(model, Gaussian(), [(x[:3], torch.zeros(3, 3)), (x[3:], torch.zeros(3, 3))])
    found = product @ v
    assert not product._forward_mode.possible
    plain = nn.Sequential(model, nn.Identity())
    plain[0].forward = lambda x: nn.Sequential.forward(model, x).square()
    close(found, GGNProduct(plain, Gaussian(), [(x, torch.zeros(6, 3))]) @ v)


def test_blocks_of_convolutions():
    model, data = convolutional().eval(), uneven(torch.randn(6, 1, 6, 6), ref.labels())
    whole, blocks = (GGNProduct(model, Categorical(), data, blocks=b).to_dense() for b in (False, [["0"], ["3"]]))
    close(blocks[:20, :20], whole[:20, :20])
    close(blocks[20:, 20:], whole[20:, 20:])
    assert not blocks[:20, 20:].any()


def test_values_that_are_overwritten_cannot_be_read_again():
    model, x = nn.Linear(3, 3, bias=False), torch.randn(3, 3)

    def run(model):
        factor = x.clone()
        result = model.weight * factor
        factor.zero_()
        return result

    with pytest.raises(CannotReplay, match="overwrites"):
        Tangents(model, run, Parameters.of(model), (torch.randn(3, 3),))


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
