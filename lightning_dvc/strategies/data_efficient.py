"""Data-efficient training: samples whose gradients stand for those of all candidates.

Mirzasoleiman, Bilmes and Leskovec, "Coresets for data-efficient training of machine learning
models" (CRAIG), ICML 2020: facility location, class by class, on the gradients of the last layer,
by the lazy greedy algorithm of Minoux, "Accelerated greedy algorithms", 1978.
"""

import heapq

import numpy as np
import torch
from torch import Tensor

from lightning_dvc.capture.gradients import concatenate
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.baseline import Baseline, blocks, by_turns, last_layer, look, places

_LARGEST_BLOCK = 4096


class DataEfficient(Baseline):
    """Takes, class by class, the candidates to which all others' gradients are nearest.

    Every class gets its share of the candidates. The method would also weigh the chosen samples in
    training, by how many others they stand for; here each counts alike.

    Example:
        >>> from lightning_dvc import DVCCallback
        >>> callback = DVCCallback(DataEfficient())
    """

    def values(self, this: Round, candidates: Tensor, quota: int) -> tuple[Tensor, Tensor]:
        """The order of choice, all classes together; see :func:`places`."""
        ids, labels, kept = look(this, candidates, last_layer, gradients=True)
        gradients = concatenate(kept)
        chosen: list[Tensor] = []
        for members, count in blocks(labels, quota, _LARGEST_BLOCK):
            own = gradients.rows(members)
            gram = own.gram(own).double().cpu()
            squares = gram.diagonal()
            distances = (squares[:, None] + squares - 2 * gram).clamp(min=0).sqrt().numpy()
            chosen.append(members[facility_location(distances.max() - distances, count)])
        return ids, places(by_turns(chosen), len(ids))


def facility_location(similarity: np.ndarray, k: int) -> Tensor:
    """Choose points such that all points are similar to one of them.

    Greedily maximises ``sum_i max_{j in S} similarity[i, j]``, at least ``1 - 1/e`` of the greatest
    possible. A point's gain only falls as others are chosen, so it is computed anew only for the
    point that had the greatest (lazy greedy).

    Args:
        similarity: ``(n, n)``, at least 0.
        k: How many to choose, at most ``n``.

    Returns:
        ``(k,)`` positions in the order of choice; of equal gains, the first position.

    Example:
        >>> similarity = np.array([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> facility_location(similarity, k=2).tolist()
        [0, 2]
    """
    nearest = np.zeros(len(similarity))
    heap = [(-gain, point) for point, gain in enumerate(similarity.sum(0).tolist())]
    heapq.heapify(heap)
    chosen: list[int] = []
    while len(chosen) < k:
        _, point = heap[0]
        gain = float(np.maximum(similarity[:, point] - nearest, 0.0).sum())
        # Still the greatest: no other can have gained meanwhile.
        if len(heap) == 1 or (-gain, point) <= min(heap[1:3]):
            heapq.heappop(heap)
            chosen.append(point)
            nearest = np.maximum(nearest, similarity[:, point])
        else:
            heapq.heapreplace(heap, (-gain, point))
    return torch.tensor(chosen, dtype=torch.int64)
