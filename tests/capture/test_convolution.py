import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import Net, assert_gradients, normal, own_losses, per_sample_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dvc.capture.convolution import CONVOLUTIONS, Convolved, padded_input, patches
from lightning_dvc.capture.gradients import Materialised, OuterProducts
from lightning_dvc.capture.kinds import full_shape
from lightning_dvc.capture.layers import LayerCapture, find_layers
from lightning_dvc.errors import CaptureError

MODES = ["zeros", "circular", "reflect", "replicate"]


def per_axis(numbers, axes):
    """One number for all axes, or one for each."""
    return st.one_of(numbers, st.tuples(*[numbers] * axes))


@st.composite
def convolutions(draw, axes):
    """Arguments of a convolution, and an image that is large enough for it."""
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), per_axis(st.integers(0, 2), axes)))
    groups = draw(st.integers(1, 3))
    arguments = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": draw(per_axis(st.integers(1, 3), axes)),
        "dilation": draw(per_axis(st.integers(1, 2), axes)),
        "padding": padding,
        "stride": 1 if padding == "same" else draw(per_axis(st.integers(1, 3), axes)),
        "padding_mode": draw(st.sampled_from(MODES)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    image = [5 + draw(st.integers(0, 2)) for _ in range(axes)]  # a dilated kernel covers 5
    return arguments, image


def capture(net, x, names=None):
    recorder = LayerCapture(find_layers(net, names))
    with recorder.recording():
        losses = own_losses(net, x)
    return recorder.gradients(losses)


def slow(net, x, names):
    return per_sample_gradients(net, names, lambda net, one: own_losses(net, one).sum(), x)


def assert_convolution(axes, arguments, x):
    with warnings.catch_warnings():
        # torch says that an even kernel with padding="same" may copy the input.
        warnings.filterwarnings("ignore", message="Using padding='same'")
        layers = {"layer": lambda: CONVOLUTIONS[axes - 1](**arguments)}
        net = Net(layers, lambda net, x: net.layer(x))
        (found,), (expected,) = capture(net, x), slow(net, x, ["layer"])
    assert isinstance(found, Convolved)
    assert found.full_shape == full_shape(net.layer)
    assert_gradients(found, expected)
    return found, expected


@pytest.mark.parametrize("axes", [1, 2, 3])
@settings(max_examples=100)
@given(data=st.data(), n=st.integers(1, 3), seed=st.integers(0, 99))
def test_convolution(axes, data, n, seed):
    arguments, image = data.draw(convolutions(axes))
    found, expected = assert_convolution(
        axes, arguments, normal(n, arguments["in_channels"], *image, seed=seed)
    )
    left = normal(expected.shape[1], 3, seed=seed)
    right = normal(expected.shape[2], 2, seed=seed + 1)
    if arguments["groups"] == 1:
        projected = found.projected(left, right)
        assert isinstance(projected, OuterProducts)
        assert_gradients(projected, torch.einsum("ok,noc,cl->nkl", left, expected, right))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(axes, multiplier):
    arguments = {"in_channels": 3, "out_channels": 3 * multiplier, "groups": 3, "padding": 1}
    assert_convolution(axes, {**arguments, "kernel_size": 3}, normal(4, 3, *[4] * axes))


@pytest.mark.parametrize("mode", MODES)
def test_padding_as_large_as_the_image_allows(mode):
    # More than a kernel's worth: some patches see nothing but padding, or the same pixel often.
    padding = 2 if mode == "reflect" else 3
    arguments = {"in_channels": 1, "out_channels": 2, "kernel_size": 7, "padding_mode": mode}
    assert_convolution(1, {**arguments, "padding": padding}, normal(2, 1, 3))


def test_bound_holds_where_the_padding_repeats_one_pixel():
    layer = nn.Conv1d(1, 1, 7, padding=3, padding_mode="replicate", bias=False).double()
    found = Convolved(layer, [normal(2, 1, 1)], [normal(2, 1, 1, seed=1)])
    assert bool((found.bound() * (1 + 1e-12) >= found.squared_norms()).all())


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_patches_are_those_of_unfold(axes):
    # torch unfolds images only, so the others are an image with axes of one pixel.
    kernel, dilation, stride = (2, 3, 2)[:axes], (2, 1, 1)[:axes], (1, 2, 1)[:axes]
    layer = CONVOLUTIONS[axes - 1](2, 4, kernel, stride, 0, dilation)
    x = normal(4, 2, *(6, 5, 4)[:axes])[1:]  # as a part of the samples lies in memory
    positions = layer.double()(x).shape[2:]
    found = patches(layer, x, positions)
    assert found.shape == (3, 1, layer.weight[0].numel(), positions.numel())
    one_by_one = layer.weight.flatten(1) @ found[:, 0] + layer.bias[:, None]
    torch.testing.assert_close(one_by_one, layer(x).flatten(2))
    if axes == 2:
        torch.testing.assert_close(found[:, 0], F.unfold(x, kernel, dilation, 0, stride))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_padding_is_the_layers_own(axes, mode):
    layer = CONVOLUTIONS[axes - 1](2, 2, 3, padding=2, padding_mode=mode, bias=False).double()
    x = normal(2, 2, *[4] * axes)
    bare = CONVOLUTIONS[axes - 1](2, 2, 3, bias=False).double()
    bare.load_state_dict(layer.state_dict())
    torch.testing.assert_close(bare(padded_input(layer, x)), layer(x))


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a part of a larger image": lambda x: F.pad(x, (2, 1, 1, 3))[:, :, 1:-3, 2:-1],
    "one row for all": lambda x: x[:, :, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padding", [0, 1])
def test_layout_in_memory_does_not_matter(layout, padding):
    arguments = {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "groups": 2}
    x = LAYOUTS[layout](normal(3, 2, 5, 6))
    assert_convolution(2, {**arguments, "padding": padding}, x)


def shared(axes, groups=1):
    """Called at two sizes, the second on what the first returned."""
    make = {"conv": lambda: CONVOLUTIONS[axes - 1](2, 2, 3, padding=1, groups=groups)}
    shrink = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    return Net(make, lambda net, x: net.conv(shrink(net.conv(x).tanh(), 2)))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_called_at_two_sizes(axes, groups):
    net, x = shared(axes, groups), normal(3, 2, *[4] * axes)
    (found,), (expected,) = capture(net, x), slow(net, x, ["conv"])
    assert_gradients(found, expected)
    if groups == 1:
        left, right = normal(2, 3), normal(expected.shape[2], 2, seed=1)
        target = torch.einsum("ok,noc,cl->nkl", left, expected, right)
        assert_gradients(found.projected(left, right), target)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_frames_folded_into_the_batch(axes):
    layers = {"conv": lambda: CONVOLUTIONS[axes - 1](1, 2, 2)}
    net = Net(layers, lambda net, x: net.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
    x = normal(4, 3, 1, *[4] * axes)
    assert_gradients(capture(net, x)[0], slow(net, x, ["conv"])[0])


def test_a_cache_keeps_the_gradients_and_not_the_images():
    net, x = shared(2), normal(3, 2, 4, 4)
    (found,), (expected,) = capture(net, x), slow(net, x, ["conv"])
    kept = found.tensors()
    assert {name: tensor.shape for name, tensor in kept.items()} == {"gradients": expected.shape}


def test_parts_are_smaller_for_large_images():
    # What is unfolded is forty times as large as the gradient, so a part holds fewer samples.
    layer = nn.Conv2d(1, 1, 3, bias=False)
    sizes = []
    for side in (3, 34):
        x = torch.randn(64, 1, side, side)
        found = Convolved(layer, [x], [torch.randn(64, 1, side - 2, side - 2)])
        parts = [part for _, part in found.parts(9 * 64)]
        assert all(isinstance(part, Materialised) for part in parts)
        sizes.append(len(parts[0]))
    assert sizes[0] == 64
    assert sizes[1] == 1


def test_padding_that_was_changed_after_construction_counts_as_it_is():
    net = Net({"layer": lambda: nn.Conv2d(2, 3, 3, padding=1)}, lambda net, x: net.layer(x))
    net.layer.padding = (0, 2)
    x = normal(3, 2, 6, 6)
    (found,) = capture(net, x)
    assert_gradients(found, slow(net, x, ["layer"])[0])


def test_an_output_of_an_unexpected_size_is_refused():
    layer = nn.Conv1d(1, 1, 3)
    found = Convolved(layer, [torch.ones(2, 1, 8)], [torch.ones(2, 1, 7)])
    with pytest.raises(CaptureError, match=r"would return \[6\] positions returned \[7\]"):
        found.squared_norms()
