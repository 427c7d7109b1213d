"""A fit: curvature of one structure, by lapkit's own pass over the data of a problem."""

import pytest
from dense_laplace import problem

from lapkit.curvature import (
    GGN,
    Bernoulli,
    Categorical,
    Gaussian,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    LowRankGGN,
    Parameters,
    accumulate,
)
from lapkit.posteriors import Fit

QUANTITIES = {
    "diag": GGNDiagonal,
    "kron": GGNKronecker,
    "blockdiag": GGNBlocks,
    "full": GGNDense,
    "lowrank": LowRankGGN,
}
LIKELIHOODS = {"classification": Categorical, "regression": Gaussian, "binary": Bernoulli}


def fit(kind, structure, net="mlp"):
    case = problem(kind, net)
    parameters = Parameters.of(case.model)
    quantity = QUANTITIES[structure](parameters)
    totals = accumulate(case.model, parameters, LIKELIHOODS[kind](), GGN(), case.data, [quantity])
    return Fit(parameters, parameters.vector(), quantity.result().operator(), totals.loss, totals.count, totals.outputs)


@pytest.fixture
def fitted():
    return fit
