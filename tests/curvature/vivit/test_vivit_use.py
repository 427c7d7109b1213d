"""How damping is given, other curvature and types; models come back as they were, and changed ones are refused."""

import copy

import pytest
import torch
from torch import nn
from vivit_problems import Problem, close, perceptron

from lapkit.curvature import (
    Categorical,
    EmpiricalFisher,
    Gaussian,
    GGNProduct,
    GradientGram,
    MonteCarloGGN,
    NoiseAwareDamping,
    compute,
    eigenspace_overlap,
    largest_eigenpairs,
    magnitude_error,
    vivit,
)
from lapkit.curvature.columns.sampling import Draws, example_keys

# -- damping


def test_damping_of_each_direction(problem, spectrum):
    deltas = torch.tensor([0.1, 2.0, 0.3])
    e, known = spectrum.eigenvectors(3), spectrum.directions(3)
    expected = -e @ (known.gradient / (known.eigenvalues + deltas))
    close(spectrum.newton_step(deltas, 3), expected)
    close(spectrum.newton_step(lambda directions: deltas[: len(directions)], 3), expected)
    seen = []
    spectrum.newton_step(lambda directions: seen.append(directions) or directions.eigenvalues, [1, 0])
    close(seen[0].eigenvalues, spectrum.eigenvalues[[1, 0]])
    blocks = problem.analysis(groups="modules")
    joined = torch.cat([blocks[label].newton_step(0.3, 2) for label in blocks])
    close(blocks.newton_step(0.3, 2), joined)


def test_noise_aware_damping(spectrum):
    """A step of constant damping, each component times the fraction of signal in its gradient."""
    known, e = spectrum.directions(4), spectrum.eigenvectors(4)
    noise = known.gradients.var(0) / len(known.gradients)
    signal = known.gradient.square() / (known.gradient.square() + noise)
    close(e.T @ spectrum.newton_step(NoiseAwareDamping(0.2), 4), -signal * known.gradient / (known.eigenvalues + 0.2))


def test_noise_aware_damping_is_the_best_shrinkage():
    """The multiple of a noisy mean that is nearest to the truth, by simulation, where mean and variance are known."""
    mean, deviation, n = 0.7, 2.0, 8
    means = mean + deviation / n**0.5 * torch.randn(200_000)
    factors = torch.linspace(0, 1, 101)
    errors = (factors[:, None] * means - mean).square().mean(1)
    expected = mean**2 / (mean**2 + deviation**2 / n)
    assert float(factors[errors.argmin()]) == pytest.approx(expected, abs=0.02)


