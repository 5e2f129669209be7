"""Keyed randomness: one key, one draw."""

import hashlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samplers import Key, noise
from samplers.keys import fill_noise

number = st.integers(0, 2**40)
keys = st.builds(
    Key,
    seed=number,
    purpose=st.text(max_size=6),
    update=st.none() | number,
    prompt=number | st.text(max_size=6),
    occurrence=number,
    root=st.none() | number,
    path=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    step=st.none() | number,
)


@given(keys, keys)
def test_different_keys_have_different_seeds(one, other):
    assert (one == other) == (one.seed64() == other.seed64())


def test_neighbouring_keys_differ():
    """Moving a value to the next field, or a digit across a border, changes the seed."""
    fields = itertools.product(
        [0, 1],
        ["a", "b"],
        [None, 0, 1],
        [1, "1", "a", 11],
        [0, 1],
        [None, 0],
        [(), (0,), (0, 1), (1, 0), (11,)],
        [None, 1],
    )
    everything = [Key(*f) for f in fields]
    assert len({key.seed64() for key in everything}) == len(everything)


def test_seed_is_a_plain_hash():
    """Anyone can compute it: blake2b, 8 bytes, little endian, over the JSON of the root fields and path|step."""
    text = b'[7, "rollout", null, "a cat", 2, 5][0, 1]|3'
    expected = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    assert Key(7, "rollout", None, "a cat", 2, 5, (0, 1), 3).seed64() == expected


@settings(max_examples=30)
@given(st.lists(keys, min_size=1, max_size=6, unique=True), st.sampled_from([(1,), (3,), (2, 3, 3), (4, 8, 8)]))
def test_a_row_depends_on_its_key_only(some, shape):
    whole = noise(some, shape)
    assert whole.shape == (len(some), *shape) and whole.dtype == torch.float32
    for i, key in enumerate(some):
        assert torch.equal(noise([key], shape)[0], whole[i])
    assert torch.equal(noise(some[::-1], shape), whole.flip(0))


def test_global_generator_is_untouched():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    noise([Key(0, "x", 0, 0, 0, 0)], (4,))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("elements", [2, 3, 15, 768])
def test_upper_half_of_the_seed_counts(elements):
    """Seeds that agree in the lower 32 bits share pair norms (a rotation) and nothing else."""
    low, angle = 12345, math.pi / 2
    plain, turned = fill_noise(torch.empty(2, elements), [low, low + (1 << 62)])  # 2^62: a quarter turn
    half = elements // 2
    torch.testing.assert_close(turned[:half], -plain[half : 2 * half], atol=1e-6, rtol=0)
    torch.testing.assert_close(turned[half : 2 * half], plain[:half], atol=1e-6, rtol=0)
    assert math.cos(angle) < 1e-9


def test_noise_is_standard_normal():
    """Moments of 2 * 10^5 draws, with bounds at five standard errors; neighbours and halves are uncorrelated."""
    x = noise([Key(3, "moments", i, 0, 0, 0) for i in range(200)], (10, 10, 10)).double().flatten(1)
    n = x.numel()
    assert abs(x.mean()) < 5 / math.sqrt(n)
    assert abs(x.square().mean() - 1) < 5 * math.sqrt(2 / n)
    assert abs(x.pow(3).mean()) < 5 * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < 5 * math.sqrt(96 / n)
    for one, other in ((x[:, :500], x[:, 500:]), (x[:, :-1], x[:, 1:]), (x[:-1], x[1:])):
        assert abs((one * other).mean()) < 5 / math.sqrt(one.numel())


@given(keys, st.integers(-50, 50), st.integers(1, 50))
def test_choices(key, low, count):
    assert 0 <= key.uniform() < 1
    assert low <= key.integer(low, low + count) < low + count


def test_integers_are_even():
    counts = torch.bincount(
        torch.tensor([Key(0, "window", i, 0, 0, None).integer(0, 5) for i in range(5000)]), minlength=5
    )
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 25  # chi-squared, 4 degrees of freedom: p < 1e-4 beyond


def test_empty_range():
    with pytest.raises(ValueError, match="empty range"):
        Key(0, "window", 0, 0, 0, None).integer(3, 3)
