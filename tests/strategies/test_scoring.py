"""Scores and rewards of a real net through a real probe, against one sample at a time."""

import copy
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import oracles
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import Dataset, default_collate

from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.distributed import Group
from lightning_dvc.memory.density import ExactDensity
from lightning_dvc.metrics.reference import ReferenceGradients
from lightning_dvc.records import METRICS
from lightning_dvc.strategies.rewards import ArmRewards
from lightning_dvc.strategies.scoring import LayerStandards, Scores, join_scores, score

KINDS = ["classes", "regression", "gaussian"]
CLASSES, STATES, ARMS = 3, 3, 4
LAYERS = ["first", "second", "body", "head"]  # in the order of the forward pass
SILENT = 5  # every fifth sample counts nothing in the loss, so that its gradient vanishes
CANDIDATES = list(range(24))
# Class 2 has two samples here, which is too few for a mean gradient of its own.
REFERENCE = [101, 102, 103, 104, 106, 107, 108, 109, 112, 111]
SELECTED = list(range(201, 220))
BANDWIDTHS_SQUARED = [0.02, 0.5, 0.3, 0.1]
FIELDS = ["ids", "labels", "layer_metrics", "global_metrics", "confidence", "codes"]


class Net(LightningModule):
    """Two convolutions and two linear layers, the last one defined first and without a bias."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.head = nn.Linear(6, CLASSES, bias=False)
        self.first, self.second = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 2, 2, stride=2)
        self.body = nn.Linear(8, 6)
        self.double()

    def stages(self, x):
        """What comes after each layer."""
        maps = self.first(x).tanh()
        flat = self.second(maps).relu().flatten(1)
        hidden = self.body(flat).tanh()
        return [maps, flat, hidden, self.head(hidden)]

    def losses(self, out, y, target):
        if self.kind == "classes":
            return F.cross_entropy(out, y, reduction="none")
        if self.kind == "regression":
            return F.mse_loss(out, target, reduction="none").mean(1)
        return F.gaussian_nll_loss(out, target, variance(out), reduction="none").mean(1)

    def training_step(self, batch, batch_idx=0):
        x, y, target, share = batch
        return (self.losses(self.stages(x)[-1], y, target) * share).mean()


def variance(out):
    return out.square() + 0.5


def draw(i):
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(1, 6, 6, dtype=torch.float64, generator=generator) * (1 + i % 4)
    target = torch.randn(CLASSES, dtype=torch.float64, generator=generator)
    return x, label(i), target, torch.tensor(float(i % SILENT != 0), dtype=torch.float64)


def label(i):
    return 2 if i in (111, 112) else i % (2 if i > 100 else CLASSES)


class Samples(Dataset):
    def __getitem__(self, i):
        return draw(i)


def moved(net, seed):
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=torch.float64, generator=generator))
    return net


@cache
def states(kind):
    """The present net, then earlier ones, latest first."""
    net = Net(kind)
    return [net, moved(net, 1), moved(net, 2)]


def capture(kind, ids, batch_size=8, **settings):
    """Batches through a new probe."""
    net, *earlier = states(kind)
    snapshots = Snapshots(len(earlier))
    for older in reversed(earlier):
        snapshots.push(older)
    probe = Probe(net, resolve_objective(net), default_collate, batch_size=batch_size, **settings)
    with undisturbed(net):
        parts = list(probe.capture(Samples(), torch.tensor(ids, dtype=torch.int64), snapshots))
    assert probe.bad == []
    return parts


def capture_all(kind, ids):
    (whole,) = capture(kind, ids, batch_size=len(ids))
    return whole


# --- the same, sample by sample ----------------------------------------------------------------


def loss_of_one(net, x, y, target, share):
    return (net.losses(net.stages(x)[-1], y, target) * share).sum()


@cache
def alone(kind, i):
    """One sample by itself: full gradients, representations and losses."""
    batch = default_collate([draw(i)])
    net = states(kind)[0]
    with torch.no_grad():
        maps, flat, hidden, out = (stage[0] for stage in net.stages(batch[0]))
        losses = [loss_of_one(state, *batch).item() for state in states(kind)]
        outs = [state.stages(batch[0])[-1][0] for state in states(kind)]
    pooled = torch.tensor([sum(oracles.numbers(one)) / one.numel() for one in maps])
    predictive = {
        "classes": oracles.predictive_entropy(out),
        "regression": oracles.spread(hidden),
        "gaussian": sum(oracles.numbers(variance(out))) / CLASSES,
    }[kind]
    gradients = oracles.per_sample_gradients(net, LAYERS, loss_of_one, *batch)
    return SimpleNamespace(
        gradients=[layer[0] for layer in gradients],
        hidden=[pooled, flat, hidden, out],
        losses=losses,
        predictive=predictive,
        label=label(i) if kind == "classes" else -1,
        confidence=[
            float(one.softmax(0)[label(i)]) if kind == "classes" else -loss
            for one, loss in zip(outs, losses, strict=True)
        ],
    )


def mean_gradient(kind, ids):
    return [
        oracles.mean([alone(kind, i).gradients[layer] for i in ids]) for layer in range(len(LAYERS))
    ]


@cache
def norms(kind, layer):
    return oracles.median_and_mad([oracles.norm(alone(kind, i).hidden[layer]) for i in REFERENCE])


@cache
def expected(kind, i):
    """The metrics of one sample: three of each layer, and three of the network."""
    own = alone(kind, i)
    labels = [alone(kind, j).label for j in REFERENCE]
    of_layers = [[alone(kind, j).gradients[k] for j in REFERENCE] for k in range(len(LAYERS))]
    in_layers = []
    for layer, (g, h) in enumerate(zip(own.gradients, own.hidden, strict=True)):
        selected = [alone(kind, j).hidden[layer] for j in SELECTED]
        in_layers.append(
            [
                oracles.quality(h, *norms(kind, layer)),
                oracles.relevance(g, own.label, of_layers[layer], labels),
                oracles.diversity(h, selected, BANDWIDTHS_SQUARED[layer]),
            ]
        )
    whole = [
        oracles.gradient_impact(own.gradients, own.label, of_layers, labels),
        oracles.uncertainty(own.predictive, own.hidden),
        oracles.stability(own.losses),
    ]
    return in_layers, whole


@cache
def standards(kind):
    selected = capture_all(kind, SELECTED)
    return [
        LayerStandards(
            *norms(kind, layer),
            means(capture(kind, REFERENCE, batch_size=4), layer),
            ExactDensity(selected.representations[layer], BANDWIDTHS_SQUARED[layer]),
        )
        for layer in range(len(LAYERS))
    ]


def means(parts, layer):
    reference = ReferenceGradients()
    for part in parts:
        reference.add(part.gradients[layer], part.labels)
    return reference.means()


def codes_of(ids):
    return torch.as_tensor(ids)[:, None] * 100 + torch.arange(16)


def measured(part, standards, needs=METRICS, rewards=None, arm_of=None):
    """Scores of a batch, all of one source where nothing else is said."""
    arms = torch.tensor([(arm_of or {}).get(i, 0) for i in part.ids.tolist()])
    rewards = rewards or ArmRewards(ARMS, [std.reference.overall for std in standards])
    codes = codes_of(part.ids)
    return score(part, standards, codes, arms, needs=frozenset(needs), rewards=rewards)


def scored(kind, ids, batch_size=8, needs=METRICS):
    return [measured(part, standards(kind), needs) for part in capture(kind, ids, batch_size)]


def close(found, expected):
    """What was computed in double precision and rounded to single, losses before the end."""
    assert found.dtype == torch.float32
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def assert_scores(found, kind, ids):
    assert len(found) == len(ids)
    assert found.ids.tolist() == ids
    assert found.labels.tolist() == [alone(kind, i).label for i in ids]
    assert torch.equal(found.codes, codes_of(ids))
    close(found.layer_metrics, [expected(kind, i)[0] for i in ids])
    close(found.global_metrics, [expected(kind, i)[1] for i in ids])
    close(found.confidence, [alone(kind, i).confidence for i in ids])


def assert_same(left, right):
    for name in FIELDS:
        ours, theirs = getattr(left, name), getattr(right, name)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=name)


# --- scores ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_six_metrics_of_every_sample_and_layer(kind):
    assert_scores(join_scores(scored(kind, CANDIDATES)), kind, CANDIDATES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_samples_are_unlike_enough_to_tell_a_mistake(kind):
    in_layers, whole = (
        torch.tensor([expected(kind, i)[part] for i in CANDIDATES]) for part in (0, 1)
    )
    known = in_layers.isfinite().all(2).all(1)
    assert (in_layers[known].std(0) > 1e-2).all()
    assert (whole[known].std(0) > 1e-3).all()
    # Layers differ, and what vanishes is worth nothing.
    assert (in_layers[known, 1:] - in_layers[known, :-1]).abs().amax(0).min() > 1e-2
    silent = torch.tensor(CANDIDATES) % SILENT == 0
    assert not in_layers[silent, :, 1].nan_to_num().any()
    assert not whole[silent, 0].nan_to_num().any()


@settings(max_examples=15)
@given(
    ids=st.lists(st.sampled_from(CANDIDATES), min_size=1, max_size=8, unique=True),
    batch_size=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
)
def test_a_score_is_the_samples_own_whatever_its_batch(ids, batch_size, kind):
    parts = scored(kind, ids, batch_size)
    assert [len(part) for part in parts] == [
        len(ids[start : start + batch_size]) for start in range(0, len(ids), batch_size)
    ]
    assert_scores(join_scores(parts), kind, ids)


def test_of_labels_that_the_reference_lacks_relevance_and_impact_are_not_known_and_rank_half():
    lacking = [label(i) == 2 for i in CANDIDATES]
    assert 0 < sum(lacking) < len(CANDIDATES)
    scores = join_scores(scored("classes", CANDIDATES))
    unknown = scores.layer_metrics[:, :, 1].isnan()
    assert torch.equal(unknown, torch.tensor(lacking)[:, None].expand_as(unknown))
    assert scores.global_metrics[:, 0].isnan().tolist() == lacking
    for metric in ("relevance", "gradient_impact"):
        only = torch.tensor([float(name == metric) for name in METRICS])
        values = scores.values(only, torch.full((len(LAYERS),), 1 / len(LAYERS)))
        assert (values[torch.tensor(lacking)] == 0.5).all()
        assert values[~torch.tensor(lacking)].mean() == pytest.approx(0.5)


def test_standards_for_another_number_of_layers_are_refused():
    (part,) = capture("classes", [1, 2])
    with pytest.raises(ValueError, match="shorter"):
        measured(part, standards("classes")[:3])


def test_scores_keep_no_graph():
    (found,) = scored("classes", [1, 2])
    assert not any(getattr(found, name).requires_grad for name in FIELDS)


def without(standards, needs):
    """What a round prepares that does not need some of the metrics."""
    return standards if "diversity" in needs else [replace(s, selected=None) for s in standards]


def columns(scores):
    """Each metric by name, in every layer where it has one for each."""
    in_layers = dict(zip(METRICS[:3], scores.layer_metrics.unbind(2), strict=True))
    return {**in_layers, **dict(zip(METRICS[3:], scores.global_metrics.unbind(1), strict=True))}


@settings(max_examples=25)
@given(
    needs=st.sets(st.sampled_from(METRICS), min_size=1),
    w=st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
    kind=st.sampled_from(KINDS),
)
def test_metrics_that_are_not_needed_are_not_a_number_and_change_no_value(needs, w, kind):
    prepared, parts = without(standards(kind), needs), capture(kind, CANDIDATES)
    found = join_scores([measured(part, prepared, needs) for part in parts])
    full = join_scores(scored(kind, CANDIDATES))
    for name, column in columns(found).items():
        if name in needs:
            assert torch.equal(column.nan_to_num(), columns(full)[name].nan_to_num()), name
        else:
            assert column.isnan().all(), name
    for name in ("ids", "labels", "confidence", "codes"):
        assert torch.equal(getattr(found, name), getattr(full, name))
    raw_is_known = found.raw().isfinite().any(0).tolist()
    assert raw_is_known == [name in needs for name in METRICS]
    weights = torch.tensor(
        [x if name in needs else 0.0 for name, x in zip(METRICS, w, strict=True)]
    )
    weights, alpha = weights / weights.sum(), torch.tensor([0.1, 0.2, 0.3, 0.4])
    assert torch.equal(found.values(weights, alpha), full.values(weights, alpha))


class Large(Net):
    """A layer with several positions, a few of whose gradients are asked at a time."""

    def __init__(self, kind):
        super().__init__(kind)
        self.second, self.body = nn.Linear(12, 300), nn.Linear(300, 300)
        self.head = nn.Linear(300, CLASSES)
        self.double()

    def stages(self, x):
        maps = self.first(x).tanh()
        hidden = self.second(maps.reshape(len(x), -1, 12)).tanh()
        more = self.body(hidden).tanh().mean(1)
        return [maps, hidden, more, self.head(more)]


def test_a_batch_is_asked_in_parts_as_if_each_sample_came_alone():
    net = Large("classes")
    assert 2 * net.body.weight.numel() < 2**18 < 4 * net.body.weight.numel()
    whole, single = (
        Probe(net, resolve_objective(net), default_collate, batch_size=size) for size in (9, 1)
    )
    with undisturbed(net):
        parts = [list(probe.capture(Samples(), torch.arange(9))) for probe in (whole, single)]
    prepared = [
        LayerStandards(1.0, 0.5, mean, ExactDensity(h, 0.5))
        for h, mean in zip(
            parts[0][0].representations, [means(parts[0], k) for k in range(4)], strict=True
        )
    ]
    found, earned = [], []
    for batches in parts:
        rewards = ArmRewards(ARMS, [std.reference.overall for std in prepared])
        arm_of = {i: i % 3 for i in range(9)}
        scores = [measured(part, prepared, METRICS, rewards, arm_of) for part in batches]
        found.append(join_scores(scores))
        earned.append(rewards.rewards(Group()))
    for name in FIELDS:
        one, other = (getattr(scores, name) for scores in found)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*earned, rtol=1e-10, atol=0, equal_nan=True)


def test_rewards_need_no_metric():
    reference, ids = mean_gradient("classes", REFERENCE), list(ARM_OF)
    rewards = ArmRewards(ARMS, reference)
    for part in capture("classes", ids, batch_size=3):
        measured(part, without(standards("classes"), ()), (), rewards, ARM_OF)
    found = rewards.rewards(Group())
    assert_rewards(found, slow_rewards("classes", ids, ARM_OF.values(), reference))


def test_projected_layers_score_finitely_and_about_the_same():
    net = Wide("classes")
    parts = []
    for exact_numbers in (2**23, 0):
        probe = Probe(net, resolve_objective(net), default_collate, exact_numbers=exact_numbers)
        with undisturbed(net):
            (whole,) = probe.capture(Samples(), torch.arange(60))
        parts.append(whole)
    assert [probe.forms[name] for name in ("body", "head")] == ["projected", "projected"]
    found = []
    for whole in parts:
        prepared = [
            LayerStandards(1.0, 0.5, mean, ExactDensity(h, 0.5))
            for h, mean in zip(
                whole.representations, [means([whole], k) for k in range(4)], strict=True
            )
        ]
        found.append(measured(whole, prepared))
    exact, projected = found
    assert projected.layer_metrics.isfinite().all()
    assert projected.global_metrics.isfinite().all()
    for layer, bound in enumerate([1e-6, 1e-6, 0.25, 0.25]):
        error = (projected.layer_metrics - exact.layer_metrics)[:, layer, 1].abs().max()
        assert error < bound
    assert (projected.layer_metrics - exact.layer_metrics)[:, 2, 1].abs().max() > 1e-4
    for name in ("quality", "diversity", "uncertainty", "stability"):
        torch.testing.assert_close(columns(projected)[name], columns(exact)[name])


class Wide(Net):
    def __init__(self, kind):
        super().__init__(kind)
        self.body = nn.Linear(8, 400)
        self.head = nn.Linear(400, CLASSES, bias=False)
        self.double()


# --- scores as a record ------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(st.integers(0, len(CANDIDATES) - 1), max_size=6))
def test_rows_by_position(positions):
    whole = join_scores(scored("classes", CANDIDATES))
    found = whole.rows(torch.tensor(positions, dtype=torch.int64))
    if positions:
        assert_scores(found, "classes", [CANDIDATES[at] for at in positions])
    assert len(found) == len(positions)


def test_rows_by_mask():
    ids = [4, 9, 2, 7]
    (whole,) = scored("classes", ids)
    found = whole.rows(torch.tensor([False, True, True, False]))
    assert_scores(found, "classes", [9, 2])
    assert len(whole.rows(torch.zeros(4, dtype=torch.bool))) == 0


def test_no_scores_change_nothing():
    none = Scores.empty(len(LAYERS), STATES)
    parts = scored("classes", [4, 9, 2], batch_size=2)
    whole = join_scores(parts)
    assert_same(join_scores([none, parts[0], none, parts[1]]), whole)
    assert len(none) == 0
    for name in FIELDS:
        ours, theirs = getattr(none, name), getattr(whole, name)
        assert ours.dtype == theirs.dtype
        assert ours.shape[1:] == theirs.shape[1:]
    assert_same(join_scores([none, none]), none)
    assert none.raw().shape == (0, 6)


def test_raw_metrics_average_the_layers():
    ids = [4, 9, 2]
    found = join_scores(scored("classes", ids)).raw()
    rows = []
    for i in ids:
        in_layers, whole = expected("classes", i)
        rows.append([sum(column) / len(LAYERS) for column in zip(*in_layers, strict=True)] + whole)
    close(found, rows)


def test_one_process_gathers_by_id():
    found = join_scores(scored("classes", [9, 4, 7, 2])).gather(Group(), torch.device("cpu"))
    assert_scores(found, "classes", [2, 4, 7, 9])


@settings(max_examples=20)
@given(
    ids=st.lists(st.sampled_from(CANDIDATES), min_size=1, max_size=10, unique=True),
    w=st.lists(st.floats(0.01, 1), min_size=6, max_size=6),
    alpha=st.lists(st.floats(0.01, 1), min_size=len(LAYERS), max_size=len(LAYERS)),
)
def test_values_rank_and_add_up(ids, w, alpha):
    w, alpha = [x / sum(w) for x in w], [x / sum(alpha) for x in alpha]
    scores = join_scores(scored("classes", ids))
    found = scores.values(torch.tensor(w).double(), torch.tensor(alpha).double())
    # Ranks of the rounded figures: rounding may make, but must not break, a tie.
    in_layers, whole = scores.layer_metrics.tolist(), scores.global_metrics.tolist()
    ranks = [
        [oracles.rank_normalise([row[layer][k] for row in in_layers]) for k in range(3)]
        for layer in range(len(LAYERS))
    ]
    last = [oracles.rank_normalise([row[k] for row in whole]) for k in range(3)]
    slow = [
        oracles.dvc_value(
            [[ranks[layer][k][n] for k in range(3)] for layer in range(len(LAYERS))],
            [last[k][n] for k in range(3)],
            w,
            alpha,
        )
        for n in range(len(ids))
    ]
    close(found, slow)


def test_values_of_no_scores():
    # A round may draw candidates of which not one can be scored.
    none = Scores.empty(len(LAYERS), STATES)
    assert none.values(torch.full((6,), 1 / 6), torch.full((4,), 0.25)).shape == (0,)


# --- rewards -----------------------------------------------------------------------------------


def flat_inner(a, b):
    """Over all layers together."""
    return math.fsum(oracles.inner(x, y) for x, y in zip(a, b, strict=True))


def slow_rewards(kind, ids, arms, reference):
    found = []
    for arm in range(ARMS):
        mine = [i for i, at in zip(ids, arms, strict=True) if at == arm]
        if not mine:
            found.append(math.nan)
            continue
        target = mean_gradient(kind, mine)
        lengths = math.sqrt(flat_inner(target, target) * flat_inner(reference, reference))
        cosine = flat_inner(target, reference) / lengths if lengths else 0.0
        found.append((1 + cosine) / 2)
    return found


def rewards_of(kind, ids, arms, reference, batch_size=8):
    rewards, arm_of = ArmRewards(ARMS, reference), dict(zip(ids, arms, strict=True))
    for part in capture(kind, ids, batch_size):
        measured(part, standards(kind), (), rewards, arm_of)
    return rewards.rewards(Group())


def assert_rewards(found, slow):
    expected = torch.tensor(slow, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, equal_nan=True)


@settings(max_examples=25)
@given(
    arm_of=st.dictionaries(
        st.sampled_from(CANDIDATES), st.integers(0, ARMS - 1), min_size=1, max_size=12
    ),
    batch_size=st.integers(1, 13),
    kind=st.sampled_from(KINDS),
)
def test_rewards_however_the_candidates_are_batched(arm_of, batch_size, kind):
    ids, arms = list(arm_of), list(arm_of.values())
    reference = mean_gradient(kind, REFERENCE)
    found = rewards_of(kind, ids, arms, reference, batch_size)
    assert_rewards(found, slow_rewards(kind, ids, arms, reference))
    known = found[~found.isnan()]
    assert ((known >= 0) & (known <= 1)).all()


def test_arms_without_candidates_are_not_a_number():
    reference = mean_gradient("classes", REFERENCE)
    assert ArmRewards(ARMS, reference).rewards(Group()).isnan().all()
    found = rewards_of("classes", [1, 2, 3], [2, 0, 2], reference)
    assert found.isnan().tolist() == [False, True, False, True]
    assert found.dtype == torch.float64


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_rewards_are_a_half_where_a_gradient_vanishes(batch_size):
    silent, others = [0, 5, 10], [1, 2, 3]
    ids, arms = [0, 1, 5, 2, 10, 3], [1, 0, 1, 0, 1, 3]
    reference = mean_gradient("classes", REFERENCE)
    found = rewards_of("classes", ids, arms, reference, batch_size)
    assert all(oracles.norm(g) == 0 for i in silent for g in alone("classes", i).gradients)
    assert found[1] == 0.5
    assert_rewards(found, slow_rewards("classes", ids, arms, reference))
    nothing = [torch.zeros_like(full) for full in reference]
    found = rewards_of("classes", others, [0, 1, 1], nothing, batch_size)
    assert_rewards(found, [0.5, 0.5, math.nan, math.nan])


def test_rewards_reach_both_ends():
    ids = [1, 2, 3]
    own = mean_gradient("classes", ids)
    against = [-7 * full for full in own]
    assert_rewards(rewards_of("classes", ids, [0, 0, 0], own), [1.0, *[math.nan] * 3])
    assert_rewards(rewards_of("classes", ids, [0, 0, 0], against), [0.0, *[math.nan] * 3])


def test_single_precision_reference():
    ids, arms = [1, 2, 3, 4], [0, 1, 1, 2]
    reference = mean_gradient("classes", REFERENCE)
    found = rewards_of("classes", ids, arms, [full.float() for full in reference])
    slow = torch.tensor(slow_rewards("classes", ids, arms, reference), dtype=torch.float64)
    torch.testing.assert_close(found, slow, rtol=0, atol=1e-6, equal_nan=True)


# --- several processes -------------------------------------------------------------------------

SHARES = [[21, 3, 8, 1, 6], [2, 17]]
ARM_OF = {21: 0, 3: 0, 8: 1, 1: 1, 6: 0, 2: 1, 17: 2}  # arm 2 in one process, arm 3 in none


def _work(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(SHARES)
    )
    group = Group(rank, len(SHARES))
    rewards = ArmRewards(ARMS, mean_gradient("classes", REFERENCE))
    parts = [Scores.empty(len(LAYERS), STATES)]
    for part in capture("classes", SHARES[rank], batch_size=3):
        parts.append(measured(part, standards("classes"), METRICS, rewards, ARM_OF))
    gathered = join_scores(parts).gather(group, torch.device("cpu"))
    fields = {name: getattr(gathered, name).tolist() for name in FIELDS}
    queue.put((fields, rewards.rewards(group).tolist()))
    torch.distributed.destroy_process_group()


def test_processes_gather_scores_and_rewards(unused_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_work, args=(unused_port, queue), nprocs=len(SHARES))
    ids = list(ARM_OF)
    reference = mean_gradient("classes", REFERENCE)
    for _ in SHARES:
        fields, rewards = queue.get()
        found = Scores(**{name: torch.tensor(rows) for name, rows in fields.items()})
        assert_scores(found, "classes", sorted(ids))
        assert_rewards(
            torch.tensor(rewards, dtype=torch.float64),
            slow_rewards("classes", ids, ARM_OF.values(), reference),
        )
