"""Factored columns of the GGN, for networks whose parameters meet the data in every way, against the dense matrix."""

import pytest
import torch
from networks.registry import Model
from networks.routed import select_and_add, stacked
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import (
    GGN,
    BlockDiagonal,
    Categorical,
    Dense,
    DenseJacobian,
    Diagonal,
    EmbeddingJacobian,
    Factored,
    FactoredGGN,
    FactoredSum,
    GGNDense,
    LowRank,
    LowRankGGN,
    LowRankSum,
    MonteCarloGGN,
    NetworkJacobian,
    OuterProduct,
    Parameters,
    SumJacobian,
    accumulate,
)
from lapkit.curvature.jacobians.conversion import beside, converted, floating_type, tensors


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, x):
        return F.linear(self.table(x).mean(1).tanh(), self.table.weight)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return self.one(x) * self.two(x)


def grouped_convolutions():
    return nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


def experts():
    up, down = nn.Parameter(torch.randn(4, 3, 4)), nn.Parameter(torch.randn(4, 3, 3))
    return Model(stacked, gate=nn.Linear(4, 4), up=up, down=down, head=nn.Linear(3, 3))


# name: the network, six of its inputs, its classes
NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), lambda: torch.randn(6, 4), 3),
    "convolutions": (grouped_convolutions, lambda: torch.randn(6, 2, 3, 3), 3),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Tanh(), nn.Linear(6, 3)),
        lambda: torch.randint(7, (6, 3)),
        3,
    ),
    "tied": (Tied, lambda: torch.randint(5, (6, 3)), 5),
    "recurrent": (Recurrent, lambda: torch.randn(6, 4, 2), 3),
    "experts": (experts, lambda: torch.randn(6, 4), 3),
}


def data_of(x, classes, *sizes):
    y = torch.arange(len(x)) % classes
    return list(zip(x.split(list(sizes)), y.split(list(sizes)), strict=True))


def run(model, data, *quantities, likelihood=None, **options):
    parameters = Parameters.of(model)
    made = [quantity(parameters) for quantity in quantities]
    accumulate(model, parameters, likelihood or Categorical(), GGN(), data, made, **options)
    return [quantity.result() for quantity in made]


