from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import Net, good
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import default_collate

from lightning_dvc.capture.cached import CachedProbe
from lightning_dvc.capture.gradients import concatenate
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe, join
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.distributed import Group
from lightning_dvc.memory.density import ExactDensity
from lightning_dvc.memory.gradient_cache import GradientCache
from lightning_dvc.metrics.reference import ReferenceGradients
from lightning_dvc.records import METRICS
from lightning_dvc.strategies.rewards import ArmRewards
from lightning_dvc.strategies.scoring import LayerStandards, join_scores, score

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


def look(cached, ids, snapshots=None, **settings):
    return list(cached.capture(DATASET, torch.tensor(ids), snapshots, **settings))


def by_id(parts):
    layers = zip(*(part.gradients for part in parts), strict=True)
    whole = replace(join(parts), gradients=[concatenate(layer) for layer in layers])
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


def test_what_is_not_to_be_kept_is_looked_at_again():
    net, cached = make()
    fresh = by_id(look(cached, range(10), keep=False))
    again = by_id(look(cached, range(10)))
    assert net.passes == 20
    recalled = by_id(look(cached, range(10), keep=False))  # what was kept is recalled all the same
    assert net.passes == 20
    for one, other, third in zip(fresh, again, recalled, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
        torch.testing.assert_close(one, third, equal_nan=True)


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


class EveryKind(LightningModule):
    """Layers whose gradients are kept in every form, two of them too large but for projection."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(9, 4), nn.LayerNorm(4)
        self.conv, self.mix = nn.Conv1d(4, 3, 2), nn.Linear(3, 300)
        self.out = nn.Linear(300, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        found = self.conv(self.norm(self.words(tokens)).transpose(1, 2)).tanh()
        return self.head(self.out(self.mix(found.transpose(1, 2)).tanh().mean(1)).tanh())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


FORMS = {
    "words": "scattered over tokens",
    "norm": "formed",
    "conv": "patches, formed in parts",
    "mix": "projected",
    "out": "projected",
    "head": "factors",
}
SENTENCES = [((torch.arange(6) * (i + 3) + i) % 9, torch.tensor(i % 3)) for i in range(24)]


def standards_of(parts):
    """What to measure against, taken from the samples themselves."""
    found = []
    for number, h in enumerate(join(parts).representations):
        reference = ReferenceGradients()
        for part in parts:
            reference.add(part.gradients[number], part.labels)
        found.append(LayerStandards(1.0, 0.5, reference.means(), ExactDensity(h, 0.3)))
    return found


def scores_and_rewards(parts, standards):
    rewards, found = ArmRewards(2, [std.reference.overall for std in standards]), []
    for part in parts:
        codes, arms = part.ids[:, None].expand(-1, 16), part.ids % 2
        found.append(score(part, standards, codes, arms, needs=set(METRICS), rewards=rewards))
    whole = join_scores(found)
    return whole.rows(whole.ids.argsort()), rewards.rewards(Group())


def test_recalled_gradients_of_every_form_score_like_fresh_ones():
    net = EveryKind().eval()
    settings = {"layers": list(FORMS), "batch_size": 8, "exact_numbers": 200}
    probe = Probe(net, resolve_objective(net), default_collate, **settings)
    cached = CachedProbe(probe, GradientCache(2**26), WINDOW)
    snapshots = Snapshots(1)
    snapshots.push(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    ids = torch.arange(20)
    fresh = list(cached.capture(SENTENCES, ids, snapshots))
    # A few more, so that recalled and fresh samples come one after the other.
    recalled = list(cached.capture(SENTENCES, torch.arange(24), snapshots))
    assert [len(part) for part in recalled] == [8, 8, 4, 4]
    assert probe.forms == FORMS
    standards = standards_of(fresh)
    expected, expected_rewards = scores_and_rewards(fresh, standards)
    found, _ = scores_and_rewards(recalled, standards)
    _, rewards = scores_and_rewards(recalled[:3], standards)
    for name in ("labels", "layer_metrics", "global_metrics", "confidence", "codes"):
        one, other = getattr(found, name)[:20], getattr(expected, name)
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert found.layer_metrics.isfinite().all()
    assert found.global_metrics.isfinite().all()
    assert (found.layer_metrics[:, :, 1].std(0) > 1e-3).all()
    torch.testing.assert_close(rewards, expected_rewards, rtol=1e-5, atol=0)
