"""What pruning leaves in a network, and whether it cost what was predicted."""

import copy

import pytest
import torch
from dense_laplace import problem
from dense_pruning import fitted
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

from lapkit import Laplace
from lapkit.pruning import apply_masks, make_permanent, prune, prune_gradually, report, saliency, surviving


def classifier():
    """At a minimum of its negative log posterior, with a prior of precision 1."""
    x = torch.randn(60, 3)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(model, x, y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, [(x[:25], y[:25]), (x[25:], y[25:])], x, y


def objective(model, x, y):
    loss = F.cross_entropy(model(x), y, reduction="sum")
    return loss + sum(p.square().sum() for p in model.parameters()) / 2


@pytest.fixture(scope="module")
def trained():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return classifier()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_masks_are_those_of_torch():
    case = problem("classification", "cnn")
    model = case.fresh
    la = Laplace(model, "classification", "all", "full").fit(case.data)
    scores = saliency(la, "obs")
    ours = prune(la, 0.4, compensate=False)
    theirs = copy.deepcopy((model, list(scores), list(scores.values())))
    torch_prune.global_unstructured(
        theirs[1],
        pruning_method=torch_prune.L1Unstructured,
        importance_scores=dict(zip(theirs[1], theirs[2], strict=True)),
        amount=0.4,
    )
    assert set(ours.masks) == set(scores)
    ours.apply()
    for one, two in zip(model.modules(), theirs[0].modules(), strict=True):
        assert set(dict(one.named_buffers(recurse=False))) == set(dict(two.named_buffers(recurse=False)))
        for name, mask in one.named_buffers(recurse=False):
            assert torch.equal(mask, dict(two.named_buffers())[name])
    torch.testing.assert_close(model(case.x), theirs[0](case.x))


def test_the_network_is_untouched_until_apply():
    case = problem("classification")
    model = case.fresh
    la = Laplace(model, "classification", "all", "full").fit(case.data)
    before, outputs = flat(model), model(case.x)
    result = prune(la, 0.5)
    report(la, result, case.data)
    plain = result.state_dict()
    assert torch.equal(flat(model), before)
    assert list(plain) == list(model.state_dict())
    fresh = case.fresh
    fresh.load_state_dict(plain)
    torch.testing.assert_close(fresh(case.x), result.pruned()(case.x))
    assert not torch.equal(fresh(case.x), outputs)
    masked = result.apply(case.fresh)
    torch.testing.assert_close(masked(case.x), fresh(case.x))
    assert torch_prune.is_pruned(masked)
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        F.cross_entropy(masked(case.x), case.y).backward()
        optimizer.step()
    assert not torch_prune.is_pruned(make_permanent(masked))
    zeros = {n: (p == 0).sum() for n, p in masked.named_parameters()}
    assert all(zeros[n] == (1 - m).sum() for n, m in result.masks_by_name.items())


def test_another_network_is_refused():
    case = problem("classification")
    result = prune(fitted(case, "diag"), 0.5)
    assert repr(result) == f"PruneResult({result.units[1]} of {result.units[0]} units gone)"
    with pytest.raises(ValueError, match="no copy"):
        result.apply(nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"\(module, parameter name\).* got \['0.weight'\]"):
        apply_masks(case.model, {"0.weight": torch.ones(3)})
    model = case.fresh
    la = Laplace(model, "classification", "all", "diag").fit(case.data)
    result = prune(la, 0.3)
    result.apply()
    with pytest.raises(ValueError, match="not those that were fitted"):
        report(la, result, case.data)
    for copied in (result.pruned, result.state_dict, lambda: surviving(la, result, case.data)):
        with pytest.raises(ValueError, match="make_permanent"):
            copied()
    with pytest.raises(ValueError, match="carry masks"):
        prune(Laplace(model, "classification", "all", "diag").fit(case.data), 0.5)


@pytest.mark.parametrize("change", ["trained", "masked"])
def test_a_network_that_has_changed_since_is_not_pruned_by_its_old_weights(change):
    case = problem("classification")
    model = case.fresh
    la = Laplace(model, "classification", "all", "diag").fit(case.data)
    if change == "masked":
        prune(la, 0.3).apply()
    else:
        with torch.no_grad():
            model[0].weight[0, 0] += 0.1
    for asked in (lambda: prune(la, 0.5), lambda: saliency(la), lambda: prune_gradually(la, case.data, [0.5])):
        with pytest.raises(RuntimeError, match="not those that were fitted"):
            asked()


def test_a_networks_own_masks_are_no_pruning():
    """Such as the causal mask of an attention layer."""
    case = problem("classification")
    model = case.fresh
    model.register_buffer("causal_mask", torch.ones(3, 3))
    masked = prune(fitted(case, "diag"), 0.5).apply(model)
    assert not torch_prune.is_pruned(make_permanent(masked))
    assert torch.equal(model.causal_mask, torch.ones(3, 3))


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.embed(tokens).mean(1))

    tokens, y = torch.randint(5, (12, 3)), torch.arange(12) % 5
    model = Tied()
    la = Laplace(model, "classification", "all", "diag").fit([(tokens, y)])
    result = prune(la, 0.5)
    pruned = result.pruned()
    for permanent in (True, False):
        masked = result.apply(copy.deepcopy(model), permanent=permanent)
        torch.testing.assert_close(masked(tokens), pruned(tokens))
        assert (masked.head.weight == 0).sum() == 10
        assert masked.head.weight.eq(masked.embed.weight).all()
        assert torch_prune.is_pruned(masked.head) != permanent
    assert pruned.head.weight is pruned.embed.weight


