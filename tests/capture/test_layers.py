import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import (
    Net,
    assert_gradients,
    normal,
    own_losses,
    per_sample_gradients,
    tokens,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_dvc.capture.layers import LayerCapture, find_layers
from lightning_dvc.errors import CaptureError
from lightning_dvc.memory.near_duplicates import NearDuplicates

CLASSES = 3


def linear(*args, **kwargs):
    return lambda: nn.Linear(*args, **kwargs)


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


def capture(net, x, names=None):
    recorder = LayerCapture(find_layers(net, names))
    with recorder.recording():
        losses = own_losses(net, x)
    return recorder, losses


def expected_gradients(net, names, x):
    return per_sample_gradients(net, names, lambda net, one: own_losses(net, one).sum(), x)


def assert_captured(net, x, names, listed=None):
    recorder, losses = capture(net, x, listed)
    assert recorder.reached == names
    found = recorder.gradients(losses)
    for layer, expected in zip(found, expected_gradients(net, names, x), strict=True):
        assert_gradients(layer, expected)
    return recorder


# --- gradients in whole networks ---------------------------------------------------------------


def attention(net, x):
    """Mixes the tokens of a sample, never the samples."""
    queries, keys, values = net.query(x), net.key(x), net.value(x)
    mixed = (queries @ keys.transpose(1, 2)).softmax(2) @ values
    return net.head(mixed.mean(1))


def residual_in_place(net, x):
    hidden = net.first(x)
    hidden += F.relu(net.second(hidden.tanh()))
    return net.head(hidden)


NETWORKS = {
    "mlp": (
        {"a": linear(4, 6), "b": linear(6, 5, bias=False), "c": linear(5, CLASSES)},
        lambda net, x: net.c(net.b(net.a(x).relu()).tanh()),
        (4,),
        ["a", "b", "c"],
    ),
    "in-place activations": (
        {"a": linear(4, 6), "relu": lambda: nn.ReLU(inplace=True), "b": linear(6, CLASSES)},
        lambda net, x: net.relu(net.b(net.relu(net.a(x)))),
        (4,),
        ["a", "b"],
    ),
    "in-place residual": (
        {"first": linear(4, 5), "second": linear(5, 5), "head": linear(5, CLASSES)},
        residual_in_place,
        (4,),
        ["first", "second", "head"],
    ),
    "cnn": (
        {
            "a": conv(1, 3, 3, stride=2, padding=1),
            "b": conv(3, 2, 3, padding="same", padding_mode="circular"),
            "c": linear(2 * 4 * 4, CLASSES),
        },
        lambda net, x: net.c(net.b(F.relu(net.a(x), inplace=True)).tanh().flatten(1)),
        (1, 7, 8),
        ["a", "b", "c"],
    ),
    "attention": (
        {
            "key": linear(4, 3, bias=False),
            "query": linear(4, 3),
            "value": linear(4, 5),
            "head": linear(5, CLASSES),
        },
        attention,
        (6, 4),
        ["query", "key", "value", "head"],
    ),
    "called twice": (
        {"shared": linear(4, 4), "head": linear(4, CLASSES)},
        lambda net, x: net.head(net.shared(net.shared(x).tanh()).relu()),
        (4,),
        ["shared", "head"],
    ),
    "called on tokens and on their mean": (
        {"shared": linear(4, 4, bias=False), "head": linear(4, CLASSES)},
        lambda net, x: net.head(net.shared(net.shared(x).tanh().mean(1)).relu()),
        (3, 4),
        ["shared", "head"],
    ),
    "convolution called at two sizes": (
        {"shared": conv(2, 2, 3, padding=1), "head": linear(2, CLASSES)},
        lambda net, x: net.head(
            net.shared(F.avg_pool2d(net.shared(x).relu(), 2)).tanh().mean((2, 3))
        ),
        (2, 6, 4),
        ["shared", "head"],
    ),
    "tokens and in-place activations": (
        {"a": linear(4, 6), "b": linear(6, 5, bias=False), "c": linear(5, CLASSES)},
        lambda net, x: net.c(net.b(net.a(x).relu_()).tanh_().mean(1)).relu_(),
        (6, 4),
        ["a", "b", "c"],
    ),
    "tokens and an in-place residual": (
        {"first": linear(4, 5), "second": linear(5, 5), "head": linear(5, CLASSES)},
        residual_in_place,
        (2, 3, 4),
        ["first", "second", "head"],
    ),
    "by keyword": (
        {"a": linear(4, 3), "b": linear(3, CLASSES)},
        lambda net, x: net.b(input=net.a(input=x).tanh()),
        (4,),
        ["a", "b"],
    ),
    "output that the loss does not use": (
        {"a": linear(4, 3), "aside": linear(3, 2), "b": linear(3, CLASSES)},
        lambda net, x: [hidden := net.a(x).tanh(), net.aside(hidden), net.b(hidden)][-1],
        (4,),
        ["a", "aside", "b"],
    ),
    "checkpointed": (
        {"a": linear(4, 5), "b": linear(5, 5), "c": linear(5, CLASSES)},
        lambda net, x: net.c(
            checkpoint(lambda h: net.b(h.tanh()).relu(), net.a(x), use_reentrant=False)
        ),
        (4,),
        ["a", "b", "c"],
    ),
    "partly checkpointed convolutions": (
        {"a": conv(1, 2, 3, padding=1), "b": conv(2, 4, 3, groups=2), "c": linear(4, CLASSES)},
        lambda net, x: net.c(
            checkpoint(
                lambda x: net.b(net.a(x).relu_()).tanh_().mean((2, 3)), x, use_reentrant=False
            )
        ),
        (1, 5, 5),
        ["a", "b", "c"],
    ),
    "frames folded into the batch": (
        {"a": linear(4, 3), "b": linear(3, CLASSES)},
        lambda net, x: net.b(net.a(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2]).mean(1)),
        (3, 4),
        ["a", "b"],
    ),
    "images folded into the batch": (
        {"a": conv(1, 2, 3, padding=1), "b": linear(2, CLASSES)},
        lambda net, x: net.b(
            net.a(x.flatten(0, 1)).tanh().mean((2, 3)).unflatten(0, x.shape[:2]).mean(1)
        ),
        (3, 1, 4, 4),
        ["a", "b"],
    ),
}


