"""One dataset told apart into sources."""

from array import array
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from lightning_dvc.errors import ConfigurationError

Groups = (
    str | Mapping[str, Sequence[int] | Tensor | np.ndarray] | Sequence[Any] | Tensor | np.ndarray
)
"""The column of names, name to indices, or one name per sample."""


def split_by(dataset: Dataset[Any], groups: Groups) -> dict[str, Dataset[Any]]:
    """Make the sources of a :class:`~lightning_dvc.DVCDataModule` out of one dataset.

    Args:
        dataset: A map-style dataset of ``n`` samples.
        groups: The source of each sample, ``n`` names or numbers; or the name of a column that
            holds these, as ``dataset[name]`` (a table with ``column_names``) or ``dataset.name``,
            also where parts of such datasets are taken or put together by torch's ``Subset`` and
            ``ConcatDataset``; or, by name, the indices of its samples, such as a ``range``; or a
            list of such ranges, whose names are then their places in it.

    Returns:
        Name to the part of the dataset, by order of first appearance.

    Raises:
        ConfigurationError: If there are not as many names as samples, there is no such column, an
            index is out of range, no integer, or in two sources, or the dataset has no length.

    Example:
        >>> {name: len(part) for name, part in split_by(list("abc"), ["x", "y", "x"]).items()}
        {'x': 2, 'y': 1}
        >>> {name: len(part) for name, part in split_by(list("abc"), {"x": range(3)}).items()}
        {'x': 3}
        >>> {name: len(p) for name, p in split_by(list("abc"), [range(2), range(2, 3)]).items()}
        {'0': 2, '1': 1}
    """
    if not isinstance(dataset, Sized):
        raise ConfigurationError(
            "expected a map-style dataset, which has a length, to be told apart into sources, but "
            f"got a {type(dataset).__name__}; load an iterable one into a list first"
        )
    n_samples = len(dataset)
    # Of ranges only: other lists of numbers may be meant as a beginning and an end.
    if isinstance(groups, Sequence) and groups and all(isinstance(x, range) for x in groups):
        groups = {str(number): indices for number, indices in enumerate(groups)}
    if isinstance(groups, Mapping):
        indices = {
            str(name): given if isinstance(given, range) else _as_array(given)
            for name, given in groups.items()
        }
        _check_indices({name: _as_array(given) for name, given in indices.items()}, n_samples)
    else:
        names = _names(_column(dataset, groups) if isinstance(groups, str) else groups)
        if len(names) != n_samples:
            raise ConfigurationError(
                f"expected the source of each of {n_samples} samples, but got {len(names)}; give "
                "one name per sample, or a mapping from name to indices"
            )
        indices = _by_name(names)
    return {name: Subset(dataset, _packed(chosen)) for name, chosen in indices.items()}


def _by_name(names: np.ndarray) -> dict[str, range | np.ndarray]:
    """The indices of each name, ascending, by order of first appearance."""
    _, first, inverse, counts = np.unique(
        names, return_index=True, return_inverse=True, return_counts=True
    )
    groups = np.split(inverse.argsort(kind="stable"), counts.cumsum()[:-1])
    return {str(names[first[number]]): groups[number] for number in first.argsort()}


def _packed(indices: range | np.ndarray) -> Sequence[int]:
    """Eight bytes each, where a list has 40, and read as plain numbers, unlike those of numpy."""
    if isinstance(indices, range):
        return indices
    return array("q", indices.astype(np.int64).tobytes())


def _as_array(given: Any) -> np.ndarray:
    if isinstance(given, range):  # number by number otherwise
        return np.arange(given.start, given.stop, given.step)
    return given.cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)


def _column(dataset: Any, name: str) -> Any:
    """What a dataset calls by that name, one entry per sample."""
    if isinstance(dataset, Subset):
        return _names(_column(dataset.dataset, name))[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([_names(_column(part, name)) for part in dataset.datasets])
    columns = getattr(dataset, "column_names", None)
    if columns is not None and name in columns:
        # A table of Hugging Face serves only the columns of its format, mostly those of the model.
        table = dataset.with_format(None) if hasattr(dataset, "with_format") else dataset
        return table[name][:]  # at once, where a column is read row by row
    if not hasattr(dataset, name):
        own = getattr(dataset, "__dict__", {})
        known = columns or [each for each in own if not each.startswith("_")]
        raise ConfigurationError(
            f"expected a column {name!r} that tells the source of each sample, but the training "
            f"dataset, a {type(dataset).__name__}, has {list(known)}; name one of these, or give "
            "one name per sample"
        )
    return getattr(dataset, name)


def _names(given: Any) -> np.ndarray:
    try:
        names = _as_array(given)
    except ValueError:  # lists of unequal lengths
        names = np.empty((0, 0))
    if names.ndim != 1:
        raise ConfigurationError(
            "expected one name or number per sample, but got lists of them, or none; for indices, "
            "give them by name, {'name': [...], ...}, or as a list of ranges"
        )
    # Some may be missing or of other types, which could not be sorted.
    return names.astype(str) if names.dtype == object else names


def _check_indices(indices: Mapping[str, np.ndarray], n_samples: int) -> None:
    for name, given in indices.items():
        if len(given) and given.dtype.kind not in "iu":
            raise ConfigurationError(
                f"expected integer indices for source {name!r}, but got {given.dtype}; for a mask, "
                "give np.flatnonzero(mask)"
            )
    every = np.concatenate([np.empty(0, dtype=np.int64), *indices.values()])
    if len(every) and not (every.min() >= 0 and every.max() < n_samples):
        raise ConfigurationError(
            f"indices of sources must be in 0 .. {n_samples - 1}, but go from {every.min()} to "
            f"{every.max()}; give indices into the training dataset"
        )
    if len(np.unique(every)) != len(every):
        raise ConfigurationError(
            "some samples are in more than one source; give each sample to one of them"
        )
