"""Core-set: samples such that none is far from a selected one.

Sener and Savarese, "Active learning for convolutional neural networks: a core-set approach", ICLR
2018, with the greedy choice of Gonzalez, "Clustering to minimize the maximum intercluster
distance", 1985, whose greatest distance is at most twice the smallest possible. No label of a
candidate is used.
"""

import torch
from torch import Tensor

from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.baseline import Baseline, features, look, places

_ROWS = 1024


class CoreSet(Baseline):
    """Takes, one after the other, the candidate farthest from all that is selected.

    Distances are between what the last captured layer receives, in the model's present state.

    Example:
        >>> from lightning_dvc import DVCCallback
        >>> callback = DVCCallback(CoreSet())
    """

    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """The order of choice; see :func:`places`."""
        _, _, selected = look(this, this.selected, features)
        ids, _, found = look(this, candidates, features)
        return ids, places(k_center(torch.cat(found), torch.cat(selected), quota), len(ids))


def k_center(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Choose points, each the farthest from all centres and those chosen before it.

    Only each point's distance to the nearest of them is kept, so that memory is ``O(n)`` and time
    ``O(n (m + k) d)``.

    Args:
        points: ``(n, d)``.
        centres: ``(m, d)``; where there are none, the first choice is the point farthest from the
            mean.
        k: How many to choose; all, if there are fewer.

    Returns:
        ``(min(k, n),)`` positions in the order of choice; of equally far points, the first.

    Example:
        >>> k_center(torch.tensor([[1.0], [9.0], [4.0]]), torch.tensor([[0.0]]), k=2).tolist()
        [1, 2]
    """
    k = min(k, len(points))
    # Far from the origin, single precision would not tell neighbours apart.
    middle = points.mean(0, keepdim=True)
    points, centres = points - middle, (centres if len(centres) else middle) - middle
    nearest = points.new_full((len(points),), torch.inf)
    for some in centres.split(_ROWS):
        nearest = torch.minimum(nearest, torch.cdist(points, some).amin(1))
    chosen = torch.empty(k, dtype=torch.int64)
    for place in range(k):
        farthest = int(nearest.argmax())
        chosen[place] = farthest
        distance = torch.linalg.vector_norm(points - points[farthest], dim=1)
        nearest = torch.minimum(nearest, distance)
        nearest[farthest] = -1.0
    return chosen
