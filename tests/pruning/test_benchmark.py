"""The benchmark's command runs, and what it prints has the shape that its table has in full."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "pruning.py"


@pytest.mark.slow
def test_compensation_and_the_prior_hold_the_accuracy(tmp_path):
    path = tmp_path / "found.json"
    options = [
        "--seeds",
        "1",
        "--epochs",
        "30",
        "--step",
        "0.1",
        "--priors",
        "diag",
        "--sparsities",
        "0.8",
        "--json",
        path,
    ]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (seed,) = json.loads(path.read_text())["found"]["diag"]
    at_80 = {name: values[0] for name, values in seed["pruned"].items()}
    assert seed["accuracy"] > 0.94
    assert at_80["OBS, sequential"] > seed["accuracy"] - 0.05
    assert at_80["OBS, sequential"] >= at_80["magnitude"] - 0.01
    assert at_80["random"] < 0.5
    assert "log evidence" in done.stdout
