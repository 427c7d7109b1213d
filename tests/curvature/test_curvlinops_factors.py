"""Kronecker factors of curvlinops 3.0.1, with and without corrected eigenvalues; see `test_curvlinops`."""

from functools import partial

import pytest
import torch
from curvlinops_cases import CASES, EXAMPLES, NETWORKS, SAMPLES, SETTINGS, Problem, close, dense, generator
from torch import nn

from lapkit.curvature import (
    GGNKronecker,
    compute,
    ekfac,
)

pytestmark = [pytest.mark.peer("curvlinops"), pytest.mark.filterwarnings("ignore")]


# -- Kronecker factors


def blocks(problem, result, factor, setting):
    """What theirs is made of: a separate bias has B of its weight, which under "expand" is not the exact block."""
    parts = []
    for name in problem.names:
        b, a = (f[0] for f in result.factors(name.replace("bias", "weight")))
        parts.append(factor * (torch.kron(b, a) if "weight" in name else b))
    return torch.block_diag(*parts)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize(("network", "loss"), CASES)
def test_kfac(network, loss, kind, setting, monkeypatch):
    import curvlinops

    problem = Problem(network, loss)
    problem.inject(monkeypatch)
    columns, factor = problem.kinds()[kind]
    maker = partial(GGNKronecker, setting=setting, columns=columns)
    found = compute(problem.model, problem.likelihood, problem.batches, {"k": maker}, generator=generator())["k"]
    samples = SAMPLES if kind == "mc" else 1
    data = problem.batch if kind == "mc" else problem.batches
    peer = problem.theirs(
        curvlinops.KFACLinearOperator, data, fisher_type=kind, mc_samples=samples, kfac_approx=setting
    )
    close(blocks(problem, found, factor, setting), dense(peer))
    if network == "mlp" or setting == "reduce":  # then ours of a bias is theirs, too
        close(factor * found.operator().to_dense(), dense(peer))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_forward_only(network, setting):
    """The factor of inputs, and ones in place of the other."""
    import curvlinops

    problem = Problem(network, "cross_entropy mean")
    maker = partial(GGNKronecker, setting=setting)
    found = compute(problem.model, problem.likelihood, problem.batches, {"k": maker})["k"]
    weights = [n for n in problem.names if "weight" in n]
    factors = [found.factors(n) for n in weights]
    peer = problem.theirs(
        curvlinops.KFACLinearOperator, problem.batches, weights, fisher_type="forward-only", kfac_approx=setting
    )
    close(torch.block_diag(*[torch.kron(torch.eye(b.shape[-1]), a[0]) for b, a in factors]), dense(peer))


class Joint(nn.Module):
    """A linear layer whose bias is a column of its weight."""

    def __init__(self, layer):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach())

    def forward(self, x):
        return nn.functional.linear(torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), self.weight)


def joint(problem):
    """The same network with weight and bias in one."""
    return nn.Sequential(*[Joint(m) if isinstance(m, nn.Linear) else m for m in problem.model])


def apart(matrix, outputs):
    """A block over `[W, b]` in rows, as one over W and then b."""
    places = torch.arange(len(matrix)).reshape(outputs, -1)
    order = torch.cat([places[:, :-1].flatten(), places[:, -1]])
    return matrix[order][:, order]


def widths(problem):
    return [m.out_features for m in problem.model if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("network", ["mlp", "sequence"])
def test_kfac_of_weight_and_bias_together(network, kind, setting, monkeypatch):
    import curvlinops

    problem = Problem(network, "cross_entropy mean")
    problem.inject(monkeypatch)
    columns, factor = problem.kinds()[kind]
    maker = partial(GGNKronecker, setting=setting, columns=columns)
    found = compute(joint(problem), problem.likelihood, problem.batches, {"k": maker}, generator=generator())["k"]
    peer = problem.theirs(
        curvlinops.KFACLinearOperator,
        problem.batch if kind == "mc" else problem.batches,
        fisher_type=kind,
        mc_samples=SAMPLES if kind == "mc" else 1,
        kfac_approx=setting,
        separate_weight_and_bias=False,
    )
    ours = [apart(b.to_dense(), o) for b, o in zip(found.operator().blocks, widths(problem), strict=True)]
    close(factor * torch.block_diag(*ours), dense(peer))


# -- corrected eigenvalues


def corrected(problem, kind, setting, model=None):
    columns, factor = problem.kinds()[kind]
    found = ekfac(
        model or problem.model,
        problem.likelihood,
        problem.batches,
        columns=columns,
        setting=setting,
        generator=generator(),
    ).operator()
    return [factor * block.to_dense() for block in found.blocks]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("network", NETWORKS)
def test_ekfac(network, kind, setting, monkeypatch):
    """Where factors have equal eigenvalues the basis is arbitrary, and so is the result: these have none."""
    import curvlinops

    problem = Problem(network, "cross_entropy sum", EXAMPLES)
    problem.inject(monkeypatch)
    peer = problem.theirs(
        curvlinops.EKFACLinearOperator,
        problem.batch if kind == "mc" else problem.batches,
        fisher_type=kind,
        mc_samples=SAMPLES if kind == "mc" else 1,
        kfac_approx=setting,
    )
    sizes = [p.numel() for p in problem.model.parameters()]
    theirs = [rows.split(sizes, 1)[i] for i, rows in enumerate(dense(peer).split(sizes))]
    for name, ours, block in zip(problem.names, corrected(problem, kind, setting), theirs, strict=True):
        if "weight" in name or network == "mlp" or setting == "reduce":  # other biases: ours is exact
            close(ours, block, 1e-10)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("network", ["mlp", "sequence"])
def test_ekfac_of_weight_and_bias_together(network, setting):
    import curvlinops

    problem = Problem(network, "cross_entropy sum", EXAMPLES)
    peer = problem.theirs(
        curvlinops.EKFACLinearOperator,
        problem.batches,
        fisher_type="type-2",
        kfac_approx=setting,
        separate_weight_and_bias=False,
    )
    ours = corrected(problem, "type-2", setting, joint(problem))
    together = torch.block_diag(*[apart(b, o) for b, o in zip(ours, widths(problem), strict=True)])
    close(together, dense(peer), 1e-10)
