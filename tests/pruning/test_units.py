"""What goes as a whole, within what it competes, and how many go exactly."""

import pytest
import torch
from dense_laplace import problem
from dense_pruning import fitted
from torch import nn
from torch.nn import functional as F

from lapkit import Laplace
from lapkit.curvature import Parameters
from lapkit.pruning import UNITS, Units, places_of, prune
from lapkit.pruning.kinds import candidates


def built(model, unit, ignore=()):
    parameters = Parameters.of(model)
    return parameters, UNITS[unit](model, parameters, candidates(model, parameters, ignore))


def marked(parameters, members):
    """Which weights of each tensor are among these, by name."""
    flat = torch.zeros(parameters.numel, dtype=torch.bool)
    flat[members] = True
    return {n: m for n, m in parameters.split(flat).items() if m.any()}


def test_biases_and_norms_are_no_candidates():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm([4, 2, 2]), nn.Flatten(), nn.Linear(16, 2)
    )
    parameters, units = built(model, "weight")
    assert set(marked(parameters, units.members)) == {"0.weight", "4.weight"}
    assert units.names == ("0.weight", "4.weight")
    assert len(units) == 36 + 32
    _, units = built(model, "weight", ["4"])
    assert units.names == ("0.weight",)
    with pytest.raises(ValueError, match="nonsense"):
        built(model, "weight", ["nonsense"])
    with pytest.raises(ValueError, match="no weight matrix is left"):
        built(model, "weight", ["0", "4"])


def test_a_row_has_its_bias():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4, bias=False))
    parameters, units = built(model, "row")
    assert units.counts.tolist() == [9] * 3 + [12] * 4
    mark = marked(parameters, units.groups()[1])
    assert mark["0.weight"][1].all()
    assert mark["0.weight"].sum() == 8
    assert mark["0.bias"].tolist() == [False, True, False]


def test_rows_of_transposed_convolutions_and_recurrent_layers():
    parameters, units = built(nn.ConvTranspose2d(2, 3, 2), "row")
    mark = marked(parameters, units.groups()[2])
    assert mark["weight"][:, 2].all()
    assert mark["weight"].sum() == 8
    assert mark["bias"].tolist() == [False, False, True]
    parameters, units = built(nn.GRU(3, 2), "row")
    mark = marked(parameters, units.groups()[4])
    assert set(mark) == {"weight_ih_l0", "bias_ih_l0"}
    assert mark["bias_ih_l0"].nonzero().tolist() == [[4]]


def test_a_filter_is_all_that_leads_in_and_out():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(8, 3),
        nn.Tanh(),
        nn.Linear(3, 2),
    )
    parameters, units = built(model, "neuron")
    assert len(units) == 2 + 3
    mark = marked(parameters, units.groups()[1])
    assert set(mark) == {"0.weight", "0.bias", "1.0.weight", "1.0.bias", "3.weight"}
    assert mark["3.weight"][:, 4:].all()  # channel 1 at its four positions
    assert not mark["3.weight"][:, :4].any()
    removed = prune(
        Laplace(model.eval(), "classification", "all", "diag").fit([(torch.randn(6, 1, 4, 4), torch.arange(6) % 2)]),
        0.4,
        "magnitude",
        unit="neuron",
    )
    assert removed.units == (5, 2)
    _, units = built(model, "filter")
    assert len(units) == 2  # filters are of convolutions


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Linear(2, 2), nn.Bilinear(2, 2, 2), nn.Linear(2, 2)], "1 \\(Bilinear\\) is no part of a chain"),
        ([nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2)], "2 groups"),
        ([nn.Linear(2, 3), nn.Flatten(), nn.Linear(6, 2)], "6 inputs"),
        ([nn.Conv2d(1, 2, 1), nn.Flatten(2), nn.Linear(4, 2)], "flattens axes 2"),
        ([nn.Conv2d(1, 2, 1), nn.Linear(4, 2)], "does not read the outputs"),
        ([nn.Linear(4, 4), nn.MaxPool1d(2), nn.Linear(4, 2)], "mixes the outputs"),
        ([nn.Linear(2, 2)], "no hidden layer"),
    ],
)
def test_no_chain_no_neurons(layers, message):
    with pytest.raises(ValueError, match=message):
        built(nn.Sequential(*layers), "neuron")


