"""Sources, their global sample ids, and draws of samples that are still free.

A source is any map-style dataset; nothing here reads a sample. The only thing kept for every
sample is one byte that tells whether it is still free. A draw costs time in proportion to what is
drawn, not to the size of the pool, until fewer than one sample in 16 of a source is left: then a
draw looks through its bytes.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lightning_dvc.errors import ConfigurationError, StateError, is_number
from lightning_dvc.randomness import stream

if TYPE_CHECKING:
    AnyDataset: TypeAlias = Dataset[Any]
else:
    # With a parameter, LightningCLI does not see the arguments of the datasets in its files.
    AnyDataset = Dataset

FREE: Final = 0
SELECTED: Final = 1
TAKEN_BACK: Final = 2
SET_ASIDE: Final = 3

# Below this share of free samples a rejection draw wastes more tries than one scan of the bytes.
_SCAN_BELOW: Final = 1 / 16


@dataclass(frozen=True)
class Source:
    """One source of training samples.

    Args:
        dataset: A map-style dataset: ``__len__`` and ``__getitem__``.
        min_share: Least share of what is selected that comes from here, in ``[0, 1]``.
        max_share: Largest share of what is selected that comes from here, in ``[0, 1]``.
        cost: What one sample costs relative to those of the other sources, for example to label
            it; positive and finite. Candidates are divided over the sources by what they are worth
            per cost. The budget stays a number of samples, whatever they cost.

    Raises:
        ConfigurationError: If the dataset is not map-style, the shares are not
            ``0 <= min_share <= max_share <= 1``, or the cost is out of its range.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> Source(TensorDataset(torch.zeros(4, 2)), max_share=0.5).max_share
        0.5
    """

    dataset: AnyDataset
    min_share: float = 0.0
    max_share: float = 1.0
    cost: float = 1.0

    def __post_init__(self) -> None:
        check_map_style(self.dataset, "a source")
        shares = (self.min_share, self.max_share)
        if not (all(map(is_number, shares)) and 0 <= self.min_share <= self.max_share <= 1):
            raise ConfigurationError(
                "shares of a source must satisfy 0 <= min_share <= max_share <= 1, but got "
                f"min_share={self.min_share!r}, max_share={self.max_share!r}"
            )
        if not (is_number(self.cost) and 0 < self.cost < math.inf):
            raise ConfigurationError(
                f"cost of a source must be positive and finite, but is {self.cost!r}; give what "
                "one of its samples costs, in the unit of the other sources' costs"
            )

    def __len__(self) -> int:
        assert isinstance(self.dataset, Sized), "checked in __post_init__"
        return len(self.dataset)

    @staticmethod
    def of(given: "Source | AnyDataset") -> "Source":
        """Take a dataset as a source without bounds, and a source as it is."""
        return given if isinstance(given, Source) else Source(given)


def is_map_style(dataset: object) -> bool:
    """Whether a dataset has samples by index, and knows how many.

    Example:
        >>> is_map_style(range(9)), is_map_style(iter(range(9)))
        (True, False)
    """
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    # One of these inherits a __getitem__ that only raises.
    return indexed and not isinstance(dataset, IterableDataset)


def check_map_style(dataset: object, what: str) -> None:
    """Refuse what samples cannot be drawn from by index.

    Args:
        dataset: What was given as a dataset.
        what: Names it in the message.

    Raises:
        ConfigurationError: If it is several datasets, or not map-style.
    """
    check_single(dataset, what)
    if not is_map_style(dataset):
        raise ConfigurationError(
            f"{what} needs __len__ and __getitem__, as a map-style dataset has, but got "
            f"{type(dataset).__name__}; samples are drawn by index, so load an iterable one into "
            "a list or an indexed file first"
        )


def check_single(dataset: object, what: str) -> None:
    """Refuse a collection of datasets, which would be taken for one whose samples they are.

    Args:
        dataset: What was given as a dataset.
        what: Names it in the message.

    Raises:
        ConfigurationError: If it is a list, tuple or mapping of datasets.
    """
    samples: Iterable[object] = ()
    if isinstance(dataset, list | tuple | Mapping):
        samples = dataset.values() if isinstance(dataset, Mapping) else dataset
    if isinstance(next(iter(samples), None), Dataset):
        raise ConfigurationError(
            f"{what} must be one dataset, but is a {type(dataset).__name__} of datasets; put them "
            "together with torch.utils.data.ConcatDataset([...])"
        )


class PoolDataset(Dataset[Any]):
    """All sources as one dataset, indexed by global id.

    Immutable: pools that grow make a new one. So a copy in a loader worker stays right for every id
    that it was made for.

    Args:
        datasets: One dataset per source, in arm order.
        offsets: First global id of each source, and the total at the end.
    """

    def __init__(self, datasets: Sequence[Dataset[Any]], offsets: np.ndarray) -> None:
        self._datasets = list(datasets)
        # A list: bisecting it takes a tenth of what numpy takes for a single number.
        self._offsets: list[int] = offsets.tolist()

    def __len__(self) -> int:
        return self._offsets[-1]

    def __getitem__(self, sample_id: int) -> Any:
        arm = bisect_right(self._offsets, sample_id) - 1
        return self._datasets[arm][int(sample_id) - self._offsets[arm]]

    def __getitems__(self, sample_ids: Sequence[int]) -> list[Any]:
        """Read a batch, of each source at once where it can do that, as torch's loader does."""
        found: list[Any] = [None] * len(sample_ids)
        places: dict[int, list[int]] = {}
        for place, sample_id in enumerate(sample_ids):
            places.setdefault(bisect_right(self._offsets, sample_id) - 1, []).append(place)
        for arm, mine in places.items():
            dataset = self._datasets[arm]
            indices = [int(sample_ids[place]) - self._offsets[arm] for place in mine]
            read = getattr(dataset, "__getitems__", None)
            samples = read(indices) if callable(read) else [dataset[index] for index in indices]
            for place, sample in zip(mine, samples, strict=True):
                found[place] = sample
        return found


