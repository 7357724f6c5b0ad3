"""The data sets of the examples, from a folder of files or from OpenML.

Features come standardised: images by one mean and deviation for all pixels, tables by column.
"""

import csv
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Features and labels, the original test rows last.

    Attributes:
        features: ``(n, d)``.
        labels: ``(n,)`` classes in ``0 .. n_classes - 1``.
        n_classes: Number of classes.
        n_train: Rows that are no test rows.
    """

    features: Tensor
    labels: Tensor
    n_classes: int
    n_train: int


def digits(folder: Path | None = None) -> Data:
    """1,797 digits of 8 x 8 pixels, which come with scikit-learn; 450 of them are to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return _images(data.data[order], data.target[order], n_train=len(order) - 450)


def mnist(folder: Path | None = None) -> Data:
    """MNIST: 60,000 + 10,000 images of 28 x 28; ``mnist.npz``, or OpenML."""
    return _idx(folder, "mnist.npz", "mnist_784")


def fashion_mnist(folder: Path | None = None) -> Data:
    """Fashion-MNIST: the like; ``fashion_mnist.npz``, or OpenML."""
    return _idx(folder, "fashion_mnist.npz", "Fashion-MNIST")


def cifar10(folder: Path | None = None) -> Data:
    """CIFAR-10: 50,000 + 10,000 images, 3 x 32 x 32; ``cifar10_jpeg.npz``, or OpenML."""
    n_train = 50_000
    if folder is None:
        x, y = _openml("CIFAR_10")
        y = y.astype(np.int64)
        _check_order("CIFAR_10", int(np.ptp(np.bincount(y[:n_train]))) == 0)
        return _images(x, y, n_train)
    arrays = np.load(_needed(folder, "cifar10_jpeg.npz"))
    images = np.concatenate([_decoded(arrays, part) for part in ("train", "test")])
    y = np.concatenate([arrays["y_train"], arrays["y_test"]])
    return _images(images.reshape(len(images), -1), y.ravel(), n_train)


def _decoded(arrays: Any, part: str) -> Any:
    """Images ``(n, 3, 32, 32)`` out of concatenated JPEG files."""
    from PIL import Image

    encoded, offsets = arrays[f"jpeg_{part}"].tobytes(), arrays[f"offsets_{part}"].tolist()
    files = [io.BytesIO(encoded[start:stop]) for start, stop in pairwise(offsets)]
    return np.stack([np.asarray(Image.open(file)) for file in files]).transpose(0, 3, 1, 2)


def adult(folder: Path | None = None) -> Data:
    """UCI Adult, 32,561 + 16,281 people, categories one-hot; ``adult_*.csv.gz``, or OpenML."""
    n_train = 32_561
    numbers = {0, 2, 4, 10, 11, 12}
    rows: list[list[str]] = []
    if folder is None:
        found, income = _openml("adult", version=2)
        rows = [[*map(str, row), label] for row, label in zip(found, income, strict=True)]
    else:
        for part in ("train", "test"):
            with gzip.open(_needed(folder, f"adult_{part}.csv.gz"), "rt") as file:
                rows += [[x.strip() for x in row] for row in csv.reader(file) if len(row) == 15]
    labels = [row[-1].startswith(">") for row in rows]
    _check_order("adult", sum(labels[:n_train]) == 7841)
    columns = []
    for number, cells in enumerate(list(zip(*rows, strict=True))[:-1]):
        if number in numbers:
            columns.append(np.array(cells, dtype=np.float64)[:, None])
        else:
            names, inverse = np.unique(cells, return_inverse=True)
            one_hot = np.eye(len(names))[inverse]
            columns.append(one_hot[:, one_hot.sum(0) > 30])
    return _table(np.concatenate(columns, axis=1), labels, n_train)


