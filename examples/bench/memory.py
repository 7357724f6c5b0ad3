"""The cache, and the density of very many points."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.bench.measure import Figure, medians
from examples.datasets import mnist
from lightning_dvc.memory.density import ExactDensity, LSHDensity, median_bandwidth_squared
from lightning_dvc.memory.gradient_cache import GradientCache

_N_POINTS, _N_QUERIES, _WIDTH = 200_000, 4_096, 128
_NEIGHBOURS = 32


def cache_figures() -> Iterator[Figure]:
    """How many rows of 64 floats the gradient cache hands out in a second."""
    n_rows, batch, calls = 200_000, 4_096, 20
    generator = torch.Generator().manual_seed(0)
    cache = GradientCache(2**30)
    ids = torch.randperm(10 * n_rows, generator=generator)[:n_rows]
    cache.put(ids, {"a": torch.randn(n_rows, 64, generator=generator)})
    wanted = [ids[torch.randint(n_rows, (batch,), generator=generator)] for _ in range(calls)]
    (seconds,) = medians(lambda: [cache.get(some) for some in wanted])
    yield Figure("cache_rows_per_s", calls * batch / seconds, "rows/s", at_least=1e6)


def density_figures(folder: Path | None) -> Iterator[Figure]:
    """Exact and hashed density of the representations of a trained network, and FAISS."""
    points, queries = representations(folder)
    bandwidth = median_bandwidth_squared(points, torch.Generator().manual_seed(0))
    exact, hashed = ExactDensity(points, bandwidth), LSHDensity(points, bandwidth)
    true = exact.log_density(queries)
    slow, fast = medians(
        lambda: exact.log_density(queries), lambda: hashed.log_density(queries), repeats=5
    )
    yield Figure("lsh_speedup", slow / fast, at_least=10)
    yield Figure("lsh_log_density_error", _error(hashed.log_density(queries), true), at_most=0.05)
    try:
        neighbours = FaissDensity(points, bandwidth)
    except ImportError:
        return
    slow, fast = medians(
        lambda: exact.log_density(queries), lambda: neighbours.log_density(queries), repeats=5
    )
    yield Figure("faiss_speedup", slow / fast)
    yield Figure("faiss_log_density_error", _error(neighbours.log_density(queries), true))


def _error(found: Tensor, true: Tensor) -> float:
    return float(((found - true) / true).abs().median())


class FaissDensity:
    """The near part of a density from FAISS's inverted lists, the far part from a sample.

    Args:
        points: ``(m, d)``.
        bandwidth_squared: Squared bandwidth.
        sample: Points that stand for the far ones.

    Raises:
        ImportError: Without FAISS.
    """

    def __init__(self, points: Tensor, bandwidth_squared: float, sample: int = 2048) -> None:
        import faiss

        lists = int(len(points) ** 0.5)
        quantiser = faiss.IndexFlatL2(points.shape[1])
        self._index = faiss.IndexIVFFlat(quantiser, points.shape[1], lists)
        self._index.train(points[:: max(1, len(points) // (40 * lists))].numpy())
        self._index.add(points.numpy())
        self._index.nprobe = 8
        self._n = len(points)
        generator = torch.Generator().manual_seed(0)
        self._drawn = torch.randperm(self._n, generator=generator)[:sample]
        self._sample = points[self._drawn]
        self._double = 2 * bandwidth_squared

    def log_density(self, queries: Tensor) -> Tensor:
        """As :class:`lightning_dvc.memory.density.LSHDensity` estimates it."""
        squared, found = (
            torch.from_numpy(x) for x in self._index.search(queries.numpy(), _NEIGHBOURS)
        )
        near = torch.where(found >= 0, squared / -self._double, -torch.inf)
        far = torch.cdist(queries, self._sample).square() / -self._double
        # What is farther than the farthest neighbour found is not among them.
        reach = torch.where(found >= 0, squared, 0).amax(1, keepdim=True)
        far = far.masked_fill(far * -self._double <= reach * (1 + 1e-5), -torch.inf)
        weight = torch.log(torch.tensor(self._n / len(self._drawn)))
        total = torch.logsumexp(torch.cat([near, far + weight], dim=1), 1)
        return total - torch.log(torch.tensor(float(self._n)))


def representations(folder: Path | None) -> tuple[Tensor, Tensor]:
    """What the last hidden layer of an MLP trained on MNIST makes of shifted images.

    Returns:
        ``(200_000, 128)`` points of the training images, each shifted by up to a pixel, and
        ``(4_096, 128)`` queries of the test images.
    """
    data = mnist(folder)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    x, y = data.features[: data.n_train], data.labels[: data.n_train]
    for batch in torch.split(torch.randperm(len(x)), 128):
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(net(x[batch]), y[batch]))
        optimizer.step()
    images = x.view(-1, 28, 28)
    shifts = [(0, 0), (0, 1), (1, 0), (0, -1)]
    shifted = [images.roll(shift, (1, 2)).flatten(1) for shift in shifts]
    with torch.no_grad():
        points = torch.cat([net[:4](part) for part in shifted])[:_N_POINTS]
        queries = net[:4](data.features[data.n_train :][:_N_QUERIES])
    return points, queries
