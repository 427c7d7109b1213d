"""Corrected eigenvalues against the dense block in the same basis, and what makes them better than KFAC's."""

import itertools

import pytest
import torch
from fitting import fit, likelihood_for
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lapkit.curvature import (
    Categorical,
    EigenvalueSum,
    EKFACCorrection,
    GGNBlocks,
    GGNDiagonal,
    GGNKronecker,
    Kronecker,
    MonteCarloGGN,
    Parameters,
    accumulate,
    ekfac,
)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def basis_of(block):
    """The eigenvectors of one block, (P, P)."""
    left = torch.eye(block.values.shape[1])[None] if block.left is None else block.left
    pairs = zip(left.contiguous(), block.right.contiguous(), strict=True)
    return torch.block_diag(*[torch.kron(l_, r) for l_, r in pairs])


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_every_block_of_every_network(network, setting):
    """`diag(Q^T H Q)` of the exact block H, in the basis of KFAC; nearer to H than KFAC is, and of its trace."""
    model, inputs = network
    x = inputs(5)
    likelihood, y, _ = likelihood_for(model, x)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    exact, kfac = fit(model, batches, GGNBlocks, lambda p: GGNKronecker(p, setting), likelihood=likelihood)
    found = ekfac(model, likelihood, batches, setting=setting).operator()
    blocks = zip(exact.operator().blocks, kfac.operator().blocks, found.blocks, strict=True)
    for block, uncorrected, corrected in blocks:
        dense = block.to_dense()
        if isinstance(corrected, Kronecker):  # else zero: the outputs do not depend on it
            close(corrected.to_dense(), _in_basis(dense, basis_of(corrected)))
            close(basis_of(corrected), basis_of(uncorrected.eigen))
        error, before = (corrected.to_dense() - dense).norm(), (uncorrected.to_dense() - dense).norm()
        assert error <= before + 1e-10 * dense.norm()
        close(corrected.trace(), block.trace())


def _in_basis(dense, basis):
    return basis @ torch.diag((basis.T @ dense @ basis).diagonal()) @ basis.T


def test_it_is_better_than_kfac_where_that_is_not_exact():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batches = [(3 * torch.randn(20, 4), torch.arange(20) % 3)]
    exact, kfac = fit(model, batches, GGNBlocks, GGNKronecker)
    found = ekfac(model, Categorical(), batches).operator()
    block, before, after = (o.blocks[0].to_dense() for o in (exact.operator(), kfac.operator(), found))
    assert (after - block).norm() < 0.95 * (before - block).norm()


