import copy

import pytest
import torch
from oracles import ggn, jacobian, output_hessian
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lapkit import Laplace
from lapkit.pruning import apply_masks, magnitude_saliency, obd_saliency, predicted_increase, pruning_masks


@pytest.fixture
def problem():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    return model, x, y


def diagonal_of_ggn(model, x, y):
    def loss(f, label):
        return F.cross_entropy(f[None], label[None])

    matrix = ggn(jacobian(model, x), output_hessian(loss, model(x).detach(), y))
    names = [n for n, _ in model.named_parameters()]
    parts = matrix.diagonal().split([p.numel() for p in model.parameters()])
    return {n: d.reshape(p.shape) for n, d, p in zip(names, parts, model.parameters(), strict=True)}


def test_obd_is_half_the_diagonal_of_the_ggn_times_the_squared_weight(problem):
    model, x, y = problem
    saliency = obd_saliency(Laplace(model, "classification", "all", "diag").fit([(x, y)]))
    diagonal = diagonal_of_ggn(model, x, y)
    assert {(m, n) for m, n in saliency} == {(model[0], "weight"), (model[3], "weight"), (model[5], "weight")}
    for index in (0, 3, 5):
        expected = diagonal[f"{index}.weight"] * model[index].weight.detach() ** 2 / 2
        torch.testing.assert_close(saliency[model[index], "weight"], expected, rtol=1e-10, atol=1e-14)


def test_obd_scales_with_the_noise_of_a_regression():
    model, x, y = nn.Linear(3, 2), torch.randn(7, 3), torch.randn(7, 2)
    one, half = (
        obd_saliency(Laplace(model, "regression", "all", "diag", sigma_noise=s).fit([(x, y)])) for s in (1.0, 0.5)
    )
    torch.testing.assert_close(half[model, "weight"], 4 * one[model, "weight"])
    expected = model.weight.detach() ** 2 * x.square().sum(0) / 2
    torch.testing.assert_close(one[model, "weight"], expected)


def test_prediction_is_exact_for_one_weight_of_a_linear_regression_at_its_mode():
    # The loss of a linear model is quadratic and its gradient vanishes at the least-squares solution.
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    model = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(x, y).solution.T)
    saliency = obd_saliency(Laplace(model, "regression", "all", "full").fit([(x, y)]))
    masks = pruning_masks(saliency, 1 / 3)
    before = F.mse_loss(model(x), y, reduction="sum") / 2
    after = F.mse_loss(apply_masks(copy_with(model, masks), {})(x), y, reduction="sum") / 2
    assert float((after - before).detach()) == pytest.approx(predicted_increase(saliency, masks), rel=1e-10)


def copy_with(model, masks):
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.weight.mul_(masks[model, "weight"])
    return pruned


def test_scores_are_what_torch_takes_as_importance(problem):
    model, x, y = problem
    saliency = obd_saliency(Laplace(model, "classification", "all", "kron").fit([(x, y)]))
    ours = pruning_masks(saliency, 0.3)
    prune.global_unstructured(
        list(saliency), pruning_method=prune.L1Unstructured, importance_scores=saliency, amount=0.3
    )
    for (module, name), mask in ours.items():
        assert torch.equal(getattr(module, f"{name}_mask"), mask)


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5, 0.99])
def test_counts_are_exact_also_under_ties(amount):
    a, b = nn.Linear(10, 10), nn.Linear(10, 7)
    scores = {(a, "weight"): torch.zeros(10, 10), (b, "weight"): torch.zeros(7, 10)}
    masks = pruning_masks(scores, amount)
    removed = sum(int((mask == 0).sum()) for mask in masks.values())
    assert removed == round(amount * 170)


def test_masks_remove_the_smallest_over_all_layers():
    a, b = nn.Linear(2, 1), nn.Linear(2, 1)
    scores = {(a, "weight"): torch.tensor([[1.0, 5.0]]), (b, "weight"): torch.tensor([[2.0, 4.0]])}
    masks = pruning_masks(scores, 0.5)
    assert masks[a, "weight"].tolist() == [[0, 1]]
    assert masks[b, "weight"].tolist() == [[0, 1]]
    assert predicted_increase(scores, masks) == 3.0


def test_masks_stay_or_are_written_into_the_weights(problem):
    model, _, _ = problem
    masks = pruning_masks(magnitude_saliency(model), 0.4)
    permanent = copy.deepcopy(model)
    apply_masks(permanent, pruning_masks(magnitude_saliency(permanent), 0.4), permanent=True)
    assert not prune.is_pruned(permanent)
    apply_masks(model, masks)
    assert prune.is_pruned(model)
    for kept, gone in zip(model, permanent, strict=True):
        if hasattr(kept, "weight"):
            assert torch.equal(kept.weight, gone.weight)
            assert torch.equal(kept.weight_orig * kept.weight_mask, kept.weight)


def test_a_pruned_model_can_be_fitted_again(problem):
    model, x, y = problem
    apply_masks(model, pruning_masks(magnitude_saliency(model), 0.5))
    diagonal = Laplace(model, "classification", "all", "diag").fit([(x, y)]).fitted.curvature.diagonal()
    weights = dict(
        zip(
            [n for n, _ in model.named_parameters()],
            diagonal.split([p.numel() for p in model.parameters()]),
            strict=True,
        )
    )
    masked = weights["3.weight_orig"].reshape(5, 8)
    assert (masked[model[3].weight_mask == 0] == 0).all()
    assert (masked[model[3].weight_mask == 1] > 0).all()


def test_errors_say_what_is_wrong(problem):
    model, _, _ = problem
    scores = magnitude_saliency(model)
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\), got 1"):
        pruning_masks(scores, 1.0)
    with pytest.raises(ValueError, match="no trainable weight matrix"):
        pruning_masks({}, 0.5)
    with pytest.raises(ValueError, match="NaN"):
        pruning_masks({(model, "x"): torch.full((2, 2), torch.nan)}, 0.5)
    with pytest.raises(ValueError, match="not in this model"):
        apply_masks(copy.deepcopy(model), pruning_masks(scores, 0.5))
    with pytest.raises(RuntimeError, match="fit"):
        obd_saliency(Laplace(model, "classification", "all", "diag"))
