import pytest
import torch
from helpers.oracles import (
    assert_gradients,
    assert_grams,
    inner,
    normal,
    per_sample_gradients,
    tokens,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dvc.capture import gradients
from lightning_dvc.capture.convolution import Convolved
from lightning_dvc.capture.gradients import (
    Materialised,
    OuterProducts,
    concatenate,
)
from lightning_dvc.capture.scattered import Scattered

SHAPES = st.fixed_dictionaries(
    {
        "n": st.integers(1, 4),
        "positions": st.integers(1, 5),
        "d_in": st.integers(1, 4),
        "d_out": st.integers(1, 4),
        "bias": st.booleans(),
        "seed": st.integers(0, 99),
    }
)
FORMS = ["factors", "formed", "scattered", "convolved"]
SMALL = {"n": 3, "positions": 4, "d_in": 2, "d_out": 2, "bias": True, "seed": 0}


def expected_of(layer, x, deltas):
    """True gradients of the loss whose gradient at the output is ``deltas``."""
    net = nn.Sequential(layer.double())
    return per_sample_gradients(
        net, ["0"], lambda net, x, delta: (net(x) * delta).sum(), x, deltas
    )[0]


def draw(form, n, positions, d_in, d_out, bias, seed):
    """Gradients in one form, and the true ones."""
    inputs = normal(n, positions, d_in, seed=seed)
    deltas = normal(n, positions, d_out, seed=seed + 1000)
    if form == "scattered":
        looked_up = tokens(n, positions, below=d_in, seed=seed)
        expected = expected_of(nn.Embedding(d_in, d_out), looked_up, deltas)
        return Scattered(looked_up, deltas, d_in), expected
    if form == "convolved":
        layer = nn.Conv1d(d_in, d_out, 2, padding=1, bias=bias)
        x, deltas = inputs.transpose(1, 2), normal(n, d_out, positions + 1, seed=seed + 1000)
        expected = expected_of(layer, x, deltas)
        return Convolved(layer, [x], [deltas]), expected
    expected = expected_of(nn.Linear(d_in, d_out, bias=bias), inputs, deltas)
    if form == "formed":
        return Materialised(expected.clone()), expected
    return OuterProducts(inputs, deltas, bias), expected


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(shape=SHAPES)
def test_each_form_answers_like_full_gradients(form, shape):
    assert_gradients(*draw(form, **shape))


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25)
@given(shape=SHAPES, m=st.integers(1, 4), positions=st.sampled_from([1, 3]))
def test_products_with_other_samples(form, shape, m, positions):
    ours, expected = draw(form, **shape)
    other = {"n": m, "seed": shape["seed"] + 5, "positions": positions}
    theirs, reference = draw(form, **{**shape, **other})
    assert_grams(ours, theirs, expected, reference)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", [1, 8, 16])
def test_products_in_parts(form, part, monkeypatch):
    monkeypatch.setattr(gradients, "_GRAM_PART", part)
    ours, expected = draw(form, **SMALL)
    theirs, reference = draw(form, **{**SMALL, "n": 5, "seed": 1, "positions": 2})
    assert_grams(ours, theirs, expected, reference)


@pytest.mark.parametrize("part", [1, 10])
def test_products_of_an_embedding_in_parts_of_the_tokens_that_occur(part, monkeypatch):
    monkeypatch.setattr(gradients, "_GRAM_PART", part)
    # A thousand million tokens, of which no full gradient could be formed.
    sample = torch.tensor([[999_999_999, 5, 5]])
    ours = Scattered(sample, torch.ones(1, 3, 2), 10**9)
    theirs = Scattered(torch.tensor([[5], [6], [999_999_999]]), torch.ones(3, 1, 2), 10**9)
    assert ours.gram(theirs).tolist() == [[4, 0, 2]]
    assert ours.squared_norms().tolist() == [10]


