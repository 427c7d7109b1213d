"""Smaller networks compute the same."""

import copy
import inspect

import pytest
import torch
from torch import nn

from lapkit import Laplace
from lapkit.pruning import prune, shrink
from lapkit.pruning import shrinking as module


def convolutional(**options):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, **options),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(6, 5, 3, bias=False), nn.Softplus(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(5 * 4 if options.get("padding", 0) == 0 else 5 * 9, 7),
        nn.Sigmoid(),
        nn.Dropout(0.5),
        nn.Linear(7, 3),
    )


def settled(model, x):
    """Batch norms with statistics of their own."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x + 1)
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def outputs(model, x):
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("options", [{}, {"padding": 1}])
@pytest.mark.parametrize("unit", ["neuron", "row"])
def test_pruned_networks_shrink_and_stay_the_same(unit, options):
    x = torch.randn(12, 1, 8, 8)
    model = settled(convolutional(**options), x)
    la = Laplace(model, "classification", "all", "kron").fit([(x, torch.arange(12) % 3)])
    result = prune(la, 0.5, unit=unit, ignore=["8"])
    for masked in (result.apply(copy.deepcopy(model)), result.pruned()):
        small = shrink(masked, x)
        torch.testing.assert_close(outputs(small.model, x), outputs(masked, x))
        assert sum(small.removed.values()) >= result.units[1] - 1 - (unit == "row") * 2
        assert small.weights[1] < small.weights[0]
        assert small.weights[1] == sum(p.numel() for p in small.model.parameters())
        assert str(small.weights[1]) in str(small)
    first = small.model[0]
    assert first.out_channels == first.weight.shape[0] == small.model[1].num_features == small.model[3][0].in_channels


@pytest.mark.parametrize("where", ["in", "out"])
def test_dead_neurons_go_whichever_side_is_dead(where):
    x = torch.randn(5, 1, 8, 8)
    model = settled(convolutional(), x)
    with torch.no_grad():
        if where == "in":
            model[0].weight[1:3] = 0  # a constant by its bias, which the batch norm shifts
            model[3][0].weight[4] = 0  # softplus makes log 2 of it
            model[5].weight[:2] = 0
        else:
            model[3][0].weight[:, 1:3] = 0
            model[5].weight[:, 16:20] = 0
            model[8].weight[:, :2] = 0
    small = shrink(model, x)
    assert small.removed == {"0": 2, "3.0": 1, "5": 2}
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x))


def test_constants_stay_where_a_border_would_show():
    x = torch.randn(3, 1, 6, 6)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten())
    chain = nn.Sequential(*model, nn.Linear(32, 2))
    with torch.no_grad():
        chain[0].weight[0] = 0
    assert shrink(chain, x).removed["0"] == 0
    with torch.no_grad():
        chain[0].bias[0] = -torch.inf  # the sigmoid is zero then, and so is the border
    assert shrink(chain, x).removed["0"] == 1


def test_one_neuron_stays():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    x = torch.randn(4, 2)
    small = shrink(model, x)
    assert small.model[0].out_features == 1
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x))


def test_inputs_may_be_regrouped_before_the_first_layer():
    """Rows of pixels become pictures."""
    x = torch.randn(12, 64)
    model = settled(nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *convolutional()), x)
    la = Laplace(model, "classification", "all", "kron").fit([(x, torch.arange(12) % 3)])
    masked = prune(la, 0.5, unit="filter").pruned()
    small = shrink(masked, x)
    assert small.removed["1"] + small.removed["4.0"] > 2
    torch.testing.assert_close(outputs(small.model, x), outputs(masked, x))
    between = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"1 \(Unflatten\) regroups the outputs of 0"):
        shrink(between)


def test_the_network_given_stays_as_it_is():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight[:, 0] = 0
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = shrink(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not small.model[0].weight.requires_grad
    assert small.model[2].weight.requires_grad
    assert small.removed == {"0": 1}


def test_a_difference_is_found(monkeypatch):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[2].weight[:, 0] = 0
    monkeypatch.setattr(module, "_cut", lambda link: link.next.weight.data.mul_(2).numel())
    with pytest.raises(RuntimeError, match="differ by"):
        shrink(model, torch.randn(3, 2))
    with pytest.raises(ValueError, match="no part of a chain"):
        shrink(nn.TransformerEncoderLayer(4, 2))


@pytest.mark.parametrize("nested", [False, True])
def test_one_activation_may_stand_in_several_places(nested):
    """A constant passes every one of them."""
    act = nn.Sigmoid()
    layers = [nn.Linear(4, 5), act, nn.Linear(5, 6), act, nn.Linear(6, 3)]
    model = nn.Sequential(nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])) if nested else nn.Sequential(*layers)
    with torch.no_grad():
        for layer in (layers[0], layers[2]):
            layer.weight[1] = 0
    x = torch.randn(7, 4)
    small = shrink(model)
    assert sum(small.removed.values()) == 2
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x))


def test_what_is_used_twice_is_no_chain():
    layer, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    for repeated in ([layer, layer], [layer, tied], [nn.Linear(4, 4), norm, nn.Linear(4, 4), norm]):
        with pytest.raises(ValueError, match="has the weights of"):
            shrink(nn.Sequential(nn.Linear(2, 4), *repeated, nn.Linear(4, 2)))


def test_what_differs_at_the_border_is_no_constant_for_a_batch_norm_either():
    """Without running statistics it makes one number of a constant, but the average at the border is another."""
    model = nn.Sequential(
        nn.Conv1d(1, 3, 3),
        nn.AvgPool1d(2, 1, padding=1),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Conv1d(3, 2, 1),
        nn.Flatten(),
        nn.Linear(14, 2),
    )
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 2.0
    x = torch.randn(5, 1, 8)
    small = shrink(model)
    assert small.removed["0"] == 0
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"bias": False}])
def test_batch_norms_of_every_kind(options):
    if "bias" in options and "bias" not in inspect.signature(nn.BatchNorm1d).parameters:
        pytest.skip("this torch has no batch norm without a shift")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(9, 3)
    settled(model, x)
    with torch.no_grad():
        model[0].weight[1] = 0
    small = shrink(model, x)
    assert small.removed == {"0": 1}
    torch.testing.assert_close(outputs(small.model, x), outputs(model, x))
