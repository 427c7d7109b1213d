"""What `compute` must find for batches, by plain autograd from the outputs of one example after the other."""

import torch
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import Categorical, GGNDense, Gradients, compute


class Net(nn.Module):
    """Two layers, with a function of the module and the inputs for its forward pass."""

    def __init__(self, function, *, inputs=4):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(inputs, 4), nn.Linear(4, 3), function

    def layers(self, x):
        return self.two(self.one(x).tanh())

    def forward(self, x):
        return self.function(self, x)


def slow(outputs, weights, data):
    """Gradients `(N, P)` and the GGN by plain autograd; `outputs` are those of each example by itself."""
    rows, ggn = [], 0
    for f, y in zip(outputs, data, strict=True):
        p = f.detach().softmax(-1)
        pieces = [torch.autograd.grad(v, weights, retain_graph=True, materialize_grads=True) for v in f]
        J = torch.stack([torch.cat([g.flatten() for g in piece]) for piece in pieces])
        rows.append((p - F.one_hot(y, len(p))) @ J)
        ggn = ggn + J.T @ (p.diag() - p.outer(p)) @ J
    return torch.stack(rows), ggn


def check(model, data, alone=None, *, forward_fn=None):
    """Compare with `alone`, the list of outputs of a batch's examples, by default those of one after the other."""
    found = compute(model, Categorical(), data, {"g": Gradients, "ggn": GGNDense}, forward_fn=forward_fn)
    model.eval()
    alone = alone or (lambda x: [model(one)[0] for one in x.split(1)])
    outputs = [f for x, _ in data for f in alone(x)]
    rows, ggn = slow(outputs, list(model.parameters()), torch.cat([y for _, y in data]))
    torch.testing.assert_close(found["g"].matrix(), rows, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found["ggn"].tensors["matrix"], ggn, rtol=1e-9, atol=1e-10)