def build(name):
    layers, forward, sample, order = NETWORKS[name]
    return Net(layers, forward), normal(5, *sample, seed=3), order


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    net, x, order = build(name)
    assert_captured(net, x, order)


@pytest.mark.parametrize("frozen", [["a"], ["b"], ["a", "b"], ["a", "b", "c"]])
def test_frozen_layers_are_captured_by_name(frozen):
    net, x, order = build("mlp")
    for layer in frozen:
        net.get_submodule(layer).requires_grad_(False)
    # The order of the list does not matter, the forward pass tells it.
    assert_captured(net, x, order, listed=order[::-1])
    if len(frozen) < 3:
        assert_captured(net, x, [layer for layer in order if layer not in frozen])


def test_frozen_convolution_is_captured_by_name():
    net, x, order = build("cnn")
    net.a.requires_grad_(False)
    assert_captured(net, x, order, listed=order)


def test_one_layer_of_many_by_name():
    net, x, _ = build("cnn")
    assert_captured(net, x, ["b"], listed=["b"])


def test_layer_of_a_normalised_network_in_eval():
    layers = {
        "a": conv(1, 2, 3),
        "bn": lambda: nn.BatchNorm2d(2),
        "ln": lambda: nn.LayerNorm(2),
        "c": linear(2, CLASSES),
    }
    net = Net(layers, lambda net, x: net.c(net.ln(net.bn(net.a(x)).relu().mean((2, 3)))))
    net.train()(normal(8, 1, 5, 5))  # running statistics that are not those of a new layer
    assert_captured(net.eval(), normal(4, 1, 5, 5), ["a", "c"])  # without normalisations
    assert_captured(net, normal(4, 1, 5, 5), ["a", "bn", "ln", "c"], ["c", "ln", "bn", "a"])


