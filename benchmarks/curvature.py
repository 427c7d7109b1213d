"""What curvature costs against one gradient pass of the same batch, beside the peers that are installed.

    .venv/bin/python benchmarks/curvature.py [--device cuda] [--repeats 7] [--json FILE]

Networks: 3c3d (N=128, C=10), an MLP 784-512-256-10 (N=128), a 6-layer transformer (N=32, T=32, C=10); float32. Every
job starts from the model and the batch and ends with the quantity. `lapkit` includes the reading and checking of the
tape that a first batch costs, `later` is a batch after that. Jobs of one row take turns, so that a busy moment hits
all of them; medians of repeats in one process. The floor is the number of multiplications and additions that forward
pass, backward passes of the columns and contraction need, in units of those of a gradient pass.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import pathlib
import platform
import statistics
import time
import warnings

import torch
from torch import nn

from lapkit.curvature import (
    GGN,
    Categorical,
    Engine,
    GGNDiagonal,
    GGNKronecker,
    GradientNorms,
    MonteCarloGGN,
    Parameters,
    accumulate,
    borrowed,
)
from lapkit.curvature.columns.columns import LossGradient
from lapkit.curvature.inspection import inspection

warnings.filterwarnings("ignore")


def conv_net():
    """3c3d of DeepOBS: 895,210 weights for images 3 x 32 x 32."""
    pool = lambda: (nn.ReLU(), nn.ZeroPad2d((0, 1, 0, 1)), nn.MaxPool2d(3, 2))  # noqa: E731
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), *pool(), nn.Conv2d(64, 96, 3), *pool(), nn.ZeroPad2d(1), nn.Conv2d(96, 128, 3), *pool()),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


def mlp():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


class Transformer(nn.Module):
    def __init__(self, width=128, layers=6, classes=10):
        super().__init__()
        make = lambda: nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)  # noqa: E731
        self.blocks = nn.Sequential(*(make() for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


PROBLEMS = {
    "3c3d": (conv_net, lambda: torch.randn(128, 3, 32, 32)),
    "MLP": (mlp, lambda: torch.randn(128, 784)),
    "transformer": (Transformer, lambda: torch.randn(32, 32, 128)),
}


def columns_of(quantity):
    return {"mc": MonteCarloGGN(1), "exact": GGN(), "loss": LossGradient()}[quantity]


ROWS = {
    "diagonal, 1 MC sample": (GGNDiagonal, "mc", lambda c: 2.0),
    "KFAC, 1 MC sample": (GGNKronecker, "mc", lambda c: 2.0),
    "norms of each gradient": (GradientNorms, "loss", lambda c: 1.6),
    "KFLR, exact": (GGNKronecker, "exact", lambda c: 0.4 * c + 1.5),
    "diagonal, exact": (GGNDiagonal, "exact", lambda c: 0.8 * c + 1),
}


def gradient_pass(model, x, y):
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)


def lapkit_job(model, x, y, quantity, kind):
    parameters = Parameters.of(model)
    return lambda: accumulate(model, parameters, Categorical(), columns_of(kind), [(x, y)], [quantity(parameters)])


def lapkit_later(model, x, y, quantity, kind):
    """One batch out of many: the difference of two batches and one."""
    parameters = Parameters.of(model)

    def job(batches):
        data = [(x, y)] * batches
        return lambda: accumulate(model, parameters, Categorical(), columns_of(kind), data, [quantity(parameters)])

    return job(1), job(3)


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


def curvlinops_job(model, x, y, row):
    if importlib.util.find_spec("curvlinops") is None or row not in ("KFLR, exact", "KFAC, 1 MC sample"):
        return None
    from curvlinops import KFACLinearOperator

    model = copy.deepcopy(model)
    kind = "type-2" if "exact" in row else "mc"
    parameters = [p for n, p in model.named_parameters() if "norm" not in n and "self_attn" not in n]

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


def seconds(job, device):
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(jobs, repeats, device):
    """Jobs by name in turn; the first round warms up."""
    times = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            spent = seconds(job, device)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def row_jobs(model, x, y, row):
    quantity, kind, _ = ROWS[row]
    one, three = lapkit_later(model, x, y, quantity, kind)
    jobs = {"gradient": gradient_pass(model, x, y), "lapkit": one, "three": three}
    peers = {"BackPACK": backpack_job(model, x, y, row), "curvlinops": curvlinops_job(model, x, y, row)}
    return jobs | {name: job for name, job in peers.items() if job is not None}


def table(device, repeats):
    records = []
    print(
        f"{'':13}{'':24}{'gradient':>10}{'lapkit':>9}{'later':>8}{'bar':>7}{'floor':>7}{'BackPACK':>10}{'curvlinops':>12}"
    )
    for problem, (make, inputs) in PROBLEMS.items():
        torch.manual_seed(0)
        model, x = make().to(device).eval(), inputs().to(device)
        y = torch.randint(0, 10, (len(x),), device=device)
        found = inspection(model, x)
        for row, (quantity, kind, bar) in ROWS.items():
            spent = medians(row_jobs(model, x, y, row), repeats, device)
            unit = spent["gradient"]
            ratio = {name: t / unit for name, t in spent.items()}
            record = {
                "problem": problem,
                "quantity": row,
                "gradient_ms": 1e3 * unit,
                "lapkit": ratio["lapkit"],
                "lapkit_later_batches": (ratio["three"] - ratio["lapkit"]) / 2,
                "bar": bar(10),
                "floor": floor(found, kind, quantity),
                **{name: ratio[name] for name in ("BackPACK", "curvlinops") if name in ratio},
            }
            records.append(record)
            peers = [f"{ratio[n]:.2f}" if n in ratio else "-" for n in ("BackPACK", "curvlinops")]
            print(
                f"{problem:<13}{row:<24}{1e3 * unit:>7.1f} ms{record['lapkit']:>9.2f}"
                f"{record['lapkit_later_batches']:>8.2f}{record['bar']:>7.1f}{record['floor']:>7.2f}"
                f"{peers[0]:>10}{peers[1]:>12}"
            )
    return records


def gram_table(device, repeats):
    """The seeds' T1 to T4: gradient, gradients of each example, Gram matrix expanded, Gram matrix by its structure."""
    torch.manual_seed(0)
    widths = (1024, 512, 256, 128, 64, 32, 10)
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())][:-1]
    model, x = nn.Sequential(*layers).to(device), torch.randn(128, 1024, device=device)
    y = torch.randint(0, 10, (128,), device=device)
    parameters = Parameters.of(model)

    def jacobian():
        with borrowed(model, parameters):
            backprop = Engine(model, parameters)(x)
            root, parts = Categorical().hessian_root(backprop.output.detach()), {}
            backprop(root, parts.__setitem__, backprop.plan(len(root)), whole=True)
        return parts

    def structured():
        return sum(part.gram() for part in jacobian().values())

    def expanded():
        total = 0
        for part in jacobian().values():
            rows = part.to_dense().flatten(0, 1)
            total = total + rows @ rows.T
        return total

    def each_gradient():
        for p in model.parameters():
            p.grad = None
        for example, label in zip(x.split(1), y.split(1), strict=True):
            torch.autograd.grad(nn.functional.cross_entropy(model(example), label), list(model.parameters()))

    jobs = {"T1": gradient_pass(model, x, y), "T2": each_gradient, "T4": structured}
    spent = medians(jobs, repeats, device) | {"T3": seconds(expanded, device)}
    difference = float((structured().reshape(1152, 1152) - expanded()).norm() / expanded().norm())
    print("\nGram matrix of the GGN's columns, MLP 1024-512-256-128-64-32-10, N = 128, C - 1 = 9 columns")
    for name, text in {
        "T1": "gradient of the batch",
        "T2": "gradient of each example, one by one",
        "T3": "Gram matrix, expanded Jacobians",
        "T4": "Gram matrix, by structure",
    }.items():
        print(f"  {name} {text:<40}{1e3 * spent[name]:>10.1f} ms{spent[name] / spent['T1']:>10.1f} gradients")
    print(f"  T3 / T4 = {spent['T3'] / spent['T4']:.0f} (bar: 50), relative difference {difference:.1e}")
    return {name: 1e3 * t for name, t in spent.items()} | {"ratio": spent["T3"] / spent["T4"], "difference": difference}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=pathlib.Path, default=None)
    options = parser.parse_args()
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    setting = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": where,
        "repeats": options.repeats,
    }
    print(setting, "\n")
    found = {"setting": setting, "costs": table(options.device, options.repeats)}
    found["gram"] = gram_table(options.device, options.repeats)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
