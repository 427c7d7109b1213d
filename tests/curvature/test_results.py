"""Results: merged, stored, loaded, moved, and what does not add up."""

import copy
from functools import partial

import pytest
import torch
from compute_cases import EVERYTHING, MERGE, close, data, everything, model, same
from safetensors.torch import save_file
from torch import nn

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    EmpiricalFisher,
    Gaussian,
    GGNDense,
    GGNDiagonal,
    MonteCarloGGN,
    Parameters,
    Result,
    Results,
    accumulate,
    compute,
)
from lapkit.curvature.quantities.diagonal import DiagonalSum


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_merged_parts_are_the_whole(cut):
    x, y = data()
    one, two = everything([(x[:cut], y[:cut])], MERGE), everything([(x[cut:], y[cut:])], MERGE)
    merged, whole = one + two, everything([(x, y)], MERGE)
    for name in MERGE:
        same(merged[name], whole[name])
    close(merged.totals.loss, whole.totals.loss)
    assert merged.count == 6
    close(merged["kronecker"].operator().to_dense(), whole["kronecker"].operator().to_dense())
    assert one.count == cut  # merging makes something new


def test_merging_of_every_network(network):
    net, inputs = network
    x = inputs(5)
    outputs = copy.deepcopy(net)(x).reshape(5, -1).shape[1]
    likelihood = Bernoulli() if outputs == 1 else Categorical()
    y = torch.arange(5) % max(outputs, 2)
    wanted = {name: make for name, make in MERGE.items() if name not in ("dots", "sampled")}
    parts = [compute(net, likelihood, [(x[part], y[part])], wanted) for part in (slice(2), slice(2, 3), slice(3, 5))]
    whole = compute(net, likelihood, [(x, y)], wanted)
    for merged in (parts[0] + parts[1] + parts[2], parts[0] + (parts[1] + parts[2])):
        for name in wanted:
            same(merged[name], whole[name], 1e-9)


@pytest.mark.parametrize("name", ["gram", "mean_dots"])
def test_what_does_not_merge_says_why(name):
    x, y = data()
    one = everything([(x, y)], {name: EVERYTHING[name]})
    with pytest.raises(TypeError, match=r"Gram matrices lack|two different mean gradients"):
        one + one


# -- storing and moving


def test_saved_and_loaded_results_are_equal_bit_by_bit(tmp_path):
    whole = everything([data()])
    whole.save(tmp_path / "all.safetensors")
    again = Results.load(tmp_path / "all.safetensors")
    assert list(again) == list(whole)
    assert (again.count, again.totals.outputs, again.totals.weight) == (6, 3, 6)
    assert torch.equal(again.totals.loss, whole.totals.loss)
    for name, result in whole.items():
        result.save(tmp_path / "one.safetensors")
        for read in (again[name], Result.load(tmp_path / "one.safetensors")):
            same(read, result, 0.0)
    again_merged = Results.load(tmp_path / "all.safetensors")["diagonal"] + whole["diagonal"]
    close(again_merged["0.weight"], 2 * whole["diagonal"]["0.weight"])


def test_loading_by_class_refuses_other_kinds(tmp_path):
    found = everything([data()])
    found["dense"].save(tmp_path / "dense.safetensors")
    found.save(tmp_path / "all.safetensors")
    with pytest.raises(ValueError, match="holds DenseSum, expected DiagonalSum"):
        DiagonalSum.load(tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="holds a single DenseSum"):
        Results.load(tmp_path / "dense.safetensors")
    with pytest.raises(ValueError, match="several results"):
        Result.load(tmp_path / "all.safetensors")


def test_foreign_files_are_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    (tmp_path / "text.safetensors").write_text("not a tensor in sight")
    with pytest.raises(ValueError, match="not written by lapkit"):
        Result.load(tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        Results.load(tmp_path / "text.safetensors")
    with pytest.raises(FileNotFoundError):
        Results.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("name", ["a:b", ""])
def test_names_that_cannot_be_stored(name):
    with pytest.raises(ValueError, match="must not be empty or hold ':'"):
        compute(model(), Categorical(), [data()], {name: GGNDiagonal})


def test_moving_changes_floating_tensors_only():
    found = everything([data()])
    single = found.to("cpu", torch.float32)
    assert single.totals.loss.dtype == torch.float32
    for name, result in single.items():
        for key, tensor in result.tensors.items():
            before = found[name].tensors[key]
            assert tensor.dtype == (torch.float32 if before.is_floating_point() else before.dtype)
            assert before.dtype in (torch.float64, torch.int64, torch.bool)
    assert single["kronecker"].operator().dtype == torch.float32


# -- what does not add up


def changed(build=model, likelihood=None, make=GGNDiagonal, **options):
    x, y = data()
    return compute(build(), likelihood or Categorical(), [(x, y)], {"d": make}, **options)["d"]


def wider():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def renamed():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Identity(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        (partial(changed, wider), ValueError, r"'0.weight' is \(5, 4\) in one and \(6, 4\) in the other"),
        (partial(changed, renamed), ValueError, r"'2.weight' is .* and missing in the other"),
        (partial(changed, parameters=["0"]), ValueError, "'2.weight' is .* and missing"),
        (partial(changed, columns=EmpiricalFisher()), ValueError, "'columns' is GGN.* and EmpiricalFisher"),
        (partial(changed, columns=MonteCarloGGN(3)), ValueError, "'columns' is GGN.* and MonteCarloGGN"),
        (partial(changed, make=GGNDense), TypeError, "A DiagonalSum and a DenseSum do not add up"),
    ],
)
def test_other_results_are_refused(other, error, words):
    with pytest.raises(error, match=words):
        changed() + other()


def test_other_likelihoods_are_refused():
    x = torch.randn(4, 4)
    net = nn.Linear(4, 1)
    one = compute(net, Bernoulli(), [(x, torch.arange(4) % 2)], {"d": GGNDiagonal})
    two = compute(net, Gaussian(), [(x, torch.randn(4))], {"d": GGNDiagonal})
    with pytest.raises(ValueError, match=r"'likelihood' is Bernoulli\(.*\) in one and Gaussian\("):
        one + two


def test_a_quantity_is_not_continued_with_other_columns():
    net, (x, y) = model(), data()
    parameters = Parameters.of(net)
    quantity = GGNDiagonal(parameters)
    accumulate(net, parameters, Categorical(), GGN(), [(x, y)], [quantity])
    with pytest.raises(ValueError, match=r"EmpiricalFisher.* cannot be added"):
        accumulate(net, parameters, Categorical(), EmpiricalFisher(), [(x, y)], [quantity])


def test_results_of_other_names_do_not_merge():
    one, two = (everything([data()], {name: GGNDiagonal}) for name in "ab")
    with pytest.raises(ValueError, match=r"\['a'\] and \['b'\]"):
        one + two