def test_the_module_may_be_the_layer():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2, dtype=torch.float64), normal(4, 3)
    recorder, losses = capture(net, x)
    assert recorder.reached == [""]
    assert_gradients(recorder.gradients(losses)[0], expected_gradients(net, [""], x)[0])


def test_half_precision_is_widened():
    net, x, _ = build("mlp")
    recorder, losses = capture(net.bfloat16(), x.bfloat16())
    kept = [g.squared_norms() for g in recorder.gradients(losses)]
    kept += [*recorder.representations(5), recorder.fingerprints(5)]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


def gradients_through_half(size):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)), normal(5, 4).float()
    exact, half = net.double(), copy.deepcopy(net).half()
    found = []
    for model, given in ((exact, x.double()), (half, x.half())):
        recorder = LayerCapture(find_layers(model))
        with recorder.recording():
            losses = model(given).float().square().sum(1) * size
        found.append(
            [layer.squared_norms().double().sqrt() for layer in recorder.gradients(losses)]
        )
    return found


# As of a mean over an image of 1000 x 1000 pixels; and too large to be scaled as well.
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
def test_float16_keeps_gradients_that_are_small_or_large(size):
    for exact, half in zip(*gradients_through_half(size), strict=True):
        assert torch.allclose(half, exact, rtol=0.02)


# --- nothing is left behind, nothing is changed ------------------------------------------------


def hooks(net):
    return sum(len(layer._forward_hooks) for layer in net.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_recording_changes_no_loss(name):
    net, x, _ = build(name)
    losses = capture(net, x)[1]
    assert torch.equal(losses, own_losses(net, x))


def test_no_gradient_of_a_parameter_is_touched():
    net, x, _ = build("cnn")
    net.a.weight.grad = torch.ones_like(net.a.weight)
    recorder, losses = capture(net, x)
    recorder.gradients(losses)
    assert torch.equal(net.a.weight.grad, torch.ones_like(net.a.weight))
    assert net.b.weight.grad is None
    assert not any(g.squared_norms().requires_grad for g in recorder.gradients(capture(net, x)[1]))


def test_hooks_are_gone_afterwards():
    net, x, _ = build("mlp")
    recorder = LayerCapture(find_layers(net))
    with recorder.recording():
        assert hooks(net) == 3
    assert hooks(net) == 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), recorder.recording():
        net(x[:, :2])
    assert hooks(net) == 0


def test_hooks_of_others_stay_and_see_the_output():
    net, x, _ = build("mlp")
    seen = []
    net.b.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    capture(net, x)
    assert hooks(net) == 1
    torch.testing.assert_close(seen[0], net.b(net.a(x).relu()))


def test_each_recording_starts_anew():
    net, x, order = build("called twice")
    recorder = LayerCapture(find_layers(net))
    assert recorder.reached == []
    for seed in range(2):
        batch = x + seed
        with recorder.recording():
            losses = own_losses(net, batch)
        expected = expected_gradients(net, order, batch)
        for found, full in zip(recorder.gradients(losses), expected, strict=True):
            assert_gradients(found, full)
        assert torch.equal(recorder.fingerprints(5), batch)


def test_recording_without_gradients():
    net, x, order = build("mlp")
    with_gradients = capture(net, x)[0]
    with torch.no_grad():
        recorder = capture(net, x)[0]
    assert recorder.reached == order
    for found, expected in zip(
        recorder.representations(5), with_gradients.representations(5), strict=True
    ):
        assert torch.equal(found, expected)


