"""The two sides of the comparison with laplace-torch: networks, data, constructors, rows and their bars."""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
from problems import LinearTransformer, conv_net, mlp, resnet
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from lapkit import Laplace

NETWORKS = {
    "MLP": (partial(mlp, 256), (784,)),
    "3c3d": (conv_net, (3, 32, 32)),
    "ResNet-20": (resnet, (3, 32, 32)),
    "transformer": (LinearTransformer, (16, 16)),
}
STRUCTURES = [("all", "kron"), ("all", "diag"), ("last_layer", "full"), ("last_layer", "kron"), ("last_layer", "diag")]
BACKENDS = ("CurvlinopsGGN", "BackPackGGN", "AsdlGGN")
BATCH = 128
MOST = 2**34  # bytes of address space: what takes more fails, and is tried in smaller batches
BATCHES = (2, 16, BATCH, 512)  # of the peer
BARS = {"fit": 3, "evidence": 1, "predict": 50, "tuning": 50, "again": 1, "sampled": 1, "memory": 5}
LAST_LAYER_FIT = 10


def problem(network, inputs):
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            module.requires_grad_(False)
    return model, torch.randn(inputs, *shape), torch.randint(0, 10, (inputs,))


def loader(x, y, batch=BATCH):
    data = TensorDataset(x, y)
    return DataLoader(data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), batch, drop_last=False))


def ours(model, weights, structure):
    return Laplace(model, "classification", weights, structure)


def peer(backend, model, weights, structure):
    """Of a copy of the network, to which a backend may attach what it likes."""
    from laplace import Laplace as Peer
    from laplace import curvature

    kind = getattr(curvature, backend)
    return Peer(copy.deepcopy(model), "classification", weights, structure, backend=kind)


def fitted(make, data):
    la = make()
    la.fit(data)
    return la


def fastest(model, x, y, weights, structure, timed):
    """The backend with which the peer fits in the least time and its batch size, and why others fail.

    All are tried with 16 inputs, and those that are not far behind in batches of several sizes, as far as they fit into
    the memory. What has another matrix does not count: sequences and convolutions for which positions
    are taken for examples. Biases of shared layers, which only lapkit has exactly, make up to a fifth of the
    determinant.
    """
    few, failed, found = {}, {}, {}

    def spent(backend, inputs, batch=BATCH):
        make = partial(peer, backend, model, weights, structure)
        found.clear()
        return timed(lambda: found.update(la=fitted(make, loader(x[:inputs], y[:inputs], batch))))

    wanted = float(fitted(partial(ours, model, weights, structure), loader(x[:16], y[:16])).log_det_ratio)
    for backend in BACKENDS:
        try:
            few[backend] = min(spent(backend, 16) for _ in range(2))  # the first warms up
            log_det = float(found["la"].log_det_ratio)
        except Exception as error:
            failed[backend] = f"{type(error).__name__}: {error}".split("\n")[0]
            continue
        if not 2 / 3 < log_det / wanted < 3 / 2:
            failed[backend] = f"Another matrix: its log det ratio is {log_det:.4g}, not {wanted:.4g}"
            del few[backend]
    best = (math.inf, None, BATCH)  # seconds for each input, backend, batch
    for backend in [b for b, time in few.items() if time < 5 * min(few.values())]:
        before = math.inf
        for batch in (size for size in BATCHES if size <= max(16, len(x))):
            inputs = min(len(x), max(batch, 16))
            try:
                each = spent(backend, inputs, batch) / inputs
            except (RuntimeError, MemoryError) as error:  # there is not the room
                failed[f"{backend}, {batch} at a time"] = str(error)[:80]
                break
            best = min(best, (each, backend, batch), key=lambda found: found[0])
            if each > 1.3 * before:  # than that of a smaller batch
                break
            before = each
    found.clear()
    return best[1], best[2], failed


def best_batch(make, x, y, timed):
    """Of lapkit: the size of batches in which a fit to 512 inputs takes the least time."""
    some = x[: BATCHES[-1]], y[: BATCHES[-1]]
    fitted(make, loader(x[:16], y[:16]))  # warms up
    jobs = {size: partial(fitted, make, loader(*some, size)) for size in (BATCH, 512)}
    return min(jobs, key=lambda size: min(timed(jobs[size]) for _ in range(2)))


def ratio(spent):
    return spent["peer"] / spent["lapkit"]


def bar(record, job):
    return LAST_LAYER_FIT if job == "fit" and record["weights"] == "last_layer" else BARS[job]


def print_row(record, job, unit, scale):
    found = record[job]
    peers = f"{scale * found['peer']:>12.2f}{found['ratio']:>9.1f}" if "peer" in found else f"{'-':>12}{'-':>9}"
    wanted = bar(record, job)
    missed = "  missed" if found.get("ratio", math.inf) < wanted else ""
    limit = f"{found['limit']:>8.1f}" if found.get("limit") else " " * 8
    who = f"{record['network']}, {record['weights']}, {record['structure']}"
    times = f"{found['inputs'] or '':>7}{scale * found['lapkit']:>12.2f}{peers}"
    print(f"{who:<32}{job:<10}{times}{wanted:>6}{limit} {unit}{missed}")


HEAD = f"{'':<32}{'':<10}{'inputs':>7}{'lapkit':>12}{'peer':>12}{'ratio':>9}{'bar':>6}{'limit':>8}"


def rows(options):
    chosen = [(weights, structure) for weights, structure in STRUCTURES if structure in options.structures]
    return [(network, *kind) for network in options.networks for kind in chosen]
