"""Counter-based random numbers: known answers, their distribution, and what they may not depend on."""

import math
from itertools import pairwise

import pytest
import torch
from scipy import stats

from lapkit.curvature import Draws, example_keys, seed_from
from lapkit.curvature.columns.sampling import philox

IMPROBABLE = 1e-4  # p-value below which a test fails; seeds are fixed, so it does so always or never
FULL = 0xFFFFFFFF


def words(*values):
    return tuple(torch.tensor(v) for v in values)


KNOWN = [  # of the authors' library Random123, file kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert tuple(int(w) for w in philox(words(*counter), key)) == expected


def in_python(counter, key):
    """Philox in Python's integers, which do not overflow: what the int64 of every device must give."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k, second & FULL, (first >> 32) ^ d ^ m, first & FULL
        k, m = (k + 0x9E3779B9) & FULL, (m + 0xBB67AE85) & FULL
    return a, b, c, d


def test_numbers_are_a_function_of_seed_key_draw_and_place():
    seed, keys = 2**62 + 12345, [3, -1, -(2**63), 2**63 - 1]
    drawn = Draws(seed, torch.tensor(keys)).words(7, 2, 3)
    for n, key in enumerate(keys):
        for place in range(6):
            expected = in_python((place, 7, key & FULL, key >> 32 & FULL), (seed & FULL, seed >> 32 & FULL))
            assert tuple(int(w[n].flatten()[place]) for w in drawn) == expected


def test_uniform_numbers_are_the_leading_bits_of_the_words():
    draws = Draws(1, torch.arange(3))
    high, low, _, _ = draws.words(4, 5)
    exact = [(h << 20 | m >> 12) * 2 + 1 for h, m in zip(high.flatten().tolist(), low.flatten().tolist(), strict=True)]
    assert draws.uniform(4, 5).flatten().tolist() == [value / 2**53 for value in exact]
    single = [((h >> 9) * 2 + 1) / 2**24 for h in high.flatten().tolist()]
    assert draws.uniform(4, 5, dtype=torch.float32).flatten().tolist() == single


# -- distributions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_normal_numbers_have_their_distributions(dtype):
    draws = Draws(1, torch.arange(200))
    u, z = draws.uniform(0, 250, dtype=dtype), draws.normal(1, 250, dtype=dtype)
    assert u.dtype == z.dtype == dtype
    assert u.shape == z.shape == (200, 250)
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > IMPROBABLE
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > IMPROBABLE
    cells = torch.histc(u.double(), 1000, 0, 1)
    assert stats.chisquare(cells.numpy()).pvalue > IMPROBABLE
    assert stats.chisquare([int((draws.signs(2, 250) == s).sum()) for s in (-1, 1)]).pvalue > IMPROBABLE


SOURCES = {
    "examples": lambda n: Draws(0, torch.tensor([n])).uniform(0, 20_000)[0],
    "far keys": lambda n: Draws(0, torch.tensor([n << 32])).uniform(0, 20_000)[0],
    "draws": lambda n: Draws(0, torch.tensor([5])).uniform(n, 20_000)[0],
    "seeds": lambda n: Draws(n, torch.tensor([5])).uniform(0, 20_000)[0],
    "far seeds": lambda n: Draws(n << 32, torch.tensor([5])).uniform(0, 20_000)[0],
    "places": lambda n: Draws(0, torch.arange(20_000)).uniform(0, 4)[:, n],
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_neighbours_are_independent(source):
    """Pairs fall evenly into a grid of 16 x 16 cells."""
    for one, two in pairwise(source(n) for n in range(4)):
        cells = torch.bincount((16 * one).long() * 16 + (16 * two).long(), minlength=256)
        assert stats.chisquare(cells.numpy()).pvalue > IMPROBABLE


def test_bits_are_fair_and_uncorrelated():
    """All 128 bits of 20,000 blocks: their correlations are those of independent coins."""
    blocks = Draws(3, torch.arange(20_000)).words(0, 1)
    bits = torch.cat([(w >> torch.arange(32)) & 1 for w in blocks], dim=1).double() * 2 - 1
    products = bits.T @ bits / len(bits) ** 0.5  # standard normal off the diagonal
    off = products[~torch.eye(128, dtype=torch.bool)]
    assert off.abs().max() < 6
    assert (bits.sum(0) / len(bits) ** 0.5).abs().max() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_numbers_never_reach_the_ends(dtype, monkeypatch):
    for word in (0, FULL):
        monkeypatch.setattr(Draws, "words", lambda self, draw, *shape, w=word: (torch.full((1, 1), w),) * 4)
        draws = Draws(0, torch.arange(1))
        assert 0 < float(draws.uniform(0, 1, dtype=dtype)) < 1
        assert math.isfinite(float(draws.normal(0, 1, dtype=dtype)))


# -- what they do not depend on


def test_examples_take_their_numbers_along():
    keys, order = torch.randint(-(2**63), 2**63 - 1, (20,)), torch.randperm(20)
    whole = Draws(7, keys).normal(2, 3, 4)
    assert torch.equal(Draws(7, keys[order]).normal(2, 3, 4), whole[order])
    assert torch.equal(torch.cat([Draws(7, part).normal(2, 3, 4) for part in keys.split(3)]), whole)


def test_more_positions_leave_the_first_ones_alone():
    draws = Draws(7, torch.arange(3))
    assert torch.equal(draws.uniform(0, 9, 2)[:, :5], draws.uniform(0, 5, 2))


def test_a_seed_is_all_of_the_state():
    draws = Draws(7, torch.arange(3))
    before = torch.get_rng_state()
    assert torch.equal(draws.uniform(0, 2), Draws(7, torch.arange(3)).uniform(0, 2))
    assert not torch.equal(draws.uniform(0, 2), draws.reseeded(8).uniform(0, 2))
    assert len(draws) == 3
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_come_from_the_generator():
    make = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    before = torch.get_rng_state()
    assert seed_from(make(1)) == seed_from(make(1)) != seed_from(make(2))
    assert Draws.fresh(4, make(1)).seed == seed_from(make(1))
    assert torch.equal(before, torch.get_rng_state())
    assert seed_from() != seed_from()


@pytest.mark.gpu
def test_numbers_and_keys_are_those_of_the_cpu():
    x = torch.randn(50, 70)
    assert torch.equal(example_keys(x.cuda(), 50).cpu(), example_keys(x, 50))
    here, there = Draws(5, example_keys(x, 50)), Draws(5, example_keys(x, 50).cuda())
    assert torch.equal(there.uniform(1, 4).cpu(), here.uniform(1, 4))
    torch.testing.assert_close(there.normal(1, 4).cpu(), here.normal(1, 4), rtol=1e-12, atol=1e-12)


# -- keys


def hash_in_python(*tensors):
    """The key of each example of one or several tensors, given as rows of 16-bit words, in Python's integers."""
    full = (1 << 64) - 1
    signed = lambda z, bits: z - (1 << bits) * (z >> bits - 1)  # noqa: E731

    def mixed(z):
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & full
        return z ^ z >> 31

    def key(*rows):
        sums = [j << 60 for j in range(4)]
        for number, row in enumerate(rows):
            for j in range(4):
                places = ((number << 40) + 4 * place + j + 1 for place in range(len(row)))
                multipliers = (signed(mixed(place) >> 43, 21) for place in places)
                sums[j] += sum(r * signed(w, 16) for r, w in zip(multipliers, row, strict=True))
        return mixed(sum(mixed(total & full) for total in sums) & full)

    return [signed(key(*rows), 64) for rows in zip(*tensors, strict=True)]


def words_in_python(numbers, size):
    """Numbers as the 16-bit words of their bits, the lowest first."""
    return [[value >> 16 * part & 0xFFFF for value in row for part in range(size // 2)] for row in numbers]


def test_keys_are_a_hash_of_the_example():
    x = torch.randint(-(2**63), 2**63 - 1, (5, 3))
    assert example_keys(x, 5).tolist() == hash_in_python(words_in_python(x.tolist(), 8))
    floats = torch.randn(5, 3, dtype=torch.float32)
    words = words_in_python(floats.view(torch.int32).tolist(), 4)
    assert example_keys(floats, 5).tolist() == hash_in_python(words)
    assert example_keys((x, floats), 5).tolist() == hash_in_python(words_in_python(x.tolist(), 8), words)


def test_sums_of_the_largest_words_are_exact():
    words = torch.full((1, 70_000), -(2**15), dtype=torch.int16)
    expected = hash_in_python([[1 << 15] * 70_000])
    assert example_keys(words.view(torch.int64), 1).tolist() == expected


TYPES = [
    torch.float8_e5m2,
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.uint8,
]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_keys_of_every_type(dtype):
    x = (10 * torch.randn(40, 3, 5)).to(dtype)
    keys = example_keys(x, 40)
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == 40
    order = torch.randperm(40)
    assert torch.equal(example_keys(x[order], 40), keys[order])
    assert torch.equal(torch.cat([example_keys(part, len(part)) for part in x.split(7)]), keys)
    assert torch.equal(example_keys(x.mT.contiguous().mT, 40), keys)  # other strides, same numbers
    assert torch.equal(example_keys([x[:1].expand(40, 3, 5)], 40), keys[:1].expand(40))


def test_keys_see_every_number_and_its_place():
    x = torch.zeros(130, 129)
    x[torch.arange(129), torch.arange(129)] = 1.0
    assert len(example_keys(x, 130).unique()) == 130
    booleans = torch.cartesian_prod(*[torch.tensor([False, True])] * 10)
    assert len(example_keys(booleans, 1024).unique()) == 1024
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    assert len(example_keys(pairs, 1 << 16).unique()) == 1 << 16


def test_half_of_the_bits_change_with_one_bit():
    x = torch.randn(2000, 4)
    other = x.clone()
    other[:, 2] = torch.nextafter(x[:, 2], torch.tensor(float("inf")))
    changed = example_keys(x, 2000) ^ example_keys(other, 2000)
    rate = ((changed[:, None] >> torch.arange(64)) & 1).double().mean(0)
    assert ((rate - 0.5).abs() < 5 * 0.5 / 2000**0.5).all()


def test_long_examples_are_hashed_in_pieces(monkeypatch):
    x = torch.randn(4, 1000)
    whole = example_keys(x, 4)
    monkeypatch.setattr("lapkit.curvature.columns.sampling.FEATURES", 64)
    assert torch.equal(example_keys(x, 4), whole)


def test_padding_with_zeros_changes_nothing():
    x = torch.randint(1, 9, (4, 6))
    assert torch.equal(example_keys(torch.nn.functional.pad(x, (0, 3)), 4), example_keys(x, 4))


def test_keys_of_structures():
    x, y = torch.randn(5, 2), torch.arange(5)
    keys = example_keys((x, y), 5)
    assert not torch.equal(keys, example_keys(x, 5))
    assert not torch.equal(keys, example_keys((x, y.flip(0)), 5))  # targets count
    assert not torch.equal(keys, example_keys((y, x), 5))  # and so does the order
    assert torch.equal(example_keys(({"a": x, "table": torch.randn(3, 3)}, y, "text", torch.tensor(2)), 5), keys)
    assert len(example_keys((torch.zeros(5, 0), y), 5).unique()) == 5


def test_examples_that_no_tensor_tells_apart_are_counted():
    assert example_keys(["a", "b", "c"], 3, start=10).tolist() == [10, 11, 12]


@pytest.mark.parametrize("draw", [-1, 2**32])
def test_draws_are_counted_in_32_bits(draw):
    with pytest.raises(ValueError, match="between 0 and"):
        Draws(0, torch.arange(2)).uniform(draw, 3)


def test_numbers_of_half_precision_are_refused():
    with pytest.raises(TypeError, match="convert them afterwards"):
        Draws(0, torch.arange(2)).uniform(0, 3, dtype=torch.float16)