# --- representations and fingerprints ----------------------------------------------------------


def test_representation_is_what_the_next_layer_receives_and_the_last_output():
    net, x, _ = build("in-place activations")
    first = F.relu(net.a(x))
    # The activation after the last layer is not part of its output, though it works in place.
    expected = [first, net.b(first)]
    found = capture(net, x)[0].representations(5)
    for h, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)
        assert not h.requires_grad


def test_representation_follows_the_captured_layers_only():
    net, x, _ = build("mlp")
    recorder = capture(net, x, ["a", "c"])[0]
    received = net.b(net.a(x).relu()).tanh()
    for h, slow in zip(recorder.representations(5), [received, net.c(received)], strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)


def test_maps_and_tokens_are_averaged():
    net, x, _ = build("cnn")
    maps = F.relu(net.a(x))
    flat = net.b(maps).tanh().flatten(1)
    expected = [maps.mean((2, 3)), flat, net.c(flat)]
    for h, slow in zip(capture(net, x)[0].representations(5), expected, strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)

    net, x, _ = build("attention")
    found = capture(net, x, ["query", "value"])[0].representations(5)
    expected = [x.mean(1), net.value(x).mean(1)]
    for h, slow in zip(found, expected, strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)


def test_last_layer_that_is_a_convolution_is_averaged():
    net = Net({"a": conv(1, 2, 3), "b": conv(2, 3, 2)}, lambda net, x: net.b(net.a(x).tanh()))
    x = normal(4, 1, 6, 6)
    expected = [net.a(x).tanh().mean((2, 3)), net(x).mean((2, 3))]
    for h, slow in zip(capture(net, x)[0].representations(4), expected, strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)


def test_images_folded_into_the_batch_have_one_representation_per_sample():
    layers, _, sample, _ = NETWORKS["images folded into the batch"]
    layers = {**layers, "c": conv(2, 2, 1)}
    net = Net(layers, lambda net, x: net.c(net.a(x.flatten(0, 1)).relu()).unflatten(0, (5, 3)))
    x = normal(5, *sample)
    recorder = capture(net, x, ["a", "c"])[0]
    received = net.a(x.flatten(0, 1)).relu()
    expected = [t.unflatten(0, (5, 3)).mean((1, 3, 4)) for t in (received, net.c(received))]
    for h, slow in zip(recorder.representations(5), expected, strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)
    assert len(recorder.fingerprints(5)) == 5


def test_fingerprints_are_the_features():
    net, x, _ = build("mlp")
    assert torch.equal(capture(net, x)[0].fingerprints(5), x)
    net.a.weight.data += 1
    assert torch.equal(capture(net, x)[0].fingerprints(5), x)


def test_fingerprints_of_sequences_have_one_size_whatever_the_length():
    net, x, _ = build("attention")
    found = capture(net, x)[0].fingerprints(5)
    slow = F.adaptive_avg_pool1d(x.transpose(1, 2), 8).flatten(1)
    torch.testing.assert_close(found, slow)
    longer = torch.cat([x, x, x], dim=1)
    assert capture(net, longer)[0].fingerprints(5).shape == found.shape


def series(length):
    net = Net({"a": lambda: nn.Conv1d(3, 2, 3, padding=1)}, lambda net, x: net.a(x))
    x = normal(5, 3, length)
    return x, capture(net, x)[0].fingerprints(5)


@pytest.mark.parametrize("length", [1, 5, 7, 8])
def test_fingerprints_of_short_series_are_filled_up(length):
    x, found = series(length)
    assert found.shape == (5, 24)
    assert torch.equal(found[:, : 3 * length], x.flatten(1))
    assert not found[:, 3 * length :].any()
    # What they are filled up with changes no code.
    filled, alone = (NearDuplicates(0.1, seed=0).codes(f) for f in (found, x.flatten(1)))
    assert torch.equal(filled, alone)


