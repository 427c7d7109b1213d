"""Random numbers that belong to an example, not to a batch: counters in, bits out, and nothing in between to remember.

A number is a function of the seed, the example's key, which draw it is and where in the draw it stands. So a Monte
Carlo estimate depends neither on batch sizes, the order of the data and the number of processes, nor on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lapkit.curvature.inputs import tensors

LOW = 0xFFFFFFFF
ROUNDS = 10
FEATURES = 1 << 16  # words that are hashed at a time: more would not add up exactly
SUMS = 4  # of an example's words, each with 21-bit multipliers of its own: that two examples share all is improbable


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four 32-bit words of a counter and two of a key become four random ones.

    Args:
        counter: four tensors of int64 that hold 32-bit words and broadcast with each other.
        key: two 32-bit words.

    Returns:
        Four tensors of int64 with 32-bit words.

    Reference:
        Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011, section 3.3.
    """
    a, b, c, d = torch.broadcast_tensors(*counter)
    multiplied, other = _host(torch.stack([a, c])), _host(torch.stack([b, d]))  # two words at a time
    keys, factors = _schedule(key, multiplied.ndim, a.device)
    for each in keys:
        # A product of two 32-bit words wraps into the sign of an int64; its halves are right all the same.
        product = _turned(multiplied * factors)
        multiplied, other = (product >> 32 & LOW) ^ other ^ each, product & LOW
    return tuple(torch.as_tensor(word) for pair in zip(multiplied, other, strict=True) for word in pair)


def _host(words: Tensor) -> Any:
    """An array of numpy on a processor, where its short operations take a third of the time; else the tensor itself."""
    return words.numpy() if words.device.type == "cpu" else words


def _turned(pair: Any) -> Any:
    """Two words in the other order."""
    return pair.flip(0) if isinstance(pair, Tensor) else pair[::-1]


@lru_cache(maxsize=16)
def _schedule(key: tuple[int, int], axes: int, device: torch.device) -> tuple[Any, Any]:
    """The two words that each round adds to the key, `(ROUNDS, 2, 1 ...)`, and the two multipliers `(2, 1 ...)`.

    They are kept, as copies to a device wait for it.
    """
    k, m = key
    keys = [[(k + n * 0x9E3779B9) & LOW, (m + n * 0xBB67AE85) & LOW] for n in range(ROUNDS)]
    with torch.inference_mode(False):
        words = torch.tensor([*keys, [0xD2511F53, 0xCD9E8D57]], device=device).reshape(-1, 2, *[1] * (axes - 1))
        return _host(words[:-1]), _host(words[-1])


