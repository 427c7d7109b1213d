"""The engine on networks that are shared, frozen, reparametrised, checkpointed or custom, against brute force."""

import pytest
import torch
from networks import brute_force
from networks.variants import VARIANTS, Model, layers
from torch import nn
from torch.utils.checkpoint import checkpoint

from lapkit.curvature import GGN, Engine, Gaussian, GGNDense, GGNDiagonal, Parameters, accumulate, borrowed


def outputs(model, x):
    return model(x)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def engine_jacobian(model, x):
    """(N, C, P)."""
    parameters = Parameters.of(model)
    with borrowed(model, parameters):
        return Engine(model, parameters).jacobian(x)[1].to_dense().transpose(0, 1)


GENERIC = {
    "weight norm": ["2.parametrizations.weight.original0", "2.parametrizations.weight.original1"],
    "weight norm over all axes": ["2.parametrizations.weight.original0", "2.parametrizations.weight.original1"],
    "weight normed convolution": ["1.parametrizations.weight.original0", "1.parametrizations.weight.original1"],
    "spectral norm": ["2.parametrizations.weight.original"],
    "orthogonal by cayley": ["2.parametrizations.weight.original"],
    "orthogonal by householder": ["2.parametrizations.weight.original"],
    "pruned": ["2.weight_orig"],
    "standardised weight": ["one.weight"],
    "symmetric weight": ["w"],
    "hypernetwork": ["make.weight", "make.bias", "code"],
    "merged adapter": ["a", "b"],
    "weight that is also a regulariser": ["one.weight"],
    "parameter without data": ["shift.weight"],
    "custom with several outputs": ["w", "b"],
    "custom with an unused output": ["w", "b"],
    "complex numbers": ["filter"],
    "complex weights": ["weight"],
    "mixture of experts of every kind": ["experts"],
    "kronecker weight": ["a", "b"],
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]().eval()


def test_jacobian(variant):
    """Nine examples are one more than there are powers of two in the probe."""
    parameters = Parameters.of(variant)
    with borrowed(variant, parameters):
        engine = Engine(variant, parameters)
        for examples in (3, 1, 9, 3):
            x = torch.randn(examples, 4)
            _, expected = brute_force.jacobian(variant, x, examples, outputs)
            close(engine.jacobian(x)[1].to_dense().transpose(0, 1), expected)
            assert all(j.abs().max() > 0 for j in expected.split(parameters.sizes, dim=-1))


def test_curvature(variant):
    """The Gaussian's columns are unit vectors, so that the GGN is `sum_n J_n^T J_n`."""
    parameters = Parameters.of(variant)
    x = torch.randn(4, 4)
    rows = brute_force.jacobian(variant, x, 4, outputs)[1].flatten(0, 1)
    dense, diagonal = GGNDense(parameters), GGNDiagonal(parameters)
    accumulate(variant, parameters, Gaussian(), GGN(), [(x, torch.zeros(4, 3))], [dense, diagonal])
    close(dense.result().operator().to_dense(), rows.T @ rows)
    close(diagonal.result().operator().diagonal(), rows.square().sum(0))


def test_which_weights_have_closed_forms(variant, request):
    """What is computed from a parameter before it meets the data goes the generic way, and nothing else."""
    parameters = Parameters.of(variant)
    with borrowed(variant, parameters):
        rules = Engine(variant, parameters)(torch.randn(3, 4)).rules
    generic = {use.parameter for use, rule in rules.items() if rule is None}
    assert generic == set(GENERIC.get(request.node.callspec.params["variant"], ()))


def test_examples_without_any_derivative():
    """Zero cotangents fit every layout: the first batch must not decide for those that follow."""
    net = Model(
        lambda m, x: m.two(m.one(x.unflatten(1, (2, 2))).relu().sum(1)), one=nn.Linear(2, 5), two=nn.Linear(5, 3)
    )
    nn.init.constant_(net.one.bias, -1.0)
    parameters = Parameters.of(net)
    alive = torch.randn(4, 4) * 3
    some = alive.clone()
    some[1:3] = 0.0
    with borrowed(net, parameters):
        engine = Engine(net, parameters)
        for x in (torch.zeros(4, 4), some, alive, some[:1], some[1:2]):
            _, expected = brute_force.jacobian(net, x, len(x), outputs)
            close(engine.jacobian(x)[1].to_dense().transpose(0, 1), expected)
    _, expected = brute_force.jacobian(net, some, 4, outputs)
    first_weight = expected[..., : net.one.weight.numel()]
    assert not first_weight[1:3].any()
    assert first_weight[[0, 3]].any()


DEEP = 3000


def test_a_network_of_three_thousand_layers():
    """Python's recursion limit is a thousand; `h_l = h_(l-1) + x w_l` has the Jacobian x everywhere."""

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ParameterList([nn.Parameter(torch.zeros(1, 1)) for _ in range(DEEP)])

        def forward(self, x):
            h = torch.zeros_like(x)
            for w in self.weights:
                h = h + x @ w
            return h

    x = torch.tensor([[2.0], [3.0]])
    close(engine_jacobian(Chain(), x), x[:, :, None].expand(2, 1, DEEP))


def test_a_stack_of_three_thousand_layers_of_which_the_first_is_trained():
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(DEEP)]).requires_grad_(False)
    for layer in model:
        nn.init.ones_(layer.weight)
    model[0].requires_grad_(True)
    close(engine_jacobian(model, torch.tensor([[2.0], [3.0]])), torch.tensor([[[2.0]], [[3.0]]]))


def reentrant(m, x):
    x = x.requires_grad_()  # without which this form of checkpointing gives no gradient at all
    return m.two(checkpoint(lambda z: m.one(z).tanh(), x, use_reentrant=True))


def reentrant_besides(m, x):
    """A weight is used on the tape and, out of sight, inside the checkpoint."""
    return reentrant(m, x) + m.one(x)[:, :3]


def changed_after_use(m, x):
    h = m.one(x)
    y = m.two(h)
    h.mul_(2.0)
    return y + h.sum(1, keepdim=True)


def input_changed_after_use(m, x):
    y = m.one(x).tanh()
    x.add_(1.0)
    return m.two(y)


REFUSED = {
    "reentrant checkpoint": (reentrant, "use_reentrant=False"),
    "reentrant checkpoint besides a plain use": (reentrant_besides, "use_reentrant=False"),
    "activation changed after use": (changed_after_use, "in ?place"),
    "input changed after use": (input_changed_after_use, "in ?place|other examples"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused(case):
    forward, words = REFUSED[case]
    model = Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 3))
    with pytest.raises((RuntimeError, ValueError), match=words):
        engine_jacobian(model, torch.randn(3, 4))


def test_a_saved_input_that_changes_later_is_right_or_refused():
    """The change happens after the forward pass, before the backward one."""
    model = layers(nn.Linear(5, 5))
    parameters = Parameters.of(model)
    x = torch.randn(3, 4)
    with borrowed(model, parameters):
        engine = Engine(model, parameters)
        engine(x)
        backprop = engine(x)
        _, expected = brute_force.jacobian(model, x, 3, outputs)
        x.zero_()
        try:
            found = backprop.jacobian().to_dense().transpose(0, 1)
        except RuntimeError as error:
            assert "in place" in str(error)  # noqa: PT017 (either outcome is right)
        else:
            close(found, expected)
