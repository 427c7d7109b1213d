"""Every number of ViViT against dense algebra on autograd's Jacobians, over networks of all kinds."""

import pytest
import torch
from vivit_problems import NETWORKS, Problem, close

from lapkit.curvature import GGNProduct

# One network has an operation that is wrong under vmap, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:Some operation of this model cannot be differentiated in a batch")
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5], dtype=torch.float64)
SUBSETS = {"all": None, "two": 2, "every second": slice(None, None, 2), "some": [4, 1, 2]}
TRUST = 1e-6  # relative eigenvalues below which eigenvectors have too few digits for a comparison to eight


def problem_of(name):
    return Problem(name, WEIGHTS if name in {"mlp", "words"} else None)


def leading(spectrum):
    """How many eigenvectors have digits."""
    return int((spectrum.eigenvalues > TRUST * spectrum.eigenvalues[0]).sum())


@pytest.fixture(params=NETWORKS)
def problem(request):
    return problem_of(request.param)


@pytest.fixture(params=SUBSETS)
def subset(request):
    return SUBSETS[request.param]


def index_of(problem, subset):
    everything = torch.arange(problem.examples)
    return everything[:subset] if isinstance(subset, int) else everything if subset is None else everything[subset]


def check(spectrum, problem, index, places=slice(None)):
    """All that a spectrum says, for some examples and weights."""
    curvatures = problem.each_curvature[index][:, places][:, :, places]
    gradients, mean = problem.each_gradient[:, places], curvatures.mean(0)
    values = torch.linalg.eigvalsh(mean).flip(0)
    kept = len(spectrum.eigenvalues)
    close(spectrum.eigenvalues, values[:kept])
    assert (values[kept:].abs() < 1e-12 * values[0]).all()
    close(spectrum.gram_trace, mean.trace())
    assert spectrum.size == len(mean)
    k = leading(spectrum)
    vectors, known = spectrum.eigenvectors(k), spectrum.directions(k)
    close(vectors.T @ vectors, torch.eye(k))
    close(mean @ vectors, vectors * values[:k])
    close(known.gradients, gradients @ vectors)
    close(known.curvatures, torch.einsum("pk,npq,qk->nk", vectors, curvatures, vectors))
    close(known.gradient, vectors.T @ gradients.mean(0))
    close(known.curvatures.mean(0), known.eigenvalues)
    close(spectrum.gradient(), gradients.mean(0))
    return mean, gradients.mean(0)


def test_spectrum(problem, subset):
    """Eigenpairs, gradients and curvatures along them, of all weights and some examples."""
    analysis = problem.analysis(curvature_examples=subset)
    index = index_of(problem, subset)
    assert (analysis.count, analysis.curvature_count) == (problem.examples, len(index))
    check(analysis.spectrum, problem, index)


def test_steps_and_products(problem):
    """Newton step with its complement, Woodbury, pseudo-inverse, products: of a sub-sample, where the rest matters."""
    spectrum = problem.analysis(curvature_examples=[0, 3, 1], threshold=0.0).spectrum
    mean = problem.each_curvature[[0, 3, 1]].mean(0)
    g = problem.each_gradient.mean(0)
    inverse = torch.linalg.inv(mean + 0.1 * torch.eye(len(mean)))
    close(spectrum.newton_step(0.1, complement=0.1), -inverse @ g)
    vectors = torch.randn(len(mean), 2)
    close(spectrum.inverse_product(vectors, 0.1), inverse @ vectors)
    close(spectrum.matmul(vectors), mean @ vectors)
    close(spectrum @ vectors[:, 0], mean @ vectors[:, 0])


def test_parts_of_the_spectrum(problem):
    """Along some eigenvectors only."""
    spectrum = problem.analysis().spectrum
    k = leading(spectrum)
    which = list(range(0, k, 2))
    e, values = spectrum.eigenvectors(which), spectrum.eigenvalues[which]
    g, v = spectrum.gradient(), torch.randn(spectrum.size)
    close(spectrum.coordinates(v, which), e.T @ v)
    close(spectrum.pseudo_inverse_product(v, which), e @ ((e.T @ v) / values))
    close(spectrum.newton_step(0.2, which), -e @ ((e.T @ g) / (values + 0.2)))
    rest = g - e @ (e.T @ g)
    close(spectrum.newton_step(0.2, which, complement=0.5), -e @ ((e.T @ g) / (values + 0.2)) - rest / 0.5)