def test_fingerprints_of_long_series_have_the_size_of_short_ones():
    x, found = series(12)
    torch.testing.assert_close(found, F.adaptive_avg_pool1d(x, 8).flatten(1))


@pytest.mark.parametrize(("image", "width"), [((16, 24), 64), ((4, 16), 32), ((5, 6), 30)])
def test_fingerprints_of_images_are_bounded(image, width):
    net = Net({"a": conv(1, 1, 3)}, lambda net, x: net.a(x))
    x = normal(3, 1, *image)
    found = capture(net, x)[0].fingerprints(3)
    assert found.shape == (3, width)
    rows, columns = (side // 8 if side % 8 == 0 else 1 for side in image)
    blocks = x.unfold(2, rows, rows).unfold(3, columns, columns).mean((4, 5))
    torch.testing.assert_close(found, blocks.flatten(1))


# --- networks of tokens ------------------------------------------------------------------------


def words(padding=0, **layers):
    layers = {"words": lambda: nn.Embedding(9, 4, padding_idx=padding), **layers}
    return {**layers, "head": linear(4, CLASSES)}


def test_embedding_first():
    net = Net(words(), lambda net, x: net.head(net.words(x).tanh().mean(1)))
    x = tokens(5, 6, below=9)
    recorder = assert_captured(net, x, ["words", "head"])
    received = net.words(x).tanh().mean(1)
    expected = [received, net.head(received)]
    for h, slow in zip(recorder.representations(5), expected, strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)


def with_places(places):
    """Words and the places they stand at."""
    layers = words(places=lambda: nn.Embedding(6, 4))
    return Net(layers, lambda net, x: net.head((net.words(x) + places(net, x)).tanh().mean(1)))


@pytest.mark.parametrize("shape", [(1, 6), (6,)])
@pytest.mark.parametrize("n", [4, 5])
def test_embedding_of_places_is_shared_and_forgotten(shape, n):
    net = with_places(lambda net, x: net.places(torch.arange(6).reshape(shape)))
    x = tokens(n, 6, below=9)
    recorder, losses = capture(net, x)
    assert recorder.reached == ["words", "places", "head"]
    assert recorder.forget_shared(n) == ["places"]
    assert recorder.reached == ["words", "head"]
    found = recorder.gradients(losses)
    for layer, expected in zip(found, expected_gradients(net, ["words", "head"], x), strict=True):
        assert_gradients(layer, expected)
    mixed = (net.words(x) + net.places(torch.arange(6))).tanh().mean(1)
    for h, slow in zip(recorder.representations(n), [mixed, net.head(mixed)], strict=True):
        torch.testing.assert_close(h, slow, rtol=1e-12, atol=0)


def test_embedding_of_places_that_belong_to_the_samples_is_kept():
    net = with_places(lambda net, x: net.places(torch.arange(6).expand(len(x), 6)))
    x = tokens(5, 6, below=9)
    recorder = assert_captured(net, x, ["words", "places", "head"])
    assert recorder.forget_shared(5) == []
    # What an embedding receives has no features, so the layer before it shows its own output.
    assert torch.equal(recorder.representations(5)[0], net.words(x).mean(1))


@pytest.mark.parametrize("n", [3, 4])
def test_layer_of_something_that_all_samples_share_is_forgotten(n):
    layers = {"a": linear(4, 4), "shared": linear(2, 4), "b": linear(4, CLASSES)}
    vector = normal(2)  # one without a batch, of 4 outputs
    net = Net(layers, lambda net, x: net.b(net.a(x) * net.shared(vector)))
    recorder, losses = capture(net, normal(n, 4))
    assert recorder.forget_shared(n) == ["shared"]
    found = recorder.gradients(losses)
    for layer, expected in zip(
        found, expected_gradients(net, ["a", "b"], normal(n, 4)), strict=True
    ):
        assert_gradients(layer, expected)


def fingerprints(net, x):
    return capture(net, x)[0].fingerprints(len(x))


def test_fingerprints_of_tokens_do_not_change_while_the_embedding_trains():
    net = Net(words(), lambda net, x: net.head(net.words(x).mean(1)))
    x = tokens(5, 6, below=9)
    before = fingerprints(net, x)
    net.words.weight.data += 1
    assert torch.equal(fingerprints(net, x), before)
    assert before.isfinite().all()
    # Nor do they depend on what else draws random numbers, or on the seed.
    torch.manual_seed(5)
    assert torch.equal(fingerprints(net, x), before)


@pytest.mark.parametrize("padding", [0, 5])
def test_fingerprints_of_tokens_leave_padding_out(padding):
    net = Net(words(padding), lambda net, x: net.head(net.words(x).mean(1)))
    x = tokens(5, 6, below=9)
    longer = F.pad(x, (2, 3), value=padding)
    torch.testing.assert_close(fingerprints(net, longer), fingerprints(net, x))
    nothing = fingerprints(net, torch.full((2, 3), padding))
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_fingerprints_of_tokens_count_what_is_no_padding():
    layers = {**words(), "words": lambda: nn.Embedding(9, 4)}
    net = Net(layers, lambda net, x: net.head(net.words(x).mean(1)))
    x = tokens(5, 6, below=9)
    found = fingerprints(net, x)
    assert not torch.allclose(fingerprints(net, F.pad(x, (0, 3))), found)
    # A bag of words: their order does not matter, but how often each occurs does.
    torch.testing.assert_close(fingerprints(net, x.flip(1)), found)
    torch.testing.assert_close(fingerprints(net, torch.cat([x, x], dim=1)), found)
    one_by_one = torch.stack([fingerprints(net, x[:, i : i + 1]) for i in range(6)])
    torch.testing.assert_close(found, one_by_one.mean(0))
    apart = torch.cdist(fingerprints(net, torch.arange(9)[:, None]), one_by_one[0])
    assert bool((apart.sort(dim=0).values[1:] > 1).all())  # each token is like itself alone


# --- which layers ------------------------------------------------------------------------------


def test_layers_are_found_in_the_order_of_definition():
    layers = {
        "z": linear(2, 2),
        "bn": lambda: nn.BatchNorm1d(2),
        "block": lambda: nn.Sequential(nn.Conv3d(2, 2, 1, groups=2), nn.Linear(2, 2)),
        "embedding": lambda: nn.Embedding(3, 2),
        "ln": lambda: nn.LayerNorm(2),
        "a": lambda: nn.Conv1d(2, 2, 1),
    }
    net = Net(layers, lambda net, x: x)
    assert list(find_layers(net)) == ["z", "block.0", "block.1", "embedding", "a"]
    net.z.requires_grad_(False)
    net.embedding.requires_grad_(False)
    assert list(find_layers(net)) == ["block.0", "block.1", "a"]
    found = find_layers(net, ["z", "block.0", "bn"])
    assert list(found.items()) == [("z", net.z), ("block.0", net.block[0]), ("bn", net.bn)]


def test_shared_layer_is_found_once():
    net = Net({"a": linear(2, 2)}, lambda net, x: x)
    net.again = net.a
    assert list(find_layers(net)) == ["a"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()),
        lambda: nn.Linear(2, 2).requires_grad_(False),
        lambda: nn.LSTM(2, 2),
        lambda: nn.Embedding(3, 2, max_norm=1.0),
        nn.ReLU,
    ],
)
def test_model_without_a_layer_to_capture_is_refused(make):
    with pytest.raises(CaptureError, match=r"no trainable layer .*Embedding; .*layers=\[\.\.\.\]"):
        find_layers(make())


