"""WoodFisher against its own recursion over examples, the Woodbury identity for one gradient at a time."""

import pytest
import torch
from dense_laplace import LOSSES, problem

from lapkit.curvature import Categorical, Gaussian, Parameters, SymmetricOperator
from lapkit.pruning import prune, saliency, woodfisher

DAMPING = 1e-3


def gradients(case):
    """Of each example's loss, (N, P)."""
    rows = []
    for x, y in zip(case.x, case.y, strict=True):
        loss = LOSSES[case.kind](case.model(x[None])[0], y)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(case.model.parameters()))]))
    return torch.stack(rows)


def recursion(g, damping):
    """`F^-1 <- F^-1 - F^-1 g g^T F^-1 / (N + g^T F^-1 g)`, from `I / damping`."""
    inverse = torch.eye(g.shape[1]) / damping
    for row in g:
        column = inverse @ row
        inverse = inverse - torch.outer(column, column) / (len(g) + row @ column)
    return inverse


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("size", [1, 7, 50, 1000])
def test_blocks_are_inverted_as_the_recursion_does(net, size):
    case = problem("classification", net)
    quadratic = woodfisher(case.model, Categorical(), case.data, block_size=size, damping=DAMPING)
    g, w = gradients(case), case.mean()
    scores, start = [], 0
    for tensor in Parameters.of(case.model).sizes:
        for block in range(0, tensor, size):
            own = slice(start + block, start + min(block + size, tensor))
            scores.append(w[own] ** 2 / (2 * recursion(g[:, own], DAMPING).diagonal()))
        start += tensor
    expected = len(g) * torch.cat(scores)
    found = saliency(quadratic)
    shapes = dict(case.model.named_parameters())
    for (module, name), score in found.items():
        own = next(n for n in shapes if shapes[n] is getattr(module, name))
        value = Parameters.of(case.model).split(expected)[own]
        torch.testing.assert_close(score, value, rtol=1e-7, atol=1e-12)


def test_it_prunes_like_any_other_quadratic_model():
    case = problem("classification")
    quadratic = woodfisher(case.model, Categorical(), case.data, block_size=8, damping=DAMPING)
    assert isinstance(quadratic.precision, SymmetricOperator)
    P = quadratic.precision.to_dense()
    result = prune(quadratic, 0.5, step=0.1)
    change = result.change
    kept = (~result.gone).nonzero()[:, 0]
    assert (P @ change)[kept].abs().max() < 1e-10 * (P @ change).abs().max()  # stationary in the survivors
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="no prior"):
        prune(quadratic, criterion="evidence")


def test_batches_and_noise():
    case = problem("regression")
    one = woodfisher(case.model, Gaussian(0.5), case.data, block_size=8)
    two = woodfisher(case.model, Gaussian(0.5), [(case.x, case.y)], block_size=8)
    torch.testing.assert_close(one.precision.to_dense(), two.precision.to_dense())
    g = gradients(case) / 0.25
    torch.testing.assert_close(one.curvature.diagonal(), g.square().sum(0))


def test_errors():
    case = problem("classification")
    for wrong in ({"block_size": 0}, {"damping": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            woodfisher(case.model, Categorical(), case.data, **wrong)
