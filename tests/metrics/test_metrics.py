import weakref
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import oracles
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.profiler import profile

from lightning_dvc.capture.convolution import Convolved
from lightning_dvc.capture.gradients import Materialised, OuterProducts
from lightning_dvc.capture.layers import LayerCapture, find_layers
from lightning_dvc.capture.scattered import Scattered
from lightning_dvc.memory.density import ExactDensity
from lightning_dvc.metrics.diversity import diversity
from lightning_dvc.metrics.gradient_impact import gradient_impact
from lightning_dvc.metrics.quality import activation_score, quality
from lightning_dvc.metrics.reference import ReferenceGradients
from lightning_dvc.metrics.relevance import relevance
from lightning_dvc.metrics.stability import stability
from lightning_dvc.metrics.uncertainty import activation_entropy, spread, uncertainty
from lightning_dvc.metrics.value import dvc_value, rank_normalise

CLASSES = 3
LAYERS = ["words", "conv", "mix", "head"]
NUMBERS = range(len(LAYERS))
FINITE = st.floats(-1e3, 1e3, allow_subnormal=False)


class Net(nn.Module):
    """Gradients kept in every way: scattered, of a convolution, of several positions and of one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 5)
        self.words.bias = None  # the oracle asks for it
        self.conv, self.mix = nn.Conv2d(1, 2, 3), nn.Linear(9, 6)
        self.head = nn.Linear(6, CLASSES, bias=False)
        self.double()

    def forward(self, x):
        words = self.words((x[:, 0, 0] * 3).long().abs() % 7)
        maps = self.conv(x + words[:, None]).tanh()
        return self.head(self.mix(maps.flatten(2)).mean(1).tanh())


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@cache
def seen(n, seed):
    """A batch through the net: captured on the one hand, sample by sample on the other."""
    net, x = Net(), normal(n, 1, 5, 5, seed=seed)
    labels = torch.arange(n) % CLASSES
    recorder = LayerCapture(find_layers(net))
    with recorder.recording():
        logits = net(x)
        losses = F.cross_entropy(logits, labels, reduction="none")
    gradients = recorder.gradients(losses)
    assert [type(g) for g in gradients] == [Scattered, Convolved, OuterProducts, OuterProducts]
    return SimpleNamespace(
        gradients=gradients,
        full=oracles.per_sample_gradients(
            net, LAYERS, lambda net, x, y: F.cross_entropy(net(x), y), x, labels
        ),
        hidden=recorder.representations(n),
        logits=logits.detach(),
        losses=losses.detach(),
        labels=labels,
    )


def taken_in(gradients, labels, batch_size=4):
    """A reference in batches."""
    reference, labels = ReferenceGradients(), torch.as_tensor(labels)
    for batch in torch.arange(len(labels)).split(batch_size):
        reference.add(gradients.rows(batch), labels[batch])
    return reference.means()


def compared(gradients, labels, reference):
    """Products with the mean gradients of the labels, and the lengths of these."""
    columns = reference.columns(labels)
    return reference.products(gradients, columns), reference.norms(columns)


def relevance_of(gradients, labels, reference):
    products, lengths = compared(gradients, labels, reference)
    return relevance(products, gradients.squared_norms(), lengths)


def impact_of(layers, labels, references):
    pairs = [
        compared(*each) for each in zip(layers, [labels] * len(layers), references, strict=True)
    ]
    return gradient_impact(*(torch.stack(each, dim=1) for each in zip(*pairs, strict=True)))


def rows(tensors, i):
    return [tensor[i] for tensor in tensors]


def near(found, expected):
    oracles.assert_near(found, expected, scale=max([1.0, *map(abs, expected)]))


def vectors(min_size=1, max_size=6):
    """A few vectors of one width, as ``(n, d)``."""
    return st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(FINITE, min_size=width, max_size=width), min_size=min_size, max_size=max_size
        ).map(lambda rows: torch.tensor(rows, dtype=torch.float64))
    )


# --- equation 7 --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", NUMBERS)
def test_quality_of_captured_representations(layer):
    h, reference = seen(10, 1).hidden[layer], seen(9, 2).hidden[layer]
    middle, mad = oracles.median_and_mad([oracles.norm(x) for x in reference])
    near(quality(h, middle, mad), [oracles.quality(x, middle, mad) for x in h])


@given(vectors(), st.lists(st.integers(0, 60), min_size=1, max_size=9))
def test_quality(h, norms):
    middle, mad = oracles.median_and_mad(norms)
    mad = mad or 0.25  # without a spread: see below
    found = quality(h, middle, mad)
    near(found, [oracles.quality(x, middle, mad) for x in h])
    assert ((found >= 0) & (found <= 1)).all()
    scores = activation_score(torch.linalg.vector_norm(h, dim=1), middle, mad)
    near(scores, [oracles.activation_score(x, middle, mad) for x in h])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quality_without_a_spread_is_a_step(dtype):
    h = torch.tensor([[3.0, 4.0], [3.0, 4.5], [3.0, 3.5], [0.0, 5.0], [0.0, 0.0]], dtype=dtype)
    found = quality(h, median=5.0, mad=0.0)
    assert found.tolist() == [1, 0, 0, 1, 0] == [oracles.quality(x, 5.0, 0.0) for x in h]
    scores = activation_score(torch.linalg.vector_norm(h, dim=1), 5.0, 0.0)
    assert scores.tolist() == [0.5, 1, 0, 0.5, 0]


# --- equation 8 --------------------------------------------------------------------------------

LABELS = st.lists(st.integers(-1, CLASSES - 1), min_size=1, max_size=9)


@settings(max_examples=60)
@given(layer=st.sampled_from(NUMBERS), reference=LABELS, data=st.data())
def test_relevance_of_captured_gradients(layer, reference, data):
    # Labels up to 4: classes that the reference set does not know, or knows too little.
    labels = data.draw(st.lists(st.integers(-1, 4), min_size=6, max_size=6))
    ours, theirs = seen(6, 1), seen(9, 2)
    m = len(reference)
    batch_size = data.draw(st.integers(1, 9))
    prepared = taken_in(theirs.gradients[layer].rows(torch.arange(m)), reference, batch_size)
    found = relevance_of(ours.gradients[layer], torch.tensor(labels), prepared)
    near(
        found,
        [
            oracles.relevance(g, label, theirs.full[layer][:m], reference)
            for g, label in zip(ours.full[layer], labels, strict=True)
        ],
    )
    assert (found.nan_to_num().abs() <= 1).all()


@pytest.mark.parametrize("layer", NUMBERS)
def test_relevance_against_the_own_class_and_against_all_differ(layer):
    ours, theirs = seen(6, 1), seen(9, 2)
    by_class = taken_in(theirs.gradients[layer], theirs.labels)
    overall = taken_in(theirs.gradients[layer], torch.full((9,), -1))
    found = [relevance_of(ours.gradients[layer], ours.labels, r) for r in (by_class, overall)]
    assert (found[0] - found[1]).abs().min() > 1e-3


@pytest.mark.parametrize("layer", NUMBERS)
def test_two_reference_samples_are_too_few_and_three_are_enough(layer):
    ours, theirs = seen(6, 1), seen(9, 2)
    labels = torch.zeros(6, dtype=torch.int64)
    few = theirs.gradients[layer].rows(torch.arange(5))
    two, three = (
        relevance_of(ours.gradients[layer], labels, taken_in(few, torch.tensor(at)))
        for at in ([0, 0, 1, 1, 1], [0, 0, 0, 1, 1])
    )
    assert two.isnan().all()
    target = oracles.mean(list(theirs.full[layer][:3]))
    near(
        three,
        [
            oracles.inner(g, target) / (oracles.norm(g) * oracles.norm(target))
            for g in ours.full[layer]
        ],
    )


def integer_gradients(rows):
    return Materialised(torch.tensor(rows, dtype=torch.float64)[:, None])


def test_relevance_is_zero_where_a_gradient_vanishes():
    g = integer_gradients([[0, 0], [1, 2]])
    one = taken_in(integer_gradients([[1, 2]] * 3), torch.tensor([0, 0, 0]))
    near(relevance_of(g, torch.tensor([0, 0]), one), [0.0, 1.0])
    # Class 0 cancels out, class 1 does not.
    apart = integer_gradients([[1, 2], [-1, -2], [1, 2], [-1, -2], *[[2, 4]] * 3])
    both = taken_in(apart, torch.tensor([0, 0, 0, 0, 1, 1, 1]))
    assert relevance_of(g, torch.tensor([0, 0]), both).tolist() == [0, 0]
    near(relevance_of(g, torch.tensor([1, 1]), both), [0.0, 1.0])
    silent = OuterProducts(normal(4, 2, 3), torch.zeros(4, 2, 5, dtype=torch.float64), True)
    labels = torch.tensor([0, 0, 0, -1])
    assert not relevance_of(silent, labels, taken_in(silent, labels)).any()


def test_relevance_is_never_beyond_one():
    # Products and norms that were rounded apart.
    assert relevance(
        torch.tensor([4.1, -4.1]), torch.full((2,), 4.0), torch.full((2,), 2.0)
    ).tolist() == [1, -1]


def test_relevance_of_a_single_sample_to_itself():
    for g in seen(6, 1).gradients:
        one = g.rows(torch.tensor([4]))
        reference = taken_in(one, torch.tensor([-1]))
        for label in (-1, 0):  # without classes in the reference, the class does not matter
            near(relevance_of(one, torch.tensor([label]), reference), [1.0])


@settings(max_examples=20)
@given(st.integers(-60, 60), st.integers(-60, 60))
def test_relevance_does_not_depend_on_the_size_of_the_loss(ours, theirs):
    a, b = seen(6, 1), seen(9, 2)
    for layer, (g, r) in enumerate(zip(a.gradients, b.gradients, strict=True)):
        scaled = [scale(g, 10.0**ours), scale(r, 10.0**theirs)]
        found = relevance_of(scaled[0], a.labels, taken_in(scaled[1], b.labels))
        near(
            found,
            [
                oracles.relevance(one, int(label), b.full[layer], b.labels.tolist())
                for one, label in zip(a.full[layer], a.labels, strict=True)
            ],
        )


def scale(g, factor):
    if isinstance(g, Convolved):
        g = g.formed()
        return Materialised(g.gradients * factor)
    if isinstance(g, Scattered):
        return Scattered(g.tokens, g.deltas * factor, g.n_tokens)
    return OuterProducts(g.inputs, g.deltas * factor, g.bias)


@st.composite
def two_sets(draw):
    """Reference and other gradients of one layer with one position, and their labels.

    Sides are such that forming a class's mean pays for some classes and not for others.
    """
    d_out, d_in, bias = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.booleans())
    m, n, seed = draw(st.integers(1, 12)), draw(st.integers(1, 6)), draw(st.integers(0, 999))
    sets = []
    for size, at, highest in ((m, seed, 2), (n, seed + 1000, 4)):
        inputs, deltas = normal(size, 1, d_in, seed=at), normal(size, 1, d_out, seed=at + 5000)
        # Common to each side, so that a mean is not noise.
        inputs, deltas = inputs + 1, deltas * draw(st.sampled_from([1.0, 1e-12, 1e12]))
        label = st.sampled_from([-1, 0, 0, 0, *range(highest + 1)])
        labels = draw(st.lists(label, min_size=size, max_size=size))
        sets.append((OuterProducts(inputs, deltas, bias), torch.tensor(labels)))
    return sets


@settings(max_examples=80)
@given(two_sets(), st.integers(1, 12))
def test_relevance_by_inner_products_is_that_of_formed_means(sets, batch_size):
    (reference, at), (gradients, labels) = sets
    kept = taken_in(reference, at, batch_size)
    formed = taken_in(reference.formed(), at, batch_size)
    found = relevance_of(gradients, labels, kept)
    full = [g.formed().gradients for g in (reference, gradients)]
    slow = [
        oracles.relevance(g, int(label), full[0], at.tolist())
        for g, label in zip(full[1], labels, strict=True)
    ]
    near(found, slow)
    near(relevance_of(gradients.formed(), labels, formed), slow)
    assert kept.column.tolist() == formed.column.tolist()
    size = full[0][0].numel()
    longest = max(oracles.norm(g) for g in full[0])
    torch.testing.assert_close(
        kept.overall, oracles.mean(list(full[0])), rtol=0, atol=1e-10 * longest
    )
    # The mean over all is formed in any case; others only where that is cheaper.
    for label in range(3):
        count, cost = int((at == label).sum()), sum(reference.full_shape)
        if count >= 3:
            mean = kept.means._members[kept.column[label]]
            assert isinstance(mean, torch.Tensor) == (count * cost >= size)


@pytest.mark.parametrize("most", [0, 1, 2, 3])
def test_of_more_classes_than_memory_allows_the_largest_that_come_first_are_known(most):
    # One position is kept in factors, whatever the classes; two are summed up.
    gradients = OuterProducts(normal(28, 2, 6, seed=0), normal(28, 2, 5, seed=1), True)
    labels = torch.tensor([0, 1, 1, 2, 1, 2, -1] * 3 + [0, 0, 0] + [3] * 4)
    reference = ReferenceGradients(most_classes=most)
    for rows in (slice(0, 21), slice(21, 28)):
        reference.add(gradients.rows(rows), labels[rows])
    means = reference.means()
    full = gradients.formed().gradients
    torch.testing.assert_close(means.overall, oracles.mean(list(full)))
    found = relevance_of(gradients, labels, means)
    known = [1, 2, 0][:most]
    for i, label in enumerate(labels.tolist()):
        if label in known:
            near(found[i : i + 1], [oracles.relevance(full[i], label, full, labels.tolist())])
        elif most and label >= 0:
            assert found[i].isnan()
        else:  # without a class, or where none is known, it is compared with the overall mean
            near(found[i : i + 1], [oracles.relevance(full[i], -1, full, [-1] * 28)])


@pytest.mark.parametrize("form", ["factors", "formed"])
@pytest.mark.parametrize("blend", [False, True])
def test_a_reference_that_was_asked_is_empty_again(form, blend):
    gradients = OuterProducts(normal(9, 1, 3, seed=0), normal(9, 1, 2, seed=1), True)
    gradients, labels = gradients.formed() if form == "formed" else gradients, [0, 1, 2] * 3
    used, fresh = ReferenceGradients(), ReferenceGradients()
    used.add(gradients.rows(slice(None)), torch.tensor(labels))
    kept = [weakref.ref(x) for x in (*(total for total, _ in used._sums.values()), *used._factors)]
    assert kept
    if blend:
        fresh.add(gradients, torch.tensor(labels))
        used.blended(fresh, counting_as=2.0)
    else:
        used.means()
    assert not any(ref() for ref in kept)
    for reference in (used, fresh):  # what comes next is not mixed with what was before
        reference.add(gradients.rows(slice(0, 4)), torch.tensor([5, 5, 5, 1]))
        again = reference.means()
        assert again.column.tolist() == [-1, -1, -1, -1, -1, 0, 1]
        torch.testing.assert_close(again.overall, gradients.rows(slice(0, 4)).sum() / 4)


@pytest.mark.parametrize(("n_runs", "n_products"), [(1, 1), (4, 4), (5, 1), (60, 1)])
def test_products_with_formed_means_take_as_few_calls_as_they_can(n_runs, n_products):
    """Of five means, one after another where there are fewer runs of one, and else at once."""
    means = taken_in(Materialised(normal(40, 3, 4, seed=0)), [0, 1, 2, 3] * 10)
    columns = torch.arange(60) * n_runs // 60 % 5
    gradients = Materialised(normal(60, 3, 4, seed=1))
    with profile() as profiled:
        means.products(gradients, columns)
    names = [event.name for event in profiled.function_events]
    assert names.count("aten::mv") + names.count("aten::mm") == n_products


@pytest.mark.parametrize("form", ["factors", "formed"])
@pytest.mark.parametrize("labels", [[0] * 12, [0] * 6 + [1] * 6, [0, 1, 2, -1] * 3, [5] * 12])
def test_products_do_not_depend_on_what_else_is_asked(form, labels):
    # Means are multiplied one by one, or all at once, where there are as many runs of one label.
    both = [
        OuterProducts(normal(n, 1, 9, seed=n), normal(n, 1, 8, seed=n + 1), True) for n in (30, 12)
    ]
    reference, gradients = (x.formed() if form == "formed" else x for x in both)
    means = taken_in(reference, [0, 1, 2] * 10)
    columns = means.columns(torch.tensor(labels))
    known = columns >= 0
    alone = [means.products(gradients.rows(slice(i, i + 1)), columns[i : i + 1]) for i in range(12)]
    near(means.products(gradients, columns)[known], torch.cat(alone)[known].tolist())


@pytest.mark.parametrize("order", [[1, 3, 1], [1, 1, 3], [3, 1, 1]])
def test_a_reference_whose_batches_differ_in_positions(order):
    parts = [
        OuterProducts(normal(4, positions, 6, seed=i), normal(4, positions, 5, seed=9 + i), True)
        for i, positions in enumerate(order)
    ]
    labels = torch.tensor([0, 1, -1, 0])
    reference = ReferenceGradients()
    for part in parts:
        reference.add(part, labels)
    found = relevance_of(parts[0], labels, reference.means())
    full = torch.cat([part.formed().gradients for part in parts])
    at = labels.repeat(3).tolist()
    near(found, [oracles.relevance(full[i], int(y), full, at) for i, y in enumerate(labels)])


# --- equation 9 --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", NUMBERS)
@pytest.mark.parametrize("bandwidth_squared", [0.05, 1.0, 30.0])
def test_diversity_of_captured_representations(layer, bandwidth_squared):
    h, selected = seen(10, 1).hidden[layer], seen(30, 2).hidden[layer]
    found = diversity(h, ExactDensity(selected, bandwidth_squared))
    near(found, [oracles.diversity(x, selected, bandwidth_squared) for x in h])


@given(data=st.data(), width=st.integers(1, 3), bandwidth_squared=st.floats(0.5, 50))
def test_diversity(data, width, bandwidth_squared):
    numbers = st.lists(st.floats(-10, 10), min_size=width, max_size=width)
    queries, selected = (
        torch.tensor(data.draw(st.lists(numbers, min_size=1, max_size=6)), dtype=torch.float64)
        for _ in range(2)
    )
    found = diversity(queries, ExactDensity(selected, bandwidth_squared))
    expected = [oracles.diversity(x, selected, bandwidth_squared) for x in queries]
    near(found, expected)
    assert (found >= 0).all()


def test_diversity_far_from_everything_is_large_but_finite():
    density = ExactDensity(torch.zeros(3, 2, dtype=torch.float64), 1.0)
    near(diversity(torch.tensor([[0.0, 0.0], [3e4, 4e4]]).double(), density), [0.0, 1.25e9])
    beyond = torch.full((1, 2), 1e200, dtype=torch.float64)  # its square is not finite
    assert diversity(beyond, density).isfinite().all()


# --- equation 11 -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(LABELS, st.lists(st.integers(-1, 4), min_size=6, max_size=6))
def test_gradient_impact_of_captured_gradients(reference, labels):
    ours, theirs, m = seen(6, 1), seen(9, 2), len(reference)
    prepared = [taken_in(g.rows(torch.arange(m)), reference) for g in theirs.gradients]
    full = [layer[:m] for layer in theirs.full]
    near(
        impact_of(ours.gradients, torch.tensor(labels), prepared),
        [
            oracles.gradient_impact(rows(ours.full, i), label, full, reference)
            for i, label in enumerate(labels)
        ],
    )


def test_gradient_impact_tells_how_far_a_step_on_a_sample_lowers_the_loss_of_its_class():
    n, rate = 6, 1e-6
    ours, theirs = seen(n, 1), seen(9, 2)
    labels = (ours.labels + torch.arange(n) % 2) % CLASSES  # every other one is wrong
    prepared = [taken_in(g, theirs.labels) for g in theirs.gradients]
    found = impact_of(ours.gradients, labels, prepared)
    x, reference = normal(n, 1, 5, 5, seed=1), normal(9, 1, 5, 5, seed=2)

    def loss_of_class(net, label):
        own = theirs.labels == label
        return F.cross_entropy(net(reference[own]), theirs.labels[own])

    fallen = []
    for i, label in enumerate(labels):
        net = Net()
        before = loss_of_class(net, label)
        length = sum(g.square().sum() for g in torch.autograd.grad(before, [*net.parameters()]))
        F.cross_entropy(net(x[i : i + 1]), ours.labels[i : i + 1]).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= rate * p.grad
        fallen.append((before - loss_of_class(net, label)).item() / rate / length.item() ** 0.5)
    torch.testing.assert_close(found, torch.tensor(fallen, dtype=found.dtype), rtol=1e-3, atol=1e-4)
    assert min(fallen) < 0 < max(fallen)


def test_gradient_impact_along_the_own_gradient_is_its_length():
    batch = seen(6, 1)
    for i in range(6):
        own = [g.rows(torch.tensor([i])) for g in batch.gradients]
        alone = [taken_in(g, [-1]) for g in own]
        length = sum(oracles.inner(g, g) for g in rows(batch.full, i)) ** 0.5
        near(impact_of(own, torch.tensor([0]), alone), [length])


def test_gradient_impact_where_nothing_or_one_layer_only_is_compared_with():
    # Infinite products, to see that they are not asked.
    infinite = torch.full((2, 4), torch.inf)
    assert gradient_impact(infinite, torch.zeros(2, 4)).tolist() == [0, 0]
    assert gradient_impact(torch.zeros(2, 4), torch.ones(2, 4)).tolist() == [0, 0]
    last = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    assert gradient_impact(torch.tensor([[0.0, 0.0, 0.0, 6.0]]), last).tolist() == [3]
    assert gradient_impact(torch.ones(1, 2), torch.tensor([[1.0, torch.nan]])).isnan().all()


# --- equation 12 -------------------------------------------------------------------------------


def test_uncertainty_of_a_captured_batch():
    batch = seen(10, 1)
    predictive = [oracles.predictive_entropy(z) for z in batch.logits]
    found = uncertainty(torch.tensor(predictive, dtype=torch.float64), batch.hidden)
    near(found, [oracles.uncertainty(predictive[i], rows(batch.hidden, i)) for i in range(10)])


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(1, 4), st.data())
def test_uncertainty(widths, n, data):
    size = sum(widths) * n
    flat = torch.tensor(data.draw(st.lists(FINITE, min_size=size, max_size=size))).double()
    layers = [part.reshape(n, -1) for part in flat.split([width * n for width in widths])]
    values = data.draw(st.lists(st.floats(0, 10), min_size=n, max_size=n))
    found = uncertainty(torch.tensor(values, dtype=torch.float64), layers)
    near(found, [oracles.uncertainty(values[i], rows(layers, i)) for i in range(n)])
    assert (found >= 0).all()


@given(vectors())
def test_activation_entropy(h):
    found = activation_entropy(h)
    near(found, [oracles.activation_entropy(x) for x in h])
    assert ((found >= 0) & (found <= 1 + 1e-12)).all()


def test_activation_entropy_at_its_ends():
    h = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, -5.0, 0.0, 0.0], [2.0, -2.0, 2.0, 2.0]]).double()
    near(activation_entropy(h), [0.0, 0.0, 1.0])
    assert activation_entropy(h[:, :1]).tolist() == [0, 0, 0]
    near(activation_entropy(torch.tensor([[1.0, -1.0, 0.0, 0.0]]).double()), [0.5])


@given(vectors())
def test_spread(h):
    near(spread(h), [oracles.spread(x) for x in h])


# --- equation 13 -------------------------------------------------------------------------------


@given(
    st.integers(1, 5).flatmap(
        lambda window: st.lists(
            st.lists(st.floats(0, 50) | st.just(float("nan")), min_size=window, max_size=window),
            min_size=1,
            max_size=6,
        )
    )
)
def test_stability(losses):
    found = stability(torch.tensor(losses, dtype=torch.float64))
    near(found, [oracles.stability(row) for row in losses])
    assert ((found > 0) & (found <= 1)).all()


def test_stability_of_samples_known_in_fewer_than_two_states():
    unknown = float("nan")
    losses = torch.tensor([[unknown] * 3, [unknown, 7.0, unknown], [0.0, 2.0, unknown]])
    assert stability(losses).tolist() == [1, 1, 0.5]
    assert stability(torch.tensor([[3.0]])).tolist() == [1]


def test_stability_of_large_losses_that_hardly_move():
    losses = torch.tensor([[1e8, 1e8 + 1, 1e8 + 2]], dtype=torch.float64)
    near(stability(losses), [1 / (1 + 2 / 3)])


# --- ranks -------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(-3, 3) | st.floats(-1e6, 1e6), min_size=1, max_size=30),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_rank_normalise(values, dtype):
    values = torch.tensor(values, dtype=dtype)
    found = rank_normalise(values)
    torch.testing.assert_close(
        found.double(), torch.tensor(oracles.rank_normalise(values.tolist())).double()
    )
    assert ((found >= 0) & (found <= 1)).all()


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 2), (1, 3, 2), (2, 1)])
def test_every_trailing_position_is_ranked_by_itself(shape):
    values = normal(*shape).mul(2).round()  # with ties
    found = rank_normalise(values)
    assert found.shape == values.shape
    for column, slow in zip(found.flatten(1).T, values.flatten(1).T, strict=True):
        expected = torch.tensor(oracles.rank_normalise(slow.tolist()), dtype=column.dtype)
        torch.testing.assert_close(column, expected)


def test_ranks_of_ties_and_of_a_single_sample():
    assert rank_normalise(torch.tensor([4.0])).tolist() == [0.5]
    assert rank_normalise(torch.tensor([2.0, 2.0, 2.0])).tolist() == [0.5, 0.5, 0.5]
    assert rank_normalise(torch.tensor([0.0, -0.0, 1.0])).tolist() == [0.25, 0.25, 1]


# --- equations 5, 6 and 10 ---------------------------------------------------------------------


def simplex(size):
    parts = st.lists(st.floats(0.01, 1), min_size=size, max_size=size)
    return parts.map(lambda values: [value / sum(values) for value in values])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99), st.data())
def test_dvc_value(n, n_layers, seed, data):
    layers, whole = normal(n, n_layers, 3, seed=seed).sigmoid(), normal(n, 3, seed=seed).sigmoid()
    w, alpha = data.draw(simplex(6)), data.draw(simplex(n_layers))
    weights = [torch.tensor(values, dtype=torch.float64) for values in (w, alpha)]
    found = dvc_value(layers, whole, *weights)
    near(
        found,
        [
            oracles.dvc_value(figures, last, w, alpha)
            for figures, last in zip(layers.tolist(), whole.tolist(), strict=True)
        ],
    )
    assert ((found >= 0) & (found <= 1 + 1e-12)).all()
    # Layer and network parts by themselves.
    for layer in range(n_layers):
        only = torch.eye(n_layers, dtype=torch.float64)[layer]
        part = dvc_value(layers, torch.zeros_like(whole), weights[0], only)
        near(part, [oracles.layer_value(*row, w) for row in layers[:, layer].tolist()])
    part = dvc_value(torch.zeros_like(layers), whole, *weights)
    near(part, [oracles.global_value(*row, w) for row in whole.tolist()])


def test_each_weight_belongs_to_its_metric():
    layers, whole = normal(4, 2, 3).sigmoid(), normal(4, 3).sigmoid()
    alpha = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for metric, weights in enumerate(torch.eye(6, dtype=torch.float64)):
        found = dvc_value(layers, whole, weights, alpha)
        if metric < 3:
            expected = 0.25 * layers[:, 0, metric] + 0.75 * layers[:, 1, metric]
        else:
            expected = whole[:, metric - 3]
        torch.testing.assert_close(found, expected)


def test_weights_may_be_single_precision():
    ranks = torch.ones(2, 1, 3, dtype=torch.float64)
    found = dvc_value(ranks, torch.zeros(2, 3).double(), torch.full((6,), 1 / 6), torch.ones(1))
    torch.testing.assert_close(found, torch.full((2,), 0.5).double())


# --- all of it ---------------------------------------------------------------------------------


def test_six_metrics_of_a_captured_batch_make_its_value():
    n, layers = 12, NUMBERS
    ours, reference, selected = seen(n, 1), seen(9, 2), seen(30, 3)
    w, alpha = [0.1, 0.3, 0.05, 0.15, 0.25, 0.15], [0.15, 0.05, 0.5, 0.3]
    windows = ours.losses[:, None] + normal(n, 4, seed=5).abs()
    predictive = [oracles.predictive_entropy(z) for z in ours.logits]

    spreads = [
        oracles.median_and_mad([oracles.norm(h) for h in reference.hidden[x]]) for x in layers
    ]
    in_layers = [
        torch.stack(
            [
                quality(ours.hidden[x], *spreads[x]),
                relevance_of(
                    ours.gradients[x],
                    ours.labels,
                    taken_in(reference.gradients[x], reference.labels),
                ),
                diversity(ours.hidden[x], ExactDensity(selected.hidden[x], 0.5)),
            ],
            dim=1,
        )
        for x in layers
    ]
    whole = [
        impact_of(
            ours.gradients,
            ours.labels,
            [taken_in(g, reference.labels) for g in reference.gradients],
        ),
        uncertainty(torch.tensor(predictive, dtype=torch.float64), ours.hidden),
        stability(windows),
    ]
    found = dvc_value(
        rank_normalise(torch.stack(in_layers, dim=1)),
        rank_normalise(torch.stack(whole, dim=1)),
        torch.tensor(w, dtype=torch.float64),
        torch.tensor(alpha, dtype=torch.float64),
    )

    slow_layers = [
        [
            [oracles.quality(h, *spreads[x]) for h in ours.hidden[x]],
            [
                oracles.relevance(g, int(y), reference.full[x], reference.labels.tolist())
                for g, y in zip(ours.full[x], ours.labels, strict=True)
            ],
            [oracles.diversity(h, selected.hidden[x], 0.5) for h in ours.hidden[x]],
        ]
        for x in layers
    ]
    slow_whole = [
        [
            oracles.gradient_impact(
                rows(ours.full, i), int(y), reference.full, reference.labels.tolist()
            )
            for i, y in enumerate(ours.labels)
        ],
        [oracles.uncertainty(predictive[i], rows(ours.hidden, i)) for i in range(n)],
        [oracles.stability(row) for row in windows.tolist()],
    ]
    ranks = [[oracles.rank_normalise(values) for values in layer] for layer in slow_layers]
    last = [oracles.rank_normalise(values) for values in slow_whole]
    expected = [
        oracles.dvc_value(
            [[values[i] for values in layer] for layer in ranks],
            [values[i] for values in last],
            w,
            alpha,
        )
        for i in range(n)
    ]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("form", ["factors", "formed", "no classes"])
def test_blended_means_weigh_the_other_set_as_so_many_samples(form):
    def gradients(n, seed):
        generator = torch.Generator().manual_seed(seed)
        a, delta = (torch.randn(n, 1, d, generator=generator, dtype=torch.float64) for d in (3, 2))
        found = OuterProducts(a, delta, bias=True)
        return found.formed() if form == "formed" else found

    mine, others = gradients(7, 0), gradients(10, 1)
    at, of = torch.tensor([0, 0, 0, 1, 1, -1, 2]), torch.tensor([1, 1, 1, 1, 1, 0, 0, 2, 2, 3])
    if form == "no classes":
        at, of = torch.full_like(at, -1), torch.full_like(of, -1)
    sets = [ReferenceGradients(), ReferenceGradients()]
    sets[0].add(mine, at)
    for rows in (slice(0, 6), slice(6, 10)):
        sets[1].add(others.rows(rows), of[rows])
    found = sets[0].blended(sets[1], counting_as=4.0)

    full = torch.cat([mine.formed().gradients, others.formed().gradients])
    weights = torch.cat([torch.ones(7), torch.full((10,), 0.4, dtype=torch.float64)])
    labels = torch.cat([at, of])
    overall = oracles.weighted_sum((weights / weights.sum()).tolist(), list(full))
    torch.testing.assert_close(found.overall, overall)
    for label in (-1, 0, 1, 2, 3, 9):
        members = weights * (labels == label)
        found_for = relevance_of(mine, torch.full((7,), label), found)
        by_class = label >= 0 and form != "no classes"
        if by_class and members.sum() < 3:
            assert found_for.isnan().all()
            continue
        mean = overall
        if by_class:
            mean = oracles.weighted_sum((members / members.sum()).tolist(), list(full))
        wanted = [oracles.inner(g, mean) / oracles.norm(g) / oracles.norm(mean) for g in full[:7]]
        near(found_for, wanted)
