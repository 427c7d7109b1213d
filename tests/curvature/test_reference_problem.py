"""The golden numbers of problem REF. They are those of the mean loss; lapkit sums over its six examples."""

from types import SimpleNamespace

import pytest
import reference_problem as ref
import torch

from lapkit.curvature import (
    GGN,
    Categorical,
    EmpiricalFisher,
    Engine,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Parameters,
    accumulate,
    borrowed,
)

STRUCTURES = {"full": GGNDense, "block_diagonal": GGNBlocks, "kron": GGNKronecker, "diag": GGNDiagonal}
WEIGHTS = ("0.weight", "2.weight", "4.weight")


def golden(values, rel=1e-9):
    """Ten printed digits; those after the decimal point, where a number is small."""
    return pytest.approx(values, rel=rel, abs=1e-10)


@pytest.fixture
def fit():
    """One pass for all structures: quantities and operators by the names of the golden numbers."""
    model = ref.model()
    parameters = Parameters.of(model)
    quantities = {name: kind(parameters) for name, kind in STRUCTURES.items()}
    data = [(ref.inputs(), ref.labels())]
    totals = accumulate(model, parameters, Categorical(), GGN(), data, list(quantities.values()))
    operators = {name: quantity.result().operator() for name, quantity in quantities.items()}
    return SimpleNamespace(
        model=model, parameters=parameters, totals=totals, kron=quantities["kron"], operators=operators
    )


def test_totals(fit):
    assert (fit.totals.count, fit.totals.outputs) == (ref.EXAMPLES, ref.CLASSES)
    assert float(fit.totals.loss) / ref.EXAMPLES == golden(ref.MEAN_LOSS, rel=1e-11)
    assert fit.parameters.numel == ref.PARAMETERS
    assert float(fit.parameters.vector().square().sum()) == golden(ref.SQUARED_NORM_OF_PARAMETERS)


@pytest.mark.parametrize("structure", ["full", "block_diagonal", "diag"])
def test_traces(fit, structure):
    diagonal = fit.operators[structure].diagonal() / ref.EXAMPLES
    assert float(diagonal.sum()) == golden(ref.GGN_MEAN_TRACE, rel=1e-11)
    assert [float(part.sum()) for part in diagonal.split(fit.parameters.sizes)] == golden(list(ref.GGN_MEAN_TRACES))


def test_rank_and_spectrum(fit):
    eigenvalues = torch.linalg.eigvalsh(fit.operators["full"].to_dense() / ref.EXAMPLES).flip(0)
    assert eigenvalues[:5].tolist() == golden(list(ref.GGN_MEAN_TOP_EIGENVALUES))
    assert int((eigenvalues > 1e-12 * eigenvalues[0]).sum()) == ref.GGN_RANK


def test_kronecker_factors(fit):
    factors = [fit.kron.result().factors(name) for name in WEIGHTS]
    traces = [[float(factor[0].trace()) for factor in pair] for pair in factors]
    assert [a for _, a in traces] == golden(list(ref.KFLR_MEAN_TRACES_A))
    assert [b / ref.EXAMPLES for b, _ in traces] == golden(list(ref.KFLR_MEAN_TRACES_B))


def test_kronecker_errors(fit):
    exact, kron = (fit.operators[name].blocks for name in ("block_diagonal", "kron"))
    errors = [
        float((k.to_dense() - b.to_dense()).norm() / b.to_dense().norm()) for b, k in zip(exact, kron, strict=True)
    ]
    assert errors[::2] == golden(list(ref.KFLR_RELATIVE_ERRORS))
    assert errors[1::2] == pytest.approx([0, 0, 0], abs=1e-12)  # bias blocks are exact


@pytest.mark.parametrize("structure", STRUCTURES)
def test_log_determinants(fit, structure):
    operator = fit.operators[structure]
    expected = golden(ref.LOG_DET_PRECISION[structure], rel=1e-11)
    assert float(operator.shift(1.0).logdet()) == expected
    assert float(operator.shifted_logdet(1.0)) == expected
    assert float(operator.shift(torch.ones(ref.PARAMETERS)).logdet()) == expected


@pytest.mark.parametrize("structure", STRUCTURES)
def test_predictive_variances(fit, structure):
    """Nine digits are printed."""
    with borrowed(fit.model, fit.parameters):
        _, jacobian = Engine(fit.model, fit.parameters).jacobian(ref.inputs())
    covariance = fit.operators[structure].shift(1.0).inverse_quadratic(jacobian)[0]
    assert covariance.diagonal().tolist() == pytest.approx(list(ref.PREDICTIVE_VARIANCE[structure]), rel=2e-9)


def test_gradients_of_examples():
    model = ref.model()
    parameters = Parameters.of(model)
    norms = []
    for x, y in zip(ref.inputs(), ref.labels(), strict=True):
        fisher = GGNDiagonal(parameters)
        accumulate(model, parameters, Categorical(), EmpiricalFisher(), [(x[None], y[None])], [fisher])
        norms.append(float(fisher.result().operator().trace().sqrt()))
    assert norms == golden(list(ref.EXAMPLE_GRADIENT_NORMS))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batches_and_their_order_do_not_matter(fit, structure):
    model = ref.model()
    parameters = Parameters.of(model)
    quantity = STRUCTURES[structure](parameters)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    data = [(ref.inputs()[part], ref.labels()[part]) for part in order.split([1, 3, 2])]
    accumulate(model, parameters, Categorical(), GGN(), data, [quantity])
    torch.testing.assert_close(
        quantity.result().operator().to_dense(), fit.operators[structure].to_dense(), rtol=1e-11, atol=1e-13
    )
