"""How the benchmarks measure and what they write: medians of jobs that take turns, and the setting beside them."""

import argparse
import json
import pathlib
import platform
import statistics
import time

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the second for one thread on a busy machine


def seconds(job, device, clock="wall"):
    """Time of one call that has ended."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = CLOCKS[clock]()
    job()
    if device == "cuda":
        torch.cuda.synchronize()
    return CLOCKS[clock]() - start


def medians(jobs, repeats, device, clock="wall"):
    """Jobs by name in turn, so that a busy moment hits all of them; the first round warms up."""
    times = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            spent = seconds(job, device, clock)
            if turn:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def parser(documentation):
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=documentation.splitlines()[0])
    options.add_argument("--device", default="cpu")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--json", type=pathlib.Path, default=None)
    return options


def report(options, tables):
    """Run the tables, `{name: function of the options}`, under a line that tells where, and write what they return."""
    where = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": where}
    setting["repeats"] = options.repeats
    print(setting, "\n")
    found = {"setting": setting} | {name: table(options) for name, table in tables.items()}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return found
