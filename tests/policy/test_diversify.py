import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.policy.diversify import class_ceilings, diversify

N_ARMS, N_CLASSES = 2, 3


def choose_by_hand(p):
    """The rules as they are told: again and again the best candidate that no rule forbids."""
    chosen = []

    def near(i, j):
        one, other = p.look[i], p.look[j]
        return one == other or [one, other] in p.pairs or [other, one] in p.pairs

    def allowed(i, class_rule, duplicate_rule, belief_rule):
        if sum(p.arms[c] == p.arms[i] for c in chosen) >= p.arm_ceiling[p.arms[i]]:
            return False
        label = p.labels[i]
        mates = sum(p.labels[c] == label for c in chosen)
        if class_rule and label in p.class_ceiling and mates >= p.class_ceiling[label]:
            return False
        if belief_rule and p.disbelieved[i]:
            return False
        return not (duplicate_rule and (p.known[i] or any(near(i, c) for c in chosen)))

    def below_floor(i):
        return sum(p.arms[c] == p.arms[i] for c in chosen) < p.arm_floor[p.arms[i]]

    stages = [(True, True, True), (False, True, True), (False, False, True), (False,) * 3]
    last = stages if p.relax else stages[:1]
    for floor, rules in [*((True, rules) for rules in stages), *((False, rules) for rules in last)]:
        while len(chosen) < p.quota:
            free = [
                i
                for i in range(len(p.values))
                if i not in chosen and allowed(i, *rules) and (below_floor(i) or not floor)
            ]
            if not free:
                break
            chosen.append(min(free, key=lambda i: (-p.values[i], p.ids[i])))
    return chosen


class Problem:
    def __init__(self, draw):
        n = draw(st.integers(0, 12))

        def rows(element):
            return draw(st.lists(element, min_size=n, max_size=n))

        self.values = rows(st.sampled_from([0.1, 0.5, 0.7, 0.9, -1.0]))
        self.ids = draw(st.permutations(range(100, 100 + n)))
        self.arms = rows(st.integers(0, N_ARMS - 1))
        self.labels = rows(st.integers(-1, N_CLASSES))
        self.known = rows(st.booleans())
        self.disbelieved = rows(st.booleans())
        self.look = rows(st.integers(0, 15))
        self.pairs = draw(st.lists(st.lists(st.integers(0, 15), min_size=2, max_size=2)))
        self.quota = draw(st.integers(0, 14))
        self.arm_ceiling = draw(st.tuples(*[st.integers(0, 9)] * N_ARMS))
        self.relax = draw(st.booleans())
        self.arm_floor = draw(st.tuples(*[st.integers(0, 3)] * N_ARMS))
        self.class_ceiling = dict(enumerate(draw(st.tuples(*[st.integers(0, 5)] * N_CLASSES))))

    def run(self):
        return diversify(
            torch.tensor(self.values),
            torch.tensor(self.ids, dtype=torch.int64),
            torch.tensor(self.arms, dtype=torch.int64),
            torch.tensor(self.labels, dtype=torch.int64),
            quota=self.quota,
            arm_ceiling=torch.tensor(self.arm_ceiling),
            class_ceiling=self.class_ceiling,
            duplicate_of_known=torch.tensor(self.known, dtype=torch.bool),
            arm_floor=torch.tensor(self.arm_floor),
            relax=self.relax,
            repeats=(
                torch.tensor(self.look, dtype=torch.int64),
                torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
            ),
            disbelieved=torch.tensor(self.disbelieved, dtype=torch.bool),
        )


problems = st.composite(Problem)()


@settings(max_examples=400)
@given(problems)
def test_choice_equals_the_rules_as_they_are_told(problem):
    assert problem.run().positions.tolist() == choose_by_hand(problem)


@settings(max_examples=200)
@given(problems)
def test_quota_and_arm_ceiling_always_hold_and_stock_is_used(problem):
    problem.relax = True
    chosen = problem.run().positions
    counts = torch.bincount(torch.tensor(problem.arms).long()[chosen], minlength=N_ARMS)
    stock = torch.bincount(torch.tensor(problem.arms).long(), minlength=N_ARMS)
    ceiling = torch.tensor(problem.arm_ceiling)
    assert len(set(chosen.tolist())) == len(chosen)
    assert (counts <= ceiling).all()
    assert len(chosen) == min(problem.quota, int(torch.minimum(stock, ceiling).sum()))


@given(problems)
def test_chosen_despite_a_rule_were_passed_over_first(problem):
    result = problem.run()
    assert result.relaxed["arm"] == 0
    assert all(result.relaxed[rule] <= result.passed_over[rule] for rule in result.relaxed)


FOUR = torch.arange(4)


def choose(values, **settings):
    settings = {"quota": 4, "arm_ceiling": torch.tensor([4]), **settings}
    labels = settings.pop("labels", torch.full((4,), -1))
    return diversify(torch.tensor(values), FOUR, torch.zeros_like(FOUR), labels, **settings)


def test_best_first_ties_by_id():
    assert choose([0.5, 0.9, 0.5, 0.9]).positions.tolist() == [1, 3, 0, 2]