@pytest.mark.parametrize("positions", [2, 6, 7, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_norms_of_long_and_short_sequences(positions, bias):
    # Up to 6 positions the inner products of the positions give the norms, beyond that the
    # gradients are formed.
    shape = {"n": 2, "d_in": 12, "d_out": 12, "seed": 0}
    assert_gradients(*draw("factors", positions=positions, bias=bias, **shape))


def test_gradients_too_large_to_be_formed_at_once():
    # Each part holds one sample or two.
    for form in ("factors", "convolved"):
        shape = {"n": 3, "positions": 3, "d_in": 500, "d_out": 500, "bias": True, "seed": 0}
        found, expected = draw(form, **shape)
        assert len(list(found.parts())) > 1
        full = normal(*found.full_shape)
        torch.testing.assert_close(found.squared_norms(), expected.square().sum((1, 2)))
        torch.testing.assert_close(found.dot(full), (expected * full).sum((1, 2)))
        torch.testing.assert_close(found.sum(), expected.sum(0))
        torch.testing.assert_close(found.tensors(), found.restored(found.tensors()).tensors())


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15)
@given(shape=SHAPES, data=st.data())
def test_rows_by_position_by_mask_and_by_range(form, shape, data):
    n = shape["n"]
    order = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    found, expected = draw(form, **shape)
    for index in (order, mask, slice(n - 1, None)):
        assert_gradients(found.rows(index), expected[index])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15)
@given(shape=SHAPES, parts=st.integers(1, 3))
def test_joined_parts_are_the_whole(form, shape, parts):
    found, expected = draw(form, **shape)
    pieces = [found.rows(index) for index in torch.arange(shape["n"]).chunk(parts)]
    assert_gradients(concatenate(pieces), expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_no_sample(form):
    found, expected = draw(form, **SMALL)
    none = found.rows(torch.tensor([False, False, False]))
    assert len(none) == 0
    assert none.full_shape == found.full_shape
    assert none.form == found.form
    assert none.squared_norms().shape == none.bound().shape == (0,)
    assert none.dot(expected[0]).shape == (0,)
    assert torch.equal(none.sum(), torch.zeros_like(expected[0]))
    assert none.formed().gradients.shape == (0, *found.full_shape)
    assert none.gram(found).shape == (0, 3)
    assert found.gram(none).shape == (3, 0)
    assert all(len(tensor) == 0 for tensor in none.tensors().values())
    assert_gradients(concatenate([none, found, none]), expected)


# A collate function that pads to the longest of each batch leads to the following.


@pytest.mark.parametrize("form", ["factors", "scattered"])
@pytest.mark.parametrize("positions", [(2, 3), (3, 1), (1, 4)])
def test_parts_with_different_numbers_of_positions_are_joined(form, positions):
    drawn = [draw(form, **{**SMALL, "positions": t, "seed": t}) for t in positions]
    joined = concatenate([found for found, _ in drawn])
    assert type(joined) is type(drawn[0][0])
    assert_gradients(joined, torch.cat([expected for _, expected in drawn]))


def test_parts_of_different_forms_are_joined():
    drawn = [draw(form, **SMALL) for form in ("factors", "formed")]
    joined = concatenate([found for found, _ in drawn])
    assert type(joined) is Materialised
    assert_gradients(joined, torch.cat([expected for _, expected in drawn]))


@pytest.mark.parametrize("positions", [1, 9])
def test_products_of_different_forms(positions):
    ours, expected = draw("factors", **{**SMALL, "positions": positions})
    theirs, reference = draw("formed", **{**SMALL, "seed": 1})
    assert_grams(ours, theirs, expected, reference)
    assert_grams(theirs, ours, reference, expected)


@pytest.mark.parametrize("form", FORMS)
def test_sum_does_not_touch_what_it_is_made_of(form):
    found, _ = draw(form, **SMALL)
    before = {name: tensor.clone() for name, tensor in found.tensors().items()}
    found.sum().zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.tensors().items())


# --- the bound ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bound_is_finite_for_the_samples_whose_gradient_is(form, value):
    found, _ = draw(form, **{**SMALL, "positions": 3})
    made_of = found._deltas[0] if form == "convolved" else list(found.tensors().values())[-1]
    made_of[1].view(-1)[-1] = value
    assert found.bound().isfinite().tolist() == [True, False, True]


def test_bound_is_the_squared_norm_of_one_position():
    found, expected = draw("factors", **{**SMALL, "positions": 1})
    torch.testing.assert_close(found.bound(), expected.square().sum((1, 2)))


def test_bound_holds_where_positions_agree():
    found = OuterProducts(torch.ones(1, 5, 2).double(), torch.ones(1, 5, 3).double(), bias=True)
    exact = inner(found.formed().gradients, found.formed().gradients)
    torch.testing.assert_close(found.bound(), torch.tensor([exact], dtype=torch.float64))
