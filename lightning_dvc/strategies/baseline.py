"""What the baselines have in common: candidates from everywhere, a look at them, the best of them.

A baseline knows nothing of sources. It looks at candidates drawn uniformly from all that is free,
gives each a value, and takes the best within the sources' shares. With several processes, each
looks at its part, and all get all that was seen.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_dvc.capture.gradients import LayerGradients
from lightning_dvc.capture.probe import Captured
from lightning_dvc.errors import CaptureError
from lightning_dvc.policy.apportion import apportion
from lightning_dvc.policy.budget import divide
from lightning_dvc.policy.diversify import diversify
from lightning_dvc.records import METRICS, Choice
from lightning_dvc.strategies.base import Round, Stateless

_T = TypeVar("_T")

REFERENCE_SIZE = 1000
"""Reference samples that a baseline looks at in a round, as DVC does."""


class Baseline(Stateless, ABC):
    """A way of choosing that gives every candidate a value, be it a place in a greedy choice."""

    @abstractmethod
    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Look at candidates and value them.

        Args:
            this: The round.
            candidates: ``(n,)`` free ids, ascending.
            quota: How many of them will be chosen.

        Returns:
            ``(m,)`` ids of those that could be looked at, and ``(m,)`` float64 values, the greater
            the better; the same on all processes.
        """

    def choose(self, this: Round) -> Choice:
        """Take the most valuable of the candidates."""
        quota = this.quota()
        lower, upper = this.arm_bounds(quota)
        with this.watch.section("draw"):
            candidates = _draw(this, quota, lower, upper)
        with this.watch.section("score"):
            ids, values = self._valued(this, candidates, quota)
        with this.watch.section("choose"):
            found = diversify(
                values,
                ids,
                this.pools.arms_of(ids),
                torch.full_like(ids, -1),  # classes set no limits
                quota=quota,
                arm_ceiling=upper,
                arm_floor=lower,
            )
            # Decisions are the first process's, whatever the last bits are elsewhere.
            chosen = this.group.first(found.positions, this.probe.device)
        return Choice(
            ids[chosen],
            values[chosen],
            torch.full((len(chosen), len(METRICS)), torch.nan),
            torch.full((len(METRICS),), torch.nan),
            figures={"candidates": float(len(ids))},
        )

    def _valued(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """As :meth:`values`; nothing where no candidate is left, or all of a few are broken."""
        if this.number == 1:  # so that what is broken in the warm-up is set aside before training
            mine = this.group.shard(this.selected, this.probe.batch_size)
            for _ in this.probe.capture(this.pools.dataset, mine, gradients=False):
                pass
        nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        if len(candidates) == 0:
            return nothing
        try:
            return self.values(this, candidates, quota)
        except CaptureError:
            # Where a whole batch fails, or a parameter is not finite, the model is to blame.
            if len(candidates) >= this.probe.batch_size or this.probe.diverged:
                raise
            mine = this.group.shard(candidates, this.probe.batch_size)
            if not {sample.id for sample in this.probe.bad}.issuperset(mine.tolist()):
                raise
            return nothing


def _draw(this: Round, quota: int, lower: Tensor, upper: Tensor) -> Tensor:
    """Candidates ``(n,)``, ascending: from each source in proportion to what is free in it."""
    stock = this.pools.stock
    wanted = min(math.ceil(this.oversample * quota), int(stock.sum()))
    # Candidates beyond what a source may add would be missing elsewhere.
    counts = divide(wanted, stock.double(), stock, *this.candidate_bounds(lower, upper))
    drawn = this.pools.draw_each(counts, "candidates", this.number)
    return this.group.first(drawn, this.probe.device)


def look(
    this: Round,
    ids: Tensor,
    describe: Callable[[Captured], _T],
    *,
    gradients: bool = False,
    reference: bool = False,
) -> tuple[Tensor, Tensor, list[_T]]:
    """Look at samples and keep what is asked for, each process at its part of them.

    Args:
        this: The round.
        ids: ``(n,)`` samples to look at.
        describe: What to keep of a batch: gradients, and tensors on the CPU.
        gradients: Whether it needs gradients.
        reference: Whether the ids are of held-out samples, rather than of the pools.

    Returns:
        ``(m,)`` ids and ``(m,)`` classes of those that could be looked at, and what was kept of
        each batch, in the order of the ids.

    Raises:
        CaptureError: If not one sample could be looked at.
    """
    parts = []
    dataset = this.reference if reference else this.pools.dataset
    assert dataset is not None, "the round has reference samples"
    with this.looking_at_reference() if reference else nullcontext():
        mine = this.group.shard(ids, this.probe.batch_size)
        for seen in this.probe.capture(dataset, mine, gradients=gradients):
            parts.append((seen.ids, seen.labels, describe(seen)))
        parts = _of_all(this, parts)
        if not parts:
            this.probe.give_up(len(ids))
    found, labels, kept = zip(*parts, strict=True)
    return torch.cat(found), torch.cat(labels), list(kept)


def _of_all(this: Round, parts: list[_T]) -> list[_T]:
    """The parts of all processes."""
    if this.group.world_size == 1:
        return parts
    # On the CPU, since a device of this process need not be one of the others'.
    sent = [_moved(part, torch.device("cpu")) for part in parts]
    return [_moved(part, this.probe.device) for part in this.group.gather_objects(sent)]


def _moved(kept: Any, device: torch.device) -> Any:
    """The same with gradients on another device, and without the layers that they are of."""
    if isinstance(kept, LayerGradients):
        return kept.restored({name: tensor.to(device) for name, tensor in kept.tensors().items()})
    if isinstance(kept, list | tuple):
        return type(kept)(_moved(part, device) for part in kept)
    return kept


def look_at_reference(
    this: Round, describe: Callable[[Captured], _T], *, gradients: bool = False
) -> tuple[Tensor, list[_T]]:
    """Look at some held-out samples, or at selected ones where none are held out.

    Returns:
        ``(m,)`` classes and what was kept of each batch.
    """
    held_out = this.reference is not None
    ids, purpose = (this.held_out, "reference") if held_out else (this.selected, "reservoir")
    some = this.some(ids, REFERENCE_SIZE, purpose)
    _, labels, kept = look(this, some, describe, gradients=gradients, reference=held_out)
    return labels, kept


def features(captured: Captured) -> Tensor:
    """What the last captured layer receives, ``(n, d)``, on the CPU."""
    received = captured.representations[-2:-1] or [captured.fingerprints]
    return received[0].detach().float().cpu()


def last_layer(captured: Captured) -> LayerGradients:
    """The last captured layer's gradients of a batch."""
    return captured.gradients[-1]


def mean_reference_gradient(this: Round) -> list[Tensor]:
    """Mean gradient of the reference samples, per captured layer, a full gradient."""

    def total(captured: Captured) -> tuple[int, list[Tensor]]:
        return len(captured), [layer.sum().cpu() for layer in captured.gradients]

    _, kept = look_at_reference(this, total, gradients=True)
    n_samples = sum(n for n, _ in kept)
    return [
        (torch.stack(sums).sum(0) / n_samples).to(this.probe.device)
        for sums in zip(*(s for _, s in kept), strict=True)
    ]


def blocks(labels: Tensor, quota: int, largest: int) -> Iterator[tuple[Tensor, int]]:
    """Deal candidates of the same class out to blocks that each choose for themselves.

    Args:
        labels: ``(n,)`` classes, in an order in which any part is like the whole.
        quota: How many are chosen in all.
        largest: The most candidates in one block, at least 1.

    Yields:
        Positions of a block's candidates and how many of them to choose, in proportion to their
        number; together the quota, or all where there are fewer.
    """
    members = []
    for label in labels.unique().tolist():
        positions = torch.nonzero(labels == label).flatten()
        n_blocks = -(-len(positions) // largest)
        members += [positions[first::n_blocks] for first in range(n_blocks)]
    sizes = torch.tensor([len(positions) for positions in members])
    counts = apportion(min(quota, len(labels)), sizes.double(), torch.zeros_like(sizes), sizes)
    yield from zip(members, counts.tolist(), strict=True)


def dots(captured: Captured, full: Sequence[Tensor]) -> Tensor:
    """Product of each sample's gradient with a full gradient, all layers together, ``(n,)``."""
    pairs = zip(captured.gradients, full, strict=True)
    products: Tensor = torch.stack([layer.dot(own) for layer, own in pairs]).double().sum(0)
    return products.cpu()


def by_turns(orders: Sequence[Tensor]) -> Tensor:
    """Join the orders of choice of several classes: the first of each, the second of each, ...

    Example:
        >>> by_turns([torch.tensor([4, 2]), torch.tensor([3])]).tolist()
        [4, 3, 2]
    """
    joined = torch.cat([torch.empty(0, dtype=torch.int64), *orders])
    turn = torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(len(o)) for o in orders)])
    return joined[torch.argsort(turn, stable=True)]


def places(order: Tensor, n: int) -> Tensor:
    """Values that follow an order of choice: ``n`` for the first, 0 for what was not chosen.

    Example:
        >>> places(torch.tensor([2, 0]), 3).tolist()
        [2.0, 0.0, 3.0]
    """
    values = torch.zeros(n, dtype=torch.float64)
    values[order] = n - torch.arange(len(order), dtype=torch.float64)
    return values
