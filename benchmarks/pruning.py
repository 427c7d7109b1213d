"""Digits: accuracy after pruning without fine-tuning, by how the network was trained and by what weights are ranked.

A 64-24-10 ReLU network on the 8 x 8 digits of scikit-learn, 70 % of which train; trained with weight decay, or with the
evidence in the loop, which finds one prior precision, one for each tensor or one for each weight.

    python benchmarks/pruning.py --seeds 3 --json benchmarks/results/pruning-cpu.json
"""

import argparse
import json
import platform
import time
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace
from lapkit.marglik import marglik_training
from lapkit.pruning import prune, random_scores

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
PRIORS = ("weight decay", "scalar", "layerwise", "diag")


def criteria(seed, step):
    """Structure of the curvature and how to prune."""
    return {
        "random": ("diag", partial(prune, criterion=random_scores(torch.Generator().manual_seed(seed)))),
        "magnitude": ("diag", partial(prune, criterion="magnitude")),
        "magnitude by layer": ("diag", partial(prune, criterion="magnitude", scope="layer")),
        "OBD": ("diag", partial(prune, criterion="obd")),
        "OPD": ("diag", partial(prune, criterion="opd")),
        "OPD, kron": ("kron", partial(prune, criterion="opd")),
        "OPD, compensated": ("full", partial(prune, criterion="opd", compensate=True)),
        "OBS": ("full", partial(prune, criterion="obs", compensate=False)),
        "OBS, compensated": ("full", partial(prune, criterion="obs")),
        "OBS, kron": ("kron", partial(prune, criterion="obs")),
        "OBS, sequential": ("full", partial(prune, criterion="obs", step=step)),
    }


def split(seed):
    data = load_digits()
    parts = train_test_split(data.data / 16, data.target, test_size=0.3, stratify=data.target, random_state=seed)
    return [torch.as_tensor(p) for p in parts]


def network():
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))


def trained(prior, seed, x, y, epochs):
    """A network, its prior precision, and the evidence that goes with both."""
    torch.manual_seed(seed)
    net = network()
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
    if prior != "weight decay":
        found = marglik_training(
            net,
            loader,
            "classification",
            "diag",
            n_epochs=epochs,
            burn_in=10,
            frequency=5,
            prior_structure=prior,
            optimizer_options={"lr": 1e-2},
        )
        return net.eval(), found.laplace.prior_precision, max(found.log_evidences)
    decay = 0.01
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            penalty = decay * sum(p.square().sum() for p in net.parameters()) / 2
            (nn.functional.cross_entropy(net(images), labels, reduction="sum") + penalty).backward()
            optimizer.step()
    precision = torch.tensor(decay)
    la = Laplace(net, "classification", "all", "diag", prior_precision=precision).fit([(x, y)])
    return net.eval(), precision, float(la.log_marginal_likelihood())


def accuracy(net, x, y):
    with torch.no_grad():
        return float((net(x).argmax(-1) == y).double().mean())


def one_seed(prior, seed, epochs, step, sparsities):
    train_x, test_x, train_y, test_y = split(seed)
    net, precision, evidence = trained(prior, seed, train_x, train_y, epochs)
    fits = {
        structure: Laplace(net, "classification", "all", structure, prior_precision=precision).fit([(train_x, train_y)])
        for structure in ("diag", "kron", "full")
    }
    rows = {
        name: [accuracy(how(fits[structure], sparsity).pruned(), test_x, test_y) for sparsity in sparsities]
        for name, (structure, how) in criteria(seed, step).items()
    }
    return {"accuracy": accuracy(net, test_x, test_y), "log_evidence": evidence, "pruned": rows}


def table(found, sparsities):
    """Means over seeds as text."""
    lines = []
    for prior, seeds in found.items():
        dense, evidence = (sum(s[k] for s in seeds) / len(seeds) for k in ("accuracy", "log_evidence"))
        lines += ["", f"{prior}: dense {dense:.3f}, log evidence {evidence:.0f}"]
        for name in seeds[0]["pruned"]:
            values = torch.tensor([s["pruned"][name] for s in seeds]).mean(0).tolist()
            lines.append(f"  {name:<20}" + "".join(f"{v:8.3f}" for v in values))
    head = f"{'accuracy at sparsity':<22}" + "".join(f"{s:8.2f}" for s in sparsities)
    return "\n".join([head, *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--step", type=float, default=0.01, help="fraction that goes at a time, of sequential removals")
    parser.add_argument("--priors", nargs="+", choices=PRIORS, default=PRIORS)
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    start = time.perf_counter()
    found = {
        prior: [
            one_seed(prior, seed, options.epochs, options.step, options.sparsities) for seed in range(options.seeds)
        ]
        for prior in options.priors
    }
    print(table(found, options.sparsities))
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.machine(), "seconds": time.perf_counter() - start}
        settings = {
            "sparsities": options.sparsities,
            "epochs": options.epochs,
            "step": options.step,
            "seeds": options.seeds,
        }
        options.json.write_text(json.dumps({"about": about, "settings": settings, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
