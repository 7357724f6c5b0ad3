"""The sampler that Lightning keeps.

Lightning replaces any sampler but a ``DistributedSampler`` when it runs several processes, so this
is one. It emits global ids of the selected samples only, shuffled by epoch from the seed, and each
rank gets the same number of them.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.randomness import stream, torch_stream


def epoch_order(
    ids: np.ndarray, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Order in which one rank sees the selected samples in one epoch.

    Args:
        ids: ``(s,)`` selected ids in order of selection, at least one.
        seed: The user's seed.
        epoch: Number of the epoch.
        rank: This process.
        world_size: Number of processes.

    Returns:
        ``(ceil(s / world_size),)`` ids: a shuffle, padded by repeating its beginning so that every
        rank gets the same number.

    Example:
        >>> sorted(int(i) for r in (0, 1) for i in epoch_order(np.arange(4), 0, 0, r, 2))
        [0, 1, 2, 3]
    """
    order = stream(seed, "epoch order", epoch).permutation(ids)
    per_rank = -(-len(order) // world_size)
    return np.resize(order, per_rank * world_size)[rank::world_size]


class SelectionSampler(DistributedSampler[int]):
    """Emits the ids of the selected samples, and follows the selection as it grows.

    Args:
        dataset: The view over all pools.
        seed: The user's seed.
        rank: This process; set anew by :meth:`place` once Lightning has set up its processes.
        world_size: Number of processes.
    """

    def __init__(
        self, dataset: Dataset[object], seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=True, seed=seed)
        self._ids = np.empty(0, dtype=np.int64)
        self._where: Callable[[], tuple[int, int]] | None = None

    def place(
        self, rank: int, world_size: int, where: Callable[[], tuple[int, int]] | None = None
    ) -> None:
        """Tell which process this is of how many, and where training stands.

        Args:
            rank: This process.
            world_size: Number of processes.
            where: Asked at the beginning of each pass for the number of the epoch, and how many of
                the samples of this process are to be skipped, because a resumed run has trained on
                them. When not given, :meth:`set_epoch` tells the epoch and nothing is skipped.
        """
        self.rank, self.num_replicas, self._where = rank, world_size, where

    def select(self, ids: Tensor) -> None:
        """Replace the selected ids.

        Args:
            ids: ``(s,)`` global ids in order of selection.

        Raises:
            ConfigurationError: If there are none: Lightning would end training as finished.
        """
        if len(ids) == 0:
            raise ConfigurationError(
                "the selection is empty, so there is nothing to train on; raise the budget or the "
                "warm-up share"
            )
        self._ids = ids.numpy().copy()

    def __len__(self) -> int:
        return -(-len(self._ids) // self.num_replicas)

    @property
    def _position(self) -> tuple[int, int]:
        return self._where() if self._where else (self.epoch, 0)

    def seed_of_pass(self) -> int:
        """Seed of the loader's workers in the epoch that is about to begin."""
        return torch_stream(self.seed, "loader", self._position[0]).initial_seed()

    def __iter__(self) -> Iterator[int]:
        epoch, skipped = self._position
        order = epoch_order(self._ids, self.seed, epoch, self.rank, self.num_replicas)
        return iter(torch.from_numpy(order).tolist()[skipped:])
