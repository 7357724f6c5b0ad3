"""What was selected, from where, when and why: the record, and its files.

:class:`SelectionRecord` grows while a run selects and belongs to the datamodule;
:class:`Selection` is the table that a user sees, saves and trains from again.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError, StateError
from lightning_dvc.pools import Pools
from lightning_dvc.records import METRICS, BadSample, Choice

_WEIGHTS: Final = tuple(f"weight_{metric}" for metric in METRICS)
_NOTES: Final = "notes"
COLUMNS: Final = ("source", "index", "round", "value", *METRICS, *_WEIGHTS)
"""Columns of a saved selection, one row per selected sample in order of selection."""


@dataclass(frozen=True)
class SetAside:
    """A sample that could not be scored, and so is never selected.

    Attributes:
        source: Name of its source.
        index: Index within the source.
        reason: What happened, in words.
    """

    source: str
    index: int
    reason: str


@dataclass(frozen=True)
class Selection:
    """The selected samples as a table, in order of selection.

    Attributes:
        source: ``s`` source names.
        index: ``(s,)`` index of each sample within its source.
        round: ``(s,)`` round in which it was selected; 0 is the warm-up.
        value: ``(s,)`` by what it was chosen: of ``DVC`` its value then, in ``[0, 1]``, of another
            strategy on a scale of its own; NaN where nothing was scored.
        raw: ``(s, 6)`` its raw metrics then: quality, relevance, diversity, gradient impact,
            uncertainty, stability (the first three are means over the layers); NaN where not
            measured.
        weights: ``(s, 6)`` metric weights in force then; NaN where there were none.
        set_aside: Samples that could not be scored.
        n_ever_selected: Distinct samples that were ever selected, those taken back included.

    Example:
        >>> empty = torch.empty(1, 6)
        >>> one = torch.tensor([3])
        >>> Selection(("bank",), one, one, one.float(), empty, empty).shares()
        {'bank': 1.0}
    """

    source: tuple[str, ...]
    index: Tensor
    round: Tensor
    value: Tensor
    raw: Tensor
    weights: Tensor
    set_aside: tuple[SetAside, ...] = ()
    n_ever_selected: int = 0

    def __len__(self) -> int:
        return len(self.source)

    def shares(self, names: Iterable[str] | None = None) -> dict[str, float]:
        """Share of the selection that each source has.

        Args:
            names: Sources to list; those that occur, when not given.

        Returns:
            Name to share in ``[0, 1]``, adding up to 1 over all sources.
        """
        counts = Counter(self.source)
        listed = dict.fromkeys(self.source) if names is None else names
        return {name: counts[name] / max(len(self), 1) for name in listed}

    def columns(self) -> dict[str, list[Any]]:
        """The table as plain Python lists, keyed by :data:`COLUMNS`."""
        table: dict[str, list[Any]] = {
            "source": list(self.source),
            "index": self.index.tolist(),
            "round": self.round.tolist(),
            "value": self.value.tolist(),
        }
        table.update(zip(METRICS, self.raw.T.tolist(), strict=True))
        table.update(zip(_WEIGHTS, self.weights.T.tolist(), strict=True))
        return table

    def to_parquet(self, path: str | Path) -> None:
        """Write the table to a Parquet file; samples set aside go into its metadata.

        Raises:
            ConfigurationError: If pyarrow is not installed.
        """
        arrow, parquet = _import_pyarrow()
        table = arrow.table(self.columns())
        notes = {_NOTES: json.dumps(self._notes())}
        parquet.write_table(table.replace_schema_metadata(notes), str(path))

    def to_csv(self, path: str | Path) -> None:
        """Write the table to a CSV file in UTF-8, and what is no table to ``<name>.notes.json``."""
        path, table = Path(path), self.columns()
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(zip(*(table[name] for name in COLUMNS), strict=True))
        _notes_path(path).write_text(json.dumps(self._notes(), indent=1), encoding="utf-8")

    def _notes(self) -> dict[str, Any]:
        """What belongs to the selection and is no row of the table, for JSON."""
        return {
            "n_ever_selected": self.n_ever_selected,
            "set_aside": [vars(entry) for entry in self.set_aside],
        }

    @staticmethod
    def load(path: str | Path) -> "Selection":
        """Read a file written by :meth:`to_parquet` or :meth:`to_csv`, told by its suffix.

        Raises:
            ConfigurationError: If the suffix is neither ``.parquet`` nor ``.csv``.
            StateError: If columns are missing.
        """
        path = Path(path)
        if path.suffix == ".parquet":
            return _load_parquet(path)
        if path.suffix == ".csv":
            return _load_csv(path)
        raise ConfigurationError(
            f"a saved selection ends in .parquet or .csv, but got {path.name!r}"
        )


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigurationError(
            "Parquet files need pyarrow, which is not installed; run "
            "`pip install 'lightning-dvc[parquet]'` or use to_csv"
        ) from error
    return pyarrow, pyarrow.parquet


def _notes_path(path: Path) -> Path:
    return path.with_suffix(".notes.json")


def _load_parquet(path: Path) -> Selection:
    _, parquet = _import_pyarrow()
    table = parquet.read_table(str(path))
    notes = json.loads((table.schema.metadata or {}).get(_NOTES.encode(), b"{}"))
    return _from_columns(table.to_pydict(), path, notes)


def _load_csv(path: Path) -> Selection:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        header = reader.fieldnames or []
    table: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in header}
    file_of_notes = _notes_path(path)
    exists = file_of_notes.exists()
    notes = json.loads(file_of_notes.read_text(encoding="utf-8")) if exists else {}
    return _from_columns(table, path, notes)


def _from_columns(
    table: Mapping[str, Sequence[Any]], path: Path, notes: Mapping[str, Any]
) -> Selection:
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise StateError(
            f"{path.name} is not a saved selection: it lacks the columns {missing}; expected "
            f"{list(COLUMNS)}"
        )

    def floats(*names: str) -> Tensor:
        return torch.tensor([[float(x) for x in table[name]] for name in names]).T

    return Selection(
        source=tuple(table["source"]),
        index=torch.tensor([int(x) for x in table["index"]], dtype=torch.int64),
        round=torch.tensor([int(x) for x in table["round"]], dtype=torch.int64),
        value=floats("value").squeeze(1),
        raw=floats(*METRICS),
        weights=floats(*_WEIGHTS),
        set_aside=tuple(SetAside(**entry) for entry in notes.get("set_aside", ())),
        n_ever_selected=notes.get("n_ever_selected", len(table["source"])),
    )


class SelectionRecord:
    """The growing record behind :class:`Selection`: rows in order of selection.

    Example:
        >>> record = SelectionRecord()
        >>> record.add(Choice.unscored(torch.tensor([7, 3])), round_number=0)
        >>> record.remove(torch.tensor([7]))
        >>> record.ids.tolist(), record.n_ever_selected
        ([3], 2)
    """

    def __init__(self) -> None:
        self.ids = torch.empty(0, dtype=torch.int64)
        self._rounds = torch.empty(0, dtype=torch.int64)
        # value, six raw metrics, six weights
        self._why = torch.empty(0, 1 + 2 * len(METRICS))
        self.bad: list[BadSample] = []
        self.n_ever_selected = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, choice: Choice, round_number: int) -> None:
        """Append the samples that a round chose.

        Args:
            choice: What the round decided; only what it adds is used here.
            round_number: Number of the round, 0 for the warm-up.
        """
        n_added = len(choice.add)
        weights = choice.weights.expand(n_added, -1)
        why = torch.cat([choice.values[:, None], choice.raw, weights], dim=1)
        self.ids = torch.cat([self.ids, choice.add])
        self._rounds = torch.cat([self._rounds, torch.full((n_added,), round_number)])
        self._why = torch.cat([self._why, why.to(self._why)])
        # What was taken back is never drawn again, so each added sample is a new one.
        self.n_ever_selected += n_added

    @staticmethod
    def of(selection: Selection, pools: Pools) -> "SelectionRecord":
        """Rebuild the record behind a saved selection.

        Args:
            selection: The table.
            pools: The sources that it was made from; further ones may follow.

        Raises:
            StateError: If it names a source or a sample that the pools do not have, or one twice.
        """
        record = SelectionRecord()
        record.ids = _ids(selection.source, selection.index, pools)
        if len(set(record.ids.tolist())) < len(record):
            raise StateError("the saved selection names a sample twice; load an unchanged file")
        record._rounds = selection.round
        record._why = torch.cat([selection.value[:, None], selection.raw, selection.weights], dim=1)
        entries = selection.set_aside
        indices = torch.tensor([entry.index for entry in entries], dtype=torch.int64)
        bad_ids = _ids([entry.source for entry in entries], indices, pools)
        record.bad = [
            BadSample(i, e.reason) for i, e in zip(bad_ids.tolist(), entries, strict=True)
        ]
        record.n_ever_selected = selection.n_ever_selected
        return record

    def remove(self, ids: Tensor) -> None:
        """Take samples back: their rows leave the table.

        Args:
            ids: ``(r,)`` selected ids.
        """
        keep = ~torch.isin(self.ids, ids)
        self.ids, self._rounds, self._why = self.ids[keep], self._rounds[keep], self._why[keep]

    def set_aside(self, bad: Iterable[BadSample]) -> None:
        """Note samples that could not be scored."""
        self.bad.extend(bad)

    def table(self, pools: Pools) -> Selection:
        """The user's view of the record."""
        names, n_metrics = pools.names, len(METRICS)
        bad_ids = torch.tensor([entry.id for entry in self.bad], dtype=torch.int64)
        bad_rows = zip(
            pools.arms_of(bad_ids).tolist(),
            pools.indices_of(bad_ids).tolist(),
            self.bad,
            strict=True,
        )
        return Selection(
            source=tuple(names[arm] for arm in pools.arms_of(self.ids).tolist()),
            index=pools.indices_of(self.ids),
            round=self._rounds,
            value=self._why[:, 0],
            raw=self._why[:, 1 : 1 + n_metrics],
            weights=self._why[:, 1 + n_metrics :],
            set_aside=tuple(SetAside(names[a], i, entry.reason) for a, i, entry in bad_rows),
            n_ever_selected=self.n_ever_selected,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and plain containers."""
        return {
            "ids": self.ids,
            "rounds": self._rounds,
            "why": self._why,
            "bad": [(entry.id, entry.reason) for entry in self.bad],
            "n_ever_selected": self.n_ever_selected,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.ids, self._rounds, self._why = state["ids"], state["rounds"], state["why"]
        self.bad = [BadSample(int(i), str(reason)) for i, reason in state["bad"]]
        self.n_ever_selected = int(state["n_ever_selected"])


def _ids(names: Sequence[str], indices: Tensor, pools: Pools) -> Tensor:
    """Global ids of samples told by source and index."""
    arms = {name: arm for arm, name in enumerate(pools.names)}
    unknown = sorted(set(names) - arms.keys())
    if unknown:
        raise StateError(
            f"the saved selection has samples of the sources {unknown}, but these are "
            f"{pools.names}; give the sources that it was made from; only new ones may follow"
        )
    which = torch.tensor([arms[name] for name in names], dtype=torch.int64)
    sizes = torch.tensor(pools.sizes)[which]
    outside = torch.nonzero((indices < 0) | (indices >= sizes)).flatten()
    if len(outside):
        first = int(outside[0])
        raise StateError(
            f"the saved selection has sample {int(indices[first])} of source {names[first]!r}, "
            f"which holds {int(sizes[first])}; give the sources that it was made from; only new "
            "ones may follow"
        )
    return pools.ids_of(which, indices)