def test_squares_are_of_examples_and_not_of_tokens():
    """Squares of each token would leave out the products between positions, which have a large part here."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 3))
    x, y = torch.randn(6, 1, 3).expand(6, 5, 3).contiguous(), torch.arange(6) % 3
    (exact,) = fit(model, [(x, y)], GGNBlocks)
    found = ekfac(model, Categorical(), [(x, y)]).operator()
    close(found.blocks[0].trace(), exact.operator().blocks[0].trace())


@pytest.mark.parametrize("network", ["mlp", "sequence_pooled"], indirect=True)
def test_parts_of_the_data_add_up_in_one_basis(network):
    model, inputs = network
    x, y = inputs(6), torch.arange(6) % 3
    (basis,) = fit(model, [(x, y)], GGNKronecker)
    one, two, whole = (
        fit(model, [(x[p], y[p])], lambda p: EKFACCorrection(p, basis))[0] for p in (slice(2), slice(2, 6), slice(6))
    )
    close((one + two).operator().to_dense(), whole.operator().to_dense())
    close((one.operator() + two.operator()).to_dense(), whole.operator().to_dense())
    close(whole.operator().to_dense(), ekfac(model, Categorical(), [(x, y)]).operator().to_dense())
    (other,) = fit(model, [(x[:2], y[:2])], GGNKronecker)
    (three,) = fit(model, [(x, y)], lambda p: EKFACCorrection(p, other))
    with pytest.raises(ValueError, match="eigenvalues in different bases do not add up"):
        one + three
    with pytest.raises(TypeError, match="two Kronecker products is none"):
        one.operator() + three.operator()


def test_stored(tmp_path):
    model, batches = nn.Linear(4, 3), [(torch.randn(3, 4), torch.arange(3))]
    (basis,) = fit(model, batches, GGNKronecker)
    (result,) = fit(model, batches, lambda p: EKFACCorrection(p, basis))
    result.save(tmp_path / "ekfac.safetensors")
    again = EigenvalueSum.load(tmp_path / "ekfac.safetensors")
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in result.tensors.items())
    close(again.operator().to_dense(), result.operator().to_dense())
    close((again + result).operator().to_dense(), 2 * result.operator().to_dense())


def test_a_weight_counts_an_example_as_often():
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(4, 4), torch.arange(4) % 3
    times = torch.tensor([2, 0, 1, 3])
    repeated = torch.arange(4).repeat_interleave(times)
    weighted = ekfac(model, Categorical(), [(x, y, times.double())]).operator()
    close(weighted.to_dense(), ekfac(model, Categorical(), [(x[repeated], y[repeated])]).operator().to_dense())


def test_both_passes_draw_the_same_numbers():
    """The trace is that of the diagonal under the same numbers, and the generator moves on as after one pass."""
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(8, 4), torch.arange(8) % 3
    columns, parameters = MonteCarloGGN(2), Parameters.of(model)
    diagonal, kfac = GGNDiagonal(parameters), GGNKronecker(parameters)
    once, twice = (torch.Generator().manual_seed(3) for _ in range(2))
    accumulate(model, parameters, Categorical(), columns, [(x, y)], [diagonal, kfac], generator=once)
    found = ekfac(model, Categorical(), [(x, y)], columns=columns, generator=twice).operator()
    close(found.trace(), diagonal.result().operator().trace())
    close(found.blocks[0].left, kfac.result().operator().blocks[0].eigen.left)
    assert torch.equal(once.get_state(), twice.get_state())


def test_a_shuffled_loader_and_a_selection():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    data = TensorDataset(torch.randn(10, 4), torch.arange(10) % 3)
    found = ekfac(model, Categorical(), DataLoader(data, batch_size=3, shuffle=True), parameters=["2"]).operator()
    close(found.to_dense(), ekfac(model, Categorical(), [data[:]], parameters=["2"]).operator().to_dense())
    assert found.size == 18


def test_data_that_cannot_be_seen_twice():
    model, batch = nn.Linear(4, 3), (torch.randn(3, 4), torch.arange(3))
    for once in (iter([batch]), (b for b in [batch]), zip([batch[0]], [batch[1]], strict=True)):
        with pytest.raises(TypeError, match=r"twice.*used up after once.*data loader or a list"):
            ekfac(model, Categorical(), once)

    class Growing:
        def __init__(self):
            self.count = itertools.count(1)

        def __iter__(self):
            return iter([batch] * next(self.count))

    with pytest.raises(ValueError, match="first pass over the data saw 3 examples and the second 6"):
        ekfac(model, Categorical(), Growing())


def test_a_basis_of_other_weights():
    data = [(torch.randn(3, 4), torch.arange(3))]
    (basis,) = fit(nn.Linear(4, 3), data, GGNKronecker)
    with pytest.raises(ValueError, match="same selection of the same model"):
        EKFACCorrection(Parameters.of(nn.Linear(4, 2)), basis)


@pytest.mark.peer("curvlinops")
@pytest.mark.parametrize("kind", ["mlp", "sequence", "convolution"])
def test_curvlinops(kind):
    """One batch, weights only."""
    from curvlinops import EKFACLinearOperator

    model, shape = {
        "mlp": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
        "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (3, 4)),
        "convolution": (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(100, 3)),
            (2, 4, 4),
        ),
    }[kind]
    model, x = model(), torch.randn(200, *shape)  # enough examples for factors without equal eigenvalues
    y = torch.arange(200) % 3
    weights = [p for n, p in model.named_parameters() if "weight" in n]
    theirs = EKFACLinearOperator(
        model,
        nn.CrossEntropyLoss(reduction="sum"),
        weights,
        [(x, y)],
        fisher_type="type-2",
        check_deterministic=False,
    )
    dense = torch.as_tensor(theirs @ torch.eye(theirs.shape[1]))
    found = ekfac(model, Categorical(), [(x, y)]).operator()
    names = [n for n, _ in model.named_parameters()]
    ours = [block.to_dense() for name, block in zip(names, found.blocks, strict=True) if "weight" in name]
    torch.testing.assert_close(dense, torch.block_diag(*ours), rtol=1e-7, atol=1e-9 * float(dense.abs().max()))