def test_noise_aware_damping_without_noise_or_signal():
    """Equal gradients leave the constant; a mean of zero takes the direction out."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.ones(4, 1)
    same = vivit(model, Gaussian(), (x, -x)).spectrum
    close(same.newton_step(NoiseAwareDamping(1.0)), same.newton_step(1.0))
    opposite = vivit(model, Gaussian(), (x, torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]))).spectrum
    assert opposite.newton_step(NoiseAwareDamping(1.0)).tolist() == [0.0]


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), torch.tensor([0.1, 0.0, 0.1]), lambda d: -d.eigenvalues])
def test_damping_must_be_positive(spectrum, damping):
    with pytest.raises(ValueError, match="positive"):
        spectrum.newton_step(damping, 3)


def test_damping_of_another_shape(spectrum):
    with pytest.raises(ValueError, match="3 for as many directions"):
        spectrum.newton_step(torch.ones(2), 3)
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="positive"):
            spectrum.inverse_product(torch.ones(spectrum.size), damping)
        with pytest.raises(ValueError, match="positive"):
            spectrum.newton_step(0.1, complement=damping)
        with pytest.raises(ValueError, match="positive"):
            NoiseAwareDamping(damping)


# -- other curvature


def test_empirical_fisher(problem):
    """Its Gram matrix is that of the gradients."""
    spectrum = problem.analysis(columns=EmpiricalFisher()).spectrum
    data = [(problem.x, problem.y)]
    gram = compute(problem.model, problem.likelihood, data, {"g": GradientGram})["g"].matrix() / problem.examples
    close(spectrum.eigenvalues, torch.linalg.eigvalsh(gram).flip(0)[: spectrum.rank])


def test_a_spectrum_is_a_matrix(problem, spectrum):
    """For solvers: its own eigenpairs by Lanczos."""
    found = largest_eigenpairs(spectrum, 2)
    close(found.values, spectrum.eigenvalues[:2])
    assert spectrum.overlap(found.vectors, 2) == pytest.approx(1)
    other = problem.analysis(curvature_examples=2).spectrum
    e = other.eigenvectors(3)
    quotients = (e * spectrum.matmul(e)).sum(0)
    expected = float(((other.eigenvalues[:3] - quotients).abs() / quotients).mean())
    assert magnitude_error(other, spectrum, 3) == pytest.approx(expected)
    product = GGNProduct(problem.model, problem.likelihood, [(problem.x, problem.y)])
    assert magnitude_error(other, product, 3, count=5) == pytest.approx(expected)


def test_threshold(problem, spectrum):
    kept = problem.analysis(threshold=1e-2).spectrum
    assert torch.equal(kept.eigenvalues, spectrum.eigenvalues[spectrum.eigenvalues >= 1e-2])
    assert 0 < kept.rank < spectrum.rank
    close(kept.gram_trace, spectrum.gram_trace)
    nothing = problem.analysis(threshold=1e6)
    assert nothing.spectrum.rank == 0
    assert nothing.spectrum.eigenvectors().shape == (spectrum.size, 0)
    g = spectrum.gradient()
    close(nothing.newton_step(1.0, complement=0.5), -g / 0.5)
    close(nothing.inverse_product(g, 0.5), g / 0.5)


def test_single_precision():
    """Values and vectors are as good as the type allows."""
    problem = Problem("convolutions")
    exact = problem.analysis().spectrum
    model = copy.deepcopy(problem.model).float()
    single = vivit(model, problem.likelihood, (problem.x.float(), problem.y)).spectrum
    assert single.dtype == single.eigenvectors(2).dtype == torch.float32
    close(single.eigenvalues[:5].double(), exact.eigenvalues[:5], 1e-5)
    assert eigenspace_overlap(single.eigenvectors(3).double(), exact.eigenvectors(3)) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("chosen", [None, [4, 0, 2]])
@pytest.mark.parametrize("gradients", [True, False])
def test_more_columns_than_twice_the_weights(problem, chosen, gradients):
    """V is written out then; a group with more weights beside one with few."""
    columns = MonteCarloGGN(60, seed=1)
    options = {"columns": columns, "curvature_examples": chosen, "gradients": gradients}
    found = problem.analysis(**options, groups={"most": ["0", "2"], "last": ["4"]})
    part = slice(None) if chosen is None else chosen
    draws = Draws(0, example_keys((problem.x, problem.y), 5)[part])
    s = columns(problem.likelihood, problem.f[part], problem.y[part], draws)[:]
    v = torch.einsum("knc,ncp->knp", s, problem.jacobian[part]).flatten(0, 1) / s.shape[1] ** 0.5
    for names, spectrum in zip((("0.", "2."), ("4.",)), found.values(), strict=True):
        places = problem.places([n for n in problem.names if n.startswith(names)])
        own = v[:, places]
        values, vectors = torch.linalg.eigh(own.T @ own)
        close(spectrum.eigenvalues, values.flip(0)[: spectrum.rank])
        e = spectrum.eigenvectors(3)
        close((e.T @ vectors.flip(1)[:, :3]).abs(), torch.eye(3))
        each = own.unflatten(0, (60, -1)) @ e
        close(spectrum.directions(3).curvatures, each.square().sum(0) * s.shape[1])
        if gradients:
            close(spectrum.directions(3).gradients, problem.each_gradient[:, places] @ e)
            close(spectrum.gradient(), problem.each_gradient[:, places].mean(0))
        vector = torch.randn(len(places))
        close(
            spectrum.inverse_product(vector, 0.1),
            torch.linalg.solve(own.T @ own + 0.1 * torch.eye(len(places)), vector),
        )
    single = vivit(copy.deepcopy(problem.model).float(), problem.likelihood, (problem.x.float(), problem.y), **options)
    e = single.spectrum.eigenvectors().double()
    close(e.T @ e, torch.eye(single.spectrum.rank), 1e-2)


def test_single_precision_resolves_what_its_gram_matrix_does():
    """Eigenvalues over seven orders of magnitude, of which the smallest are lost; what is lost is said."""
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4))
    x, y = torch.randn(30, 6) * torch.logspace(0, -4, 6), torch.arange(30) % 4
    exact = vivit(model, Categorical(), (x, y)).spectrum
    single = vivit(copy.deepcopy(model).float(), Categorical(), (x.float(), y)).spectrum
    eps, largest = torch.finfo(torch.float32).eps, float(exact.eigenvalues[0])
    assert exact.rank == 3 * 30
    assert single.rank == int((exact.eigenvalues >= 4 * eps * largest).sum()) < exact.rank
    torch.testing.assert_close(single.eigenvalues.double(), exact.eigenvalues[: single.rank], rtol=0.02, atol=0)
    e = single.eigenvectors().double()
    torch.testing.assert_close(e.T @ e, torch.eye(single.rank), rtol=0, atol=1e-2)
    assert (exact.left_out, single.left_out) == (0, 90 - single.rank)
    share = float(exact.eigenvalues[single.rank :].sum() / exact.gram_trace)
    assert single.trace_left_out == pytest.approx(share, abs=4 * eps)
    cut = vivit(model, Categorical(), (x, y), threshold=0.01 * largest).spectrum
    assert cut.trace_left_out == pytest.approx(1 - float(cut.eigenvalues.sum() / cut.gram_trace))
    assert f"; {cut.left_out} with {cut.trace_left_out:.2g} of the trace left out)" in repr(cut)
    damping, step = 1e-5 * largest, exact.newton_step(1e-5 * largest)
    errors = [(single.newton_step(damping, complement=c).double() - step).norm() for c in (None, damping)]
    assert errors[1] < 0.05 * errors[0]


def test_damping_has_the_precision_of_the_model(spectrum):
    """Also where torch's default is single."""
    expected = spectrum.newton_step(torch.tensor(0.1))
    torch.set_default_dtype(torch.float32)
    try:
        for damping in (0.1, lambda directions: 0.1, [0.1] * spectrum.rank):
            close(spectrum.newton_step(damping), expected, 1e-14)
    finally:
        torch.set_default_dtype(torch.float64)


