"""Writes docs/benchmarks.md from the results beside this file.

.venv/bin/python benchmarks/page.py
"""

from __future__ import annotations

import json
import pathlib

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
PEERS = ("BackPACK", "curvlinops")
JOBS = {
    "fit": "fit",
    "evidence": "fit and first evidence",
    "tuning": "tuning one prior precision",
    "predict": "linearised predictive",
    "sampled": "network at draws of its weights",
    "memory": "peak memory",
}

HEAD = """# What it costs

Every table is printed by a command of `benchmarks/`, which writes its JSON to `benchmarks/results/`; this page
is made of those by `benchmarks/page.py`. The machine has two cores of an x86-64 server and no GPU; torch 2.13,
single precision, two threads, medians of repeats, peers in turn with lapkit in the same run. Times move by a
tenth from run to run.
"""

CURVATURE = """## Curvature, in gradient passes

`benchmarks/curvature.py`: 3c3d (895,210 weights, 128 images, 10 classes), an MLP 784-512-256-10 (128 images), a
transformer of 6 layers (32 sequences of 32 tokens), against one forward and backward pass of the same batch.
The first batch of a model includes reading its graph and checking it on a few examples, 4 to 8 ms for a small
network; later batches of the same kind do not. "Floor" counts the multiplications that cannot be avoided, at
the speed of the gradient; symmetric products need only 5/8 of what it counts, so that a figure can lie below.
Peers are left out where they have no form for some of the weights.
"""

PRODUCTS = """## Matrix-free products, in gradient passes

`benchmarks/products.py`, for one vector and for eight at once.
"""

PEER = """## Beside laplace-torch 0.3

`benchmarks/laplace_torch.py`: an MLP 784-256-256-10, 3c3d, ResNet-20 and a transformer of 4 layers, all with
exact curvature. The peer takes, in each row, its best batch size and the fastest of its backends that have the same
matrix (AsdlGGN takes the positions of sequences for examples, BackPackGGN those of convolutions). A figure is how
many times faster lapkit is, or how many times less memory it takes. Memory is compared at equal work, a fit in batches
of 128 and 16 predictions in one call (256 of a last layer); in calls of two inputs the peer's predictions take little.

In brackets is what the work that cannot be left out would allow. For the last layer that is nothing but the forward
pass of the network. For all layers it is the multiplications, at the speed of a gradient: the forward pass, a backward
pass for each class (in a fit, but one), and what comes back contracted; since symmetric products take 5/8 of what is
counted, it can be exceeded. Both libraries have to do these. Draws are 5 of all layers, each a forward pass for both,
and 100, the default of both, of the last one. Tuning follows a first evidence; of `full` it includes the eigenvalues,
but not in the rows of ResNet-20, which are of an earlier run, where both fitted in batches of 128.
"""

UCI = """## Published numbers

`benchmarks/uci.py`: test negative log-likelihoods by the protocol of Immer, Korzepa and Bauer (2021), of a network
with two layers of 50 units; means over splits, with standard errors. The last column is the difference in combined
standard errors. Of australian two columns are left out, which have lost their decimal points in the data package.
"""

OTHERS = """## Others

- `benchmarks/vivit.py`: the Gram matrix of the GGN, top eigenpairs against power iteration, critical batch
  sizes under a memory budget.
- `benchmarks/calibration.py`: metrics beside torchmetrics, netcal and scikit-learn. The ECE of 100,000 x 10
  probabilities takes {ece:.1f} ms (torchmetrics {torchmetrics:.1f}), of which reading the table twice, to check
  it and for its maxima, is the larger part.
- `benchmarks/pruning.py`: accuracy against sparsity for all criteria.
"""


def read(name):
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def curvature():
    rows = [
        [r["problem"], r["quantity"], number(r["lapkit"]), number(r["lapkit_later_batches"]), number(r.get("floor"))]
        + [number(r.get(peer)) for peer in PEERS]
        for r in read("curvature-cpu")["costs"]
    ]
    return markdown(["network", "quantity", "first batch", "later batches", "floor", *PEERS], rows)


def products():
    rows = [
        [r["problem"], r["product"], r["vectors"], number(r["lapkit"]), number(r["floor"]), number(r.get("curvlinops"))]
        for r in read("products-cpu")["products"]
    ]
    return markdown(["network", "matrix", "vectors", "lapkit", "floor", "curvlinops"], rows)


def ratio(record, job):
    found = record.get(job)
    if found is None:
        return ""
    if "ratio" not in found:
        return f"{found['lapkit'] / 2**20:.0f} MiB" if job == "memory" else f"{1e3 * found['lapkit']:.3g} ms"
    limit = f" ({found['limit']:.1f})" if found.get("limit") and found["limit"] < 100 else ""
    return f"{found['ratio']:.{1 if found['ratio'] < 20 else 0}f}{limit}"


def peer():
    results = read("laplace-torch-cpu")
    keys = ("network", "weights", "structure")
    memory = {tuple(r[k] for k in keys): r for r in results["memory"]}
    rows = []
    for record in results["times"]:
        key = tuple(record[k] for k in keys)
        both = record | {"memory": memory.get(key, {}).get("memory")}
        rows.append([", ".join(key).replace("_", " "), *(ratio(both, job) for job in JOBS)])
    return markdown(["network, weights, structure", *JOBS.values()], rows)


def plus_minus(mean, error):
    return f"{mean:.3f} ± {error:.3f}"


def uci():
    rows = [
        [
            *(r["set"], len(r["splits"]), r["method"]),
            *(plus_minus(r["nll"], r["error"]), plus_minus(*r["cited"]), f"{r['away']:+.1f}"),
        ]
        for r in read("uci")["uci"]
    ]
    return markdown(["data", "splits", "method", "lapkit", "published", "difference"], rows)


def page():
    ece = read("calibration-cpu")["costs"]["metrics"]["ECE"]
    others = OTHERS.format(ece=ece["lapkit"]["median_ms"], torchmetrics=ece["torchmetrics"]["median_ms"])
    parts = [HEAD, CURVATURE, curvature(), PRODUCTS, products(), PEER, peer(), UCI, uci(), others]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
