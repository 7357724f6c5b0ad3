import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.memory import lsh
from lightning_dvc.memory.lsh import (
    ExactDensity,
    LSHDensity,
    RandomHyperplanes,
    hamming,
    median_bandwidth_squared,
    near_duplicate_pairs,
)
from lightning_dvc.randomness import torch_stream

WORD = st.integers(0, 2**62 - 1)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def codes_of(rows, tables):
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), tables)


def slow_density(queries, points, bandwidth_squared):
    """The definition, one pair at a time."""
    return torch.tensor(
        [
            sum(math.exp(-float(((x - y) ** 2).sum()) / (2 * bandwidth_squared)) for y in points)
            / len(points)
            for x in queries.double()
        ],
        dtype=torch.float64,
    )


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


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 3))
def test_hamming_counts_differing_bits(data, tables):
    rows = st.lists(st.lists(WORD, min_size=tables, max_size=tables), min_size=1, max_size=5)
    a, b = data.draw(rows), data.draw(rows)
    expected = [[sum((x ^ y).bit_count() for x, y in zip(p, q, strict=True)) for q in b] for p in a]
    assert hamming(codes_of(a, tables), codes_of(b, tables)).tolist() == expected


def test_the_share_of_differing_bits_estimates_the_angle():
    x, bits = normal(10, 6), 200 * 60
    codes = RandomHyperplanes(6, tables=200, bits=60, seed=0).codes(x)
    angles = torch.tensor([[slow_angle(a, b) for b in x.numpy()] for a in x.numpy()])
    error = hamming(codes, codes) * (math.pi / bits) - angles
    deviation = (angles * (math.pi - angles) / bits).sqrt()
    assert (error.abs() <= 5 * deviation + 1e-3).all()


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(0, 8), st.integers(1, 7))
def test_near_duplicate_pairs_are_those_that_share_a_bucket_and_differ_little(data, limit, chunk):
    words = st.lists(st.tuples(*[st.integers(0, 7)] * 3), max_size=6)
    a, b = data.draw(words), data.draw(words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh, "_PAIR_CHUNK", 3 * chunk)
        codes = [torch.tensor(rows, dtype=torch.int64).reshape(-1, 3) for rows in (a, b)]
        found = near_duplicate_pairs(*codes, 9, math.pi * limit / 9)
    expected = [
        [i, j]
        for i, p in enumerate(a)
        for j, q in enumerate(b)
        if any(x == y for x, y in zip(p, q, strict=True))
        and sum((x ^ y).bit_count() for x, y in zip(p, q, strict=True)) <= limit
    ]
    assert found.tolist() == expected


def test_near_duplicates_are_found_and_others_are_not():
    known = normal(50, 16)
    copies = known[:10] + 0.01 * normal(10, 16, seed=1)
    planes = RandomHyperplanes(16, tables=16, bits=16, seed=0)
    codes = planes.codes(torch.cat([copies, normal(10, 16, seed=2)]))
    found = near_duplicate_pairs(codes, planes.codes(known), 16 * 16, max_angle=0.1)
    assert found.tolist() == [[i, i] for i in range(10)]


@pytest.mark.parametrize("angle", [-0.1, 3.2, float("nan")])
def test_near_duplicates_refuse_an_angle_out_of_range(angle):
    with pytest.raises(ConfigurationError, match="radians"):
        near_duplicate_pairs(codes_of([[1]], 1), codes_of([[1]], 1), 8, angle)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 6),
    st.integers(0, 5),
    st.integers(1, 4),
    st.floats(0.05, 20),
    st.floats(-100, 100),
    st.integers(1, 20),
)
def test_exact_density_is_the_definition(m, n, d, bandwidth_squared, shift, chunk):
    points = normal(m, d, seed=1, dtype=torch.float64) + shift
    queries = normal(n, d, seed=2, dtype=torch.float64) + shift
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsh, "_CHUNK", chunk)
        got = ExactDensity(points, bandwidth_squared).log_density(queries)
    expected = slow_density(queries, points, bandwidth_squared).log()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def points_and_queries(dtype=torch.float64):
    """Two clusters and the odd one out, a query on a point, one in the centre, one far away."""
    points = normal(40, 3, dtype=dtype)
    points[:15] += 2.0
    points[-1] = 3.0 - points.mean(0)
    queries = torch.stack([points[0], points.mean(0), points[20] + 0.3, points[3] * 2.0])
    return points, queries


