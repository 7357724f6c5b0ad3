import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dvc.capture.outcome import Outcome, infer_kind
from lightning_dvc.errors import ObjectiveError


def multiclass(outputs, targets):
    return Outcome(torch.zeros(len(outputs)), outputs, targets, "multiclass")


def test_multiclass_reads_class_and_its_probability():
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    outcome = multiclass(shares.log() + 3, torch.tensor([1, 2]))
    assert outcome.labels().tolist() == [1, 2]
    assert outcome.labels().dtype == torch.int64
    torch.testing.assert_close(outcome.confidence(), torch.tensor([0.2, 0.5]))
    expected = [-sum(p * math.log(p) for p in row) / math.log(3) for row in shares.tolist()]
    torch.testing.assert_close(outcome.entropy(), torch.tensor(expected))


def test_soft_targets_count_as_their_likeliest_class():
    outcome = multiclass(torch.eye(2), torch.tensor([[0.4, 0.6], [0.9, 0.1]]))
    assert outcome.labels().tolist() == [1, 0]
    torch.testing.assert_close(outcome.confidence(), torch.full((2,), 1 / (1 + math.e)))


def test_ignored_sample_has_no_class_and_is_not_implausible():
    outcome = multiclass(torch.eye(2), torch.tensor([-100, 1]))
    assert outcome.labels().tolist() == [-1, 1]
    assert outcome.confidence()[0] == 1
    assert outcome.entropy()[0] > 0.5


def test_positions_are_averaged_over_those_with_a_target():
    sure, unsure = [50.0, 0.0], [0.0, 0.0]
    outputs = torch.tensor([[sure, unsure, unsure], [unsure, sure, sure], [sure] * 3])
    targets = torch.tensor([[0, 1, -1], [-1, -1, 0], [-1, -1, -1]])
    outcome = multiclass(outputs, targets)
    assert outcome.labels().tolist() == [-1, -1, -1]
    torch.testing.assert_close(outcome.entropy(), torch.tensor([0.5, 0.0, 0.0]))
    torch.testing.assert_close(outcome.confidence(), torch.tensor([0.75, 1.0, 1.0]))


def test_impossible_class_does_not_spoil_the_entropy():
    outcome = multiclass(torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]), torch.tensor([0]))
    torch.testing.assert_close(outcome.entropy(), torch.tensor([0.5]))


def test_single_class_is_certain():
    assert multiclass(torch.ones(2, 1), torch.tensor([0, 0])).entropy().tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_binary(shape):
    logits = torch.tensor([0.0, 2.0, -2.0]).reshape(shape)
    targets = torch.tensor([0.2, 0.0, 1.0]).reshape(shape)
    outcome = Outcome(torch.ones(3), logits, targets, "binary")
    assert outcome.labels().tolist() == [0, 0, 1]
    wrong = 1 / (1 + math.exp(2))
    torch.testing.assert_close(outcome.confidence(), torch.tensor([0.5, wrong, wrong]))
    entropy = -(wrong * math.log2(wrong) + (1 - wrong) * math.log2(1 - wrong))
    torch.testing.assert_close(outcome.entropy(), torch.tensor([1.0, entropy, entropy]))


def test_multilabel_averages_over_labels():
    logits = torch.tensor([[0.0, 60.0], [60.0, 60.0]])
    outcome = Outcome(torch.ones(2), logits, torch.tensor([[1.0, 1.0], [0.0, 1.0]]), "multilabel")
    assert outcome.labels().tolist() == [-1, -1]
    torch.testing.assert_close(outcome.entropy(), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(outcome.confidence(), torch.tensor([0.75, 0.5]))


def test_regression_has_losses_only():
    x = torch.ones(2, 3)
    outcome = Outcome(torch.tensor([1.0, 3.0]), x, x, "regression")
    assert outcome.entropy() is None
    assert outcome.labels().tolist() == [-1, -1]
    assert outcome.confidence().tolist() == [-1, -3]


def test_gaussian_is_as_unsure_as_its_variance():
    x = torch.ones(2, 2)
    variances = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    outcome = Outcome(torch.tensor([1.0, 3.0]), x, x, "gaussian", variances)
    assert outcome.entropy().tolist() == [2, 5]
    assert outcome.confidence().tolist() == [-1, -3]


def test_unknown_tells_nothing():
    outcome = Outcome(torch.tensor([1.0, 2.0], requires_grad=True), torch.ones(2, 4))
    assert outcome.entropy() is None
    assert outcome.labels().tolist() == [-1, -1]
    assert not outcome.confidence().requires_grad


@given(
    logits=st.lists(st.floats(-1e4, 1e4), min_size=6, max_size=6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    kind=st.sampled_from(["multiclass", "multilabel"]),
)
def test_figures_of_classes_stay_in_the_unit_interval(logits, dtype, kind):
    outputs = torch.tensor(logits).reshape(2, 3).to(dtype)
    targets = torch.tensor([0, 2]) if kind == "multiclass" else torch.eye(3)[:2]
    outcome = Outcome(torch.ones(2), outputs, targets, kind)
    for figure in (outcome.entropy(), outcome.confidence()):
        assert figure.dtype in (torch.float32, torch.float64)
        assert ((figure >= 0) & (figure <= 1)).all()


@pytest.mark.parametrize(
    ("kind", "missing"), [("multiclass", "targets"), ("regression", "targets"), ("gaussian", "var")]
)
def test_incomplete_outcome_is_refused(kind, missing):
    given_targets = torch.ones(2) if kind == "gaussian" else None
    with pytest.raises(ObjectiveError, match=missing):
        Outcome(torch.ones(2), torch.ones(2), given_targets, kind)


@pytest.mark.parametrize(
    ("outputs", "targets", "kind"),
    [
        (torch.ones(4, 3), torch.tensor([0, 1, 2, 0]), "multiclass"),
        (torch.ones(4, 5, 3), torch.ones(4, 5, dtype=torch.long), "multiclass"),
        (torch.ones(4), torch.tensor([0, 1, 1, 0]), "binary"),
        (torch.ones(4, 1), torch.tensor([True, False, True, True]), "binary"),
        (torch.ones(4, 3), torch.ones(4, 3, dtype=torch.bool), "multilabel"),
        (torch.ones(4, 3), torch.ones(4, 3), "regression"),
        (torch.ones(4, 1), torch.tensor([3, 0, 1, 7]), "regression"),
        (torch.ones(4, 3), torch.ones(4), "unknown"),
        (torch.ones(4, 3), None, "unknown"),
        (None, torch.ones(4), "unknown"),
    ],
)
def test_infer_kind(outputs, targets, kind):
    assert infer_kind(outputs, targets) == kind
