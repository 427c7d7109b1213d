"""ViViT's low-rank GGN of a batch: its Gram matrix, its eigenpairs against iterative methods, and its critical batches.

    .venv/bin/python benchmarks/vivit.py [--only PART ...] [--quick] [--repeats 3] [--json FILE]

gram        the Gram matrix of an MLP by its structure and with expanded Jacobians.
eigenpairs  the k largest eigenpairs of 3c3d's GGN (N = 128, C = 10, enlarged digits, after a little training) by ViViT
            with exact columns or one Monte Carlo sample for each example, on all examples (mb) or an eighth of them
            (sub); by power iteration and by Lanczos, both with products. Power iteration deflates by the vectors found
            and stops at a relative change of the eigenvalue below 1e-3, or after 100 products, as Lanczos does.
critical    the largest batch that fits into a memory budget (0.5 GiB), for each task and setting, by probes in fresh
            processes (benchmarks/vivit_memory.py).
published   whether the largest batches that fitted into 11 GB in the published table fit here, with their peaks.

Every job starts from model and batch. Jobs take turns; medians. With --json FILE the parts that were run replace those
in the file, so that they may be run one by one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import warnings

import torch
from problems import gradient_pass
from timing import medians, parser, report, seconds
from torch import nn
from vivit_memory import NETWORKS, SETTINGS, TASKS, analysis, critical, probe

from lapkit.curvature import (
    Categorical,
    Engine,
    Gaussian,
    GGNProduct,
    Parameters,
    borrowed,
    eigenvalue_accuracy,
    largest_eigenpairs,
)
from lapkit.datasets import digits

warnings.filterwarnings("ignore")

TOLERANCE, MOST_PRODUCTS = 1e-3, 100
# Table D.2 of Dangel, Backpropagation Beyond the Gradient, and its figure 7.2a: 3c3d, CIFAR-10, 11 GB.
PUBLISHED = {
    "eigenvalues": {"exact mb": 909, "exact sub": 4375, "mc mb": 3840, "mc sub": 6626},
    "top eigenpair": {"exact mb": 677, "exact sub": 3184, "mc mb": 3060, "mc sub": 6029},
    "Newton step": {"exact mb": 208, "exact sub": 727, "mc mb": 1055, "mc sub": 1816},
}
PUBLISHED_BUDGET = 11 * 10**9


# ---------------------------------------------------------------------------------------------------- Gram matrix


def jacobians(model, likelihood, x):
    """The factored Jacobians of all parameters, contracted with the GGN's columns."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        backprop = Engine(model, parameters)(x)
        root, parts = likelihood.hessian_root(backprop.output.detach()), {}
        backprop(root, parts.__setitem__, backprop.plan(len(root)), whole=True)
    return list(parts.values())


def gram_part(options):
    """T1 to T4 of ViViT's appendix C.1, for the mean squared error, whose GGN has one column for each output."""
    torch.manual_seed(0)
    widths, examples = ((64, 32, 10), 16) if options.quick else ((1024, 512, 256, 128, 64, 32, 10), 128)
    layers = [m for i, o in itertools.pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())][:-1]
    model, x = nn.Sequential(*layers), torch.randn(examples, widths[0])
    y = torch.randint(0, widths[-1], (examples,))

    def expanded():
        return [part.to_dense().flatten(0, 1) for part in jacobians(model, Gaussian(), x)]

    def gram_of_expanded():
        return sum(rows @ rows.T for rows in expanded())

    def structured():
        return sum(part.gram() for part in jacobians(model, Gaussian(), x))

    spent = medians({"T1": gradient_pass(model, x, y), "T2": expanded, "T4": structured}, options.repeats, "cpu")
    spent["T3"] = seconds(gram_of_expanded, "cpu")
    reference = gram_of_expanded()
    difference = float((structured().reshape(reference.shape) - reference).norm() / reference.norm())
    names = {
        "T1": "gradient",
        "T2": "expanded Jacobians",
        "T3": "Gram matrix of them",
        "T4": "Gram matrix by structure",
    }
    print(f"Gram matrix, MLP {'-'.join(map(str, widths))}, mean squared error, N = {examples}, {widths[-1]} columns")
    for name, text in names.items():
        print(f"  {name} {text:<28}{1e3 * spent[name]:>10.1f} ms{spent[name] / spent['T1']:>10.1f} gradients")
    ratio = spent["T3"] / spent["T4"]
    print(f"  T3 / T4 = {ratio:.0f} (published: 54), relative difference of the two {difference:.0e}\n")
    return {"ms": {name: 1e3 * t for name, t in spent.items()}, "ratio": ratio, "difference": difference}


