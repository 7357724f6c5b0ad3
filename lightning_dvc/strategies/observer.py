"""What DVC remembers of the model and of the samples it has seen, from round to round."""

import math
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lightning_dvc.capture.cached import CachedProbe
from lightning_dvc.capture.probe import Captured
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.memory.density import (
    Density,
    ExactDensity,
    LSHDensity,
    median_bandwidth_squared,
)
from lightning_dvc.memory.gradient_cache import GradientCache
from lightning_dvc.memory.history import SampleHistory
from lightning_dvc.memory.near_duplicates import N_TABLES, NearDuplicates, Repeats
from lightning_dvc.memory.statistics import StreamingMedian
from lightning_dvc.metrics.reference import MeanGradients, ReferenceGradients
from lightning_dvc.randomness import torch_stream
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.scoring import LayerStandards, Scores

# Norms of the last round, of 1,000 reference samples; of fewer also of rounds before, whose model
# is gone. Those of the present round alone made no difference beyond chance (docs/tried.md).
_NORM_WINDOW: Final = 1024
# Multiples of the blend. With 50 held-out samples a blend of 50 gains (docs/tried.md); with 150 or
# 200, in trials that no table has, it did not.
_ENOUGH: Final = 2
DENSITY_SIZE: Final = 256
"""Points of the reservoir that the exact density is made of. With 1,000 of them diversity took half
as long as a training step of a small MLP."""
# Numbers in the sums of gradients by class: 4 GiB in single precision, which is 128 classes of the
# largest model that is not projected.
_SUMS: Final = 2**30
# Share of the held-out samples that may seem to repeat another one, or a selected one.
_MOST_ALIKE: Final = 0.2


@dataclass(frozen=True)
class ObserverSettings:
    """Sizes and tolerances; see :class:`lightning_dvc.strategies.dvc.DVC`, which documents them."""

    reference_size: int
    by_class: bool
    blend: int
    reservoir_size: int
    review_size: int
    stability_window: int
    duplicate_angle: float
    density: Literal["exact", "lsh"]
    cache_bytes: int
    cache_dtype: torch.dtype | None
    drift_tolerance: float


@dataclass(frozen=True)
class Examined:
    """What a round knows before it looks at a candidate.

    Attributes:
        standards: What each layer's metrics are measured against.
        gradient: Per layer, the mean reference gradient, a full gradient.
        labels: ``(m,)`` classes of the reference samples, -1 where there is none.
        held_out: Share of held-out samples in the reference, in ``[0, 1]``.
        reference_confidence: ``(m, S)`` how plausible recent model states, the present one first,
            find their targets; NaN where it is not known.
        selected_confidence: ``(s, S)`` the same of all selected samples.
    """

    standards: list[LayerStandards]
    gradient: list[Tensor]
    labels: Tensor
    held_out: float
    reference_confidence: Tensor
    selected_confidence: Tensor

    @property
    def held_out_confidence(self) -> Tensor:
        """``(m, 1)`` how plausible the present model finds the targets of held-out samples.

        Selected samples cannot stand in for these: the model has been trained on them.
        """
        return self.reference_confidence[:, :1] if self.held_out > 0 else torch.empty(0, 1)