class Attention(nn.Module):
    """As transformers writes it."""

    def __init__(self, width=8, heads=2):
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("separate", [True, False])
def test_a_head_without_its_weights_says_nothing(separate):
    """With one head's weights at zero the layer gives what the other heads give."""
    if separate:
        model, call = Attention(), lambda m, x: m(x)
    else:
        model, call = nn.MultiheadAttention(8, 2, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]
        nn.init.normal_(model.in_proj_bias)
    parameters, units = built(model, "head")
    assert len(units) == 2
    first, second = (set(g.tolist()) for g in units.groups())
    assert not first & second
    x, total = torch.randn(3, 5, 8), torch.zeros(3, 5, 8)
    with torch.no_grad():
        for kept in (first, second):
            vector = torch.zeros(parameters.numel)
            vector[sorted(kept)] = parameters.vector()[sorted(kept)]
            named = {f"model.{n}": v for n, v in parameters.split(vector).items()}
            total = total + torch.func.functional_call(Wrapped(model, call), named, (x,))
        bias = model.o_proj.bias if separate else model.out_proj.bias
        torch.testing.assert_close(total + bias, call(model, x))


class Wrapped(nn.Module):
    def __init__(self, model, call):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x):
        return self.call(self.model, x)


def test_heads_that_share_keys_and_values_are_refused():
    model = Attention(width=16, heads=4)
    model.k_proj, model.v_proj = nn.Linear(16, 8), nn.Linear(16, 8)  # two heads for four of queries
    with pytest.raises(ValueError, match="No attention layer"):
        built(model, "head")


def test_heads_need_attention():
    with pytest.raises(ValueError, match="No attention layer"):
        built(nn.Linear(2, 2), "head")


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.5, 0.87])
def test_counts_are_exact_also_under_ties(sparsity):
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 5))
    for p in model.parameters():
        nn.init.constant_(p, 0.25)
    la = Laplace(model, "classification", "all", "diag").fit([(torch.ones(4, 7), torch.arange(4))])
    for scope in ("global", "layer", "row"):
        result = prune(la, sparsity, "magnitude", scope=scope)
        per = {"global": [108], "layer": [63, 45], "row": [7] * 9 + [9] * 5}[scope]
        gone = torch.cat([result.gone[:63], result.gone[72:117]])
        pools = gone.split(per)
        assert [int(p.sum()) for p in pools] == [round(sparsity * n) for n in per]


def test_the_lowest_go_first_within_their_scope():
    case = problem("classification", "mlp")
    la = fitted(case, "diag")
    for scope in ("global", "layer", "row"):
        result = prune(la, 0.5, "magnitude", scope=scope)
        masks = result.masks_by_name
        sizes = {n: dict(case.model.named_parameters())[n].detach().abs() for n in masks}
        flat, kept = (torch.cat([d[n].flatten() for n in masks]) for d in (sizes, masks))
        if scope == "global":
            assert flat[kept == 0].max() < flat[kept == 1].min()
        rows = [(s, m) for n in masks for s, m in zip(sizes[n], masks[n], strict=True)]
        for size, mask in rows if scope == "row" else [(sizes[n], masks[n]) for n in masks] * (scope == "layer"):
            assert size[mask == 0].max() < size[mask == 1].min()


