"""A strategy round by round, without a trainer: a real probe on a real net, and planted sources."""

import torch
from torch.utils.data import default_collate

from helpers.problems import Net, good, repeated, wrong
from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe
from lightning_dvc.distributed import Group
from lightning_dvc.pools import SELECTED, TAKEN_BACK, Pools
from lightning_dvc.strategies.base import Round

BUDGET, ROUNDS = 60, 6


class Run:
    """Rounds of one strategy on one net that does a little training in between."""

    def __init__(
        self,
        strategy,
        sources=None,
        reference=True,
        budget=BUDGET,
        oversample=4.0,
        steps=10,
        net=None,
        group=None,
    ):
        sources = sources or {"good": good(), "wrong": wrong(), "repeated": repeated()}
        self.strategy, self.pools, self.net = strategy, Pools(sources), net or Net()
        self.group = group or Group()
        self.probe = Probe(self.net, resolve_objective(self.net), default_collate, batch_size=32)
        self.reference = good(60, seed=50) if reference else None
        self.budget, self.oversample, self.steps = budget, oversample, steps
        arms = range(len(self.pools.names))
        self.selected = torch.empty(0, dtype=torch.int64)
        for arm in arms:
            self.select(arm, 2)
        self.number = 0

    def select(self, arm, count):
        """Draw blindly from a source, as a warm-up does."""
        drawn = self.pools.draw(arm, count, "warm-up")
        self.pools.mark(drawn, SELECTED)
        self.selected = torch.cat([self.selected, drawn])

    def round(self):
        self.number += 1
        this = Round(
            number=self.number,
            n_rounds=ROUNDS,
            budget=self.budget,
            oversample=self.oversample,
            pools=self.pools,
            selected=self.selected,
            probe=self.probe,
            reference=self.reference,
            group=self.group,
        )
        with undisturbed(self.net):
            choice = self.strategy.choose(this)
        self.apply(choice, this)
        self.train()
        return choice

    def apply(self, choice, this):
        assert torch.isin(choice.remove, self.selected).all()
        assert not torch.isin(choice.add, self.selected).any()
        assert len(choice.add.unique()) == len(choice.add)
        assert len(choice.add) <= this.quota(len(choice.remove))
        self.selected = self.selected[~torch.isin(self.selected, choice.remove)]
        self.selected = torch.cat([self.selected, choice.add])
        self.pools.mark(choice.remove, TAKEN_BACK)
        self.pools.mark(choice.add, SELECTED)
        assert len(self.selected) <= self.budget

    def train(self):
        x, y = default_collate([self.pools.dataset[i] for i in self.selected.tolist()])
        optimizer = self.net.configure_optimizers()
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.net.training_step((x, y), 0).backward()
            optimizer.step()

    def all(self):
        return [self.round() for _ in range(ROUNDS)]

    def shares(self):
        counts = torch.bincount(self.pools.arms_of(self.selected), minlength=len(self.pools.names))
        return dict(zip(self.pools.names, (counts / counts.sum()).tolist(), strict=True))
