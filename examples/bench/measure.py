"""Timing that survives a noisy machine: what is compared takes turns, and medians count."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

REPEATS = 7


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    Attributes:
        name: What was measured.
        value: The figure.
        unit: Its unit; "ratio" has none.
        at_most: Target from above, if there is one.
        at_least: Target from below, if there is one.
    """

    name: str
    value: float
    unit: str = "ratio"
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        value = f"{self.name:36} {self.value:>12.4g} {self.unit:8}"
        if self.at_most is not None:
            return f"{value} <= {self.at_most:<10g} {_verdict(self.value <= self.at_most)}"
        if self.at_least is not None:
            return f"{value} >= {self.at_least:<10g} {_verdict(self.value >= self.at_least)}"
        return value.rstrip()


def _verdict(met: bool) -> str:
    return "ok" if met else "SHORT"


def medians(*functions: Callable[[], object], repeats: int = REPEATS) -> list[float]:
    """Median seconds of each function, called in turns after one call that does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, taken in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


class Calls(TorchDispatchMode):
    """Counts the calls of torch inside the block, but for views, which compute nothing.

    On an accelerator they are what small batches cost; how busy the machine is does not matter.

    Example:
        >>> import torch
        >>> with Calls() as calls:
        ...     x = torch.ones(2, 2).T + 1
        >>> calls.number
        2
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.number = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))
