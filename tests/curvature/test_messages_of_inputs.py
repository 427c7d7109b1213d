"""What a user gives in the wrong place or form: models, inputs, generators, parameters."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.curvature import (
    Categorical,
    GGNDiagonal,
    MonteCarloGGN,
    Parameters,
    RandomSignGGN,
    compute,
    inspect,
    verify,
    vivit,
)


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch():
    return torch.randn(6, 4), torch.arange(6) % 3


def refused(error, words, data=None, **options):
    with pytest.raises(error, match=words):
        compute(model(), Categorical(), [batch()] if data is None else data, WANTED, **options)


WANTED = {"diagonal": GGNDiagonal}


@pytest.mark.parametrize("look", [inspect, verify])
def test_inputs_that_are_none(look):
    (x, y), net = batch(), model()
    with pytest.raises(TypeError, match=r"Expected a model, which comes first.*type Tensor"):
        look(x, net)
    for data in (TensorDataset(x, y), DataLoader(TensorDataset(x, y))):
        with pytest.raises(
            TypeError, match=rf"one batch of inputs, got a {type(data).__name__}.*next\(iter\(loader\)\)"
        ):
            look(net, data)
    for pair in ((x, y), [x, y]):
        with pytest.raises(TypeError, match=r"of \(6, 4\), \(6,\): .*give the inputs alone"):
            look(net, pair)
    with pytest.raises(RuntimeError, match=r"The model failed on inputs of shape \(6, 7\): mat1 and mat2"):
        look(net, torch.zeros(6, 7))


def test_inputs_of_another_width():
    refused(
        RuntimeError, r"The model failed on inputs of shape \(6, 7\): mat1 and mat2", [(torch.zeros(6, 7), batch()[1])]
    )


def test_the_model_comes_first():
    with pytest.raises(TypeError, match=r"Expected a model, which comes first.*type Categorical"):
        compute(Categorical(), model(), [batch()], WANTED)
    with pytest.raises(TypeError, match=r"Expected a model, which comes first.*type Categorical"):
        vivit(Categorical(), model(), batch())


def test_a_generator_is_no_number():
    refused(TypeError, r"Expected a generator, got 0.*manual_seed\(0\)", columns=MonteCarloGGN(), generator=0)


@pytest.mark.parametrize("columns", [MonteCarloGGN, RandomSignGGN])
@pytest.mark.parametrize("samples", [1.5, "2", True, None])
def test_samples_are_counted(columns, samples):
    with pytest.raises(TypeError, match=f"is an integer, got samples={samples!r}"):
        columns(samples)
    assert columns(np.int64(2)).samples == 2


def test_parameters_by_themselves():
    net, other = model(), nn.Linear(3, 2)
    found = compute(net, Categorical(), [batch()], WANTED, parameters=net[2].parameters())
    assert list(found["diagonal"]) == ["2.weight", "2.bias"]
    assert Parameters.of(net, net[2].bias).names == Parameters.of(net, ["2.bias"]).names
    with pytest.raises(ValueError, match=r"^\['a \(2, 3\) tensor', 'a \(2,\) tensor'\] name no trainable parameter"):
        Parameters.of(net, other.parameters())
