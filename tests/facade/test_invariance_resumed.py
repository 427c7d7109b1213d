"""Learning an invariance: resumed from a checkpoint, and in the type of the network."""

import copy

import pytest
import torch
from torch import nn

from lapkit import Laplace
from lapkit.invariance import InvariantModel, evidence_over_transform, learn_invariance, posterior_directions
from lapkit.marglik import marglik_training
from lapkit.transforms import AffineTransform

OPTIONS = {"n_directions": 2, "n_steps": 2, "frequency": 2, "optimizer_options": {"lr": 0.05}}


def network(kinds=("rotation",)):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 2))
    return InvariantModel(body, AffineTransform(kinds), 3)


def data(n=30):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 4, 4, generator=generator)
    return [(x, (x[:, 0, :2].mean((1, 2)) > 0).long())]


@pytest.mark.parametrize("own_generator", [True, False])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, own_generator):
    """Ended after seven epochs, and gone on with by other objects: the same bits as twelve epochs at once."""

    def learn(model, n_epochs, **options):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(7) if own_generator else None
        return learn_invariance(model, data(), n_epochs=n_epochs, generator=generator, **OPTIONS, **options)

    whole = learn(network(), 12)
    file = tmp_path / "training"
    learn(network(), 7, checkpoint=file)
    again = learn(network(), 12, checkpoint=file)
    assert again.training.log_evidences == whole.training.log_evidences
    assert len(again.transforms) == len(whole.transforms) == 6
    for one, two in zip(again.transforms, whole.transforms, strict=True):
        assert torch.equal(one["logit"], two["logit"])
    for one, two in zip(*(t.laplace.model.state_dict().values() for t in (again, whole)), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_of_another_kind_of_training_is_refused(tmp_path):
    file, model = tmp_path / "training", network()
    marglik_training(model, data(), "classification", "kron_reduce", n_epochs=1, checkpoint=file)
    with pytest.raises(ValueError, match="keeps"):
        learn_invariance(model, data(), n_epochs=2, checkpoint=file, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_the_default_type_does_not_matter(default, dtype):
    """A network in float64 under torch's own default, float32."""
    reference = network(("rotation", "shift_x"))
    x, y = data()[0]
    torch.set_default_dtype(default)
    inner = copy.deepcopy(reference.model).to(dtype)
    model = InvariantModel(inner, AffineTransform(("rotation", "shift_x")), 3)
    assert {t.dtype for t in model.state_dict().values()} == {dtype}
    found = model(x.to(dtype))
    torch.testing.assert_close(found.double(), reference(x), rtol=1e-4, atol=1e-5)
    la = Laplace(model, "classification", "all", "full").fit([(x.to(dtype), y)])
    value, gradient = evidence_over_transform(la, [(x.to(dtype), y)], posterior_directions(la, 2))
    assert value < 0
    assert gradient["logit"].dtype == dtype
