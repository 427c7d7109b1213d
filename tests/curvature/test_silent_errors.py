"""Batches and models with which an engine could go wrong without a word: it must be right, or refuse."""

import pytest
import torch
from one_by_one import Net, check, slow
from torch import nn
from torch.nn import functional as F

from lapkit import Laplace
from lapkit.curvature import (
    Bernoulli,
    Categorical,
    Dense,
    EmpiricalFisherProduct,
    Engine,
    Gaussian,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNProduct,
    Gradients,
    GradientSum,
    HessianProduct,
    Parameters,
    borrowed,
    compute,
    hessian_blocks,
    hessian_diagonal,
    hessian_products,
    largest_eigenpairs,
    smallest_eigenpairs,
)
from lapkit.curvature.quantities.quantity import described


class OfTwo(Net):
    """The same with two inputs."""

    def forward(self, a, b):
        return self.function(self, a, b)


def labels(n):
    return torch.arange(n) % 3


def batches(*sizes, shape=(4,)):
    return [(torch.randn(n, *shape), labels(n)) for n in sizes]


def mlp(m, x):
    return m.two(m.one(x).tanh())


# A kernel kept in another shape


@pytest.mark.parametrize("shape", [(3, 2), (3, 6), (18,)])
def test_a_kernel_may_be_stored_flat(shape):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(shape))

        def forward(self, x):
            return F.conv1d(x, self.weight.view(3, 2, -1)).tanh().mean(-1)

    model = Flat()
    check(model, batches(3, 5, shape=(2, 4)))


def test_a_matrix_may_be_a_kernel_and_a_layer():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return F.conv1d(x.expand(2, -1, -1).movedim(0, 2), self.weight[:, :, None]).mean(-1) + F.linear(
                x, self.weight
            )

    model = Shared()
    check(model, batches(3, 5))


# Lists and tuples with as many tensors as there are examples


@pytest.mark.parametrize("lengths", [((3, 3, 3), (2, 3, 4)), ((2, 3, 4), (3, 3, 3)), ((2, 2), (1, 3))])
def test_a_list_with_one_tensor_for_each_example(lengths):
    def forward(m, x):
        h = m.one(torch.cat(list(x))).tanh()
        return m.two(torch.stack([part.mean(0) for part in h.split([len(t) for t in x])]))

    model = Net(None)
    data = [([torch.randn(n, 4) for n in ns], labels(len(ns))) for ns in lengths]
    check(model, data, lambda x: [forward(model, [one])[0] for one in x], forward_fn=forward)


def added(m, a, b):
    return m.two((m.one(a) + b).tanh())


def centred(m, a, b):
    h = (m.one(a) + b).tanh()
    return m.two(h - h.mean(0))


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 5), (5, 2)])
def test_two_inputs_and_two_examples(container, sizes):
    model = OfTwo(added)
    data = [(container((torch.randn(n, 4), torch.randn(n, 4))), labels(n)) for n in sizes]
    check(model, data, lambda x: [model(a[None], b[None])[0] for a, b in zip(*x, strict=True)])


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("examples", [2, 3, 4])
def test_two_inputs_whose_examples_are_mixed(container, examples):
    data = [(container((torch.randn(examples, 4), torch.randn(examples, 4))), labels(examples))]
    with pytest.raises(ValueError, match="changes with the other examples"):
        compute(OfTwo(centred), Categorical(), data, {"diagonal": GGNDiagonal})


# Models that are refused


@pytest.mark.parametrize("sizes", [(1, 1), (5,), (20,)])
def test_random_numbers_in_eval_mode_are_refused(sizes):
    model = Net(lambda m, x: m.two(F.dropout(m.one(x), 0.5, training=True)))
    with pytest.raises(ValueError, match=r"random numbers|changes with the other examples"):
        compute(model, Categorical(), batches(*sizes), {"diagonal": GGNDiagonal})


def with_batch_statistics():
    return nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, track_running_stats=False), nn.Flatten(), nn.Linear(9, 3)
    )


