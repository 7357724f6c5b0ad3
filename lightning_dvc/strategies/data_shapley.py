"""Data Shapley values, of a nearest-neighbour classifier on the model's features.

Ghorbani and Zou, "Data Shapley", ICML 2019, for a learner whose values have a closed form: Jia et
al., "Efficient task-specific data valuation for nearest neighbor algorithms", VLDB 2019.
"""

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError, check_settings
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.baseline import Baseline, features, look, look_at_reference

_NUMBERS = 2**22


class DataShapley(Baseline):
    """Takes the candidates of the greatest Shapley value for a K-nearest-neighbour classifier.

    The classifier is judged on held-out samples, or on selected ones where none are held out;
    neighbours are near by what the last captured layer receives.

    Args:
        n_neighbors: ``K``, at least 1.

    Raises:
        ConfigurationError: If ``n_neighbors`` is out of its range; in the first round, where the
            targets are no classes.

    Example:
        >>> from lightning_dvc import DVCCallback
        >>> callback = DVCCallback(DataShapley())
    """

    def __init__(self, n_neighbors: int = 10) -> None:
        check_settings(("n_neighbors", n_neighbors, n_neighbors >= 1, "at least 1"))
        self.n_neighbors = n_neighbors

    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """Shapley value of each candidate among all of them."""
        classes, wanted = look_at_reference(this, features)
        ids, labels, found = look(this, candidates, features)
        if bool((classes < 0).all()):
            raise ConfigurationError(
                "expected targets that are classes, but the reference samples have none; use "
                "another strategy, such as Influence()"
            )
        of_class = classes >= 0
        reference = torch.cat(wanted)[of_class]
        values = knn_shapley(
            torch.cat(found), labels, reference, classes[of_class], self.n_neighbors
        )
        return ids, values


def knn_shapley(
    points: Tensor, labels: Tensor, judges: Tensor, classes: Tensor, n_neighbors: int
) -> Tensor:
    r"""Shapley values of points for the accuracy of a K-nearest-neighbour classifier.

    The worth of a set of points for a judge is the share of the judge's class among its ``K``
    nearest points in the set, a missing neighbour counting as wrong. With the points in the order
    of their distance from the judge, ``i`` from 1, the values for it are (theorem 1 of Jia et al.)

    .. math:: s_n = \frac{\min(K, n)}{n K} 1[y_n = y], \qquad
        s_i = s_{i+1} + \frac{1[y_i = y] - 1[y_{i+1} = y]}{K} \frac{\min(K, i)}{i},

    and those for all judges are their mean.

    Args:
        points: ``(n, d)``.
        labels: ``(n,)`` classes of the points.
        judges: ``(m, d)``.
        classes: ``(m,)`` classes of the judges.
        n_neighbors: ``K``, at least 1.

    Returns:
        ``(n,)`` float64, summing up to the accuracy's mean probability of the right class.

    Example:
        >>> points, judge = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0]])
        >>> knn_shapley(points, torch.tensor([0, 1]), judge, torch.tensor([0]), 1).tolist()
        [1.0, 0.0]
    """
    n, middle = len(points), points.mean(0)
    # Far from the origin, single precision would not tell neighbours apart.
    points, judges = points - middle, judges - middle
    place = torch.arange(1, n + 1, dtype=torch.float64)
    step = place.clamp(max=n_neighbors) / place / n_neighbors
    values = torch.zeros(n, dtype=torch.float64)
    for some, theirs in zip(
        judges.split(max(1, _NUMBERS // n)), classes.split(max(1, _NUMBERS // n)), strict=True
    ):
        order = torch.cdist(some, points).argsort(dim=1, stable=True)
        right = (labels[order] == theirs[:, None]).double()
        # Differences to the next farther point, and of the farthest its own value.
        gains = right.clone()
        gains[:, :-1] -= right[:, 1:]
        in_order = (gains * step).flip(1).cumsum(1).flip(1)
        values.index_add_(0, order.flatten(), in_order.flatten())
    return values / len(judges)