def test_masks_come_on_top_of_masks():
    layers = nn.Linear(4, 1), nn.Linear(4, 1)
    for layer in layers:
        torch_prune.custom_from_mask(layer, "weight", torch.tensor([[1.0, 0, 1, 1]]))
    apply_masks(layers[0], {(layers[0], "weight"): torch.tensor([[1.0, 1, 0, 1]])})
    assert layers[0].weight_mask.tolist() == [[1, 0, 0, 1]]
    apply_masks(layers[1], {(layers[1], "weight"): torch.tensor([[1.0, 1, 0, 1]])}, permanent=True)
    assert (layers[1].weight != 0).tolist() == [[True, False, False, True]]
    assert not torch_prune.is_pruned(layers[1])


def test_writing_zeros_keeps_the_order_of_the_parameters():
    """It is the order of every vector of weights; torch's own removal of masks changes it."""
    case = problem("classification")
    result = prune(fitted(case, "diag"), 0.5)
    names = [n for n, _ in case.model.named_parameters()]
    assert [n for n, _ in result.pruned().named_parameters()] == names
    assert [n for n, _ in make_permanent(result.apply(case.fresh)).named_parameters()] != names


def test_masks_of_another_model_are_refused():
    case = problem("classification")
    masks = prune(fitted(case, "diag"), 0.5).masks
    with pytest.raises(ValueError, match="not in this model"):
        apply_masks(case.fresh, masks)


def test_a_small_change_costs_what_was_predicted(trained):
    model, data, x, y = trained
    la = Laplace(model, "classification", "all", "full").fit(data)
    found = report(la, prune(la, 1 / 36), data)
    before, after = (float(objective(m, x, y).detach()) for m in (model, found.result.pruned()))
    assert found.actual == pytest.approx(after - before, rel=1e-8)
    assert abs(found.slope) < 1e-6
    assert found.actual == pytest.approx(found.predicted, rel=0.2)
    assert found.trusted
    assert found.at_mode
    assert "holds" in str(found)
    losses = [float(F.cross_entropy(m(x), y, reduction="sum").detach()) for m in (model, found.result.pruned())]
    assert found.actual_loss == pytest.approx(losses[1] - losses[0], rel=1e-8)
    assert found.actual - found.actual_loss == pytest.approx(found.predicted - found.predicted_loss, abs=1e-6)
    assert found.examples == 60


def test_a_large_one_leaves_the_trust_region(trained):
    model, data, _, _ = trained
    la = Laplace(model, "classification", "all", "full").fit(data)
    found = report(la, prune(la, 0.9, "opd"), data)
    assert not found.trusted
    assert "left its trust region" in str(found)
    assert "prune_gradually" in found.verdict


def test_a_slope_is_told(trained):
    model, data, _, _ = trained
    la = Laplace(model, "classification", "all", "full", prior_precision=50.0).fit(data)
    found = report(la, prune(la, 0.3), data)
    assert not found.at_mode
    assert "not at a minimum" in str(found)
    after = torch.cat([w.flatten() for w in found.result.weights.values()])
    assert found.slope == pytest.approx(49.0 * float(flat(model) @ (after - flat(model))), rel=1e-6)


def test_a_report_reads_the_data_twice(trained):
    model, data, _, _ = trained
    la = Laplace(model, "classification", "all", "diag").fit(data)
    with pytest.raises(TypeError, match="twice"):
        report(la, prune(la, 0.1), iter(data))
    with pytest.raises(ValueError, match="empty"):
        report(la, prune(la, 0.1), [])


def test_single_precision_keeps_its_type():
    case = problem("classification")
    model = copy.deepcopy(case.model).float()
    data = [(x.float(), y) for x, y in case.data]
    la = Laplace(model, "classification", "all", "full").fit(data)
    result = prune(la, 0.5)
    assert all(w.dtype == torch.float32 for w in result.weights.values())
    wide = prune(fitted(case, "full", prior_precision=1.0), 0.5)
    assert torch.equal(result.gone, wide.gone)
    torch.testing.assert_close(result.pruned()(case.x.float()).double(), wide.pruned()(case.x), rtol=1e-4, atol=1e-4)
    assert report(la, result, data).actual == pytest.approx(
        report(fitted(case, "full", prior_precision=1.0), wide, case.data).actual, rel=1e-3
    )
    assert "gone" in str(result)
