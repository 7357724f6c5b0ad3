"""One dataset told apart into sources."""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from lightning_dvc.errors import ConfigurationError

Groups = Mapping[str, Sequence[int] | Tensor | np.ndarray] | Sequence[Any] | Tensor | np.ndarray
"""Name to indices, or one name per sample."""


def split_by(dataset: Dataset[Any], groups: Groups) -> dict[str, Dataset[Any]]:
    """Make the sources of a :class:`~lightning_dvc.DVCDataModule` out of one dataset.

    Args:
        dataset: A map-style dataset of ``n`` samples.
        groups: Either the source of each sample, ``n`` names or numbers such as a column of a
            table; or, by name, the indices of its samples, such as a ``range``.

    Returns:
        Name to the part of the dataset, by order of first appearance.

    Raises:
        ConfigurationError: If there are not as many names as samples, an index is out of range or
            in two sources, or the dataset has no length.

    Example:
        >>> {name: len(part) for name, part in split_by(list("abc"), ["x", "y", "x"]).items()}
        {'x': 2, 'y': 1}
        >>> {name: len(part) for name, part in split_by(list("abc"), {"x": range(3)}).items()}
        {'x': 3}
    """
    if not isinstance(dataset, Sized):
        raise ConfigurationError(
            "expected a map-style dataset, which has a length, to be told apart into sources, but "
            f"got a {type(dataset).__name__}; load an iterable one into a list first"
        )
    n_samples = len(dataset)
    if isinstance(groups, Mapping):
        indices = {str(name): _as_array(given) for name, given in groups.items()}
        _check_indices(indices, n_samples)
    else:
        names = _as_array(groups)
        if len(names) != n_samples:
            raise ConfigurationError(
                f"expected the source of each of {n_samples} samples, but got {len(names)}; give "
                "one name per sample, or a mapping from name to indices"
            )
        _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
        indices = {
            str(names[first[group]]): np.flatnonzero(inverse == group) for group in first.argsort()
        }
    return {name: Subset(dataset, chosen.tolist()) for name, chosen in indices.items()}


def _as_array(given: Any) -> np.ndarray:
    return given.cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)


def _check_indices(indices: Mapping[str, np.ndarray], n_samples: int) -> None:
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
