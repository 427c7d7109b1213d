"""What metrics of classification cost, input checks included, beside the peers that are installed.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/calibration.py [--device cuda] [--repeats 15] [--json FILE]

Float32 probabilities of 10 classes; 15 bins where there are bins. The peers get tensors or arrays, as they like them
best, and go with all their checks. Jobs take turns; the table has the fastest time of each, and of one thread the
fastest time of the processor beside it, which a busy machine disturbs least; the file has the medians as well.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings

import torch
from timing import parser, report, seconds

from lapkit.calibration import (
    EqualWidthReliability,
    Streaming,
    accuracy,
    auroc,
    brier,
    classwise_calibration_error,
    expected_calibration_error,
    nll,
    risk_coverage_curve,
    smooth_calibration_error,
    sweep_calibration_error,
)

warnings.filterwarnings("ignore")

CLASSES, BINS = 10, 15


def problem(examples, device):
    """Labels drawn from the probabilities, so that the model is calibrated."""
    generator = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(examples, CLASSES, generator=generator)).softmax(dim=1)
    return p.to(device), torch.multinomial(p, 1, generator=generator).squeeze(1).to(device)


def streamed(p, y, batch):
    stream = Streaming(EqualWidthReliability(BINS))
    for start in range(0, len(p), batch):
        stream.update(p[start : start + batch], y[start : start + batch])
    return stream.compute().ece


def lapkit_jobs(p, y):
    score = p.amax(dim=1)
    half = len(p) // 2
    return {
        "ECE": lambda: expected_calibration_error(p, y, bins=BINS),
        "ECE, streamed by 1000": lambda: streamed(p, y, 1000),
        "ECE, equal mass": lambda: expected_calibration_error(p, y, bins=BINS, binning="equal_mass"),
        "classwise ECE": lambda: classwise_calibration_error(p, y, bins=BINS),
        "smooth ECE": lambda: smooth_calibration_error(p, y),
        "ECE sweep": lambda: sweep_calibration_error(p, y),
        "accuracy": lambda: accuracy(p, y),
        "NLL": lambda: nll(p, y),
        "Brier score": lambda: brier(p, y),
        "AUROC": lambda: auroc(score[:half], score[half:]),
        "AURC": lambda: risk_coverage_curve(p, y).aurc,
    }


def torchmetrics_jobs(p, y):
    from torchmetrics import functional
    from torchmetrics.classification import MulticlassCalibrationError

    kinds = {"num_classes": CLASSES}
    ece = functional.classification.multiclass_calibration_error
    correct = functional.classification.multiclass_accuracy

    def in_batches():
        metric = MulticlassCalibrationError(n_bins=BINS, norm="l1", **kinds)
        for start in range(0, len(p), 1000):
            metric.update(p[start : start + 1000], y[start : start + 1000])
        return metric.compute().item()

    return {
        "ECE": lambda: ece(p, y, n_bins=BINS, norm="l1", **kinds).item(),
        "ECE, streamed by 1000": in_batches,
        "accuracy": lambda: correct(p, y, average="micro", **kinds).item(),
    }


def netcal_jobs(p, y):
    from netcal.metrics import ECE

    table, labels = p.cpu().numpy(), y.cpu().numpy()
    return {"ECE": lambda: ECE(BINS).measure(table, labels)}


def scikit_learn_jobs(p, y):
    from sklearn.metrics import brier_score_loss, log_loss

    table, labels, known = p.cpu().numpy(), y.cpu().numpy(), list(range(CLASSES))
    return {
        "NLL": lambda: log_loss(labels, table, labels=known),
        "Brier score": lambda: brier_score_loss(labels, table, labels=known, scale_by_half=False),
    }


PEERS = {"torchmetrics": torchmetrics_jobs, "netcal": netcal_jobs, "sklearn": scikit_learn_jobs}


def measured(jobs, options):
    """Fastest and median milliseconds, those of the processor, and the value; the first round warms up."""
    values = {name: job() for name, job in jobs.items()}
    wall, processor = {name: [] for name in jobs}, {name: [] for name in jobs}
    for _ in range(options.repeats):
        for name, job in jobs.items():
            start = time.process_time()
            wall[name].append(1e3 * seconds(job, options.device))
            processor[name].append(1e3 * (time.process_time() - start))
    return {
        name: {
            "fastest_ms": min(spent),
            "median_ms": statistics.median(spent),
            "processor_ms": min(processor[name]),
            "value": float(values[name]),
        }
        for name, spent in wall.items()
    }


def cell(found):
    return (
        f"{'-':>18}"
        if found is None
        else f"{found['fastest_ms']:9.2f} {'(' + format(found['processor_ms'], '.2f') + ')':>8}"
    )


def table(options):
    p, y = problem(options.examples, options.device)
    peers = {name: jobs(p, y) for name, jobs in PEERS.items() if importlib.util.find_spec(name) is not None}
    print(f"{options.examples} examples, {CLASSES} classes; fastest of {options.repeats}, ms (processor)")
    print(f"{'':24}" + "".join(f"{name:>18}" for name in ("lapkit", *peers)))
    rows = {}
    for metric, job in lapkit_jobs(p, y).items():
        jobs = {"lapkit": job} | {name: others[metric] for name, others in peers.items() if metric in others}
        rows[metric] = measured(jobs, options)
        print(f"{metric:<24}" + "".join(cell(rows[metric].get(name)) for name in ("lapkit", *peers)), flush=True)
    return {"examples": options.examples, "classes": CLASSES, "bins": BINS, "metrics": rows}


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--examples", type=int, default=100_000)
    report(options.parse_args(), {"costs": table})
