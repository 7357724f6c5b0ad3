import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dvc.capture import notes as notes_module
from lightning_dvc.capture.notes import LARGEST, Notes


class Meter:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_contents_are_put_back_in_place():
    tensor, array, gaps = torch.zeros(2), np.zeros((2, 3))[:, ::2], np.array([np.nan, 1.0])
    value = {"tensor": tensor, "nested": [deque([array]), {1}], "gaps": gaps}
    restore = Notes().of(value)
    tensor += 1
    array += 1
    gaps[:] = 5
    value["nested"][1].add(2)
    value["nested"][0][0] = None
    value["new"] = value.pop("tensor")
    assert restore() is value
    assert list(value) == ["tensor", "nested", "gaps"]
    assert value["tensor"] is tensor
    assert tensor.tolist() == [0, 0]
    assert value["nested"][0][0] is array
    assert not array.any()
    assert value["nested"][1] == {1}
    assert np.isnan(gaps[0])
    assert gaps[1] == 1


def test_plain_objects_are_put_back():
    meter = Meter(sum=1.0, recent=deque([1]), seen=np.zeros(2), device=torch.device("cpu"))
    value = [meter]
    restore = Notes().of(value)
    meter.sum, meter.late = 2.0, 1
    meter.recent.append(2)
    meter.seen += 1
    value.clear()
    restore()
    assert value == [meter]
    assert list(vars(meter)) == ["sum", "recent", "seen", "device"]
    assert meter.sum == 1.0
    assert list(meter.recent) == [1]
    assert not meter.seen.any()


@pytest.mark.parametrize("held", [iter([1]), object(), SimpleNamespace(a=1), abs])
def test_objects_that_hold_others_are_left_alone(held):
    worker = Meter(sent=1, waiting=deque([1]), held=held)
    restore = Notes().of(worker)
    worker.sent = 2
    worker.waiting.clear()
    assert restore() is worker
    assert worker.sent == 2
    assert not worker.waiting


def test_an_iterator_over_batches_goes_on():
    batches = iter(torch.utils.data.DataLoader(range(6), batch_size=2))
    restore = Notes().of(batches)
    next(batches)
    restore()
    assert [batch.tolist() for batch in batches] == [[2, 3], [4, 5]]


DRAWS = {
    "torch": (torch.Generator, lambda stream: torch.rand(1, generator=stream).item()),
    "numpy": (np.random.default_rng, lambda stream: stream.random()),
    "numpy of old": (np.random.RandomState, lambda stream: stream.random_sample()),
    "random": (random.Random, lambda stream: stream.random()),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_random_streams_are_put_back(kind):
    make, draw = DRAWS[kind]
    stream = make()
    restore = Notes().of(stream)
    first = [draw(stream) for _ in range(3)]
    assert restore() is stream
    assert [draw(stream) for _ in range(3)] == first


def test_a_stream_without_a_state_is_left_alone():
    stream = random.SystemRandom()
    assert Notes().of(stream)() is stream


def test_what_is_large_alone_or_together_is_not_copied():
    alone, first, second = torch.zeros(LARGEST + 1), torch.zeros(LARGEST), np.zeros(1)
    text = np.full(8, "x" * LARGEST)
    notes = Notes()
    restores = [notes.of(value) for value in (alone, [first, second], text)]
    for value in (alone, first, second):
        value += 1
    text[0] = "y"
    for restore in restores:
        restore()
    assert alone[0] == 1
    assert first[0] == 0
    assert second[0] == 1
    assert text[0] == "y"


def test_what_is_read_only_or_a_parameter_is_left_alone():
    fixed, parameter = np.zeros(2), nn.Parameter(torch.zeros(2))
    fixed.flags.writeable = False
    restore = Notes().of([fixed, parameter])
    parameter.data += 1
    assert restore() == [fixed, parameter]
    assert parameter.tolist() == [1, 1]


def test_what_two_values_share_is_put_back_once():
    notes, shared = Notes(), [torch.zeros(1)]
    restores = [notes.of(shared), notes.of({"shared": shared})]
    shared[0] += 1
    shared.append(2)
    found = [restore() for restore in restores]
    assert found == [shared, {"shared": shared}]
    assert shared == [torch.zeros(1)]


@pytest.mark.parametrize("part", [lambda: [0], lambda: SimpleNamespace(n=0)])
def test_of_very_many_parts_the_rest_is_left_alone(part, monkeypatch):
    monkeypatch.setattr(notes_module, "_MOST_PARTS", 10)
    value = [part() for _ in range(1000)]
    before = list(value)
    restore = Notes().of(value)
    del value[500:]
    assert restore() is value
    assert all(one is other for one, other in zip(value, before, strict=True))


def test_of_parts_that_are_too_many_none_is_looked_at(monkeypatch):
    monkeypatch.setattr(notes_module, "_MOST_PARTS", 10)
    value = [[0] for _ in range(1000)]
    restore = Notes().of(value)
    for part in value:
        part[0] = 1
    restore()
    assert 0 < value.count([0]) <= 10


def test_what_changes_its_size_is_put_back():
    tensor, array = torch.zeros(2), np.zeros(2)
    restore = Notes().of([tensor, array])
    tensor.data = torch.ones(5)
    array.resize(7, refcheck=False)
    assert [part.tolist() for part in restore()] == [[0, 0], [0, 0]]


def test_what_cannot_be_written_to_is_left_alone():
    expanded = torch.tensor([torch.nan]).expand(3)
    restore = Notes().of([expanded])
    assert restore()[0] is expanded


class Absent:
    """Stands in for something that is not there."""

    def __getattribute__(self, name):
        raise RuntimeError(f"asked for {name} outside of a context")


def test_what_may_not_be_asked_for_anything_is_left_alone():
    value = [Absent(), 0]
    first = value[0]
    restore = Notes().of(value)
    value.clear()
    assert restore()[0] is first
