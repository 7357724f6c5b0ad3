"""Rewards of gradients of every form, taken in part by part, against full gradients."""

import math

import pytest
import torch
from helpers import oracles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dvc.capture.convolution import Convolved
from lightning_dvc.capture.gradients import Materialised, OuterProducts
from lightning_dvc.capture.scattered import Scattered
from lightning_dvc.distributed import Group
from lightning_dvc.strategies import rewards as rewards_module
from lightning_dvc.strategies.rewards import NOT_JUDGED_BY, ArmRewards, MeasuredGain, mean_by_arm

ARMS = 4


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def of_linear(n, seed, positions):
    inputs, deltas = normal(n, positions, 3, seed=seed), normal(n, positions, 2, seed=seed + 1)
    full = torch.einsum("ntk,nti->nki", deltas, inputs)
    return OuterProducts(inputs, deltas, True), torch.cat([full, deltas.sum(1)[:, :, None]], 2)


def of_embedding(n, seed):
    tokens = normal(n, 4, seed=seed).mul(2).long().abs() % 5
    deltas = normal(n, 4, 2, seed=seed + 1)
    full = torch.zeros(n, 5, 2, dtype=torch.float64)
    for i in range(n):
        for token, delta in zip(tokens[i].tolist(), deltas[i], strict=True):
            full[i, token] += delta
    return Scattered(tokens, deltas, n_tokens=5), full


def of_convolution(n, seed):
    layer = nn.Conv1d(1, 2, kernel_size=2, bias=False).double()
    x, deltas = normal(n, 1, 4, seed=seed), normal(n, 2, 3, seed=seed + 1)
    full = torch.stack([(deltas * x[:, :, at : at + 3]).sum(2) for at in range(2)], 2)
    return Convolved(layer, [x], [deltas]), full


def of_norm(n, seed):
    full = normal(n, 3, 2, seed=seed)
    return Materialised(full), full


LAYERS = [
    lambda n, seed: of_linear(n, seed, 1),
    lambda n, seed: of_linear(n, seed, 3),
    of_embedding,
    of_convolution,
    of_norm,
]


def rewards_by_hand(layers, arms, reference):
    found = []
    for arm in range(ARMS):
        rows = [i for i, at in enumerate(arms) if at == arm]
        if not rows:
            found.append(math.nan)
            continue
        means = [oracles.mean([full[i] for i in rows]) for full in layers]
        pairs = list(zip(means, reference, strict=True))
        product = math.fsum(oracles.inner(mean, full) for mean, full in pairs)
        lengths = [math.fsum(oracles.inner(x, x) for x in xs) for xs in (means, reference)]
        found.append((1 + product / math.sqrt(lengths[0] * lengths[1])) / 2)
    return found


@settings(max_examples=60)
@given(
    kinds=st.lists(st.sampled_from(range(len(LAYERS))), min_size=1, max_size=4),
    arms=st.lists(st.integers(NOT_JUDGED_BY, ARMS - 1), min_size=1, max_size=15),
    batch_size=st.integers(1, 16),
    part_size=st.integers(1, 5),
    seed=st.integers(0, 999),
)
def test_rewards_of_every_form_however_they_are_cut(kinds, arms, batch_size, part_size, seed):
    made = [LAYERS[kind](len(arms), 100 * number + seed) for number, kind in enumerate(kinds)]
    layers, full = [layer for layer, _ in made], [full for _, full in made]
    reference = [normal(*x.shape[1:], seed=7 + number) for number, x in enumerate(full)]
    rewards, at = ArmRewards(ARMS, reference), torch.tensor(arms)
    for batch in torch.arange(len(arms)).split(batch_size):
        for number, layer in enumerate(layers):
            for part in batch.split(part_size):
                rewards.add(number, layer.rows(part), at[part])
        rewards.close(at[batch])
    expected = torch.tensor(rewards_by_hand(full, arms, reference), dtype=torch.float64)
    found = rewards.rewards(Group())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, equal_nan=True)
    # Asking changes nothing.
    assert torch.equal(rewards.rewards(Group()).nan_to_num(), found.nan_to_num())


