import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dvc.policy.budget import round_quota
from lightning_dvc.policy.plan import Plan, Run, plan_rounds, planned_steps

RUNS = st.builds(
    Run,
    batch_size=st.integers(1, 40),
    drop_last=st.booleans(),
    world_size=st.integers(1, 3),
    accumulate=st.integers(1, 4),
    limit_batches=st.one_of(st.integers(1, 5), st.floats(0.01, 1.0)),
)


def sizes(plan, budget, epochs):
    """Samples of each epoch, one by one."""
    return [n for length, n in plan.growth(budget, epochs) for _ in range(length)]


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        (Run(16), 7),
        (Run(16, drop_last=True), 6),
        (Run(16, world_size=3), 3),
        (Run(16, world_size=3, drop_last=True), 2),
        (Run(16, accumulate=3), 3),
        (Run(16, limit_batches=4), 4),
        (Run(16, limit_batches=40), 7),
        (Run(16, limit_batches=0.5), 3),
        (Run(16, limit_batches=0.01), 1),
        (Run(16, limit_batches=1.0), 7),
        (Run(16, limit_batches=0.0), 0),
        (Run(16, limit_batches=0), 0),
        (Run(200, drop_last=True, limit_batches=0.5), 0),
    ],
)
def test_steps_of_an_epoch_of_a_hundred_samples(run, steps):
    assert run.steps(100) == steps


def test_rounds_come_at_the_epochs_of_the_period():
    plan = Plan(n_selected=4, n_rounds=3, period=2)
    assert sizes(plan, 120, 7) == [43, 43, 82, 82, 120, 120, 120]
    assert sizes(plan, 120, 3) == [43, 43, 82]
    assert sizes(plan, 120, 0) == []
    assert sizes(Plan(82, 3, 2, rounds_done=2), 120, 3) == [120] * 3
    assert sizes(Plan(50, 0, 1), 120, 3) == [50] * 3


@given(
    budget=st.integers(2, 500),
    n_rounds=st.integers(1, 12),
    period=st.integers(1, 4),
    run=RUNS,
    data=st.data(),
)
def test_rounds_that_add_less_or_are_left_out_never_make_a_longer_run(
    budget, n_rounds, period, run, data
):
    plan = Plan(data.draw(st.integers(1, budget)), n_rounds, period)
    epochs = n_rounds * period + 3
    selected, number, last, steps = plan.n_selected, 1, n_rounds, 0
    for epoch in range(epochs):
        if epoch % period == 0 and number <= last:
            if 1 < number < last and data.draw(st.booleans()):
                last -= 1  # left out
            else:
                selected -= data.draw(st.integers(0, selected - 1))  # taken back or set aside
                quota = round_quota(budget, selected, number, last)
                selected += data.draw(st.integers(0, quota))
                number += 1
        steps += run.steps(selected)
    planned = plan.steps(budget, epochs, run)
    assert steps <= planned
    assert planned == sum(run.steps(n) for n in sizes(plan, budget, epochs))


@given(
    rounds=st.integers(1, 12),
    every=st.one_of(st.none(), st.integers(1, 4)),
    max_steps=st.integers(1, 300),
    run=RUNS,
)
def test_a_run_of_steps_is_planned_like_one_of_the_epochs_that_they_take(
    rounds, every, max_steps, run
):
    run = Run(**{**vars(run), "drop_last": False, "max_steps": max_steps})
    plan = plan_rounds(rounds, every, 10, 200, run)
    taken = 0  # epochs until the steps are done
    while plan.steps(200, taken, run) < max_steps:
        taken += 1
    assert (plan.n_rounds - 1) * plan.period < taken  # the last round is in time
    by_epochs = Run(**{**vars(run), "max_steps": None, "max_epochs": taken})
    assert plan == plan_rounds(rounds, every, 10, 200, by_epochs)
    assert planned_steps(plan, 200, run) == max_steps


@pytest.mark.parametrize(
    ("rounds", "every", "ends", "n_rounds", "period"),
    [
        (3, None, {"max_epochs": 9}, 3, 2),
        (3, None, {"max_epochs": 2}, 2, 1),
        (3, 2, {"max_epochs": 3}, 2, 2),
        (3, None, {"max_epochs": 9, "max_steps": 10_000}, 3, 2),
        (3, None, {"max_epochs": 9, "max_steps": 3}, 1, 1),
        (3, None, {"max_epochs": 0}, 0, 1),
        (3, None, {"max_steps": 0}, 1, 1),
        (3, None, {}, 3, 1),
        (3, 4, {}, 3, 4),
    ],
)
def test_rounds_are_spread_over_two_thirds_of_the_run(rounds, every, ends, n_rounds, period):
    plan = plan_rounds(rounds, every, 4, 120, Run(16, **ends))
    assert (plan.n_rounds, plan.period) == (n_rounds, period)
    assert plan.n_selected == 4


@pytest.mark.parametrize(
    ("ends", "steps"),
    [
        ({"max_epochs": 4}, 25),
        ({"max_steps": 30}, 30),
        ({"max_epochs": 4, "max_steps": 30}, 25),
        ({"max_epochs": 4, "max_steps": 7}, 7),
        ({}, None),
    ],
)
def test_steps_end_with_whatever_comes_first(ends, steps):
    assert planned_steps(Plan(4, 3, 1), 120, Run(16, **ends)) == steps


def test_very_many_steps_are_planned_at_once():
    plan = plan_rounds(10, None, 30, 1000, Run(32, max_steps=10**9))
    epochs = 10**9 / 32
    assert plan.n_rounds == 10
    assert math.isclose(plan.period, epochs * 2 / 3 / 10, rel_tol=0.5)
