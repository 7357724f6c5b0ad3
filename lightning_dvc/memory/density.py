"""Kernel densities of a set of points: by all pairs, and by a neighbourhood and a sample.

Logarithms throughout, with a running maximum, so that far queries do not underflow.
"""

import math
from typing import Final, Protocol

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError
from lightning_dvc.memory.lsh import RandomHyperplanes, SortedCodes, real
from lightning_dvc.randomness import torch_stream

# Numbers in one temporary tensor, 4 MiB of float32: tiles of this size stay in the cache. Under
# 200,000 points, whole rows of distances took twice the time on two CPU cores.
_CHUNK: Final = 2**20


class Density(Protocol):
    """A kernel density of a set of points; the exact and the hashed one have this interface."""

    def log_density(self, queries: Tensor) -> Tensor:
        """Logarithm of the mean kernel value at ``(n, d)`` queries, ``(n,)``, finite, at most 0."""


class ExactDensity:
    """Gaussian kernel density by all pairs, O(n m d).

    ``log( (1/m) sum_j exp(-|x - y_j|^2 / (2 bandwidth_squared)) )``, in float32, or in float64 for
    float64 points; a logarithm below the smallest number of the dtype is set to that.

    Args:
        points: ``(m, d)`` with ``m >= 1``.
        bandwidth_squared: Squared bandwidth, above 0.

    Raises:
        ConfigurationError: If there are no points or the bandwidth is not positive.

    Example:
        >>> ExactDensity(torch.zeros(1, 1), 1.0).log_density(torch.tensor([[2.0]]))
        tensor([-2.])
    """

    def __init__(self, points: Tensor, bandwidth_squared: float) -> None:
        self._centre, self._points = _centred(points, bandwidth_squared)
        self._bandwidth_squared = bandwidth_squared

    def log_density(self, queries: Tensor) -> Tensor:
        """Logarithm of the density.

        Args:
            queries: ``(n, d)``.

        Returns:
            ``(n,)`` in ``(-inf, 0]``, on the device of the points.
        """
        x = queries.detach().to(self._centre) - self._centre
        return _bounded(_log_means(x, self._points, self._bandwidth_squared))


