import pytest
import torch
from helpers.problems import Net, good
from torch.utils.data import default_collate

from lightning_dvc.capture.cached import CachedProbe
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe, join
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.memory.gradient_cache import GradientCache

WINDOW = 3
DATASET = good(40)


class Counting(Net):
    passes = 0

    def training_step(self, batch, batch_idx):
        self.passes += len(batch[0])
        return super().training_step(batch, batch_idx)


def make(max_bytes=2**20, collate=default_collate, **cache):
    net = Counting().eval()
    probe = Probe(net, resolve_objective(net), collate, batch_size=8)
    return net, CachedProbe(probe, GradientCache(max_bytes, **cache), WINDOW)


def look(cached, ids, snapshots=None):
    return list(cached.capture(DATASET, torch.tensor(ids), snapshots))


def by_id(parts):
    whole = join(parts)
    order = whole.ids.argsort()
    tensors = [whole.ids, whole.labels, whole.losses, whole.confidence, whole.predictive]
    tensors += [whole.fingerprints, *whole.representations]
    for layer in whole.gradients:
        tensors += layer.tensors().values()
    return [tensor[order] for tensor in tensors]


def test_what_is_recalled_is_what_was_captured():
    net, cached = make()
    fresh = by_id(look(cached, range(20)))
    assert net.passes == 20
    recalled = by_id(look(cached, range(20)))
    assert net.passes == 20
    for one, other in zip(recalled, fresh, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
        assert one.dtype == other.dtype


def test_only_what_is_missing_passes_through_the_model():
    net, cached = make()
    look(cached, range(10))
    parts = look(cached, range(5, 15))
    assert net.passes == 15
    assert parts[0].ids.tolist() == [5, 6, 7, 8, 9]
    whole = by_id(parts)
    expected = by_id(look(make()[1], range(5, 15)))
    for one, other in zip(whole, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_states_that_a_sample_was_not_seen_in_are_nan():
    net, cached = make()
    snapshots = Snapshots(window=WINDOW - 1)
    snapshots.push(net)
    (first,) = look(cached, range(3), snapshots)
    assert first.losses.isnan().sum(0).tolist() == [0, 0, 3]
    snapshots.push(net)
    recalled, fresh = look(cached, range(6), snapshots)
    assert recalled.losses.isnan().sum(0).tolist() == [0, 0, 3]
    assert fresh.losses.isnan().sum(0).tolist() == [0, 0, 0]
    assert join([recalled, fresh]).losses.shape == (6, WINDOW)


@pytest.mark.parametrize("max_bytes", [0, 1000])
def test_a_cache_smaller_than_a_batch_changes_nothing(max_bytes):
    net, cached = make(max_bytes)
    for _ in range(2):
        whole = by_id(look(cached, range(20)))
        assert whole[0].tolist() == list(range(20))
    assert net.passes >= 20 + 20 * (max_bytes == 0)


def test_half_precision_is_close():
    _, cached = make(dtype=torch.float16)
    fresh = by_id(look(cached, range(8)))
    for one, other in zip(by_id(look(cached, range(8))), fresh, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-3, equal_nan=True)


class Reader(Counting):
    """Reads sequences of any length."""

    def forward(self, x):
        return self.head(self.body(x).relu()).mean(1)


def test_samples_of_another_shape_are_looked_at_without_the_cache():
    net = Reader().eval()
    probe = Probe(net, resolve_objective(net), default_collate, batch_size=8)
    cached = CachedProbe(probe, GradientCache(2**20), WINDOW)
    short = [(torch.randn(2, 8), torch.tensor(1)) for _ in range(4)]
    long = [(torch.randn(5, 8), torch.tensor(1)) for _ in range(4)]
    for _ in range(2):
        assert len(join(list(cached.capture(short, torch.arange(4))))) == 4
    assert net.passes == 4
    for _ in range(2):
        assert len(join(list(cached.capture(short + long, torch.arange(4, 8))))) == 4
    assert net.passes == 12
