"""The benchmark commands still run: with their quick settings, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by what Linux says"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmarks") / "found.json"
    command = [sys.executable, BENCHMARKS / "vivit.py", "--quick", "--repeats", "1", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {part: found[part] for part, found in json.loads(path.read_text()).items()}


def test_both_ways_to_the_gram_matrix_agree(found):
    assert found["gram"]["difference"] < 1e-5
    assert all(time > 0 for time in found["gram"]["ms"].values())


def test_iterative_methods_find_the_same_eigenvalues(found):
    methods = {record["method"]: record for record in found["eigenpairs"]["methods"]}
    assert methods["exact mb"]["accuracy"] == 1
    assert methods["power iteration"]["accuracy"] > 0.95
    assert methods["Lanczos"]["accuracy"] > 0.999


def test_a_larger_batch_than_the_critical_one_does_not_fit(found):
    critical = found["critical"]
    for task, row in critical["critical"].items():
        for setting, examples in row.items():
            own = [p for p in critical["probes"] if (p["task"], p["setting"]) == (task, setting)]
            assert examples > 0
            assert all((p["examples"] <= examples) == (p["why"] == "") for p in own)
            assert all(p["peak"] <= critical["budget"] for p in own if not p["why"])


def test_a_batch_far_below_the_budget_fits(found):
    assert [record["why"] for record in found["published"]] == [""]


@pytest.mark.peer
def test_every_job_is_timed_beside_the_peer(tmp_path):
    pytest.importorskip("laplace")
    path = tmp_path / "found.json"
    options = ["--quick", "--networks", "transformer", "--structures", "kron", "--repeats", "1", "--json", path]
    command = [sys.executable, BENCHMARKS / "laplace_torch.py", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert [(row["weights"], row["structure"]) for row in found["times"]] == [("all", "kron"), ("last_layer", "kron")]
    assert found["times"][0]["backend"] == "CurvlinopsGGN"
    assert "Another matrix" in found["times"][0]["failed"]["AsdlGGN"]
    for row in found["times"]:
        assert row["backend"] in ("CurvlinopsGGN", "AsdlGGN")  # the third refuses frozen weights
        for job in ("fit", "evidence", "tuning", "again", "predict", "sampled"):
            assert row[job]["ratio"] == pytest.approx(row[job]["peer"] / row[job]["lapkit"])
    assert all(row["memory"]["lapkit"] > 0 < row["memory"]["peer"] for row in found["memory"])
