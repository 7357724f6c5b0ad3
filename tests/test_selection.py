import dataclasses
import io
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.pools import Pools
from lightning_dvc.records import METRICS, BadSample, Choice
from lightning_dvc.selection import COLUMNS, Selection, SelectionRecord, SetAside

N_METRICS = len(METRICS)


def integers(*values):
    return torch.tensor(values, dtype=torch.int64)


def scored(ids, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Choice(
        add=integers(*ids),
        values=torch.rand(len(ids), generator=generator),
        raw=torch.randn(len(ids), N_METRICS, generator=generator),
        weights=torch.rand(N_METRICS, generator=generator, dtype=torch.float64),
    )


def saved_and_loaded(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def written_and_read(selection, path):
    write = {".parquet": selection.to_parquet, ".csv": selection.to_csv}[path.suffix]
    write(path)
    return Selection.load(path)


def assert_alike(one, other):
    assert one.source == other.source
    assert one.set_aside == other.set_aside
    assert one.n_ever_selected == other.n_ever_selected
    for name in ("index", "round", "value", "raw", "weights"):
        first, second = getattr(one, name), getattr(other, name)
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def example():
    """Five samples ever selected, one of them taken back, and two set aside."""
    pools = Pools({"bank, central": range(4), 'шум "x"': range(6)})
    record = SelectionRecord()
    record.add(Choice.unscored(integers(7, 0, 3)), 0)
    record.add(scored([9, 1]), 2)
    record.remove(integers(0))
    record.set_aside([BadSample(8, "loss is NaN, not finite"), BadSample(2, 'said "no"\nand left')])
    return record.table(pools)


# -- the record


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sets(st.integers(0, 19), max_size=5)),
        st.tuples(st.just("remove"), st.sets(st.integers(0, 19), max_size=5)),
        st.tuples(st.just("set aside"), st.integers(0, 19)),
        st.tuples(st.just("reload"), st.none()),
    ),
    max_size=12,
)


@settings(max_examples=150)
@given(ACTIONS)
def test_behaves_like_a_list_of_rows_also_across_a_reload(actions):
    pools = Pools({"a": range(8), "b": range(12)})
    record, rows, ever, bad = SelectionRecord(), [], set(), []
    for number, (what, which) in enumerate(actions):
        if what == "add":
            ids = sorted(which - ever)  # what was taken back is never drawn again
            choice = scored(ids, seed=number) if number % 2 else Choice.unscored(integers(*ids))
            record.add(choice, number)
            ever.update(ids)
            for k, i in enumerate(ids):
                why = [choice.values[k], *choice.raw[k], *choice.weights.float()]
                rows.append((i, number, [float(x) for x in why]))
        elif what == "remove":
            record.remove(integers(*which))
            rows = [row for row in rows if row[0] not in which]
        elif what == "set aside":
            record.set_aside([BadSample(which, "why")])
            bad.append(which)
        else:
            state = saved_and_loaded(record.state_dict())
            record = SelectionRecord()
            record.add(scored([19]), 5)
            record.load_state_dict(state)
    assert len(record) == len(rows)
    assert record.ids.tolist() == [row[0] for row in rows]
    assert record.n_ever_selected == len(ever)
    table = record.table(pools)
    assert table.source == tuple("a" if row[0] < 8 else "b" for row in rows)
    assert table.index.tolist() == [row[0] - 8 * (row[0] >= 8) for row in rows]
    assert table.round.tolist() == [row[1] for row in rows]
    why = torch.cat([table.value[:, None], table.raw, table.weights], 1)
    expected = torch.tensor([row[2] for row in rows]).view(len(rows), 1 + 2 * N_METRICS)
    torch.testing.assert_close(why, expected, rtol=0, atol=0, equal_nan=True)
    names = [("a", i) if i < 8 else ("b", i - 8) for i in bad]
    assert table.set_aside == tuple(SetAside(name, index, "why") for name, index in names)
    assert table.n_ever_selected == len(ever)


def test_an_empty_record_makes_an_empty_table():
    table = SelectionRecord().table(Pools({"a": range(3)}))
    assert len(table) == 0
    assert table.raw.shape == table.weights.shape == (0, N_METRICS)
    assert table.shares() == {}
    assert table.shares(["a"]) == {"a": 0.0}


def test_a_state_is_a_copy():
    record = SelectionRecord()
    record.add(scored([1, 2]), 0)
    record.set_aside([BadSample(3, "why")])
    state, again = record.state_dict(), SelectionRecord()
    again.load_state_dict(state)
    record.add(scored([4]), 1)
    record.remove(integers(1))
    record.set_aside([BadSample(5, "why")])
    assert state["ids"].tolist() == again.ids.tolist() == [1, 2]
    assert len(state["bad"]) == len(again.bad) == 1
    assert again.n_ever_selected == 2


# -- shares


def test_shares_count_rows_by_source():
    selection = example()
    first, second = "bank, central", 'шум "x"'
    assert selection.shares() == {second: 0.5, first: 0.5}
    assert selection.shares([first, second, "none"]) == {first: 0.5, second: 0.5, "none": 0.0}
    assert list(selection.shares([first, second])) == [first, second]


