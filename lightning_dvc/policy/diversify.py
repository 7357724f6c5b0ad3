"""Choose the best candidates of a round without letting it become one-sided.

Best first, and a candidate is passed over where its source or its class is full this round, where
it nearly repeats a sample that is selected already, or where the model disbelieves its target.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError

Rule = Literal["arm", "class", "duplicate", "belief"]

_STAGES: Final[tuple[tuple[Rule, ...], ...]] = (
    ("arm", "class", "duplicate", "belief"),
    ("arm", "duplicate", "belief"),
    ("arm", "belief"),
    ("arm",),
)
_ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class Diversified:
    """What the rules let through.

    Attributes:
        positions: ``(k,)`` int64 positions of the chosen among the candidates, in order of choice.
        passed_over: Candidates that each rule kept out while all rules held, each counted under
            the first of ``arm``, ``class``, ``duplicate``, ``belief`` that it broke.
        relaxed: Of those, how many were chosen after all because the quota was not met.
    """

    positions: Tensor
    passed_over: dict[Rule, int]
    relaxed: dict[Rule, int]


def diversify(
    values: Tensor,
    ids: Tensor,
    arms: Tensor,
    labels: Tensor,
    *,
    quota: int,
    arm_ceiling: Tensor,
    arm_floor: Tensor | None = None,
    class_ceiling: Mapping[int, int] | None = None,
    duplicate_of_known: Tensor | None = None,
    repeats: tuple[Tensor, Tensor] | None = None,
    disbelieved: Tensor | None = None,
    relax: bool = True,
) -> Diversified:
    """Choose up to ``quota`` candidates, best first, under the diversification rules.

    The floors of the sources are served first, each source by its own best; they are promises, so
    that for their sake the rules give way in any round, in the order told below.

    If the candidates run out before the quota is met, and ``relax`` says so, the class ceiling is
    dropped, then the rule against near-duplicates, at last that against disbelieved targets, and
    what was passed over gets another chance in the same order, so that a budget is used where there
    is stock. The arm ceiling and the quota always hold.

    Args:
        values: ``(n,)`` DVC values, the greater the better, no NaN.
        ids: ``(n,)`` sample ids; of equal values the smaller id comes first.
        arms: ``(n,)`` sources, in ``0 .. K - 1``.
        labels: ``(n,)`` classes, -1 where there is none.
        quota: The most to choose, at least 0.
        arm_ceiling: ``(K,)`` the most to choose from each source.
        arm_floor: ``(K,)`` the least to choose from each source while it has candidates and the
            quota lasts. None: no floors.
        class_ceiling: Class to the most to choose from it, no ceiling for others. None: no such
            rule.
        duplicate_of_known: ``(n,)`` bool, which candidates nearly repeat a selected sample. None:
            none does.
        repeats: ``(n,)`` numbers of what candidates look like, the same for the same look, and
            ``(p, 2)`` pairs of such numbers that nearly repeat each other. None: no two candidates
            do.
        disbelieved: ``(n,)`` bool, whose targets the model disbelieves. None: nobody's.
        relax: Whether the quota matters more than the other rules, as in a last round.

    Returns:
        The chosen positions and what the rules did.

    Raises:
        ConfigurationError: If the arguments do not fit together or a value is NaN.

    Example:
        >>> four = torch.arange(4)
        >>> chosen = diversify(
        ...     torch.tensor([0.9, 0.8, 0.7, 0.6]), four, four % 2, torch.tensor([0, 0, 1, 1]),
        ...     quota=2, arm_ceiling=torch.tensor([2, 2]), class_ceiling={0: 1, 1: 1},
        ... )
        >>> chosen.positions, chosen.passed_over
        (tensor([0, 2]), {'arm': 0, 'class': 1, 'duplicate': 0, 'belief': 0})
    """
    look, pairs = repeats or (torch.arange(len(ids)), torch.empty(0, 2, dtype=torch.int64))
    per_candidate = {"look": look, "known": duplicate_of_known, "disbelieved": disbelieved}
    _check(values, quota, ids=ids, arms=arms, labels=labels, **per_candidate)
    by_id = torch.argsort(ids, stable=True)
    order = by_id[torch.argsort(values[by_id], descending=True, stable=True)]
    resembling: dict[int, list[int]] = {}
    for one, other in pairs.tolist():
        resembling.setdefault(one, []).append(other)
        resembling.setdefault(other, []).append(one)
    choice = _Choice(
        arms=arms.tolist(),
        labels=labels.tolist(),
        arm_room=arm_ceiling.tolist(),
        arm_floor=[0] * len(arm_ceiling) if arm_floor is None else arm_floor.tolist(),
        class_room=dict(class_ceiling or {}),
        duplicate=[False] * len(ids) if duplicate_of_known is None else duplicate_of_known.tolist(),
        look=look.tolist(),
        resembling=resembling,
        disbelieved=[False] * len(ids) if disbelieved is None else disbelieved.tolist(),
    )
    return choice.run(order.tolist(), quota, _STAGES if relax else _STAGES[:1])


def class_ceilings(
    reference_labels: Tensor, labels: Tensor, quota: int, slack: float = 1.5
) -> dict[int, int]:
    """The most that a round may choose from each class: a little more than its natural share.

    ``max(1, ceil(slack * quota * (m_c + 1) / (m + C)))`` for a class with ``m_c`` of ``m``
    reference samples, with ``C`` classes among these and the candidates. The shares are those of
    the reference, not uniform: that lifted two unbalanced data sets from 45% to 75% and from 93% to
    109% of the way from random selection to selection from the clean samples only. They are
    smoothed (Laplace), because a small reference may lack a class altogether, which must not
    starve. A number that no sample has is no class: it would take from the shares of the others.

    Args:
        reference_labels: ``(m,)`` classes of the reference, at least 0; -1 (no class) is left out.
        labels: ``(n,)`` the same of the candidates.
        quota: Samples that the round chooses, at least 0.
        slack: How far a class may exceed its share, at least 1; infinite for no ceilings.

    Returns:
        Class to ceiling, at least 1 each. Without any labelled reference nothing is known about the
        mix, so each is the whole quota.

    Raises:
        ConfigurationError: If an argument is out of its range.

    Example:
        >>> class_ceilings(torch.tensor([7] * 7 + [9]), torch.tensor([9, -1]), quota=100)
        {7: 120, 9: 30}
    """
    if quota < 0 or not slack >= 1:
        raise ConfigurationError(
            f"expected quota >= 0 and slack >= 1, but got quota={quota} and slack={slack}; change "
            "the one that is out of range"
        )
    if math.isinf(slack):
        return {}
    known, own = (given[given >= 0].cpu() for given in (reference_labels, labels))
    classes, number = torch.cat([known, own]).unique(return_inverse=True)
    counts = torch.bincount(number[: len(known)], minlength=len(classes)).double() + 1
    ceilings = slack * quota * counts / counts.sum()
    if not len(known):
        ceilings = torch.full_like(counts, quota)
    whole = (ceilings - _ROUNDING).ceil().to(torch.int64).clamp(min=1)
    return dict(zip(classes.tolist(), whole.tolist(), strict=True))


class _Choice:
    """Greedy choice in progress: the room that is left and what was chosen so far."""

    def __init__(
        self,
        arms: list[int],
        labels: list[int],
        arm_room: list[int],
        arm_floor: list[int],
        class_room: dict[int, int],
        duplicate: list[bool],
        look: list[int],
        resembling: dict[int, list[int]],
        disbelieved: list[bool],
    ) -> None:
        self.arms, self.labels = arms, labels
        self.arm_room = arm_room
        self.arm_floor = arm_floor
        self.class_room = class_room
        self.duplicate = duplicate
        self.look = look
        self.resembling = resembling
        self.taken_looks: set[int] = set()
        self.disbelieved = disbelieved
        self.chosen: list[int] = []

    def run(
        self, order: list[int], quota: int, stages: tuple[tuple[Rule, ...], ...]
    ) -> Diversified:
        reasons: dict[int, Rule] = {}
        waiting = order
        floors = [(rules, True) for rules in _STAGES] if any(self.arm_floor) else []
        for rules, floor in [*floors, *((rules, False) for rules in stages)]:
            left: list[int] = []
            for place, position in enumerate(waiting):
                if len(self.chosen) == quota:
                    left += waiting[place:]
                    break
                if floor and self.arm_floor[self.arms[position]] <= 0:
                    left.append(position)
                    continue
                broken = self.broken(position, rules)
                if broken is None:
                    self.take(position)
                else:
                    reasons.setdefault(position, broken)
                    left.append(position)
            waiting = left
        counts = Counter(reasons.values())
        relaxed = Counter(reasons[p] for p in self.chosen if p in reasons)
        rules = _STAGES[0]
        return Diversified(
            torch.tensor(self.chosen, dtype=torch.int64),
            {rule: counts[rule] for rule in rules},
            {rule: relaxed[rule] for rule in rules},
        )

    def broken(self, position: int, rules: tuple[Rule, ...]) -> Rule | None:
        """The first of the rules that forbids a candidate."""
        label = self.labels[position]
        forbids = {
            "arm": self.arm_room[self.arms[position]] <= 0,
            "class": self.class_room.get(label, 1) <= 0,
            "duplicate": self.duplicate[position] or self.look[position] in self.taken_looks,
            "belief": self.disbelieved[position],
        }
        return next((rule for rule in rules if forbids[rule]), None)

    def take(self, position: int) -> None:
        self.chosen.append(position)
        self.arm_room[self.arms[position]] -= 1
        self.arm_floor[self.arms[position]] -= 1
        if self.labels[position] in self.class_room:
            self.class_room[self.labels[position]] -= 1
        look = self.look[position]
        self.taken_looks.update([look], self.resembling.get(look, []))


def _check(values: Tensor, quota: int, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and len(tensor) != len(values):
            raise ConfigurationError(
                f"expected as many {name} as values, {len(values)}, but got {len(tensor)}; pass "
                "one row per candidate"
            )
    if bool(values.isnan().any()):
        raise ConfigurationError(
            "expected a value for each candidate, but some are NaN; leave out candidates that "
            "could not be scored"
        )
    if quota < 0:
        raise ConfigurationError(f"quota must be at least 0, but is {quota}; pass 0 to choose none")
