import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dvc.distinct import distinct_rows

numbers = st.sampled_from([-(2**40), -1, 0, 1, 255, 256, 2**62])


@given(st.integers(1, 4).flatmap(lambda d: st.lists(st.tuples(*[numbers] * d), max_size=20)))
def test_rows_are_told_apart(rows):
    width = len(rows[0]) if rows else 2
    first, number = distinct_rows(torch.tensor(rows, dtype=torch.int64).reshape(-1, width))
    assert first.dtype == number.dtype == torch.int64
    assert len(number) == len(rows)
    assert sorted(first.tolist()) == sorted(rows.index(row) for row in set(rows))
    assert [rows[first[n]] for n in number.tolist()] == rows


def test_bools_of_any_layout():
    rows = torch.tensor([[True, False, True], [False, False, True]])
    first, number = distinct_rows(rows.T.contiguous())
    again = distinct_rows(rows.T)
    assert sorted(number.tolist()) == [0, 1, 2]
    assert torch.equal(first, again[0])
    assert torch.equal(number, again[1])