@pytest.mark.parametrize("sizes", [(1, 1), (2,), (5,), (20,)])
def test_batch_statistics_are_refused(sizes):
    with pytest.raises(ValueError, match="examples"):
        compute(with_batch_statistics(), Categorical(), batches(*sizes, shape=(2, 3)), {"diagonal": GGNDiagonal})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("examples", [2, 6, 20])
def test_a_weak_influence_of_other_examples_is_refused(dtype, examples):
    def forward(m, x):
        h = m.one(x).tanh()
        return m.two(h - 3e-3 * h.mean(0))

    data = [(x.to(dtype), y) for x, y in batches(examples)]
    with pytest.raises(ValueError, match="changes with the other examples"):
        compute(Net(forward).to(dtype), Categorical(), data, {"diagonal": GGNDiagonal})


def squeezing():
    return Net(lambda m, x: m.two(m.one(x).tanh().squeeze()))


def test_an_axis_of_examples_that_is_squeezed_away_is_refused():
    model = squeezing()
    fitted = Laplace(model, "classification", "all", "full").fit(batches(4, 3, shape=(1, 4)))
    one = torch.randn(1, 1, 4)
    for predict in (fitted, fitted.function_distribution):
        with pytest.raises(ValueError, match="squeezes"):
            predict(one)
    with pytest.raises(ValueError, match="squeezes"):
        compute(model, Gaussian(), [(one, torch.randn(3))], {"diagonal": GGNDiagonal})
    with borrowed(model, Parameters.of(model)), pytest.raises(ValueError, match="squeezes"):
        Engine(model, Parameters.of(model)).jacobian(one)


def test_a_single_output_for_a_single_example_is_no_squeezed_axis():
    model = Net(lambda m, x: m.two(m.one(x).tanh())[:, 0])
    assert compute(model, Gaussian(), [(torch.randn(1, 4), torch.randn(1))], {"d": GGNDiagonal}).count == 1


# Numbers


@pytest.mark.parametrize(("dtype", "gate"), [(torch.float64, 1e-11), (torch.float32, 2e-4), (torch.float32, 1e-7)])
def test_weak_examples_exchanged_by_a_sort_keep_their_gradients(dtype, gate):
    def forward(m, x):
        order = x[:, 0].argsort()
        return mlp(m, x[order])[order.argsort()] * x[:, 1:2]

    model, x = Net(forward).to(dtype), torch.randn(6, 4)
    x = x[x[:, 0].argsort()][[1, 0, 2, 3, 4, 5]]
    x[:, 1] = torch.tensor([gate, gate, 1.0, 1.0, 1.0, 1.0])
    found = compute(model, Categorical(), [(x.to(dtype), labels(6))], {"g": Gradients})["g"].matrix().double()
    model.double()
    x = x.to(dtype).double()
    rows, _ = slow([model(one[None])[0] for one in x], list(model.parameters()), labels(6))
    errors = (found - rows).norm(dim=1) / rows.norm(dim=1)
    assert (errors < 100 * torch.finfo(dtype).eps).all()


def test_a_zero_matrix_has_eigenpairs():
    for pairs in (
        largest_eigenpairs(Dense(torch.zeros(70, 70)), 3),
        smallest_eigenpairs(Dense(torch.zeros(70, 70)), 3),
    ):
        assert torch.equal(pairs.values, torch.zeros(3))
        torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(3))


# Results


def long_weights(last):
    weights = torch.ones(2000, dtype=torch.float64)
    weights[1000] = last
    return Categorical(class_weights=weights)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (long_weights(1.0), long_weights(5.0)),
        (long_weights(1.0), long_weights(1.0 + 1e-12)),
        (Bernoulli(pos_weight=torch.tensor([1.00001])), Bernoulli(pos_weight=torch.tensor([1.00002]))),
        (Categorical(class_weights=torch.ones(3)), Categorical()),
    ],
)
def test_settings_that_differ_in_any_bit_are_told_apart(one, two):
    assert described(one) != described(two)


def test_results_with_other_class_weights_do_not_add_up():
    model, data = nn.Linear(3, 2000), [(torch.randn(2, 3), torch.tensor([0, 1]))]
    first, same, other = (compute(model, long_weights(w), data, {"g": GradientSum}) for w in (1.0, 1.0, 5.0))
    assert (first + same).count == 4
    with pytest.raises(ValueError, match="likelihood"):
        first + other