def wine(folder: Path | None = None) -> Data:
    """UCI Wine Quality, 6,497 red and white wines; ``winequality-*.csv``, or OpenML."""
    parts = []
    for colour, name in enumerate(("red", "white")):
        if folder is None:
            found, classes = _openml(f"wine-quality-{name}")
            # There the lowest quality, 3, is class 1.
            rows = np.column_stack([found, classes.astype(np.float64) + 2])
        else:
            rows = np.genfromtxt(_needed(folder, f"winequality-{name}.csv"), delimiter=",")
        rows = rows[~np.isnan(rows).any(axis=1)]
        parts.append(np.insert(rows, 0, colour, axis=1))
    rows = np.random.default_rng(0).permutation(np.concatenate(parts))
    return _table(rows[:, :-1], rows[:, -1].astype(int) - 3, n_train=len(rows) - 1000)


def news(folder: Path | None = None) -> Data:
    """20 Newsgroups by date, 256 components of TF-IDF; ``20news.parquet``, or scikit-learn."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    text, groups, n_train = _newsgroups(folder)
    terms = TfidfVectorizer(max_features=20_000, stop_words="english", sublinear_tf=True)
    # Learnt from the training rows alone.
    reduce = TruncatedSVD(256, random_state=0).fit(terms.fit_transform(text[:n_train]))
    _, labels = np.unique(np.array(groups), return_inverse=True)
    return _table(reduce.transform(terms.transform(text)), labels, n_train)


def _newsgroups(folder: Path | None) -> tuple[list[str], list[Any], int]:
    """Texts and their groups, the training ones first, and how many these are."""
    if folder is None:
        from sklearn.datasets import fetch_20newsgroups

        parts = [fetch_20newsgroups(subset=subset) for subset in ("train", "test")]
        texts = [text for part in parts for text in part.data]
        return texts, [g for part in parts for g in part.target], len(parts[0].data)
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(str(_needed(folder, "20news.parquet"))).to_pydict()
    order = np.argsort(np.array(table["split"]) == "test", kind="stable")
    texts = [table["text"][i] for i in order]
    return texts, [table["group"][i] for i in order], table["split"].count("train")


LOADERS: dict[str, Callable[[Path | None], Data]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
    "adult": adult,
    "wine": wine,
    "news": news,
}


def _needed(folder: Path | None, name: str) -> Path:
    if folder is None or not (folder / name).exists():
        raise FileNotFoundError(f"expected {name} in the data directory, which is {folder}")
    return folder / name


def _openml(name: str, version: int = 1) -> tuple[Any, Any]:
    """Features and target of a data set of OpenML, kept in scikit-learn's cache."""
    from sklearn.datasets import fetch_openml

    wanted = {"version": version, "as_frame": False, "parser": "auto"}
    features, target = fetch_openml(name, return_X_y=True, **wanted)
    return features, target


def _check_order(name: str, is_original: bool) -> None:
    """Refuse rows of which it is not known which are to test."""
    if not is_original:
        raise ValueError(
            f"expected the rows of {name} in their original order, training rows first, but they "
            "come otherwise; give a data directory"
        )


def _idx(folder: Path | None, name: str, openml: str) -> Data:
    if folder is None:
        x, y = _openml(openml)
    else:
        arrays = np.load(_needed(folder, name))
        x = np.concatenate([arrays["x_train"], arrays["x_test"]])
        y = np.concatenate([arrays["y_train"], arrays["y_test"]])
    return _images(x.reshape(len(x), -1), y, n_train=60_000)


def _images(x: Any, y: Any, n_train: int) -> Data:
    features = torch.tensor(np.asarray(x, dtype=np.float32))
    features = (features - features[:n_train].mean()) / features[:n_train].std()
    labels = torch.tensor(np.asarray(y).astype(np.int64))
    return Data(features, labels, int(labels.max()) + 1, n_train)


def _table(x: Any, y: Any, n_train: int) -> Data:
    x = np.asarray(x, dtype=np.float64)
    deviation = x[:n_train].std(axis=0)
    features = (x - x[:n_train].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    labels = torch.tensor(np.asarray(y).astype(np.int64))
    return Data(torch.tensor(features).float(), labels, int(labels.max()) + 1, n_train)
