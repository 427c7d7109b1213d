"""What curvature costs against one gradient pass of the same batch, beside the peers that are installed.

    .venv/bin/python benchmarks/curvature.py [--device cuda] [--repeats 7] [--json FILE]

Networks: 3c3d (N=128, C=10), an MLP 784-512-256-10 (N=128), a 6-layer transformer (N=32, T=32, C=10); float32. Every
job starts from the model and the batch and ends with the quantity. `lapkit` includes the reading and checking of the
tape that a first batch costs, `later` is a batch after that. The floor is the number of multiplications and additions
that forward pass, backward passes of the columns and contraction need, in units of those of a gradient pass.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings

from problems import PROBLEMS, Transformer, gradient_pass, make_problem
from timing import medians, parser, report
from torch import nn

from lapkit.curvature import (
    GGN,
    Categorical,
    GGNDiagonal,
    GGNKronecker,
    GradientNorms,
    MonteCarloGGN,
    Parameters,
    accumulate,
)
from lapkit.curvature.columns.columns import LossGradient
from lapkit.curvature.inspection import inspection

warnings.filterwarnings("ignore")


LINEAR = "its linear layers"  # of the transformer: what curvlinops' KFAC supports, for both


def columns_of(quantity):
    return {"mc": MonteCarloGGN(1), "exact": GGN(), "loss": LossGradient()}[quantity]


ROWS = {
    "diagonal, 1 MC sample": (GGNDiagonal, "mc", lambda c: 2.0),
    "KFAC, 1 MC sample": (GGNKronecker, "mc", lambda c: 2.0),
    "norms of each gradient": (GradientNorms, "loss", lambda c: 1.6),
    "KFLR, exact": (GGNKronecker, "exact", lambda c: 0.4 * c + 1.5),
    "diagonal, exact": (GGNDiagonal, "exact", lambda c: 0.8 * c + 1),
}


def lapkit_jobs(model, names, x, y, quantity, kind):
    """One batch, and three: half of the difference is a batch out of many."""
    parameters = Parameters.of(model, names)

    def job(batches):
        data = [(x, y)] * batches
        return lambda: accumulate(model, parameters, Categorical(), columns_of(kind), data, [quantity(parameters)])

    return {"lapkit": job(1), "three": job(3)}


def backpack_job(model, x, y, row):
    if importlib.util.find_spec("backpack") is None or isinstance(model, Transformer):
        return None
    from backpack import backpack, extend
    from backpack.extensions import KFAC, KFLR, BatchL2Grad, DiagGGNExact, DiagGGNMC

    extension = {
        "diagonal, 1 MC sample": DiagGGNMC(mc_samples=1),
        "KFAC, 1 MC sample": KFAC(mc_samples=1),
        "norms of each gradient": BatchL2Grad(),
        "KFLR, exact": KFLR(),
        "diagonal, exact": DiagGGNExact(),
    }[row]
    model, loss = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())

    def job():
        value = loss(model(x), y)
        with backpack(extension):
            value.backward()
        model.zero_grad()

    return job


def curvlinops_job(model, names, x, y, row):
    if importlib.util.find_spec("curvlinops") is None or "KF" not in row or not _linear_or_convolution(model, names):
        return None
    from curvlinops import KFACLinearOperator

    model = copy.deepcopy(model)
    kind = "type-2" if "exact" in row else "mc"
    parameters = [p for n, p in model.named_parameters() if n in names]

    def job():
        operator = KFACLinearOperator(
            model, nn.CrossEntropyLoss(), parameters, [(x, y)], fisher_type=kind, check_deterministic=False
        )
        operator.compute_kronecker_factors()

    return job


def floor(found, kind, quantity):
    """Operations in units of those of a gradient pass, the columns of the exact curvature being C - 1."""
    structure = "kron" if quantity is GGNKronecker else "diag"
    if quantity is GradientNorms:
        return 2 / 3  # a forward and a backward pass; the norms themselves are small where there is one position
    return found.gradients(structure, found.columns - 1 if kind == "exact" else 1)


def _linear_or_convolution(model, names):
    kinds = (nn.Linear, nn.Conv2d)
    supported = {
        f"{m}.{p}" for m, module in model.named_modules() if isinstance(module, kinds) for p in ("weight", "bias")
    }
    return {n for n in names if "self_attn" not in n} == set(names) <= supported


def settings():
    """Name of the problem, rows, and the names of the weights."""
    for problem in PROBLEMS:
        names = [n for n, _ in make_problem(problem)[0].named_parameters()]
        yield problem, problem, list(ROWS), names
        if problem == "transformer":
            linear = [n for n in names if "norm" not in n and "self_attn" not in n]
            yield problem, LINEAR, [row for row in ROWS if "KF" in row], linear


def measured(problem, title, row, names, options):
    model, x, y = make_problem(problem, options.device)
    quantity, kind, bar = ROWS[row]
    chosen = [p for n, p in model.named_parameters() if n in names]
    jobs = {"gradient": gradient_pass(model, x, y, chosen), **lapkit_jobs(model, names, x, y, quantity, kind)}
    peers = {"BackPACK": backpack_job(model, x, y, row), "curvlinops": curvlinops_job(model, names, x, y, row)}
    jobs |= {name: job for name, job in peers.items() if job is not None}
    spent = medians(jobs, options.repeats, options.device)
    unit = spent.pop("gradient")
    ratio = {name: t / unit for name, t in spent.items()}
    three = ratio.pop("three")
    return {
        "problem": title,
        "quantity": row,
        "gradient_ms": 1e3 * unit,
        "bar": bar(10),
        "floor": floor(inspection(model, x), kind, quantity) if title == problem else None,
        "lapkit_later_batches": (three - ratio["lapkit"]) / 2,
        **ratio,
    }


def table(options):
    columns = {"lapkit": 9, "lapkit_later_batches": 8, "bar": 7, "floor": 7, "BackPACK": 10, "curvlinops": 12}
    heads = "".join(f"{'later' if 'later' in name else name:>{width}}" for name, width in columns.items())
    print(f"{'':18}{'':24}{'gradient':>10}{heads}")
    records = []
    for problem, title, rows, names in settings():
        for row in rows:
            record = measured(problem, title, row, names, options)
            records.append(record)
            cells = (
                f"{'-' if record.get(name) is None else format(record[name], '.2f'):>{width}}"
                for name, width in columns.items()
            )
            print(f"{title:<18}{row:<24}{record['gradient_ms']:>7.1f} ms{''.join(cells)}", flush=True)
    return records


if __name__ == "__main__":
    report(parser(__doc__).parse_args(), {"costs": table})
