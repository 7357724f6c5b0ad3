import copy
import multiprocessing as mp
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import assert_gradients, per_sample_gradients, predictive_entropy
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import Dataset, default_collate

from lightning_dvc.capture.gradients import OuterProducts, concatenate
from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.layers import find_layers
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe, join, rows
from lightning_dvc.capture.projection import plan_projections
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.capture.trial import LOSSES, differences
from lightning_dvc.errors import BadSampleError, CaptureError, ObjectiveError, UnevenError

WIDTH, CLASSES, SIZE = 4, 3, 12
POISON = 1e6  # a feature that makes Net raise


class Net(LightningModule):
    """Three layers in double precision, one of them not called; raises where it meets poison."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(5, CLASSES)  # defined first, called last
        self.body = nn.Sequential(nn.Linear(WIDTH, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True))
        self.double()

    def forward(self, x):
        if (x == POISON).any():
            raise ValueError("poison")
        return self.head(self.body(x))

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        return F.cross_entropy(self(x), y)


def sample(i, width=WIDTH):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(width, dtype=torch.float64, generator=generator), i % CLASSES


class Samples(Dataset):
    """Sample ``i`` is drawn from seed ``i``; ``features`` replaces some, exceptions are raised."""

    def __init__(self, features=None):
        self.features = features or {}

    def __getitem__(self, i):
        x, y = sample(i)
        odd = self.features.get(i)
        if isinstance(odd, Exception):
            raise odd
        if odd is None:
            return x, y
        return (torch.full_like(x, odd), y) if isinstance(odd, float) else (odd, y)


def make_probe(net=None, collate=default_collate, objective=None, **settings):
    net = net or Net()
    return Probe(net, resolve_objective(net, objective), collate, **{"batch_size": 4, **settings})


def batches(probe, ids=range(SIZE), dataset=None, **settings):
    ids = torch.tensor(list(ids), dtype=torch.int64)
    with undisturbed(probe.module):
        return list(probe.capture(dataset or Samples(), ids, **settings))


def look(probe, ids=range(SIZE), dataset=None, **settings):
    """All batches joined, their gradients as well."""
    return with_gradients(batches(probe, ids, dataset, **settings))


def with_gradients(parts):
    layers = zip(*(part.gradients for part in parts), strict=True)
    return replace(join(parts), gradients=[concatenate(layer) for layer in layers])


def look_at_all(probe, ids=range(SIZE), dataset=None, take=None):
    ids = torch.tensor(list(ids), dtype=torch.int64)
    with undisturbed(probe.module):
        return probe.capture_all(dataset or Samples(), ids, take)


def loss_of_one(net, x, y):
    return F.cross_entropy(net(x), y)


def stacked(ids):
    drawn = [sample(i) for i in ids]
    return torch.stack([x for x, _ in drawn]), torch.tensor([y for _, y in drawn])


def own_losses(net, ids):
    net = copy.deepcopy(net).eval()
    return [loss_of_one(net, *stacked([i])).item() for i in ids]


def assert_captured(captured, net, ids):
    """Everything about the samples ``ids`` in the present state, one by one."""
    ids, net = list(ids), copy.deepcopy(net).eval()
    x, y = stacked(ids)
    assert captured.ids.tolist() == ids
    assert captured.labels.tolist() == y.tolist()
    assert len(captured) == len(ids)
    hidden = net.body(x)
    logits = net.head(hidden)
    # Losses and confidences are kept in single precision.
    torch.testing.assert_close(captured.losses[:, 0], torch.tensor(own_losses(net, ids)))
    true = logits.softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(captured.confidence[:, :1], true.float())
    entropies = torch.tensor([predictive_entropy(z) for z in logits], dtype=torch.float64)
    torch.testing.assert_close(captured.predictive, entropies, rtol=1e-10, atol=1e-10)
    for found, expected in zip(captured.representations, [hidden, logits], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(captured.fingerprints, x)
    slow = per_sample_gradients(net, ["body.0", "head"], loss_of_one, x, y)
    for found, expected in zip(captured.gradients, slow, strict=True):
        assert_gradients(found, expected)


def assert_same(left, right):
    assert torch.equal(left.ids, right.ids)
    assert torch.equal(left.labels, right.labels)
    for name in ("losses", "confidence", "predictive", "fingerprints"):
        torch.testing.assert_close(getattr(left, name), getattr(right, name), equal_nan=True)
    for a, b in zip(left.representations, right.representations, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(left.gradients, right.gradients, strict=True):
        for name, tensor in a.tensors().items():
            torch.testing.assert_close(tensor, b.tensors()[name])


def reasons(probe):
    return {entry.id: entry.reason for entry in probe.bad}


# --- what is captured --------------------------------------------------------------------------


@settings(max_examples=10)
@given(
    ids=st.lists(st.integers(0, 50), min_size=1, max_size=9),
    batch_size=st.integers(1, 10),
)
def test_every_figure_is_the_samples_own_and_in_order(ids, batch_size):
    probe = make_probe(batch_size=batch_size)
    assert_captured(look(probe, ids), probe.module, ids)
    assert probe.bad == []


def test_batches_come_in_order():
    probe = make_probe()
    parts = batches(probe, [7, 3, 11, 0, 5, 9])
    assert [part.ids.tolist() for part in parts] == [[7, 3, 11, 0], [5, 9]]
    for part in parts:
        assert_captured(part, probe.module, part.ids.tolist())


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_worker_processes_give_the_same():
    dataset = Samples({2: OSError("torn"), 5: POISON, 9: torch.nan})
    here, there = make_probe(), make_probe(num_workers=2)
    assert_same(look(there, dataset=dataset), look(here, dataset=dataset))
    assert there.bad == here.bad


def test_what_layers_are_like_keeps_nothing_of_a_batch_in_memory():
    probe = make_probe()
    look(probe)
    tensors = [tensor for layer in probe.like for tensor in layer.tensors().values()]
    assert len(tensors) >= 4
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0


def test_without_gradients():
    probe = make_probe()
    captured = look(probe, gradients=False)
    assert captured.gradients == []
    assert_same(captured, replace(look(probe), gradients=[]))
    assert_same(look_at_all(probe), captured)


def test_each_batch_is_taken_with_its_gradients_and_all_are_joined_without():
    probe, taken = make_probe(), []
    captured = look_at_all(probe, take=taken.append)
    assert [len(part) for part in taken] == [4, 4, 4]
    assert_captured(with_gradients(taken), probe.module, range(SIZE))
    assert_same(captured, replace(look(probe), gradients=[]))


def test_nothing_keeps_a_graph():
    captured = look(make_probe())
    kept = [captured.losses, captured.confidence, captured.predictive, captured.fingerprints]
    kept += captured.representations
    kept += [tensor for layer in captured.gradients for tensor in layer.tensors().values()]
    assert not any(tensor.requires_grad for tensor in kept)


def test_prepare_and_context_are_used():
    seen = []

    class Context:
        def __enter__(self):
            seen.append("in")

        def __exit__(self, *error):
            seen.append("out")

    def prepare(batch):
        seen.append(len(batch[0]))
        return batch[0] + 1, batch[1]

    probe = make_probe(prepare=prepare, context=Context, batch_size=8)
    found = look(probe)
    assert seen == [8, "in", "out", 4, "in", "out"]
    torch.testing.assert_close(found.fingerprints, stacked(range(SIZE))[0] + 1)


def test_regression_has_no_predictive_uncertainty_and_no_labels():
    class Regression(Net):
        def training_step(self, batch, batch_idx=0):
            return F.mse_loss(self(batch[0]), batch[0][:, :CLASSES])

    captured = look(make_probe(Regression()))
    assert captured.predictive.isnan().all()
    assert captured.labels.tolist() == [-1] * SIZE
    torch.testing.assert_close(captured.confidence, -captured.losses)


# --- earlier states ----------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_snapshots_give_the_losses_under_earlier_states(fails):
    net, snapshots, states = Net(), Snapshots(window=2), []
    for seed in range(3):  # the first of three is forgotten
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        net.train()(torch.randn(6, WIDTH, dtype=torch.float64))  # moves running means as well
        snapshots.push(net)
        states.insert(0, copy.deepcopy(net))
    with torch.no_grad():
        net.body[0].weight.mul_(0.3)
    before = copy.deepcopy(net.state_dict())
    dataset = Samples({4: POISON} if fails else {})
    captured = look(make_probe(net), dataset=dataset, snapshots=snapshots)
    ids = [i for i in range(SIZE) if not (fails and i == 4)]
    assert captured.losses.shape == captured.confidence.shape == (len(ids), 3)
    # Gradients, representations and the first column belong to the present state.
    assert_captured(captured, net, ids)
    for age in range(2):
        expected = torch.tensor(own_losses(states[age], ids))
        torch.testing.assert_close(captured.losses[:, 1 + age], expected)
        torch.testing.assert_close(captured.confidence[:, 1 + age], (-expected).exp())
    torch.testing.assert_close(dict(net.state_dict()), dict(before), rtol=0, atol=0)


class Consuming(Net):
    """Takes the label out of its batch, and changes the rest in place."""

    def training_step(self, batch, batch_idx=0):
        (y,) = batch.pop("y")
        return F.cross_entropy(self(batch["x"].mul_(2)), y)


def consumed(samples):
    x, y = default_collate(samples)
    return {"x": x, "y": [y]}


def test_a_step_that_changes_its_batch_gets_it_unchanged_for_each_state():
    net, snapshots = Consuming(), Snapshots(window=2)
    for _ in range(2):
        snapshots.push(net)
    captured = look(make_probe(net, collate=consumed), snapshots=snapshots)
    assert captured.ids.tolist() == list(range(SIZE))
    torch.testing.assert_close(captured.losses, captured.losses[:, :1].expand(-1, 3))


# --- samples set aside -------------------------------------------------------------------------

TROUBLE = {
    "raises when read": (OSError("torn page"), "reading it raised OSError: torn page"),
    "cannot be collated": (object(), "collating it raised TypeError"),
    "poisons the model": (POISON, "the model raised ValueError: poison"),
    "not a number": (torch.nan, "its loss, a feature or a gradient is not finite"),
    "infinite": (torch.inf, "its loss, a feature or a gradient is not finite"),
}


@pytest.mark.parametrize("trouble", TROUBLE)
@pytest.mark.parametrize("place", [[0], [3], [6], [11], [5, 6], [0, 1, 2, 3, 9]])
def test_bad_samples_are_set_aside_and_the_others_unaffected(trouble, place):
    odd, reason = TROUBLE[trouble]
    probe = make_probe()
    captured = look(probe, dataset=Samples(dict.fromkeys(place, odd)))
    assert_captured(captured, probe.module, [i for i in range(SIZE) if i not in place])
    assert sorted(reasons(probe)) == place
    assert all(found.startswith(reason) for found in reasons(probe).values())


def test_all_troubles_at_once():
    odd = {i: what for i, (what, _) in enumerate(TROUBLE.values())}
    probe = make_probe(batch_size=16)
    captured = look(probe, dataset=Samples(odd))
    assert_captured(captured, probe.module, range(len(odd), SIZE))
    for i, (_, reason) in enumerate(TROUBLE.values()):
        assert reasons(probe)[i].startswith(reason)


@pytest.mark.parametrize("trouble", TROUBLE)
def test_bad_sample_can_be_an_error(trouble):
    odd, reason = TROUBLE[trouble]
    probe = make_probe(on_bad_sample="raise")
    expected = rf"sample 6 cannot be scored: {reason}.*on_bad_sample=\"set_aside\""
    with pytest.raises(BadSampleError, match=expected):
        look(probe, dataset=Samples({6: odd}))
    assert_captured(look(probe), probe.module, range(SIZE))  # usable afterwards


def test_sample_of_another_width_is_set_aside():
    odd = torch.zeros(WIDTH + 1, dtype=torch.float64)
    probe = make_probe()
    captured = look(probe, dataset=Samples({2: odd}))
    assert_captured(captured, probe.module, [i for i in range(SIZE) if i != 2])
    assert list(reasons(probe)) == [2]


class NotFinite(Net):
    """Looks at the features only where they are marked, to be not finite at one place alone."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        marked = (x == 7).all(1)
        hidden = self.body(x)
        if self.where == "feature":
            hidden = torch.where(marked[:, None], torch.nan, hidden)
        logits = self.head(hidden)
        if self.where == "feature":  # of the hidden layer only
            logits = torch.where(marked[:, None], 0.0, logits)
        losses = F.cross_entropy(logits, y, reduction="none")
        if self.where == "loss":
            losses = losses * torch.where(marked, torch.inf, 1.0)
        if self.where == "gradient":  # sqrt(0) has an infinite slope
            losses = losses * (1 + (hidden.square().sum(1) * ~marked).sqrt())
        return losses.mean()


