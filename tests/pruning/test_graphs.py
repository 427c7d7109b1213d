"""Channels of graphs as torch-pruning finds them."""

import copy

import pytest
import torch
from dense_pruning import minimiser, rise
from torch import nn
from torch.nn import functional as F

from lapkit import Laplace
from lapkit.pruning import LaplaceImportance

pytestmark = pytest.mark.peer("torch_pruning")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(16, 3)

    def forward(self, x):
        h = F.relu(self.stem(x))
        return self.head((h + self.norm(self.inner(h))).flatten(1))


@pytest.fixture
def network():
    return Residual().eval(), torch.randn(20, 1, 4, 4), torch.arange(20) % 3


def members(model, channel):
    """What goes with one channel of the residual stream, by hand."""
    masks = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    for name in ("stem.weight", "stem.bias", "inner.weight", "inner.bias", "norm.weight", "norm.bias"):
        masks[name][channel] = True
    masks["inner.weight"][:, channel] = True
    masks["head.weight"].view(3, 4, 4)[:, channel] = True
    return torch.cat([m.flatten() for m in masks.values()]).nonzero()[:, 0]


@pytest.mark.parametrize("structure", ["diag", "full"])
def test_a_channel_is_all_that_hangs_together(network, structure):
    tp = pytest.importorskip("torch_pruning")
    model, x, y = network
    la = Laplace(model, "classification", "all", structure).fit([(x, y)])
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    group = graph.get_pruning_group(model.stem, tp.prune_conv_out_channels, idxs=list(range(4)))
    P = la.posterior_precision.to_dense()
    expected = [rise(P, minimiser(P, la.mean, members(model, c))) for c in range(4)]
    torch.testing.assert_close(LaplaceImportance(la)(group), torch.tensor(expected), rtol=1e-8, atol=1e-10)


def test_its_pruner_takes_the_scores(network):
    tp = pytest.importorskip("torch_pruning")
    model, x, y = network
    la = Laplace(model, "classification", "all", "diag").fit([(x, y)])
    scores = [
        float(w)
        for w in LaplaceImportance(la)(
            tp.DependencyGraph()
            .build_dependency(model, example_inputs=x)
            .get_pruning_group(model.stem, tp.prune_conv_out_channels, idxs=list(range(4)))
        )
    ]
    kept = model.stem.weight.detach()[sorted(sorted(range(4), key=scores.__getitem__)[2:])]
    small = copy.deepcopy(model)
    fresh = Laplace(small, "classification", "all", "diag").fit([(x, y)])
    pruner = tp.pruner.BasePruner(
        small, x, importance=LaplaceImportance(fresh), pruning_ratio=0.5, ignored_layers=[small.head]
    )
    pruner.step()
    assert torch.equal(small.stem.weight, kept)
    assert small(x).shape == (20, 3)
    with pytest.raises(ValueError, match="anew after each step"):
        pruner.importance(next(iter(pruner.DG.get_all_groups(ignored_layers=[small.head]))))