def test_patterns_are_along_the_inputs():
    model = nn.Sequential(nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    la = Laplace(model, "classification", "all", "full").fit([(torch.randn(5, 4, 3, 3), torch.arange(5) % 4)])
    for criterion in ("magnitude", "obs"):
        masks = prune(la, (1, 4), criterion).masks
        assert (masks[model[0], "weight"].sum(1) == 1).all()
        assert (masks[model[2], "weight"].reshape(4, 3, 4).sum(-1) == 1).all()
    largest = model[0].weight.detach().abs().argmax(1)
    assert torch.equal(prune(la, (1, 4), "magnitude").masks[model[0], "weight"].argmax(1), largest)
    stepped = prune(la, (2, 4), step=0.05)
    assert (stepped.masks[model[0], "weight"].sum(1) == 2).all()
    with pytest.raises(ValueError, match=r"0\.weight has 4 inputs, not a multiple of 5"):
        prune(la, (2, 5))
    for wrong in ((4, 4), (1.5, 2)):
        with pytest.raises(ValueError, match="0 < n < m"):
            prune(la, wrong)
    with pytest.raises(ValueError, match="single weights"):
        prune(la, (2, 4), unit="row")


def test_weights_that_are_zero_already_count_once():
    model = nn.Linear(6, 4)
    with torch.no_grad():
        model.weight[:, :2] = 0
    la = Laplace(model, "classification", "all", "full").fit([(torch.randn(9, 6), torch.arange(9) % 4)])
    for sparsity in (0.25, 0.5):
        for criterion in ("magnitude", "obs", "random"):
            result = prune(la, sparsity, criterion)
            assert int(result.gone.sum()) == result.units[1] == round(sparsity * 24)
    assert (prune(la, 0.5, "magnitude").masks[model, "weight"][:, :2] == 0).all()


def test_a_layer_never_vanishes():
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
    with torch.no_grad():
        model[2].weight.mul_(1e-3)
    la = Laplace(model, "classification", "all", "diag").fit([(torch.randn(9, 4), torch.arange(9) % 3)])
    kept = prune(la, 0.6, "magnitude").masks[model[2], "weight"]
    assert kept.sum() == 1
    kept = prune(la, 0.5, "magnitude", floor=0.2).masks[model[2], "weight"]
    assert kept.sum() == 6
    with pytest.raises(ValueError, match="lower the floor"):
        prune(la, 0.9, "magnitude", floor=0.2)
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        prune(la, 0.5, floor=1.0)


@pytest.mark.parametrize(("scope", "gone"), [("layer", 30 + 22), ("row", 3 * 10 + 7 * 3)])
def test_a_floor_that_keeps_what_a_sparsity_would_take_is_said(scope, gone):
    """Of 40 and 30 weights, in rows of 4 and 10, a quarter stays and, of rows of ten, 3; nine in ten were to go."""
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3))
    la = Laplace(model, "classification", "all", "diag").fit([(torch.randn(9, 4), torch.arange(9) % 3)])
    wanted = {"layer": 36 + 27, "row": 10 * 3 + 3 * 9}[scope]
    words = rf"floor 0\.25 keeps {wanted - gone} units .* 0\.9 in each {scope} .* {gone} of 70 go"
    with pytest.warns(UserWarning, match=words) as record:
        result = prune(la, 0.9, "magnitude", scope=scope, floor=0.25)
    assert record[0].filename == __file__
    assert result.units == (70, gone)
    assert prune(la, 0.7, "magnitude", scope=scope, floor=0.25).units == (70, {"layer": 49, "row": 51}[scope])


def test_settings_that_make_no_sense_say_so():
    la = fitted(problem("classification"), "diag")
    with pytest.raises(ValueError, match="sparsity or a threshold"):
        prune(la)
    with pytest.raises(ValueError, match="sparsity or a threshold"):
        prune(la, 0.5, threshold=0.1)
    for wrong in (1.0, [2, 4], float("nan")):
        with pytest.raises(ValueError, match="fraction in"):
            prune(la, wrong)
    with pytest.raises(ValueError, match="NaN"):
        prune(la, threshold=float("nan"))
    with pytest.raises(ValueError, match=r"fraction in .* got 'half'"):
        prune(la, "half")
    with pytest.raises(ValueError, match="None of Conv1d, Conv2d, Conv3d"):
        prune(la, 0.5, unit="filter")
    for wrong in ({"criterion": "obx"}, {"unit": "wait"}, {"scope": "world"}):
        with pytest.raises(ValueError, match=str(*wrong.values())):
            prune(la, 0.5, **wrong)
    with pytest.raises(ValueError, match="places 0 to"):
        prune(la, 0.5, unit=Units.of([torch.tensor([9999])], [0], ["mine"]))
    with pytest.raises(ValueError, match="at least one weight"):
        Units.of([], [], [])
    with pytest.raises(RuntimeError, match="fit"):
        prune(Laplace(problem("classification").model, "classification", "all", "diag"), 0.5)


def test_places_are_those_of_the_flat_vector():
    model = problem("classification").model
    parameters = Parameters.of(model)
    for name, tensor in model.named_parameters():
        assert torch.equal(parameters.vector()[places_of(parameters, name)], tensor.detach())