def test_shares_of_some_sources():
    assert example().shares(["bank, central", "none"]) == {"bank, central": 0.5, "none": 0.0}


# -- files


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_file_keeps_everything(tmp_path, suffix):
    selection = example()
    assert selection.n_ever_selected == len(selection) + 1
    assert len(selection.set_aside) == 2
    loaded = written_and_read(selection, tmp_path / f"run.1{suffix}")
    assert_alike(loaded, selection)
    assert loaded.value.dtype == loaded.raw.dtype == loaded.weights.dtype == torch.float32


def test_a_path_may_be_a_string(tmp_path):
    example().to_csv(str(tmp_path / "run.csv"))
    example().to_parquet(str(tmp_path / "run.parquet"))
    assert Selection.load(str(tmp_path / "run.csv")).source == example().source
    assert Selection.load(str(tmp_path / "run.parquet")).source == example().source


FLOATS = st.one_of(st.floats(width=32), st.sampled_from([math.nan, 0.1, 1e-45, -0.0]))


@st.composite
def selections(draw):
    n = draw(st.integers(0, 4))
    names = st.text(max_size=6)
    counts = st.lists(st.integers(0, 2**62), min_size=n, max_size=n)
    numbers = st.lists(FLOATS, min_size=n * (1 + 2 * N_METRICS), max_size=n * (1 + 2 * N_METRICS))
    floats = torch.tensor(draw(numbers)).view(n, 1 + 2 * N_METRICS)
    aside = st.builds(SetAside, names, st.integers(0, 2**40), st.text(max_size=12))
    return Selection(
        source=tuple(draw(st.lists(names, min_size=n, max_size=n))),
        index=integers(*draw(counts)),
        round=integers(*draw(counts)),
        value=floats[:, 0],
        raw=floats[:, 1 : 1 + N_METRICS],
        weights=floats[:, 1 + N_METRICS :],
        set_aside=tuple(draw(st.lists(aside, max_size=3))),
        n_ever_selected=n,
    )


@settings(max_examples=100)
@given(selections(), st.sampled_from([".parquet", ".csv"]))
def test_any_names_reasons_and_numbers_survive_a_file(selection, suffix):
    with tempfile.TemporaryDirectory() as folder:
        assert_alike(written_and_read(selection, Path(folder, "run" + suffix)), selection)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_a_file_written_again_keeps_nothing_of_the_former(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    written_and_read(example(), path)
    later = dataclasses.replace(example(), set_aside=())
    assert written_and_read(later, path).set_aside == ()


def test_columns_of_a_file_are_those_announced(tmp_path):
    example().to_csv(tmp_path / "run.csv")
    example().to_parquet(tmp_path / "run.parquet")
    header = (tmp_path / "run.csv").read_text(encoding="utf-8").splitlines()[0].split(",")
    assert tuple(header) == COLUMNS
    assert tuple(pyarrow.parquet.read_schema(tmp_path / "run.parquet").names) == COLUMNS
    assert tuple(example().columns()) == COLUMNS


def test_csv_without_its_notes_is_still_a_selection(tmp_path):
    example().to_csv(tmp_path / "run.csv")
    (tmp_path / "run.notes.json").unlink()
    loaded = Selection.load(tmp_path / "run.csv")
    assert loaded.set_aside == ()
    assert loaded.n_ever_selected == len(loaded) == len(example())


WRITE_AND_READ = """
import sys
import torch
from lightning_dvc.selection import Selection
row = torch.zeros(1, 6)
one = torch.zeros(1, dtype=torch.int64)
Selection(("\\u0448\\u0443\\u043c",), one, one, row[:, 0], row, row).to_csv(sys.argv[1])
assert Selection.load(sys.argv[1]).source == ("\\u0448\\u0443\\u043c",)
"""


def test_csv_is_utf_8_whatever_the_locale(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    run = subprocess.run(
        [sys.executable, "-c", WRITE_AND_READ, tmp_path / "run.csv"],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-500:]
    assert "шум" in (tmp_path / "run.csv").read_text(encoding="utf-8")


# -- files that are refused


@pytest.mark.parametrize("name", ["run.txt", "run", "run.csv.gz"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ConfigurationError, match=rf"\.parquet or \.csv, but got '{name}'"):
        Selection.load(tmp_path / name)


@pytest.mark.parametrize("missing", ["source", "round", "relevance", "weight_stability"])
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_missing_columns_are_named(tmp_path, suffix, missing):
    kept = {name: values for name, values in example().columns().items() if name != missing}
    path = tmp_path / f"run{suffix}"
    if suffix == ".csv":
        path.write_text(",".join(kept) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.table(kept), path)
    with pytest.raises(StateError, match=rf"run{suffix} is not a saved.*lacks.*\['{missing}'\]"):
        Selection.load(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "run.csv").touch()
    with pytest.raises(StateError, match="lacks the columns"):
        Selection.load(tmp_path / "run.csv")


def test_columns_of_the_user_are_ignored(tmp_path):
    path = tmp_path / "run.parquet"
    table = example().columns() | {"note": ["x"] * len(example())}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert Selection.load(path).source == example().source
