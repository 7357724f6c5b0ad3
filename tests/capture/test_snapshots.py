import copy

import pytest
import torch
from torch import nn

from lightning_dvc.capture.snapshots import Snapshots


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.norm = nn.BatchNorm1d(4)
        self.b.weight.requires_grad_(False)


def values(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def move(net, by=1.0):
    with torch.no_grad():
        net.a.weight.add_(by)
        net.norm.running_mean.add_(by)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_each_age_gives_the_state_of_its_time_back():
    net, snapshots, states = Net(), Snapshots(window=2), []
    for _ in range(3):
        states.append(values(net))
        snapshots.push(net)
        move(net)
    now = values(net)
    assert len(snapshots) == 2
    for age, expected in enumerate([states[2], states[1]]):
        with snapshots.applied(net, age):
            assert same(values(net), expected)
        assert same(values(net), now)


def test_what_is_frozen_since_is_given_back_and_stays_frozen():
    net, snapshots = Net(), Snapshots(window=1)
    then = values(net)
    snapshots.push(net)
    move(net)
    now = values(net)
    net.a.requires_grad_(False)
    with snapshots.applied(net, 0):
        assert same(values(net), then)
    assert same(values(net), now)
    assert not net.a.weight.requires_grad


def test_the_present_state_returns_after_an_error():
    net, snapshots = Net(), Snapshots(window=1)
    snapshots.push(net)
    move(net)
    now, identities = values(net), [id(p) for p in net.parameters()]
    with pytest.raises(KeyError), snapshots.applied(net, 0):
        raise KeyError
    assert same(values(net), now)
    assert [id(p) for p in net.parameters()] == identities


def test_drift_in_half_precision_is_that_in_single():
    net = nn.Linear(300, 300)
    nn.init.constant_(net.weight, 1.0)  # a squared norm of 90,000, beyond float16
    drifts = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        moved, snapshots = copy.deepcopy(net).to(dtype), Snapshots(window=1)
        snapshots.push(moved)
        with torch.no_grad():
            moved.weight.mul_(1.0625)
        drifts.append(snapshots.drift(moved, [""]).tolist())
    assert [own for own, _ in drifts] == pytest.approx([0.0625] * 3, rel=1e-2)
    assert [others for _, others in drifts] == [0.0] * 3


def test_frozen_parameters_are_not_copied():
    net, snapshots = Net(), Snapshots(window=1)
    snapshots.push(net)
    (state,) = snapshots.state_dict()["states"]
    assert "b.weight" not in state
    assert "b.bias" in state


def test_drift_is_relative_to_the_last_state_and_layer_by_layer():
    net, snapshots = Net(), Snapshots(window=3)
    assert snapshots.drift(net, ["a", "b"]).tolist() == [torch.inf] * 3
    snapshots.push(net)
    size = sum(float(p.detach().square().sum()) for p in net.a.parameters()) ** 0.5
    move(net, by=0.5)
    drift = snapshots.drift(net, ["a", "b"])
    assert drift.tolist() == pytest.approx([0.5 * 12**0.5 / size, 0.0, 0.0])
    net.b.weight.requires_grad_(True)
    assert snapshots.drift(net, ["a", "b"])[1] == torch.inf


def test_what_is_not_named_counts_as_moved_too():
    net, snapshots = Net(), Snapshots(window=1)
    snapshots.push(net)
    size = sum(float(p.detach().square().sum()) for p in net.a.parameters()) + 4  # of the norm
    move(net, by=0.5)
    expected = pytest.approx([0.0, 0.5 * 12**0.5 / size**0.5])
    assert snapshots.drift(net, ["b"]).tolist() == expected
    net.a.requires_grad_(False)  # afterwards
    assert snapshots.drift(net, ["b"]).tolist() == expected
    assert snapshots.drift(net, ["a"])[0] > 0


def test_buffers_that_grow_or_are_not_finite_are_no_movement():
    net, snapshots = Net(), Snapshots(window=1)
    net.register_buffer("mask", torch.full((3, 3), -torch.inf))
    net.register_buffer("table", torch.zeros(2))
    snapshots.push(net)
    net.table = torch.zeros(5)
    assert snapshots.drift(net, ["a", "b"]).tolist() == [0.0, 0.0, 0.0]


def test_a_tied_parameter_belongs_to_every_layer_that_has_it():
    net, snapshots = Net(), Snapshots(window=1)
    net.c = nn.Linear(3, 4)
    net.c.weight = net.a.weight
    snapshots.push(net)
    move(net)
    first, other, rest = snapshots.drift(net, ["a", "c"]).tolist()
    assert first > 0.1
    assert other > 0.1
    assert rest == 0.0


def test_states_survive_a_file_and_a_shorter_window_keeps_the_latest(tmp_path):
    net, snapshots = Net(), Snapshots(window=3)
    for _ in range(3):
        snapshots.push(net)
        move(net)
    torch.save(snapshots.state_dict(), tmp_path / "state.pt")
    again = Snapshots(window=2)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(again) == 2
    for age in range(2):
        with snapshots.applied(net, age):
            expected = values(net)
        with again.applied(net, age):
            assert same(values(net), expected)


def test_no_window_keeps_nothing():
    net, snapshots = Net(), Snapshots(window=0)
    snapshots.push(net)
    assert len(snapshots) == 0


def test_no_window_copies_nothing():
    Snapshots(window=0).push(nn.LazyLinear(2))  # whose parameters cannot be copied yet