def test_class_ceiling_gives_way_before_near_duplicates():
    result = choose(
        [0.9, 0.8, 0.7, 0.6],
        labels=torch.tensor([0, 0, 1, 1]),
        class_ceiling={0: 1, 1: 1},
        duplicate_of_known=torch.tensor([True, False, False, False]),
    )
    assert result.positions.tolist() == [1, 2, 3, 0]
    assert result.passed_over == {"arm": 0, "class": 1, "duplicate": 1, "belief": 0}
    assert result.relaxed == {"arm": 0, "class": 1, "duplicate": 1, "belief": 0}


def test_what_is_disbelieved_comes_last():
    first, second = torch.tensor([True, False, False, False]), torch.tensor([0, 1, 0, 0]).bool()
    rules = {"disbelieved": first, "duplicate_of_known": second}
    result = choose([0.9, 0.8, 0.7, 0.6], **rules)
    assert result.positions.tolist() == [2, 3, 1, 0]
    assert result.passed_over["belief"] == result.relaxed["belief"] == 1
    assert choose([0.9, 0.8, 0.7, 0.6], **rules, relax=False).positions.tolist() == [2, 3]


def test_near_duplicates_among_the_candidates():
    look, pairs = torch.tensor([0, 0, 1, 2]), torch.tensor([[1, 2]])
    values = [0.6, 0.7, 0.8, 0.9]
    assert choose(values, repeats=(look, pairs), quota=2).positions.tolist() == [3, 1]
    assert choose(values, quota=2).positions.tolist() == [3, 2]


def test_floors_are_served_first_and_by_the_best():
    arms = torch.tensor([0, 0, 1, 1])
    result = diversify(
        torch.tensor([0.9, 0.8, 0.1, 0.2]),
        FOUR,
        arms,
        torch.full((4,), -1),
        quota=2,
        arm_ceiling=torch.tensor([2, 2]),
        arm_floor=torch.tensor([0, 1]),
    )
    assert result.positions.tolist() == [3, 0]


def test_no_candidates():
    none = torch.empty(0, dtype=torch.int64)
    result = diversify(none.float(), none, none, none, quota=3, arm_ceiling=torch.tensor([1, 1]))
    assert result.positions.shape == (0,)
    assert result.positions.dtype == torch.int64


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ConfigurationError, match="NaN"):
        choose([0.1, math.nan, 0.2, 0.3])
    with pytest.raises(ConfigurationError, match="labels"):
        choose([0.1, 0.2, 0.3, 0.4], labels=torch.zeros(3))
    nothing = torch.empty(0, 2, dtype=torch.int64)
    with pytest.raises(ConfigurationError, match="look"):
        choose([0.1, 0.2, 0.3, 0.4], repeats=(torch.zeros(3, dtype=torch.int64), nothing))
    with pytest.raises(ConfigurationError, match="quota"):
        choose([0.1, 0.2, 0.3, 0.4], quota=-1)


LABELS = st.lists(st.integers(-1, 4), max_size=40)
SLACKS = st.sampled_from([1.0, 1.5, 3.0])


def ceilings_of(reference, candidates, quota, slack=1.5):
    both = (torch.tensor(labels, dtype=torch.int64) for labels in (reference, candidates))
    return class_ceilings(*both, quota, slack)


@given(LABELS, LABELS, st.integers(0, 50), SLACKS)
def test_class_ceilings_follow_the_label_mix_and_admit_the_quota(labels, own, quota, slack):
    ceilings = ceilings_of(labels, own, quota, slack)
    assert set(ceilings) == {*labels, *own} - {-1}
    m = sum(label >= 0 for label in labels)
    for label, ceiling in ceilings.items():
        share = (labels.count(label) + 1) / (m + len(ceilings))
        exact = slack * quota * share if m else quota
        assert ceiling == max(1, math.ceil(exact - 1e-9))
    assert not ceilings or sum(ceilings.values()) >= quota


@given(
    LABELS,
    LABELS,
    st.integers(0, 50),
    SLACKS,
    st.lists(st.integers(0, 2**60), min_size=5, max_size=5, unique=True),
)
def test_how_classes_are_numbered_changes_no_ceiling(labels, own, quota, slack, numbers):
    renamed = dict(enumerate(numbers)) | {-1: -1}
    found = ceilings_of([renamed[c] for c in labels], [renamed[c] for c in own], quota, slack)
    expected = ceilings_of(labels, own, quota, slack)
    assert found == {renamed[label]: ceiling for label, ceiling in expected.items()}


@pytest.mark.parametrize(("quota", "slack"), [(-1, 1.5), (5, 0.5), (5, math.nan)])
def test_class_ceilings_refuse_what_cannot_be(quota, slack):
    with pytest.raises(ConfigurationError, match="expected quota >= 0 and slack >= 1"):
        ceilings_of([0, 2], [], quota, slack)


def test_an_infinite_slack_sets_no_ceilings():
    assert ceilings_of([0, 2], [1], 5, math.inf) == {}