class Pools:
    """The sources and the state of each of their samples: free, selected, taken back, set aside.

    Args:
        sources: Name to :class:`Source` or to a map-style dataset; the order numbers the arms.
        seed: Seed of every draw.

    Raises:
        ConfigurationError: If the sources have no names, there is none, one is empty or not
            map-style, or the minimum shares add up to more than 1.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> pools = Pools({"a": TensorDataset(torch.zeros(3)), "b": TensorDataset(torch.ones(5))})
        >>> pools.arms_of(torch.tensor([2, 3])).tolist()
        [0, 1]
        >>> pools.draw(1, 5, "example").tolist()
        [3, 4, 5, 6, 7]
    """

    def __init__(self, sources: Mapping[str, Source | AnyDataset], seed: int = 0) -> None:
        if not isinstance(sources, Mapping):
            raise ConfigurationError(
                "sources must be a mapping of names to datasets, {'name': dataset, ...}, but is a "
                f"{type(sources).__name__}; give each dataset a name"
            )
        if not sources:
            raise ConfigurationError(
                "sources is empty; give at least one: sources={'name': dataset, ...}"
            )
        if len(set(map(str, sources))) < len(sources):
            raise ConfigurationError(
                f"expected names of sources that differ as text, but they are {list(sources)}; "
                "give other names"
            )
        self.seed = seed
        self.sources: dict[str, Source] = {}
        self.sizes: list[int] = []
        self._status = np.empty(0, dtype=np.uint8)
        self._free = np.empty(0, dtype=np.int64)
        self._append({str(name): Source.of(given) for name, given in sources.items()})

    def add(self, name: str, source: Source | AnyDataset) -> None:
        """Append a source: the next arm, whose ids continue at the end, all of them free.

        Nothing changes for the samples there were, but :attr:`dataset` is a new object.

        Args:
            name: One that no source has.
            source: A :class:`Source` or a map-style dataset.

        Raises:
            ConfigurationError: If the name is taken, the source is empty or not map-style, or the
                minimum shares add up to more than 1. Then nothing has changed.

        Example:
            >>> pools = Pools({"a": range(3)})
            >>> pools.add("b", range(5))
            >>> pools.names, pools.ids_of(1, torch.arange(5)).tolist()
            (['a', 'b'], [3, 4, 5, 6, 7])
        """
        if name in self.sources:
            raise ConfigurationError(
                f"expected the name of a new source, but there is a source {name!r} already, of "
                f"{self.names}; give another name"
            )
        self._append({name: Source.of(source)})

    def _append(self, more: Mapping[str, Source]) -> None:
        sources = {**self.sources, **more}
        new_sizes = [len(source) for source in more.values()]
        _check(sources, dict(zip(more, new_sizes, strict=True)))
        self.sources, self.sizes = sources, self.sizes + new_sizes
        self._offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        fresh = np.full(sum(new_sizes), FREE, dtype=np.uint8)
        self._status = np.concatenate([self._status, fresh])
        self._free = np.concatenate([self._free, np.array(new_sizes, dtype=np.int64)])
        self.dataset = PoolDataset([s.dataset for s in sources.values()], self._offsets)

    @property
    def names(self) -> list[str]:
        """Names of the sources in arm order."""
        return list(self.sources)

    @property
    def n_samples(self) -> int:
        """Samples in all pools together."""
        return len(self._status)

    @property
    def stock(self) -> Tensor:
        """``(K,)`` free samples of each source."""
        return torch.from_numpy(self._free.copy())

    def arms_of(self, ids: Tensor) -> Tensor:
        """Tell the source of each sample.

        Args:
            ids: ``(n,)`` global ids.

        Returns:
            ``(n,)`` arm numbers.
        """
        return torch.from_numpy(np.searchsorted(self._offsets, ids.numpy(), side="right") - 1)

    def indices_of(self, ids: Tensor) -> Tensor:
        """Tell the index of each sample within its own source, ``(n,)``."""
        return ids - torch.from_numpy(self._offsets)[self.arms_of(ids)]

    def ids_of(self, arms: Tensor | int, indices: Tensor) -> Tensor:
        """Tell the global ids of samples, ``(n,)``, from their source and their index in it.

        Args:
            arms: ``(n,)`` sources, or one for all.
            indices: ``(n,)`` indices within the sources.
        """
        return indices + torch.from_numpy(self._offsets)[arms]

    def draw(self, arm: int, count: int, purpose: str, *numbers: int) -> Tensor:
        """Draw free samples of one source, uniformly and without replacement.

        Drawn samples stay free: only :meth:`mark` changes their state.

        Args:
            arm: Number of the source.
            count: How many, at least 0; all that are free when there are fewer.
            purpose: Names the random stream, see :func:`lightning_dvc.randomness.stream`.
            numbers: Further words of the stream, such as the round.

        Returns:
            ``(min(count, free),)`` global ids, ascending.
        """
        start, stop = int(self._offsets[arm]), int(self._offsets[arm + 1])
        status = self._status[start:stop]
        free = int(self._free[arm])
        count = min(count, free)
        if count == 0:
            return torch.empty(0, dtype=torch.int64)
        generator = stream(self.seed, purpose, arm, *numbers)
        if count > free // 2 or free < _SCAN_BELOW * len(status):
            chosen = generator.choice(np.flatnonzero(status == FREE), size=count, replace=False)
        else:
            chosen = _draw_by_rejection(status, count, generator)
        return torch.from_numpy(np.sort(chosen).astype(np.int64) + start)

    def draw_each(self, counts: Tensor, purpose: str, *numbers: int) -> Tensor:
        """Draw free samples of every source, see :meth:`draw`.

        Args:
            counts: ``(K,)`` how many of each.
            purpose: Names the random streams.
            numbers: Further words of the streams.

        Returns:
            ``(n,)`` global ids, ascending.
        """
        each = enumerate(counts.tolist())
        return torch.cat([self.draw(arm, count, purpose, *numbers) for arm, count in each])

    def mark(self, ids: Tensor, status: int) -> None:
        """Change the state of samples.

        Args:
            ids: ``(n,)`` global ids, each at most once.
            status: ``FREE``, ``SELECTED``, ``TAKEN_BACK`` or ``SET_ASIDE``.
        """
        index = ids.numpy()
        arms = np.searchsorted(self._offsets, index, side="right") - 1
        was_free = self._status[index] == FREE
        np.subtract.at(self._free, arms[was_free], 1)
        if status == FREE:
            np.add.at(self._free, arms, 1)
        self._status[index] = status

    def fingerprint(self) -> dict[str, int]:
        """Names and sizes of the sources, to recognise the pools that a checkpoint belongs to."""
        return dict(zip(self.names, self.sizes, strict=True))

    def check_fingerprint(self, saved: Mapping[str, int], what: str) -> None:
        """Refuse state that was saved for other pools; more sources than then may follow.

        Args:
            saved: Result of :meth:`fingerprint` when the state was saved.
            what: Names the thing being loaded, for the message.

        Raises:
            StateError: If the first sources are not the saved ones, in name, order and size.
        """
        if list(saved.items()) != list(self.fingerprint().items())[: len(saved)]:
            raise StateError(
                f"{what} was saved for the sources {dict(saved)}, but this run has "
                f"{self.fingerprint()}; give the same sources first, in the same order and of the "
                "same sizes; only new ones may follow"
            )

    def state_dict(self) -> dict[str, Any]:
        """State of the samples that are not free, and the fingerprint of the pools."""
        taken = np.flatnonzero(self._status)
        return {
            "fingerprint": self.fingerprint(),
            "ids": torch.from_numpy(taken),
            "status": torch.from_numpy(self._status[taken]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of every sample; those of sources that were added since are free.

        Raises:
            StateError: If the state belongs to other pools, see :meth:`check_fingerprint`.
        """
        self.check_fingerprint(state["fingerprint"], "the checkpoint's selection")
        self._status[:] = FREE
        self._free[:] = self.sizes
        for status in (SELECTED, TAKEN_BACK, SET_ASIDE):
            self.mark(state["ids"][state["status"] == status], status)


def _check(sources: Mapping[str, Source], sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size == 0:
            raise ConfigurationError(f"source {name!r} has no samples; leave it out or fill it")
    least = sum(source.min_share for source in sources.values())
    most = sum(source.max_share for source in sources.values())
    if least > 1 + 1e-9:
        raise ConfigurationError(
            f"the minimum shares of the sources add up to {least:.3f}, but must not exceed 1; "
            "lower a min_share"
        )
    if most < 1 - 1e-9:
        raise ConfigurationError(
            f"the maximum shares of the sources add up to {most:.3f}, so the budget can never "
            "be filled, but must reach 1; raise a max_share"
        )


def _draw_by_rejection(
    status: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw distinct free positions without looking at the others; at least 1 in 16 is free."""
    found = np.empty(0, dtype=np.int64)
    while len(found) < count:
        tries = generator.integers(len(status), size=2 * (count - len(found)) + 16)
        fresh = np.concatenate([found, tries[status[tries] == FREE]])
        # np.unique sorts; going through first positions keeps the order of the draws, so that
        # cutting the surplus off does not favour small ids.
        _, first = np.unique(fresh, return_index=True)
        found = fresh[np.sort(first)]
    return found[:count]
