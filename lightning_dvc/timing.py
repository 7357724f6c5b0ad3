"""Where selection spends its time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


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
