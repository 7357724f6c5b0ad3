import pytest
import torch
from helpers.oracles import assert_gradients, assert_near, inner, per_sample_gradients, weighted_sum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_dvc.capture.gradients import (
    Materialised,
    OuterProducts,
    concatenate,
    layer_gradients,
    restore,
)

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


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def draw(n, positions, d_in, d_out, bias, seed):
    """Factors, and the true gradients of the loss whose gradient at the output is ``deltas``."""
    inputs = normal(n, positions, d_in, seed=seed)
    deltas = normal(n, positions, d_out, seed=seed + 1000)
    net = nn.Sequential(nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64))
    (expected,) = per_sample_gradients(
        net, ["0"], lambda net, a, delta: (net(a) * delta).sum(), inputs, deltas
    )
    return inputs, deltas, expected


@settings(deadline=None, max_examples=60)
@given(SHAPES)
def test_factors_answer_like_full_gradients(shape):
    inputs, deltas, expected = draw(**shape)
    assert_gradients(OuterProducts(inputs, deltas, shape["bias"]), expected)


@settings(deadline=None, max_examples=60)
@given(SHAPES)
def test_formed_gradients_answer_like_full_gradients(shape):
    expected = draw(**shape)[2]
    assert_gradients(Materialised(expected.clone()), expected)


@settings(deadline=None, max_examples=60)
@given(SHAPES)
def test_layer_gradients_answer_like_full_gradients_and_keep_the_smaller_form(shape):
    inputs, deltas, expected = draw(**shape)
    found = layer_gradients(inputs, deltas, shape["bias"])
    assert_gradients(found, expected)
    kept = sum(tensor[0].numel() for tensor in found.tensors().values())
    factors = inputs[0].numel() + deltas[0].numel()
    if shape["positions"] > 1:
        assert kept == min(factors, expected[0].numel())
    else:
        assert kept == factors


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 4), st.sampled_from([1, 3]), st.booleans())
def test_products_with_another_set(shape, m, positions, formed):
    inputs, deltas, expected = draw(**shape)
    other = {**shape, "n": m, "seed": shape["seed"] + 5}
    if not formed:  # factors of the two sets may have different numbers of positions
        other["positions"] = positions
    other_inputs, other_deltas, reference = draw(**other)
    mixtures = normal(m, 3, seed=shape["seed"])
    mixed = [weighted_sum(column, reference) for column in mixtures.T.tolist()]
    if formed:
        found = Materialised(expected).products(Materialised(reference), mixtures)
    else:
        ours = OuterProducts(inputs, deltas, shape["bias"])
        found = ours.products(OuterProducts(other_inputs, other_deltas, shape["bias"]), mixtures)
    slow = [[inner(g, column) for column in mixed] for g in expected]
    scale = max(abs(inner(a, a)) for a in [*expected, *mixed])
    assert_near(found, slow, scale)


def forms(shape):
    inputs, deltas, expected = draw(**shape)
    return [OuterProducts(inputs, deltas, shape["bias"]), Materialised(expected)], expected


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.data())
def test_rows_by_position_and_by_mask(shape, data):
    n = shape["n"]
    order = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5)))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n).filter(any)))
    found, expected = forms(shape)
    for form in found:
        assert_gradients(form.rows(order), expected[order])
        assert_gradients(form.rows(mask), expected[mask])


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(1, 3))
def test_joined_parts_are_the_whole(shape, parts):
    found, expected = forms(shape)
    for form in found:
        pieces = [form.rows(index) for index in torch.arange(shape["n"]).chunk(parts)]
        assert_gradients(concatenate(pieces), expected)


@settings(deadline=None, max_examples=40)
@given(SHAPES)
def test_what_was_taken_apart_is_restored(shape):
    found, expected = forms(shape)
    for form in found:
        parts = form.tensors()
        assert all(len(tensor) == shape["n"] for tensor in parts.values())
        again = restore({name: tensor.clone() for name, tensor in parts.items()}, shape["bias"])
        assert type(again) is type(form)
        assert_gradients(again, expected)


@pytest.mark.parametrize("kind", [0, 1], ids=["factors", "formed"])
def test_rows_of_no_sample(kind):
    found = forms({"n": 2, "positions": 3, "d_in": 2, "d_out": 2, "bias": True, "seed": 0})[0][kind]
    none = found.rows(torch.tensor([False, False]))
    assert len(none) == 0
    assert none.squared_norms().shape == (0,)
    assert none.dot(torch.ones(2, 3, dtype=torch.float64)).shape == (0,)
    assert len(concatenate([found, none])) == 2


# A collate function that pads to the longest of each batch leads to the following.


def padded_batches(positions, widths):
    shape = {"n": 2, "d_in": widths, "d_out": widths, "bias": True}
    drawn = [draw(**shape, positions=t, seed=t) for t in positions]
    return [layer_gradients(a, delta, True) for a, delta, _ in drawn], [g for _, _, g in drawn]


def test_parts_with_different_numbers_of_positions_are_joined():
    parts, expected = padded_batches(positions=[2, 3], widths=6)
    assert {type(part) for part in parts} == {OuterProducts}
    assert_gradients(concatenate(parts), torch.cat(expected))


def test_parts_of_different_forms_are_joined():
    parts, expected = padded_batches(positions=[1, 9], widths=3)
    assert {type(part) for part in parts} == {OuterProducts, Materialised}
    assert_gradients(concatenate(parts), torch.cat(expected))


@pytest.mark.parametrize("order", [1, -1])
def test_products_of_different_forms(order):
    (ours, theirs), (expected, reference) = (
        pair[::order] for pair in padded_batches(positions=[1, 9], widths=3)
    )
    slow = [[inner(g, r) for r in reference] for g in expected]
    found = ours.products(theirs, torch.eye(2, dtype=torch.float64))
    assert_near(found, slow, scale=max(max(map(abs, row)) for row in slow))
