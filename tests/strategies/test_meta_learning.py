"""The weights of a reweighted step against differentiating through that step."""

import pytest
import torch
from helpers.problems import good, wrong
from helpers.rounds import Run
from torch.func import functional_call

from lightning_dvc import MetaLearning


def reweighted(net, train, held_out):
    """Minus the derivative of the held-out loss after one step, by the samples' weights at 0."""
    net = net.double()
    parameters = dict(net.named_parameters())

    def loss(values, x, y, reduction):
        logits = functional_call(net, values, (x.double(),))
        return torch.nn.functional.cross_entropy(logits, y, reduction=reduction)

    weights = torch.zeros(len(train[1]), dtype=torch.float64, requires_grad=True)
    weighted = (weights * loss(parameters, *train, "none")).sum()
    slopes = torch.autograd.grad(weighted, list(parameters.values()), create_graph=True)
    stepped = {
        name: value - slope for (name, value), slope in zip(parameters.items(), slopes, strict=True)
    }
    (derivative,) = torch.autograd.grad(loss(stepped, *held_out, "mean"), weights)
    return -derivative


@pytest.mark.parametrize("trained", [0, 30])
def test_values_are_the_weights_of_a_reweighted_step(trained):
    run = Run(MetaLearning(), {"good": good(60), "wrong": wrong(60)}, oversample=100.0)
    for _ in range(trained):
        run.train()
    ids = torch.arange(120)
    x, y = zip(*(run.pools.dataset[i] for i in ids.tolist()), strict=True)
    choice = run.round()
    run_before = Run(MetaLearning(), {"good": good(60), "wrong": wrong(60)})
    for _ in range(trained):
        run_before.train()
    train = (torch.stack(x), torch.stack(y))
    weights = reweighted(run_before.net, train, run.reference.tensors)
    torch.testing.assert_close(choice.values, weights[choice.add], rtol=1e-4, atol=1e-7)
    weights[run_before.selected] = -torch.inf
    best = weights.topk(len(choice.add)).values
    torch.testing.assert_close(choice.values, best, rtol=1e-4, atol=1e-7)
    assert (choice.values > 0).all()


def test_without_a_positive_product_the_order_is_random_but_the_same():
    sources = {"wrong": wrong(40)}
    run, again = (Run(MetaLearning(), sources, oversample=100.0, budget=42) for _ in range(2))
    for each in (run, again):
        for _ in range(20):
            each.train()
        each.reference = good(60, seed=50)
    chosen = run.round()
    assert torch.equal(chosen.add, again.round().add)
    assert (chosen.values[chosen.values <= 0] > -1.0 - 1e-9).all()


def test_wrong_labels_are_kept_out():
    run = Run(MetaLearning(), {"good": good(), "wrong": wrong()})
    run.all()
    assert run.shares()["wrong"] < 0.25  # half of what is drawn
