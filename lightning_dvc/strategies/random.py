"""The baseline: samples at random."""

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
        counts = divide(quota, stock.double(), stock, *this.arm_bounds(quota))
        return Choice.unscored(this.pools.draw_each(counts, "random", this.number))