# ------------------------------------------------------------------------------------------------------ eigenpairs


def enlarged_digits(examples):
    """Real images of ten classes in the shape that 3c3d takes."""
    data = digits(examples, held_out=())
    enlarged = nn.functional.interpolate(data.train_x, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return enlarged.contiguous(), data.train_y


def slightly_trained(network, steps):
    torch.manual_seed(0)
    model, (x, y) = NETWORKS[network](), enlarged_digits(1024)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps):
        part = torch.arange(64 * step, 64 * (step + 1)) % len(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    return model.eval(), (x, y)


def power_iteration(matrix, k, seed):
    """Eigenvalue, products and time so far, for each of the largest in magnitude in turn."""
    generator, start, products = torch.Generator().manual_seed(seed), time.perf_counter(), 0
    found = torch.zeros(matrix.size, 0)
    for _ in range(k):
        value, vector = float("inf"), torch.randn(matrix.size, 1, generator=generator)
        for _ in range(MOST_PRODUCTS):
            vector = vector - found @ (found.T @ vector)
            vector = vector / vector.norm()
            image, last = matrix @ vector, value
            vector, value, products = image, float(vector.T @ image), products + 1
            if abs(value - last) < TOLERANCE * abs(last):
                break
        vector = vector - found @ (found.T @ vector)
        found = torch.cat([found, vector / vector.norm()], dim=1)
        yield value, products, time.perf_counter() - start


def timed(job):
    start = time.perf_counter()
    result = job()
    return result, time.perf_counter() - start


def one_round(model, batch, counts, seed):
    """Eigenvalues of the mean, seconds and products of each method for each k."""
    n, found = len(batch[1]), {}
    product = GGNProduct(model, Categorical(), [batch], check=False)
    for k in counts:
        for setting in SETTINGS:

            def pairs(setting=setting, k=k):
                spectrum = analysis(model, batch, setting, gradients=False).spectrum
                spectrum.eigenvectors(k)
                return spectrum.eigenvalues[:k]

            values, spent = timed(pairs)
            found[setting, k] = values.double(), spent, None
        generator = torch.Generator().manual_seed(seed)
        pairs, spent = timed(lambda k=k: largest_eigenpairs(product, k, tolerance=TOLERANCE, generator=generator))  # noqa: B023
        found["Lanczos", k] = pairs.values / n, spent, None
    values = []
    for k, (value, products, spent) in enumerate(power_iteration(product, max(counts), seed), start=1):
        values.append(value / n)
        if k in counts:
            found["power iteration", k] = torch.tensor(values).double(), spent, products
    return found


def eigenpair_part(options):
    network, counts, examples = ("small", (1, 2), 16) if options.quick else ("3c3d", (1, 2, 5, 10), 128)
    model, (x, y) = slightly_trained(network, steps=40)
    batch = x[:examples], y[:examples]
    gradient = medians({"gradient": gradient_pass(model, *batch)}, options.repeats, "cpu")["gradient"]
    one_round(model, batch, counts[:1], 0)  # warms up
    rounds = [one_round(model, batch, counts, seed) for seed in range(options.repeats)]
    methods = list(dict.fromkeys(method for method, _ in rounds[0]))
    records = []
    print(f"the k largest eigenpairs of the GGN, {network}, N = {examples}; one gradient takes {1e3 * gradient:.0f} ms")
    print(f"  {'seconds':<18}" + "".join(f"{f'k = {k}':>9}" for k in counts) + f"{'accuracy, all':>15}{'products':>10}")
    for method in methods:
        median = {k: statistics.median(found[method, k][1] for found in rounds) for k in counts}
        most, exact = max(counts), rounds[0]["exact mb", max(counts)][0]
        score = statistics.median(float(eigenvalue_accuracy(found[method, most][0], exact)) for found in rounds)
        products = rounds[0][method, most][2]
        records.append({"method": method, "seconds": median, "accuracy": score, "products": products})
        print(f"  {method:<18}" + "".join(f"{median[k]:>9.2f}" for k in counts) + f"{score:>15.4f}{products or '':>10}")
    by_method = {record["method"]: record["seconds"] for record in records}
    slower = [k for k in counts if k > 1 and by_method["exact mb"][k] >= by_method["power iteration"][k]]
    print(f"  exact ViViT beats power iteration for k > 1: {'yes' if not slower else f'no, not for k = {slower}'}\n")
    return {"gradient_ms": 1e3 * gradient, "examples": examples, "methods": records}


# ---------------------------------------------------------------------------------------------------------- memory


def critical_part(options):
    """Bisection for each task and setting; published numbers, scaled by the budgets, stand beside."""
    network, budget, precision = ("small", 2**26, 0.5) if options.quick else ("3c3d", options.budget, 0.06)
    tasks, settings = (["Newton step"], ["exact mb", "mc sub"]) if options.quick else (TASKS, SETTINGS)
    found, probes = {}, []
    print(
        f"largest batch within {budget / 2**30:.3g} GiB, {network} (in brackets the published one, scaled from 11 GB)"
    )
    print(f"  {'':<16}" + "".join(f"{s:>18}" for s in settings))
    for task in tasks:
        found[task] = {}
        for setting in settings:
            guess = 64 if options.quick else int(PUBLISHED[task][setting] * budget / PUBLISHED_BUDGET)
            found[task][setting], tried = critical(
                guess, precision, task=task, setting=setting, network=network, budget=budget
            )
            probes += tried
        texts = [f"{n} ({int(PUBLISHED[task][s] * budget / PUBLISHED_BUDGET)})" for s, n in found[task].items()]
        print(f"  {task:<16}" + "".join(f"{text:>18}" for text in texts), flush=True)
    orders = ordering(found, settings, 2 * precision)
    for text, holds in orders.items():
        print(f"  {text}: {'yes' if holds else 'no'}")
    print()
    return {"budget": budget, "network": network, "critical": found, "ordering": orders, "probes": probes}


def ordering(found, settings, slack):
    """The order that was published, up to the precision of the search."""
    chain = list(found)
    return {
        "eigenvalues >= top eigenpair >= Newton step": all(
            found[more][s] >= (1 - slack) * found[less][s] for more, less in itertools.pairwise(chain) for s in settings
        ),
        "Monte Carlo and sub-sampling raise it": all(
            found[task][s] >= found[task]["exact mb"] for task in chain for s in settings
        ),
    }


def published_part(options):
    """One probe for each entry of the table, at exactly its number of examples."""
    if options.quick:
        table, network = {"Newton step": {"exact sub": 24}}, "small"
    else:
        table, network = PUBLISHED, "3c3d"
    records = []
    print(f"the published batches for {PUBLISHED_BUDGET / 1e9:.0f} GB, {network}")
    print(f"  {'':<16}{'':<12}{'N':>6}{'peak':>10}{'seconds':>9}")
    for task, row in table.items():
        for setting, examples in row.items():
            record = probe(task=task, setting=setting, network=network, examples=examples, budget=PUBLISHED_BUDGET)
            records.append(record)
            peak = "-" if record["peak"] is None else f"{record['peak'] / 1e9:.2f} GB"
            verdict = record["why"] or "fits"
            print(
                f"  {task:<16}{setting:<12}{examples:>6}{peak:>10}{record['seconds'] or 0:>9.1f}  {verdict}", flush=True
            )
    print()
    return records


PARTS = {"gram": gram_part, "eigenpairs": eigenpair_part, "critical": critical_part, "published": published_part}


def main():
    options = parser(__doc__)
    options.set_defaults(repeats=3)
    options.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--quick", action="store_true", help="small networks and batches, to see that it runs")
    options.add_argument("--budget", type=int, default=2**29, help="bytes, for the critical batches")
    options = options.parse_args()
    path = options.json
    found = json.loads(path.read_text()) if path and path.exists() else {}
    for part in options.only:
        found[part] = report(argparse.Namespace(**vars(options) | {"json": None}), {part: PARTS[part]})
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
