"""What is remembered from round to round, seen by a real probe on a net that trains in between."""

import copy

import pytest
import torch
from helpers.problems import Net, generator, good, labelled, wrong
from torch.utils.data import Dataset, default_collate

from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe
from lightning_dvc.memory.near_duplicates import NearDuplicates
from lightning_dvc.pools import Pools
from lightning_dvc.records import METRICS
from lightning_dvc.strategies import observer
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.observer import Observer, ObserverSettings
from lightning_dvc.strategies.scoring import Scores

WINDOW = 2  # earlier states
NOTHING = torch.empty(0, dtype=torch.int64)


class Noted(Dataset):
    """Notes which samples are read."""

    def __init__(self, n=30, seed=50):
        self.x, self.y = labelled(n, seed)
        self.read = []

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        self.read.append(int(index))
        return self.x[index], self.y[index]


class Rounds:
    """Rounds that select nothing new."""

    def __init__(self, needs=METRICS, reference=True, **settings):
        self.needs = frozenset(needs)
        self.settings = {
            "reference_size": 100,
            "reservoir_size": 100,
            "review_size": 100,
            "stability_window": WINDOW,
            "duplicate_angle": 0.1,
            "density": "exact",
            "blend": 0,
            "by_class": True,
            "cache_bytes": 0,
            "cache_dtype": None,
            "drift_tolerance": 0.01,
            **settings,
        }
        self.observer, self.net = self.new_observer(), Net()
        self.pools = Pools({"good": good(40), "wrong": wrong(40)})
        self.selected = torch.arange(0, 80, 4)
        self.reference = Noted() if reference else None
        self.number, self.states = 0, []

    def new_observer(self):
        return Observer(self.needs, ObserverSettings(**self.settings))

    def examine(self, reviews=True):
        self.number += 1
        self.states.insert(0, copy.deepcopy(self.net))
        with undisturbed(self.net):
            return self.observer.examine(self.this(), reviews)

    def this(self):
        probe = Probe(self.net, resolve_objective(self.net), default_collate, batch_size=8)
        return Round(
            number=self.number,
            n_rounds=6,
            budget=60,
            oversample=2.0,
            pools=self.pools,
            selected=self.selected,
            probe=probe,
            reference=self.reference,
        )

    def look_at(self, ids):
        """Examine, look at candidates, and go on with a model that has moved."""
        self.examine()
        this = self.this()
        with undisturbed(self.net):
            parts = list(self.observer.candidates(this, ids))
        self.end(this)
        return parts

    def end(self, this=None):
        self.observer.remember(this or self.this(), Scores.empty(2, self.observer.window), NOTHING)
        generator = torch.Generator().manual_seed(self.number)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def plausibility(net, x, y):
    """Probability of the target, one sample at a time."""
    with torch.no_grad():
        return torch.tensor(
            [float(net(a[None]).softmax(1)[0, b]) for a, b in zip(x, y, strict=True)]
        )


def in_states(nets, x, y):
    """What each of the window's states finds, ``(n, WINDOW + 1)``; NaN for those yet to come."""
    found = [plausibility(net, x, y) for net in nets[: WINDOW + 1]]
    return torch.stack(found + [torch.full((len(y),), torch.nan)] * (WINDOW + 1 - len(found)), 1)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("needs", [METRICS, ("quality",)])
@pytest.mark.parametrize("size", [100, 12])
def test_the_reference_is_the_same_in_every_round_and_known_in_all_states(size, needs):
    rounds, drawn = Rounds(needs, reference_size=size), []
    x, y = rounds.reference.x, rounds.reference.y
    for _ in range(5):
        rounds.reference.read.clear()
        examined = rounds.examine()
        drawn.append(rounds.reference.read[:])
        ids = drawn[0]
        assert drawn[-1] == ids
        assert len(set(ids)) == len(ids) == min(size, 30)
        assert examined.labels.tolist() == y[ids].tolist()
        assert_same(examined.reference_confidence, in_states(rounds.states, x[ids], y[ids]))
        rounds.end()