@pytest.mark.parametrize("where", ["feature", "loss", "gradient"])
def test_whatever_is_not_finite_sets_a_sample_aside(where):
    probe = make_probe(NotFinite(where))
    captured = look(probe, dataset=Samples({5: 7.0}))
    assert captured.ids.tolist() == [i for i in range(SIZE) if i != 5]
    assert list(reasons(probe)) == [5]
    for layer in captured.gradients:
        assert layer.squared_norms().isfinite().all()


@pytest.mark.parametrize("where", ["feature", "loss"])
def test_what_is_not_finite_is_seen_without_gradients(where):
    probe = make_probe(NotFinite(where))
    captured = look(probe, dataset=Samples({5: 7.0}), gradients=False)
    assert captured.ids.tolist() == [i for i in range(SIZE) if i != 5]
    assert list(reasons(probe)) == [5]


class Product(LightningModule):
    """Its loss is the first feature times a weight that keeps it small, which the norm is not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.layer.weight.fill_(1e-308)

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx=0):
        return F.l1_loss(self(batch[0])[:, 0], torch.zeros(len(batch[0])))


@pytest.mark.parametrize(("first", "kept"), [(1e150, True), (1.2e154, True), (1.5e154, False)])
def test_a_gradient_is_finite_as_long_as_its_squared_norm_is(first, kept):
    # With 1.2e154 the squared norm is 1.4e308; what bounds it, eight times as much, overflows.
    odd = torch.tensor([first, 0, 0, 0], dtype=torch.float64)
    probe = make_probe(Product())
    captured = look(probe, dataset=Samples({5: odd}))
    assert (5 in captured.ids.tolist()) == kept
    assert len(captured) == SIZE - (not kept)
    assert list(reasons(probe)) == [5] * (not kept)


def test_features_are_finite_even_if_their_sum_is_not():
    probe = make_probe(Product())
    captured = look(probe, dataset=Samples({5: 1e308}), gradients=False)
    assert captured.ids.tolist() == list(range(SIZE))
    captured = look(probe, dataset=Samples({5: torch.inf}), gradients=False)
    assert captured.ids.tolist() == [i for i in range(SIZE) if i != 5]


def test_loss_that_was_not_finite_in_an_earlier_state():
    net, snapshots = Net(), Snapshots(window=1)
    with torch.no_grad():
        net.head.weight.mul_(1e30)
        snapshots.push(net)
        net.head.weight.mul_(1e-30)
    # Losses are kept in single precision, which this one leaves in the earlier state alone.
    probe = make_probe(net)
    captured = look(probe, dataset=Samples({1: 1e10}), snapshots=snapshots)
    assert captured.ids.tolist() == [0, *range(2, SIZE)]
    assert reasons(probe) == {1: "its loss, a feature or a gradient is not finite"}
    assert captured.losses.isfinite().all()


def test_no_usable_sample_is_an_error_with_reasons():
    probe = make_probe()
    with pytest.raises(CaptureError, match=r"none of 3 samples .*torn page; .*poison; .*finite"):
        look_at_all(probe, range(3), Samples({0: OSError("torn page"), 1: POISON, 2: torch.nan}))
    with pytest.raises(CaptureError, match=r"poison; samples are scored in eval\(\).*objective="):
        look_at_all(make_probe(batch_size=1), range(1), Samples({0: POISON}))
    with pytest.raises(CaptureError, match=r"none of 0 samples .*no samples were given"):
        look_at_all(make_probe(), [])


class Breaking(Net):
    broken = False

    def forward(self, x):
        if self.broken:
            raise ValueError("out of order")
        return super().forward(x)


def test_a_model_that_breaks_after_a_while_is_not_taken_for_bad_samples():
    probe = make_probe(Breaking())
    look(probe)
    probe.module.broken = True
    with pytest.raises(ValueError, match="out of order"):
        look(probe)
    assert len(probe.bad) <= probe.batch_size


def test_model_that_always_raises_is_not_taken_for_bad_samples():
    class Broken(Net):
        def forward(self, x):
            raise ArithmeticError("never works")

    probe = make_probe(Broken())
    with pytest.raises(ArithmeticError, match="never works"):
        look(probe)
    few = make_probe(Broken(), batch_size=32)
    with pytest.raises(CaptureError, match=r"none of 12 samples .*never works"):
        look_at_all(few)


def test_later_bad_samples_are_many_but_the_model_is_sound():
    probe = make_probe(batch_size=2)
    captured = look(probe, dataset=Samples(dict.fromkeys(range(1, SIZE), POISON)))
    assert captured.ids.tolist() == [0]
    assert sorted(reasons(probe)) == list(range(1, SIZE))


def test_refusals_of_the_library_are_passed_on():
    probe = make_probe(objective=lambda net, batch: (net(batch[0]).sum(), None))
    with pytest.raises(ObjectiveError, match="one float per sample"):
        look(probe)
    assert probe.bad == []


def without_the_odd(samples):
    return default_collate([(x, y) for x, y in samples if x is not None])


class Gaps(Dataset):
    """Some samples are missing."""

    def __init__(self, missing):
        self.missing = missing

    def __getitem__(self, i):
        return (None, i) if i in self.missing else sample(i)


@pytest.mark.parametrize("odd", [[3], [0], [0, 1, 2, 3], [2, 5, 6, 11]])
def test_samples_that_collating_leaves_out_are_set_aside(odd):
    probe = make_probe(collate=without_the_odd)
    captured = look(probe, dataset=Gaps(odd))
    kept = [i for i in range(SIZE) if i not in odd]
    assert_captured(captured, probe.module, kept)
    assert sorted(reasons(probe)) == odd


class Skipping(Net):
    """Returns nothing for a batch whose loss is not finite, so that Lightning skips it."""

    def training_step(self, batch, batch_idx=0):
        loss = super().training_step(batch)
        return loss if loss.isfinite() else None


def test_a_sample_for_which_a_step_skips_its_batch_is_set_aside():
    probe = make_probe(Skipping())
    captured = look(probe, dataset=Samples({5: torch.nan, 6: torch.nan}))
    assert_captured(captured, probe.module, [i for i in range(SIZE) if i not in (5, 6)])
    assert sorted(reasons(probe)) == [5, 6]


class Overwriting(Net):
    """Overwrites what a layer was given, whose weight is frozen, and its batch."""

    def __init__(self):
        super().__init__()
        self.head.weight.requires_grad_(False)

    def training_step(self, batch, batch_idx=0):
        x, y = batch
        hidden = self.body[0](x.mul_(2))
        loss = F.cross_entropy(self.head(hidden), y)
        hidden.zero_()
        return loss


def test_a_batch_that_is_passed_again_is_as_it_was():
    probe = make_probe(Overwriting(), layers=["body.0", "head"])
    net = copy.deepcopy(probe.module).eval()
    x, y = stacked(range(SIZE))
    expected = F.cross_entropy(net.head(net.body[0](2 * x)), y, reduction="none")
    assert "head" not in probe._overwritten
    torch.testing.assert_close(look(probe).losses[:, 0], expected.float())
    assert "head" in probe._overwritten


def test_losses_of_another_number_than_samples_are_refused():
    """Two samples have one loss, and each has one alone: it is not that one is left out."""

    class Halving(Net):
        def training_step(self, batch, batch_idx=0):
            x, y = batch
            half = -(-len(x) // 2)
            return F.cross_entropy(self(x[:half]), y[:half])

    with pytest.raises(UnevenError, match="multiple of 2 losses"):
        look(make_probe(Halving()))


@pytest.mark.parametrize("batch_size", [5, 6, SIZE])
@pytest.mark.parametrize("bad", [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3, 4], [1, 2, 3, 11]])
def test_samples_for_which_batches_are_skipped_may_lie_anywhere(bad, batch_size):
    probe = make_probe(Skipping(), batch_size=batch_size)
    captured = look(probe, dataset=Samples(dict.fromkeys(bad, torch.nan)))
    assert captured.ids.tolist() == [i for i in range(SIZE) if i not in bad]
    assert sorted(reasons(probe)) == bad


def test_a_step_that_skips_every_batch_is_refused():
    probe = make_probe(Skipping(), batch_size=SIZE)
    with pytest.raises(UnevenError, match="returned None"):
        look(probe, dataset=Samples(dict.fromkeys(range(SIZE), torch.nan)))
    assert probe.bad == []


def test_a_loss_that_only_batches_have_is_refused():
    """Of one sample it is 0, which must not be what the step is judged by."""

    class Spreading(Net):
        def training_step(self, batch, batch_idx=0):
            hidden = self.body(batch[0])
            return F.cross_entropy(self.head(hidden), batch[1]) + hidden.var(0, correction=0).sum()

    with pytest.raises(ObjectiveError, match="other means"):
        look(make_probe(Spreading()))


def test_losses_of_one_sample_may_be_squeezed():
    def squeezed(net, batch):
        x, y = batch
        return F.cross_entropy(net(x), y, reduction="none").squeeze(), None

    captured = look(make_probe(objective=squeezed, batch_size=1))
    assert captured.ids.tolist() == list(range(SIZE))


# --- out of memory -----------------------------------------------------------------------------


class Hungry(Net):
    """Runs out of memory on more than so many samples at once.

    Args:
        most: So many.
        where: ``"cuda"``, in words; ``"cpu"``, in fact; or ``"backward"``, in words.
        note: Called with the samples and the hidden features of each pass.
    """

    def __init__(self, most, where, note=lambda x, hidden: None):
        super().__init__()
        self.most, self.where, self.note = most, where, note

    def forward(self, x):
        hidden = self.body(x)
        self.note(x, hidden)
        if len(x) > self.most:
            if self.where == "cpu":
                torch.empty(2**60, dtype=torch.uint8)
            if self.where == "cuda":
                self.fail()
            hidden.register_hook(self.fail)
        if (x == POISON).any():
            raise ValueError("poison")
        return self.head(hidden)

    def fail(self, *_):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("where", ["cuda", "cpu", "backward"])
@pytest.mark.parametrize(("most", "batch_size"), [(1, 8), (3, 8), (5, 11)])
def test_batches_are_halved_until_they_fit(where, most, batch_size):
    sizes = []
    net = Hungry(most, where, lambda x, hidden: sizes.append(len(x)))
    probe = make_probe(net, batch_size=batch_size)
    parts = batches(probe)
    assert [i for part in parts for i in part.ids.tolist()] == list(range(SIZE))
    assert_captured(with_gradients(parts), Net(), range(SIZE))
    assert probe.bad == []
    failed = [size for size in sizes if size > most]
    assert failed[0] == batch_size
    # Each failure halves what is tried at most from then on.
    assert all(2 * later <= sooner for sooner, later in pairwise(failed))
    sizes.clear()
    assert_captured(look(probe), Net(), range(SIZE))
    assert max(sizes) <= most


def test_what_did_not_fit_is_let_go_before_its_halves_are_tried():
    passes, left_over = [], []

    def note(x, hidden):
        left_over.extend(1 for n, earlier in passes if n > 2 and earlier() is not None)
        passes.append((len(x), weakref.ref(hidden)))

    look(make_probe(Hungry(2, "cuda", note), batch_size=8))
    assert [n for n, _ in passes][:4] == [8, 4, 2, 2]
    assert left_over == []


def test_out_of_memory_among_samples_that_fail():
    net = Hungry(2, "cuda")
    probe = make_probe(net, batch_size=8)
    captured = look(probe, dataset=Samples({1: POISON, 6: OSError("torn"), 7: torch.nan}))
    assert_captured(captured, Net(), [0, 2, 3, 4, 5, 8, 9, 10, 11])
    assert sorted(reasons(probe)) == [1, 6, 7]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_halves_are_read_again_by_one_more_set_of_workers():
    probe, dataset = (
        make_probe(Hungry(2, "cuda"), batch_size=8, num_workers=2),
        Samples({5: POISON}),
    )
    before = len(mp.active_children())
    with probe.reader.often(dataset):
        captured = look(probe, dataset=dataset)
        assert len(mp.active_children()) == before + 4
        assert_captured(captured, Net(), [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
        assert list(reasons(probe)) == [5]
        assert len(look(probe, dataset=dataset)) == 11
        assert len(mp.active_children()) == before + 4
    assert len(mp.active_children()) == before


def test_halves_are_collated_anew():
    # So they are padded to the longest of their own.
    lengths = [1, 2, 2, 1, 3, 9, 4, 8, 5, 4]

    class HungryReader(Reader):
        def forward(self, tokens):
            if tokens.shape[:2].numel() > 8:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(tokens)

    probe = make_probe(HungryReader(), collate=pad, batch_size=8)
    with pytest.raises(CaptureError, match="scoring 1 samples at once"):
        look(probe, range(len(lengths)), Sentences(lengths))
    lengths[5] = 8
    probe = make_probe(HungryReader(), collate=pad, batch_size=8)
    captured = look(probe, range(len(lengths)), Sentences(lengths))
    expected = look(make_probe(Reader(), collate=pad), range(len(lengths)), Sentences(lengths))
    assert captured.ids.tolist() == list(range(len(lengths)))
    torch.testing.assert_close(captured.losses, expected.losses)


@pytest.mark.parametrize(
    ("most", "settings", "size"), [(0, {}, 1), (3, {"adapts": False}, 4), (0, {"batch_size": 1}, 1)]
)
def test_what_cannot_be_made_to_fit_is_an_error_with_a_remedy(most, settings, size):
    probe = make_probe(Hungry(most, "cuda"), **settings)
    message = f'scoring {size} samples at once needs more memory.*score_batch_size="auto".*layers='
    with pytest.raises(CaptureError, match=message) as caught:
        look(probe)
    assert "CUDA out of memory" in str(caught.value.__cause__)
    assert probe.bad == []


def test_a_fixed_batch_that_fits_need_not_adapt():
    probe = make_probe(Hungry(4, "cuda"), adapts=False)
    assert_captured(look(probe), Net(), range(SIZE))


# --- layers ------------------------------------------------------------------------------------


def test_layers_are_those_reached_in_the_order_of_the_pass():
    probe = make_probe()
    assert probe.captured_layers == {}
    captured = look(probe, range(3))
    assert list(probe.captured_layers) == ["body.0", "head"]
    assert probe.captured_layers["head"] is probe.module.head
    assert [h.shape[1] for h in captured.representations] == [5, CLASSES]


def test_named_layers_in_the_order_of_the_pass():
    probe = make_probe(layers=["head", "body.0"])
    assert_captured(look(probe), probe.module, range(SIZE))
    assert list(probe.captured_layers) == ["body.0", "head"]
    only = make_probe(layers=["head"])
    assert len(look(only).gradients) == 1


def test_named_layer_that_is_never_reached_is_refused():
    probe = make_probe(layers=["head", "unused"])
    with pytest.raises(CaptureError, match=r"never called the layers \['unused'\].*\['head'\]"):
        look(probe)


def test_model_that_reaches_no_layer_is_refused():
    probe = make_probe(
        objective=lambda net, batch: (net.body[1].weight.sum() * batch[0][:, 0],) * 2
    )
    with pytest.raises(CaptureError, match="never called the layers"):
        look(probe)


def test_name_that_does_not_exist_is_refused_at_once():
    with pytest.raises(CaptureError, match="'tail' does not exist"):
        make_probe(layers=["tail"])


class Branching(Net):
    """Calls another layer, or in another order, where the first sample of a batch says so."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, 5, dtype=torch.float64)

    def forward(self, x):
        if (x[0] == 7).all():
            aside = self.other(x)
            return self.head(self.body(x) + aside)
        return self.head(self.body(x))


