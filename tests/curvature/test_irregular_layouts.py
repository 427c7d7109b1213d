"""Layouts that follow no rule, by themselves: owners are read off, or there is no layout."""

import pytest
import torch

from lapkit.curvature.capture.irregular import BASE, IrregularLayout, digit_factors, digits, irregular_layout

EXAMPLES = (3, 8, 9, 70)


def scrambled(examples, seed=0):
    """Owners of positions in random order, some examples without any, some positions that nothing reaches."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (examples,), generator=generator)
    counts[0], counts[-1] = 2, 0
    owner = torch.arange(examples).repeat_interleave(counts)
    owner = torch.cat([owner, torch.full((3,), -1)])
    return owner[torch.randperm(len(owner), generator=generator)]


def cotangents(owner, examples, shape=(4,), axis=0):
    """A cotangent `(L, *shape)`, its axis of examples moved, and the same for every digit of the examples' numbers."""
    one = torch.randn(len(owner), *shape)
    one[owner < 0] = 0
    tail = [1] * len(shape)
    scaled = [
        one * digit_factors(examples, digit, one)[owner.clamp_min(0)].reshape(-1, *tail)
        for digit in range(digits(examples))
    ]
    return one.movedim(0, axis), [s.movedim(0, axis) for s in scaled]


def agree(found, owner):
    """Where nothing arrives any example will do: it is a row of what went in, but of no cotangent."""
    return torch.equal(torch.where(owner < 0, 0, found), owner.clamp_min(0)) and bool((found >= 0).all())


@pytest.mark.parametrize("examples", [1, 2, *EXAMPLES, 64, 65, 512, 513])
def test_digits_spell_the_numbers_of_the_examples(examples):
    like = torch.zeros(())
    powers = [digit_factors(examples, d, like).log2() + BASE // 2 for d in range(digits(examples))]
    assert all(((p >= 0) & (p < BASE) & (p == p.round())).all() for p in powers)
    number = sum(p.long() * BASE**d for d, p in enumerate(powers))
    assert torch.equal(number, torch.arange(examples))
    assert digits(examples) == 1 or BASE ** (digits(examples) - 1) < examples


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("examples", EXAMPLES)
def test_owners_are_read_off(examples, axis):
    owner = scrambled(examples)
    one, scaled = cotangents(owner, examples, (2, 3), axis)
    layout = irregular_layout(one, scaled, examples)
    assert layout.axis == axis
    assert agree(layout.owners(len(owner), examples), owner)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_owners_are_read_off_in_lower_precision(dtype):
    owner = scrambled(9)
    one, scaled = cotangents(owner, 9)
    layout = irregular_layout(one.to(dtype), [s.to(dtype) for s in scaled], 9)
    assert agree(layout.owner, owner)


def test_rounding_and_zeros_within_a_row_do_not_matter():
    owner = scrambled(9)
    one, scaled = cotangents(owner, 9)
    one[:, 1], scaled[0][:, 1], scaled[1][:, 1] = 0, 0, 0
    scaled = [s * (1 + 1e-14 * torch.randn(s.shape)) for s in scaled]
    assert agree(irregular_layout(one, scaled, 9).owner, owner)


@pytest.mark.parametrize("examples", EXAMPLES)
def test_mixed_rows_have_no_layout(examples):
    owner = scrambled(examples)
    one, scaled = cotangents(owner, examples)
    first, second = (owner == 0).nonzero()[0, 0], (owner > 0).nonzero()[0, 0]
    for tensor in (one, *scaled):
        tensor[first] += tensor[second]
    assert irregular_layout(one, scaled, examples) is None


def test_one_mixed_entry_is_enough():
    owner = scrambled(9)
    one, scaled = cotangents(owner, 9)
    first, second = (owner == 0).nonzero()[0, 0], (owner > 0).nonzero()[0, 0]
    for tensor in (one, *scaled):
        tensor[first, 1] = tensor[second, 1]
    assert irregular_layout(one, scaled, 9) is None


def test_a_factor_that_is_no_example_has_no_layout():
    """Powers of two, but of numbers beyond the last example, or below the first."""
    one = torch.randn(5, 2)
    for power in (3, -5):
        assert irregular_layout(one, [one * 2.0**power], 3) is None


@pytest.mark.parametrize("examples", EXAMPLES)
def test_canonical_form_gathers_each_example_and_pads_with_zeros(examples):
    owner = scrambled(examples).clamp_min(0)
    tensor = torch.randn(2, 3, len(owner), 4)
    actual = IrregularLayout(1, owner).canonical(tensor, examples)
    positions = int(torch.bincount(owner).max())
    assert actual.shape == (2, examples, positions, 3, 4)
    for n in range(examples):
        mine = tensor[:, :, owner == n].movedim(2, 1)
        assert torch.equal(actual[:, n, : mine.shape[1]], mine)
        assert not actual[:, n, mine.shape[1] :].any()
