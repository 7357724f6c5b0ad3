"""Baselines where little is left, much is broken, numbers are large, or there are two processes."""

import multiprocessing
import traceback

import pytest
import torch
from helpers.baselines import BASELINES, every
from helpers.problems import CLASSES, Faulty, Net, good, trainer, wrong
from helpers.rounds import BUDGET, ROUNDS, Run
from torch import nn

from lightning_dvc import (
    DataShapley,
    DVCCallback,
    DVCDataModule,
    GradientMatching,
    Influence,
    MetaLearning,
    Source,
)
from lightning_dvc.distributed import Group
from lightning_dvc.errors import CaptureError
from lightning_dvc.pools import SET_ASIDE
from lightning_dvc.strategies.baseline import places

short_of_its_budget = pytest.mark.filterwarnings(
    "ignore:The run ended with:UserWarning", "ignore:.* could not be scored and:UserWarning"
)


def fit(baseline, sources, **settings):
    """A real fit that has a round in every epoch but the last."""
    module = DVCDataModule(sources, good(40, seed=50), batch_size=16, **settings)
    callbacks = [DVCCallback(baseline, every_n_epochs=1)]
    trainer(callbacks=callbacks, max_epochs=settings["rounds"] + 1).fit(Net(), module)
    return module


# --- little is left, or broken -----------------------------------------------------------------


@every
def test_nothing_is_chosen_where_nothing_is_left(baseline):
    run = Run(baseline(), {"good": good(20)}, budget=21)
    run.all()
    assert len(run.selected) == 20
    assert len(run.round().add) == 0


@every
@short_of_its_budget
def test_a_round_whose_few_candidates_are_all_broken_adds_nothing(baseline):
    sources = {"torn": Faulty(dict.fromkeys(range(10, 40), "raises")), "good": good(12)}
    module = fit(baseline(), sources, budget=30, rounds=20, warmup=0.2, oversample=1.0)
    assert len(module.selected_ids) == 22
    assert module.n_set_aside == 30


@every
def test_a_model_that_has_diverged_is_an_error_also_for_few_candidates(baseline):
    run = Run(baseline(), {"good": good()}, budget=10, oversample=1.0)
    run.net.head.bias.data.fill_(torch.nan)
    with pytest.raises(CaptureError, match=r"the parameters \['head.bias'\] are not finite"):
        run.round()


@pytest.mark.parametrize("oversample", [4.0, 1.0])  # more candidates than a batch, and fewer
@pytest.mark.parametrize("baseline", [GradientMatching, DataShapley, Influence, MetaLearning])
def test_a_reference_all_of_which_is_broken_is_an_error_that_says_why(baseline, oversample):
    run = Run(baseline(), {"good": good()}, oversample=oversample)
    run.reference = Faulty(dict.fromkeys(range(200), "raises"), n=200)
    with pytest.raises(CaptureError, match=r"none of 200 samples could .*page \d+ is torn"):
        run.round()
    assert run.probe.bad == []  # no sample of the pools is to blame


@every
def test_what_is_broken_in_the_warm_up_is_known_after_the_first_round(baseline):
    run = Run(baseline(), {"faulty": Faulty({})}, budget=30)
    first = int(run.selected[0])
    run.pools.dataset._datasets[0].faults[first] = "raises"
    run.train = lambda: None
    run.round()
    assert {sample.id for sample in run.probe.bad} == {first}


@every
def test_samples_set_aside_are_not_looked_at_again(baseline):
    run = Run(baseline(), {"good": good(80)}, budget=40)
    aside = torch.arange(0, 80, 2)
    aside = aside[~torch.isin(aside, run.selected)]
    run.pools.mark(aside, SET_ASIDE)
    run.all()
    assert len(run.selected) == 40
    assert not torch.isin(run.selected, aside).any()


@pytest.mark.parametrize("oversample", [1e18, 1e300])
def test_any_oversample_looks_at_all_there_is(oversample):
    sources = {"good": good(50), "wrong": Source(wrong(50), max_share=0.5)}
    run = Run(MetaLearning(), sources, oversample=oversample)
    assert run.round().figures["candidates"] == 96  # all but the warm-up
    for _ in range(ROUNDS - 1):
        run.round()
    assert len(run.selected) == BUDGET


# --- two processes -----------------------------------------------------------------------------


class Images(Net):
    """Ends in a convolution, whose gradients cannot be sent as they are: its hook is of here."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv1d(1, 4, kernel_size=3)
        self.head = nn.Conv1d(4, CLASSES, kernel_size=2)
        self.head.register_forward_pre_hook(lambda module, args: None)

    def forward(self, x):
        return self.head(self.body(x[:, None]).relu()).mean(2)


def chosen_by_all(group):
    """What each baseline chooses in two rounds, of a perceptron and of a convolution."""
    found = {}
    for kind in BASELINES:
        for net in (Net(), Images()):
            run = Run(kind(), {"good": good(83), "wrong": wrong(45)}, net=net, group=group)
            for _ in range(2):
                run.round()
            found[kind.__name__, type(net).__name__] = run.selected.tolist()
    return found


def in_one_of_two(rank, port, told):
    try:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", address, rank=rank, world_size=2)
        told.send(chosen_by_all(Group(rank, 2)))
        torch.distributed.destroy_process_group()
    except BaseException:
        told.send(traceback.format_exc())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_processes_choose_what_one_chooses(unused_port):
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    children = [
        context.Process(target=in_one_of_two, args=(rank, unused_port, there), daemon=True)
        for rank, (_, there) in enumerate(pipes)
    ]
    for child in children:
        child.start()
    try:
        for here, _ in pipes:
            assert here.poll(120), "a process hangs"
            assert here.recv() == chosen_by_all(Group())
    finally:
        for child in children:
            child.kill()
            child.join()


# --- parts -------------------------------------------------------------------------------------


def test_places_are_in_the_order_of_choice_and_none_is_shared():
    values = places(torch.tensor([3, 0, 4]), 6)
    assert torch.argsort(values, descending=True, stable=True).tolist() == [3, 0, 4, 1, 2, 5]
    assert values[[1, 2, 5]].tolist() == [0, 0, 0]
