"""Kronecker factors against their definition: inputs from hooks, cotangents from perturbations of layers' outputs."""

import oracles
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import GGN, Categorical, GGNKronecker, accumulate

NETWORKS = [
    "mlp",
    "3c3d",
    "resnet basic",
    "mobilenet v3",
    "convnext",
    "u-net",
    "vit",
    "swin",
    "mixer",
    "gcn",
    "bert eager",
]


def patches(layer, x):
    """(N, T, G, I)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, 1, layer.in_features)
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return unfolded.mT.unflatten(-1, (layer.groups, -1))


def positions(layer, g):
    """Cotangents (K, N, ...) as (K, N, T, G, O)."""
    if isinstance(layer, nn.Linear):
        return g.reshape(*g.shape[:2], -1, 1, layer.out_features)
    return g.flatten(3).mT.unflatten(-1, (layer.groups, -1))


def roots(f, y):
    """Columns (K, N, *, C), a position each: square roots of the output Hessians from their eigenvectors."""
    loss = lambda f, y: F.cross_entropy(f[None], y[None])  # noqa: E731
    rows = f.flatten(0, -2)
    values, vectors = torch.linalg.eigh(oracles.output_hessian(loss, rows, y.flatten()))
    root = (vectors * values.clamp_min(0).sqrt()[:, None]).movedim(2, 0).unflatten(1, f.shape[:-1])
    if f.ndim == 2:
        return root
    apart = torch.eye(f.shape[1])[:, None, None, :, None] * root  # (T, C, N, T, C)
    return apart.flatten(0, 1)


def true_factors(case, model, x, y, setting):
    """For each layer's weight: A and B, by groups."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    inputs, shifts, handles = {}, {}, []

    def watch(name):
        def hook(layer, given, out):
            inputs[name] = given[0].detach()
            shifts[name] = torch.zeros_like(out, requires_grad=True)
            return out + shifts[name]

        return hook

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    f = case.outputs(model, x)
    for handle in handles:
        handle.remove()
    columns = roots(f.detach(), y)
    cotangents = [torch.autograd.grad(f, list(shifts.values()), c, retain_graph=True) for c in columns]
    factors = {}
    for i, (name, layer) in enumerate(layers.items()):
        # The windows of an example stand one after the other in the batch axis: they are positions like others.
        a = patches(layer, inputs[name])
        g = positions(layer, torch.stack([c[i] for c in cotangents]))
        a, g = a.reshape(len(f), -1, *a.shape[2:]), g.reshape(len(g), len(f), -1, *g.shape[3:])
        if setting == "reduce":
            a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
        count = a.shape[0] * a.shape[1]
        b = torch.einsum("kntgo,kntgp->gop", g, g)
        factors[f"{name}.weight"] = torch.einsum("ntgi,ntgj->gij", a, a) / count, b
    return factors


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("problem", NETWORKS, indirect=True)
def test_factors_of_linear_layers_and_convolutions(problem, setting):
    case, model, x = problem.case, problem.model, problem.x
    y = problem.labels
    quantity = GGNKronecker(problem.parameters, setting)
    accumulate(model, quantity.parameters, Categorical(), GGN(), [(x, y)], [quantity])
    result = quantity.result()
    expected = true_factors(case, model, x, y, setting)
    assert len(expected) > 2
    for weight, (a, b) in expected.items():
        found_b, found_a = result.factors(weight)
        torch.testing.assert_close(found_a, a, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(found_b, b, rtol=1e-8, atol=1e-12)
