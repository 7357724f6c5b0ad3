"""What a source was worth in a round: the reward that the bandit learns from.

The default, the alignment of mean gradients, measured best; the others are there to be compared
with (``python -m examples.ablation``).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lightning_dvc.capture.gradients import LayerGradients, Materialised
from lightning_dvc.capture.projection import Projection
from lightning_dvc.distributed import Group
from lightning_dvc.metrics.reference import runs

Reward = Literal["alignment", "value", "acceptance", "gain"]
REWARDS: Final = ("alignment", "value", "acceptance", "gain")

WORTHLESS: Final[Mapping[str, float]] = {
    "alignment": 0.5,
    "value": 0.5,
    "acceptance": 0.0,
    "gain": 0.5,
}
"""The reward of a source of no use, by kind of reward; values are ranks, one half on average."""

# Numbers in the sums of all arms, of 8 bytes each; and what is left of each side of larger ones.
_SUMS: Final = 2**28
_WIDTH: Final = 64

NOT_JUDGED_BY: Final = -1
"""In place of its source, for a candidate that the source is not to be judged by."""


class ArmRewards:
    """Mean candidate gradient of each arm, compared with the mean reference gradient.

    The reward of an arm is ``(1 + cos(mean gradient of its candidates, reference gradient)) / 2``
    over all captured layers together. Of so many arms that their sums would take more than 2 GiB
    (32 arms of the largest model that is not projected), sums and reference are projected to at
    most 64 x 64 numbers a layer, see :mod:`lightning_dvc.capture.projection`.

    Args:
        n_arms: Number of sources ``K``.
        reference: Per layer, the mean reference gradient, a full gradient.
    """

    def __init__(self, n_arms: int, reference: Sequence[Tensor]) -> None:
        self._projections: list[Projection] = []
        if n_arms * sum(full.numel() for full in reference) > _SUMS:
            shapes = [(len(full), full.shape[1]) for full in reference]
            self._projections = [
                Projection(shape, f"arms {number}", _WIDTH) for number, shape in enumerate(shapes)
            ]
        # In double precision, so that it matters little in which order processes add up batches;
        # Apple's devices have none.
        self._reference = [
            self._kept(layer, full if full.device.type == "mps" else full.double())
            for layer, full in enumerate(reference)
        ]
        self._sums = [full.new_zeros(n_arms, *full.shape) for full in self._reference]
        self._batch: dict[tuple[int, int], Tensor] = {}
        self._counts = torch.zeros(n_arms, dtype=torch.int64)

    def add(self, layer: int, gradients: LayerGradients, arms: Tensor) -> None:
        """Take in the gradients of one layer for a part of a batch of candidates.

        Args:
            layer: Number of the layer.
            gradients: Gradients of ``n`` candidates.
            arms: ``(n,)`` the source of each, or :data:`NOT_JUDGED_BY`; cheapest where equal ones
                follow each other.
        """
        for arm, own in runs(gradients, arms):
            if arm == NOT_JUDGED_BY:
                continue
            if (layer, arm) not in self._batch:
                self._batch[layer, arm] = self._kept(layer, own.sum())
            elif self._projections:
                self._batch[layer, arm] += self._kept(layer, own.sum())
            else:
                own.accumulate(self._batch[layer, arm])

    def close(self, arms: Tensor) -> None:
        """End a batch, all of whose parts and layers were added.

        Args:
            arms: ``(n,)`` the sources of its candidates, or :data:`NOT_JUDGED_BY`.
        """
        for (layer, arm), total in self._batch.items():
            self._sums[layer][arm] += total
        self._batch.clear()
        self._counts += torch.bincount(arms[arms != NOT_JUDGED_BY], minlength=len(self._counts))

    def _kept(self, layer: int, full: Tensor) -> Tensor:
        """What is kept of a full gradient."""
        if not self._projections:
            return full
        return self._projections[layer](Materialised(full[None])).formed().gradients[0]

    def take_in(self, gradients: Sequence[LayerGradients], arms: Tensor) -> None:
        """Take in a whole batch.

        Args:
            gradients: Per layer, gradients of ``n`` candidates.
            arms: ``(n,)`` the source of each.
        """
        order = arms.argsort(stable=True)
        for number, layer in enumerate(gradients):
            for rows, part in layer.parts(order=order):
                self.add(number, part, arms[rows])
        self.close(arms)

    def rewards(self, group: Group) -> Tensor:
        """Add up what all processes took in.

        Returns:
            ``(K,)`` float64 in ``[0, 1]`` on the CPU; NaN for an arm without candidates, and 1/2
            where a mean gradient vanishes.
        """
        counts = group.sum(self._counts.to(self._sums[0].device)).cpu()
        products, squares, length = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        for total, full in zip(self._sums, self._reference, strict=True):
            total = group.sum(total).flatten(1)
            products = products + (total @ full.flatten()).cpu()
            squares = squares + total.square().sum(1).cpu()
            length = length + full.square().sum().cpu()
        lengths = (squares * length).sqrt()
        cosine = torch.where(lengths > 0, products / lengths, 0.0).clamp(-1, 1)
        return torch.where(counts > 0, (1 + cosine) / 2, torch.nan)


def mean_by_arm(numbers: Tensor, arms: Tensor, n_arms: int) -> Tensor:
    """Mean number of each arm's candidates.

    Of their DVC values it is the reward ``"value"``; of ones for chosen candidates and zeros for
    the others it is the reward ``"acceptance"``.

    Args:
        numbers: ``(n,)`` in ``[0, 1]``.
        arms: ``(n,)`` the source of each candidate.
        n_arms: Number of sources ``K``.

    Returns:
        ``(K,)`` float64 in ``[0, 1]``; NaN for an arm without candidates.

    Example:
        >>> mean_by_arm(torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0, 0, 2]), 3).tolist()
        [0.75, nan, 0.25]
    """
    numbers = numbers.double()
    return torch.stack([numbers[arms == arm].mean() for arm in range(n_arms)])


class MeasuredGain:
    """Rewards from the monitored score: what it gained after sources had added samples.

    The reward of an arm is ``(1 + g s) / 2``, with ``g`` the change of the score since it was last
    known over the largest change so far, in ``[-1, 1]``, and ``s`` what the arm added in between
    over what the arm that added most did, in ``[0, 1]``.

    Example:
        >>> gain = MeasuredGain()
        >>> gain.rewards(score=0.5, n_arms=3)  # nothing to compare it with yet
        >>> gain.added(torch.tensor([10, 5, 0]))
        >>> gain.rewards(score=0.7, n_arms=3)
        tensor([1.0000, 0.7500,    nan], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self._before: float | None = None
        self._counts = torch.zeros(0, dtype=torch.float64)
        self._largest = 0.0

    def added(self, counts: Tensor) -> None:
        """Note the ``(K,)`` samples of each source that a round adds."""
        self._counts = _padded(self._counts, len(counts), 0.0) + counts

    def rewards(self, score: float | None, n_arms: int) -> Tensor | None:
        """Rewards of what was added since the score was last known.

        Args:
            score: The score, the greater the better; None, or not finite, where it is not known.
            n_arms: Number of sources ``K``, of which the last may have come since.

        Returns:
            ``(K,)`` float64 in ``[0, 1]``; NaN for an arm that added nothing. None where the score
            is not known, or not known from before.
        """
        if score is None or not math.isfinite(score):
            return None
        before, self._before = self._before, score
        counts, self._counts = self._counts, torch.zeros(0, dtype=torch.float64)
        if before is None or not len(counts):
            return None
        change = score - before
        self._largest = max(self._largest, abs(change))
        gain = change / self._largest if self._largest > 0 else 0.0
        shares = counts / counts.max().clamp(min=1)
        rewards = torch.where(counts > 0, (1 + gain * shares) / 2, torch.nan)
        return _padded(rewards, n_arms, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """What the next rewards depend on."""
        return {"before": self._before, "counts": self._counts, "largest": self._largest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._before, self._counts = state["before"], state["counts"]
        self._largest = state["largest"]


def _padded(numbers: Tensor, length: int, value: float) -> Tensor:
    return torch.cat([numbers, numbers.new_full((length - len(numbers),), value)])
