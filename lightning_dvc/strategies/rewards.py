"""What a source was worth in a round: do its candidates pull the way the reference does?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_dvc.capture.gradients import LayerGradients
from lightning_dvc.distributed import Group
from lightning_dvc.metrics.relevance import runs


class ArmRewards:
    """Mean candidate gradient of each arm, compared with the mean reference gradient.

    The reward of an arm is ``(1 + cos(mean gradient of its candidates, reference gradient)) / 2``
    over all captured layers together.

    Args:
        n_arms: Number of sources ``K``.
        reference: Per layer, the mean reference gradient, a full gradient.
    """

    def __init__(self, n_arms: int, reference: Sequence[Tensor]) -> None:
        # In double precision, so that it matters little in which order processes add up batches;
        # Apple's devices have none.
        self._reference = [
            full if full.device.type == "mps" else full.double() for full in reference
        ]
        self._sums = [full.new_zeros(n_arms, *full.shape) for full in self._reference]
        self._batch: dict[tuple[int, int], Tensor] = {}
        self._counts = torch.zeros(n_arms, dtype=torch.int64)

    def add(self, layer: int, gradients: LayerGradients, arms: Tensor) -> None:
        """Take in the gradients of one layer for a part of a batch of candidates.

        Args:
            layer: Number of the layer.
            gradients: Gradients of ``n`` candidates.
            arms: ``(n,)`` the source of each; cheapest where equal ones follow each other.
        """
        for arm, own in runs(gradients, arms):
            if (layer, arm) not in self._batch:
                self._batch[layer, arm] = own.sum()
            else:
                own.accumulate(self._batch[layer, arm])

    def close(self, arms: Tensor) -> None:
        """End a batch, all of whose parts and layers were added.

        Args:
            arms: ``(n,)`` the sources of its candidates.
        """
        for (layer, arm), total in self._batch.items():
            self._sums[layer][arm] += total
        self._batch.clear()
        self._counts += torch.bincount(arms, minlength=len(self._counts))

    def rewards(self, group: Group) -> Tensor:
        """Add up what all processes took in.

        Returns:
            ``(K,)`` float64 in ``[0, 1]`` on the CPU; NaN for an arm without candidates, and 1/2
            where a mean gradient vanishes.
        """
        device = self._sums[0].device
        counts = group.sum(self._counts.to(device)).cpu()
        products, squares, length = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        for total, full in zip(self._sums, self._reference, strict=True):
            total = group.sum(total).flatten(1)
            products = products + (total @ full.flatten()).cpu()
            squares = squares + total.square().sum(1).cpu()
            length = length + full.square().sum().cpu()
        lengths = (squares * length).sqrt()
        cosine = torch.where(lengths > 0, products / lengths, 0.0).clamp(-1, 1)
        return torch.where(counts > 0, (1 + cosine) / 2, torch.nan)