def test_missing_name_is_refused_and_the_known_ones_are_listed():
    net, _, _ = build("in-place activations")
    with pytest.raises(CaptureError, match=r"'c' does not exist.*\['a', 'b'\]"):
        find_layers(net, ["a", "c"])


class WithOwnParameter(nn.Module):
    """A block and a model of one: a parameter beside its layers."""

    def __init__(self, *blocks):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(blocks)


def test_all_that_trains_and_is_left_out_is_named_once():
    net = WithOwnParameter(WithOwnParameter(), nn.LSTM(2, 2), nn.LayerNorm(2))
    net.blocks[0].layer.weight.requires_grad_(False)  # its bias trains on
    with pytest.warns(UserWarning, match="trainable parameters") as caught:
        assert list(find_layers(net)) == ["layer"]
    assert [str(warning.message) for warning in caught] == [
        "trainable parameters of the module itself (a WithOwnParameter), blocks.0 (a "
        "WithOwnParameter), blocks.0.layer (its weight is frozen), blocks.1 (a LSTM) are not "
        "captured and do not count in any metric"
    ]
    net.requires_grad_(False)
    net.layer.requires_grad_(True)
    assert list(find_layers(net)) == ["layer"]  # what does not train is not missed


def test_named_layers_are_found_without_a_warning():
    net = WithOwnParameter(nn.LSTM(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(find_layers(net, ["layer"])) == ["layer"]


def test_an_input_that_is_overwritten_is_told_and_can_be_copied():
    def overwrite(net, x):
        hidden = net.first(x)
        out = net.frozen(hidden)
        return out.sin() + (hidden.mul_(2) if net.in_place else hidden * 2)

    names = ["first", "frozen"]
    net, x = Net(dict.fromkeys(names, linear(3, 3)), overwrite), normal(4, 3)
    net.in_place = False
    net.frozen.requires_grad_(False)
    true = expected_gradients(net, names, x)
    net.in_place = True
    recorder, _ = capture(net, x, names)
    assert recorder.overwritten == ["frozen"]
    recorder = LayerCapture(find_layers(net, names), copied=["frozen"])
    with recorder.recording():
        losses = own_losses(net, x)
    assert recorder.overwritten == []
    for layer, expected in zip(recorder.gradients(losses), true, strict=True):
        assert_gradients(layer, expected)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * self.weight.gt(0), self.bias)


class Causal(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0)))


