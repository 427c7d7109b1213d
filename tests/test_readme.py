"""The Python of the README and of each page in docs runs, in order and in one namespace, as a reader would paste it."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lapkit.curvature import inspect

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
PAGES = [README, *sorted(DOCS.glob("*.md"))]


@pytest.fixture
def run(tmp_path, monkeypatch):
    def names_after(page):
        monkeypatch.chdir(tmp_path)  # some save a file
        torch.set_default_dtype(torch.float32)  # what a reader has
        torch.manual_seed(0)
        names: dict[str, object] = {}
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
            exec(block, names)
        return names

    return names_after


def test_the_readme_runs(run):
    names = run(README)
    assert torch.allclose(names["probs"].sum(-1), torch.ones(200))
    kept = torch.cat([m.flatten() for m in names["result"].masks.values()]).mean()
    assert float(kept) == 0.5
    assert names["results"]["norms"].norms().shape == (200,)


def test_the_page_of_curvature_runs(run):
    names = run(DOCS / "curvature.md")
    assert names["both"].count == 1100
    assert (names["top"].residuals < 1e-2 * names["top"].values).all()


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in ("README.md", "curvature.md")], ids=lambda p: p.stem
)
def test_other_pages_run(run, page):
    run(page)


def test_the_printed_table_is_what_inspect_prints(capsys):
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 8))
    inspect(net, torch.zeros(100, 1, 8, 8))
    assert f"```\n{capsys.readouterr().out}```" in (DOCS / "curvature.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pictures_and_notebooks_that_are_named_are_there(page):
    text = page.read_text()
    for path in re.findall(r"\]\(([^):#]+)\)", text):
        assert (page.parent / path).is_file(), path
    for path in re.findall(r"`((?:notebooks|benchmarks|docs)/[^`*]+\.\w+)`", text):
        assert (README.parent / path).is_file(), path
