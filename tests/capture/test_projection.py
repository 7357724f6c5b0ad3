import pytest
import torch
from helpers.oracles import Net, assert_gradients, normal, own_losses, per_sample_gradients, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dvc.capture.convolution import Convolved
from lightning_dvc.capture.gradients import Materialised, OuterProducts
from lightning_dvc.capture.layers import LayerCapture, find_layers
from lightning_dvc.capture.projection import WIDTH, Projection, plan_projections
from lightning_dvc.capture.scattered import Scattered

FORMS = ["factors", "formed", "scattered", "convolved"]


def draw(form, n, positions, rows, columns, bias, seed):
    """Gradients in one form with a full shape of about ``rows`` and ``columns``."""
    deltas = normal(n, positions, rows, seed=seed)
    inputs = normal(n, positions, columns, seed=seed + 1)
    if form == "scattered":
        return Scattered(tokens(n, positions, below=rows, seed=seed), inputs, rows)
    if form == "convolved":
        layer = nn.Conv1d(columns, rows, 2, padding=1, bias=bias).double()
        x, more = inputs.transpose(1, 2), normal(n, rows, positions + 1, seed=seed)
        return Convolved(layer, [x], [more])
    found = OuterProducts(inputs, deltas, bias)
    return found.formed() if form == "formed" else found


