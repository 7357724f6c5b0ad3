"""Algorithm 2: what was captured of a sample, kept until the model has moved too far."""

from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.memory.rows import BYTES_PER_ROW, RowIndex, last_occurrences

_OVERHEAD: Final = (
    BYTES_PER_ROW + 8
)  # the index, and the number of the mark at which it was written


class GradientCache:
    """Rows of named tensors per sample id, least recently used first out, within a byte budget.

    The first :meth:`put` fixes the names, shapes and dtypes of the fields and allocates, in main
    memory, as many rows as the budget holds (the system hands out the pages as they are written).
    With a budget below one row nothing is kept and every lookup misses.

    **Validity.** The cache keeps an odometer per layer: the sum of the relative parameter movements
    that :meth:`move` was told, that is, the length of the path that the parameters have run. By the
    triangle inequality the path is never shorter than the displacement, so an entry written less
    than ``tolerance`` ago by the odometer of every layer is within ``tolerance`` of the present
    parameters (each step relative to the parameters it started from); one that is dropped may still
    have been, as when the model has walked in a circle. Entries are dropped as soon as they expire.

    Args:
        max_bytes: Memory for rows and their bookkeeping (32 bytes a row), at least 0; 0 means off.
        dtype: Floating dtype in which floating fields are stored; they come back in their original
            one, rounded, and infinite where it has no such large number. None stores them as they
            are. Other fields are always stored as they are.
        tolerance: Largest relative movement of any layer since an entry was written, at least 0.

    Raises:
        ConfigurationError: If a number is negative or ``dtype`` is not a floating one.

    Example:
        >>> cache = GradientCache(max_bytes=1_000, tolerance=0.01)
        >>> ids = torch.tensor([4, 8])
        >>> cache.put(ids, {"loss": torch.tensor([0.5, 0.25])})
        >>> hit, fields = cache.get(torch.tensor([8, 9]))
        >>> hit, fields["loss"]
        (tensor([ True, False]), tensor([0.2500]))
        >>> cache.move(torch.tensor([0.004, 0.02]))  # the second layer moved by 2%
        >>> cache.get(ids)[0]
        tensor([False, False])
    """

    def __init__(
        self, max_bytes: int, dtype: torch.dtype | None = None, tolerance: float = 0.01
    ) -> None:
        if max_bytes < 0 or not tolerance >= 0:
            raise ConfigurationError(
                "max_bytes and tolerance of the gradient cache must be at least 0, but got "
                f"{max_bytes} and {tolerance}; max_bytes=0 turns the cache off"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigurationError(
                f"dtype of the gradient cache must be a floating one, but got {dtype}; use "
                "torch.float16, torch.bfloat16 or None"
            )
        self.max_bytes = max_bytes
        self.dtype = dtype
        self.tolerance = tolerance
        self._hits = 0
        self._lookups = 0
        self.clear()

    def __len__(self) -> int:
        """Number of entries held, all of them valid."""
        return len(self._rows)

    @property
    def hit_rate(self) -> float:
        """Share of all lookups so far that hit, in ``[0, 1]``; 0 before the first."""
        return self._hits / max(1, self._lookups)

    @property
    def bytes_per_number(self) -> int:
        """Bytes in which a float32 is stored."""
        return (self.dtype or torch.float32).itemsize

    @property
    def n_bytes(self) -> int:
        """Bytes allocated, at most ``max_bytes``; 0 before the first :meth:`put`."""
        row = sum(_row_bytes(store, store.dtype) for store in self._storage.values())
        return (row + _OVERHEAD) * self._rows.capacity

    def clear(self) -> None:
        """Drop all entries and their memory; fields and layers may be others from here on."""
        self._marks: deque[Tensor] = deque()  # odometer readings from which a live entry may be
        self._first_mark = 0  # number of the oldest of them; the newest is the present reading
        self._rows = RowIndex(0)
        self._layout: dict[str, Tensor] = {}  # no rows: shapes and dtypes that come in and out
        self._storage: dict[str, Tensor] = {}
        self._written = torch.empty(0, dtype=torch.int64)  # by slot, number of the mark

    def move(self, drift: Tensor) -> None:
        """Advance the odometers and drop what has expired.

        Args:
            drift: ``(L,)`` movement of each layer's parameters since the previous call relative to
                their norm then, each at least 0. If one is not finite, then nothing is known about
                how far the model is, and all entries are dropped.

        Raises:
            ConfigurationError: If a movement is negative or the number of layers has changed.
        """
        drift = drift.detach().to("cpu", torch.float64)
        now = self._marks[-1] if self._marks else torch.zeros_like(drift)
        if drift.shape != now.shape or drift.dim() != 1 or (drift < 0).any():
            raise ConfigurationError(
                f"drift must hold one number of at least 0 for each of the {now.numel()} layers, "
                f"but got {drift.tolist()}; clear() the cache when the layers change"
            )
        if not drift.isfinite().all():
            self.clear()
        elif drift.any():
            self._marks.extend([now + drift] if self._marks else [now, drift])
            self._expire()

    def accepts(self, fields: Mapping[str, Tensor]) -> bool:
        """Whether :meth:`put` would take these fields: anything at first, then only their like."""
        return not self._layout or _shapes(fields) == _shapes(self._layout)

    def put(self, ids: Tensor, fields: Mapping[str, Tensor]) -> None:
        """Write entries as of the present model, dropping the least recently used where it is full.

        Args:
            ids: ``(n,)`` int64 sample ids; of several rows for one id the last counts.
            fields: Tensors ``(n, ...)`` in names, trailing shapes and dtypes as first put.

        Raises:
            ConfigurationError: If a field does not fit the first put or the number of ids.
        """
        # New tensors rather than slices, which would keep, and save, the memory behind them.
        layout = self._layout or {
            name: torch.empty(0, *value.shape[1:], dtype=value.dtype)
            for name, value in fields.items()
        }
        _check(len(ids), layout, fields)
        if not self._layout:
            self._allocate(layout)
        last = last_occurrences(ids)
        slots = self._rows.claim(ids[last])
        last, slots = last[slots >= 0], slots[slots >= 0]
        for name, value in fields.items():
            store = self._storage[name]
            store[slots] = value.detach()[last.to(value.device)].to("cpu", store.dtype)
        self._written[slots] = self._present

    def get(self, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Read what is held of some samples, and count it as used.

        Args:
            ids: ``(n,)`` int64 sample ids, possibly repeated.

        Returns:
            ``(n,)`` bool, true where the sample is held, and the fields of those, in the order of
            ``ids``, on the CPU; no fields before the first :meth:`put`.
        """
        slots = self._rows.find(ids)
        hit = slots >= 0
        slots = slots[hit]
        self._rows.touch(slots)
        self._hits += len(slots)
        self._lookups += len(ids)
        fields = {
            name: store[slots].to(self._layout[name].dtype) for name, store in self._storage.items()
        }
        return hit, fields

    def state_dict(self) -> dict[str, Any]:
        """Everything held, as tensors and plain containers."""
        ids = self._rows.ids()
        slots = self._rows.find(ids)
        return {
            "ids": ids,
            "written": self._written[slots],
            "fields": {name: store[slots] for name, store in self._storage.items()},
            "layout": dict(self._layout),
            "marks": torch.stack(tuple(self._marks)) if self._marks else torch.empty(0, 0),
            "first_mark": self._first_mark,
            "hits": self._hits,
            "lookups": self._lookups,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        The budget, dtype and tolerance of this cache apply: a smaller budget keeps the entries used
        last, a smaller tolerance drops those that are too old for it.

        Raises:
            StateError: If the state was not made by :meth:`state_dict`.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise StateError(
                f"the saved gradient cache lacks {sorted(missing)}; load what "
                "GradientCache.state_dict() returned, or start without a saved cache"
            )
        self.clear()
        self._marks = deque(state["marks"].cpu().unbind())
        self._first_mark = state["first_mark"]
        self._hits, self._lookups = state["hits"], state["lookups"]
        if state["layout"]:
            self._allocate({name: value.cpu() for name, value in state["layout"].items()})
            slots = self._rows.claim(state["ids"].cpu())
            kept = slots >= 0
            for name, value in state["fields"].items():
                store = self._storage[name]
                store[slots[kept]] = value.cpu()[kept].to(store.dtype)
            self._written[slots[kept]] = state["written"].cpu()[kept]
        self._expire()

    @property
    def _present(self) -> int:
        return self._first_mark + max(0, len(self._marks) - 1)

    def _expire(self) -> None:
        first = self._first_mark
        # Odometers never run back, so what has expired is a run of the oldest marks.
        while self._marks and (self._marks[-1] - self._marks[0] > self.tolerance).any():
            self._marks.popleft()
            self._first_mark += 1
        if self._first_mark > first:
            ids = self._rows.ids()
            written = self._written[self._rows.find(ids)]
            self._rows.forget(ids[written < self._first_mark])

    def _allocate(self, layout: dict[str, Tensor]) -> None:
        stored = {name: self._stored_dtype(value) for name, value in layout.items()}
        row = sum(_row_bytes(value, stored[name]) for name, value in layout.items())
        capacity = self.max_bytes // (row + _OVERHEAD)
        self._layout = layout
        self._storage = {
            name: torch.empty(capacity, *value.shape[1:], dtype=stored[name])
            for name, value in layout.items()
        }
        self._written = torch.empty(capacity, dtype=torch.int64)
        self._rows = RowIndex(capacity)

    def _stored_dtype(self, value: Tensor) -> torch.dtype:
        return self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype


def _check(n: int, layout: Mapping[str, Tensor], fields: Mapping[str, Tensor]) -> None:
    expected = {name: ((n, *value.shape[1:]), value.dtype) for name, value in layout.items()}
    got = {name: (tuple(value.shape), value.dtype) for name, value in fields.items()}
    if not got or got != expected:
        raise ConfigurationError(
            f"the gradient cache expected, for {n} ids, the fields {expected or 'of a sample'}, "
            f"but got {got}; put the same fields each time, or clear() it first"
        )


def _shapes(fields: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape[1:], value.dtype) for name, value in fields.items()}


def _row_bytes(value: Tensor, dtype: torch.dtype) -> int:
    """Bytes of one row of ``(n, ...)`` values in ``dtype``; ``value`` itself may have no rows."""
    return value.shape[1:].numel() * dtype.itemsize
