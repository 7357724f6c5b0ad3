import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.policy.layers import LayerWeights


def by_hand(kept, removed, n_layers):
    """Share of pairs in which a layer valued the kept sample higher, counted one by one."""
    areas = []
    for layer in range(n_layers):
        pairs = list(itertools.product(kept, removed))
        right = sum(
            1.0 if k[layer] > r[layer] else 0.5 if k[layer] == r[layer] else 0.0 for k, r in pairs
        )
        areas.append(right / len(pairs))
    weights = torch.exp(10 * torch.tensor(areas, dtype=torch.float64))
    return weights / weights.sum()


rows = st.lists(st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0])] * 3), min_size=2, max_size=8)


@given(rows, st.data())
def test_learnt_weights_follow_what_each_layer_knew(values, data):
    n_bad = data.draw(st.integers(1, len(values) - 1))
    weights = LayerWeights("learned")
    ids = torch.arange(len(values)) + 7
    weights.note(ids[:1], torch.tensor(values[:1]))
    weights.note(ids[1:], torch.tensor(values[1:]))
    weights.judge(torch.cat([ids[-n_bad:], torch.tensor([1000])]))
    expected = by_hand(values[:-n_bad], values[-n_bad:], 3)
    torch.testing.assert_close(weights.alpha(3), expected)


def test_evidence_adds_up_over_rounds_and_what_is_taken_back_is_forgotten():
    weights = LayerWeights("learned")
    assert weights.alpha(2).tolist() == [0.5, 0.5]
    values = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
    weights.note(torch.arange(4), values)
    weights.judge(torch.empty(0, dtype=torch.int64))
    assert weights.alpha(2).tolist() == [0.5, 0.5]
    weights.judge(torch.tensor([2]))
    once = weights.alpha(2)
    assert once[0] > 0.99
    weights.judge(torch.tensor([0]))  # now the first layer was wrong about two pairs of two
    expected = torch.exp(10 * torch.tensor([3 / 5, 2 / 5], dtype=torch.float64))
    torch.testing.assert_close(weights.alpha(2), expected / expected.sum())


def test_samples_that_are_not_kept_teach_nothing():
    weights = LayerWeights("learned")
    weights.note(torch.arange(3), torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.6]]))
    weights.keep(torch.tensor([0, 2, 8]))
    weights.judge(torch.tensor([2]))
    torch.testing.assert_close(weights.alpha(2), by_hand([[0.9, 0.1]], [[0.5, 0.6]], 2))


def test_samples_never_noted_teach_nothing():
    weights = LayerWeights("learned")
    weights.judge(torch.tensor([3]))
    weights.note(torch.tensor([1]), torch.tensor([[0.1, 0.2]]))
    weights.judge(torch.tensor([1]))  # nothing is left to compare it with
    assert weights.alpha(2).tolist() == [0.5, 0.5]


def test_fixed_ways():
    assert LayerWeights().alpha(4).tolist() == [0.25] * 4
    assert LayerWeights("depth").alpha(3).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert LayerWeights([1, 3]).alpha(2).tolist() == [0.25, 0.75]


def test_state_round_trip(tmp_path):
    weights, again = LayerWeights("learned"), LayerWeights("learned")
    weights.note(torch.arange(3), torch.tensor([[0.1, 0.9], [0.5, 0.2], [0.7, 0.7]]))
    weights.judge(torch.tensor([1]))
    torch.save(weights.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (weights, again):
        each.note(torch.tensor([9]), torch.tensor([[0.3, 0.3]]))
        each.judge(torch.tensor([0]))
    assert torch.equal(weights.alpha(2), again.alpha(2))


@pytest.mark.parametrize("bad", ["deep", [], [0, 0], [1, -1], [float("inf"), 1], [float("nan")]])
def test_other_settings_are_refused(bad):
    with pytest.raises(ConfigurationError, match="layer_weights must be one of"):
        LayerWeights(bad)


def test_the_number_of_layers_must_fit():
    with pytest.raises(ConfigurationError, match="each of the 2 captured layers, but holds 3"):
        LayerWeights([1, 1, 1]).alpha(2)
