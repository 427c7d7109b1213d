"""What a user meets first: data in the forms they have, mistakes that are explained, results that read well."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lapkit.curvature import (
    AveragedFactors,
    Categorical,
    EigenvalueSum,
    EmpiricalFisher,
    Gaussian,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    GGNProduct,
    GradientMoments,
    GradientNorms,
    GradientSum,
    HessianProduct,
    MonteCarloGGN,
    Parameters,
    Quantity,
    Result,
    accumulate,
    compute,
    ekfac,
    hessian_blocks,
    hessian_diagonal,
    kfra,
)
from lapkit.curvature.columns.columns import GGN
from lapkit.curvature.quantities import dense as dense_quantities

WANTED = {"diagonal": GGNDiagonal, "norms": GradientNorms}


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch(examples=6):
    torch.manual_seed(2)
    return torch.randn(examples, 4), torch.arange(examples) % 3


def refused(error, words, data=None, wanted=WANTED, net=None, **options):
    with pytest.raises(error, match=words):
        compute(net or model(), Categorical(), [batch()] if data is None else data, wanted, **options)


# -- what is asked for

BAD_REQUESTS = {
    "a list": ([GGNDiagonal], "got a list. For example"),
    "a class": (GGNDiagonal, "by names of your choice"),
    "an instance": (
        {"a": GGNDiagonal(Parameters.of(model()))},
        "'a' is an object of type GGNDiagonal; expected a class",
    ),
    "a product": ({"a": GGNProduct}, "the class GGNProduct; expected a class such as"),
    "a function": ({"a": hessian_diagonal}, "cannot be made of the parameters alone"),
    "something else": ({"a": lambda parameters: parameters}, "makes a Parameters"),
    "columns without brackets": ({"a": partial(GGNDiagonal, columns=MonteCarloGGN)}, r"an object such as GGN\(\)"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_what_is_asked_for(case):
    wanted, words = BAD_REQUESTS[case]
    refused(TypeError, words, wanted=wanted)


def test_columns_of_the_call_are_an_object():
    refused(TypeError, "an object such as GGN", columns=EmpiricalFisher)


# -- data


def test_arrays_lists_and_label_are_targets():
    x, y = batch()
    expected = compute(model(), Categorical(), [(x, y)], WANTED)
    named = nn.Sequential(model())
    named.forward = lambda input: named[0](input)
    for net, data in (
        (model(), (x.numpy(), y.numpy())),
        (model(), (x, y.tolist())),
        (model(), (x, list(y))),
        (model(), [x, y, np.ones(6)]),
        (model(), ({"input": x.numpy()}, y)),
        (model(), {"input": x, "label": y}),
        (model(), {"input": x, "labels": y.numpy()}),
    ):
        found = compute(net, Categorical(), [data], WANTED)
        assert torch.equal(found["diagonal"]["0.weight"], expected["diagonal"]["0.weight"])
        assert torch.equal(found["norms"].squares(), expected["norms"].squares())


@pytest.mark.parametrize("y", [[[0], [1, 2]], ["a"] * 6, [torch.zeros(1), torch.zeros(2)], np.array([{}, {}])])
def test_ragged_targets(y):
    refused((TypeError, ValueError), "targets of batch 0.*make no tensor.*pad ragged", [(batch()[0], y)])


def test_batches_that_are_none():
    x, y = batch()
    refused(TypeError, r"dict of \['x', 'target'\].*labels or label", [{"x": x, "target": y}])
    refused(TypeError, "a int for targets.*DataLoader", [(x[0], 1)])
    refused(TypeError, "looks like one batch.*For a single batch give", (x, y))
    refused(TypeError, "looks like one batch", {"input": x, "labels": y})
    refused(TypeError, "looks like one batch", (x.numpy(), y.numpy()))
    refused(TypeError, r"function.*call it, list\(batches\(\)\)", lambda: iter([(x, y)]))
    with pytest.raises(TypeError, match="data is None"):
        compute(model(), Categorical(), None, WANTED)


@pytest.mark.parametrize(
    "run",
    [
        lambda net, data: compute(net, Categorical(), data, WANTED),
        lambda net, data: hessian_diagonal(net, Categorical(), data),
        lambda net, data: hessian_blocks(net, Categorical(), data),
        lambda net, data: kfra(net, Categorical(), data),
        lambda net, data: ekfac(net, Categorical(), data),
        lambda net, data: GGNProduct(net, Categorical(), data).matmul(torch.zeros(43)),
        lambda net, data: HessianProduct(net, Categorical(), data).matmul(torch.zeros(43)),
    ],
    ids=["compute", "hessian diagonal", "blocks", "kfra", "ekfac", "ggn product", "hessian product"],
)
def test_a_data_set_without_a_loader(run):
    with pytest.raises(TypeError, match=r"a TensorDataset, which gives one example at a time.*DataLoader"):
        run(model(), TensorDataset(*batch()))


def test_iterable_data_sets_may_give_batches():
    class Batches(IterableDataset):
        def __iter__(self):
            yield batch()

    x, y = batch()
    found = compute(model(), Categorical(), Batches(), WANTED)
    loaded = compute(model(), Categorical(), DataLoader(TensorDataset(x, y), batch_size=6), WANTED)
    assert torch.equal(found["diagonal"]["0.weight"], loaded["diagonal"]["0.weight"])


# -- the model


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(nn.functional.dropout(self.first(x).relu(), 0.5, training=True))


@pytest.mark.parametrize("examples", [1, 2, 6])
def test_dropout_that_is_always_on_is_no_batch_statistic(examples):
    refused(ValueError, "draws random numbers in eval mode", [batch(examples)], net=Noisy())


class Graphs(nn.Module):
    """Sums over the vertices of each graph."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)

    def forward(self, vertices, owner, graphs):
        return torch.zeros(int(graphs), 3).index_add(0, owner, self.first(vertices).tanh())


