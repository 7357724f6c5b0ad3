"""What a way of choosing gets to see in a round, and what it has to offer."""

import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dvc.capture.probe import Probe
from lightning_dvc.distributed import Group
from lightning_dvc.policy.budget import arm_bounds, round_quota
from lightning_dvc.pools import Pools
from lightning_dvc.randomness import stream
from lightning_dvc.records import Choice
from lightning_dvc.timing import Stopwatch


@dataclass(frozen=True)
class Round:
    """One round of selection, as a strategy sees it.

    Attributes:
        number: Which round, from 1; the warm-up, which no strategy sees, is 0.
        n_rounds: The last planned one; later ones only refine a full selection.
        budget: The most samples that may be selected at the same time.
        oversample: Candidates to look at for each sample to add, at least 1.
        pools: Where candidates are drawn from. Only read: the choice is applied afterwards.
        selected: ``(s,)`` ids selected so far, in order of selection.
        probe: Looks at samples through the model.
        reference: Held-out samples that show what is wanted, or None when there are none.
        seed: The user's seed.
        group: The processes of the run; every one of them must come to the same choice.
        watch: Where a strategy notes what it spends its time on.
    """

    number: int
    n_rounds: int
    budget: int
    oversample: float
    pools: Pools
    selected: Tensor
    probe: Probe
    reference: Dataset[Any] | None = None
    seed: int = 0
    group: Group = field(default_factory=Group)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def is_last(self) -> bool:
        """Whether no round comes after this one."""
        return self.number >= self.n_rounds

    @property
    def progress(self) -> float:
        """Share of the planned rounds that are over, in ``[0, 1]``."""
        return min((self.number - 1) / self.n_rounds, 1.0)

    def quota(self, n_removed: int = 0) -> int:
        """Samples to add, at most.

        Args:
            n_removed: Samples that this round takes back.
        """
        kept = len(self.selected) - n_removed
        wanted = round_quota(self.budget, kept, self.number, self.n_rounds)
        return min(wanted, int(self.pools.stock.sum()))

    @property
    def held_out(self) -> Tensor:
        """``(m,)`` indices of the reference samples; none when there are none."""
        if self.reference is None:
            return torch.empty(0, dtype=torch.int64)
        assert isinstance(self.reference, Sized), "the datamodule refuses others"
        return torch.arange(len(self.reference))

    def some(self, ids: Tensor, most: int, purpose: str, afresh: bool = True) -> Tensor:
        """At most so many of the ids, drawn at random, in their order.

        Args:
            ids: ``(n,)``.
            most: How many, at least 0.
            purpose: Names the random stream, see :func:`lightning_dvc.randomness.stream`.
            afresh: Whether each round draws others.
        """
        if len(ids) <= most:
            return ids
        numbers = (self.number,) if afresh else ()
        drawn = stream(self.seed, purpose, *numbers).choice(len(ids), most, replace=False)
        return ids[torch.from_numpy(drawn).sort().values]

    @contextmanager
    def looking_at_reference(self) -> Iterator[None]:
        """What fails inside are reference samples: it is warned of, and the pools keep theirs."""
        n_bad = len(self.probe.bad)
        try:
            yield
            if self.probe.bad[n_bad:]:
                first = self.probe.bad[n_bad]
                warnings.warn(
                    f"some reference samples cannot be used and are left out, for example number "
                    f"{first.id}: {first.reason}",
                    stacklevel=4,
                )
        finally:
            # Their ids are not those of the pools.
            del self.probe.bad[n_bad:]

    def arm_bounds(self, quota: int, removed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The least and the most to add from each source so that its share is kept, each ``(K,)``.

        Args:
            quota: Samples that this round adds.
            removed: ids that it takes back, if any.
        """
        kept = self.selected
        if removed is not None:
            kept = kept[~torch.isin(kept, removed)]
        counts = torch.bincount(self.pools.arms_of(kept), minlength=len(self.pools.names))
        shares = [(s.min_share, s.max_share) for s in self.pools.sources.values()]
        return arm_bounds(counts, int(counts.sum()) + quota, shares)

    def candidate_bounds(self, floor: Tensor, ceiling: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the most candidates of each source, each ``(K,)`` and at most its stock.

        Args:
            floor: ``(K,)`` the least to add.
            ceiling: ``(K,)`` the most to add.
        """
        # In floating point, since the product might be more than an integer holds.
        most = ((self.oversample * n.double()).ceil() for n in (floor, ceiling))
        low, high = (torch.minimum(n, self.pools.stock.double()).to(torch.int64) for n in most)
        return low, high


class Strategy(Protocol):
    """A way of choosing."""

    @property
    def learns_from_score(self) -> bool:
        """Whether it needs the monitored validation score."""
        ...

    @property
    def refines(self) -> bool:
        """Whether rounds go on after the planned ones."""
        ...

    def choose(self, this: Round) -> Choice:
        """Decide what one round adds and takes back.

        Args:
            this: The round. Nothing in it may be changed.

        Returns:
            Free samples to add, at most ``this.quota(...)``, and selected ones to take back.
        """
        ...

    def observe(self, score: float) -> None:
        """Learn the validation score that followed the last choice; of several, the last counts.

        Args:
            score: The monitored value, the greater the better.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What was learnt, as tensors and plain containers."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, before the first round."""
        ...


class Stateless:
    """A strategy that learns and remembers nothing from one round to the next."""

    learns_from_score = False
    refines = False

    def observe(self, score: float) -> None:
        """Nothing is learnt."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""
