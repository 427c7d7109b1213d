"""The README's Python runs, in order and in one namespace, as a reader would paste it."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_every_python_block_runs():
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


def test_pictures_and_notebooks_that_it_names_are_there():
    text = README.read_text()
    named = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"`(notebooks/[^`]+)`", text)
    assert named
    for path in named:
        assert (README.parent / path).is_file(), path