def close(actual, expected, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def shifts(operator):
    """A number, one for each parameter, one for each weight."""
    sizes = operator.groups
    return torch.tensor(0.4), torch.linspace(0.3, 2.0, len(sizes)), torch.rand(operator.size) + 0.2


@pytest.fixture(params=NETS)
def case(request):
    build, inputs, classes = NETS[request.param]
    model = build()
    data = data_of(inputs(), classes, 4, 2)
    exact, factored = run(model, data, GGNDense, FactoredGGN)
    return model, data, exact.operator().to_dense(), factored.operator()


# -- against the dense matrix


def test_it_is_the_ggn(case):
    _, _, matrix, operator = case
    assert isinstance(operator, Factored)
    close(operator.to_dense(), matrix)
    close(operator.diagonal(), matrix.diagonal())
    close(operator.expanded().to_dense(), matrix)
    close(operator.eigenvalues.sum(), matrix.trace())


def test_inverses(case):
    _, _, matrix, operator = case
    jacobian = DenseJacobian(torch.randn(2, 3, len(matrix)))
    rows = jacobian.values.transpose(0, 1)
    for delta in shifts(operator):
        shifted = operator.shift(delta, operator.groups)
        full = matrix + torch.diag(expanded(delta, operator.groups))
        inverse = torch.linalg.inv(full)
        close(shifted.to_dense(), full)
        close(shifted.inverse_diagonal(), inverse.diagonal())
        close(shifted.logdet(), torch.linalg.slogdet(full).logabsdet)
        flat = parts_of(jacobian.values, operator.groups)
        close(shifted.inverse_quadratic(flat), rows @ inverse @ rows.mT)
        joint = torch.einsum("knp,pq,lmq->knlm", jacobian.values, inverse, jacobian.values)
        close(shifted.inverse_gram(flat), joint)


def expanded(delta, sizes):
    if len(delta.shape) == 0:
        return delta.expand(sum(sizes))
    return delta.repeat_interleave(torch.tensor(sizes)) if len(delta) == len(sizes) else delta


def parts_of(values, sizes):
    return NetworkJacobian(tuple(DenseJacobian(part) for part in values.split(sizes, dim=2)))


def test_determinants_and_their_gradients(case):
    _, _, matrix, operator = case
    for delta in shifts(operator):
        leaf = delta.clone().requires_grad_()
        other = delta.clone().requires_grad_()
        diagonal = expanded(other, operator.groups)
        exact = torch.linalg.slogdet(matrix + torch.diag(diagonal)).logabsdet - diagonal.log().sum()
        found = operator.logdet_ratio(leaf, operator.groups)
        close(found, exact)
        one, two = (
            torch.autograd.grad(value, at, create_graph=True)[0] for value, at in ((found, leaf), (exact, other))
        )
        close(one, two, rtol=1e-8)
        direction = torch.linspace(1, 2, max(1, leaf.numel())).reshape(leaf.shape)
        second = (torch.autograd.grad((g * direction).sum(), at)[0] for g, at in ((one, leaf), (two, other)))
        close(*second, rtol=1e-8)


def test_scale_and_a_second_shift(case):
    _, _, matrix, operator = case
    sizes = operator.groups
    number, layers, weights = shifts(operator)
    twice = operator.shift(layers, sizes).scale(3.0).shift(weights).shift(number)
    full = 3 * matrix + torch.diag(3 * expanded(layers, sizes) + weights + number)
    close(twice.to_dense(), full)
    close(twice.logdet(), torch.linalg.slogdet(full).logabsdet)
    assert twice.memo is operator.memo  # the inner products are computed once


def test_results_of_parts_add_up(case):
    model, data, matrix, _ = case
    parts = [run(model, [batch], FactoredGGN)[0] for batch in data]
    close((parts[0] + parts[1]).operator().to_dense(), matrix)
    both = parts[0].operator() + parts[1].operator()
    close(both.to_dense(), matrix)
    with pytest.raises(ValueError, match="add first, and then scale"):
        both + both.scale(2.0)
    with pytest.raises(TypeError, match="structure of neither"):
        both + Diagonal(torch.ones(both.size))


def test_types(case):
    _, _, matrix, operator = case
    single, double = operator.to(torch.float32), operator.to(torch.float32).to(torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    close(double.to_dense(), matrix)
    assert single.shift(1.0).logdet().dtype == torch.float32


# -- the quantities


@pytest.mark.parametrize("quantity", [FactoredGGN, LowRankGGN])
def test_positions_weights_of_examples_and_random_columns(quantity):
    model, x = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Conv2d(2, 3, 1)), torch.randn(5, 1, 3, 3)
    y, weights = torch.randint(3, (5, 2, 2)), torch.rand(5)
    data = [(x[:3], y[:3], weights[:3]), (x[3:], y[3:], weights[3:])]
    exact, found = run(model, data, GGNDense, quantity, output_axis=1)
    close(found.operator().to_dense(), exact.operator().to_dense())
    parameters = Parameters.of(model)
    columns = MonteCarloGGN(2, seed=4)
    pair = [make(parameters, columns=columns) for make in (GGNDense, quantity)]
    accumulate(model, parameters, Categorical(), GGN(), data, pair, output_axis=1)
    close(pair[1].result().operator().to_dense(), pair[0].result().operator().to_dense())


def test_columns_that_went_one_by_one_are_put_side_by_side():
    model, data = grouped_convolutions(), data_of(torch.randn(6, 2, 3, 3), 3, 4, 2)
    for parameters_first in (False, True):
        (result,) = run(model, data, FactoredGGN, memory_budget=2000 if parameters_first else None)
        assert [batch[0].shape[:2] for batch in result.batches] == [(2, 4), (2, 2)]


def test_columns_without_a_common_form_stay_apart():
    model, g = nn.Linear(3, 2, bias=False), torch.randn(3, 4, 1, 1, 2)
    whole = OuterProduct(torch.randn(4, 1, 1, 3), g)
    quantity = FactoredGGN(Parameters.of(model))
    quantity.begin_batch(4, None)
    quantity.update("weight", OuterProduct(whole.a, g[:2]), first=True)
    quantity.end_columns()
    quantity.update("weight", DenseJacobian(whole.to_dense()[2:]), first=False)
    quantity.end_columns()
    quantity.end_batch()
    rows = whole.to_dense().flatten(0, 1)
    close(quantity.result().operator().to_dense(), rows.T @ rows)


def test_memory_is_counted_once_for_what_is_shared():
    """Four examples, three inputs, two columns of three outputs; what went in serves two weights."""
    model, data = TwoHeads(), data_of(torch.randn(4, 3), 3, 4)
    quantity = FactoredGGN(Parameters.of(model))
    accumulate(model, quantity.parameters, Categorical(), GGN(), data, [quantity])
    assert quantity.nbytes == 8 * 4 * (3 + 2 * 2 * 3)
    assert quantity.result().operator().nbytes == quantity.nbytes


def test_too_much_is_refused():
    model, data = nn.Linear(3, 3, bias=False), data_of(torch.randn(8, 3), 3, 4, 4)
    quantity = FactoredGGN(Parameters.of(model), memory_limit=8 * 4 * 9 + 1)
    with pytest.raises(ValueError, match=r"after 8 examples, beyond the limit of .* larger memory_limit"):
        accumulate(model, quantity.parameters, Categorical(), GGN(), data, [quantity])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        FactoredGGN(Parameters.of(model), memory_limit=0)


def test_it_is_written_to_files_as_it_is(tmp_path):
    (result,) = run(nn.Linear(3, 3), data_of(torch.randn(4, 3), 3, 4), FactoredGGN)
    result.save(tmp_path / "result")
    found = FactoredSum.load(tmp_path / "result")
    assert torch.equal(found.operator().to_dense(), result.operator().to_dense())
    assert torch.equal((found + result).operator().to_dense(), (result + result).operator().to_dense())
    assert (found.count, found.about, found.operator().nbytes) == (4, result.about, result.operator().nbytes)
    moved = result.to("cpu", torch.float32)
    assert isinstance(moved, FactoredSum)
    assert moved.operator().dtype == torch.float32
    other = run(nn.Linear(3, 3), data_of(torch.randn(4, 3), 3, 4), lambda p: FactoredGGN(p, per_parameter=True))[0]
    with pytest.raises(ValueError, match="other settings do not add up"):
        result + other


def test_a_result_does_not_share_memory_with_the_model_or_the_data():
    model, data = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), data_of(torch.randn(4, 3), 3, 4)
    exact, factored = run(model, data, GGNDense, FactoredGGN)
    data[0][0].zero_()
    with torch.no_grad():
        model[0].weight.zero_()
    close(factored.operator().to_dense(), exact.operator().to_dense())


