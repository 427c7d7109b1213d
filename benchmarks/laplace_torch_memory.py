"""The memory that fits and predictions take, each in a fresh process, on Linux; a part of `laplace_torch.py`."""

from __future__ import annotations

import ctypes
import gc
import json
import pathlib
import resource
import subprocess
import sys
import warnings
from contextlib import suppress
from functools import partial

from laplace_torch_sides import BATCH, HEAD, MOST, fastest, loader, ours, peer, print_row, problem, ratio, rows
from timing import seconds
from vivit_memory import memory

warnings.filterwarnings("ignore")


def peak(job):
    """The growth of the peak of resident memory, over what is in use: cycles and free lists are given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    job()
    return memory("VmHWM") - before


def probe(backend, batch, network, weights, structure, fit_inputs, predicted):
    """In a process of its own; what is loaded late is loaded by a small problem of the same kind."""

    def jobs(inputs, some):
        model, x, y = problem(network, max(inputs, some))
        la = ours(model, weights, structure) if backend is None else peer(backend, model, weights, structure)
        yield lambda: (la.fit(loader(x[:inputs], y[:inputs], batch)), la.log_marginal_likelihood())
        yield lambda: la(x[:some], link_approx="probit")

    for job in jobs(2, 2):
        job()
    return [peak(job) for job in jobs(fit_inputs, predicted)]


def in_fresh_process(**given):
    """In batches of 128, or smaller ones where these take too much."""
    for batch in (BATCH, 16):
        with suppress(RuntimeError):
            return probed(batch=batch, **given)
    return probed(batch=2, **given)


def probed(**given):
    done = subprocess.run([sys.executable, __file__, json.dumps(given)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The probe {given} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory_table(options):
    print("\n" + HEAD)
    records = []
    for network, weights, structure in rows(options):
        few = 16 if options.quick else 256
        given = {"network": network, "weights": weights, "structure": structure}
        sizes = {"fit_inputs": few, "predicted": 16 if weights == "all" else few}
        model, x, y = problem(network, BATCH)
        backend, _, _ = fastest(model, x, y, weights, structure, partial(seconds, device="cpu"))
        record, found = given | {"backend": backend}, {"lapkit": in_fresh_process(backend=None, **given, **sizes)}
        if backend is not None:
            found["peer"] = in_fresh_process(backend=backend, **given, **sizes)
        spent = {name: max(values) for name, values in found.items()}
        record["parts"] = found
        record["memory"] = {"inputs": None, **spent} | ({"ratio": ratio(spent)} if "peer" in spent else {})
        records.append(record)
        print_row(record, "memory", "MiB", 2**-20)
        print(
            f"{'':<32}fit, predict: {', '.join(f'{n} {v[0] >> 20}, {v[1] >> 20}' for n, v in found.items())}",
            flush=True,
        )
    return records


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    print(json.dumps(probe(**json.loads(sys.argv[1]))))
