import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.randomness import stream, torch_stream


def draws(seed, purpose, *numbers):
    return tuple(stream(seed, purpose, *numbers).integers(2**62, size=4).tolist())


def torch_draws(seed, purpose, *numbers):
    generator = torch_stream(seed, purpose, *numbers)
    return tuple(torch.randint(2**62, (4,), generator=generator).tolist())


WORDS = st.lists(st.integers(0, 3), max_size=5).map(tuple)
ARGUMENTS = st.tuples(st.integers(0, 2), st.sampled_from(["draw", "fit", "é"]), WORDS)


@settings(max_examples=200)
@given(ARGUMENTS, ARGUMENTS)
def test_streams_are_equal_exactly_when_their_arguments_are(one, other):
    for drawn in (draws, torch_draws):
        equal = drawn(*one[:2], *one[2]) == drawn(*other[:2], *other[2])
        assert equal == (one == other)


@pytest.mark.parametrize("drawn", [draws, torch_draws])
def test_a_number_of_zero_counts(drawn):
    words = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (2**32,), (2**32 + 1,)]
    assert len({drawn(5, "test", *numbers) for numbers in words}) == len(words)


@pytest.mark.parametrize("drawn", [draws, torch_draws])
def test_large_seeds_count_in_full(drawn):
    seeds = [1, 1 + 2**32, 1 + 2**40, 1 + 2**63]
    assert len({drawn(seed, "test", 1) for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("drawn", [draws, torch_draws])
def test_what_else_is_drawn_changes_nothing(drawn):
    first = drawn(3, "test", 1)
    torch.manual_seed(0)
    drawn(3, "other", 1)
    torch.rand(3)
    assert drawn(3, "test", 1) == first


def test_global_generators_are_untouched():
    before = np.random.get_state()[1].copy(), torch.get_rng_state(), random.getstate()  # noqa: NPY002 - the stream guarded
    draws(0, "test")
    torch_draws(0, "test")
    assert (np.random.get_state()[1] == before[0]).all()  # noqa: NPY002 - the stream guarded
    assert torch.equal(torch.get_rng_state(), before[1])
    assert random.getstate() == before[2]


def test_torch_streams_are_uniform():
    numbers = torch.cat([torch.rand(2, generator=torch_stream(0, "test", n)) for n in range(2000)])
    quarters = torch.histc(numbers, bins=4, min=0, max=1)
    assert ((quarters - 1000) ** 2 / 1000).sum() < 16