def test_as_many_vertices_as_graphs():
    """Five vertices of five graphs, one of which has two and one of which has none."""
    vertices, labels = torch.randn(7, 4), torch.arange(5) % 3
    owner = torch.tensor([0, 0, 1, 2, 2, 3, 4])
    assert compute(Graphs(), Categorical(), [((vertices, owner, torch.tensor(5)), labels)], WANTED).count == 5
    data = [((vertices[:5], torch.tensor([0, 0, 1, 3, 4]), torch.tensor(5)), labels)]
    refused(
        ValueError,
        "the vertices of graphs, and is as long by accident, use batches of another size",
        data,
        net=Graphs(),
    )


def test_words_for_both_ways_in(monkeypatch):
    unused = model()
    unused.extra = nn.Parameter(torch.ones(2))
    unused.forward = lambda x: nn.Sequential(*unused)(x)
    refused(ValueError, r"never uses .*'extra'.*parameters=\[...\] of compute.*subset_of_weights=", net=unused)
    monkeypatch.setattr(dense_quantities, "available", lambda device: 1)
    refused(ValueError, "GGNKronecker or GGNDiagonal; hessian_structure='kron'", wanted={"a": GGNDense})


# -- results


def results(net=None, **more):
    return compute(net or model(), Categorical(), [batch()], {**WANTED, "kfac": GGNKronecker, **more})


def test_an_unknown_name():
    with pytest.raises(KeyError, match=r"No result 'nope'; there are .*'diagonal', 'norms', 'kfac'"):
        results()["nope"]


def test_a_missing_folder(tmp_path):
    path = tmp_path / "missing" / "file.safetensors"
    for found in (results(), results()["diagonal"]):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*missing'. Make it first"):
            found.save(path)


def test_results_print_no_numbers():
    found = results()
    assert repr(found["norms"]) == (
        "ExampleNorms(count=6, tensors={square/0.weight: (6,) float64, square/0.bias: (6,) float64, "
        "square/2.weight: (6,) float64, square/2.bias: (6,) float64})"
    )
    assert repr(found).startswith("Results(count=6, loss=")
    assert "\n  diagonal: DiagonalSum(count=6" in repr(found)
    assert "... 4 more" in repr(found["kfac"])
    assert len(found["kfac"].tensors) == 12
    assert max(map(len, repr(found).splitlines())) < 500