def repeated_estimates(points, queries, bandwidth_squared, bits, tables, repeats):
    return torch.stack(
        [
            LSHDensity(points, bandwidth_squared, tables=tables, bits=bits, seed=seed)
            .log_estimate(queries)
            .exp()
            for seed in range(repeats)
        ]
    )


@pytest.mark.parametrize("bits", [1, 4])
def test_estimate_is_unbiased_over_the_draw_of_the_hyperplanes(bits):
    points, queries = points_and_queries()
    estimates = repeated_estimates(points, queries, 1.5, bits, tables=20, repeats=150)
    error = estimates.mean(0) - slow_density(queries, points, 1.5)
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error.abs() <= 4 * standard_error).all()
    # Sharp enough to notice a missing weight: buckets hold a fraction of the points only.
    assert (standard_error <= 0.1 * estimates.mean(0)).all()


def test_variance_stays_below_the_stated_bound():
    points, queries = points_and_queries()
    bits, tables = 3, 4
    estimates = repeated_estimates(points, queries, 1.5, bits, tables, repeats=300)
    centre = points.mean(0)
    bound = []
    for x in queries:
        terms = []
        for y in points:
            kernel = math.exp(-float(((x - y) ** 2).sum()) / 3.0)
            p = (1 - slow_angle((x - centre).numpy(), (y - centre).numpy()) / math.pi) ** bits
            terms.append(kernel / math.sqrt(p) if p else 0.0)
        bound.append((sum(terms) / len(points)) ** 2)
    bound = (torch.tensor(bound) - slow_density(queries, points, 1.5) ** 2) / tables
    assert (estimates.var(0) <= 1.3 * bound).all()  # 300 repeats know it to about 10%


def test_estimate_sums_the_weighted_kernels_of_the_buckets():
    points, queries = points_and_queries()
    density = LSHDensity(points, 1.5, tables=5, bits=3, seed=9)
    centre = points.mean(0)
    planes = RandomHyperplanes(3, tables=5, bits=3, seed=9)
    codes, wanted = planes.codes(points - centre), planes.codes(queries - centre)
    expected = torch.zeros(len(queries), dtype=torch.float64)
    for i, x in enumerate(queries):
        for j, y in enumerate(points):
            shared = int((codes[j] == wanted[i]).sum())
            both_zero = not (x - centre).any() and not (y - centre).any()
            angle = 0.0 if both_zero else slow_angle((x - centre).numpy(), (y - centre).numpy())
            kernel = math.exp(-float(((x - y) ** 2).sum()) / 3.0)
            if shared:
                expected[i] += shared * kernel / (1 - angle / math.pi) ** 3 / (5 * len(points))
    torch.testing.assert_close(density.log_estimate(queries).exp(), expected, rtol=1e-6, atol=1e-12)


def test_chunks_do_not_change_the_estimate(monkeypatch):
    points, queries = points_and_queries()
    whole = LSHDensity(points, 1.5).log_estimate(queries)
    monkeypatch.setattr(lsh, "_PAIR_CHUNK", 30)
    torch.testing.assert_close(LSHDensity(points, 1.5).log_estimate(queries), whole)


def test_hashed_density_with_one_point_in_its_direction_is_exact():
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    density = LSHDensity(points, 1.0, tables=3, bits=40)
    expected = torch.tensor([(math.exp(-0.5)) / 2]).log()
    torch.testing.assert_close(density.log_estimate(torch.tensor([[2.0, 0.0]])), expected)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(0.1, 100))
