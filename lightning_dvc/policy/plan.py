"""When rounds take place, and how many steps a run takes while its selection grows."""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from lightning_dvc.policy.budget import round_quota

# The rest of the run trains on what is then a full selection.
_SELECTING_SHARE: Final = 2 / 3


@dataclass(frozen=True)
class Run:
    """What a trainer makes of a selection: batches, optimiser steps and epochs.

    Attributes:
        batch_size: Samples in a batch of one process, at least 1.
        drop_last: Whether a smaller last batch is left out.
        world_size: Processes, which get equally many samples, at least 1.
        accumulate: Batches of an optimiser step, at least 1; the last step of an epoch may have
            fewer.
        limit_batches: Most batches of an epoch if an int, their share in ``[0, 1]`` if a float; a
            share above 0 is at least one batch.
        max_epochs: Where the run ends, at least 0, or None.
        max_steps: Where the run ends, at least 0, or None.

    Example:
        >>> run = Run(batch_size=16, accumulate=2, limit_batches=0.5)
        >>> run.steps(100), run.steps(1)
        (2, 1)
    """

    batch_size: int
    drop_last: bool = False
    world_size: int = 1
    accumulate: int = 1
    limit_batches: int | float = 1.0
    max_epochs: int | None = None
    max_steps: int | None = None

    def without(self, epochs: int, steps: int) -> "Run":
        """What is left of a run after so many epochs and optimiser steps, at least one of each.

        Example:
            >>> Run(batch_size=16, max_epochs=9).without(epochs=6, steps=40).max_epochs
            3
        """
        left = (
            None if end is None else max(end - done, 1)
            for end, done in ((self.max_epochs, epochs), (self.max_steps, steps))
        )
        max_epochs, max_steps = left
        return replace(self, max_epochs=max_epochs, max_steps=max_steps)

    def steps(self, n_samples: int) -> int:
        """Optimiser steps of an epoch on that many samples of all processes together."""
        of_one = -(-n_samples // self.world_size)
        batches = of_one // self.batch_size if self.drop_last else -(-of_one // self.batch_size)
        limit = self.limit_batches
        if isinstance(limit, float):
            limit = max(int(batches * limit), 1 if limit else 0)
        return -(-min(batches, limit) // self.accumulate)


@dataclass(frozen=True)
class Plan:
    """The rounds of a run: the first one at the start of epoch 0, the others a period apart.

    Attributes:
        n_selected: Samples selected when the run begins.
        n_rounds: Number of the last round.
        period: Epochs from one round to the next, at least 1.
        rounds_done: Rounds that took place in earlier runs.
    """

    n_selected: int
    n_rounds: int
    period: int
    rounds_done: int = 0

    def growth(self, budget: int, epochs: int) -> Iterator[tuple[int, int]]:
        """Tell how the selection grows if every round adds what it is to add.

        A round that adds less, or takes samples back, leaves fewer selected then, and in every
        later epoch no more than this.

        Args:
            budget: Samples that may be selected.
            epochs: Length of the run.

        Yields:
            Epochs, and the samples that each of them trains on.

        Example:
            >>> list(Plan(n_selected=4, n_rounds=3, period=2).growth(budget=100, epochs=9))
            [(2, 36), (2, 68), (2, 100), (3, 100)]
        """
        selected = self.n_selected
        for number in range(self.rounds_done + 1, self.n_rounds + 1):
            selected += round_quota(budget, selected, number, self.n_rounds)
            yield min(self.period, epochs), selected
            epochs -= min(self.period, epochs)
        yield epochs, selected

    def steps(self, budget: int, epochs: int, run: Run) -> int:
        """Optimiser steps of that many epochs, whatever the limits of the run."""
        return sum(length * run.steps(n) for length, n in self.growth(budget, epochs))


def plan_rounds(
    rounds: int, every_n_epochs: int | None, n_selected: int, budget: int, run: Run
) -> Plan:
    """Spread the rounds over the run; a run of few epochs has fewer rounds.

    Args:
        rounds: Rounds that are wanted, at least 1.
        every_n_epochs: Epochs from one to the next. When None, as many that the rounds end within
            two thirds of the run; 1 in a run of fewer epochs, or one without a known end.
        n_selected: Samples selected when the run begins.
        budget: Samples that may be selected.
        run: If it ends by steps, its epochs are those that the growing selection takes for them.

    Example:
        >>> plan_rounds(3, None, 4, 100, Run(batch_size=16, max_epochs=9))
        Plan(n_selected=4, n_rounds=3, period=2, rounds_done=0)
        >>> plan_rounds(3, None, 4, 100, Run(batch_size=16, max_steps=51))
        Plan(n_selected=4, n_rounds=3, period=2, rounds_done=0)
    """

    def plan(epochs: int) -> Plan:
        period = every_n_epochs or max(1, int(_SELECTING_SHARE * epochs) // rounds)
        return Plan(n_selected, min(rounds, math.ceil(epochs / period)), period)

    if run.max_steps is None:
        if run.max_epochs is None:
            return Plan(n_selected, rounds, every_n_epochs or 1)
        return plan(run.max_epochs)
    # An epoch takes at least one step, so there are no more of them than steps.
    most = run.max_steps if run.max_epochs is None else min(run.max_steps, run.max_epochs)
    shorter = range(1, max(most, 1))
    epochs = 1 + bisect_left(
        shorter, run.max_steps, key=lambda epochs: plan(epochs).steps(budget, epochs, run)
    )
    return plan(epochs)


def planned_steps(plan: Plan, budget: int, run: Run) -> int | None:
    """Optimiser steps until the run ends: exact if every round adds what is planned.

    Otherwise there are no more than this.

    Args:
        plan: The rounds.
        budget: Samples that may be selected.
        run: Where it ends.

    Returns:
        The number of steps, or None if there is no end.

    Example:
        >>> planned_steps(Plan(4, 3, 2), 100, Run(batch_size=16, max_epochs=9))
        51
    """
    if run.max_epochs is None:
        return run.max_steps
    steps = plan.steps(budget, run.max_epochs, run)
    return steps if run.max_steps is None else min(steps, run.max_steps)