SHAPES = st.fixed_dictionaries(
    {
        "n": st.integers(1, 3),
        "positions": st.integers(1, 4),
        "rows": st.integers(1, 4),
        "columns": st.integers(1, 4),
        "bias": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
LARGE = {"n": 3, "positions": 2, "rows": 280, "columns": 290, "bias": True, "seed": 0}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(shape=SHAPES, k=st.integers(1, 3), m=st.integers(1, 3))
def test_projected_gradients_are_gradients_projected(form, shape, k, m):
    found = draw(form, **shape)
    rows, columns = found.full_shape
    left, right = normal(rows, k, seed=shape["seed"] + 2), normal(columns, m, seed=shape["seed"])
    expected = torch.stack([left.T @ g @ right for g in found.formed().gradients])
    assert_gradients(found.projected(left, right), expected)


@pytest.mark.parametrize("form", FORMS)
def test_projecting_commutes_with_adding_up(form):
    found = draw(form, **LARGE)
    project = Projection(found.full_shape, "layer")
    total = project(Materialised(found.sum()[None]))
    torch.testing.assert_close(project(found).sum(), total.formed().gradients[0])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_layer_is_projected_alike(form):
    found = draw(form, **LARGE)
    project = Projection(found.full_shape, "layer")
    formed = project(Materialised(found.formed().gradients)).formed().gradients
    torch.testing.assert_close(project(found).formed().gradients, formed)
    assert project(found).full_shape == (WIDTH, WIDTH)


# --- what is kept on average -------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(300, 280), (300, 20), (20, 300)])
def test_inner_products_are_kept_on_average(sizes):
    # Factors that are much alike have products far from 0, in which a wrong scale would show.
    left, right = (normal(3, 1, size, seed=size) + 1 for size in sizes)
    found = OuterProducts(right, left, bias=False)
    exact = found.gram(found)
    grams = []
    for number in range(200):
        projected = Projection(found.full_shape, str(number))(found)
        grams.append(projected.gram(projected))
    each = torch.stack(grams)
    standard_error = each.std(0) / len(each) ** 0.5
    # A number leaves 4 standard errors by chance once in 16,000 times.
    assert bool(((each.mean(0) - exact).abs() <= 4 * standard_error).all())
    # That is narrow enough to see norms whose squares are wrong by a twentieth part.
    assert bool((4 * standard_error.diagonal() < 0.05 * exact.diagonal()).all())


@pytest.mark.parametrize("factor", ["inputs", "deltas"])
def test_right_angles_come_out_with_the_standard_deviation_that_is_said(factor):
    same = torch.ones(2, 1, 300, dtype=torch.float64)
    across = torch.zeros(2, 1, 300, dtype=torch.float64)
    across[0, 0, :7], across[1, 0, 7:20] = 1, -2
    inputs, deltas = (across, same) if factor == "inputs" else (same, across)
    found = OuterProducts(inputs, deltas, bias=False)
    assert found.gram(found)[0, 1] == 0
    cosines = []
    for number in range(300):
        gram = (p := Projection((300, 300), str(number))(found)).gram(p)
        cosines.append(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
    # With 300 draws the estimate itself is off by 4%.
    assert torch.stack(cosines).std().item() == pytest.approx(1 / WIDTH**0.5, rel=0.2)


# --- one projection ----------------------------------------------------------------------------


def projected_identity(rows, columns, name):
    """``P^T E Q`` of the matrix with ones on its diagonal."""
    whole = torch.eye(rows, columns, dtype=torch.float64)[None]
    return Projection((rows, columns), name)(Materialised(whole)).formed().gradients[0]


def test_same_name_and_shape_make_the_same_projection_whatever_else_is_drawn():
    first = projected_identity(300, 300, "body.0")
    torch.manual_seed(1)
    torch.randn(5)
    before = torch.random.get_rng_state()
    assert torch.equal(projected_identity(300, 300, "body.0"), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(projected_identity(300, 300, "body.1"), first)


def test_sides_are_projected_independently():
    # With the same matrix on both sides, a symmetric gradient would stay symmetric.
    found = projected_identity(300, 300, "layer")
    cosine = torch.cosine_similarity(found.flatten(), found.T.flatten(), dim=0)
    assert abs(cosine.item()) < 0.1


@pytest.mark.parametrize(
    ("shape", "left_over"),
    [
        ((257, 257), (WIDTH, WIDTH)),
        ((257, 256), (WIDTH, WIDTH)),
        ((5000, 3), (WIDTH, 3)),
        ((10, 1001), (10, WIDTH)),
        ((4, 5), (4, 5)),
    ],
)
def test_a_side_of_at_most_the_width_stays(shape, left_over):
    assert projected_identity(*shape, "layer").shape == left_over


@pytest.mark.parametrize("columns", [7, WIDTH])
def test_a_side_that_stays_is_not_changed(columns):
    # Only rows are projected, so each is still a multiple of the one factor.
    found = OuterProducts(normal(1, 1, columns), normal(1, 1, 300), bias=False)
    gradient = Projection((300, columns), "layer")(found).formed().gradients[0]
    torch.testing.assert_close(
        torch.cosine_similarity(gradient, found.inputs[0], dim=1).abs(),
        torch.ones(WIDTH, dtype=torch.float64),
    )


# --- which layers ------------------------------------------------------------------------------

LAYERS = {
    "embedding": nn.Embedding(1000, 40),  # 40,000
    "conv": nn.Conv2d(30, 60, 3),  # 16,260
    "depthwise": nn.Conv1d(600, 600, 100, groups=600),  # 60,600
    "wide": nn.Linear(700, 50, bias=False),  # 35,000
    "small": nn.Linear(200, 250),  # 50,250, but no side is longer than the width
    "norm": nn.LayerNorm(30_000),  # 60,000
    "head": nn.Linear(300, 10),  # 3,010
}
TOTAL = 40_000 + 16_260 + 60_600 + 35_000 + 50_250 + 60_000 + 3_010


@pytest.mark.parametrize(
    ("exact_numbers", "projected"),
    [
        (TOTAL, []),
        (TOTAL - 1, ["embedding"]),
        (TOTAL - 40_000, ["embedding"]),
        (TOTAL - 40_001, ["embedding", "wide"]),
        (TOTAL - 75_001, ["embedding", "wide", "conv"]),
        (TOTAL - 91_261, ["embedding", "wide", "conv", "head"]),
        (0, ["embedding", "wide", "conv", "head"]),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_the_largest_are_projected_until_the_others_fit(exact_numbers, projected, order):
    layers = dict(list(LAYERS.items())[::order])
    assert list(plan_projections(layers, exact_numbers)) == projected


def test_planned_projections_have_the_shapes_and_names_of_their_layers():
    planned = plan_projections(LAYERS, 0)
    for name, found in {
        "head": OuterProducts(normal(2, 1, 300), normal(2, 1, 10), bias=True),
        "embedding": Scattered(tokens(2, 3, below=1000), normal(2, 3, 40), 1000),
    }.items():
        expected = Projection(found.full_shape, name)(found).formed().gradients
        assert torch.equal(planned[name](found).formed().gradients, expected)


# --- captured and projected --------------------------------------------------------------------


def deep():
    layers = {
        "words": lambda: nn.Embedding(300, 4),
        "conv": lambda: nn.Conv1d(4, 260, 2),
        "mix": lambda: nn.Linear(260, 5),
        "head": lambda: nn.Linear(5, 3),
    }
    return Net(
        layers,
        lambda net, x: net.head(net.mix(net.conv(net.words(x).mT).tanh().mT).mean(1).tanh()),
    )


def test_captured_gradients_are_projected_layer_by_layer():
    net, x = deep(), tokens(4, 5, below=300)
    names = ["words", "conv", "mix", "head"]
    layers = find_layers(net)
    projections = plan_projections(layers, 0)
    assert sorted(projections) == ["conv", "mix", "words"]
    recorder = LayerCapture(layers, projections)
    with recorder.recording():
        losses = own_losses(net, x)
    exact = per_sample_gradients(net, names, lambda net, one: own_losses(net, one).sum(), x)
    for name, found, full in zip(names, recorder.gradients(losses), exact, strict=True):
        if name in projections:
            full = projections[name](Materialised(full)).formed().gradients
            assert isinstance(found, OuterProducts)
        torch.testing.assert_close(found.formed().gradients, full, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.squared_norms(), full.square().sum((1, 2)))
        assert found.full_shape == full.shape[1:]
    assert recorder.reached == names


def test_representations_and_fingerprints_are_not_projected():
    net, x = deep(), tokens(4, 5, below=300)
    shown = []
    for projections in ({}, plan_projections(find_layers(net), 0)):
        recorder = LayerCapture(find_layers(net), projections)
        with recorder.recording():
            own_losses(net, x)
        shown.append([*recorder.representations(4), recorder.fingerprints(4)])
    assert all(torch.equal(a, b) for a, b in zip(*shown, strict=True))
