"""Averages between modules, KFRA and the Newton-style step, against recursions written out with dense Jacobians."""

import pytest
import torch
from oracles import output_hessian
from torch import nn
from torch.func import functional_call
from torch.func import grad as gradient_of

from lapkit.curvature import (
    Categorical,
    Dense,
    Gaussian,
    KroneckerProduct,
    Residual,
    conjugate_gradients,
    hessian_blocks,
    hessian_products,
    kfra,
    newton_step,
)

CLOSE = {"rtol": 1e-8, "atol": 1e-10}
NETWORKS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3)), (4,)),
    "relu": lambda: (nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)),
    "convolution": lambda: (
        nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(12, 3)),
        (2, 4, 4),
    ),
}


def problem(build, examples=5):
    model, shape = build()
    return model.eval(), torch.randn(examples, *shape), torch.arange(examples) % 3


def mean(rows):
    return torch.stack(rows).mean(0)


def slow_averages(model, likelihood, x, y, averaging, change):
    """`E[J^T E[H] J]` or `E[J]^T E[H] E[J]`, from the Jacobians of each module at each example."""
    modules = list(model.named_children())
    inputs = [x]
    for _, module in modules:
        inputs.append(module(inputs[-1]).detach())

    def loss(f, t):
        return likelihood.loss(f[None], t[None])[0]

    H = output_hessian(loss, inputs[-1], y).mean(0)
    delta = torch.stack([gradient_of(loss)(f, t) for f, t in zip(inputs[-1], y, strict=True)])
    count, blocks = len(x), {}

    def between(jacobians):
        if averaging == "outer":
            return mean([J.T @ H @ J for J in jacobians])
        return mean(jacobians).T @ H @ mean(jacobians)

    for (name, module), z in zip(reversed(modules), reversed(inputs[:-1]), strict=True):
        for local, p in module.named_parameters():
            jacobians = [
                torch.autograd.functional.jacobian(
                    lambda w, m=module, local=local, v=v: functional_call(m, {local: w}, (v[None],)), p.detach()
                ).reshape(-1, p.numel())
                for v in z
            ]
            blocks[f"{name}.{local}"] = count * between(jacobians)
        jacobians, bends = [], []
        for v, d in zip(z, delta, strict=True):
            jacobians.append(torch.autograd.functional.jacobian(module, v[None]).reshape(-1, v.numel()))
            bends.append(
                torch.autograd.functional.hessian(lambda v, m=module, d=d: (m(v[None])[0] * d).sum(), v).reshape(
                    v.numel(), v.numel()
                )
            )
        H = between(jacobians) + change(mean(bends))
        delta = torch.stack([(J.T @ d.flatten()).view_as(v) for J, d, v in zip(jacobians, delta, z, strict=True)])
    return blocks


CHANGES = {"hessian": lambda r: r, "ggn": torch.zeros_like, "pch-abs": torch.abs, "pch-clip": torch.relu}


@pytest.mark.parametrize("averaging", ["outer", "inner"])
@pytest.mark.parametrize("mode", CHANGES)
@pytest.mark.parametrize("network", NETWORKS)
def test_definition(network, mode, averaging):
    """In whatever batches the data comes."""
    model, x, y = problem(NETWORKS[network])
    wanted = slow_averages(model, Categorical(), x, y, averaging, CHANGES[mode])
    for sizes in ([5], [1, 3, 1]):
        data = list(zip(x.split(sizes), y.split(sizes), strict=True))
        found = hessian_blocks(model, Categorical(), data, mode=mode, averaging=averaging)
        for name, (block,) in found.blocks.items():
            torch.testing.assert_close(block, wanted[name], **CLOSE)


@pytest.mark.parametrize("averaging", ["outer", "inner"])
@pytest.mark.parametrize("mode", CHANGES)
def test_one_example_has_nothing_to_average(mode, averaging):
    model, x, y = problem(NETWORKS["mlp"], examples=1)
    exact, averaged = (
        hessian_blocks(model, Categorical(), [(x, y)], mode=mode, averaging=a).to_dense() for a in (None, averaging)
    )
    torch.testing.assert_close(averaged, exact, **CLOSE)


