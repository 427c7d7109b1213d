"""What predictions may be asked of: one batch in any form, or an error that says what was expected."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace
from lapkit.curvature import Bernoulli, Categorical, GGNDiagonal, compute

X, Y = torch.linspace(-1, 2, 48, dtype=torch.float64).reshape(12, 4).sin(), torch.arange(12) % 3

ASKED = {
    "glm": lambda la, x: la(x),
    "nn": lambda la, x: la(x, pred_type="nn", n_samples=3, generator=torch.Generator().manual_seed(0)),
    "functions": lambda la, x: la.functional_samples(x, 3, torch.Generator().manual_seed(0), joint=True),
    "covariance": lambda la, x: la.functional_covariance(x),
    "distribution": lambda la, x: la.predictive_distribution(x).probs,
}


@pytest.fixture
def la():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return Laplace(model, "classification", "all", "kron").fit([(X, Y)])


@pytest.mark.parametrize("asked", ASKED)
def test_arrays_of_numpy_are_inputs_as_in_a_fit(la, asked):
    torch.testing.assert_close(ASKED[asked](la, X.numpy()), ASKED[asked](la, X), rtol=0, atol=0)


ODD = {
    "a loader": (DataLoader(TensorDataset(X, Y)), "Expected one batch of inputs, got a DataLoader"),
    "a data set": (TensorDataset(X, Y), "Expected one batch of inputs, got a TensorDataset"),
    "a pair": ((X, Y), "give the inputs alone"),
    "batches": ([(X, Y)], "give the inputs alone"),
    "numbers": (X.tolist(), "a list of no tensors"),
    "a generator": (iter([X]), "a list_iterator of no tensors.*Expected one batch"),
    "a mapping": ({"x": X}, r"a dict of \(12, 4\).*Expected one batch"),
    "words": ("x", "a str of no tensors.*Expected one batch"),
    "nothing": (None, "a NoneType of no tensors.*Expected one batch"),
    "single precision": (X.float().numpy(), "convert them"),
    "another width": (torch.ones(3, 5).double(), r"The model failed on inputs of shape \(3, 5\)"),
    "one input without an axis": (X[0], r"x\[None\]"),
    "no input": (X[:0], "at least one example"),
    "words in an array": (np.array(["a", "b"]), "numpy"),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_batch_of_inputs_says_so(la, odd, asked):
    x, words = ODD[odd]
    with pytest.raises((TypeError, ValueError, RuntimeError), match=words):
        ASKED[asked](la, x)


# -- outputs that are probabilities already


def test_a_softmax_at_the_end_of_a_classifier_warns_at_the_callers_line():
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    with pytest.warns(UserWarning, match=r"look like probabilities.*leave out the last nn\.Softmax") as told:
        Laplace(model, "classification", "all").fit([(X, Y)])
    assert [one.filename for one in told] == [__file__]
    with pytest.warns(UserWarning, match="look like probabilities") as told:
        compute(model.float(), Categorical(), [(X.float(), Y)], {"diagonal": GGNDiagonal})
    assert [one.filename for one in told] == [__file__]


def test_a_sigmoid_at_the_end_of_a_binary_classifier_warns_at_the_callers_line():
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid())
    with pytest.warns(UserWarning, match=r"look like probabilities.*leave out the last nn\.Sigmoid") as told:
        Laplace(model, Bernoulli(), "all").fit([(X, nn.functional.one_hot(Y))])
    assert [one.filename for one in told] == [__file__]


@pytest.mark.parametrize("last", [nn.Identity(), nn.LogSoftmax(-1), nn.ReLU(), nn.Sigmoid()])
def test_other_outputs_do_not(last):
    model = nn.Sequential(nn.Linear(4, 3), last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Laplace(model, "classification", "all").fit([(X, Y)])
        if not isinstance(last, nn.Sigmoid):
            Laplace(model, Bernoulli(), "all").fit([(X, nn.functional.one_hot(Y))])
