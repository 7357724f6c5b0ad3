"""A trial before training: whether what is captured of a sample is the sample's own."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import Dataset

from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.loading import Entry, LoadedBatch, Reader, TolerantCollate
from lightning_dvc.capture.probe import Captured, Probe
from lightning_dvc.errors import BadSampleError, ConfigurationError, ObjectiveError

LOSSES: Final = "the losses"
"""What they are called beside the names of layers."""

# Of differences by rounding.
_TOLERANCE: Final = 0.05
# So many times what chance makes a difference must be to come from the places.
_FAR: Final = 4
# Of losses in half precision: so much of the largest counts as a difference between samples.
_ROUNDING: Final = 0.1


@dataclass(frozen=True)
class Trial:
    """What a few looks at the same samples showed.

    Attributes:
        mixed: Layers in which the gradients of a sample change when the samples of a batch change
            places, that is, whose activations were dealt out to the wrong samples.
        random: Layers in which they change from one look to the next, as under a loss that is
            random. Of these it cannot be told whether they mix samples.
        mixes_losses: Whether a sample's loss changes with the places, too.
        sorts: Whether the collate function puts samples in an order of its own.
    """

    mixed: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)
    mixes_losses: bool = False
    sorts: bool = False


def try_out(probe: Probe, dataset: Dataset[Any], ids: Tensor) -> Trial:
    """Look at samples three times: twice in order, once in another.

    They are read once, since whoever augments them at random returns others each time. Each look is
    at a batch of its own, leaves the model as it was, and has random numbers of its own.

    Args:
        probe: Looks at samples through the model; what it finds bad here is forgotten again. It
            learns whether the model takes gradients itself.
        dataset: Where the ids point.
        ids: ``(n,)`` samples to look at.
    """
    mixed, random, sorts = set(), set(), False
    reader = Reader(
        _sent if probe.num_workers else list, probe.num_workers, **probe.worker_settings
    )
    for read in reader.batches(dataset, ids, probe.batch_size):
        looks = _Looks(probe, dict(zip(read.ids.tolist(), _received(read.batch), strict=True)))
        found = looks.at(read.ids, seed=0)
        if found:
            some = found[0].ids[:2]
            probe.takes_gradients |= not looks.at(some, seed=0, gradients=False)
        for part in found:
            # Where some fail or do not fit, only samples that go together tell about places:
            # others have other mates each time.
            seen = [part] if len(part) == len(read.ids) else looks.at(part.ids, seed=0)
            order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
            repeated, other = looks.at(part.ids, seed=1), looks.at(part.ids[order], seed=0)
            names = [LOSSES, *probe.captured_layers]
            by_chance, by_place = differences(seen, repeated), differences(seen, other)
            random.update(_beyond(names, by_chance))
            moved = set(_beyond(names, by_place.where(by_place > _FAR * by_chance, 0.0)))
            mixed.update(moved)
            sorts |= LOSSES in moved and looks.are_sorted(part.ids, order)
    probe.check_any_passed()
    probe.bad.clear()
    in_order = list(probe.captured_layers)
    return Trial(
        [name for name in in_order if name in mixed - random],
        [name for name in in_order if name in random],
        LOSSES in mixed - random,
        sorts,
    )


def keep_apart(probe: Probe, trial: Trial) -> None:
    """Draw the consequences of a trial: leave layers out that mix samples, or refuse the model.

    Args:
        probe: What the trial was of.
        trial: What it showed, the same on all processes.

    Raises:
        ObjectiveError: If losses are mixed.
        ConfigurationError: If a layer that was named mixes samples, or all do.
    """
    if trial.random:
        rank_zero_warn(
            f"The gradients of a sample in the layers {trial.random} are others each time, so the "
            "loss, or what collate_fn makes of a batch, is random, and so are the scores. A method "
            "per_sample_loss that is not, or objective=..., makes them repeatable."
        )
    if trial.mixes_losses:
        cause = (
            "collate_fn puts the samples of a batch in an order of its own; keep the order in "
            "which it gets them"
            if trial.sorts
            else "they are dealt out to other samples, as those of two views, or of points in "
            "time, are where these come before the batch in the first axis, or the step mixes a "
            "sample with the one at some other place; call the loss with the batch as the first "
            "axis, for each view by itself, or give the module a method per_sample_loss(batch)"
        )
        raise ObjectiveError(
            "the loss of a sample was expected to stay the same when the samples of a batch "
            f"change places, but changes: {cause}"
        )
    if not trial.mixed:
        return
    reason = (
        f"the gradients of a sample in the layers {trial.mixed} change when the samples of a batch "
        "change places, so these layers do not keep the batch as their first axis"
    )
    remedy = "use batch_first=True, or name other layers with layers=[...]"
    if probe.layers is not None or trial.mixed == list(probe.captured_layers):
        raise ConfigurationError(f"{reason}: such layers cannot be scored; {remedy}")
    rank_zero_warn(f"{reason}: they are left out; {remedy}")
    probe.leave_out(trial.mixed)


class _Looks:
    """Looks at samples that have been read, in one order or another."""

    def __init__(self, probe: Probe, samples: Mapping[int, Any]) -> None:
        self._probe = probe
        self._samples = samples

    def at(self, ids: Tensor, seed: int, gradients: bool = True) -> list[Captured]:
        """Look at some of the samples, in this order; nothing where none can be used."""
        with undisturbed(self._probe.module, seed):
            loaded = self._collated(ids)
            if not len(loaded.ids):
                return []
            try:
                return list(self._probe.look(loaded, gradients=gradients))
            except BadSampleError:
                if gradients:
                    raise
                return []

    def are_sorted(self, ids: Tensor, order: Tensor) -> bool:
        """Whether the samples make a batch whose rows do not come in their order."""
        batch, other = (tree_leaves(self._collated(some).batch) for some in (ids, ids[order]))
        rows = [
            (mine, theirs)
            for mine, theirs in zip(batch, other, strict=False)
            if isinstance(mine, Tensor) and mine.shape[:1] == ids.shape
        ]
        return not all(torch.equal(mine[order], theirs) for mine, theirs in rows)

    def _collated(self, ids: Tensor) -> LoadedBatch:
        entries: list[Entry] = [(i, self._samples[i], None) for i in ids.tolist()]
        collate = TolerantCollate(self._probe.collate)
        return LoadedBatch(self._again, *collate(entries))

    def _again(self, ids: Tensor, batch_size: int) -> Iterator[LoadedBatch]:
        yield from map(self._collated, ids.split(batch_size))


def _sent(samples: list[Any]) -> bytes:
    """Single samples in a form in which no tensor of a worker's keeps a file open."""
    buffer = io.BytesIO()
    # Else a view would take all along that it is a view of.
    torch.save(tree_map_only(Tensor, Tensor.clone, samples), buffer)
    return buffer.getvalue()


