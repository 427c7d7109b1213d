"""The engine on real architectures, against brute-force autograd: Jacobian, GGN, gradients, Kronecker factors."""

import pytest
import torch
from networks import brute_force

from lapkit.curvature import (
    GGN,
    Categorical,
    Engine,
    GGNBlocks,
    GGNDense,
    GGNDiagonal,
    GGNKronecker,
    Gradients,
    accumulate,
    borrowed,
)

MOVED = [
    "swin",
    "lstm outputs",
    "packed lstm",
    "gin",
    "ragged gcn",
    "gpt-2 classifier sdpa",
    "qwen moe grouped",
]


def test_jacobian(problem):
    """Every weight does something, or the comparison would show nothing; one example is a case of its own."""
    case, model = problem.case, problem.model
    with borrowed(model, problem.parameters):
        engine = Engine(model, problem.parameters)
        f, jacobian = engine.jacobian(problem.x)
        problem.close(f, problem.outputs)
        problem.close(jacobian.to_dense().transpose(0, 1), problem.jacobian.reshape(len(f), -1, jacobian.shape[2]))
        for examples in (1, 2):
            x = case.inputs(examples)
            f, expected = brute_force.jacobian(model, x, examples, case.outputs, case.cut)
            expected = expected.reshape(examples, -1, expected.shape[-1])
            problem.close(engine.jacobian(x)[1].to_dense().transpose(0, 1), expected)
    moved = [j.abs().max() > 0 for j in problem.jacobian.split(problem.parameters.sizes, dim=-1)]
    assert all(moved), [n for n, m in zip(problem.parameters.names, moved, strict=True) if not m]


def test_curvature_and_gradients(problem):
    model, parameters, x, y = problem.model, problem.parameters, problem.x, problem.labels
    dense, diagonal, blocks = GGNDense(parameters), GGNDiagonal(parameters), GGNBlocks(parameters)
    gradients = Gradients(parameters)
    batches = [(problem.case.cut(x, part), y[part]) for part in (slice(0, 2), slice(2, 3))]
    accumulate(model, parameters, Categorical(), GGN(), batches, [dense, diagonal, blocks, gradients])
    problem.close(dense.result().operator().to_dense(), problem.ggn)
    problem.close(diagonal.result().operator().diagonal(), problem.ggn.diagonal())
    expected = torch.zeros_like(problem.ggn)
    start = 0
    for size in parameters.sizes:
        part = slice(start, start + size)
        expected[part, part] = problem.ggn[part, part]
        start += size
    problem.close(blocks.result().operator().to_dense(), expected)
    problem.close(gradients.result().matrix(), problem.gradients)


# One example takes other operations through these than two do, so that a parameter shared by all examples alike is not
# found where it is shared. The sum of two forms is refused.
ANOTHER_PATH_ALONE = {"t5"}


def test_kronecker_factors_do_not_depend_on_how_the_data_is_cut(problem, request):
    """A batch of one example, a batch of two, and all at once: a layer must be given the same form each time."""
    batches = [(problem.case.cut(problem.x, part), problem.labels[part]) for part in (slice(0, 1), slice(1, 3))]
    if request.node.callspec.params["problem"] in ANOTHER_PATH_ALONE:
        with pytest.raises(ValueError, match="used in another way in this batch than before"):
            accumulate(
                *(problem.model, problem.parameters, Categorical(), GGN(), batches),
                [GGNKronecker(problem.parameters)],
            )
        return
    found = []
    for data in ([(problem.x, problem.labels)], batches):
        quantity = GGNKronecker(problem.parameters)
        accumulate(problem.model, problem.parameters, Categorical(), GGN(), data, [quantity])
        found.append(quantity.result())
    assert found[0].tensors.keys() == found[1].tensors.keys()
    for kind in {key.partition("/")[0] for key in found[0].tensors}:
        one, two = (torch.cat([t.double().reshape(-1) for t in result.part(kind).values()]) for result in found)
        problem.close(two, one)


@pytest.mark.parametrize("problem", MOVED, indirect=True)
def test_more_examples_than_the_probe_has_factors(problem):
    """Eleven, of networks that move examples about; they are told apart by eight factors, digit by digit."""
    x = problem.case.inputs(11)
    _, expected = brute_force.jacobian(problem.model, x, 11, problem.case.outputs, problem.case.cut)
    with borrowed(problem.model, problem.parameters):
        found = Engine(problem.model, problem.parameters).jacobian(x)[1].to_dense().transpose(0, 1)
    problem.close(found, expected.reshape(found.shape))


def test_which_weights_have_closed_forms(problem):
    """The catalogue knows exactly which parameters go the generic way: no more, which would be slow, and no fewer."""
    with borrowed(problem.model, problem.parameters):
        rules = Engine(problem.model, problem.parameters)(problem.x).rules
    generic = {use.parameter for use, rule in rules.items() if rule is None}
    assert generic == {name for name in problem.parameters.names if problem.case.is_generic(name)}
