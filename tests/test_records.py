import dataclasses

import pytest
import torch

from lightning_dvc.records import METRICS, N_LAYER_METRICS, BadSample, Choice

UNSCORED = Choice.unscored(torch.tensor([4, 2, 9]))


def test_metrics_per_layer_come_first():
    assert METRICS[:N_LAYER_METRICS] == ("quality", "relevance", "diversity")
    assert METRICS[N_LAYER_METRICS:] == ("gradient_impact", "uncertainty", "stability")


def test_an_unscored_choice_keeps_its_ids_and_knows_nothing_else():
    assert UNSCORED.add.tolist() == [4, 2, 9]
    assert UNSCORED.values.shape == (3,)
    assert UNSCORED.raw.shape == (3, len(METRICS))
    assert UNSCORED.weights.shape == (len(METRICS),)
    for unknown in (UNSCORED.values, UNSCORED.raw, UNSCORED.weights):
        assert unknown.isnan().all()
    assert UNSCORED.remove.tolist() == []
    assert UNSCORED.remove.dtype == torch.int64


def test_an_unscored_choice_of_nothing():
    nothing = Choice.unscored(torch.empty(0, dtype=torch.int64))
    assert nothing.raw.shape == (0, len(METRICS))


def test_defaults_are_not_shared():
    other = Choice.unscored(torch.tensor([1]))
    other.figures["round"] = 1.0
    assert UNSCORED.figures == {}
    assert other.remove is not UNSCORED.remove


@pytest.mark.parametrize(
    ("record", "name"),
    [
        (UNSCORED, "add"),
        (BadSample(1, "loss is NaN"), "reason"),
    ],
)
def test_records_are_frozen(record, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(record, name, None)
