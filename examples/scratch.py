"""Training on chosen samples from scratch, without what a loader costs, and judging the model."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from examples.classifier import Classifier
from examples.compare import Problem

_BATCH = 4096


def train(problem: Problem, features: Tensor, labels: Tensor, seed: int) -> Classifier:
    """Train a new model for the problem's number of steps.

    Args:
        problem: Tells the model, the steps and the batch size.
        features: ``(n, d)`` samples to train on.
        labels: ``(n,)`` their classes.
        seed: Of the parameters and of the order of samples.
    """
    torch.manual_seed(seed)
    model = problem.model()
    optimizer = model.configure_optimizers()
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(problem.steps):
        if not len(order):
            order = torch.randperm(len(features))
        batch, order = order[: problem.batch_size], order[problem.batch_size :]
        optimizer.zero_grad()
        model.training_step((features[batch], labels[batch]), 0).backward()
        optimizer.step()
    return model


def train_on(problem: Problem, chosen: Sequence[int], seed: int) -> Classifier:
    """The same with chosen samples of all sources together."""
    features, labels = pool_of(problem)
    rows = torch.tensor(chosen)
    return train(problem, features[rows], labels[rows], seed)


def pool_of(problem: Problem) -> tuple[Tensor, Tensor]:
    """Features ``(N, d)`` and labels ``(N,)`` of all sources together."""
    parts = problem.parts.values()
    return torch.cat([part.features for part in parts]), torch.cat([part.labels for part in parts])


@torch.no_grad()
def judge(model: Classifier, problem: Problem) -> tuple[float, float]:
    """Accuracy and macro-averaged F1 on the problem's test set, both in ``[0, 1]``."""
    features, labels = problem.test.tensors
    model.eval()
    found = torch.cat([model(batch).argmax(1) for batch in features.split(_BATCH)])
    accuracy = multiclass_accuracy(found, labels, problem.n_classes, average="micro")
    return float(accuracy), float(multiclass_f1_score(found, labels, problem.n_classes))