@settings(max_examples=60)
@given(
    kinds=st.lists(st.sampled_from(range(len(LAYERS))), min_size=1, max_size=3),
    candidates=st.lists(
        st.tuples(st.integers(0, ARMS - 1), st.booleans()), min_size=1, max_size=15
    ),
    seed=st.integers(0, 999),
)
def test_candidates_may_come_to_count_later(kinds, candidates, seed):
    made = [LAYERS[kind](len(candidates), 100 * at + seed) for at, kind in enumerate(kinds)]
    layers, full = [layer for layer, _ in made], [full for _, full in made]
    reference = [normal(*x.shape[1:], seed=7 + number) for number, x in enumerate(full)]
    at, later = (torch.tensor(column) for column in zip(*candidates, strict=True))
    rewards, first = ArmRewards(ARMS, reference), at.masked_fill(later, NOT_JUDGED_BY)
    for number, layer in enumerate(layers):
        rewards.add(number, layer, first)
    rewards.close(first)
    for rows in torch.nonzero(later).flatten().split(4):  # in any batches, of any order of arms
        rewards.take_in([layer.rows(rows) for layer in layers], at[rows])
    expected = torch.tensor(rewards_by_hand(full, at.tolist(), reference), dtype=torch.float64)
    found = rewards.rewards(Group())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9, equal_nan=True)


def test_of_very_many_arms_only_projected_sums_are_kept(monkeypatch):
    """Each arm's gradients agree with the reference by another known cosine."""
    n_arms, shape = 60, (300, 200)
    monkeypatch.setattr(rewards_module, "_SUMS", n_arms * 64 * 64)
    reference, cosines = normal(*shape, seed=0), torch.linspace(-0.9, 0.9, n_arms).double()
    across = torch.stack([normal(*shape, seed=1 + arm) for arm in range(n_arms)])
    unit = reference / reference.norm()
    across -= (across * unit).sum((1, 2))[:, None, None] * unit
    across /= across.flatten(1).norm(dim=1)[:, None, None]
    full = cosines[:, None, None] * unit + (1 - cosines**2).sqrt()[:, None, None] * across
    rewards, arms = ArmRewards(n_arms, [reference]), torch.arange(n_arms)
    for rows in arms.repeat(2).split(25):  # each arm twice, in parts of batches
        rewards.add(0, Materialised(full[rows]), rows)
        assert sum(total.numel() for total in rewards._batch.values()) <= 25 * 64 * 64
        rewards.close(rows)
    assert sum(total.numel() for total in rewards._sums) == n_arms * 64 * 64
    found = 2 * rewards.rewards(Group()) - 1
    assert (found - cosines).abs().max() < 0.06  # of full rank: four deviations of 1 / 64
    assert (found - cosines).abs().max() > 1e-6  # else nothing was projected


@pytest.mark.parametrize("arm", [NOT_JUDGED_BY, 0, 1, 2])
def test_a_candidate_without_finite_gradients_spoils_no_other_source(arm):
    """The cache rounds what it keeps, in half precision to infinity, if need be."""
    full, arms = normal(6, 2, 2, seed=0) + 1, [0, 0, 1, 1, 2, 2]
    found = []
    for value in (1.0, torch.inf):
        rewards, at = ArmRewards(3, [torch.ones(2, 2).double()]), torch.tensor(arms)
        full[arms.index(max(arm, 0)), 0, 0] = value
        at[arms.index(max(arm, 0))] = arm
        order = at.argsort(stable=True)
        rewards.add(0, Materialised(full[order]), at[order])
        rewards.close(at)
        found.append(rewards.rewards(Group()))
    others = torch.arange(3) != arm
    torch.testing.assert_close(found[1][others], found[0][others])


