"""What every test starts from: float64, fixed seeds, a skip where a device or a peer library is missing."""

import importlib.util

import numpy as np
import pytest
import torch

PEERS = ("backpack", "curvlinops", "laplace")


@pytest.fixture(autouse=True)
def float64_and_fixed_seeds():
    """Comparisons to 1e-10 need float64. Fixtures of a wider scope run before this one and state a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (scikit-learn draws from the global state)
    yield
    torch.set_default_dtype(before)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for marker in item.iter_markers("peer"):
        _skip_without(marker.args or PEERS)


def _skip_without(peers):
    """Only an absent peer skips. One that is there but does not import is an error, which must be seen.

    So a test imports its peer inside a function or fixture: at the top of the file an absent one would stop
    the collection.
    """
    absent = [name for name in peers if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed: pip install --no-deps -r tests/peers.txt")