@dataclass(frozen=True, eq=False)
class Draws:
    """Random numbers for each example of a batch.

    Args:
        seed: of the whole data set.
        keys: what tells the examples apart, `(N,)` of int64; see `example_keys`. Equal keys get equal numbers.

    Example:
        >>> import torch
        >>> both = Draws(seed=0, keys=torch.tensor([3, 5]))
        >>> torch.equal(both.uniform(0, 4)[1], Draws(0, torch.tensor([5])).uniform(0, 4)[0])
        True
    """

    seed: int
    keys: Tensor

    @classmethod
    def fresh(
        cls, examples: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Draws:
        """Numbers for a batch that stands alone: a seed from the generator, examples told apart by their place."""
        return cls(seed_from(generator), torch.arange(examples, device=device))

    def __len__(self) -> int:
        return len(self.keys)

    def reseeded(self, seed: int) -> Draws:
        """The same examples under another seed."""
        return Draws(seed, self.keys)

    def words(self, draw: int, *shape: int) -> tuple[Tensor, ...]:
        """Four independent tensors of random 32-bit words, `(N, *shape)` of int64.

        Raises:
            ValueError: if the number of the draw, or that of its elements, does not fit into 32 bits.
        """
        count = math.prod(shape)
        if not 0 <= draw <= LOW or count > LOW:
            raise ValueError(f"Draw {draw} with {count} numbers an example: both must be between 0 and 2^32 - 1.")
        keys = self.keys[:, None]
        where = torch.arange(count, device=keys.device)[None]
        counter = (where, torch.full_like(where, draw), keys & LOW, keys >> 32 & LOW)
        bits = philox(counter, (self.seed & LOW, self.seed >> 32 & LOW))
        return tuple(w.reshape(-1, *shape) for w in bits)

    def uniform(self, draw: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Numbers strictly between 0 and 1, `(N, *shape)`: the middles of `2^52` (float64) or `2^23` equal cells.

        Args:
            draw: which one; different draws are independent.
            shape: of one example's numbers. A longer first axis leaves the numbers before as they are.
            dtype: float32 or float64.

        Returns:
            The same numbers on every device.

        Raises:
            TypeError: if the type is another.
        """
        if dtype not in {torch.float32, torch.float64}:
            raise TypeError(f"Random numbers are drawn as float32 or float64, not as {dtype}: convert them afterwards.")
        high, low, _, _ = self.words(draw, *shape)
        if dtype == torch.float64:
            return ((high << 20 | low >> 12).to(dtype) + 0.5) * 2.0**-52
        return ((high >> 9).to(dtype) + 0.5) * 2.0**-23

    def normal(self, draw: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Standard normal numbers, `(N, *shape)`: the quantiles of `uniform`."""
        return torch.special.ndtri(self.uniform(draw, *shape, dtype=dtype))

    def signs(self, draw: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Plus and minus one with equal probability, `(N, *shape)`."""
        return (2 * (self.words(draw, *shape)[0] >> 31) - 1).to(dtype)


def seed_from(generator: torch.Generator | None = None) -> int:
    """A seed of 63 bits, from torch's global generator by default.

    Raises:
        TypeError: if something else is given, such as a number.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"Expected a generator, got {generator!r}. From a seed it is made by torch.Generator().manual_seed(0)."
        )
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def example_keys(batch: Any, examples: int, start: int = 0) -> Tensor:
    """What tells the examples of a batch apart: a hash of all numbers that belong to each.

    The key is `mix(sum_j mix(h_j))` of four sums `h_j = sum_i r_ij word_i` over all words of the example, with random
    multipliers r that are always the same.

    Equal examples, those with equal targets too if they are part of the batch, get equal keys and so share random
    numbers: an estimate stays unbiased, but repeating an example does not make it more precise. Trailing zeros, as
    padding leaves them, change nothing.

    A tensor that all examples share, such as a table of positions, is taken for numbers of the examples if its first
    axis happens to be as long as the batch. The keys are then still right for this batch, but those of the same
    examples in batches of another size differ: give such a tensor an axis of length one in front, or let the model
    hold it.

    Args:
        batch: tensors in tuples, lists and mappings; those whose first axis counts the examples are used.
        examples: their number N.
        start: how many examples came before, to count on where no tensor tells the examples apart.

    Returns:
        Keys `(N,)` of int64.
    """
    found = [t for t in tensors(batch) if t.ndim > 0 and len(t) == examples]
    if not found:
        return torch.arange(start, start + examples)
    device = found[0].device
    sums = sum((_sums(number, tensor).to(device) for number, tensor in enumerate(found)), start=_apart(device))
    return torch.as_tensor(_mixed(_mixed(_host(sums)).sum(0)))


def _sums(number: int, tensor: Tensor) -> Tensor:
    """`sum_i r_ij word_i` of each example's words, `(SUMS, N)`, with multipliers r of this tensor's own.

    The sums are a product of matrices: no term exceeds `2^35`, and as many as `FEATURES` of them stay below `2^53`, so
    float64 adds them exactly in whatever order.
    """
    words = _words(tensor)
    sums = torch.zeros(SUMS, len(words), dtype=torch.int64, device=words.device)
    for start in range(0, words.shape[1], FEATURES):
        part = words[:, start : start + FEATURES]
        # In this order a processor's matrix product takes a third of the time.
        sums += (_multipliers(number, start, part.shape[1], words.device) @ part.double().T).to(torch.int64)
    return sums


@lru_cache(maxsize=16)
def _apart(device: torch.device) -> Tensor:
    """What keeps the sums of an example apart, `(SUMS, 1)`: the first to the fourth are mixed as other numbers."""
    with torch.inference_mode(False):
        return torch.arange(SUMS, device=device)[:, None] << 60


@lru_cache(maxsize=16)
def _multipliers(number: int, start: int, count: int, device: torch.device) -> Tensor:
    """`r`, `(SUMS, count)`, for one of the tensors: 21 random bits for each place, as signed numbers in float64."""
    with torch.inference_mode(False):  # kept for any use, whoever calls first
        places = torch.arange(SUMS * start + 1, SUMS * (start + count) + 1, device=device) + (number << 40)
        return (_mixed(places) >> 43).double().reshape(count, SUMS).T.contiguous()


def _words(tensor: Tensor) -> Tensor:
    """The bits of each example's numbers as 16-bit words, `(N, W)`; integers as if they were 64-bit ones."""
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if not tensor.is_floating_point():
        wide = tensor.to(torch.int64)
    else:
        wide = tensor if tensor.element_size() > 1 else tensor.half()  # 8-bit numbers fit
    return wide.detach().contiguous().reshape(len(tensor), -1).view(torch.int16)


def _mixed(z: Any) -> Any:
    """The finaliser of splitmix64: a bijection of 64-bit integers in which every bit moves every other; 0 stays 0.

    Reference:
        Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014, figure 16 (variant 13).
    """
    # int64 shifts to the right repeat the sign; the mask makes them logical. Multipliers are written as signed.
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - (1 << 64))
    return z ^ (z >> 31 & (1 << 33) - 1)
