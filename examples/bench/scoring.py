"""Scoring a batch of candidates beside a training step on the same batch."""

from collections.abc import Iterator
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from examples.bench.measure import Calls, Figure, medians
from examples.bench.models import CASES, Case, Model
from lightning_dvc.capture import gradients
from lightning_dvc.capture.cached import CachedProbe
from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.loading import LoadedBatch
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Captured, Probe
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.memory.density import ExactDensity, median_bandwidth_squared
from lightning_dvc.memory.gradient_cache import GradientCache
from lightning_dvc.memory.near_duplicates import N_TABLES, NearDuplicates
from lightning_dvc.metrics.reference import ReferenceGradients
from lightning_dvc.policy.weights import DEFAULT_WEIGHTS, FixedWeights
from lightning_dvc.records import METRICS
from lightning_dvc.strategies.observer import DENSITY_SIZE
from lightning_dvc.strategies.rewards import ArmRewards
from lightning_dvc.strategies.scoring import LayerStandards, Scores, score

_N_SNAPSHOTS = 3
EVERY = frozenset(METRICS)
DEFAULT = FixedWeights(DEFAULT_WEIGHTS).measures
_TARGETS = {"mlp": 1.0, "cnn": 1.3, "transformer": 1.5}


class Bench:
    """A model between two rounds: the standards of one, and a batch of candidates.

    Args:
        case: The model and its samples.
        n_reference: Reference samples, which stand for the selected ones too.
    """

    def __init__(self, case: Case, n_reference: int = 1000) -> None:
        torch.manual_seed(0)
        self.module = Model(case.make())
        self.x, self.y = case.samples(case.batch_size, seed=0)
        self.dataset = TensorDataset(self.x, self.y)
        self.ids = torch.arange(len(self.y))
        objective = resolve_objective(self.module)
        self.probe = Probe(self.module, objective, default_collate, batch_size=case.batch_size)
        again = partial(self.probe.reader.batches, self.dataset)
        self.loaded = LoadedBatch(again, self.ids, [self.x, self.y], [])
        self.snapshots = Snapshots(_N_SNAPSHOTS)
        for _ in range(_N_SNAPSHOTS):
            self.snapshots.push(self.module)
        self._optimizer = torch.optim.Adam(self.module.parameters())
        self._near = NearDuplicates(max_angle=0.1, seed=0)
        self._codes = torch.zeros(case.batch_size, N_TABLES, dtype=torch.int64)
        self.reference = TensorDataset(*case.samples(n_reference, seed=1))
        with undisturbed(self.module):
            self.standards = self._standards()

    def step(self) -> None:
        """Forward, backward, Adam."""
        self._optimizer.zero_grad()
        torch.autograd.backward(self.module.training_step((self.x, self.y), 0))
        self._optimizer.step()

    def score(self, needs: frozenset[str], snapshots: Snapshots | None = None) -> list[Scores]:
        """The metrics of the batch, once it is loaded."""
        with undisturbed(self.module):
            return [self.measure(c, needs) for c in self.probe.look(self.loaded, snapshots)]

    def measure(
        self,
        captured: Captured,
        needs: frozenset[str],
        rewards: ArmRewards | None = None,
        n_sources: int = 1,
    ) -> Scores:
        """What comes after the pass through the model."""
        arms = captured.ids % n_sources
        return score(captured, self.standards, self._codes, arms, needs=needs, rewards=rewards)

    def candidates(self, n_sources: int = 1) -> None:
        """Everything that a run with the defaults does with a batch of candidates.

        Of one source, unless more are asked for: candidates come in the order of their sources.
        """
        rewards = ArmRewards(n_sources, [std.reference.overall for std in self.standards])
        with undisturbed(self.module):
            for captured in self.probe.look(self.loaded):
                self._near.codes(captured.fingerprints)
                self.measure(captured, DEFAULT, rewards, n_sources)

    def calls(self, n_sources: int) -> tuple[int, int]:
        """Calls of torch for candidates, and for a training step, as on an accelerator.

        Parts and batches are larger there, these so of several sources, and Adam's default is to
        move all parameters at once.
        """
        size = gradients._PART_ON_DEVICE
        as_there = patch.multiple(gradients, _PART=size, _PART_PER_THREAD=size)
        with as_there, Calls() as scoring:
            self.candidates(n_sources)
        adam = torch.optim.Adam(self.module.parameters(), foreach=True)
        with patch.object(self, "_optimizer", adam):
            self.step()  # the first makes the optimiser's state
            with Calls() as training:
                self.step()
        return scoring.number, training.number

    def _standards(self) -> list[LayerStandards]:
        seen: list[ReferenceGradients] = []

        def take(captured: Captured) -> None:
            seen.extend(ReferenceGradients() for _ in captured.gradients[len(seen) :])
            for layer, found in zip(seen, captured.gradients, strict=True):
                layer.add(found, captured.labels)

        captured = self.probe.capture_all(self.reference, torch.arange(len(self.reference)), take)
        found = []
        for layer, h in zip(seen, captured.representations, strict=True):
            means, norms, points = layer.means(), h.norm(dim=1), h[:DENSITY_SIZE]
            bandwidth = median_bandwidth_squared(points, torch.Generator().manual_seed(0))
            density = ExactDensity(points, bandwidth)
            median, mad = float(norms.median()), float((norms - norms.median()).abs().median())
            found.append(LayerStandards(median, mad, means, density))
        return found


