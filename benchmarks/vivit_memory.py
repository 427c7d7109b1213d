"""The largest batch whose spectrum, top eigenvector or damped Newton step fits into a memory budget, on Linux.

`critical` looks for it; each probe is a fresh process, `python vivit_memory.py '{"task": ..., ...}'`, which may not
allocate beyond the budget (a limit on its address space) and reports the growth of its peak resident memory over what
it was once all libraries were loaded. Network and batch are part of what grows. Intermediates of lapkit get a quarter
of the budget, which is its default for a machine with so much free memory.
"""

from __future__ import annotations

import json
import pathlib
import resource
import subprocess
import sys
import time

import torch
from problems import conv_net
from torch import nn

from lapkit.curvature import GGN, Categorical, MonteCarloGGN, vivit

SLACK = 2**28  # address space that need not be resident: thread stacks, arenas of malloc
MOST = 32768  # examples, no search goes beyond
DAMPING, THRESHOLD = 1.0, 1e-4


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(392, 10))


NETWORKS = {"3c3d": conv_net, "small": small_net}
COLUMNS = {"exact": GGN(), "mc": MonteCarloGGN(1, seed=0)}
SETTINGS = {"exact mb": ("exact", 1), "exact sub": ("exact", 8), "mc mb": ("mc", 1), "mc sub": ("mc", 8)}


def analysis(model, batch, setting, budget=None, **options):
    """ViViT of a batch by one of the four settings; sub stands for an eighth of the examples."""
    columns, share = SETTINGS[setting]
    few = None if share == 1 else max(1, len(batch[1]) // share)
    return vivit(
        model, Categorical(), batch, columns=COLUMNS[columns], curvature_examples=few, memory_budget=budget, **options
    )


TASKS = {
    "eigenvalues": lambda *given: analysis(*given, gradients=False).eigenvalues(),
    "top eigenpair": lambda *given: analysis(*given, gradients=False).spectrum.eigenvectors(1),
    "Newton step": lambda *given: analysis(*given, threshold=THRESHOLD).newton_step(DAMPING),
}


def problem(network, examples):
    torch.manual_seed(0)
    model = NETWORKS[network]().eval()
    return model, (torch.randn(examples, 3, 32, 32), torch.randint(0, 10, (examples,)))


def memory(field):
    """VmRSS, VmHWM or VmSize of this process, in bytes. getrusage would count the parent's peak before exec."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def limited(budget):
    """Forget the peak so far and allow so much more; returns what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    limit = memory("VmSize") + budget + SLACK
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return memory("VmRSS")


def measure(task, setting, network, examples, budget):
    TASKS[task](*problem("small", 16), setting, budget // 4)  # loads what is loaded late and starts the threads
    before, start = limited(budget), time.perf_counter()
    try:
        result = TASKS[task](*problem(network, examples), setting, budget // 4)
        why = "" if result.isfinite().all() else "not finite"
    except (MemoryError, RuntimeError) as error:
        if "alloc" not in str(error) and not isinstance(error, MemoryError):
            raise
        why = "out of memory"
    peak = memory("VmHWM") - before
    return {"peak": peak, "seconds": time.perf_counter() - start, "why": why or ("" if peak <= budget else "too much")}


def probe(limit_s=900, **given):
    """A measurement in a fresh process."""
    command = [sys.executable, __file__, json.dumps(given)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {**given, "peak": None, "seconds": limit_s, "why": "too slow"}
    if done.returncode and "alloc" not in done.stderr and done.returncode > 0:
        raise RuntimeError(f"The probe {given} failed:\n{done.stderr}")
    if done.returncode:
        return {**given, "peak": None, "seconds": None, "why": "killed"}
    return {**given, **json.loads(done.stdout.splitlines()[-1])}


def critical(guess, precision, **given):
    """The largest number of examples that fits, to a relative precision, and all probes on the way.

    Bisection, in which peaks that were measured say where to look: memory grows by about as much for each example.
    """
    fits, fails, probes, at = 0, MOST + 1, [], max(1, min(guess, MOST))
    while fails - fits > max(1, precision * fits):
        found = probe(examples=at, **given)
        probes.append(found)
        if found["why"]:
            fails = at
        else:
            fits = at
        at = proposed(fits, fails, probes, given["budget"], precision)
    return fits, probes


def proposed(fits, fails, probes, budget, precision):
    """Strictly between the bounds: a little below or above where a line through two peaks meets the budget."""
    peaks = [(p["examples"], p["peak"]) for p in probes if p["why"] in ("", "too much")]
    middle = min((fits + fails) // 2, 2 * fits + 1) if fits else fails // 2
    if not peaks or len(probes) > 6:
        return middle
    (n, peak), (m, other) = sorted([*peaks, (0, 0)], key=lambda point: abs(point[1] - budget))[:2]
    slope = (peak - other) / (n - m)
    aim = n + (budget - peak) / slope if slope > 0 else middle
    beside = [int((1 + side * precision) * aim) for side in (-0.4, 0.4)]
    return next((at for at in beside if fits < at < fails), middle)


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
