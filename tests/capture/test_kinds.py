import copy

import pytest
import torch
from helpers.oracles import (
    Net,
    assert_gradients,
    normal,
    own_losses,
    per_sample_gradients,
    tokens,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dvc.capture.gradients import Materialised, OuterProducts
from lightning_dvc.capture.kinds import full_shape, kind_of
from lightning_dvc.capture.layers import LayerCapture, find_layers
from lightning_dvc.capture.scattered import Scattered
from lightning_dvc.errors import CaptureError


def capture(net, x, names=("layer",)):
    recorder = LayerCapture(find_layers(net, names))
    with recorder.recording():
        losses = own_losses(net, x)
    assert recorder.reached == list(names)
    return recorder.gradients(losses)


def slow(net, x, names=("layer",)):
    return per_sample_gradients(net, names, lambda net, one: own_losses(net, one).sum(), x)


def assert_captured(net, x, names=("layer",)):
    captured = capture(net, x, names)
    for name, found, expected in zip(names, captured, slow(net, x, names), strict=True):
        assert_gradients(found, expected)
        assert found.full_shape == full_shape(net.get_submodule(name))
    return captured[0]


def alone(make):
    return Net({"layer": make}, lambda net, x: net.layer(x))


def moved(make):
    """Of a normalisation, with running statistics that are not those of a new layer."""

    def build():
        layer = make()
        if getattr(layer, "running_mean", None) is not None:
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.3, 3)
        return layer

    return build


# --- linear layers and embeddings --------------------------------------------------------------