@pytest.mark.parametrize("groups", ["parameters", "modules"])
@pytest.mark.parametrize("subset", [None, [1, 3]])
@pytest.mark.parametrize("name", ["mlp", "convolutions", "tied", "ragged gcn"])
def test_blocks(name, groups, subset):
    """Each group is the block of the dense matrix."""
    problem = problem_of(name)
    analysis = problem.analysis(groups=groups, curvature_examples=subset)
    index = index_of(problem, subset)
    blocks, spectra = torch.zeros(problem.size, problem.size), []
    for label, spectrum in analysis.items():
        names = [n for n in problem.names if label == (n if groups == "parameters" else n.rpartition(".")[0])]
        assert list(spectrum.parameters.names) == names
        places = problem.places(names)
        mean, _ = check(spectrum, problem, index, places)
        blocks[places[:, None], places] = mean
        spectra.append(spectrum.eigenvalues)
    close(analysis.eigenvalues(), torch.cat(spectra).sort(descending=True).values)
    g, v = problem.each_gradient.mean(0), torch.randn(problem.size, 2)
    inverse = torch.linalg.inv(blocks + 0.3 * torch.eye(len(blocks)))
    close(analysis.newton_step(0.3, complement=0.3), -inverse @ g)
    close(analysis.inverse_product(v, 0.3), inverse @ v)
    close(analysis.inverse_product(v[:, 0], 0.3), inverse @ v[:, 0])


def test_groups_of_ones_own():
    """Groups that interleave in flat order; vectors come back in flat order."""
    problem = problem_of("mlp")
    groups = {"outer": ["4", "0.bias"], "inner": ["0.weight", "2"]}
    analysis = problem.analysis(groups=groups)
    assert list(analysis) == ["outer", "inner"]
    blocks = torch.zeros(problem.size, problem.size)
    for label, names in {"outer": ["4.weight", "4.bias", "0.bias"], "inner": ["0.weight", "2.weight"]}.items():
        places = problem.places(names)
        mean, _ = check(analysis[label], problem, torch.arange(problem.examples), places)
        blocks[places[:, None], places] = mean
    v = torch.randn(problem.size)
    close(analysis.inverse_product(v, 0.3), torch.linalg.solve(blocks + 0.3 * torch.eye(len(blocks)), v))
    inside = blocks @ v
    found = analysis.pseudo_inverse_product(inside)
    close(blocks @ found, inside, 1e-6)  # by eigenvalues down to the threshold
    assert list(problem.analysis(groups=[["4", "0"], ["2"]])) == ["4, 0", "2"]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "named"])  # distances differentiate once
def test_eigen_equation_of_the_product(name):
    """`G e_k = lambda_k e_k` with a product that shares no code with the Gram matrix."""
    problem = problem_of(name)
    spectrum = problem.analysis(gradients=False).spectrum
    k = leading(spectrum)
    vectors = spectrum.eigenvectors(k)
    product = GGNProduct(problem.model, problem.likelihood, [problem.batch])
    close(product @ vectors / problem.examples, vectors * spectrum.eigenvalues[:k])


@pytest.mark.parametrize("name", ["mlp", "convolutions", "words", "tied"])
@pytest.mark.parametrize("subset", [None, 2])
def test_small_budget(name, subset):
    """A few layers at a time, a few columns, a vector: the same numbers."""
    problem = problem_of(name)
    wide, narrow = (problem.analysis(memory_budget=b, curvature_examples=subset).spectrum for b in (None, 1))
    close(narrow.eigenvalues, wide.eigenvalues)
    k = leading(wide)
    close(narrow.directions(k).gradients.abs(), wide.directions(k).gradients.abs())
    close(narrow.newton_step(0.1, k), wide.newton_step(0.1, k))
    check(narrow, problem, index_of(problem, subset))


def test_vectors_by_parameter():
    problem = problem_of("convolutions")
    spectrum = problem.analysis().spectrum
    vectors = spectrum.eigenvectors(3)
    parts = spectrum.by_parameter(vectors)
    shapes = {name: (3, *p.shape) for name, p in problem.model.named_parameters()}
    assert {name: tuple(part.shape) for name, part in parts.items()} == shapes
    close(torch.cat([part.flatten(1) for part in parts.values()], dim=1).T, vectors)
    one = spectrum.by_parameter(vectors[:, 0])
    assert all(torch.equal(one[name], part[0]) for name, part in parts.items())


def test_selected_parameters():
    """The last layer alone."""
    problem = problem_of("mlp")
    analysis = problem.analysis(parameters=["4"])
    check(analysis.spectrum, problem, torch.arange(5), problem.places(["4.weight", "4.bias"]))
