"""The data sets of the examples, from a folder of files or, where it says so, from OpenML.

Features come standardised: images by one mean and deviation for all pixels, tables by column.
"""

import csv
import gzip
from collections.abc import Callable
from dataclasses import dataclass
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
    """MNIST: 60,000 + 10,000 images; ``mnist.npz`` of the folder, or OpenML without one."""
    return _idx(folder, "mnist.npz", "mnist_784")


def fashion_mnist(folder: Path | None = None) -> Data:
    """Fashion-MNIST: the like; ``fashion_mnist.npz`` of the folder, or OpenML without one."""
    return _idx(folder, "fashion_mnist.npz", "Fashion-MNIST")


def adult(folder: Path | None = None) -> Data:
    """UCI Adult, 32,561 + 16,281 people, categories one-hot; ``adult_*.csv.gz`` of the folder."""
    rows: list[list[str]] = []
    sizes = []
    for part in ("train", "test"):
        with gzip.open(_needed(folder, f"adult_{part}.csv.gz"), "rt") as file:
            found = [[cell.strip() for cell in row] for row in csv.reader(file) if len(row) == 15]
        rows += found
        sizes.append(len(found))
    columns = []
    for cells in list(zip(*rows, strict=True))[:-1]:
        try:
            columns.append(np.array(cells, dtype=np.float64)[:, None])
        except ValueError:
            names, inverse = np.unique(cells, return_inverse=True)
            one_hot = np.eye(len(names))[inverse]
            columns.append(one_hot[:, one_hot.sum(0) > 30])
    labels = [row[-1].startswith(">") for row in rows]
    return _table(np.concatenate(columns, axis=1), labels, n_train=sizes[0])


def wine(folder: Path | None = None) -> Data:
    """UCI Wine Quality, 6,497 red and white wines; ``winequality-*.csv`` of the folder."""
    parts = []
    for colour, name in enumerate(("red", "white")):
        rows = np.genfromtxt(_needed(folder, f"winequality-{name}.csv"), delimiter=",")
        rows = rows[~np.isnan(rows).any(axis=1)]
        parts.append(np.insert(rows, 0, colour, axis=1))
    rows = np.random.default_rng(0).permutation(np.concatenate(parts))
    return _table(rows[:, :-1], rows[:, -1].astype(int) - 3, n_train=len(rows) - 1000)


def news(folder: Path | None = None) -> Data:
    """20 Newsgroups by date, 256 components of TF-IDF; ``20news.parquet`` of the folder."""
    import pyarrow.parquet
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    table = pyarrow.parquet.read_table(str(_needed(folder, "20news.parquet"))).to_pydict()
    order = np.argsort(np.array(table["split"]) == "test", kind="stable")
    n_train = table["split"].count("train")
    text = [table["text"][i] for i in order]
    terms = TfidfVectorizer(max_features=20_000, stop_words="english", sublinear_tf=True)
    # Learnt from the training rows alone.
    reduce = TruncatedSVD(256, random_state=0).fit(terms.fit_transform(text[:n_train]))
    _, labels = np.unique(np.array(table["group"])[order], return_inverse=True)
    return _table(reduce.transform(terms.transform(text)), labels, n_train)


LOADERS: dict[str, Callable[[Path | None], Data]] = {
    "digits": digits,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "adult": adult,
    "wine": wine,
    "news": news,
}


def _needed(folder: Path | None, name: str) -> Path:
    if folder is None or not (folder / name).exists():
        raise FileNotFoundError(f"expected {name} in the data directory, which is {folder}")
    return folder / name


def _idx(folder: Path | None, name: str, openml: str) -> Data:
    if folder is None:
        from sklearn.datasets import fetch_openml

        x, y = fetch_openml(openml, version=1, return_X_y=True, as_frame=False, parser="auto")
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
