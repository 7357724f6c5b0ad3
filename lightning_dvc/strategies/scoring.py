"""The six metrics of a batch of candidates, measured against the standards of a round."""

from collections.abc import Sequence, Set
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_dvc.capture.probe import Captured
from lightning_dvc.distributed import Group
from lightning_dvc.memory.density import Density
from lightning_dvc.memory.near_duplicates import N_TABLES
from lightning_dvc.metrics.diversity import diversity
from lightning_dvc.metrics.gradient_impact import gradient_impact
from lightning_dvc.metrics.quality import quality
from lightning_dvc.metrics.reference import MeanGradients
from lightning_dvc.metrics.relevance import relevance
from lightning_dvc.metrics.stability import stability
from lightning_dvc.metrics.uncertainty import spread, uncertainty
from lightning_dvc.metrics.value import dvc_value, rank_normalise
from lightning_dvc.records import METRICS, N_LAYER_METRICS
from lightning_dvc.strategies.rewards import ArmRewards


@dataclass(frozen=True)
class LayerStandards:
    """What one layer's metrics are measured against.

    Attributes:
        median: Median norm of the reference representations.
        mad: Median absolute deviation of those norms.
        reference: Mean reference gradients, by class, for relevance and gradient impact.
        selected: Density of the selected samples' representations, for diversity.
    """

    median: float
    mad: float
    reference: MeanGradients
    selected: Density | None


