"""Curvlinops as a backend: Kronecker factors by hooks of modules, and the full matrix by products with unit vectors.

The bias of a convolution has the output factor of its weight there, for which positions count as examples, where
lapkit's own block is exact; and groups of a convolution share one input factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lapkit.backends.library import Batch, Kernel, Library, Problem
from lapkit.choices import STRUCTURES
from lapkit.curvature import GGN, Columns, EmpiricalFisher, MonteCarloGGN
from lapkit.curvature.quantities.dense import DenseSum, check_matrices_fit
from lapkit.curvature.quantities.diagonal import DiagonalSum
from lapkit.curvature.quantities.ekfac import EigenvalueSum
from lapkit.curvature.quantities.kfac import KroneckerSum

KINDS: dict[type[Columns], tuple[str, str]] = {  # the operator of the matrix, the type of the factors
    GGN: ("GGNLinearOperator", "type-2"),
    MonteCarloGGN: ("FisherMCLinearOperator", "mc"),
    EmpiricalFisher: ("EFLinearOperator", "empirical"),
}


def _operator(name: str, problem: Problem, batches: Sequence[Batch], **options: Any) -> Any:
    """One of its operators over all batches."""
    import curvlinops  # optional

    if isinstance(problem.columns, MonteCarloGGN):
        options |= {"mc_samples": problem.samples, "seed": problem.seed}
    tensors, examples = list(problem.parameters.tensors), sum(len(y) for _, y in batches)
    return getattr(curvlinops, name)(
        problem.model, problem.loss, tensors, batches, check_deterministic=False, num_data=examples, **options
    )


def _state(name: str, problem: Problem, batches: Sequence[Batch]) -> dict[str, Any]:
    """What it keeps of factors."""
    fisher = KINDS[type(problem.columns)][1]
    found = _operator(name, problem, batches, fisher_type=fisher, num_per_example_loss_terms=1)
    found @ torch.zeros(found.shape[1], 1, dtype=problem.parameters.dtype, device=problem.parameters.device)
    return found.state_dict()


def factors(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Kronecker factors, B and the mean A, in the setting "expand"."""
    state, tensors = _state("KFACLinearOperator", problem, batches), {}
    examples = sum(len(y) for _, y in batches)
    for name in problem.parameters.names:
        module, _, own = name.rpartition(".")
        b = state["gradient_covariances"][module]
        a = state["input_covariances"][module] if own == "weight" else b.new_ones(1, 1)
        tensors[f"output/{name}"], tensors[f"input/{name}"] = problem.scale * b[None], examples * a[None]
        tensors[f"positions/{name}"] = torch.tensor(float(examples), dtype=torch.float64)
    return tensors


def corrected(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Eigenvectors of the factors, and the eigenvalues that fit best in them."""
    state, tensors = _state("EKFACLinearOperator", problem, batches), {}
    for place, name in enumerate(problem.parameters.names):
        module, _, own = name.rpartition(".")
        left = state["gradient_covariances_eigenvectors"][module]
        right = state["input_covariances_eigenvectors"][module] if own == "weight" else left.new_ones(1, 1)
        values = problem.scale * state["corrected_eigenvalues"][module][place]
        tensors[f"values/{name}"] = values.reshape(1, len(left), len(right))
        tensors[f"left/{name}"], tensors[f"right/{name}"] = left[None], right[None]
    return tensors


def matrix(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """The matrix, one product for each weight."""
    check_matrices_fit(problem.parameters, [problem.parameters.numel], "The full matrix")
    p = problem.parameters
    found = _operator(KINDS[type(problem.columns)][0], problem, batches)
    return {"matrix": problem.scale * (found @ torch.eye(p.numel, dtype=p.dtype, device=p.device))}


def diagonal(problem: Problem, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """That of the matrix, which has to fit into memory."""
    parts = matrix(problem, batches)["matrix"].diagonal().split(problem.parameters.sizes)
    named = zip(problem.parameters.names, problem.parameters.tensors, parts, strict=True)
    return {f"value/{name}": part.reshape(p.shape) for name, p, part in named}


def unchanged(module: nn.Module) -> nn.Module:
    """A network or a loss as it is."""
    return module


ANY = 10**6  # uses of a parameter: autograd adds them up
CURVLINOPS = Library(
    name="curvlinops",
    install="curvlinops-for-pytorch",
    kernels={
        STRUCTURES["kron"]: Kernel("kron", KroneckerSum, factors, tuple(KINDS), {"setting": "expand"}),
        STRUCTURES["ekfac"]: Kernel("ekfac", EigenvalueSum, corrected, tuple(KINDS), {}, whole=True),
        STRUCTURES["full"]: Kernel("full", DenseSum, matrix, tuple(KINDS), {}, uses=ANY),
        STRUCTURES["diag"]: Kernel("diag", DiagonalSum, diagonal, tuple(KINDS), {}, uses=ANY),
    },
    prepare=unchanged,
)