@pytest.mark.parametrize("per_parameter", [False, True])
def test_the_smaller_form(per_parameter):
    """Columns are written out when there are more of them than weights, also half way through the data."""
    model, x = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 3)), torch.randn(80, 4)
    for examples, kind in ((8, FactoredSum), (80, LowRankSum)):
        data = data_of(x[:examples], 3, *[8] * (examples // 8))
        (exact, found) = run(model, data, GGNDense, lambda p: LowRankGGN(p, per_parameter=per_parameter))
        assert isinstance(found, kind)
        assert found.count == examples
        matrix, operator = exact.operator().to_dense(), found.operator()
        if per_parameter:
            assert isinstance(operator, BlockDiagonal)
            ends = torch.tensor(operator.sizes).cumsum(0).tolist()
            spans = [slice(end - size, end) for end, size in zip(ends, operator.sizes, strict=True)]
            matrix = torch.block_diag(*[matrix[span, span] for span in spans])
        close(operator.to_dense(), matrix)


def test_a_parameter_without_influence():
    """Experts that no example of a batch was sent to have zeros there."""
    choices = nn.ModuleList([nn.Linear(4, 3) for _ in range(4)])
    model = Model(select_and_add, gate=nn.Linear(4, 4), experts=choices, head=nn.Linear(3, 3))
    x = torch.randn(200, 4)
    chosen = model.gate(x).argmax(1)
    order = torch.cat([(chosen == number).nonzero()[:3, 0] for number in range(4)])
    data = data_of(x[order], 3, 6, len(order) - 6)
    exact, found = run(model, data, GGNDense, FactoredGGN)
    close(found.operator().to_dense(), exact.operator().to_dense())


# -- operators


def test_shapes_that_do_not_fit():
    part = OuterProduct(torch.randn(2, 1, 1, 3), torch.randn(1, 2, 1, 1, 4))
    with pytest.raises(ValueError, match="same parameters"):
        Factored(((part,), (DenseJacobian(torch.randn(1, 2, 5)),)))
    with pytest.raises(ValueError, match="same parameters"):
        Factored(())
    with pytest.raises(ValueError, match="Expected an offset"):
        Factored(((part,),), torch.ones(2))
    with pytest.raises(ValueError, match="without a positive diagonal"):
        Factored(((part,),)).logdet()


OPERATORS = {
    "dense": lambda: Dense(torch.eye(5) + 1),
    "diagonal": lambda: Diagonal(torch.arange(1.0, 6.0)),
    "low rank": lambda: LowRank(torch.arange(10.0).view(5, 2), 0.1),
    "blocks of these sizes": lambda: BlockDiagonal((Dense(torch.eye(2) + 1), Diagonal(torch.ones(3)))),
    "blocks of other sizes": lambda: BlockDiagonal((Dense(torch.eye(3) + 1), Diagonal(torch.ones(2)))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_one_number_for_each_group(name):
    operator = OPERATORS[name]()
    delta, sizes = torch.tensor([0.5, 2.0]), [2, 3]
    full = torch.diag(expanded(delta, sizes))
    matrix = operator.to_dense() + full
    close(operator.shift(delta, sizes).to_dense(), matrix)
    close(operator.shifted_logdet(delta, sizes), torch.linalg.slogdet(matrix).logabsdet)
    ratio = torch.linalg.slogdet(matrix).logabsdet - torch.linalg.slogdet(full).logabsdet
    close(operator.logdet_ratio(delta, sizes), ratio)
    close(operator.logdet_ratio(full.diagonal()), ratio)
    close(operator.logdet_ratio(0.7), operator.shifted_logdet(0.7) - 5 * torch.tensor(0.7).log())
    for wrong in ([2, 2], [5], [1, 2, 2]):
        with pytest.raises(ValueError, match="one entry or 5"):
            operator.shift(delta, wrong)


def test_the_ratio_of_determinants_keeps_its_digits_for_many_weights():
    """Each determinant is some 1e6, of which single precision keeps one digit behind the point."""
    columns = torch.zeros(1_000_000, 1, dtype=torch.float32)
    columns[0] = 1e-2
    operator = LowRank(columns)
    assert float(operator.logdet_ratio(0.3)) == pytest.approx(1e-4 / 0.3, rel=1e-3)


def test_what_is_left_of_a_variance_when_double_precision_has_no_digits_for_the_difference():
    """The data leave a 1e-18 of the prior's variance in the first direction, and all of it in the second."""
    unit = OuterProduct(torch.eye(2)[:1, None, None], torch.ones(1, 1, 1, 1, 1))
    test = NetworkJacobian((OuterProduct(torch.eye(2)[:, None, None], torch.ones(1, 2, 1, 1, 1)),))
    for curvature in (Factored(((unit,),)), LowRank(torch.eye(2)[:, :1])):
        operator = curvature.shift(1e-18)
        expected = torch.tensor([1.0, 1e18])
        close(operator.inverse_quadratic(test).flatten(), expected, rtol=1e-5)
        close(operator.inverse_gram(test).view(2, 2).diagonal(), expected, rtol=1e-5)


# -- forms


def test_beside_puts_columns_together():
    a, one, two = torch.randn(3, 2, 1, 4), torch.randn(2, 3, 2, 1, 5), torch.randn(1, 3, 2, 1, 5)
    joined = beside(OuterProduct(a, one), OuterProduct(a, two))
    assert joined.shape == (3, 3, 20)
    close(joined.to_dense(), torch.cat([OuterProduct(a, g).to_dense() for g in (one, two)]))
    index, g = torch.randint(4, (3, 2)), torch.randn(2, 3, 2, 5)
    table = EmbeddingJacobian(index, g, 4)
    product = OuterProduct(torch.ones(3, 1, 1, 4), torch.randn(2, 3, 1, 1, 5), transposed=True)
    both = SumJacobian((product, table))
    close(beside(both, both).to_dense(), torch.cat([both.to_dense()] * 2))
    assert beside(OuterProduct(a, one), OuterProduct(a + 1, two)) is None
    assert beside(OuterProduct(a, one), OuterProduct(a, two, transposed=True)) is None
    assert beside(OuterProduct(a, one), table) is None


def test_conversion():
    jacobian = EmbeddingJacobian(torch.randint(4, (3, 2)), torch.randn(2, 3, 2, 5), 4)
    single = converted(jacobian, torch.float32)
    assert (floating_type(single), single.index.dtype) == (torch.float32, torch.int64)
    assert converted(jacobian, torch.float64) is jacobian
    assert floating_type(converted(jacobian, torch.bfloat16)) == torch.float32
    assert [id(t) for t in tensors(jacobian)] == [id(jacobian.index), id(jacobian.g)]
