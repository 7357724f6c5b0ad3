import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.policy.belief import conformal_p_values, disbelieved, least_believed

# Few values, so that ties occur.
values = st.one_of(st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, math.nan]), st.floats(0, 1))
samples = st.lists(st.tuples(values, st.integers(0, 2)), max_size=30)
references = st.lists(values, max_size=20)


def p_value_by_hand(c, reference):
    known = [r for r in reference if not math.isnan(r)]
    return 1.0 if math.isnan(c) else (1 + sum(r <= c for r in known)) / (len(known) + 1)


def double(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def reject(pairs, reference, rate):
    confidence, arms = [c for c, _ in pairs], torch.tensor([k for _, k in pairs]).long()
    return disbelieved(double(confidence), double(reference), arms, rate)


@settings(deadline=None)
@given(st.lists(values, max_size=30), references)
def test_p_values_count_the_reference(confidence, reference):
    found = conformal_p_values(double(confidence), double(reference))
    assert found.tolist() == pytest.approx([p_value_by_hand(c, reference) for c in confidence])


@settings(deadline=None)
@given(samples, references, st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0]))
def test_rejections_are_those_of_benjamini_and_hochberg(pairs, reference, rate):
    """By adjusted p-values: the least of ``p_(j) n / j`` over all ranks ``j`` from one's own on.

    Without a known reference nothing is told, at any rate.
    """
    expected, told = [], not all(map(math.isnan, reference))
    for c, arm in pairs:
        own = sorted(p_value_by_hand(other, reference) for other, k in pairs if k == arm)
        mine = p_value_by_hand(c, reference)
        adjusted = min(p * len(own) / rank for rank, p in enumerate(own, start=1) if p >= mine)
        expected.append(told and adjusted <= rate * (1 + 1e-12) and not math.isnan(c))
    assert reject(pairs, reference, rate).tolist() == expected


def test_false_discoveries_keep_to_the_rate_and_wrong_labels_are_found():
    """Half of a source is implausible: of those rejected, at most the rate is like the reference.

    In a source like the reference, hardly ever anything is rejected, however implausible.
    """
    generator = torch.Generator().manual_seed(0)
    shares, found, alone = [], [], []
    for _ in range(300):
        reference = torch.rand(200, generator=generator)
        like, wrong = (torch.rand(50, generator=generator) for _ in range(2))
        clean = torch.rand(100, generator=generator)
        confidence = torch.cat([like, 0.03 * wrong, clean])
        arms = torch.tensor([0] * 100 + [1] * 100)
        rejected = disbelieved(confidence, reference, arms, rate=0.2)
        shares.append(float(rejected[:50].sum() / rejected[:100].sum().clamp(min=1)))
        found.append(float(rejected[50:100].float().mean()))
        alone.append(float(rejected[100:].any()))
    # The rate is that of n_k samples of which half are null: 0.2 * 50 / 100.
    assert sum(shares) / len(shares) <= 0.1 + 0.02
    assert sum(found) / len(found) >= 0.9
    assert sum(alone) / len(alone) <= 0.2 + 0.05


def test_nothing_is_disbelieved_without_reference_or_knowledge():
    ones = torch.zeros(4).long()
    assert not disbelieved(torch.zeros(4), torch.empty(0), ones, 0.5).any()
    assert not disbelieved(torch.zeros(4), torch.full((9,), math.nan), ones, 0.5).any()
    unknown = torch.tensor([math.nan, 0.0, 0.0, 0.0])
    assert disbelieved(unknown, torch.ones(99), ones, 1.0).tolist() == [False, True, True, True]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5]), st.booleans()), max_size=20))
def test_least_believed_equals_a_sort_in_python(pairs):
    expected = sorted((c, p) for p, (c, among) in enumerate(pairs) if among)
    for most in (0, 3, 40):
        found = least_believed(
            double([c for c, _ in pairs]), torch.tensor([a for _, a in pairs]).bool(), most
        )
        assert found.dtype == torch.int64
        assert found.tolist() == [p for _, p in expected[:most]]


def test_bad_settings_are_refused():
    with pytest.raises(ConfigurationError, match="rate"):
        disbelieved(torch.ones(2), torch.ones(2), torch.zeros(2).long(), rate=1.5)
    with pytest.raises(ConfigurationError, match="most"):
        least_believed(torch.ones(2), torch.ones(2).bool(), most=-1)


@pytest.mark.parametrize("reference", [torch.empty(0), torch.tensor([math.nan, math.nan])])
def test_without_a_known_reference_nobody_is_disbelieved_at_any_rate(reference):
    confidence, arms = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    assert not disbelieved(confidence, reference, arms, 1.0).any()
