"""Class weights, label smoothing and missing targets mean what they mean for torch's own losses."""

import oracles
import pytest
import torch
from likelihood_cases import close, independent, mean_of_columns, outer, possible
from torch import distributions
from torch.nn import functional

from lapkit.curvature import Bernoulli, Categorical, Draws

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
OPTIONS = {
    "missing": {},
    "another index": {"ignore_index": 1},
    "weights": {"class_weights": WEIGHTS},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothing": {"label_smoothing": 1.0},
    "both": {"class_weights": WEIGHTS, "label_smoothing": 0.3},
    "all three": {"class_weights": WEIGHTS, "label_smoothing": 0.3, "ignore_index": -1},
}


def classes(options, *shape):
    """A likelihood, torch's own loss of one row with these options, outputs, and targets some of which are missing."""
    likelihood = Categorical(**options)
    y = torch.randint(4, shape)
    y.view(-1)[::4] = likelihood.ignore_index

    def loss(f, y):
        return functional.cross_entropy(
            f[None],
            y[None],
            weight=options.get("class_weights"),
            ignore_index=likelihood.ignore_index,
            label_smoothing=options.get("label_smoothing", 0.0),
            reduction="sum",
        )

    return likelihood, loss, 2 * torch.randn(*shape, 4), y


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", [(9,), (3, 5)], ids=["examples", "positions"])
def test_weighted_classes_are_those_of_torch(options, shape):
    likelihood, loss, f, y = classes(options, *shape)
    assert torch.equal(likelihood.check(f, y), y)
    rows = torch.stack([loss(f_n, y_n) for f_n, y_n in zip(f.flatten(0, -2), y.flatten(), strict=True)])
    close(likelihood.loss(f, y), rows.reshape(len(f), -1).sum(1))
    hessian = oracles.output_hessian(loss, f.flatten(0, -2), y.flatten()).unflatten(0, shape)
    close(outer(likelihood.hessian_root(f, y)), hessian)
    close(outer(likelihood.class_root(f, y, torch.arange(4))), hessian)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_weighted_classes_are_sampled_without_bias(options):
    likelihood, loss, f, y = classes(options, 9)
    outcomes = possible(likelihood, f, lambda f: distributions.Categorical(logits=f))
    close(mean_of_columns(likelihood, f, y, outcomes), oracles.output_hessian(loss, f, y))


def test_examples_without_a_target_add_nothing():
    f, y = torch.randn(3, 4), torch.full((3,), -100)
    likelihood = Categorical()
    assert torch.equal(likelihood.check(f, y), y)
    assert not likelihood.loss(f, y).any()
    assert not likelihood.hessian_root(f, y).any()
    assert not likelihood.loss_gradient(f, y).any()
    assert not likelihood.sampled_column(f, y, Draws.fresh(3)).any()


ANSWERS = {
    "weights": {"pos_weight": torch.tensor([0.5, 3.0, 1.0], dtype=torch.float64)},
    "missing": {"missing": -1},
    "missing NaN": {"missing": float("nan")},
    "both": {"pos_weight": torch.tensor([0.0, 3.0, 1.0], dtype=torch.float64), "missing": float("nan")},
}


@pytest.mark.parametrize("options", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("shape", [(9,), (3, 5)], ids=["examples", "positions"])
def test_weighted_answers_are_those_of_torch(options, shape):
    likelihood, f = Bernoulli(**options), 2 * torch.randn(*shape, 3)
    known, yes = torch.rand(*shape, 3) < 0.7, torch.randint(2, (*shape, 3)).double()
    if "missing" not in options:
        known |= True
    y = torch.where(known, yes, options.get("missing", 0.0))
    torch.testing.assert_close(likelihood.check(f, y), y, rtol=0, atol=0, equal_nan=True)

    def loss(f, both):
        yes, known = both
        options_of_torch = {"weight": known, "pos_weight": options.get("pos_weight"), "reduction": "sum"}
        return functional.binary_cross_entropy_with_logits(f, yes, **options_of_torch)

    pairs = list(zip(yes.flatten(0, -2), known.flatten(0, -2).double(), strict=True))
    rows = torch.stack([loss(f_n, both) for f_n, both in zip(f.flatten(0, -2), pairs, strict=True)])
    close(likelihood.loss(f, y), rows.reshape(len(f), -1).sum(1))
    hessian = oracles.output_hessian(loss, f.flatten(0, -2), pairs).unflatten(0, shape)
    close(outer(likelihood.hessian_root(f, y)), hessian)
    assert torch.isfinite(likelihood.loss_gradient(f, y)).all()
    if len(shape) == 1:
        outcomes = possible(likelihood, f, lambda f: independent(distributions.Bernoulli(logits=f)))
        close(mean_of_columns(likelihood, f, y, outcomes), hessian)


@pytest.mark.parametrize(
    "likelihood",
    [Categorical(class_weights=WEIGHTS[:3]), Bernoulli(pos_weight=WEIGHTS[:3])],
    ids=["classes", "answers"],
)
def test_a_weighted_hessian_needs_targets(likelihood):
    with pytest.raises(ValueError, match=r"hessian_root\(f, y\)"):
        likelihood.hessian_root(torch.zeros(4, 3))