def _received(samples: bytes | list[Any] | None) -> list[Any]:
    if isinstance(samples, bytes):
        return list(torch.load(io.BytesIO(samples), weights_only=False))
    return samples or []


def differences(seen: Sequence[Captured], again: Sequence[Captured]) -> Tensor:
    """How much two looks at the same samples differ.

    Args:
        seen: A look at some samples, with gradients, in one or more parts.
        again: Another look at them.

    Returns:
        ``(1 + L,)`` the largest difference between the losses of a sample, relative to how far
        apart the samples' losses are, and in each layer that between its gradient norms, relative
        to the largest; 0 where there is no sample that has a loss in both looks.
    """
    if not seen or not again:
        n_layers = max((len(parts[0].gradients) for parts in (seen, again) if parts), default=0)
        return torch.zeros(1 + n_layers, dtype=torch.float64)
    (ids, numbers), (other_ids, others) = _by_id(seen), _by_id(again)
    # Where samples are mixed, one that is not finite also spoils others, each time different ones.
    numbers, others = numbers[torch.isin(ids, other_ids)], others[torch.isin(other_ids, ids)]
    # Of samples whose losses tie, a step may leave out others each time.
    kept = (numbers[:, 0] != 0) & (others[:, 0] != 0)
    numbers, others = numbers[kept], others[kept]
    if not len(numbers):
        return numbers.new_zeros(numbers.shape[1])
    size, losses = numbers.amax(0), numbers[:, 0]
    # Losses may be nearly alike before any training, and need not be positive.
    size[0] += _ROUNDING * losses.abs().amax() - losses.amin()
    found = (numbers - others).abs().amax(0)
    return torch.where(found > 0, found / size, 0.0)


def _beyond(names: Sequence[str], differences: Tensor) -> list[str]:
    differs = (differences > _TOLERANCE).tolist()
    return [name for name, is_different in zip(names, differs, strict=True) if is_different]


def _by_id(parts: Sequence[Captured]) -> tuple[Tensor, Tensor]:
    """Ids ``(n,)`` in order, and losses beside gradient norms, ``(n, 1 + L)``, on the CPU."""
    numbers = [
        torch.stack(
            [
                part.losses[:, 0].double().cpu(),
                *(layer.squared_norms().sqrt().double().cpu() for layer in part.gradients),
            ],
            dim=1,
        )
        for part in parts
    ]
    ids, order = torch.cat([part.ids for part in parts]).sort()
    return ids, torch.cat(numbers)[order]
