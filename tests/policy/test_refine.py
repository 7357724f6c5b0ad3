import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.policy.refine import disowned, threshold

confidences = st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=30)


@settings(deadline=None)
@given(confidences, st.floats(0, 1), st.integers(0, 40))
def test_disowned_equals_a_sort_in_python(confidence, limit, most):
    expected = sorted((c, p) for p, c in enumerate(confidence) if c < limit)[:most]
    positions = disowned(torch.tensor(confidence, dtype=torch.float64), limit, most)
    assert positions.dtype == torch.int64
    assert positions.tolist() == [p for _, p in expected]


@settings(deadline=None)
@given(confidences, st.floats(0, 1))
def test_threshold_is_a_quantile_of_the_known(confidence, quantile):
    known = sorted(c for c in confidence if not math.isnan(c))
    result = threshold(torch.tensor(confidence, dtype=torch.float64), quantile)
    if not known:
        assert result == -math.inf
        return
    place = quantile * (len(known) - 1)
    low, high = known[math.floor(place)], known[math.ceil(place)]
    assert result == pytest.approx(low + (place - math.floor(place)) * (high - low))


def test_ties_by_position_and_only_strictly_below():
    assert disowned(torch.tensor([0.2, 0.1, 0.1, 0.3]), 0.2, 9).tolist() == [1, 2]


def test_without_reference_or_knowledge_nothing_is_taken_back():
    nothing = threshold(torch.full((3,), math.nan))
    assert disowned(torch.tensor([0.0, 0.5]), nothing, 5).tolist() == []
    assert disowned(torch.full((4,), math.nan), 1.0, 5).tolist() == []


def test_bad_settings_are_refused():
    with pytest.raises(ConfigurationError, match="quantile"):
        threshold(torch.ones(2), quantile=1.5)
    with pytest.raises(ConfigurationError, match="most"):
        disowned(torch.ones(2), 0.5, most=-1)