def made_there(batch, parts):
    """A batch whose first parts, of inputs, targets and weights, are copied where it is called."""
    return tuple(t.clone() if i < parts else t for i, t in enumerate(batch))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_results_made_in_inference_mode_are_ordinary_tensors(parts):
    model, data = Net(mlp), [(x, y, torch.ones(len(y))) for x, y in batches(4, 3)]
    structures = {"dense": GGNDense, "diagonal": GGNDiagonal, "blocks": GGNBlocks, "g": GradientSum}
    usual = compute(model, Categorical(), data, structures)
    with torch.inference_mode():
        found = compute(model, Categorical(), [made_there(batch, parts) for batch in data], structures)
        fitted = Laplace(model, "classification", "all", "full").fit(data)
    for name in structures:
        for key, tensor in found[name].tensors.items():
            torch.testing.assert_close(tensor, usual[name].tensors[key], rtol=0, atol=0)
            assert not tensor.is_inference()
            tensor.add_(1)
    assert fitted(data[0][0]).shape == (4, 3)


class Reused:
    """A loader that fills the same tensors again and again, and spoils them in between."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        buffer = [torch.empty_like(t) for t in self.data[0]]
        for batch in self.data:
            for kept, t in zip(buffer, batch, strict=True):
                kept.copy_(t)
            yield tuple(buffer)
            buffer[0].fill_(torch.nan)
            buffer[1].fill_(-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_products_of_a_loader_that_reuses_its_tensors(weighted):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    data = [(*batch, torch.rand(4)) if weighted else batch for batch in batches(4, 4, 4)]
    for product in (hessian_products, GGNProduct, HessianProduct, EmpiricalFisherProduct):
        found, expected = (product(model, Categorical(), d) for d in (Reused(data), data))
        identity = torch.eye(expected.size)
        torch.testing.assert_close(found.matmul(identity), expected.matmul(identity), rtol=0, atol=1e-14)


@pytest.mark.parametrize("product", [GGNProduct, HessianProduct, EmpiricalFisherProduct])
@pytest.mark.parametrize("sizes", [(5, 3), (1, 1)])
def test_products_refuse_batch_statistics(product, sizes):
    with pytest.raises(ValueError, match="examples"):
        product(with_batch_statistics(), Categorical(), batches(*sizes, shape=(2, 3)))


USES = {
    "compute": lambda model, data: compute(model, Categorical(), data, {"diagonal": GGNDiagonal}),
    "hessian_diagonal": lambda model, data: hessian_diagonal(model, Categorical(), data),
    "product": lambda model, data: HessianProduct(model, Categorical(), data),
    "hessian_blocks": lambda model, data: hessian_blocks(model, Categorical(), data),
    "hessian_products": lambda model, data: hessian_products(model, Categorical(), data),
}


@pytest.mark.parametrize("use", USES)
def test_a_forward_pass_that_changes_the_weights_is_refused(use, unchanged):
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.5), nn.Flatten(), nn.Linear(6, 3))
    data = [(torch.randint(5, (4, 2)), torch.arange(4) % 3)]
    with unchanged(model), pytest.raises(ValueError, match=r"Modules \['0'\] rescale their own weights"):
        USES[use](model, data)


def test_weights_of_two_types_are_refused():
    model = Net(lambda m, x: m.two(m.one(x.float()).tanh().double()))
    model.one.float()
    with pytest.raises(ValueError, match=r"are of types \['torch.float32', 'torch.float64'\]"):
        USES["compute"](model, [(torch.randn(3, 4), torch.arange(3))])


@pytest.mark.parametrize("use", USES)
def test_height_and_width_exchanged_in_the_targets_are_refused(use):
    """As many labels, at other pixels."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1))
    x, y = torch.randn(2, 1, 3, 5), torch.randint(3, (2, 2, 4))
    USES[use](model, [(x, y)])
    with pytest.raises(ValueError, match=r"Targets \(2, 4, 2\) do not stand at the positions \(2, 4\)"):
        USES[use](model, [(x, y.mT.contiguous())])
