"""Products of the GGN by forward mode, where operations allow it, and as exact where they do not."""

import pytest
import reference_problem as ref
import torch
from networks.functions import NoBatch, WrongForward
from networks.registry import Model
from product_cases import close, slow_ggn, uneven
from torch import nn
from torch.nn import functional as F

from lapkit.curvature import Categorical, Gaussian, GGNProduct, Parameters
from lapkit.curvature.products.recording import CannotReplay
from lapkit.curvature.products.tangents import Tangents


def convolutional(*layers):
    """Six examples of one channel, three classes."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), *layers, nn.Flatten(), nn.Linear(32, 3))


class Rows(nn.Module):
    """A layer for sequences, over the rows of an image."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        result = self.layer(x.flatten(0, 1))
        return (result[0] if isinstance(result, tuple) else result).reshape(x.shape)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)


def swapped(x):
    """The two channels exchanged, by writing into memory that was made beforehand."""
    result = torch.zeros_like(x)
    result[:, :1] += x[:, 1:]
    result[:, 1:].copy_(x[:, :1])
    return result * 1.5


FORWARD = {
    "plain": convolutional,
    "pooling": lambda: convolutional(nn.Upsample(scale_factor=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
    "transposed, in place": lambda: convolutional(
        Model(lambda _, x: (x + 1).transpose(2, 3).mul_(2)), nn.GroupNorm(2, 2)
    ),
    "batch norm": lambda: convolutional(nn.BatchNorm2d(2), nn.Softplus()),
    "attention": lambda: convolutional(Rows(SelfAttention(4, 2, batch_first=True))),
    "transformer": lambda: convolutional(Rows(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True))),
    "written into zeros": lambda: convolutional(Model(lambda _, x: swapped(x)), nn.Tanh()),
}
RECURRENT = {  # overwrite parts of what they have read other parts of, which cannot be told from the same part
    "lstm": lambda: convolutional(Rows(nn.LSTM(4, 4, batch_first=True))),
    "gru": lambda: convolutional(Rows(nn.GRU(4, 4, batch_first=True))),
}
BACKWARD = {
    "no rule": lambda: convolutional(Model(lambda _, x: NoBatch.apply(x)), nn.Tanh()),
    "wrong rule": lambda: convolutional(Model(lambda _, x: WrongForward.apply(x))),
}


@pytest.mark.filterwarnings("ignore:Some operation of this model cannot be differentiated in a batch")
@pytest.mark.parametrize("name", [*FORWARD, *RECURRENT, *BACKWARD])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("together", [True, False])
def test_forward_mode(name, count, together, monkeypatch, unchanged, slow_jacobian):
    """Convolutions go forward where operations allow it, and are exact either way."""
    if not together:
        monkeypatch.setattr("lapkit.curvature.products.data_product.CACHE", 0)
    model = (FORWARD | RECURRENT | BACKWARD)[name]().eval()
    x, y = torch.randn(6, 1, 6, 6), ref.labels()
    data = uneven(x, y)
    product = GGNProduct(model, Categorical(), data)
    vectors = torch.randn(product.size, count)
    with unchanged(model):
        found = product @ vectors
    assert product._forward_mode.possible == (name in FORWARD or (name in RECURRENT and count == 1))
    f = model(x).detach()
    targets = iter(y)
    expected = slow_ggn(slow_jacobian(model, x), f, lambda f, y: F.cross_entropy(f, next(targets)))
    close(found, expected @ vectors)
    close(product @ vectors, found)


def test_graphs_of_a_new_form_are_compared_again():
    """Large inputs take an operation whose rule for forward mode is wrong."""

    class Model(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return WrongForward.apply(y) if float(x.abs().max()) > 100 else y.square()

    model, x = Model(*convolutional()), torch.randn(6, 1, 6, 6)
    x[4] *= 1000
    v = torch.randn(sum(p.numel() for p in model.parameters()), 3)
    product = GGNProduct(model, Gaussian(), [(x[:3], torch.zeros(3, 3)), (x[3:], torch.zeros(3, 3))])
    found = product @ v
    assert not product._forward_mode.possible
    plain = nn.Sequential(model, nn.Identity())
    plain[0].forward = lambda x: nn.Sequential.forward(model, x).square()
    close(found, GGNProduct(plain, Gaussian(), [(x, torch.zeros(6, 3))]) @ v)


def test_blocks_of_convolutions():
    model, data = convolutional().eval(), uneven(torch.randn(6, 1, 6, 6), ref.labels())
    whole, blocks = (GGNProduct(model, Categorical(), data, blocks=b).to_dense() for b in (False, [["0"], ["3"]]))
    close(blocks[:20, :20], whole[:20, :20])
    close(blocks[20:, 20:], whole[20:, 20:])
    assert not blocks[:20, 20:].any()


def test_values_that_are_overwritten_cannot_be_read_again():
    model, x = nn.Linear(3, 3, bias=False), torch.randn(3, 3)

    def run(model):
        factor = x.clone()
        result = model.weight * factor
        factor.zero_()
        return result

    with pytest.raises(CannotReplay, match="overwrites"):
        Tangents(model, run, Parameters.of(model), (torch.randn(3, 3),))
