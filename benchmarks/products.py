"""What products with the GGN and the Hessian cost against one gradient pass of the same batch, beside curvlinops.

    .venv/bin/python benchmarks/products.py [--device cuda] [--repeats 7] [--problems MLP] [--json FILE]

Networks and batches as in benchmarks/problems.py; 1 and 8 vectors; float32. A product starts from model, batch and
vectors and includes the forward pass; what is checked once for each operator is left to the first, unmeasured round.
The floor counts multiplications and additions in units of those of a gradient pass, of which
the forward pass is a third: F for the batch, and for each vector 2 F for J v and 2 F for J^T u (GGN), or 2 F for the
change of the activations and 4 F for that of the gradients (Hessian).
"""

from __future__ import annotations

import importlib.util
import warnings

import torch
from problems import PROBLEMS, gradient_pass, make_problem
from timing import medians, parser, report
from torch import nn

from lapkit.curvature import Categorical, GGNProduct, HessianProduct

warnings.filterwarnings("ignore")

KINDS = {"GGN": GGNProduct, "Hessian": HessianProduct}
COUNTS = (1, 8)


def floor(kind, count):
    return (1 + {"GGN": 4, "Hessian": 6}[kind] * count) / 3


def curvlinops_operator(model, x, y, kind):
    if importlib.util.find_spec("curvlinops") is None:
        return None
    import curvlinops

    operator = {"GGN": curvlinops.GGNLinearOperator, "Hessian": curvlinops.HessianLinearOperator}[kind]
    loss = nn.CrossEntropyLoss(reduction="sum")
    return operator(model, loss, list(model.parameters()), [(x, y)], check_deterministic=False)


def plainly(job):
    """Without fused kernels of attention, for which the peer finds no derivative in forward mode."""

    def run():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                return job()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    return run


def measured(problem, model, x, y, kind, count, options):
    ours = KINDS[kind](model, Categorical(), [(x, y)], check=False)
    vectors = torch.randn(ours.size, count, device=x.device)
    jobs = {"gradient": gradient_pass(model, x, y), "lapkit": lambda: ours @ vectors}
    peer = curvlinops_operator(model, x, y, kind)
    difference = None
    if peer is not None:
        jobs["curvlinops"] = plainly(lambda: peer @ vectors)
        theirs = jobs["curvlinops"]()
        difference = float((ours @ vectors - theirs).norm() / theirs.norm())
    spent = medians(jobs, options.repeats, options.device)
    unit = spent.pop("gradient")
    ratios = {name: t / unit for name, t in spent.items()}
    record = {"problem": problem, "product": kind, "vectors": count, "gradient_ms": 1e3 * unit, **ratios}
    return record | {"floor": floor(kind, count), "difference": difference}


def table(options):
    records = []
    print(f"{'':13}{'':9}{'vectors':>8}{'gradient':>12}{'lapkit':>9}{'curvlinops':>12}{'floor':>8}{'difference':>12}")
    for problem in options.problems:
        model, x, y = make_problem(problem, options.device)
        for kind in KINDS:
            for count in COUNTS:
                record = measured(problem, model, x, y, kind, count, options)
                records.append(record)
                peer = f"{record['curvlinops']:.2f}" if "curvlinops" in record else "-"
                difference = f"{record['difference']:.0e}" if "curvlinops" in record else "-"
                print(
                    f"{problem:<13}{kind:<9}{count:>8}{record['gradient_ms']:>9.1f} ms{record['lapkit']:>9.2f}"
                    f"{peer:>12}{record['floor']:>8.2f}{difference:>12}",
                    flush=True,
                )
    return records


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    report(options.parse_args(), {"products": table})
