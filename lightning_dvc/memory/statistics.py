"""Algorithm 4: statistics of a stream in O(1) memory, or in that of a fixed window."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError, StateError


class Welford:
    """Running mean and variance, merged batch by batch.

    A batch is first reduced to its own mean and sum of squared deviations, in float64, and these
    are merged, so that no large sums of squares are subtracted (Chan, Golub and LeVeque,
    "Algorithms for computing the sample variance", The American Statistician, 1983, eq. 2.1;
    Welford, 1962, for one value at a time). O(d) memory, on the CPU.

    Args:
        shape: Shape of one row; ``()`` for scalars.

    Example:
        >>> statistic = Welford(shape=())
        >>> statistic.update(torch.tensor([1.0, 2.0]))
        >>> statistic.update(torch.tensor([6.0]))
        >>> statistic.mean.item(), round(statistic.variance.item(), 4)
        (3.0, 4.6667)
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.count = 0
        self._mean = torch.zeros(shape, dtype=torch.float64)
        self._deviations = torch.zeros(shape, dtype=torch.float64)  # sum of squared deviations

    @property
    def mean(self) -> Tensor:
        """Mean of all rows, float64 of the given shape; StateError before the first row."""
        return _seen(self.count, self._mean).clone()

    @property
    def variance(self) -> Tensor:
        """Population variance (divided by the number of rows); StateError before the first row."""
        return _seen(self.count, self._deviations) / self.count

    def update(self, batch: Tensor) -> None:
        """Add rows.

        Args:
            batch: ``(n, *shape)``, also with ``n = 0``.

        Raises:
            ConfigurationError: If the rows have another shape.
        """
        if batch.dim() == 0 or batch.shape[1:] != self._mean.shape:
            raise ConfigurationError(
                f"a batch must be (n, *{tuple(self._mean.shape)}), but got {tuple(batch.shape)}; "
                "give one row for each sample"
            )
        if len(batch):
            batch = batch.detach().to("cpu", torch.float64)
            mean = batch.mean(0)
            self._merge(len(batch), mean, (batch - mean).square().sum(0))

    def merge(self, other: "Welford") -> None:
        """Add all rows that another statistic has seen.

        Raises:
            ConfigurationError: If its rows have another shape.
        """
        if other._mean.shape != self._mean.shape:
            raise ConfigurationError(
                f"rows of shape {tuple(other._mean.shape)} cannot be merged into a statistic of "
                f"rows of shape {tuple(self._mean.shape)}; merge statistics of the same quantity"
            )
        if other.count:
            self._merge(other.count, other._mean, other._deviations)

    def _merge(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        total = self.count + count
        step = mean - self._mean
        self._mean = self._mean + step * (count / total)
        between = step.square() * (self.count * (count / total))
        self._deviations = self._deviations + deviations + between
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        """Count, mean and sum of squared deviations."""
        return {"count": self.count, "mean": self._mean, "deviations": self._deviations}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            StateError: If it was saved for rows of another shape.
        """
        if state["mean"].shape != self._mean.shape:
            raise StateError(
                f"the saved mean has shape {tuple(state['mean'].shape)}, but this statistic has "
                f"{tuple(self._mean.shape)}; make it with the shape that was saved"
            )
        self.count = state["count"]
        self._mean = state["mean"].to("cpu", copy=True)
        self._deviations = state["deviations"].to("cpu", copy=True)


class StreamingMedian:
    """Median and median absolute deviation of the last values of a stream.

    A window rather than a sketch: the model moves, so old values describe a model that is gone,
    and a few thousand values are cheap to sort. Float64, on the CPU.

    Args:
        window: Number of values remembered, at least 1.

    Raises:
        ConfigurationError: If ``window`` is less than 1.

    Example:
        >>> statistic = StreamingMedian(window=4)
        >>> statistic.update(torch.tensor([100.0, 1.0, 2.0, 4.0, 9.0]))
        >>> statistic.median, statistic.mad
        (3.0, 1.5)
    """

    def __init__(self, window: int = 4096) -> None:
        if window < 1:
            raise ConfigurationError(f"window must be at least 1, but got {window}")
        self.window = window
        self._values = torch.empty(0, dtype=torch.float64)  # oldest first

    def __len__(self) -> int:
        """Number of values remembered, at most ``window``."""
        return len(self._values)

    @property
    def median(self) -> float:
        """Median; the mean of the middle two of an even number. StateError before any value."""
        return float(_middle(_seen(len(self), self._values)))

    @property
    def mad(self) -> float:
        """Median of ``|value - median|``, not rescaled. StateError before any value."""
        values = _seen(len(self), self._values)
        return float(_middle((values - _middle(values)).abs()))

    def update(self, values: Tensor) -> None:
        """Take in ``(n,)`` values, the newest last."""
        values = values.detach().to("cpu", torch.float64).flatten()
        self._values = torch.cat([self._values, values])[-self.window :].clone()

    def merge(self, *others: "StreamingMedian") -> None:
        """Take in what other statistics remember, as if all streams had run side by side.

        Of all values together the newest ``window`` are kept, the age of a value being its distance
        from the end of its own stream; values of one age rank as the arguments do. Merge the
        statistics of several processes in one call, so that each has an equal part.
        """
        streams = [self._values, *(other._values for other in others)]
        ages = torch.cat([torch.arange(len(stream) - 1, -1, -1) for stream in streams])
        order = ages.sort(descending=True, stable=True).indices
        self._values = torch.cat(streams)[order][-self.window :].clone()

    def state_dict(self) -> dict[str, Any]:
        """The values remembered, oldest first."""
        return {"values": self._values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state; a smaller window keeps the newest values."""
        self._values = state["values"].to("cpu", copy=True)[-self.window :].clone()


def _seen(count: int, value: Tensor) -> Tensor:
    if not count:
        raise StateError("this statistic has seen no values yet; call update() before reading it")
    return value


def _middle(values: Tensor) -> Tensor:
    ordered = values.sort().values
    low, high = ordered[(len(values) - 1) // 2], ordered[len(values) // 2]
    return low + (high - low) / 2