class LSHDensity:
    """Gaussian kernel density, exact among a query's hash neighbours and sampled beyond them.

    The estimator of Karppa, Aumueller and Pagh ("DEANN: Speeding up Kernel-Density Estimation using
    Approximate Nearest Neighbor Search", AISTATS 2022). With ``k_j`` the kernel between the query
    and point ``j``, ``N`` the points next to the query in the hash tables, each counted once, and
    ``S`` a uniform sample of ``r`` of the ``m`` points without replacement, independent of ``N``,

        ``D_hat = (1/m) [ sum_{j in N} k_j + (m/r) sum_{j in S, not in N} k_j ]``.

    Over the draw of ``S`` this is the exact density on average, whatever ``N`` is. With
    ``y_j = k_j`` outside ``N`` and 0 in it, and ``S_y^2 = sum_j (y_j - mean y)^2 / (m - 1)``,

        ``Var D_hat = (1 - r/m) S_y^2 / r``.

    So ``N`` takes the largest kernels, which a sample would miss, out of the variance, and with
    ``r = m`` nothing is estimated, or hashed.

    Measured on one CPU core for 4,096 queries under 128-dimensional representations of MNIST:
    seconds, and median relative errors of the log-density with the bandwidth ``h`` of
    :func:`median_bandwidth_squared` and with ``h / 10``, there also without ``N``.

    ========  =====  =============  ======  ==========  =============
    ``m``     exact  build + query  at h    at h / 10   without ``N``
    ========  =====  =============  ======  ==========  =============
    10,000    0.18   0.01 + 0.10    0.6%    3.4%        10%
    200,000   3.3    0.26 + 0.12    1.1%    10%         24%
    ========  =====  =============  ======  ==========  =============

    Args:
        points: ``(m, d)`` with ``m >= 1``; everything is computed on their device, in float32, or
            in float64 for float64 points.
        bandwidth_squared: Squared bandwidth, above 0.
        tables: Number of hash tables.
        bits: Hyperplanes in each table; enough to tell points apart is enough.
        most: Points that a table adds to ``N``, at least 1.
        sample: Points in ``S``, at least 1; all points if there are no more.
        seed: Seed of the hyperplanes and, independently, of ``S``.

    Raises:
        ConfigurationError: If there are no points or a number is out of range.

    Example:
        >>> points = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
        >>> exact = ExactDensity(points, 4.0).log_density(points)
        >>> hashed = LSHDensity(points, 4.0, sample=500).log_density(points)
        >>> bool(((hashed - exact) / exact).abs().median() < 0.05)
        True
    """

    def __init__(
        self,
        points: Tensor,
        bandwidth_squared: float,
        *,
        tables: int = 4,
        bits: int = 32,
        most: int = 8,
        sample: int = 2048,
        seed: int = 0,
    ) -> None:
        self._centre, self._points = _centred(points, bandwidth_squared)
        if most < 1 or sample < 1:
            raise ConfigurationError(
                f"most and sample must be at least 1, but got most={most}, sample={sample}"
            )
        self._bandwidth_squared = bandwidth_squared
        self._most = most
        self._spread = self._points.square().sum(1).mean()
        self._planes = RandomHyperplanes(points.shape[1], tables, bits, seed)
        self._sampled = sample < len(points)
        if self._sampled:
            self._codes = SortedCodes(self._planes.codes(self._points))
            self._draw(sample, seed)

    def log_density(self, queries: Tensor) -> Tensor:
        """Logarithm of the estimated density, held within what is known of the exact one.

        The exact density is at most 1 and, by Jensen's inequality, at least
        ``exp(-(|x - mean|^2 + mean_j |y_j - mean|^2) / (2 bandwidth_squared))``. An estimate
        outside is moved to the nearer end, which can only bring it closer.

        Args:
            queries: ``(n, d)``.

        Returns:
            ``(n,)`` in ``(-inf, 0]``, on the device of the points.
        """
        x = queries.detach().to(self._centre) - self._centre
        floor = (x.square().sum(1) + self._spread) / (-2 * self._bandwidth_squared)
        return _bounded(torch.maximum(self.log_estimate(queries), floor))

    def log_estimate(self, queries: Tensor) -> Tensor:
        """Logarithm of the unbiased estimate itself.

        Args:
            queries: ``(n, d)``.

        Returns:
            ``(n,)``, possibly above 0, and -inf where even the logarithm overflows.
        """
        x = queries.detach().to(self._centre) - self._centre
        if not self._sampled:
            return _log_means(x, self._points, self._bandwidth_squared)
        around = self._planes.tables * self._most * x.shape[1]
        rows = max(1, _CHUNK // max(len(self._sample), around))
        return torch.cat([self._log_estimate(block) for block in torch.split(x, rows)])

    def _log_estimate(self, x: Tensor) -> Tensor:
        ids, new = self._codes.around(self._planes.codes(x), self._most)
        squared = (x[:, None] - self._points[ids]).square_().sum(2)
        near = squared / (-2 * self._bandwidth_squared)
        near = _log_sums(near.masked_fill_(~new, -torch.inf))
        far = _log_kernels(x, self._sample, self._bandwidth_squared)
        slot = self._slot[ids]
        row, column = (slot >= 0).nonzero(as_tuple=True)
        far[row, slot[row, column]] = -torch.inf  # counted in N
        m, r = len(self._points), len(self._sample)
        return torch.logaddexp(near, _log_sums(far) + math.log(m / r)) - math.log(m)

    def _draw(self, sample: int, seed: int) -> None:
        """Draw ``S``, and note the place in it of each point, -1 for those outside."""
        generator = torch_stream(seed, "density sample")
        drawn = torch.randperm(len(self._points), generator=generator)[:sample]
        drawn = drawn.to(self._points.device)
        self._sample = self._points[drawn]
        self._slot = drawn.new_full((len(self._points),), -1)
        self._slot[drawn] = torch.arange(sample, device=drawn.device)


def median_bandwidth_squared(
    points: Tensor, generator: torch.Generator, sample: int = 4096
) -> float:
    """Choose the squared bandwidth of a density: a quarter of the median squared distance.

    Args:
        points: ``(m, d)`` with ``m >= 1``.
        generator: CPU generator for the choice of pairs; unused where all pairs are taken.
        sample: Number of pairs drawn, with replacement; all pairs are taken if there are no more.

    Returns:
        A positive number. Where half of the pairs or more coincide, the median of the other
        distances counts, and where all do, the smallest normal float32.

    Raises:
        ConfigurationError: If there are no points.

    Example:
        >>> median_bandwidth_squared(torch.tensor([[0.0], [2.0]]), torch.Generator())
        1.0
    """
    m = len(points)
    if not m:
        raise ConfigurationError("a bandwidth needs at least one point, but got none")
    if m * (m - 1) // 2 <= sample:
        first, second = torch.triu_indices(m, m, offset=1)
    else:
        first = torch.randint(m, (sample,), generator=generator)
        second = (first + torch.randint(1, m, (sample,), generator=generator)) % m
    points = real(points.detach())
    first, second = first.to(points.device), second.to(points.device)
    squared = (points[first] - points[second]).square().sum(1)
    if not len(squared) or not squared.any():
        return torch.finfo(torch.float32).tiny
    median = squared.quantile(0.5) or squared[squared > 0].quantile(0.5)
    return max(float(median) / 4, torch.finfo(torch.float32).tiny)


def _log_means(x: Tensor, points: Tensor, bandwidth_squared: float) -> Tensor:
    """Logarithm of the mean kernel of each row of ``x`` to all points, tile by tile."""
    rows = max(1, min(len(x), math.isqrt(_CHUNK)))
    columns = torch.split(points, max(1, _CHUNK // rows))
    result = []
    for block in torch.split(x, rows):
        tiles = [_log_sums(_log_kernels(block, part, bandwidth_squared)) for part in columns]
        result.append(torch.stack(tiles, dim=1).logsumexp(1) if len(tiles) > 1 else tiles[0])
    return torch.cat(result) - math.log(len(points))


def _log_sums(terms: Tensor) -> Tensor:
    """``terms.logsumexp(1)``, which overwrites the terms: fresh memory costs more than the sums."""
    shift = terms.amax(1).clamp_(min=torch.finfo(terms.dtype).min)  # -inf - -inf would be NaN
    return terms.sub_(shift[:, None]).exp_().sum(1).log_() + shift


def _log_kernels(x: Tensor, points: Tensor, bandwidth_squared: float) -> Tensor:
    """Logarithms of kernels ``(n, c)``, from one product.

    The norms are taken off before the division: divided first, both can overflow, to NaN.
    """
    products = torch.addmm(-points.square().sum(1) / 2, x, points.T)
    products -= x.square().sum(1)[:, None] / 2
    return products.clamp_(max=0).div_(bandwidth_squared)


def _centred(points: Tensor, bandwidth_squared: float) -> tuple[Tensor, Tensor]:
    """Mean of the points, and the points as seen from it; distances lose fewer digits there."""
    if points.dim() != 2 or not len(points) or not bandwidth_squared > 0:
        raise ConfigurationError(
            "a density needs points (m, d) with m >= 1 and a squared bandwidth above 0, but got "
            f"{tuple(points.shape)} and {bandwidth_squared}; see median_bandwidth_squared"
        )
    points = real(points.detach())
    centre = points.mean(0)
    return centre, points - centre


def _bounded(log_density: Tensor) -> Tensor:
    """A mean of kernels is at most 1, and its logarithm must stay finite for whoever ranks it."""
    return log_density.clamp(min=torch.finfo(log_density.dtype).min, max=0)