def test_layers_must_stay_the_same():
    probe = make_probe(Branching())
    with pytest.raises(CaptureError, match=r"called the layers .* before; name layers"):
        look(probe, dataset=Samples({0: 7.0}))


def test_layers_are_settled_by_the_first_batch():
    probe = make_probe(Branching())
    captured = look(probe, dataset=Samples({4: 7.0}))
    assert list(probe.captured_layers) == ["body.0", "head"]
    assert len(captured.gradients) == 2


def test_naming_the_layers_that_every_batch_calls_helps():
    probe = make_probe(Branching(), layers=["body.0", "head"])
    assert len(look(probe, dataset=Samples({0: 7.0}))) == SIZE


class Positions(Net):
    """Adds an embedding of the features' places, the same for all samples."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(WIDTH, 1, dtype=torch.float64)

    def forward(self, x):
        return super().forward(x + self.positions(torch.arange(WIDTH)).squeeze(1))


def test_a_layer_without_an_output_for_each_sample_is_dropped_with_a_warning():
    probe = make_probe(Positions(), batch_size=5)
    with pytest.warns(UserWarning, match=r"\['positions'\] do not return one output for each") as w:
        captured = look(probe)
    assert sum("positions" in str(entry.message) for entry in w) == 1
    assert list(probe.captured_layers) == list(probe.forms) == ["body.0", "head"]
    assert captured.ids.tolist() == list(range(SIZE))
    x, y = stacked(range(SIZE))
    net = copy.deepcopy(probe.module).eval()
    slow = per_sample_gradients(net, ["body.0", "head"], loss_of_one, x, y)
    for found, expected in zip(captured.gradients, slow, strict=True):
        assert_gradients(found, expected)


@pytest.mark.parametrize("layers", [["positions"], ["head", "positions"]])
def test_a_named_layer_without_an_output_for_each_sample_is_refused(layers):
    probe = make_probe(Positions(), batch_size=5, layers=layers)
    with pytest.raises(CaptureError, match=r"never called the layers \['positions'\] with a batch"):
        look(probe)


def mixed(probe, ids=range(SIZE), dataset=None):
    ids = list(ids)
    seen, again = batches(probe, ids, dataset), batches(probe, ids[::-1], dataset)
    found = zip([LOSSES, *probe.captured_layers], differences(seen, again).tolist(), strict=True)
    return [name for name, difference in found if difference > 0.05]


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12])
def test_layers_that_keep_samples_apart_are_not_suspected(batch_size):
    assert mixed(make_probe(batch_size=batch_size)) == []


@pytest.mark.parametrize("batch_size", [2, 4])
def test_rows_dealt_out_to_the_wrong_samples_are_found(batch_size):
    # Four places can be dealt out to four samples, and to two.
    probe = make_probe(Positions(), batch_size=batch_size)
    assert mixed(probe) == ["positions"]


def test_samples_are_compared_where_both_passes_could_use_them():
    # The gradient of the places is not finite for a whole batch, which is another one each time.
    probe = make_probe(Positions(), batch_size=4)
    dataset = Samples({5: torch.nan})
    assert mixed(probe, range(10), dataset) == ["positions"]
    assert set(reasons(probe)) == {2, 3, 4, 5, 6, 7}
    # Two are left of each pass, and none of them in both.
    assert mixed(probe, range(6), Samples({2: torch.nan})) == []


def test_layers_left_out_are_no_longer_captured():
    probe = make_probe()
    look(probe)
    probe.leave_out(["body.0"])
    for _ in range(2):  # known at once, and the same after the next pass
        assert list(probe.captured_layers) == list(probe.forms) == ["head"]
        assert [like.full_shape for like in probe.like] == [(CLASSES, 6)]
        captured = look(probe)
    x, y = stacked(range(SIZE))
    slow = per_sample_gradients(copy.deepcopy(probe.module).eval(), ["head"], loss_of_one, x, y)
    assert_gradients(captured.gradients[0], slow[0])


def test_forms_are_known_after_gradients_were_taken():
    probe = make_probe()
    assert probe.forms == {}
    look(probe, gradients=False)
    assert probe.forms == {}
    look(probe, dataset=Samples(dict.fromkeys(range(SIZE - 1), torch.nan)))
    assert probe.forms == {"body.0": "factors", "head": "factors"}
    look(probe, gradients=False)
    assert probe.forms == {"body.0": "factors", "head": "factors"}


class Wide(Net):
    def __init__(self):
        super().__init__()
        self.body[0], self.body[1] = nn.Linear(WIDTH, 300), nn.BatchNorm1d(300)
        self.head = nn.Linear(300, CLASSES)
        self.double()


@pytest.mark.parametrize(
    ("exact_numbers", "forms"),
    [
        (2409, {"body.0": "factors", "head": "factors"}),  # 300 * 5, 3 * 301 and the unused 2 * 3
        (2408, {"body.0": "projected", "head": "factors"}),
        (909, {"body.0": "projected", "head": "factors"}),
        (0, {"body.0": "projected", "head": "projected"}),
    ],
)
def test_layers_beyond_the_exact_numbers_are_projected(exact_numbers, forms):
    net = Wide()
    probe = make_probe(net, exact_numbers=exact_numbers)
    captured, exact = look(probe), look(make_probe(net))
    assert probe.forms == forms
    assert_same(replace(captured, gradients=[]), replace(exact, gradients=[]))
    projections = plan_projections(find_layers(net), 0)
    for number, (name, form) in enumerate(forms.items()):
        expected = exact.gradients[number]
        if form == "projected":
            expected = projections[name](expected)
            assert max(expected.full_shape) == 256
        torch.testing.assert_close(
            captured.gradients[number].formed().gradients, expected.formed().gradients
        )


# --- batches of different lengths --------------------------------------------------------------


class Sentences(Dataset):
    """Sample ``i`` has ``lengths[i]`` tokens."""

    def __init__(self, lengths):
        self.lengths = lengths

    def __getitem__(self, i):
        return torch.stack([sample(50 * i + t)[0] for t in range(self.lengths[i])]), i % CLASSES


def pad(samples):
    tokens = nn.utils.rnn.pad_sequence([x for x, _ in samples], batch_first=True)
    return tokens, torch.tensor([y for _, y in samples])


class Reader(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(WIDTH, 3), nn.Linear(3, CLASSES)
        self.double()

    def forward(self, tokens):
        there = (tokens != 0).any(2, keepdim=True)
        return self.head((self.embed(tokens).tanh() * there).sum(1) / there.sum(1))

    def training_step(self, batch, batch_idx=0):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_batches_padded_to_different_lengths_are_joined():
    lengths = [1, 2, 2, 1, 3, 9, 4, 8, 5, 4]
    net, dataset = Reader(), Sentences(lengths)
    probe = make_probe(net, collate=pad, batch_size=4)
    captured = look(probe, range(len(lengths)), dataset)
    tokens, labels = pad([dataset[i] for i in range(len(lengths))])
    slow = per_sample_gradients(net, ["embed", "head"], loss_of_one, tokens, labels)
    for found, expected in zip(captured.gradients, slow, strict=True):
        assert_gradients(found, expected)
    assert probe.bad == []


# --- rows and join -----------------------------------------------------------------------------


@settings(max_examples=8)
@given(
    mask=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE).filter(any),
    cut=st.integers(1, SIZE - 1),
)
def test_rows_and_join(mask, cut):
    net = Net()
    whole = look(make_probe(net))
    keep = torch.tensor(mask)
    assert_captured(rows(whole, keep), net, [i for i in range(SIZE) if mask[i]])
    first = torch.arange(SIZE) < cut
    parts = [rows(whole, ~first), rows(whole, first)]
    assert_captured(with_gradients(parts), net, [*range(cut, SIZE), *range(cut)])
    assert join(parts).gradients == []


def test_join_without_gradients():
    probe = make_probe()
    parts = [look(probe, ids, gradients=False) for ids in ([3, 1], [2])]
    joined = join(parts)
    assert joined.ids.tolist() == [3, 1, 2]
    assert joined.gradients == []
    assert_same(joined, look(probe, [3, 1, 2], gradients=False))


def test_memory_that_ends_when_gradients_are_formed_halves_the_batch_too(monkeypatch):
    whole = OuterProducts.parts

    def parts(self, *args, **kwargs):
        if len(self) > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(OuterProducts, "parts", parts)
    probe = make_probe(batch_size=SIZE)
    assert [len(part) for part in batches(probe, range(SIZE))] == [3, 3, 3, 3]
    assert probe.bad == []
