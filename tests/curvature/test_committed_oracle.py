"""The committed oracle's cases about curvature of linear models: pruning, low rank, subsets of the data."""

import pytest
import torch
from committed_oracle import ORACLE, check, data, linear

from lapkit.curvature import Categorical, Engine, Gaussian, GGNDense, Parameters, SqrtGGN, borrowed, compute

# -- pruning a linear regression at its minimum


@pytest.fixture
def pruned():
    """Weights and the curvature of half the sum of squares."""
    x, y = data("prune", "X", "y")
    w = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    found = compute(linear(w[None]), Gaussian(), [(x[:15], y[:15]), (x[15:], y[15:])], {"H": GGNDense})
    return w, found["H"].operator()


def without(w, H, group):
    """OBS for a group: the change that makes these weights zero and raises the loss least."""
    columns = H.solve(torch.eye(len(w))[:, group])
    return w - columns @ torch.linalg.solve(columns[group], w[group])


def test_damage(pruned):
    w, H = pruned
    check(w.square() * H.diagonal() / 2, "OBD saliency 1/2 H_qq w_q^2")
    check(w.square() * H.shift(0.9).diagonal(), "OPD saliency w^2 * posterior precision diag (prior precision .9)")


def test_surgeon(pruned):
    w, H = pruned
    least = int((w.square() / H.inverse_diagonal()).argmin())
    check(without(w, H, [least]), "OBS update for the least salient weight: w+dw")
    check(without(w, H, [1, 4]), "group OBS update")


def test_surgeon_one_after_the_other(pruned):
    """Each time from the curvature of the weights that are left."""
    w, H = pruned
    removed = []
    for _ in range(4):
        rest = [i for i in range(len(w)) if i not in removed]
        now = without(w, H, removed)[rest] if removed else w
        inverse = torch.linalg.inv(H.to_dense()[rest][:, rest]).diagonal()
        removed.append(rest[int((now.square() / inverse).argmin())])
    check(torch.tensor(removed).double(), "sequential OBS removal order (4 steps)")


# -- a classification


@pytest.fixture
def softmax():
    x, y, w = data("softmax_linear", "X", "y", "W")
    return linear(w), x, y, ORACLE["inputs"]["softmax_linear"]["prior_precision"]


def test_low_rank_variance(softmax):
    model, x, y, delta = softmax
    H = compute(model, Categorical(), [(x, y)], {"V": SqrtGGN})["V"].operator()
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        _, jacobian = Engine(model, parameters).jacobian(data("softmax_linear", "Xstar")[0])
    ours = H.compressed(3).shift(delta).inverse_quadratic(jacobian).diagonal(dim1=1, dim2=2).flatten()
    check(ours, "low-rank predictive variance, top k=3 eigenpairs")


def test_determinants_of_subsets(softmax):
    model, x, y, delta = softmax
    ratios = []
    for part in torch.arange(len(x)).split(5):
        H = compute(model, Categorical(), [(x[part], y[part])], {"H": GGNDense})["H"].operator()
        ratios.append(len(x) / 5 * (H.shifted_logdet(delta) - H.size * torch.tensor(delta).log()))
    check(
        torch.stack(ratios).mean(),
        "subsampled log det ratio: (N/M)(log|P0+H_B|-log|P0|), mean over a partition of blocks of 5",
    )
