"""Checkpoints of training with the evidence in the loop: what goes on, and what is refused and why."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.compat.laplace import marglik_training as compat_training
from lapkit.curvature import FromLogProb, Gaussian, PerOutputGaussian
from lapkit.invariance import InvariantModel, learn_invariance
from lapkit.marglik import marglik_training
from lapkit.marglik_settings import plain
from lapkit.transforms import AffineTransform


def data(n=24, batch_size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, generator=generator) * 6 - 3
    y = x.sin() + 0.2 * torch.randn(n, 1, generator=generator)
    return list(zip(x.split(batch_size), y.split(batch_size), strict=True))


def network(width=3, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))


def nothing(la):
    """An `after_fit`."""


def plainly(model, x):
    return model(x)


START = {
    "likelihood": "regression",
    "hessian_structure": "kron",
    "optimizer_options": {"lr": 0.02},
    "scheduler": torch.optim.lr_scheduler.StepLR,
    "scheduler_options": {"step_size": 5},
    "n_epochs": 3,
    "burn_in": 1,
    "n_hypersteps": 2,
    "sigma_noise": 0.5,
}


def train(file, model=None, batches=None, **changed):
    options = START | changed
    return marglik_training(model or network(), batches or data(), checkpoint=file, **options)


@pytest.fixture
def file(tmp_path):
    """A checkpoint of `START` after three epochs."""
    path = tmp_path / "training.pt"
    train(path)
    return path


def trained(found):
    return [*found.losses, *found.log_evidences, *(p.tolist() for p in found.model.state_dict().values())]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"patience": 50},
        {"progress_bar": True},
        {"memory_budget": 10**8},
        {"optimizer_options": {"lr": np.float64(0.02)}},
    ],
)
def test_more_epochs_go_on_bit_for_bit(tmp_path, changed):
    x, y = data(batch_size=24)[0]
    shuffled = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    whole = train(tmp_path / "whole.pt", batches=shuffled, n_epochs=6)
    train(tmp_path / "half.pt", batches=shuffled)
    again = train(tmp_path / "half.pt", network(seed=9), shuffled, n_epochs=6, **changed)
    assert again.epochs == 6
    assert trained(again) == trained(whole)


DIFFERENT = {
    "hessian_structure": ("diag", "given 'diag', stored 'kron'"),
    "likelihood": (Gaussian(0.5), "given 'Gaussian(noise=0.5)', stored 'regression'"),
    "temperature": (0.5, "given 0.5, stored 1.0"),
    "prior_structure": ("scalar", "given 'scalar', stored 'layerwise'"),
    "prior_precision": (3.0, "given 3.0, stored 1.0"),
    "prior_mean": (0.1, "given 0.1, stored 0.0"),
    "sigma_noise": (1.0, "given 1.0, stored 0.5"),
    "tune_noise": (False, "given False, stored True"),
    "curvature": ("ef", "given 'ef', stored 'ggn'"),
    "optimizer": (torch.optim.SGD, "given 'torch.optim.sgd.SGD', stored 'torch.optim.adam.Adam'"),
    "optimizer_options": ({"lr": 0.1}, "given {'lr': 0.1}, stored {'lr': 0.02}"),
    "scheduler": (None, "given None, stored 'torch.optim.lr_scheduler.StepLR'"),
    "scheduler_options": ({"step_size": 4}, "given {'step_size': 4}, stored {'step_size': 5}"),
    "subset_of_weights": (["2"], "given ['2.weight', '2.bias'], stored 'all'"),
    "burn_in": (0, "given 0, stored 1"),
    "frequency": (2, "given 2, stored 1"),
    "n_hypersteps": (3, "given 3, stored 2"),
    "n_data": (100, "given 100, stored None"),
    "after_fit": (nothing, f"given '{__name__}.nothing', stored None"),
    "forward_fn": (plainly, f"given '{__name__}.plainly', stored None"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_setting_is_refused_by_name(file, name):
    value, told = DIFFERENT[name]
    changed = {name: value, "n_epochs": 9}
    if name == "likelihood":
        changed["sigma_noise"] = 1.0  # it has its own
    if name == "scheduler":
        changed["scheduler_options"] = None
    model = network(seed=9)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=re.escape(f"{name}, {told}")) as caught:
        train(file, model, **changed)
    assert str(file) in str(caught.value)
    others = {"likelihood": {"sigma_noise"}, "scheduler": {"scheduler_options"}}.get(name, set())
    if name == "n_data":
        others = {"batches of the data", "examples of the data"}
    named = re.findall(r"([\w ]+), given ", str(caught.value))
    assert {n.strip() for n in named} == {name} | others
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_all_that_differs_is_in_one_error(file):
    with pytest.raises(ValueError, match="another training") as caught:
        train(file, batches=data(30, 5), temperature=2.0, frequency=2)
    for told in ("temperature, given 2.0", "frequency, given 2", "batches of the data, given 6, stored 3"):
        assert told in str(caught.value)
    assert "examples of the data, given 30, stored 24" in str(caught.value)


def test_data_of_another_number_of_examples(file):
    with pytest.raises(ValueError, match="examples of the data, given 23, stored 24"):
        train(file, batches=data(23))


def test_passes_of_a_random_number_of_examples_go_on_with_n_data(tmp_path):
    """Of such a loader the number of one pass says nothing, which is why it is given."""
    train(tmp_path / "training.pt", batches=data(30, 5), n_data=40)
    assert train(tmp_path / "training.pt", batches=data(24, 8), n_data=40, n_epochs=4).epochs == 4


@pytest.mark.parametrize("other", [lambda: network(4), lambda: network().float()], ids=["shape", "type"])
def test_another_network_is_refused_and_not_written_to(file, other):
    model = other()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="another network"):
        train(file, model, [(x.to(before[0].dtype), y.to(before[0].dtype)) for x, y in data()])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_other_weights_frozen(file):
    model = network()
    model[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"trainable parameters, given \['0.weight', '2.weight'"):
        train(file, model)


def test_learning_an_invariance_refuses_another_training_too(tmp_path):
    def learn(n_epochs, **options):
        torch.manual_seed(0)
        model = InvariantModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), AffineTransform(("rotation",)), 3)
        images = [(torch.randn(6, 1, 4, 4), torch.arange(6) % 2)]
        file = tmp_path / "training.pt"
        return learn_invariance(model, images, n_steps=1, n_epochs=n_epochs, checkpoint=file, **options)

    learn(1)
    with pytest.raises(ValueError, match=r"another training: temperature, given 0\.5, stored 1\.0\. Give"):
        learn(2, temperature=0.5)
    assert learn(2).training.epochs == 2


def test_the_file_is_read_without_running_anything(tmp_path):
    """Settings that no such file could hold as they are."""
    options = {
        "optimizer": partial(torch.optim.SGD, momentum=0.5),
        "optimizer_options": {"lr": np.float64(0.02)},
        "likelihood": FromLogProb(lambda f, y: -(f - y).square().sum(-1)),
        "sigma_noise": 1.0,
        "scheduler": torch.optim.lr_scheduler.LambdaLR,
        "scheduler_options": {"lr_lambda": lambda epoch: np.float64(0.9) ** epoch},
        "prior_precision": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "after_fit": nothing,
        "forward_fn": plainly,
    }
    file = tmp_path / "training.pt"
    train(file, **options)
    found = torch.load(file, weights_only=True)
    assert found["format"] == 2
    assert found["settings"]["optimizer"] == "torch.optim.sgd.SGD with [] and {'momentum': 0.5}"
    assert "0x" not in str(found["settings"])  # addresses differ from process to process
    again = options | {"scheduler_options": {"lr_lambda": options["scheduler_options"]["lr_lambda"]}}
    assert train(file, **again, n_epochs=4).epochs == 4
    with pytest.raises(ValueError, match=r"prior_precision, given 'tensor \(4,\) of digest .*, stored 'tensor \(4,\)"):
        train(file, **options | {"prior_precision": torch.tensor([1.0, 2.0, 3.0, 5.0])})


def test_plain_words():
    class Callback:
        def __call__(self, la):
            pass

    assert plain([True, np.int64(3), np.float32(0.5), torch.tensor([2.0]), None]) == [True, 3, 0.5, 2.0, None]
    assert [type(plain(n)) for n in (np.int64(3), np.float64(0.5))] == [int, float]
    assert plain(Callback()) == plain(Callback()) == f"{__name__}.test_plain_words.<locals>.Callback"
    assert plain(torch.arange(3)) == plain(np.arange(3)) != plain(torch.arange(1, 4))
    one, two, three = (plain(PerOutputGaussian(torch.tensor([1.0, s]))) for s in (2.0, 3.0, 2.0))
    assert one == three != two
    assert plain(object()) == plain(object())


# -- what is no checkpoint


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more", bytes(range(256)), b"\x80\x02}q\x00."])
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt.* no checkpoint of marglik_training.* begin anew"):
        train(path)
    assert path.read_bytes() == content


def test_half_a_file(file):
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        train(file)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(3), "holds a Tensor, which is no checkpoint"),
        ({"weight": torch.zeros(3)}, r"holds a dict of \['weight'\], which is no checkpoint"),
        ({"format": "lapkit.laplace"}, "which is no checkpoint"),
        ({"format": 2}, "which is no checkpoint"),
        ({"format": 1, "state": {}, "weights": {}}, "format 1; this version of lapkit reads format 2"),
        ({"format": 3, "state": {}, "weights": {}}, "format 3; this version of lapkit reads format 2"),
    ],
)
def test_another_file_of_torch(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "other.pt")


def test_a_missing_folder_is_told_before_training(tmp_path):
    model = network()
    model.register_forward_hook(lambda *_: pytest.fail("the network was run"))
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing for the checkpoint 'training.pt'"):
        train(tmp_path / "missing" / "training.pt", model)
    with pytest.raises(IsADirectoryError, match="give a name in it"):
        train(tmp_path, model)
    assert list(tmp_path.iterdir()) == []


def test_a_name_without_a_folder_is_a_file_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("training.pt")
    assert Path("training.pt").exists()


@pytest.mark.parametrize("once", [iter, lambda batches: (batch for batch in batches)], ids=["iterator", "generator"])
def test_data_for_one_pass_only(once):
    with pytest.raises(TypeError, match=r"many times\. Give a data loader or a list"):
        marglik_training(network(), once(data()), "regression", n_epochs=2)
    with pytest.raises(TypeError, match=r"many times\. Give a data loader or a list"):
        compat_training(network(), once(data()), "regression", n_epochs=2)


def test_names_of_weights_may_come_from_a_generator():
    one, two = (
        marglik_training(
            network(), data(), "regression", n_epochs=2, subset_of_weights=names, tune_noise=False
        ).log_evidences
        for names in (["0"], (name for name in ["0"]))
    )
    assert one == two
