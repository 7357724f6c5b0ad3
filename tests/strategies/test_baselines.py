"""What all baselines have in common, with a real probe and in real fits."""

import itertools

import pytest
import torch
from helpers.baselines import every
from helpers.problems import Faulty, Net, good, repeated, trainer, wrong
from helpers.rounds import BUDGET, ROUNDS, Run
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Dataset

from lightning_dvc import (
    CoreSet,
    DataEfficient,
    DVCCallback,
    DVCDataModule,
    GradientMatching,
    Influence,
    MetaLearning,
    Source,
    Uncertainty,
)
from lightning_dvc.errors import CaptureError, ConfigurationError
from lightning_dvc.strategies.baseline import blocks, by_turns, look_at_reference


@every
@pytest.mark.parametrize("reference", [True, False])
def test_rounds_fill_the_budget_with_different_samples(baseline, reference):
    run = Run(baseline(), reference=reference)
    choices = run.all()
    assert len(run.selected.unique()) == len(run.selected) == BUDGET
    for choice in choices:
        assert (choice.values.diff() <= 0).all()
        assert choice.values.isfinite().all()
        assert choice.figures["candidates"] >= len(choice.add)


@every
def test_equal_runs_choose_equally(baseline):
    assert torch.equal(*(Run(baseline()).round().add for _ in range(2)))


@every
def test_shares_of_the_sources_are_kept(baseline):
    sources = {
        "good": Source(good(), 0.0, 0.3),
        "wrong": Source(wrong(), 0.4),
        "more": good(seed=7),
    }
    run = Run(baseline(), sources)
    run.all()
    shares = run.shares()
    assert shares["good"] <= 0.3
    assert shares["wrong"] >= 0.4


@every
def test_what_is_left_is_taken_where_candidates_run_out(baseline):
    run = Run(baseline(), {"good": good(30), "wrong": wrong(20)}, budget=50)
    run.all()
    assert sorted(run.selected.tolist()) == list(range(50))


@every
def test_samples_that_cannot_be_used_are_left_out_and_told(baseline):
    faulty = Faulty({3: "raises", 5: "nan", 8: "inf"})
    run = Run(baseline(), {"faulty": faulty}, budget=39)
    for _ in range(ROUNDS):
        choice = run.round()
        assert not set(choice.add.tolist()) & {3, 5, 8}
    assert {entry.id for entry in run.probe.bad} <= {3, 5, 8}
    assert run.probe.bad


@every
def test_samples_all_of_which_are_bad_are_an_error(baseline):
    run = Run(baseline(), {"good": good(), "bad": Faulty(dict.fromkeys(range(40), "raises"))})
    run.pools.mark(run.pools.draw(0, 500, "all"), 1)  # so that only the bad ones are free
    with pytest.raises(CaptureError, match=r"none of \d+ samples could .*page \d+ is torn"):
        run.round()


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
@every
def test_a_fit_spends_its_budget_and_resumes(baseline, tmp_path):
    def make():
        sources = {"good": good(90), "wrong": wrong(60), "repeated": repeated(30)}
        return DVCDataModule(sources, good(40, seed=50), budget=60, batch_size=16, rounds=3)

    def fit(ckpt_path=None, **settings):
        module = make()
        callback = DVCCallback(baseline(), every_n_epochs=1)
        run = trainer(callbacks=[callback, *settings.pop("more", [])], max_epochs=4, **settings)
        run.fit(Net(), module, ckpt_path=ckpt_path)
        return module.selected_ids

    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fit(more=[saver], enable_checkpointing=True)
    assert len(whole) == 60
    assert torch.equal(fit(tmp_path / "epoch=0.ckpt"), whole)


class Dicts(Dataset):
    """The samples as dicts."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        x, y = self.dataset[index]
        return {"x": x, "y": y}


class OfDicts(Net):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def training_step(self, batch, batch_idx):
        return super().training_step((batch["x"], batch["y"]), batch_idx)


@every
def test_samples_may_be_dicts(baseline):
    module = DVCDataModule(
        {"one": Dicts(good(60)), "two": Dicts(wrong(60))}, budget=30, batch_size=16
    )
    run = trainer(callbacks=[DVCCallback(baseline())], max_epochs=3, limit_val_batches=0)
    run.fit(OfDicts(), module)
    assert len(module.selected_ids) == 30


REGRESSION = [CoreSet, GradientMatching, Influence, MetaLearning, DataEfficient]


@pytest.mark.parametrize("baseline", REGRESSION, ids=lambda kind: kind.__name__)
def test_targets_may_be_numbers(baseline):
    run = Run(baseline(), {"good": good(), "wrong": wrong()})
    run.net.training_step = squared(run.net)
    assert len(run.round().add) == 10


def squared(net):
    return lambda batch, _: nn.functional.mse_loss(net(batch[0])[:, 0], batch[1].float())


def test_a_prediction_without_uncertainty_is_refused():
    run = Run(Uncertainty(), {"good": good()})
    run.net.training_step = squared(run.net)
    with pytest.raises(ConfigurationError, match=r"expected class probabilities .*use another"):
        run.round()


def test_uncertain_samples_are_chosen():
    run = Run(Uncertainty(), {"good": good(400)}, oversample=100.0)
    run.round()
    with torch.no_grad():
        x, _ = good(400).tensors
        margins = run.net(x).softmax(1).topk(2).values.diff(dim=1).abs().flatten()
    assert margins[run.round().add].mean() < 0.5 * margins.mean()


def test_reference_samples_that_cannot_be_used_are_warned_of():
    run = Run(MetaLearning(), {"good": good()})
    run.reference = Faulty({3: "raises"})
    with pytest.warns(UserWarning, match="some reference samples .* number 3: .* page 3 is torn"):
        choice = run.round()
    assert len(choice.add) == 10
    assert run.probe.bad == []  # none of the pools is to be set aside


# --- parts -------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    labels=st.lists(st.integers(-1, 3), min_size=1, max_size=40),
    quota=st.integers(0, 50),
    largest=st.integers(1, 12),
)
def test_blocks_are_of_one_class_and_choose_in_proportion(labels, quota, largest):
    labels = torch.tensor(labels)
    found = list(blocks(labels, quota, largest))
    members = torch.cat([positions for positions, _ in found])
    assert sorted(members.tolist()) == list(range(len(labels)))
    assert sum(count for _, count in found) == min(quota, len(labels))
    for positions, count in found:
        assert 1 <= len(positions) <= largest
        assert len(labels[positions].unique()) == 1
        assert abs(count - min(quota, len(labels)) * len(positions) / len(labels)) < 1 + 1e-9


def test_orders_are_joined_by_turns():
    orders = [torch.tensor([9, 8, 7]), torch.tensor([], dtype=torch.int64), torch.tensor([1])]
    assert by_turns(orders).tolist() == [9, 1, 8, 7]
    assert by_turns([]).tolist() == []


def test_the_reference_is_held_out_or_selected():
    run = Run(CoreSet(), {"good": good()})
    seen = {}

    class Looking(CoreSet):
        def values(self, this, candidates, quota):
            _, kept = look_at_reference(this, lambda captured: captured.ids.tolist())
            seen[this.reference is None] = sorted(itertools.chain(*kept))
            return super().values(this, candidates, quota)

    run.strategy = Looking()
    run.round()
    assert seen == {False: list(range(60))}
    run.reference, selected = None, sorted(run.selected.tolist())
    run.round()
    assert seen[True] == selected