def test_skips_are_one_module_in_averages():
    """For one example that makes no difference."""
    model = nn.Sequential(nn.Linear(3, 4), Residual(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    data = [(torch.randn(1, 3), torch.tensor([1]))]
    for mode in ("hessian", "ggn"):
        exact, averaged = (
            hessian_blocks(model, Categorical(), data, mode=mode, averaging=a).to_dense() for a in (None, "outer")
        )
        torch.testing.assert_close(averaged, exact, **CLOSE)


@pytest.mark.parametrize("network", NETWORKS)
def test_kfra(network):
    """Biases have the averaged blocks; factors of weights follow from inputs and the averaged matrix above."""
    model, x, y = problem(NETWORKS[network])
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    averaged = hessian_blocks(model, Categorical(), data, mode="ggn", averaging="outer").blocks
    found = dict(zip(averaged, kfra(model, Categorical(), data).operator().blocks, strict=True))
    for name, block in found.items():
        if name.endswith("bias"):
            assert isinstance(block, Dense)
            torch.testing.assert_close(block.to_dense(), averaged[name][0], **CLOSE)
            continue
        assert isinstance(block, KroneckerProduct)
        if model.get_parameter(name).ndim == 2:  # Kronecker by itself
            torch.testing.assert_close(block.to_dense(), averaged[name][0], **CLOSE)


def test_kfra_of_a_convolution():
    """The mean of `a a^T` and the sum of the averaged matrix's blocks over positions."""
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten())
    x, y = torch.randn(4, 2, 5), torch.randn(4, 12)
    found = kfra(model, Gaussian(), [(x, y)])
    left, right = found.part("rows")["0.weight"][0], found.part("columns")["0.weight"][0]
    patches = x.unfold(2, 2, 1).permute(0, 2, 1, 3).flatten(2)  # (N, T, I)
    torch.testing.assert_close(left, 4 * 4 * torch.eye(3))  # N T for a unit loss Hessian
    torch.testing.assert_close(right, torch.einsum("nti,ntj->ij", patches, patches) / 16)
    exact = hessian_blocks(model, Gaussian(), [(x, y)]).blocks["0.weight"][0]
    torch.testing.assert_close((left.trace() * right.trace()), exact.trace())


@pytest.mark.parametrize("sub_blocks", [None, 2])
def test_newton_step(sub_blocks):
    model, x, y = problem(NETWORKS["mlp"])
    loss = Categorical().loss(model(x), y).mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    options = {"mode": "pch-abs", "sub_blocks": sub_blocks}
    blocks = hessian_blocks(model, Categorical(), [(x, y)], **options)
    products = hessian_products(model, Categorical(), [(x, y)], **options)
    damped = 0.1 * torch.eye(len(gradient)) + 0.9 * blocks.to_dense() / len(x)
    wanted = torch.linalg.solve(damped, -gradient)
    for curvature in (blocks, products):
        found = newton_step(curvature, gradient, damping=0.1, tolerance=1e-12, max_iterations=200)
        torch.testing.assert_close(found.vector, wanted, **CLOSE)
        assert (found.residuals <= 1e-12).all()
    rough = newton_step(blocks, gradient, damping=0.1, tolerance=0.1, max_iterations=50)
    parts = (damped @ rough.vector + gradient).split(blocks.sizes), gradient.split(blocks.sizes)
    errors = torch.stack([r.norm() / g.norm() for r, g in zip(*parts, strict=True)])
    torch.testing.assert_close(errors, rough.residuals)
    assert (errors <= 0.1).all()
    assert rough.iterations.sum() < found.iterations.sum()


def test_smaller_blocks_take_fewer_steps():
    model, x, y = problem(NETWORKS["mlp"])
    gradient = torch.randn(sum(p.numel() for p in model.parameters()))
    steps = [
        int(newton_step(hessian_blocks(model, Categorical(), [(x, y)], mode="pch-clip", sub_blocks=k), gradient,
                        damping=0.01, tolerance=1e-8).iterations.max())
        for k in (1, 5)
    ]  # fmt: skip
    assert steps[1] < steps[0]


def test_conjugate_gradients_refuse():
    with pytest.raises(RuntimeError, match="Block 1 is not positive definite"):
        conjugate_gradients(
            lambda v: torch.tensor([1.0, -1.0]) * v, torch.ones(2), [1, 1], tolerance=1e-3, max_iterations=3
        )
    with pytest.raises(ValueError, match=r"Expected a vector \(3,\)"):
        conjugate_gradients(lambda v: v, torch.ones(2), [1, 2], tolerance=1e-3, max_iterations=3)
    zero = conjugate_gradients(lambda v: v, torch.tensor([0.0, 2.0]), [1, 1], tolerance=1e-3, max_iterations=3)
    assert zero.vector.tolist() == [0.0, 2.0]