def figures() -> Iterator[Figure]:
    """Costs of scoring, as multiples of a training step."""
    for name, case in CASES.items():
        bench = Bench(case)
        step, all_six, usual, stable = medians(
            bench.step,
            partial(bench.score, EVERY),
            bench.candidates,
            partial(bench.score, EVERY, bench.snapshots),
        )
        yield Figure(f"score_vs_step_{name}", all_six / step, at_most=_TARGETS[name])
        yield Figure(f"score_snapshots_{name}", (stable - all_six) / step, at_most=1.0)
        yield Figure(f"candidates_vs_step_{name}", usual / step)
        scoring, training = bench.calls(n_sources=6)
        yield Figure(f"calls_vs_step_{name}", scoring / training)
        yield from _cache_hits(name, bench)
        if name == "mlp":
            same = frozenset({"relevance", "gradient_impact"})
            forming = partial(vmapped, bench, class_means(bench))
            formed, ours = medians(forming, partial(bench.score, same), repeats=5)
            yield Figure("vmap_ratio", formed / ours, at_least=30)


def _cache_hits(name: str, bench: Bench) -> Iterator[Figure]:
    """A batch that is known, beside one that is not; reading the samples counts."""

    def run(cached: CachedProbe) -> None:
        with undisturbed(bench.module):
            for captured in cached.capture(bench.dataset, bench.ids):
                bench.measure(captured, DEFAULT)

    known = CachedProbe(bench.probe, GradientCache(2**31), window=1)
    run(known)
    unknown = CachedProbe(bench.probe, GradientCache(0), window=1)
    hit, miss = medians(lambda: run(known), lambda: run(unknown), repeats=5)
    yield Figure(f"cache_hit_speedup_{name}", miss / hit, at_least=5)


def vmapped(bench: Bench, means: list[dict[int, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Per layer, norms and products with the means of the classes, from formed gradients."""
    net = bench.module.net
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(net, parameters, (x[None],))
        return torch.nn.functional.cross_entropy(logits, y[None])

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        parameters, bench.x, bench.y
    )
    found = []
    for number, by_class in enumerate(means):
        weight, bias = grads[f"{2 * number}.weight"], grads[f"{2 * number}.bias"]
        full = torch.cat([weight, bias[:, :, None]], dim=2).flatten(1)
        products = torch.empty(len(full))
        for label, mean in by_class.items():
            products[bench.y == label] = full[bench.y == label] @ mean.flatten()
        found.append((full.norm(dim=1), products))
    return found


def class_means(bench: Bench) -> list[dict[int, Tensor]]:
    """Per layer, the mean reference gradient of each class, formed."""
    everything = torch.arange(len(bench.reference))
    with undisturbed(bench.module):
        parts = list(bench.probe.capture(bench.reference, everything))
    labels = torch.cat([part.labels for part in parts])
    found: list[dict[int, Tensor]] = []
    for number in range(len(bench.standards)):
        found.append({})
        for label, count in enumerate(torch.bincount(labels).tolist()):
            own = [part.gradients[number].rows(part.labels == label) for part in parts]
            found[-1][label] = torch.stack([rows.sum() for rows in own]).sum(0) / count
    return found