def test_results_read_like_mappings():
    found = results()
    diagonal = found["diagonal"]
    assert list(diagonal) == list(diagonal.keys()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert dict(diagonal)["2.bias"] is diagonal["2.bias"]
    assert len(diagonal) == 4
    assert "0.bias" in diagonal
    assert "nope" not in diagonal
    assert [value.shape for value in diagonal.values()] == list(diagonal.shapes.values())
    kfac = dict(found["kfac"].items())
    assert kfac.keys() == found["kfac"].tensors.keys()
    assert found["kfac"]["output/0.bias"] is kfac["output/0.bias"]


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("run", "kind"), [(ekfac, EigenvalueSum), (kfra, AveragedFactors)])
def test_two_pass_curvatures_are_results(run, kind, tmp_path):
    found, other = (run(model(), Categorical(), [batch(n)]) for n in (6, 5))
    assert isinstance(found, kind)
    assert (found.count, found.names) == (6, ("0.weight", "0.bias", "2.weight", "2.bias"))
    found.save(tmp_path / "file")
    again = Result.load(tmp_path / "file")
    close(again.operator().to_dense(), found.operator().to_dense())
    assert again.to(dtype=torch.float32).operator().to_dense().dtype == torch.float32
    with pytest.raises(ValueError, match="do not add up"):
        found + other


# -- numbers


def test_squares_beyond_single_precision_are_refused():
    x, y = 1e15 * torch.randn(4, 3), 1e15 * torch.randn(4, 2)
    net = nn.Linear(3, 2)
    assert compute(net, Gaussian(), [(x, y)], WANTED)["norms"].squares().isfinite().all()
    with pytest.raises(ValueError, match=r"beyond the range of torch.float32. Compute in double"):
        compute(net.float(), Gaussian(), [(x.float(), y.float())], WANTED)


def test_the_variance_of_nearly_equal_gradients_in_single_precision():
    """A relative deviation of 1e-4: its square is a hundred-millionth of the second moment, below rounding."""
    x, y = (1 + 1e-4 * torch.randn(20, 3)).float(), torch.full((20, 2), 5.0).float()
    net = nn.Linear(3, 2).float()

    def variance(*parts):
        found = [compute(net, Gaussian(), [(x[p], y[p])], {"v": GradientMoments})["v"] for p in parts]
        assert all(t.dtype == torch.float32 for result in found for t in result.tensors.values())
        return (found[0] if len(found) == 1 else found[0] + found[1]).variance()

    exact = copy.deepcopy(net).double()
    gradients = (exact(x.double()) - y)[:, :, None] * x.double()[:, None]
    expected = gradients.var(0, correction=0)
    for parts in ([slice(None)], [slice(7), slice(7, None)]):
        torch.testing.assert_close(variance(*parts)["weight"].double(), expected, rtol=1e-2, atol=0)


class Broken(Quantity):
    """Fails half way through the second batch."""

    def update(self, name, jacobian, *, first):
        if self.count > 6 and name == "0.bias":
            raise KeyboardInterrupt

    def result(self):
        raise NotImplementedError


def test_a_quantity_that_was_broken_off_has_no_result():
    net = model()
    parameters = Parameters.of(net)
    kept = [make(parameters) for make in (GGNDiagonal, GGNBlocks, GGNKronecker, GradientSum, GradientNorms)]
    with pytest.raises(KeyboardInterrupt):
        accumulate(net, parameters, Categorical(), GGN(), [batch(), batch()], [*kept, Broken(parameters)])
    for quantity in kept:
        with pytest.raises(RuntimeError, match=r"broke off a batch half way.*Begin again"):
            quantity.result()
        with pytest.raises(RuntimeError, match="broke off a batch half way"):
            accumulate(net, parameters, Categorical(), GGN(), [batch()], [quantity])


def test_an_error_between_batches_leaves_what_was_summed():
    net = model()
    parameters = Parameters.of(net)
    diagonal = GGNDiagonal(parameters)
    with pytest.raises(TypeError, match="Batch 1"):
        accumulate(net, parameters, Categorical(), GGN(), [batch(), None], [diagonal])
    close(diagonal.result()["0.weight"], results()["diagonal"]["0.weight"])


def test_blocks_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(dense_quantities, "available", lambda device: 1)
    refused(ValueError, r"The blocks over \d+ weights would take", wanted={"a": GGNBlocks})