def test_confidence_in_the_selection_is_that_of_each_state():
    rounds = Rounds(reference=False)
    x, y = default_collate([rounds.pools.dataset[int(i)] for i in rounds.selected])
    for _ in range(5):
        examined = rounds.examine()
        expected = in_states(rounds.states, x, y)
        assert_same(examined.selected_confidence, expected)
        # Without a reference the selection stands in for it.
        assert_same(examined.reference_confidence, expected)
        rounds.end()


def test_without_a_review_only_what_is_new_is_looked_at_beside_the_reservoir():
    rounds, sources = Rounds(reservoir_size=3), {"good": Noted(40), "more": Noted(40, seed=60)}
    rounds.pools = Pools(sources)

    def read(reviews):
        for dataset in sources.values():
            dataset.read.clear()
        rounds.examine(reviews)
        rounds.end()
        return set(sources["good"].read) | {40 + i for i in sources["more"].read}

    assert read(reviews=True) == set(rounds.selected.tolist())
    assert len(read(reviews=False)) == 3
    new = torch.tensor([41, 42, 43, 45])
    rounds.selected = torch.cat([rounds.selected, new])
    assert read(reviews=False) >= set(new.tolist())
    assert len(read(reviews=False)) == 3
    assert read(reviews=True) == set(rounds.selected.tolist())


@pytest.mark.parametrize("size", [100, 12])
def test_what_was_seen_of_the_reference_outlives_a_restart(size, tmp_path):
    straight, broken = Rounds(reference_size=size), Rounds(reference_size=size)
    for _ in range(3):
        for rounds in (straight, broken):
            rounds.examine()
            rounds.end()
    torch.save(broken.observer.state_dict(), tmp_path / "state.pt")
    broken.observer = broken.new_observer()
    broken.observer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(3):
        expected, found = straight.examine(), broken.examine()
        for name in ("reference_confidence", "selected_confidence"):
            one, other = (getattr(each, name) for each in (found, expected))
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        for one, other in zip(found.standards, expected.standards, strict=True):
            assert (one.median, one.mad) == (other.median, other.mad)
        for rounds in (straight, broken):
            rounds.end()


def test_candidates_pass_through_earlier_states_only_for_stability():
    ids = torch.arange(1, 80, 8)
    # With a cache an earlier state is kept all the same.
    wanted, spared = Rounds(), Rounds(set(METRICS) - {"stability"}, cache_bytes=2**20)
    for number in range(4):
        parts = wanted.look_at(ids)
        losses = torch.cat([part.losses for part in parts])
        known = min(number, WINDOW) + 1
        assert (~losses.isnan()).sum(1).tolist() == [known] * len(ids)
        x, y = default_collate([wanted.pools.dataset[int(i)] for i in ids])
        for age, net in enumerate(wanted.states[:known]):
            expected = -plausibility(net, x, y).log()
            torch.testing.assert_close(losses[:, age], expected, rtol=1e-4, atol=1e-5)
        losses = torch.cat([part.losses for part in spared.look_at(ids)])
        assert (~losses.isnan()).sum(1).tolist() == [1] * len(ids)


@pytest.mark.parametrize(
    ("needs", "cache_bytes", "kept"),
    [
        (METRICS, 0, WINDOW),
        (METRICS, 2**20, WINDOW),
        (("quality",), 2**20, 1),  # the cache asks how far the model has moved
        (("quality",), 0, 0),
    ],
)
def test_no_more_states_are_kept_than_are_needed(needs, cache_bytes, kept):
    rounds = Rounds(needs, cache_bytes=cache_bytes)
    for _ in range(3):
        rounds.examine()
        rounds.end()
    assert len(rounds.observer.state_dict()["snapshots"]["states"]) == kept


def test_only_what_the_metrics_need_is_prepared():
    for needs in (("quality",), ("diversity",)):
        for std in Rounds(needs).examine().standards:
            assert (std.selected is not None) == ("diversity" in needs)