@settings(max_examples=60)
@given(
    n=st.integers(1, 4),
    positions=st.lists(st.integers(1, 3), max_size=3),
    d_in=st.integers(1, 4),
    d_out=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear(n, positions, d_in, d_out, bias, seed):
    net = alone(lambda: nn.Linear(d_in, d_out, bias=bias))
    assert isinstance(assert_captured(net, normal(n, *positions, d_in, seed=seed)), OuterProducts)


@settings(max_examples=80)
@given(
    n=st.integers(1, 4),
    positions=st.lists(st.integers(1, 4), max_size=3),
    n_tokens=st.integers(1, 5),
    d=st.integers(1, 3),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_embedding(n, positions, n_tokens, d, data, seed):
    # Few tokens, so that most samples repeat one.
    padding = data.draw(st.none() | st.integers(-n_tokens, n_tokens - 1))
    dtype = data.draw(st.sampled_from([torch.int64, torch.int32]))
    net = alone(lambda: nn.Embedding(n_tokens, d, padding_idx=padding))
    x = tokens(n, *positions, below=n_tokens, seed=seed).to(dtype)
    assert isinstance(assert_captured(net, x), Scattered)


def test_embedding_whose_samples_are_padding_only():
    net, x = alone(lambda: nn.Embedding(4, 2, padding_idx=1)), torch.ones(3, 2, dtype=torch.int64)
    assert assert_captured(net, x).squared_norms().tolist() == [0, 0, 0]


def test_embedding_and_linear_layer_that_share_their_weight():
    # Each is captured for what it does with it, as if the other had a weight of its own.
    net = Net(
        {"layer": lambda: nn.Embedding(5, 3), "head": lambda: nn.Linear(3, 5, bias=False)},
        lambda net, x: net.head(net.layer(x).mean(1)),
    )
    x = tokens(4, 3, below=5)
    net.layer.weight.data.copy_(net.head.weight.data)
    apart = slow(net, x, ("layer", "head"))
    net.layer.weight = net.head.weight
    captured = capture(net, x, ("layer", "head"))
    for found, expected in zip(captured, apart, strict=True):
        assert_gradients(found, expected)


# --- normalisations ----------------------------------------------------------------------------

CHANNELS = 4
AXES = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
@settings(max_examples=40)
@given(
    n=st.integers(1, 4),
    positions=st.lists(st.integers(1, 3), max_size=2),
    # The deviation of one number from its own mean is 0, give or take a rounding.
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=2).filter(
        lambda x: x not in ([1], [1, 1])
    ),
    bias=st.booleans(),
    eps=st.sampled_from([1e-5, 0.5]),
    seed=st.integers(0, 99),
)
def test_norms_of_the_last_axes(make, n, positions, shape, bias, eps, seed):
    if make is nn.LayerNorm:
        net = alone(lambda: nn.LayerNorm(shape, eps=eps, bias=bias))
    else:
        net = alone(lambda: nn.RMSNorm(shape, eps=eps if bias else None))
    found = assert_captured(net, normal(n, *positions, *shape, seed=seed))
    assert isinstance(found, Materialised)
    assert found.full_shape[1] == 1 + (make is nn.LayerNorm and bias)


@settings(max_examples=40)
@given(
    n=st.integers(1, 4),
    image=st.lists(st.integers(1, 3), max_size=3),
    groups=st.sampled_from([1, 2, CHANNELS]),
    eps=st.sampled_from([1e-5, 0.5]),
    seed=st.integers(0, 99),
)
def test_group_norm(n, image, groups, eps, seed):
    assume(groups < CHANNELS or torch.Size(image).numel() > 1)  # torch refuses one number
    net = alone(lambda: nn.GroupNorm(groups, CHANNELS, eps=eps))
    assert_captured(net, normal(n, CHANNELS, *image, seed=seed))


@pytest.mark.parametrize("axes", [1, 2, 3])
@settings(max_examples=25)
@given(
    n=st.integers(1, 4),
    image=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    flat=st.booleans(),
    eps=st.sampled_from([1e-5, 0.5]),
    seed=st.integers(0, 99),
)
def test_batch_norm_in_eval(axes, n, image, flat, eps, seed):
    # A BatchNorm1d takes features without positions as well.
    image = [] if flat and axes == 1 else image[:axes]
    net = alone(moved(lambda: AXES[axes](CHANNELS, eps=eps)))
    assert_captured(net, normal(n, CHANNELS, *image, seed=seed))


# --- every type --------------------------------------------------------------------------------

# A layer, the shape of a sample, and whether it is made of tokens.
EVERY = {
    "Linear": (lambda: nn.Linear(4, 4), (4,)),
    "Linear of tokens": (lambda: nn.Linear(4, 4), (3, 4)),
    "Linear of tokens without bias": (lambda: nn.Linear(4, 4, bias=False), (3, 4)),
    "Linear of a grid": (lambda: nn.Linear(4, 4), (2, 3, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), (4, 4, 3)),
    "Conv3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (4, 3, 2, 2)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 4, 3)),
    "Embedding": (lambda: nn.Embedding(5, 4, padding_idx=1), (6,)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (3, 4)),
    "LayerNorm of two axes": (lambda: nn.LayerNorm([3, 4], bias=False), (2, 3, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (3, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (4, 3, 2)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (4, 5)),
    "BatchNorm1d of features": (lambda: nn.BatchNorm1d(4), (4,)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (4, 3, 2)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (4, 3, 2, 2)),
}
SAME_SIZE = [kind for kind in EVERY if kind != "Embedding"]


def batch(kind, n=4):
    shape = EVERY[kind][1]
    return tokens(n, *shape, below=5) if kind == "Embedding" else normal(n, *shape)


def wrapped(kind, forward):
    return Net({"layer": moved(EVERY[kind][0])}, forward)


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("frozen", [False, True])
def test_followed_by_an_in_place_activation(kind, frozen):
    net = wrapped(kind, lambda net, x: nn.functional.relu(net.layer(x), inplace=True))
    net.requires_grad_(not frozen)
    assert_captured(net, batch(kind))


@pytest.mark.parametrize("kind", EVERY)
def test_followed_by_an_in_place_residual(kind):
    def forward(net, x):
        hidden = net.layer(x)
        hidden += x.double()[:, :, None] if kind == "Embedding" else x
        hidden *= 2
        return hidden

    assert_captured(wrapped(kind, forward), batch(kind))


@pytest.mark.parametrize("kind", EVERY)
def test_whose_output_is_a_view_that_is_overwritten(kind):
    def forward(net, x):
        hidden = net.layer(x)
        hidden[:, -1:].tanh_()
        return hidden

    assert_captured(wrapped(kind, forward), batch(kind))


@pytest.mark.parametrize("kind", SAME_SIZE)
@pytest.mark.parametrize("frozen", [False, True])
def test_called_twice(kind, frozen):
    net = wrapped(kind, lambda net, x: net.layer(net.layer(x).relu()))
    net.requires_grad_(not frozen)
    assert_captured(net, batch(kind))


def test_embedding_called_twice_at_two_lengths():
    net = wrapped(
        "Embedding", lambda net, x: net.layer(x).sum(1) * net.layer(x[:, :2].flip(1)).prod(1)
    )
    assert_captured(net, batch("Embedding"))


@pytest.mark.parametrize("kind", EVERY)
def test_frames_folded_into_the_batch(kind):
    net = wrapped(kind, lambda net, x: net.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]))
    x = torch.stack([batch(kind, 8)[:4], batch(kind, 8)[4:]], dim=1)
    assert_captured(net, x)


@pytest.mark.parametrize("kind", EVERY)
def test_checkpointed(kind):
    net = wrapped(
        kind, lambda net, x: checkpoint(lambda x: net.layer(x).tanh(), x, use_reentrant=False)
    )
    assert_captured(net, batch(kind))


@pytest.mark.parametrize("kind", EVERY)
def test_output_that_no_loss_uses(kind):
    net = wrapped(kind, lambda net, x: [net.layer(x), x.double().requires_grad_() * 2][1])
    (found,) = capture(net, batch(kind))
    assert found.squared_norms().tolist() == [0] * 4
    assert torch.equal(found.sum(), torch.zeros(found.full_shape, dtype=torch.float64))


@pytest.mark.parametrize("kind", EVERY)
def test_half_precision_is_widened(kind):
    net = wrapped(kind, lambda net, x: net.layer(x).flatten(1)[:, :4])
    x = batch(kind)
    net.bfloat16().double()  # what half precision keeps
    x = x if kind == "Embedding" else x.bfloat16().double()
    (expected,) = slow(net, x)
    (found,) = capture(net.bfloat16(), x if kind == "Embedding" else x.bfloat16())
    gradients = found.formed().gradients
    assert gradients.dtype == found.squared_norms().dtype == found.dot(found.sum()).dtype
    assert gradients.dtype == torch.float32
    error = (gradients - expected).flatten(1).norm(dim=1)
    assert bool((error <= 0.1 * expected.flatten(1).norm(dim=1)).all())


@pytest.mark.parametrize("kind", SAME_SIZE)
def test_autocast_is_widened(kind):
    # Inputs and outputs of a layer then differ in precision.
    net = wrapped(kind, lambda net, x: net.layer(x).flatten(1)[:, :4]).float()
    recorder = LayerCapture(find_layers(net, ["layer"]))
    with torch.autocast("cpu", torch.bfloat16), recorder.recording():
        losses = own_losses(net, batch(kind).float())
    (found,) = recorder.gradients(losses)
    assert found.formed().gradients.dtype == torch.float32
    (expected,) = slow(copy.deepcopy(net).double(), batch(kind))
    error = (found.formed().gradients - expected).flatten(1).norm(dim=1)
    assert bool((error <= 0.2 * expected.flatten(1).norm(dim=1)).all())


@pytest.mark.parametrize("kind", EVERY)
def test_received_and_returned_are_averaged_over_positions(kind):
    net = wrapped(kind, lambda net, x: net.layer(x))
    x = batch(kind)
    recorder = LayerCapture(find_layers(net, ["layer"]))
    with recorder.recording():
        out = net(x)
    channels_first = isinstance(
        net.layer,
        nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.GroupNorm | nn.modules.batchnorm._BatchNorm,
    )

    def pooled(x):
        if channels_first:
            return x.flatten(2).mean(2) if x.ndim > 2 else x
        features = x.flatten(-2) if kind == "LayerNorm of two axes" else x
        return features.flatten(1, -2).mean(1) if features.ndim > 2 else features

    torch.testing.assert_close(recorder.representations(4)[0], pooled(out.detach()))
    received = kind_of(net.layer).received(net.layer, x, 4)
    if kind == "Embedding":
        assert received is None
    else:
        torch.testing.assert_close(received, pooled(x))


# --- several types in one network --------------------------------------------------------------


def encoder():
    """Words with their places, mixed by a convolution and by attention."""
    layers = {
        "words": lambda: nn.Embedding(9, 6, padding_idx=0),
        "norm": lambda: nn.LayerNorm(6),
        "mix": lambda: nn.Conv1d(6, 6, 3, padding=1, groups=2),
        "batch_norm": moved(lambda: nn.BatchNorm1d(6)),
        "query": lambda: nn.Linear(6, 4),
        "key": lambda: nn.Linear(6, 4, bias=False),
        "rms": lambda: nn.RMSNorm(6),
        "head": lambda: nn.Linear(6, 3),
    }

    def forward(net, x):
        h = net.norm(net.words(x))
        h = h + net.batch_norm(net.mix(h.mT)).relu_().mT
        weights = (net.query(h) @ net.key(h).mT).softmax(2)
        return net.head(net.rms(weights @ h).mean(1))

    return Net(layers, forward)


def test_layers_of_many_types_in_one_network():
    net = encoder()
    assert_captured(net, tokens(5, 7, below=9), list(dict(net.named_children())))


def images():
    layers = {
        "stem": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"),
        "norm": lambda: nn.GroupNorm(2, 4),
        "depthwise": lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4, bias=False),
        "batch_norm": moved(lambda: nn.BatchNorm2d(4)),
        "rows": lambda: nn.Conv1d(4, 3, 2),
        "head": lambda: nn.Linear(3, 3),
    }

    def forward(net, x):
        h = net.norm(net.stem(x)).relu_()
        h = h + net.batch_norm(net.depthwise(h)).relu_()
        return net.head(net.rows(h.mean(3)).mean(2).tanh_())

    return Net(layers, forward)


