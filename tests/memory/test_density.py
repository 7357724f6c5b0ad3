import math
from bisect import bisect_left
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.memory import density
from lightning_dvc.memory.density import ExactDensity, LSHDensity, median_bandwidth_squared
from lightning_dvc.memory.lsh import RandomHyperplanes

# By default so few points are not sampled at all.
Sampled = partial(LSHDensity, tables=2, most=1, sample=2)
KINDS = [ExactDensity, LSHDensity, Sampled]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


@settings(max_examples=50)
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
        patch.setattr(density, "_CHUNK", chunk)
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


def kernels(queries, points, bandwidth_squared):
    """Kernel of each query and point, from the definition."""
    differences = queries[:, None].double() - points[None].double()
    return (differences.square().sum(2) / (-2 * bandwidth_squared)).exp()


def slow_neighbours(queries, points, tables, bits, most, seed):
    """Who is in N, ``(n, m)`` bool: places in lists of (code, point), table by table."""
    centre = points.mean(0)
    planes = RandomHyperplanes(points.shape[1], tables, bits, seed)
    codes, wanted = planes.codes(points - centre).tolist(), planes.codes(queries - centre).tolist()
    found = torch.zeros(len(queries), len(points), dtype=torch.bool)
    for table in range(tables):
        ordered = sorted((row[table], point) for point, row in enumerate(codes))
        for query, row in enumerate(wanted):
            place = bisect_left(ordered, (row[table], -1))
            start = min(max(place - most // 2, 0), len(points) - most)
            for _, point in ordered[start : start + most]:
                found[query, point] = True
    return found


SETTING = {"tables": 3, "bits": 6, "most": 4, "sample": 9}


def redrawn_estimates(monkeypatch, points, queries, bandwidth_squared, repeats):
    """Estimates under the same hyperplanes, hence neighbours, and independent samples."""
    found = []
    for draw in range(repeats):
        generator = torch.Generator().manual_seed(draw)
        monkeypatch.setattr(density, "torch_stream", lambda *_, generator=generator: generator)
        hashed = LSHDensity(points, bandwidth_squared, **SETTING)
        found.append(hashed.log_estimate(queries).exp())
    return torch.stack(found)


def test_estimate_is_unbiased_over_the_draw_of_the_sample(monkeypatch):
    points, queries = points_and_queries()
    estimates = redrawn_estimates(monkeypatch, points, queries, 1.5, repeats=2000)
    error = estimates.mean(0) - kernels(queries, points, 1.5).mean(1)
    standard_error = estimates.std(0) / math.sqrt(len(estimates))
    assert (error.abs() <= 4 * standard_error).all()
    # Sharp enough to notice a pair that is counted twice, or not at all.
    assert (standard_error[:3] <= 0.02 * estimates.mean(0)[:3]).all()


def test_variance_is_as_stated(monkeypatch):
    points, queries = points_and_queries()
    estimates = redrawn_estimates(monkeypatch, points, queries, 1.5, repeats=2000)
    near = slow_neighbours(queries, points, 3, 6, 4, seed=0)
    far = kernels(queries, points, 1.5).masked_fill(near, 0)
    m, r = len(points), 9
    stated = (1 - r / m) * far.var(1) / r
    assert (near.sum(1) < 12).any()  # some come twice
    # How well 2,000 draws know a variance follows from the fourth moment.
    centred = (estimates - estimates.mean(0)).square()
    standard_error = centred.std(0) / math.sqrt(len(estimates))
    assert ((centred.mean(0) - stated).abs() <= 4 * standard_error).all()
    assert (standard_error[:3] <= 0.1 * stated[:3]).all()


@settings(max_examples=60)
@given(
    st.integers(0, 10_000),
    st.integers(1, 39),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([1, 5, 62]),
    st.integers(1, 2**12),
)
def test_estimate_is_the_formula(seed, sample, tables, most, bits, chunk):
    points, queries = points_and_queries()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(density, "_CHUNK", chunk)
        hashed = LSHDensity(
            points, 1.5, tables=tables, bits=bits, most=most, sample=sample, seed=seed
        )
        got = hashed.log_estimate(queries)
    generator = density.torch_stream(seed, "density sample")
    drawn = torch.zeros(40, dtype=torch.bool)
    drawn[torch.randperm(40, generator=generator)[:sample]] = True
    near = slow_neighbours(queries, points, tables, bits, most, seed)
    weights = near.double() + (~near & drawn).double() * (40 / sample)
    expected = (weights * kernels(queries, points, 1.5)).mean(1)
    torch.testing.assert_close(got.exp(), expected, rtol=1e-10, atol=0)


def test_a_point_with_copies_of_itself_in_every_table_counts_once():
    points = normal(50, 4, dtype=torch.float64)
    alike = LSHDensity(points, 0.01, tables=20, bits=40, most=1, sample=1)
    got = alike.log_estimate(points).exp() * 50
    # Codes of equal points are equal, so each query is next to itself in all tables.
    assert (got >= 1).all()
    assert (got <= 1 + 50 * kernels(points, points, 0.01).fill_diagonal_(0).sum(1) + 1e-9).all()


@pytest.mark.parametrize("sample", [40, 41, 10_000])
def test_a_sample_of_all_points_is_exact(sample):
    points, queries = points_and_queries()
    got = LSHDensity(points, 1.5, sample=sample).log_estimate(queries)
    expected = kernels(queries, points, 1.5).mean(1).log()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_neighbours_make_up_for_what_a_sample_misses_under_a_narrow_bandwidth():
    centres = 10 * normal(500, 32)
    points = torch.cat([centres + 0.1 * normal(500, 32, seed=seed) for seed in (1, 2, 3)])
    queries = centres[:200] + 0.1 * normal(200, 32, seed=4)
    exact = ExactDensity(points, 0.1).log_density(queries)
    alone, both = (
        LSHDensity(points, 0.1, tables=4, most=most, sample=50).log_density(queries) - exact
        for most in (1, 8)
    )
    assert both.abs().median() < 0.01
    # Of its three neighbours a query sees one in each table at most.
    sample = points[torch.randperm(1500, generator=torch.Generator().manual_seed(0))[:50]]
    sampled = ExactDensity(sample, 0.1).log_density(queries) - exact
    assert sampled.abs().median() > 100
    assert both.abs().mean() < alone.abs().mean() < sampled.abs().mean()


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(0.1, 100))
def test_hashed_density_is_never_farther_from_the_truth_than_its_estimate(seed, bandwidth, spread):
    points = normal(12, 4, seed=seed, dtype=torch.float64)
    queries = spread * normal(6, 4, seed=seed + 1, dtype=torch.float64)
    hashed = Sampled(points, bandwidth, seed=seed)
    exact = ExactDensity(points, bandwidth).log_density(queries)
    got, raw = hashed.log_density(queries), hashed.log_estimate(queries)
    assert got.isfinite().all()
    assert (got <= 0).all()
    assert ((got - exact).abs() <= (raw - exact).abs() + 1e-9).all()


def test_an_estimate_that_misses_everything_near_is_raised_to_the_floor():
    # The query lies between, but in the direction of the few points that are farther from it.
    points = torch.cat([torch.zeros(48, 1), torch.full((16, 1), 90.0)])
    query, raised = torch.tensor([[30.0]]), 0
    centre = points.mean(0)
    floor = -((query - centre).square().sum() + (points - centre).square().mean()) / 2
    for seed in range(20):
        hashed = LSHDensity(points, 1.0, tables=1, bits=1, most=1, sample=1, seed=seed)
        got, raw = hashed.log_density(query), hashed.log_estimate(query)
        torch.testing.assert_close(got, torch.maximum(raw, floor[None]))
        raised += int(raw < floor)
    assert 0 < raised < 20


@pytest.mark.parametrize("kind", [ExactDensity, LSHDensity])
def test_rounding_makes_no_kernel_larger_than_one(kind):
    points = 10 * normal(50, 8)  # each far from all others, in bandwidths
    assert (kind(points, 1e-8).log_density(points) <= -math.log(50) + 1e-6).all()


def test_far_terms_do_not_underflow():
    points, query = torch.tensor([[1.0, 0.0], [-1.0, 0.0]] * 2), torch.tensor([[50.0, 0.0]])
    expected = torch.tensor([-(49.0**2) / 2 - math.log(2)])  # exp(-1200)
    for kind in (ExactDensity, LSHDensity):
        torch.testing.assert_close(kind(points, 1.0).log_density(query), expected)
    near = LSHDensity(points, 1.0, tables=1, most=4, sample=1)
    torch.testing.assert_close(near.log_estimate(query), expected)


def test_queries_do_not_fill_the_memory():
    """Temporaries are as wide as the sample or the neighbours, and so many rows at a time."""
    points, widths = normal(3000, 16), []
    hashed = LSHDensity(points, 16.0, sample=500)
    original = hashed._log_estimate
    hashed._log_estimate = lambda x: widths.append(len(x)) or original(x)
    hashed.log_density(normal(5000, 16, seed=1))
    assert sum(widths) == 5000
    assert max(widths) * max(500, 4 * 8 * 16) <= density._CHUNK


def test_double_precision_stays():
    points, queries = points_and_queries()
    for kind in KINDS:
        assert kind(points, 1.5).log_density(queries).dtype == torch.float64


@pytest.mark.parametrize("setting", [{"most": 0}, {"sample": 0}, {"tables": 0}, {"bits": 63}])
def test_hashed_density_refuses_numbers_out_of_range(setting):
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        LSHDensity(torch.zeros(3, 2), 1.0, **setting)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_stay_finite_when_all_points_coincide(kind):
    points = torch.full((30, 4), 0.5)  # whose mean is exact
    bandwidth = median_bandwidth_squared(points, torch.Generator())
    got = kind(points, bandwidth).log_density(torch.cat([points[:1], points[:1] + 100]))
    assert got[0] == 0
    assert got[1] < -1e30
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_densities_keep_half_precision_and_graphs_out(kind):
    points = normal(5, 3).half().requires_grad_()
    got = kind(points, 1.0).log_density(points)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert kind(points, 1.0).log_density(points[:0]).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "bandwidth"), [((0, 2), 1.0), ((3,), 1.0), ((3, 2), 0.0), ((3, 2), float("nan"))]
)
def test_densities_refuse_what_has_no_density(kind, shape, bandwidth):
    with pytest.raises(ConfigurationError, match="a density needs points"):
        kind(torch.zeros(shape), bandwidth)


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
