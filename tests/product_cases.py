"""Products with curvature matrices of the reference problem, and the same matrices by plain autograd."""

import oracles
import reference_problem as ref
import torch

from lapkit.curvature import Categorical, EmpiricalFisherProduct, FisherProduct, GGNProduct, HessianProduct

PRODUCTS = (GGNProduct, HessianProduct, FisherProduct, EmpiricalFisherProduct)


def close(actual, expected, tolerance=1e-9):
    """Relative to the largest entry: an entry of zero is a sum that cancels."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()) + 1e-14)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def slow_hessian(model, loss):
    """Row by row, each from a graph of its own."""
    weights = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = flat(torch.autograd.grad(loss(model), weights, create_graph=True, materialize_grads=True))
        rows = [
            flat(torch.autograd.grad(g, weights, retain_graph=True, materialize_grads=True))
            if g.requires_grad
            else torch.zeros_like(gradient)
            for g in gradient
        ]
    return torch.stack(rows).detach()


def slow_ggn(jacobian, f, loss):
    return oracles.ggn(jacobian, oracles.output_hessian(loss, f, torch.zeros(len(f), 1)))


def seeded(kind):
    """The same samples each time."""
    return {"generator": torch.Generator().manual_seed(0)} if kind is FisherProduct else {}


def uneven(x, y):
    """Batches of one, of three and of the rest."""
    return [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]


def reference(kind, **options):
    model = ref.model()
    return kind(model, Categorical(), uneven(ref.inputs(), ref.labels()), **options)
