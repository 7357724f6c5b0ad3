"""What was seen of samples under the last few states of the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.memory.rows import RowIndex, last_occurrences


class SampleHistory:
    """For each sample the values of those of the last ``window`` model states that saw it.

    States are numbered 0, 1, 2, ... as the model learns. A row is a ring, the value for state ``s``
    in column ``s mod window`` beside the number ``s`` itself, so nothing is shifted as states pass
    and a value that has left the window is never taken for a recent one. When the rows are used up,
    the samples recorded least recently make room.

    Args:
        window: Number of model states remembered, ``W``, at least 1.
        capacity: Number of samples remembered, at least 1; each takes ``12 W + 24`` bytes.

    Raises:
        ConfigurationError: If one of them is less than 1.

    Example:
        >>> history = SampleHistory(window=3, capacity=100)
        >>> ids = torch.tensor([5, 9])
        >>> history.record(ids, torch.tensor([[1.0], [2.0]]), state=0)
        >>> history.record(ids[:1], torch.tensor([[0.5]]), state=1)
        >>> history.recent(ids, state=1)
        tensor([[0.5000, 1.0000,    nan],
                [   nan, 2.0000,    nan]])
    """

    def __init__(self, window: int, capacity: int) -> None:
        if window < 1 or capacity < 1:
            raise ConfigurationError(
                "window and capacity of the sample history must be at least 1, but got "
                f"{window} and {capacity}"
            )
        self.window = window
        self._rows = RowIndex(capacity)
        self._values = torch.full((capacity, window), torch.nan)
        self._states = torch.full((capacity, window), -1, dtype=torch.int64)
        self._latest = 0

    def __len__(self) -> int:
        """Number of samples held."""
        return len(self._rows)

    def record(self, ids: Tensor, values: Tensor, state: int) -> None:
        """Remember values; a value recorded before for the same sample and state is replaced.

        Args:
            ids: ``(n,)`` int64 sample ids; of several rows for one id the last counts.
            values: ``(n, c)`` with ``c <= window`` columns for the states ``state, state - 1, ...,
                state - c + 1``; NaN where unknown.
            state: Number of the newest of these states, never less than in an earlier call.

        Raises:
            ConfigurationError: If the shapes disagree or a state is out of order or below 0.
        """
        values = values.detach().to("cpu", torch.float32)
        self._check(ids, values, state)
        self._latest = state
        last = last_occurrences(ids)
        before = self._rows.find(ids[last])
        slots = self._rows.claim(ids[last])
        fresh = slots[(slots != before) & (slots >= 0)]
        self._values[fresh], self._states[fresh] = torch.nan, -1
        last, slots = last[slots >= 0], slots[slots >= 0, None]
        states = state - torch.arange(values.shape[1])
        self._values[slots, states % self.window] = values[last]
        self._states[slots, states % self.window] = states

    def recent(self, ids: Tensor, state: int) -> Tensor:
        """Read the values under the last ``window`` states; reading does not count as use.

        Args:
            ids: ``(n,)`` int64 sample ids, possibly repeated.
            state: Number of the present state, at least 0.

        Returns:
            ``(n, window)`` float32 on the CPU, column ``j`` for ``state - j``, NaN where unknown.
        """
        slots = self._rows.find(ids)[:, None]
        wanted = state - torch.arange(self.window)
        columns = wanted % self.window
        known = (slots >= 0) & (self._states[slots, columns] == wanted)
        return torch.where(known, self._values[slots, columns], torch.nan)

    def forget(self, ids: Tensor) -> None:
        """Drop all that is known of ``(n,)`` ids; those that are not held are skipped."""
        self._rows.forget(ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything held, as tensors and plain numbers."""
        ids = self._rows.ids()
        slots = self._rows.find(ids)
        return {
            "ids": ids,
            "values": self._values[slots],
            "states": self._states[slots],
            "latest": self._latest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; a smaller capacity keeps the samples recorded last.

        Raises:
            StateError: If it was saved with another window.
        """
        if state["values"].shape[1] != self.window:
            raise StateError(
                f"the saved history has a window of {state['values'].shape[1]} model states, "
                f"but this one has {self.window}; use the same window to continue"
            )
        self.forget(self._rows.ids())
        slots = self._rows.claim(state["ids"].cpu())
        kept = slots >= 0
        self._values[slots[kept]] = state["values"].cpu()[kept]
        self._states[slots[kept]] = state["states"].cpu()[kept]
        self._latest = state["latest"]

    def _check(self, ids: Tensor, values: Tensor, state: int) -> None:
        columns = values.shape[1] if values.dim() == 2 else 0
        if not 1 <= columns <= self.window or len(values) != len(ids):
            raise ConfigurationError(
                f"values must be ({len(ids)}, c) with 1 <= c <= {self.window}, but got "
                f"{tuple(values.shape)}; pass one row for each id"
            )
        if state < self._latest or columns > state + 1:
            raise ConfigurationError(
                f"states are numbered 0, 1, 2, ...; got {columns} columns ending at state {state} "
                f"after state {self._latest} was recorded; count states upwards from 0"
            )
