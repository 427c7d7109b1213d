"""BackPACK's Hessian backpropagation, of the summed loss, on networks that it takes.

Its averages take the Hessian of the summed loss between modules and mean inputs, so its factors multiply out to our
sum over examples.
"""

import pytest
import torch
from torch import nn

from lapkit.curvature import Categorical, hessian_blocks, hessian_diagonal, hessian_products, kfra

# BackPACK's own hooks make torch warn, since the inputs need no gradient.
pytestmark = [pytest.mark.peer("backpack"), pytest.mark.filterwarnings("ignore:Full backward hook is firing")]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
NETWORKS = {
    "mlp": lambda: (nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), (4,)),
    "convolution": lambda: (
        nn.Sequential(
            nn.Conv2d(2, 3, 2, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.ZeroPad2d(1), nn.Conv2d(3, 2, 2),
            nn.Sigmoid(), nn.Flatten(), nn.Linear(18, 3),
        ),
        (2, 4, 4),
    ),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def problem(request):
    model, shape = NETWORKS[request.param]()
    return model, torch.randn(5, *shape), torch.tensor([0, 1, 2, 1, 0])


def backpack_quantity(model, x, y, *extensions, hook=lambda parameter: None):
    """What one backward pass of BackPACK leaves; `hook` is called with each parameter inside its context."""
    from backpack import backpack, extend

    model = extend(model)
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))(model(x), y)
    with backpack(*extensions):
        loss.backward()
        return [hook(p) for p in model.parameters()]


def test_diagonal(problem):
    from backpack.extensions import DiagHessian

    model, x, y = problem
    found = hessian_diagonal(model, Categorical(), [(x, y)])
    values = [found[name] for name in dict(model.named_parameters())]
    peer = backpack_quantity(model, x, y, DiagHessian(), hook=lambda p: p.diag_h.clone())
    for value, other in zip(values, peer, strict=True):
        torch.testing.assert_close(value, other, **CLOSE)


@pytest.fixture
def residual_once(monkeypatch):
    """BackPACK 1.7.1 multiplies PCHMP's residual with the incoming gradient, which `hessian_diagonal` has in it."""
    from backpack.extensions.curvmatprod.pchmp.pchmpbase import PCHMPBase

    def product(self, ext, module, g_inp, g_out, mat, modify):
        residual = self.modifications[modify](self.derivatives.hessian_diagonal(module, g_inp, g_out))
        return residual * mat

    monkeypatch.setattr(PCHMPBase, "modified_residual_mat_prod", product)


@pytest.mark.parametrize("mode", ["hessian", "ggn", "pch-abs", "pch-clip"])
@pytest.mark.usefixtures("residual_once")
def test_products(problem, mode):
    from backpack.extensions import GGNMP, HMP, PCHMP

    model, x, y = problem
    products = hessian_products(model, Categorical(), [(x, y)], mode=mode)
    vectors = {name: torch.randn(3, p.numel()) for name, p in model.named_parameters()}
    found = products.products(vectors)
    blocks = hessian_blocks(model, Categorical(), [(x, y)], mode=mode).blocks
    kind, field = {"hessian": (HMP, "hmp"), "ggn": (GGNMP, "ggnmp")}.get(mode, (PCHMP, "pchmp"))
    extension = kind(modify=mode.partition("-")[2]) if kind is PCHMP else kind()
    names = {id(p): name for name, p in model.named_parameters()}

    def product(p):
        return getattr(p, field)(vectors[names[id(p)]].view(3, *p.shape)).reshape(3, -1).detach()

    for name, peer in zip(vectors, backpack_quantity(model, x, y, extension, hook=product), strict=True):
        torch.testing.assert_close(found[name], peer, **CLOSE)
        torch.testing.assert_close(vectors[name] @ blocks[name][0], peer, **CLOSE)


def test_kfra():
    from backpack.extensions import KFRA

    model, shape = NETWORKS["mlp"]()
    x, y = torch.randn(5, *shape), torch.tensor([0, 1, 2, 1, 0])
    blocks = kfra(model, Categorical(), [(x, y)]).operator().blocks
    # With reduction "mean" BackPACK has the mean everywhere, as the seeds.
    from backpack import backpack, extend

    loss = extend(nn.CrossEntropyLoss())(extend(model)(x), y)
    with backpack(KFRA()):
        loss.backward()
    for block, p in zip(blocks, model.parameters(), strict=True):
        dense = p.kfra[0] if len(p.kfra) == 1 else torch.kron(*(f.contiguous() for f in p.kfra))
        torch.testing.assert_close(block.to_dense(), 5 * dense, **CLOSE)


@pytest.mark.parametrize("mode", ["hessian", "ggn", "pch-abs", "pch-clip"])
def test_averages(mode):
    """HBP of the released BackPACK keeps mean residuals, changed afterwards, and `E[J^T H J]`."""
    from backpack import backpack, extend
    from backpack.extensions import HBP
    from backpack.extensions.curvature import Curvature
    from backpack.extensions.secondorder.hbp.hbp_options import (
        BackpropStrategy,
        ExpectationApproximation,
        LossHessianStrategy,
    )

    kinds = {
        "hessian": Curvature.HESSIAN,
        "ggn": Curvature.GGN,
        "pch-abs": Curvature.PCH_ABS,
        "pch-clip": Curvature.PCH_CLIP,
    }
    model, shape = NETWORKS["mlp"]()
    x, y = torch.randn(5, *shape), torch.tensor([0, 1, 2, 1, 0])
    blocks = hessian_blocks(model, Categorical(), [(x, y)], mode=mode, averaging="outer").blocks
    extension = HBP(
        kinds[mode],
        LossHessianStrategy.SUM,
        BackpropStrategy.BATCH_AVERAGE,
        ExpectationApproximation.BOTEV_MARTENS,
    )
    loss = extend(nn.CrossEntropyLoss())(extend(model)(x), y)
    with backpack(extension):
        loss.backward()
    for (name, (block,)), p in zip(blocks.items(), model.parameters(), strict=True):
        dense = p.hbp[0] if len(p.hbp) == 1 else torch.kron(*(f.contiguous() for f in p.hbp))
        torch.testing.assert_close(block, 5 * dense, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