class Observer:
    """Looks at the reference, the selection and candidates, and keeps what later rounds need.

    Attributes:
        window: Model states that a sample is known in at most: the present and the snapshots.

    Args:
        needs: The metrics that candidates are measured by; what others need is not looked at.
        settings: Sizes and tolerances.
    """

    def __init__(self, needs: Set[str], settings: ObserverSettings) -> None:
        self._needs = needs
        self._settings = settings
        self.window = settings.stability_window + 1
        # Beside stability, the cache needs the latest state, to tell how far the model has moved.
        states = settings.stability_window if "stability" in needs else 0
        self._looks_back = states > 0
        self._snapshots = Snapshots(max(states, int(settings.cache_bytes > 0)))
        self._cache = GradientCache(
            settings.cache_bytes, settings.cache_dtype, settings.drift_tolerance
        )
        self._norms: list[StreamingMedian] = []
        self._parts: tuple[SampleHistory, SampleHistory, NearDuplicates] | None = None
        # What was loaded and not yet taken up, for lack of the sizes that a round brings.
        self._saved: Mapping[str, Any] | None = None
        self._tells_repeats = True
        self._cache_pays = False
        self._trust = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """Hit rate and bytes of the cache; the share of held-out samples in the reference."""
        return {
            "cache_hit_rate": self._cache.hit_rate,
            "cache_bytes": self._cache.n_bytes,
            "reference_held_out": self._trust,
        }

    def examine(self, this: Round, reviews: bool) -> Examined:
        """Look at reference samples and at the selection, as the model sees them now.

        Args:
            this: The round.
            reviews: Whether what the model makes of selected samples is asked for, beyond those of
                the reservoir. Otherwise only those are looked at of which it is not known what they
                look like.
        """
        of_selected, of_reference, _ = self._begin(this)
        reservoir, training = self._look_at_selected(this, reviews)
        reference, gradients = self._look_at_reference(this)
        self._move_cache(this)
        self._tells_repeats = self._can_tell_repeats(reference)
        if reference is None:
            reference, gradients, seen = reservoir, training, of_selected
            self._trust = 0.0
        else:
            seen, self._trust = of_reference, 1.0
            seen.record(reference.ids, reference.confidence, this.number)
        labels = reference.labels
        if self._blends(this):
            # A selected sample never counts for more than a held-out one.
            blend = min(self._settings.blend, len(reservoir))
            pairs = zip(gradients, training, strict=True)
            means = [layer.blended(other, blend) for layer, other in pairs]
            # As many labels as they count for, from all over the reservoir.
            labels = torch.cat([labels, reservoir.labels[:: -(-len(reservoir) // blend)]])
            self._trust = len(reference) / (len(reference) + blend)
        else:
            means = [layer.means() for layer in gradients]
        return Examined(
            self._standards(reference, reservoir, means, this.seed),
            [layer.overall for layer in means],
            labels,
            self._trust,
            # Of the first process, since elsewhere samples may be augmented otherwise.
            this.group.first(seen.recent(reference.ids, this.number), this.probe.device),
            of_selected.recent(this.selected, this.number),
        )

    def candidates(self, this: Round, ids: Tensor) -> Iterator[Captured]:
        """Look at this process's part of the candidates, batch by batch, with gradients."""
        cached = CachedProbe(this.probe, self._cache, self.window)
        mine = this.group.shard(ids, this.probe.batch_size)
        snapshots = self._snapshots if self._looks_back else None
        return cached.capture(this.pools.dataset, mine, snapshots, keep=self._cache_pays)

    def again(self, this: Round, ids: Tensor) -> Iterator[Captured]:
        """Look once more at this process's part of some candidates, past the cache."""
        mine = this.group.shard(ids, this.probe.batch_size)
        return this.probe.capture(this.pools.dataset, mine)

    def codes(self, captured: Captured) -> Tensor:
        """Hash the features of ``n`` samples, ``(n, tables)``."""
        return self._ready[2].codes(captured.fingerprints)

    def duplicates(self, codes: Tensor) -> tuple[Tensor | None, Repeats | None]:
        """Near-duplicates: ``(n,)`` which of a selected sample, and those among the candidates.

        None where a repetition cannot be told from a neighbour.
        """
        if not self._tells_repeats:
            return None, None
        near = self._ready[2]
        return near.known(codes), near.among(codes)

    def remember(self, this: Round, chosen: Scores, removed: Tensor) -> None:
        """Keep what the next rounds need of a round that is over.

        Args:
            this: The round.
            chosen: Scores of the samples that it adds.
            removed: ids that it takes back.
        """
        history, _, near = self._ready
        history.forget(removed)
        near.forget(removed)
        seen = 1 + (len(self._snapshots) if self._looks_back else 0)
        history.record(chosen.ids, chosen.confidence[:, :seen], this.number)
        near.add(chosen.ids, chosen.codes)
        self._snapshots.push(this.probe.module)

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered, as tensors and plain containers."""
        if self._saved is not None:
            return dict(self._saved)
        return {
            "snapshots": self._snapshots.state_dict(),
            "cache": self._cache.state_dict(),
            "norms": [norms.state_dict() for norms in self._norms],
            "parts": [part.state_dict() for part in self._parts or ()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state when the next round begins."""
        self._saved = state

    @property
    def _ready(self) -> tuple[SampleHistory, SampleHistory, NearDuplicates]:
        assert self._parts is not None, "examine() comes first in a round"
        return self._parts

    def _begin(self, this: Round) -> tuple[SampleHistory, SampleHistory, NearDuplicates]:
        if self._parts is None:
            self._parts = (
                SampleHistory(self.window, this.budget),
                SampleHistory(self.window, self._settings.reference_size),
                NearDuplicates(self._settings.duplicate_angle, this.seed),
            )
        if self._saved is not None:
            self._restore(self._saved)
            self._saved = None
        history, _, near = self._parts
        # Such as were set aside since they were selected.
        gone = near.ids[~torch.isin(near.ids, this.selected)]
        history.forget(gone)
        near.forget(gone)
        return self._parts

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._snapshots.load_state_dict(state["snapshots"])
        self._cache.load_state_dict(state["cache"])
        self._make_layers(len(state["norms"]))
        for norms, saved in zip(self._norms, state["norms"], strict=True):
            norms.load_state_dict(saved)
        if state["parts"]:
            for history, saved in zip(self._ready[:2], state["parts"][:2], strict=True):
                history.load_state_dict(saved)
            self._ready[2].load_state_dict(state["parts"][2])

    def _make_layers(self, n_layers: int) -> None:
        if not self._norms:
            self._norms = [StreamingMedian(_NORM_WINDOW) for _ in range(n_layers)]

    def _move_cache(self, this: Round) -> None:
        """Tell the cache how far the model has moved, and see whether entries live a round."""
        drift = self._snapshots.drift(this.probe.module, this.probe.captured_layers)
        self._cache.move(drift)
        self._cache_pays = self._settings.cache_bytes > 0 and bool(
            (drift <= self._settings.drift_tolerance).all()
        )

    def _blends(self, this: Round) -> bool:
        """Whether held-out samples are so few that selected ones are to stand beside them."""
        n = len(this.held_out)
        return 0 < min(n, self._settings.reference_size) < _ENOUGH * self._settings.blend

    def _look_at_reference(self, this: Round) -> tuple[Captured | None, list[ReferenceGradients]]:
        gradients: list[ReferenceGradients] = []
        if this.reference is None:
            return None, gradients
        # The same in every round, for selected samples to be compared with over several states.
        size = self._settings.reference_size
        ids = this.some(this.held_out, size, "reference", afresh=False)
        take = partial(_take, gradients, by_label=self._settings.by_class)
        with this.looking_at_reference():
            reference = this.probe.capture_all(this.reference, ids, take)
        return reference, gradients

    def _look_at_selected(
        self, this: Round, reviews: bool
    ) -> tuple[Captured, list[ReferenceGradients]]:
        """A reservoir of the selection; more of it just in case, each process its part."""
        sizes = self._settings
        ids = this.some(this.selected, sizes.reservoir_size, "reservoir")
        gradients: list[ReferenceGradients] = []
        stands_in = this.reference is None or self._blends(this)
        take = partial(_take, gradients, by_label=sizes.by_class)
        reservoir = this.probe.capture_all(this.pools.dataset, ids, take if stands_in else None)
        others = this.selected[~torch.isin(this.selected, ids)]
        if not reviews:
            others = others[~self._ready[2].holds(others)]
        others = this.some(others, sizes.review_size, "review")
        mine = this.group.shard(others, this.probe.batch_size)
        review = list(this.probe.capture(this.pools.dataset, mine, gradients=False))
        self._note(this, [reservoir])
        self._note(this, review, gather=True)
        return reservoir, gradients

    def _can_tell_repeats(self, reference: Captured | None) -> bool:
        """Whether held-out samples, of which few should repeat another, are told apart."""
        if reference is None:
            return True
        near, codes, most = self._ready[2], self.codes(reference), _MOST_ALIKE * len(reference)
        alike = near.among(codes).any()
        if int(alike.sum()) <= most:  # else the selected ones, which are more, need no look
            alike |= near.known(codes)
        return int(alike.sum()) <= most

    def _note(self, this: Round, seen: list[Captured], gather: bool = False) -> None:
        """Keep how plausible the model finds selected samples now, and what they look like."""
        history, _, near = self._ready
        codes = [self.codes(part) for part in seen]
        ids = torch.cat([torch.empty(0, dtype=torch.int64), *(part.ids for part in seen)])
        confidence = torch.cat([torch.empty(0, 1), *(part.confidence.cpu() for part in seen)])
        all_codes = torch.cat([torch.empty(0, N_TABLES, dtype=torch.int64), *codes])
        if gather:
            device = this.probe.device
            ids = this.group.gather(ids, device)
            confidence = this.group.gather(confidence, device)
            all_codes = this.group.gather(all_codes, device)
        history.record(ids, confidence, this.number)
        near.add(ids, all_codes)

    def _standards(
        self,
        reference: Captured,
        reservoir: Captured,
        means: list[MeanGradients],
        seed: int,
    ) -> list[LayerStandards]:
        self._make_layers(len(means))
        found = []
        for number, norms in enumerate(self._norms):
            norms.update(torch.linalg.vector_norm(reference.representations[number], dim=1))
            found.append(
                LayerStandards(
                    norms.median,
                    norms.mad,
                    means[number],
                    self._density(reservoir.representations[number], seed),
                )
            )
        return found

    def _density(self, points: Tensor, seed: int) -> Density | None:
        if "diversity" not in self._needs:
            return None
        hashed = self._settings.density == "lsh"
        if not hashed:  # every k-th, since a reservoir is in the order in which it was selected
            points = points[:: -(-len(points) // DENSITY_SIZE)]
        bandwidth_squared = median_bandwidth_squared(points, torch_stream(seed, "bandwidth"))
        if hashed:
            return LSHDensity(points, bandwidth_squared, seed=seed)
        return ExactDensity(points, bandwidth_squared)


def _take(gradients: list[ReferenceGradients], captured: Captured, *, by_label: bool) -> None:
    """Add a batch to what each layer has taken in."""
    if not gradients:
        numbers = sum(math.prod(layer.full_shape) for layer in captured.gradients)
        gradients.extend(ReferenceGradients(_SUMS // numbers) for _ in captured.gradients)
    labels = captured.labels if by_label else torch.full_like(captured.labels, -1)
    for layer, batch in zip(gradients, captured.gradients, strict=True):
        layer.add(batch, labels)
