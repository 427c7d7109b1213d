"""The benchmark of metrics still runs, on few examples, and its jobs agree with each other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_jobs_run_and_agree(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, ROOT / "benchmarks" / "calibration.py", "--examples", "2000", "--repeats", "1"]
    done = subprocess.run([*command, "--json", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(path.read_text())["costs"]["metrics"]
    for name, jobs in metrics.items():
        ours = jobs["lapkit"]["value"]
        assert all(job["value"] == pytest.approx(ours, abs=1e-5) for job in jobs.values()), name
    streamed = metrics["ECE, streamed by 1000"]["lapkit"]["value"]
    assert streamed == pytest.approx(metrics["ECE"]["lapkit"]["value"], abs=1e-12)
