"""What is refused, and in which words."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.curvature import (
    Categorical,
    NoiseAwareDamping,
    eigenvalue_accuracy,
    magnitude_error,
    plot_snr,
    plot_spectrum,
    vivit,
)


@pytest.mark.parametrize(
    ("examples", "kind", "words"),
    [
        (0, ValueError, "there are 5. Ask for 1 to 5"),
        (6, ValueError, "Asked for 6 examples"),
        (True, TypeError, "number of examples"),
        (slice(7, 9), ValueError, "at least one"),
        ([], ValueError, "at least one"),
        ([0, 5], ValueError, "numbered 0 to 4"),
        ([-1], ValueError, "numbered 0 to 4"),
        ([1, 1], ValueError, "none twice"),
        (torch.tensor([True, False, True, False, True]), TypeError, "mask"),
        (torch.tensor([0.0]), TypeError, "integer"),
        (torch.tensor([[2]]), TypeError, "vector of integer indices"),
        (torch.tensor(2.0), TypeError, "vector of integer indices"),
        (torch.tensor(6), ValueError, "Asked for 6 examples"),
    ],
)
def test_examples_that_do_not_exist(problem, examples, kind, words):
    with pytest.raises(kind, match=words):
        problem.analysis(curvature_examples=examples)


@pytest.mark.parametrize(
    ("groups", "kind", "words"),
    [
        ("layers", ValueError, "'parameters', 'modules'"),
        ([["0"], ["2"]], ValueError, r"4.weight.*in none or in several"),
        ([["0", "2"], ["2", "4"]], ValueError, r"2.weight.*in none or in several"),
        ([["0", "2", "4"], []], ValueError, "or none at all"),
        ([["0", "2", "4"], ["5"]], ValueError, "no selected parameter"),
        (["0", "2", "4"], TypeError, "list of names"),
        ([], ValueError, "in none"),
    ],
)
def test_groups_that_do_not_fit(problem, groups, kind, words):
    with pytest.raises(kind, match=words):
        problem.analysis(groups=groups)


def test_directions_that_do_not_exist(problem, spectrum):
    for refused in (spectrum.directions, spectrum.eigenvectors, lambda which: spectrum.newton_step(0.1, which)):
        with pytest.raises(ValueError, match=f"there are {spectrum.rank}"):
            refused(spectrum.rank + 1)
        with pytest.raises(ValueError, match="numbered 0 to"):
            refused([99])
    with pytest.raises(ValueError, match="of the group '2'"):
        problem.analysis(groups="modules")["2"].directions(50)


def test_vectors_that_do_not_fit(problem, spectrum):
    whole = problem.analysis(groups="modules")
    for product in (spectrum.matmul, lambda v: spectrum.inverse_product(v, 0.1), whole.pseudo_inverse_product):
        with pytest.raises(ValueError, match=f"a vector \\({spectrum.size},\\)"):
            product(torch.ones(3))
        with pytest.raises(TypeError, match="float32"):
            product(torch.ones(spectrum.size, dtype=torch.float32))
    with pytest.raises(ValueError, match="3 groups"):
        whole.spectrum  # noqa: B018
    with pytest.raises(ValueError, match="of length 55"):
        spectrum.by_parameter(torch.ones(3))


def test_bases_that_do_not_fit(spectrum):
    with pytest.raises(ValueError, match="orthonormal"):
        spectrum.overlap(torch.ones(spectrum.size, 2))
    with pytest.raises(ValueError, match="orthonormal"):
        spectrum.overlap(torch.ones(spectrum.size) / spectrum.size**0.5)
    with pytest.raises(ValueError, match="same weights"):
        spectrum.overlap(torch.eye(4))
    with pytest.raises(ValueError, match="positive"):
        magnitude_error(spectrum, spectrum, count=0)
    with pytest.raises(ValueError, match="as many estimates"):
        eigenvalue_accuracy(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="not zero"):
        eigenvalue_accuracy(torch.ones(2), torch.zeros(2))
    assert eigenvalue_accuracy(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])) == 0.5


def test_other_refusals(problem):
    with pytest.raises(TypeError, match="Expected a likelihood"):
        vivit(problem.model, nn.CrossEntropyLoss(), problem.batch)
    with pytest.raises(ValueError, match="threshold"):
        problem.analysis(threshold=-1.0)
    with pytest.raises(TypeError, match="expected a pair"):
        vivit(problem.model, Categorical(), problem.x)
    with pytest.raises(ValueError, match="3 weights for a batch of 5"):
        vivit(problem.model, Categorical(), (problem.x, problem.y, torch.ones(3)))
    with pytest.raises(ValueError, match="name no trainable parameter"):
        problem.analysis(parameters=["7"])
    batch_norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="statistics"):
        vivit(batch_norm, Categorical(), (problem.x, problem.y))


@pytest.mark.parametrize("number", [np.int64(2), np.uint8(2), np.array(2), torch.tensor(2), torch.tensor(2).int()])
def test_numbers_of_any_integer_type(problem, spectrum, number):
    assert torch.equal(spectrum.eigenvectors(number), spectrum.eigenvectors(2))
    assert problem.analysis(curvature_examples=number).curvature_count == 2


def test_more_than_a_batch(problem):
    data = TensorDataset(problem.x, problem.y)
    loader = DataLoader(data, batch_size=2)
    several = (
        loader,
        iter(loader),
        data,
        [problem.batch],
        (problem.batch,),
        [problem.batch] * 2,
        [problem.batch] * 3,
        [],
    )
    for given in several:
        with pytest.raises(TypeError, match=r"ONE batch.*next\(iter\(loader\)\)"):
            vivit(problem.model, Categorical(), given)
    expected = problem.analysis().spectrum.eigenvalues
    for given in ([*problem.batch], (problem.x, problem.y.tolist()), (problem.x, list(problem.y))):
        assert torch.equal(vivit(problem.model, Categorical(), given).spectrum.eigenvalues, expected)


def test_what_belongs_to_a_group(problem):
    analysis = problem.analysis()
    for name in ("eigenvectors", "directions", "plot"):
        with pytest.raises(AttributeError, match=rf"analysis\.spectrum\.{name}, of several analysis\[label\]\.{name}"):
            getattr(analysis, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'.$"):
        analysis.nothing  # noqa: B018
    assert copy.copy(analysis).spectrum is analysis.spectrum


@pytest.mark.parametrize(
    ("damping", "kind", "words"),
    [
        ("auto", TypeError, "got 'auto'"),
        (None, TypeError, "got None"),
        (NoiseAwareDamping, TypeError, r"such as NoiseAwareDamping\(1e-3\); got <class"),
        (lambda directions: None, TypeError, "got None from the function"),
        (lambda directions: torch.ones(2), ValueError, r"for as many directions; got shape \(2,\)"),
        (-1.0, ValueError, "must be positive"),
    ],
)
def test_what_is_no_damping(problem, spectrum, damping, kind, words):
    for of in (spectrum, problem.analysis(groups="modules")):
        with pytest.raises(kind, match=words):
            of.newton_step(damping)


def test_nothing_above_the_threshold(problem, spectrum):
    nothing = problem.analysis(threshold=1e6)
    g = spectrum.gradient()
    for refused in (lambda: nothing.newton_step(1.0), lambda: nothing.spectrum.pseudo_inverse_product(g)):
        with pytest.raises(ValueError, match=r"No eigenvalue is above the threshold of 1e\+06.*smaller threshold="):
            refused()


def test_what_cannot_be_drawn(spectrum):
    with pytest.raises(TypeError, match=r"several of them by name.*got a list"):
        plot_spectrum([spectrum, spectrum])
    with pytest.raises(TypeError, match="Directions give one row"):
        plot_snr([0], spectrum.directions(2))
