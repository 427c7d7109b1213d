"""The networks of the contract tests, the slow Jacobian, and whether a model comes back as it was."""

import copy
from contextlib import contextmanager

import pytest
import torch
from networks.contract import NETWORKS


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny: a second thread costs more than it brings, and far more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def slow_jacobian():
    """d f(x_n) / d theta, (N, C, P), by plain autograd: one example, one output at a time.

    `oracles.jacobian` is the same through functorch, which custom functions refuse and scalar parameters break.
    """

    def jacobian(model, x):
        model = copy.deepcopy(model).eval()
        weights = [p for p in model.parameters() if p.requires_grad]

        def row(output):
            return torch.cat(
                [g.flatten() for g in torch.autograd.grad(output, weights, retain_graph=True, materialize_grads=True)]
            )

        return torch.stack([torch.stack([row(f) for f in model(one[None]).flatten()]) for one in x])

    return jacobian


def _bits(tensor):
    return None if tensor is None else (tensor.dtype, tensor.detach().clone().reshape(-1).view(torch.uint8).tolist())


def _state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    modules = dict(model.named_modules())
    return {
        "values": {name: (id(t), _bits(t)) for name, t in tensors.items()},
        "gradients": {name: (id(t.grad), _bits(t.grad)) for name, t in tensors.items() if t.is_leaf},
        "requires_grad": {name: t.requires_grad for name, t in tensors.items()},
        "tensor hooks": {name: dict(t._backward_hooks or {}) for name, t in tensors.items()},
        "training": {name: m.training for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "hooks": {name: {k: dict(v) for k, v in vars(m).items() if k.endswith("hooks")} for name, m in modules.items()},
    }


@pytest.fixture
def unchanged():
    """A context that demands of a model the same bits, flags, modes and hooks after it, error or not."""

    @contextmanager
    def guard(model):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.25)
        before = _state(model)
        try:
            yield
        finally:
            after = _state(model)
            assert [part for part in before if before[part] != after[part]] == []

    return guard


@pytest.fixture(params=NETWORKS)
def network(request):
    """A model in eval mode and the function that makes its inputs."""
    model, inputs = NETWORKS[request.param]()
    return model.eval(), inputs
