"""Fit and predict times of lapkit, of one gradient epoch (the floor), and of laplace-torch where it is installed.

    .venv/bin/python benchmarks/fit_and_predict.py

Network 784-256-256-10, 2,048 random inputs in batches of 128, predictions for 64 inputs, float32. Medians of repeats
in one process.
"""

from __future__ import annotations

import importlib.util
import platform
import statistics
import time
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace

INPUTS, BATCH, PREDICTED = 2048, 128, 64


def median_ms(job, repeats):
    job()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def gradient_epoch(model, loader):
    for x, y in loader:
        nn.functional.cross_entropy(model(x), y).backward()
        model.zero_grad()


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    x, y = torch.randn(INPUTS, 784), torch.randint(0, 10, (INPUTS,))
    loader = DataLoader(TensorDataset(x, y), batch_size=BATCH)
    epoch = median_ms(lambda: gradient_epoch(model, loader), 9)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"one gradient epoch: {epoch:.1f} ms\n")
    print(f"{'':<28}{'fit ms':>9}{'epochs':>8}{'first evidence ms':>19}{'prior tuning ms':>17}{'predict 64 ms':>15}")
    for subset, structure in [("all", "diag"), ("all", "kron"), ("last_layer", "kron"), ("last_layer", "full")]:

        def make(subset=subset, structure=structure):
            return Laplace(model, "classification", subset_of_weights=subset, hessian_structure=structure)

        fit = median_ms(lambda: make().fit(loader), 9)
        fresh = [make().fit(loader) for _ in range(3)]
        evidence = statistics.median(median_once(la.log_marginal_likelihood) for la in fresh)
        la = fresh[0]
        tune = median_ms(la.optimize_prior_precision, 5)
        predict = median_ms(lambda: la(x[:PREDICTED]), 21)  # noqa: B023
        print(
            f"{f'lapkit {structure}, {subset}':<28}{fit:>9.1f}{fit / epoch:>8.2f}{evidence:>19.1f}{tune:>17.1f}"
            f"{predict:>15.2f}"
        )
    if importlib.util.find_spec("laplace"):
        peer(model, loader, x, epoch)


def median_once(job):
    start = time.perf_counter()
    job()
    return 1e3 * (time.perf_counter() - start)


def peer(model, loader, x, epoch):
    """The same jobs with laplace-torch; one repeat, they take long."""
    from laplace import Laplace as Peer

    warnings.simplefilter("ignore")
    for subset, structure in [("all", "kron"), ("last_layer", "kron"), ("last_layer", "full")]:
        la = Peer(model, "classification", subset_of_weights=subset, hessian_structure=structure)
        fit = median_once(lambda: la.fit(loader))  # noqa: B023
        tune = median_once(lambda: la.optimize_prior_precision(method="marglik"))  # noqa: B023
        predict = median_once(lambda: la(x[:PREDICTED]))  # noqa: B023
        name = f"laplace-torch {structure}, {subset}"
        print(f"{name:<28}{fit:>9.1f}{fit / epoch:>8.2f}{'':>19}{tune:>17.1f}{predict:>15.2f}")


if __name__ == "__main__":
    main()
