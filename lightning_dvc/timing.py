"""Where selection spends its time, and how much of it a part may take."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Adds up wall time by section.

    Attributes:
        seconds: Section to seconds spent in it so far, in order of first use.

    Example:
        >>> watch = Stopwatch()
        >>> with watch.section("draw"):
        ...     pass
        >>> list(watch.seconds), watch.total >= 0
        (['draw'], True)
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds in all sections together."""
        return sum(self.seconds.values())

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Time what happens inside the block; sections must not be nested."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class TimeShare:
    """Seconds spent on something costly, held to a share of the wall time since the start.

    Attributes:
        spent: Seconds spent so far.
        left_out: How many times it was not allowed.

    Args:
        max_share: Share of the wall time in ``(0, 1]``; None for no limit.

    Example:
        >>> clock = TimeShare(max_share=0.1)
        >>> clock.start()
        >>> clock.allows_another()  # what the first time costs is not known
        True
    """

    def __init__(self, max_share: float | None) -> None:
        self.max_share = max_share
        self.spent = 0.0
        self.left_out = 0
        self._last = 0.0  # seconds of the last time; not known before the first
        self._earlier = 0.0  # wall time of earlier processes
        self._since: float | None = None

    def start(self) -> None:
        """Let the wall time run, if it does not yet."""
        if self._since is None:
            self._since = time.perf_counter()

    def allows_another(self) -> bool:
        """Whether another time as long as the last one would keep to the share."""
        if self.max_share is None or self.spent + self._last <= self.max_share * self._elapsed():
            return True
        self.left_out += 1
        return False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what happens inside the block."""
        start = time.perf_counter()
        yield
        self._last = time.perf_counter() - start
        self.spent += self._last

    def state_dict(self) -> dict[str, Any]:
        """Times so far, as plain numbers."""
        return {
            "spent": self.spent,
            "left_out": self.left_out,
            "last": self._last,
            "elapsed": self._elapsed(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.spent = state["spent"]
        self.left_out = state["left_out"]
        self._last = state["last"]
        self._earlier = state["elapsed"]
        # Runs on from here, so that the time between saving and loading does not count.
        self._since = time.perf_counter() if self._earlier > 0 else None

    def _elapsed(self) -> float:
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._earlier + running