@pytest.mark.parametrize("own", [lambda: Masked(3, 3), lambda: Causal(3, 3, 3)])
def test_a_subclass_that_computes_otherwise_is_left_out_and_refused_by_name(own):
    net = nn.Sequential(own(), nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="with a forward pass of its own"):
        assert list(find_layers(net)) == ["1"]
    with pytest.raises(CaptureError, match="with a forward pass of its own"):
        find_layers(net, ["0"])


def test_a_subclass_that_computes_as_usual_is_captured():
    class Named(nn.Linear):
        pass

    assert list(find_layers(nn.Sequential(Named(2, 2)))) == ["0"]


@pytest.mark.parametrize("bias", [True, False])
def test_parametrised_layers_are_found_and_their_parts_are_not_named(bias):
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3, bias=bias)))
    assert list(find_layers(net)) == ["0"]


def test_layers_that_share_a_weight_are_named():
    net = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    net["head"].weight = net["tokens"].weight
    with pytest.warns(UserWarning, match=r"\[\['tokens', 'head'\]\] share one weight"):
        find_layers(net)


def test_a_shared_layer_can_be_named_by_either_name():
    layer = nn.Linear(2, 2)
    assert list(find_layers(nn.ModuleDict({"a": layer, "b": layer}), ["b"])) == ["b"]


@pytest.mark.parametrize("positions", [1, 2, 9])
def test_fingerprints_of_sequences_of_one_position_have_the_usual_size(positions):
    net = Net({"layer": linear(3, 3)}, lambda net, x: net.layer(x))
    recorder, _ = capture(net, normal(4, positions, 3))
    assert recorder.fingerprints(4).shape == (4, 24)
