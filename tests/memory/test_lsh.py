import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.memory import lsh
from lightning_dvc.memory.lsh import (
    RandomHyperplanes,
    SortedCodes,
    near_duplicate_pairs,
)
from lightning_dvc.randomness import torch_stream

WORD = st.integers(0, 2**62 - 1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def codes_of(rows, tables):
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), tables)


def slow_angle(x, y):
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return math.acos(np.clip(x @ y / norm, -1, 1)) if norm else math.pi / 2


def test_codes_are_the_signs_of_projections():
    x, planes = normal(7, 5), RandomHyperplanes(5, tables=3, bits=62, seed=4)
    normals = torch.randn(5, 3 * 62, generator=torch_stream(4, "hyperplanes"))
    signs = (x.double() @ normals.double()) >= 0
    for i, row in enumerate(planes.codes(x).tolist()):
        for table, code in enumerate(row):
            expected = sum(int(signs[i, table * 62 + bit]) << bit for bit in range(62))
            assert code == expected


def test_codes_do_not_depend_on_what_is_hashed_together(monkeypatch):
    x, planes = normal(30, 5), RandomHyperplanes(5, tables=2, bits=40, seed=0)
    whole = planes.codes(x)
    monkeypatch.setattr(lsh, "_ROWS", 7)
    assert torch.equal(planes.codes(x), whole)


def test_codes_depend_on_seed_and_direction_only():
    x = normal(20, 4)
    planes = RandomHyperplanes(4, tables=2, bits=30, seed=1)
    assert torch.equal(planes.codes(x), RandomHyperplanes(4, 2, 30, seed=1).codes(8 * x))
    assert not torch.equal(planes.codes(x), RandomHyperplanes(4, 2, 30, seed=2).codes(x))
    assert planes.codes(x.half()).shape == (20, 2)
    assert planes.codes(x[:0]).shape == (0, 2)


@pytest.mark.parametrize("setting", [{"dimension": 0}, {"tables": 0}, {"bits": 0}, {"bits": 63}])
def test_refuses_sizes_that_do_not_fit_a_word(setting):
    with pytest.raises(ConfigurationError, match="bits <= 62"):
        RandomHyperplanes(**{"dimension": 2, "tables": 1, "bits": 8, "seed": 0, **setting})


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_ones_are_counted(words):
    found = lsh._ones(torch.tensor(words, dtype=torch.int64))
    assert found.tolist() == [(word % 2**64).bit_count() for word in words]


def test_the_share_of_differing_bits_estimates_the_angle():
    x, bits = normal(10, 6), 200 * 60
    codes = RandomHyperplanes(6, tables=200, bits=60, seed=0).codes(x)
    angles = torch.tensor([[slow_angle(a, b) for b in x.numpy()] for a in x.numpy()])
    differing = lsh._ones(codes[:, None] ^ codes[None, :]).sum(2)
    error = differing * (math.pi / bits) - angles
    deviation = (angles * (math.pi - angles) / bits).sqrt()
    assert (error.abs() <= 5 * deviation + 1e-3).all()


def shared(a, b, more, bits=3):
    """Pairs of positions that share a bucket, once for each table, as strings of bits."""

    def keys(words):
        written = [f"{word:0{bits}b}" for word in words]
        return [written[i] + written[(i + 1) % len(words)][:more] for i in range(len(words))]

    return [
        (i, j)
        for i, p in enumerate(a)
        for j, q in enumerate(b)
        for x, y in zip(keys(p), keys(q), strict=True)
        if x == y
    ]


@settings(max_examples=300)
@given(st.data(), st.integers(0, 8), st.integers(1, 7), st.integers(0, 12) | st.just(10**9))
def test_near_duplicate_pairs_are_those_that_share_a_bucket_and_differ_little(
    data, limit, chunk, most_pairs
):
    words = st.lists(st.tuples(*[st.integers(0, 7)] * 3), max_size=6)
    a, b = data.draw(words), data.draw(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh, "_PAIR_CHUNK", chunk)
        codes = [torch.tensor(rows, dtype=torch.int64).reshape(-1, 3) for rows in (a, b)]
        found = near_duplicate_pairs(*codes, 3, math.pi * limit / 9, most_pairs)
    levels = (0, 2, 3)
    few = [more for more in levels if len(shared(a, b, more)) <= most_pairs]
    mates = set(shared(a, b, min(few, default=3)))
    expected = [
        [i, j]
        for i, j in sorted(mates)
        if sum((x ^ y).bit_count() for x, y in zip(a[i], b[j], strict=True)) <= limit
    ]
    assert found.tolist() == expected