def test_batches_after_a_question_count_as_well():
    layer, full = of_linear(6, 0, 1)
    reference = [normal(2, 4, seed=5)]
    rewards, arms = ArmRewards(ARMS, reference), torch.tensor([0, 1, 0, 2, 0, 1])
    for upto in (3, 6):
        rows = slice(upto - 3, upto)
        rewards.add(0, layer.rows(rows), arms[rows])
        rewards.close(arms[rows])
        expected = rewards_by_hand([full[:upto]], arms[:upto].tolist(), reference)
        found = rewards.rewards(Group())
        oracles.assert_near(found.nan_to_num(), [0.0 if e != e else e for e in expected])


@given(st.lists(st.tuples(st.integers(0, ARMS - 1), st.floats(0, 1)), max_size=12))
def test_mean_by_arm_is_the_mean_of_each_arms_own(candidates):
    arms = torch.tensor([arm for arm, _ in candidates], dtype=torch.int64)
    numbers = torch.tensor([number for _, number in candidates], dtype=torch.float64)
    found = mean_by_arm(numbers, arms, ARMS).tolist()
    for arm in range(ARMS):
        own = [number for other, number in candidates if other == arm]
        assert (
            math.isnan(found[arm])
            if not own
            else math.isclose(found[arm], math.fsum(own) / len(own), abs_tol=1e-12)
        )


def test_gain_is_shared_by_what_was_added_and_scaled_by_the_largest_change():
    gain = MeasuredGain()
    gain.added(torch.tensor([4, 2, 0]))
    assert gain.rewards(0.5, 3) is None  # there is no score from before
    assert gain.rewards(0.5, 3) is None  # nothing was added in between
    expected = [
        ([4, 2, 0], 0.7, [1.0, 0.75, math.nan]),
        ([0, 3, 3], 0.6, [math.nan, 0.25, 0.25]),  # half the largest change, downwards
        ([5, 5, 1], 0.6, [0.5, 0.5, 0.5]),
    ]
    for counts, score, rewards in expected:
        gain.added(torch.tensor(counts))
        found = gain.rewards(score, 3)
        torch.testing.assert_close(
            found, torch.tensor(rewards, dtype=torch.float64), equal_nan=True
        )


@pytest.mark.parametrize("unknown", [None, math.nan, math.inf])
def test_what_is_added_while_no_score_is_known_counts_when_one_is(unknown):
    gain = MeasuredGain()
    gain.rewards(0.5, 2)
    gain.added(torch.tensor([1, 0]))
    assert gain.rewards(unknown, 2) is None
    gain.added(torch.tensor([1, 1]))
    assert gain.rewards(0.75, 2).tolist() == [1.0, 0.75]


def test_scores_that_never_change_and_rounds_that_add_nothing_are_worth_nothing():
    gain = MeasuredGain()
    gain.rewards(0.5, 2)
    gain.added(torch.tensor([1, 0]))
    assert gain.rewards(0.5, 2)[0] == 0.5
    gain.added(torch.tensor([0, 0]))
    assert gain.rewards(0.9, 2).isnan().all()


def test_gain_goes_on_from_its_state(tmp_path):
    gain, again = MeasuredGain(), MeasuredGain()
    gain.rewards(0.5, 2)
    gain.added(torch.tensor([4, 2]))
    gain.rewards(0.9, 2)
    gain.added(torch.tensor([1, 2]))
    torch.save(gain.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(gain.rewards(0.8, 2), again.rewards(0.8, 2))


def test_a_source_added_since_has_no_gain_yet():
    gain = MeasuredGain()
    gain.rewards(0.5, 2)
    gain.added(torch.tensor([4, 2]))
    expected = torch.tensor([1.0, 0.75, math.nan], dtype=torch.float64)
    torch.testing.assert_close(gain.rewards(0.9, 3), expected, equal_nan=True)