@dataclass(frozen=True)
class Scores:
    """The raw metrics of ``n`` candidates and what else is needed to choose among them; on the CPU.

    Attributes:
        ids: ``(n,)`` sample ids.
        labels: ``(n,)`` classes, -1 where there is none.
        layer_metrics: ``(n, L, 3)`` quality, relevance and diversity in each layer, NaN where not
            measured.
        global_metrics: ``(n, 3)`` gradient impact, uncertainty and stability, NaN where not
            measured.
        confidence: ``(n, S)`` how plausible recent model states find the target; NaN if unknown.
        codes: ``(n, tables)`` hash codes of the features.
    """

    ids: Tensor
    labels: Tensor
    layer_metrics: Tensor
    global_metrics: Tensor
    confidence: Tensor
    codes: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def empty(n_layers: int, n_states: int) -> "Scores":
        """No scores, of so many layers and model states."""
        none = torch.empty(0, dtype=torch.int64)
        return Scores(
            ids=none,
            labels=none,
            layer_metrics=torch.empty(0, n_layers, N_LAYER_METRICS),
            global_metrics=torch.empty(0, len(METRICS) - N_LAYER_METRICS),
            confidence=torch.empty(0, n_states),
            codes=torch.empty(0, N_TABLES, dtype=torch.int64),
        )

    def rows(self, index: Tensor) -> "Scores":
        """Scores of some of the candidates, by position."""
        return Scores(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def raw(self) -> Tensor:
        """The six metrics with the layers averaged, ``(n, 6)``."""
        return torch.cat([self.layer_metrics.mean(1), self.global_metrics], dim=1)

    def values(self, weights: Tensor, layer_weights: Tensor) -> Tensor:
        """Equation 5 on the ranks among these candidates, ``(n,)`` in ``[0, 1]``.

        Args:
            weights: ``(6,)`` metric weights on the simplex.
            layer_weights: ``(L,)`` layer weights on the simplex.
        """
        return dvc_value(
            rank_normalise(self.layer_metrics),
            rank_normalise(self.global_metrics),
            weights,
            layer_weights,
        )

    def layer_values(self, weights: Tensor) -> Tensor:
        """Each layer's part of the values, ``(n, L)``: LVC of equation 6 on the ranks.

        Args:
            weights: ``(6,)`` metric weights on the simplex.
        """
        ranks = rank_normalise(self.layer_metrics)
        return ranks @ weights[:N_LAYER_METRICS].to(ranks)

    def gather(self, group: Group, device: torch.device) -> "Scores":
        """The scores of every process, ordered by sample id."""
        gathered = {f.name: group.gather(getattr(self, f.name), device) for f in fields(self)}
        return Scores(**gathered).ordered()

    def ordered(self) -> "Scores":
        """The same, ordered by sample id."""
        return self.rows(self.ids.argsort())


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches, at least one, as one."""
    return Scores(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scores)}
    )


def score(
    captured: Captured,
    standards: Sequence[LayerStandards],
    codes: Tensor,
    arms: Tensor,
    *,
    needs: Set[str],
    rewards: ArmRewards | None = None,
) -> Scores:
    """Measure the metrics of a batch, and what its gradients say about their sources.

    Args:
        captured: What a pass over ``n`` candidates showed, with gradients.
        standards: One entry per captured layer.
        codes: ``(n, tables)`` hash codes of the candidates' features.
        arms: ``(n,)`` the source of each candidate, or
            :data:`~lightning_dvc.strategies.rewards.NOT_JUDGED_BY`.
        needs: Metrics to measure; the others come out as NaN.
        rewards: Takes in the batch, if given.

    Returns:
        The raw metrics, in float32.
    """
    relevances, impact = _ask_gradients(captured, standards, arms, needs, rewards)
    missing = torch.full_like(captured.losses[:, 0], torch.nan)
    layer_metrics = [
        [
            quality(h, std.median, std.mad) if "quality" in needs else missing,
            found,
            diversity(h, std.selected) if std.selected is not None else missing,
        ]
        for h, found, std in zip(
            captured.representations, relevances.float().unbind(1), standards, strict=True
        )
    ]
    global_metrics = [
        impact,
        _uncertainty(captured) if "uncertainty" in needs else missing,
        stability(captured.losses) if "stability" in needs else missing,
    ]
    return Scores(
        ids=captured.ids,
        labels=captured.labels,
        layer_metrics=torch.stack([torch.stack(m, 1).float() for m in layer_metrics], 1).cpu(),
        global_metrics=torch.stack(global_metrics, dim=1).float().cpu(),
        confidence=captured.confidence.float().cpu(),
        codes=codes,
    )


def _ask_gradients(
    captured: Captured,
    standards: Sequence[LayerStandards],
    arms: Tensor,
    needs: Set[str],
    rewards: ArmRewards | None,
) -> tuple[Tensor, Tensor]:
    """Relevance ``(n, L)`` and gradient impact ``(n,)``; NaN where not needed.

    Everything is asked of one part of the samples before the next, while it is in the cache.
    """
    labels, found = captured.labels, []
    compared = not needs.isdisjoint({"relevance", "gradient_impact"})
    # Samples of one source, and in it of one class, follow each other.
    order = labels.argsort(stable=True)
    order = order[arms[order].argsort(stable=True)]
    for number, (layer, std) in enumerate(zip(captured.gradients, standards, strict=True)):
        columns = std.reference.columns(labels)
        product, squared = layer.like.new_full((2, len(captured)), torch.nan)
        for rows, part in layer.parts(order=order):
            if compared:
                product[rows] = std.reference.products(part, columns[rows])
            if "relevance" in needs:
                squared[rows] = part.squared_norms()
            if rewards is not None:
                rewards.add(number, part, arms[rows])
        each = (product, squared, std.reference.norms(columns))
        found.append([x.to(captured.losses.device)[:, None] for x in each])
    if rewards is not None:
        rewards.close(arms)
    # Concatenated, since layers may differ in precision.
    products, squares, lengths = (torch.cat(each, dim=1) for each in zip(*found, strict=True))
    impact = torch.full_like(products[:, 0], torch.nan)
    if "gradient_impact" in needs:
        impact = gradient_impact(products, lengths)
    return relevance(products, squares, lengths), impact


def _uncertainty(captured: Captured) -> Tensor:
    representations, predictive = captured.representations, captured.predictive
    unknown = predictive.isnan()
    if bool(unknown.any()):
        # Plain regression does not say how sure it is; the last hidden layer's spread stands in.
        last_hidden = representations[max(len(representations) - 2, 0)]
        predictive = torch.where(unknown, spread(last_hidden), predictive)
    return uncertainty(predictive, representations)