def test_hashed_density_is_never_farther_from_the_truth_than_its_estimate(seed, bandwidth, spread):
    points = normal(12, 4, seed=seed, dtype=torch.float64)
    queries = spread * normal(6, 4, seed=seed + 1, dtype=torch.float64)
    hashed = LSHDensity(points, bandwidth, tables=2, bits=6, seed=seed)
    exact = ExactDensity(points, bandwidth).log_density(queries)
    got, raw = hashed.log_density(queries), hashed.log_estimate(queries)
    assert got.isfinite().all()
    assert (got <= 0).all()
    assert ((got - exact).abs() <= (raw - exact).abs() + 1e-9).all()


def test_without_a_collision_the_density_falls_with_the_distance():
    points = torch.tensor([[1.0, 0.0], [0.5, 0.0], [-1.5, 0.0]])
    queries = torch.tensor([[0.0, 2.0], [0.0, 3.0], [0.0, 50.0]])
    hashed = LSHDensity(points, 1.0, tables=1, bits=62, seed=0)
    assert (hashed.log_estimate(queries) == -torch.inf).all()
    got = hashed.log_density(queries)
    assert (got.diff() < 0).all()
    assert (got <= ExactDensity(points, 1.0).log_density(queries)).all()


def test_far_terms_do_not_underflow():
    points, query = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[50.0, 0.0]])
    got = LSHDensity(points, 1.0, tables=3, bits=40).log_estimate(query)  # exp(-1200)
    torch.testing.assert_close(got, torch.tensor([-(49.0**2) / 2 - math.log(2)]))


@pytest.mark.parametrize("density", [ExactDensity, LSHDensity])
def test_densities_stay_finite_when_all_points_coincide(density):
    points = torch.full((30, 4), 0.5)  # whose mean is exact
    bandwidth = median_bandwidth_squared(points, torch.Generator())
    got = density(points, bandwidth).log_density(torch.cat([points[:1], points[:1] + 100]))
    assert got[0] == 0
    assert got[1] < -1e30
    assert got.isfinite().all()


@pytest.mark.parametrize("density", [ExactDensity, LSHDensity])
def test_densities_keep_half_precision_and_graphs_out(density):
    points = normal(5, 3).half().requires_grad_()
    got = density(points, 1.0).log_density(points)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert density(points, 1.0).log_density(points[:0]).shape == (0,)


@pytest.mark.parametrize("density", [ExactDensity, LSHDensity])
@pytest.mark.parametrize(
    ("shape", "bandwidth"), [((0, 2), 1.0), ((3,), 1.0), ((3, 2), 0.0), ((3, 2), float("nan"))]
)
def test_densities_refuse_what_has_no_density(density, shape, bandwidth):
    with pytest.raises(ConfigurationError, match="a density needs points"):
        density(torch.zeros(shape), bandwidth)


def test_bandwidth_of_few_points_takes_all_pairs():
    points = normal(30, 4, dtype=torch.float64)
    squared = [float(((a - b) ** 2).sum()) for i, a in enumerate(points) for b in points[:i]]
    got = median_bandwidth_squared(points, torch.Generator())
    assert got == pytest.approx(np.median(squared) / 4)


def test_bandwidth_of_many_points_is_drawn_from_the_generator():
    points = normal(2000, 4)
    draws = [
        median_bandwidth_squared(points, torch.Generator().manual_seed(seed), sample=2000)
        for seed in (0, 0, 1)
    ]
    assert draws[0] == draws[1] != draws[2]
    # Squared distances are 2 chi^2 with 4 degrees of freedom, whose median is 3.357.
    assert draws[0] == pytest.approx(2 * 3.357 / 4, rel=0.1)


def test_bandwidth_is_never_zero():
    tiny = torch.finfo(torch.float32).tiny
    assert median_bandwidth_squared(torch.ones(9, 2), torch.Generator()) == tiny
    assert median_bandwidth_squared(torch.ones(1, 2), torch.Generator()) == tiny
    mostly_equal = torch.tensor([[0.0]] * 9 + [[4.0]])
    assert median_bandwidth_squared(mostly_equal, torch.Generator()) == 4.0


def test_bandwidth_needs_a_point():
    with pytest.raises(ConfigurationError, match="at least one point"):
        median_bandwidth_squared(torch.zeros(0, 2), torch.Generator())
