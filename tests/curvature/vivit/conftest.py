"""A small problem and its spectrum."""

import pytest
from vivit_problems import Problem


@pytest.fixture
def problem():
    return Problem("mlp")


@pytest.fixture
def spectrum(problem):
    return problem.analysis().spectrum
