"""BackPACK as a backend: one backward pass of its own for each batch, which visits modules.

Kronecker factors of convolutions are refused: theirs is T times the input factor of "expand" and the output factor of
"reduce", for T positions, which is neither of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lapkit.backends.library import Batch, Kernel, Library, Problem
from lapkit.choices import STRUCTURES
from lapkit.curvature import GGN, Columns, EmpiricalFisher, MonteCarloGGN
from lapkit.curvature.quantities.dense import BlockSum, DenseSum
from lapkit.curvature.quantities.diagonal import DiagonalSum
from lapkit.curvature.quantities.kfac import KroneckerSum
from lapkit.curvature.quantities.sqrt_ggn import LowRankSum

# The extension for each curvature.
Extensions = dict[type[Columns], str]
DIAGONALS: Extensions = {GGN: "DiagGGNExact", MonteCarloGGN: "DiagGGNMC", EmpiricalFisher: "SumGradSquared"}
FACTORS: Extensions = {GGN: "KFLR", MonteCarloGGN: "KFAC"}
ROOTS: Extensions = {GGN: "SqrtGGNExact", MonteCarloGGN: "SqrtGGNMC", EmpiricalFisher: "BatchGrad"}


def prepared(module: nn.Module) -> nn.Module:
    """A network or a loss that BackPACK follows; what is no `Sequential` is taken apart by `torch.fx`."""
    from backpack import extend  # optional

    return extend(module, use_converter=bool(list(module.children())) and not isinstance(module, nn.Sequential))


def check_joins(network: nn.Module) -> None:
    """Refuse sums with a branch that BackPACK does not see: it would leave out that branch, and say nothing.

    Raises:
        ValueError: if what is no module is computed beside a sum.
    """
    from backpack.custom_module.branching import SumModule  # optional

    if isinstance(network, GraphModule) and any(isinstance(m, SumModule) for m in network.modules()):
        unseen = sorted({str(n.target) for n in network.graph.nodes if n.op in ("call_function", "call_method")})
        if unseen:
            raise ValueError(f"it adds up branches, and sees modules alone, none in the calls of {unseen}")


def _found(problem: Problem, batch: Batch, names: Extensions) -> dict[str, Any]:
    """What an extension leaves on each parameter."""
    from backpack import backpack, extensions  # optional

    if not isinstance(problem.columns, EmpiricalFisher):  # for which autograd's gradients suffice
        check_joins(problem.model)
    kind = getattr(extensions, names[type(problem.columns)])
    extension = kind(problem.samples) if isinstance(problem.columns, MonteCarloGGN) else kind()
    x, y = batch
    with torch.random.fork_rng():  # theirs are torch's global random numbers
        torch.manual_seed(problem.seed)
        with backpack(extension):
            problem.loss(problem.model(x), y).backward()
    found = {}
    for name, p in zip(problem.parameters.names, problem.parameters.tensors, strict=True):
        found[name], p.grad = getattr(p, extension.savefield), None
        delattr(p, extension.savefield)
    return found


def diagonal(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The diagonal of the GGN, or the sum of squared gradients."""
    found = _found(problem, batches[0], DIAGONALS)
    return {f"value/{name}": problem.scale * value for name, value in found.items()}


def factors(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Kronecker factors, B and the mean A, of linear layers.

    Raises:
        ValueError: if there are convolutions.
    """
    convolutions = [n for n, p in zip(problem.parameters.names, problem.parameters.tensors, strict=True) if p.ndim > 2]
    if convolutions:
        raise ValueError(
            f"its Kronecker factors of convolutions {convolutions} are neither those of 'expand' nor of 'reduce'; "
            "backend='curvlinops' has them"
        )
    examples, tensors = len(batches[0][1]), {}
    for name, (b, *a) in _found(problem, batches[0], FACTORS).items():
        tensors[f"output/{name}"] = problem.scale * b[None]
        tensors[f"input/{name}"] = examples * (a[0] if a else b.new_ones(1, 1))[None]
        tensors[f"positions/{name}"] = torch.tensor(float(examples), dtype=torch.float64)
    return tensors


def _columns(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """`V` of each parameter, `(P, R)`."""
    found = _found(problem, batches[0], ROOTS)
    sizes = dict(zip(problem.parameters.names, problem.parameters.sizes, strict=True))
    return {name: problem.scale**0.5 * v.reshape(-1, sizes[name]).T for name, v in found.items()}


def root(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """`V` of the whole matrix."""
    columns = torch.cat(list(_columns(problem, batches).values()))
    return {"columns": columns, "trace": columns.double().square().sum()}


def matrix(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """`V V^T`."""
    columns = torch.cat(list(_columns(problem, batches).values()))
    return {"matrix": columns @ columns.T}


def blocks(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """`V V^T` of each parameter by itself."""
    return {f"block/{name}": v @ v.T for name, v in _columns(problem, batches).items()}


BACKPACK = Library(
    name="backpack",
    install="backpack-for-pytorch",
    kernels={
        STRUCTURES["diag"]: Kernel("diag", DiagonalSum, diagonal, tuple(DIAGONALS), {}),
        STRUCTURES["kron"]: Kernel("kron", KroneckerSum, factors, tuple(FACTORS), {"setting": "expand"}),
        STRUCTURES["blockdiag"]: Kernel("blockdiag", BlockSum, blocks, tuple(ROOTS), {}),
        STRUCTURES["full"]: Kernel("full", DenseSum, matrix, tuple(ROOTS), {}),
        STRUCTURES["lowrank"]: Kernel("lowrank", LowRankSum, root, tuple(ROOTS), {"blocks": "none"}),
    },
    prepare=prepared,
)