def test_the_exact_density_is_made_of_points_from_all_over_the_reservoir():
    # A reservoir is in the order of ids, so that its first points are those of the first source.
    points = torch.arange(1000.0)[:, None]
    density = Rounds().observer._density(points, seed=0)
    found = density.log_density(points[[100, 500, 900]])
    assert found.max() - found.min() < 0.5


@pytest.mark.parametrize(("blend", "trust"), [(0, 1.0), (15, 1.0), (16, 30 / 46), (40, 30 / 50)])
def test_a_small_reference_leans_on_the_selection(blend, trust):
    rounds = Rounds(blend=blend)
    n = len(rounds.reference)
    examined = rounds.examine()
    # Each of the 20 selected samples counts as one at most.
    assert rounds.observer.figures["reference_held_out"] == trust
    blended = trust < 1
    assert (len(examined.labels) > n) == blended
    plain = Rounds(blend=0).examine()
    same = torch.equal(plain.gradient[0], examined.gradient[0])
    assert same != blended


@pytest.mark.parametrize(("reference", "blend"), [(True, 0), (True, 100), (False, 0)])
def test_relevance_over_all_compares_no_class_by_itself(reference, blend):
    by_class, over_all = (
        Rounds(reference=reference, blend=blend, by_class=each).examine() for each in (True, False)
    )
    for ours, theirs in zip(by_class.standards, over_all.standards, strict=True):
        assert len(ours.reference.means.norms) > len(theirs.reference.means.norms) == 1
        torch.testing.assert_close(theirs.reference.overall, ours.reference.overall)
    assert torch.equal(by_class.labels, over_all.labels)  # the label mix needs them all the same


@pytest.mark.parametrize("most", [0, 1, 3])
def test_sums_of_no_more_classes_are_kept_than_fit(monkeypatch, most):
    size = sum(gradient.numel() for gradient in Rounds().examine().gradient)
    monkeypatch.setattr(observer, "_SUMS", most * size + size - 1)
    # Of three classes; a blend is made of the sums of two sets, which need not keep the same.
    for standards in Rounds(blend=100).examine().standards:
        n_classes = len(standards.reference.means.norms) - 1
        assert most <= n_classes <= min(2 * most, 3)
    # Without a blend this net's layers, of one position, keep samples in place of sums.
    for standards in Rounds().examine().standards:
        assert len(standards.reference.means.norms) == 4


@pytest.mark.parametrize(
    ("n_alike", "of", "tells"),
    [(0, "selected", True), (6, "selected", True), (7, "selected", False), (7, "held out", False)],
)
def test_repetitions_are_told_while_held_out_samples_are_not_among_them(n_alike, of, tells):
    """Of 30 held-out samples so many are like selected ones, or like each other."""
    rounds = Rounds(duplicate_angle=1e-3)
    pool = torch.cat([source.dataset.tensors[0] for source in rounds.pools.sources.values()])
    rounds.reference.x = 9.0 * torch.randn(30, 8, generator=generator(3))
    of_these = pool[rounds.selected] if of == "selected" else rounds.reference.x[-1:].expand(9, -1)
    rounds.reference.x[:n_alike] = of_these[:n_alike]
    rounds.examine()
    near = rounds.observer._ready[2]
    codes = near.codes(torch.zeros(1, 8))
    known, among = rounds.observer.duplicates(codes)
    assert (known is not None) == (among is not None) == tells


def test_selected_samples_are_not_compared_where_held_out_ones_tell_enough(monkeypatch):
    """Comparing held-out samples of one dimension with many selected ones takes minutes."""
    rounds = Rounds()
    rounds.reference.x = torch.linspace(1, 2, 30)[:, None].expand(30, 8).clone()

    def compare(self, codes):
        raise AssertionError("compared")

    monkeypatch.setattr(NearDuplicates, "known", compare)
    rounds.examine()
    assert rounds.observer.duplicates(torch.zeros(1, 16, dtype=torch.int64)) == (None, None)
