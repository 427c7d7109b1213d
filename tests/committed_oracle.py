"""The committed oracle: values of small linear models on fixed inputs, each with the tolerance it states."""

import json
from pathlib import Path

import torch
from torch import nn

ORACLE = json.loads((Path(__file__).parent / "data" / "predictive_evidence_pruning.json").read_text())


def value(metric):
    (case,) = [c for c in ORACLE["cases"] if c["metric"] == metric]
    return torch.tensor(case["value"], dtype=torch.float64), case["tol"]


def check(ours, metric):
    theirs, tolerance = value(metric)
    torch.testing.assert_close(torch.as_tensor(ours, dtype=torch.float64), theirs, rtol=0, atol=tolerance)


def data(group, *names):
    return [torch.tensor(ORACLE["inputs"][group][name]) for name in names]


def linear(weight):
    model = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    return model