def test_half_precision():
    """Sums, values and vectors are kept in single precision."""
    problem = Problem("mlp")
    exact = problem.analysis().spectrum
    model = copy.deepcopy(problem.model).to(torch.bfloat16)
    half = vivit(model, problem.likelihood, (problem.x.to(torch.bfloat16), problem.y)).spectrum
    assert half.dtype == half.eigenvectors(2).dtype == half.newton_step(0.1).dtype == torch.float32
    close(half.eigenvalues[:2].double(), exact.eigenvalues[:2], 0.1)


def test_one_example(problem):
    analysis = Problem("mlp", examples=1).analysis()
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        analysis.spectrum.directions().gradient_snr()
    with pytest.raises(ValueError, match="at least two examples, got 1"):
        analysis.newton_step(NoiseAwareDamping(0.1))
    one = problem.analysis(curvature_examples=1).spectrum.directions()
    assert one.gradient_snr().shape == (2,)
    with pytest.raises(ValueError, match="at least two"):
        one.curvature_snr()


def test_without_gradients(problem, spectrum):
    for subset in (None, 2):
        found = problem.analysis(gradients=False, curvature_examples=subset)
        known = found.spectrum.directions()
        close(known.eigenvalues, problem.analysis(curvature_examples=subset).spectrum.eigenvalues)
        for refused in (
            known.gradient_snr,
            lambda known=known: known.gradient,
            found.spectrum.gradient,
            lambda found=found: found.newton_step(0.1),
        ):
            with pytest.raises(ValueError, match="gradients=True"):
                refused()


@pytest.mark.parametrize(("gradients", "expected"), [(False, {4}), (True, {4, 32})])
def test_without_gradients_no_graph_of_the_other_examples_is_made(gradients, expected):
    """The lengths of what autograd saves, of a network whose widths are no such number."""
    model = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 5))
    batch, lengths = (torch.randn(32, 3), torch.arange(32) % 5), set()

    def note(saved):
        lengths.add(len(saved) if saved.ndim else 1)
        return saved

    vivit(model, Categorical(), batch)  # what an engine verifies, it does in passes of its own
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        vivit(model, Categorical(), batch, curvature_examples=4, gradients=gradients)
    assert {n for n in lengths if n > 8 or n == 4} == expected


# -- the model


