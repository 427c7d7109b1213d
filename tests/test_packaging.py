"""What is built and installed is what the folders hold, under one name: lapkit."""

import importlib.metadata
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("curvature", "posteriors", "calibration")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

QUICK_START = """
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit import Laplace

x, y = torch.randn(40, 3), torch.randint(2, (40,))
model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

la = Laplace(model, "classification", subset_of_weights="all", hessian_structure="kron")
la.fit(DataLoader(TensorDataset(x, y), batch_size=16))
la.optimize_prior_precision(method="marglik")
probabilities = la(x, link_approx="probit")

assert probabilities.shape == (40, 2), probabilities.shape
torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(40))

home = Path(sys.argv[1]).resolve()
ours = [module for name, module in sys.modules.items() if name.split(".")[0] == "lapkit"]
elsewhere = [module.__file__ for module in ours if home not in Path(module.__file__).resolve().parents]
assert not elsewhere, elsewhere
"""


def modules():
    """Every source file as (path in the repository, path in the wheel). rglob does not follow the links."""
    for folder in ("lapkit", *PARTS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT)
            yield path, inside if folder == "lapkit" else Path("lapkit") / inside


def run(*command, **options):
    """Run a command and show what it said if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_packages_are_the_folders_that_hold_python_files():
    """A folder forgotten in `packages` works in an editable install and is missing from the wheel."""
    folders = {".".join(inside.parent.parts) for _, inside in modules()}
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders)


def test_each_part_is_mapped_to_its_folder():
    expected = {"lapkit": "lapkit"} | {f"lapkit.{part}": part for part in PARTS}
    assert SETUPTOOLS["package-dir"] == expected


@pytest.mark.parametrize("part", PARTS)
def test_link_in_lapkit_leads_to_the_part(part):
    link = ROOT / "lapkit" / part
    assert link.is_symlink()
    assert link.readlink() == Path("..") / part
    assert link.resolve() == ROOT / part
    assert (link / "__init__.py").is_file()


def test_types_are_announced():
    assert (ROOT / "lapkit" / "py.typed").is_file()
    assert "py.typed" in SETUPTOOLS["package-data"]["lapkit"]


def test_imports_from_an_unrelated_folder(tmp_path):
    names = ["lapkit", *(f"lapkit.{part}" for part in PARTS)]
    printed = run(sys.executable, "-c", f"import {', '.join(names)}; print({names[-1]}.__name__)", cwd=tmp_path)
    assert printed.strip() == names[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that neither `build/` nor an egg-info of the repository takes part."""
    copy, target = tmp_path_factory.mktemp("copy") / "lapkit", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "tests", "notebooks", "benchmarks"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=unwanted)
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        *isolation(),
        "--wheel-dir",
        target,
        copy,
        cwd=target,
    )
    (built,) = target.glob("*.whl")
    return built


def isolation():
    """Build with the setuptools that is here if it is new enough; otherwise pip fetches one."""
    try:
        release = int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if release >= 77 else []


@pytest.mark.slow
def test_wheel_holds_lapkit_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lapkit"}
    assert {name for name in names if name.endswith(".py")} == {inside.as_posix() for _, inside in modules()}
    assert "lapkit/py.typed" in names


@pytest.mark.slow
def test_quick_start_runs_from_the_wheel(wheel, tmp_path):
    """Away from the repository, with `-S`: no .pth file is read, so the editable install does not exist."""
    home = tmp_path / "home"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        home,
        wheel,
        cwd=tmp_path,
    )
    (tmp_path / "quick_start.py").write_text(QUICK_START)
    search = os.pathsep.join([str(home), *site.getsitepackages()])
    environment = os.environ | {"PYTHONPATH": search}
    run(sys.executable, "-S", tmp_path / "quick_start.py", home, cwd=tmp_path, env=environment)