@settings(max_examples=200)
@given(st.data(), st.sampled_from([1, 2, 5, 16, 31, 32, 40, 62]), st.integers(0, 3))
def test_buckets_are_told_apart_by_no_more_than_it_takes(data, bits, most):
    word = st.sampled_from([0, 1, 2**bits - 1, 2 ** (bits - 1)])
    words = st.lists(st.tuples(word, word, word), max_size=5)
    a, b = data.draw(words), data.draw(words)
    codes = [torch.tensor(rows, dtype=torch.int64).reshape(-1, 3) for rows in (a, b)]
    found = near_duplicate_pairs(*codes, bits, math.pi, most)
    levels = (0, min(-(-bits // 2), 64 - bits), min(bits, 64 - bits))
    few = [more for more in levels if len(shared(a, b, more, bits)) <= most]
    mates = set(shared(a, b, min(few, default=levels[-1]), bits))
    assert found.tolist() == [list(pair) for pair in sorted(mates)]


@settings(max_examples=100)
@given(st.data(), st.integers(1, 5), st.sampled_from([3, 16, 31, 32, 62]))
def test_packed_codes_differ_in_as_many_bits(data, tables, bits):
    row = st.tuples(*[st.integers(0, 2**bits - 1)] * tables)
    a, b = data.draw(row), data.draw(row)
    one, other = (lsh._packed(torch.tensor([x]), bits) for x in (a, b))
    expected = sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))
    assert int(lsh._ones(one ^ other).sum()) == expected


def test_near_duplicates_are_found_and_others_are_not():
    known = normal(50, 16)
    copies = known[:10] + 0.01 * normal(10, 16, seed=1)
    planes = RandomHyperplanes(16, tables=16, bits=16, seed=0)
    codes = planes.codes(torch.cat([copies, normal(10, 16, seed=2)]))
    for most_pairs in (10**9, 0):
        found = near_duplicate_pairs(codes, planes.codes(known), 16, 0.1, most_pairs)
        assert found.tolist() == [[i, i] for i in range(10)]


@pytest.mark.parametrize("angle", [-0.1, 3.2, float("nan")])
def test_near_duplicates_refuse_an_angle_out_of_range(angle):
    with pytest.raises(ConfigurationError, match="radians"):
        near_duplicate_pairs(codes_of([[1]], 1), codes_of([[1]], 1), 8, angle, 9)


def slow_around(codes, wanted, most):
    """Points around one query, each once: places in lists of (code, point), table by table."""
    found = set()
    for table, code in enumerate(wanted):
        ordered = sorted((row[table], point) for point, row in enumerate(codes))
        place = sum(other < code for other, _ in ordered)
        start = min(max(place - most // 2, 0), max(len(codes) - most, 0))
        found |= {point for _, point in ordered[start : start + most]}
    return sorted(found)


@settings(max_examples=200)
@given(st.data(), st.integers(1, 5), st.sampled_from([3, 2**40]))
def test_around_a_query_are_its_neighbours_in_each_table_once(data, most, largest):
    words = st.tuples(*[st.integers(0, largest)] * 3)
    known = data.draw(st.lists(words, min_size=1, max_size=9))
    wanted = data.draw(st.lists(words, max_size=4))
    ids, new = SortedCodes(codes_of(known, 3)).around(codes_of(wanted, 3), most)
    assert ids.shape == new.shape == (len(wanted), 3 * min(most, len(known)))
    got = [row[kept].tolist() for row, kept in zip(ids, new, strict=True)]
    assert got == [slow_around(known, codes, most) for codes in wanted]


def test_what_is_around_shares_long_prefixes():
    codes = torch.arange(1000).flip(0)[:, None]
    ids, _ = SortedCodes(codes).around(torch.tensor([[500]]), most=4)
    assert codes[ids[0], 0].tolist() == [501, 500, 499, 498]
