"""Ways of training beside the plain one: what is scored, and that training is left alone."""

import pytest
import torch
import torch.nn.functional as F
from helpers.problems import WIDTH, Net, good, trainer, wrong
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dvc import DVC, DVCCallback, DVCDataModule, FixedWeights, Random
from lightning_dvc.errors import CaptureError


def fit(net, strategy, callbacks=(), **settings):
    datamodule = DVCDataModule(
        {"good": good(), "wrong": wrong()},
        val=good(90, seed=50),
        budget=120,
        batch_size=16,
        rounds=4,
        warmup=0.1,
    )
    callback = DVCCallback(strategy, monitor="val_acc")
    run = trainer(callbacks=[callback, *callbacks], **{"max_epochs": 6, **settings})
    run.fit(net, datamodule)
    return datamodule, callback


def every_metric():
    return DVC(FixedWeights())


class LooksOnly(DVC):
    def choose(self, this):
        choice = super().choose(this)
        return type(choice).unscored(choice.add[:0])


class NoChoice(Random):
    def choose(self, this):
        return type(super().choose(this)).unscored(torch.empty(0, dtype=torch.int64))


class Normed(Net):
    """With BatchNorm and dropout, the usual victims."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.2)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.body(x)).relu()))


class Checkpointed(Net):
    reentrant = False

    def __init__(self):
        super().__init__()
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.head(checkpoint(self.middle, hidden, use_reentrant=self.reentrant).relu())


class Manual(Net):
    """Two heads, each with an optimiser of its own."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 3)
        self.automatic_optimization = False

    def losses(self, batch, head):
        logits = head(self.body(batch[0]).relu())
        return F.cross_entropy(logits, batch[1], reduction="none"), logits

    def per_sample_loss(self, batch):
        (first, logits), (second, _) = (self.losses(batch, h) for h in (self.head, self.other))
        return first + second, logits, batch[1]

    def training_step(self, batch, batch_idx):
        for optimizer, head in zip(self.optimizers(), (self.head, self.other), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch, head)[0].mean())
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        first = [*self.body.parameters(), *self.head.parameters()]
        return torch.optim.Adam(first, lr=1e-2), torch.optim.Adam(self.other.parameters(), lr=1e-2)


class Adversarial(Net):
    """A classifier, and a generator of samples that it should take for a class of their own."""

    def __init__(self):
        super().__init__(d_out=4)
        self.generator = nn.Linear(4, WIDTH)
        self.automatic_optimization = False

    def per_sample_loss(self, batch):
        logits = self(batch[0])
        return F.cross_entropy(logits, batch[1], reduction="none"), logits, batch[1]

    def training_step(self, batch, batch_idx):
        makes, judges = self.optimizers()
        fake = self.generator(torch.randn(len(batch[0]), 4, device=self.device))
        self.toggle_optimizer(makes)
        makes.zero_grad()
        self.manual_backward(F.cross_entropy(self(fake), batch[1]))
        makes.step()
        self.untoggle_optimizer(makes)
        self.toggle_optimizer(judges)
        judges.zero_grad()
        unreal = F.cross_entropy(self(fake.detach()), torch.full_like(batch[1], 3))
        self.manual_backward(self.per_sample_loss(batch)[0].mean() + 0.1 * unreal)
        judges.step()
        self.untoggle_optimizer(judges)

    def configure_optimizers(self):
        judges = [*self.body.parameters(), *self.head.parameters()]
        adam = torch.optim.Adam
        return adam(self.generator.parameters(), lr=1e-2), adam(judges, lr=1e-2)


def averages(kind):
    if kind == "ema":
        return [EMAWeightAveraging(decay=0.9)]
    return [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)]


STYLES = {
    "accumulated": (Normed, {"accumulate_grad_batches": 3}),
    "clipped by norm": (Normed, {"gradient_clip_val": 0.1}),
    "clipped by value": (
        Normed,
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "checkpointed": (Checkpointed, {}),
    "two heads": (Manual, {}),
    "adversarial": (Adversarial, {}),
    "ema": (Normed, {}),
    "swa": (Net, {}),
    "swa with batch norm": (Normed, {}),
}


def run(style, strategy):
    net, settings = STYLES[style]
    torch.manual_seed(0)
    net = net()
    name = style.split()[0]
    callbacks = averages(name) if name in ("ema", "swa") else []
    return net, *fit(net, strategy, callbacks, **settings)


@pytest.mark.parametrize("style", STYLES)
def test_what_is_wrong_is_kept_out(style):
    net, datamodule, _ = run(style, every_metric())
    table = datamodule.selection
    later = [s for s, r in zip(table.source, table.round.tolist(), strict=True) if r > 0]
    assert later.count("wrong") < 0.15 * len(later)  # half of what is drawn at first
    assert table.raw[table.round > 0].isfinite().all()
    assert len(table) == 120
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    for epoch in (3, 4, 5):
        assert sum(net.seen[epoch]) == 120


@pytest.mark.filterwarnings("ignore:The run ended with:UserWarning")
@pytest.mark.parametrize("style", STYLES)
def test_training_is_left_alone(style):
    (looked, *_), (blind, *_) = run(style, LooksOnly(FixedWeights())), run(style, NoChoice())
    states = looked.state_dict(), blind.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


# --- activation checkpointing that torch cannot differentiate twice -----------------------------


# Which torch says in every validation.
UNTRACKED = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")


class Reentrant(Checkpointed):
    reentrant = True


class FirstReentrant(Net):
    """Nothing before what is checkpointed, so that torch does not notice."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        return self.head(checkpoint(self.body, x, use_reentrant=True).relu())


@UNTRACKED
def test_reentrant_checkpointing_is_refused_with_what_to_do():
    net = Reentrant()
    with (
        pytest.warns(UserWarning, match=r"\['middle.0', 'middle.2'\] run without gradients"),
        pytest.raises(CaptureError, match="use_reentrant=False"),
    ):
        fit(net, every_metric())
    assert net.seen == {}


@UNTRACKED
def test_reentrant_checkpointing_that_hides_layers_is_told():
    with pytest.warns(UserWarning, match=r"\['body'\] run without gradients.*use_reentrant=False"):
        datamodule, callback = fit(FirstReentrant(), every_metric())
    assert list(callback.layer_forms) == ["head"]
    assert len(datamodule.selected_ids) == 120


# --- averaged weights --------------------------------------------------------------------------


class Weights(Callback):
    """Notes the weights that training ends an epoch with."""

    last = None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.last = [parameter.detach().clone() for parameter in pl_module.parameters()]


class Comparing(DVC):
    def __init__(self, weights):
        super().__init__()
        self.noted, self.same = weights, []

    def choose(self, this):
        if self.noted.last is not None:
            pairs = zip(self.noted.last, this.probe.module.parameters(), strict=True)
            self.same.append(all(torch.equal(one, other) for one, other in pairs))
        return super().choose(this)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_weights_scored_are_those_trained(kind):
    weights = Weights()
    strategy = Comparing(weights)
    fit(Normed(), strategy, [*averages(kind), weights])
    assert strategy.same == [True] * 3