@pytest.mark.parametrize("subset", [None, 2])
def test_the_model_comes_back(problem, subset, unchanged):
    problem.model.train()
    problem.model[2].weight.requires_grad_(False)
    with unchanged(problem.model):
        analysis = problem.analysis(curvature_examples=subset)
        analysis.spectrum.eigenvectors(2)
        analysis.newton_step(0.1, complement=0.1)
        analysis.spectrum.matmul(analysis.spectrum.gradient())
        with pytest.raises(ValueError, match="positive"):
            analysis.newton_step(-0.1)
    assert "2.weight" not in analysis.parameters.names


def flip(problem):
    """Weights of which half of the signs have changed, and no output."""
    with torch.no_grad():
        for p in (problem.model[0].weight, problem.model[0].bias, problem.model[2].weight):
            p.neg_()


CHANGES = {
    "a symmetry": flip,
    "a step": lambda problem: nn.init.normal_(problem.model[0].weight),
    "behind autograd's back": lambda problem: problem.model[0].weight.data.mul_(1.5),
    "other inputs": lambda problem: problem.x.mul_(1.5),
    "other activation": lambda problem: problem.model.__setitem__(1, nn.ReLU()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("subset", [None, 2])
def test_a_changed_model_is_refused(problem, change, subset):
    """Plain numbers stay; what the model would be needed for is refused."""
    spectrum = problem.analysis(curvature_examples=subset).spectrum
    before = spectrum.eigenvectors(2)
    CHANGES[change](problem)
    spectrum.directions().gradient_snr()
    with pytest.raises(RuntimeError, match="since the analysis was made"):
        spectrum.gradient()
    if change == "other inputs" and subset is not None:  # those of the sub-sample are a copy
        assert torch.equal(spectrum.eigenvectors(2), before)
        return
    for refused in (
        spectrum.eigenvectors,
        lambda: spectrum.newton_step(0.1),
        lambda: spectrum.matmul(torch.ones(spectrum.size)),
        lambda: spectrum.inverse_product(torch.ones(spectrum.size), 0.1),
    ):
        with pytest.raises(RuntimeError, match="since the analysis was made"):
            refused()


def test_no_graph_and_no_jacobian_is_kept(problem):
    """What an analysis holds has the size of outputs and of the Gram matrix."""
    analysis = problem.analysis()
    factors, found = analysis.factors, analysis.spectrum.block.decomposition
    assert not factors.batch.f.requires_grad
    assert not factors.columns.requires_grad
    sizes = {factors.columns.numel(), found.coefficients.numel(), found.curvatures.numel()}
    assert max(sizes) <= (2 * problem.examples) ** 2
    assert all(not t.requires_grad for t in (found.eigenvalues, found.coefficients, found.gradients))


def test_too_many_columns_are_refused(problem, monkeypatch):
    monkeypatch.setattr("lapkit.curvature.spectra.factors.default_budget", lambda device: 500)
    problem.analysis(columns=MonteCarloGGN(1), curvature_examples=4)
    with pytest.raises(ValueError, match=r"2 columns and 5 examples, for 3 groups.*MonteCarloGGN"):
        problem.analysis(groups="modules")


def test_under_inference_mode(problem, spectrum):
    with torch.inference_mode():
        found = problem.analysis().spectrum
        vectors = found.eigenvectors(2)
    close(found.eigenvalues, spectrum.eigenvalues)
    close(found.matmul(vectors), vectors * found.eigenvalues[:2])


def test_random_columns_follow_the_generator(problem):
    columns = MonteCarloGGN(1)
    one, two, other = (
        problem.analysis(columns=columns, generator=torch.Generator().manual_seed(s)).eigenvalues() for s in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert one.shape != other.shape or not torch.allclose(one, other)


def test_forward_function_and_output_axis():
    """Images of classes, by a function that is called instead of the model."""
    torch.manual_seed(0)
    model, x = nn.Conv2d(1, 3, 2), torch.randn(2, 1, 3, 3)
    y = torch.randint(3, (2, 2, 2))
    plain = vivit(model, Categorical(), (x, y)).spectrum
    moved = vivit(
        model,
        Categorical(),
        (x, y),
        forward_fn=lambda m, x: m(x).movedim(1, -1),
        output_axis=-1,
        curvature_examples=[1, 0],
    ).spectrum
    close(moved.eigenvalues, plain.eigenvalues)
    close(moved.matmul(plain.gradient()), plain.matmul(plain.gradient()))
    short = vivit(perceptron(), Categorical(), (torch.randn(3, 3), torch.tensor([0, 1, 2])))
    assert "Spectrum('all'" in repr(short)
