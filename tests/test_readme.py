"""The README's Python runs, in order and in one namespace, as a reader would paste it."""

import re
from pathlib import Path

import torch
from torch import nn

from lapkit.curvature import inspect

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them saves a file
    torch.set_default_dtype(torch.float32)  # what a reader has
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    probs = names["probs"]
    assert torch.allclose(probs.sum(-1), torch.ones(200))
    kept = torch.cat([m.flatten() for m in names["masks"].values()]).mean()
    assert float(kept) == 0.5
    assert names["both"].count == 1100
    assert (names["top"].residuals < 1e-2 * names["top"].values).all()


def test_the_printed_table_is_what_inspect_prints(capsys):
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 8))
    inspect(net, torch.zeros(100, 1, 8, 8))
    assert f"```\n{capsys.readouterr().out}```" in README.read_text()


def test_pictures_and_notebooks_that_it_names_are_there():
    text = README.read_text()
    named = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`(notebooks/[^`]+)`", text)
    assert named
    for path in named:
        assert (README.parent / path).is_file(), path
