"""Hessian backpropagation on problem REF: golden numbers of the mean loss, all of them from outside lapkit."""

import pytest
import reference_problem as ref
import torch

from lapkit.curvature import Categorical, hessian_blocks, hessian_diagonal, hessian_products, kfra

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias")
TRACES = {
    "hessian": ref.HESSIAN_MEAN_TRACES,
    "ggn": ref.GGN_MEAN_TRACES,
    "pch-abs": (0.6672852782, 0.3581053234, 2.8560386473, 2.4483280626, 0.6262531457, 0.6133868722),
    "pch-clip": (0.4001339542, 0.1915285723, 1.9868382305, 1.7127396964, 0.6262531457, 0.6133868722),
}
OUTER_BIAS_TRACES = {  # eq. (4.8), the residual changed after the mean
    "hessian": (0.0123523472, 0.9539874947, 0.6133868722),
    "ggn": (0.0379117849, 1.1484261278, 0.6133868722),
    "pch-abs": (0.0988786261, 1.4450845597, 0.6133868722),
    "pch-clip": (0.0556154867, 1.1995360272, 0.6133868722),
}
INNER_BIAS_TRACES = (0.0294325615, 1.1075886943, 0.6133868722)  # eq. (4.9), GGN
MIXED_WEIGHT_TRACES = (0.0301154681, 1.291287834, 0.5485831075)  # |mean a|^2 times the traces of (4.8), GGN
NEGATIVE_DIAGONAL_ENTRIES = 10
SPLITS = {"whole": [6], "in batches": [1, 3, 2]}


def batches(split):
    return list(zip(ref.inputs().split(split), ref.labels().split(split), strict=True))


def golden(values):
    return pytest.approx(values, rel=1e-9, abs=1e-10)


def mean_traces(blocks):
    assert blocks.count == ref.EXAMPLES
    assert tuple(blocks.traces()) == NAMES
    return [float(trace) / ref.EXAMPLES for trace in blocks.traces().values()]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("mode", TRACES)
def test_traces(mode, split):
    assert mean_traces(hessian_blocks(ref.model(), Categorical(), batches(split), mode=mode)) == golden(TRACES[mode])


@pytest.mark.parametrize("mode", TRACES)
def test_traces_of_products(mode):
    products = hessian_products(ref.model(), Categorical(), batches([6]), mode=mode)
    found = [float(part.to_dense().trace()) / 6 for parts in products.blocks.values() for part in parts]
    assert found == golden(TRACES[mode])


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("mode", OUTER_BIAS_TRACES)
def test_outer_averages(mode, split):
    blocks = hessian_blocks(ref.model(), Categorical(), batches(split), mode=mode, averaging="outer")
    assert mean_traces(blocks)[1::2] == golden(OUTER_BIAS_TRACES[mode])


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_inner_averages(split):
    blocks = hessian_blocks(ref.model(), Categorical(), batches(split), mode="ggn", averaging="inner")
    assert mean_traces(blocks)[1::2] == golden(INNER_BIAS_TRACES)


def activations():
    """What goes into the three linear layers."""
    model, x = ref.model(), ref.inputs()
    return [x, model[:2](x).detach(), model[:4](x).detach()]


def test_outer_averages_with_mean_inputs():
    """The weight blocks of the seeds' mixed form, mean inputs but outer averages above, from the bias blocks."""
    blocks = hessian_blocks(ref.model(), Categorical(), batches([6]), mode="ggn", averaging="outer")
    found = [float(a.mean(0).square().sum() * t) for a, t in zip(activations(), mean_traces(blocks)[1::2], strict=True)]
    assert found == golden(MIXED_WEIGHT_TRACES)


def test_inner_weight_blocks_have_mean_inputs():
    blocks = hessian_blocks(ref.model(), Categorical(), batches([6]), mode="ggn", averaging="inner").blocks
    for a, layer in zip(activations(), (0, 2, 4), strict=True):
        wanted = torch.kron(blocks[f"{layer}.bias"][0], torch.outer(a.mean(0), a.mean(0)))
        torch.testing.assert_close(blocks[f"{layer}.weight"][0], wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_kfra(split):
    operator = kfra(ref.model(), Categorical(), batches(split)).operator()
    assert [float(block.trace()) / 6 for block in operator.blocks[1::2]] == golden(OUTER_BIAS_TRACES["ggn"])
    for a, weight, bias in zip(activations(), operator.blocks[::2], operator.blocks[1::2], strict=True):
        wanted = torch.kron(bias.to_dense(), a.T @ a / 6)
        torch.testing.assert_close(weight.to_dense(), wanted, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_diagonal(split):
    diagonal = hessian_diagonal(ref.model(), Categorical(), batches(split))
    assert diagonal.count == ref.EXAMPLES
    assert [float(diagonal[name].sum()) / 6 for name in NAMES] == golden(ref.HESSIAN_MEAN_TRACES)
    assert float(diagonal.diagonal().sum()) / 6 == golden(ref.HESSIAN_MEAN_TRACE)
    assert int((diagonal.diagonal() < 0).sum()) == NEGATIVE_DIAGONAL_ENTRIES


def test_diagonal_is_that_of_the_blocks():
    diagonal = hessian_diagonal(ref.model(), Categorical(), batches([6])).diagonal()
    blocks = hessian_blocks(ref.model(), Categorical(), batches([6]))
    assert int((blocks.diagonal() < 0).sum()) == NEGATIVE_DIAGONAL_ENTRIES
    torch.testing.assert_close(diagonal, blocks.diagonal(), rtol=1e-10, atol=1e-12)
