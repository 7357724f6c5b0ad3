"""The six metrics of a batch of candidates, measured against the standards of a round."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lightning_dvc.capture.probe import Captured
from lightning_dvc.distributed import Group
from lightning_dvc.memory.near_duplicates import N_TABLES
from lightning_dvc.metrics.diversity import Density, diversity
from lightning_dvc.metrics.gradient_impact import gradient_impact
from lightning_dvc.metrics.quality import quality
from lightning_dvc.metrics.relevance import RelevanceReference, relevance
from lightning_dvc.metrics.stability import stability
from lightning_dvc.metrics.uncertainty import spread, uncertainty
from lightning_dvc.metrics.value import dvc_value, rank_normalise
from lightning_dvc.records import METRICS, N_LAYER_METRICS


@dataclass(frozen=True)
class LayerStandards:
    """What one layer's metrics are measured against.

    Attributes:
        median: Median norm of the reference representations.
        mad: Median absolute deviation of those norms.
        relevance: Mean reference gradients, by class.
        selected: Density of the selected samples' representations.
        momentum: Moving average of the mean training gradient, ``(d_out, d_in)`` or, with a bias,
            ``(d_out, d_in + 1)``.
    """

    median: float
    mad: float
    relevance: RelevanceReference
    selected: Density
    momentum: Tensor


@dataclass(frozen=True)
class Scores:
    """The raw metrics of ``n`` candidates and what else is needed to choose among them; on the CPU.

    Attributes:
        ids: ``(n,)`` sample ids.
        labels: ``(n,)`` classes, -1 where there is none.
        layer_metrics: ``(n, L, 3)`` quality, relevance and diversity in each layer.
        global_metrics: ``(n, 3)`` gradient impact, uncertainty and stability.
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

    def gather(self, group: Group, device: torch.device) -> "Scores":
        """The scores of every process, ordered by sample id."""
        gathered = {f.name: group.gather(getattr(self, f.name), device) for f in fields(self)}
        order = gathered["ids"].argsort()
        return Scores(**{name: rows[order] for name, rows in gathered.items()})


def join_scores(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches, at least one, as one."""
    return Scores(
        **{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Scores)}
    )


def score(captured: Captured, standards: Sequence[LayerStandards], codes: Tensor) -> Scores:
    """Measure the six metrics of a batch.

    Args:
        captured: What a pass over ``n`` candidates showed, with gradients.
        standards: One entry per captured layer.
        codes: ``(n, tables)`` hash codes of the candidates' features.

    Returns:
        The raw metrics, in float32.
    """
    gradients, representations = captured.gradients, captured.representations
    by_layer = [
        torch.stack(
            [
                quality(h, layer.median, layer.mad),
                relevance(g, captured.labels, layer.relevance),
                diversity(h, layer.selected),
            ],
            dim=1,
        )
        for g, h, layer in zip(gradients, representations, standards, strict=True)
    ]
    # Plain regression does not say how sure it is; the last hidden layer's spread stands in.
    last_hidden = representations[max(len(representations) - 2, 0)]
    unknown = captured.predictive.isnan()
    predictive = torch.where(unknown, spread(last_hidden), captured.predictive)
    over_all = [
        gradient_impact(gradients, [layer.momentum for layer in standards]),
        uncertainty(predictive, representations),
        stability(captured.losses),
    ]
    return Scores(
        ids=captured.ids,
        labels=captured.labels,
        layer_metrics=torch.stack(by_layer, dim=1).float().cpu(),
        global_metrics=torch.stack(over_all, dim=1).float().cpu(),
        confidence=captured.confidence.float().cpu(),
        codes=codes,
    )
