"""The baseline: samples at random."""

import torch

from lightning_dvc.policy.budget import divide
from lightning_dvc.records import Choice
from lightning_dvc.strategies.base import Round, Stateless


class Random(Stateless):
    """Draws uniformly from all that is free, within the sources' shares; looks at no sample.

    Example:
        >>> Random().learns_from_score
        False
    """

    def choose(self, this: Round) -> Choice:
        """Draw the round's quota, from each source in proportion to its stock."""
        quota, stock = this.quota(), this.pools.stock
        none = torch.empty(0, dtype=torch.int64)
        lower, upper = this.arm_bounds(none, quota)
        counts = divide(quota, stock.double(), stock, lower, upper)
        drawn = [
            this.pools.draw(arm, count, "random", this.number)
            for arm, count in enumerate(counts.tolist())
        ]
        return Choice.unscored(torch.cat(drawn))
