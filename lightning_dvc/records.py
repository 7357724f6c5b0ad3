"""Frozen records that travel between the stages of a round.

Ids are global ``int64`` sample ids on the CPU; see ``docs/architecture.md`` for the symbols.
"""

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

METRICS: Final = (
    "quality",
    "relevance",
    "diversity",
    "gradient_impact",
    "uncertainty",
    "stability",
)
"""The six metrics in the order of every ``(n, 6)`` tensor: three per layer, then three global."""

N_LAYER_METRICS: Final = 3


@dataclass(frozen=True)
class Choice:
    """What one round decided: which samples to add, which to take back, and why.

    Attributes:
        add: ``(a,)`` ids to add to the selection, best first.
        values: ``(a,)`` by what each was chosen, of DVC in ``[0, 1]``, NaN where the strategy does
            not score.
        raw: ``(a, 6)`` raw metrics of each (mean over the layers), NaN where not scored.
        weights: ``(6,)`` metric weights in force, NaN where the strategy has none.
        remove: ``(r,)`` ids to take back from the selection; they are not drawn again.
        figures: What to log of the round: name to number.
    """

    add: Tensor
    values: Tensor
    raw: Tensor
    weights: Tensor
    remove: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    figures: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def unscored(ids: Tensor) -> "Choice":
        """A choice without values: a warm-up, or a strategy that does not score.

        Args:
            ids: ``(a,)`` ids to add.

        Example:
            >>> Choice.unscored(torch.tensor([4, 2])).raw.shape
            torch.Size([2, 6])
        """
        n_metrics = len(METRICS)
        return Choice(
            add=ids,
            values=torch.full((len(ids),), torch.nan),
            raw=torch.full((len(ids), n_metrics), torch.nan),
            weights=torch.full((n_metrics,), torch.nan),
        )


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be scored.

    Attributes:
        id: Its global id.
        reason: What happened, in words.
    """

    id: int
    reason: str