@pytest.mark.parametrize("frozen", [[], ["stem"], ["stem", "norm", "depthwise"]])
def test_image_network_with_its_first_layers_frozen(frozen):
    net = images()
    for name in frozen:
        net.get_submodule(name).requires_grad_(False)
    assert_captured(net, normal(4, 2, 6, 7), list(dict(net.named_children())))


def test_layer_under_no_grad_has_no_gradient_and_disturbs_no_other():
    def forward(net, x):
        first = net.layer(x).tanh()
        with torch.no_grad():
            target = net.teacher(first)
        return net.head(net.layer(first) - target)

    layers = {name: lambda: nn.Linear(3, 3) for name in ("layer", "teacher", "head")}
    net = Net(layers, forward)
    captured = capture(net, normal(4, 3), ["layer", "teacher", "head"])
    assert captured[1].squared_norms().tolist() == [0] * 4
    for found, expected in zip(
        captured, slow(net, normal(4, 3), ["layer", "teacher", "head"]), strict=True
    ):
        assert_gradients(found, expected)


# --- what is refused ---------------------------------------------------------------------------

REFUSED = {
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "max_norm rewrites its table"),
    "by frequency": (
        lambda: nn.Embedding(3, 2, scale_grad_by_freq=True),
        "scale_grad_by_freq makes a sample's gradient depend on its batch",
    ),
    "no statistics": (
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
        "without running statistics it mixes the samples of a batch",
    ),
    "no scale": (lambda: nn.LayerNorm(3, elementwise_affine=False), "it has no weight"),
    "no scale either": (lambda: nn.BatchNorm1d(3, affine=False), "it has no weight"),
    "not initialised": (lambda: nn.LazyLinear(3), "it is not initialised"),
    "recurrent": (lambda: nn.LSTM(3, 2), "a LSTM"),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 1), "a ConvTranspose2d"),
    "instance": (lambda: nn.InstanceNorm1d(3, affine=True), "a InstanceNorm1d"),
    "bag": (lambda: nn.EmbeddingBag(3, 2), "a EmbeddingBag"),
    "bilinear": (lambda: nn.Bilinear(2, 2, 2), "a Bilinear"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "a MultiheadAttention"),
    "no layer": (nn.ReLU, "a ReLU"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_named_layers_that_cannot_be_read_are_refused_with_a_reason(kind):
    make, reason = REFUSED[kind]
    net = nn.Sequential(nn.Linear(2, 2), make())
    with pytest.raises(CaptureError, match=rf"'1' is a .* cannot be captured \({reason}"):
        find_layers(net, ["0", "1"])


@pytest.mark.parametrize("kind", REFUSED)
def test_what_trains_and_cannot_be_read_is_named_in_a_warning(kind):
    make, reason = REFUSED[kind]
    net = nn.Sequential(nn.Linear(2, 2), make())
    # These have no parameter, or are normalisations, which nobody expects to be captured.
    if kind in ("no statistics", "no scale", "no scale either", "no layer"):
        assert list(find_layers(net)) == ["0"]
    else:
        with pytest.warns(UserWarning, match=rf"1 \({reason}.*not captured.*any metric"):
            assert list(find_layers(net)) == ["0"]


def test_projection_inside_attention_is_not_captured():
    net = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    names = r"1 \(a MultiheadAttention\), 1\.out_proj \(a NonDynamicallyQuantizableLinear\)"
    with pytest.warns(UserWarning, match=names):
        assert list(find_layers(net)) == ["0"]
    with pytest.raises(CaptureError, match=r"'1\.out_proj' is a NonDynamically"):
        find_layers(net, ["1.out_proj"])


@pytest.mark.parametrize("kind", EVERY)
def test_full_shape_is_known_from_the_layer_alone(kind):
    layer = EVERY[kind][0]()
    weight = layer.weight.numel()
    bias = layer.bias.numel() if getattr(layer, "bias", None) is not None else 0
    rows, columns = full_shape(layer)
    assert rows * columns == weight + bias


SUBCLASSES = {
    "Linear": type("Ours", (nn.Linear,), {}),
    "Conv1d": type("Ours", (nn.Conv1d,), {}),
    "LayerNorm": type("Ours", (nn.LayerNorm,), {}),
}


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_subclasses_are_read_like_their_parents(kind):
    layer = EVERY[kind][0]()
    kind_of_parent = kind_of(layer)
    layer.__class__ = SUBCLASSES[kind]
    assert kind_of(layer) is kind_of_parent
