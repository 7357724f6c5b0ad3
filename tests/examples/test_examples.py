import pytest
import torch

from examples import existing_after, existing_before, regression
from examples.compare import compare, deal_out, report
from examples.datasets import LOADERS, digits, mnist
from examples.sources import RECIPES, make_sources

CLASSES = 6


@pytest.fixture(scope="module")
def dealt():
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(6000, 4, generator=generator), torch.arange(6000) % CLASSES
    return features, labels, make_sources(features, labels, CLASSES, seed=0)


def original_of(features, rows):
    """Position of the nearest original of each row, and the distance to it."""
    return torch.cdist(rows, features).min(1)


def test_sources_are_equal_in_size_and_disjoint(dealt):
    features, _, parts = dealt
    assert list(parts) == list(RECIPES)
    assert {len(part.labels) for part in parts.values()} == {1000}
    clean = torch.cat([part.features[part.is_clean] for part in parts.values()])
    nearest = original_of(features, clean)
    assert nearest.values.max() < 0.01
    assert len(nearest.indices.unique()) == len(clean)


def test_clean_means_the_right_label_on_untouched_features(dealt):
    features, labels, parts = dealt
    for part in parts.values():
        clean = part.is_clean
        if clean.any():
            nearest = original_of(features, part.features[clean])
            assert torch.equal(labels[nearest.indices], part.labels[clean])


@pytest.mark.parametrize(
    ("name", "share"), [("some_wrong_labels", 0.2), ("many_wrong_labels", 0.5)]
)
def test_wrong_labels_are_as_many_as_told_and_never_right(dealt, name, share):
    features, labels, parts = dealt
    part = parts[name]
    true = labels[original_of(features, part.features).indices]
    assert torch.equal(true != part.labels, ~part.is_clean)
    assert int((~part.is_clean).sum()) == round(1000 * share)
    assert len(part.labels[~part.is_clean].unique()) == CLASSES


def test_the_other_recipes(dealt):
    _, _, parts = dealt
    assert not parts["noisy_features"].is_clean.any()
    skewed = parts["skewed_classes"]
    assert len(skewed.labels.unique()) == CLASSES // 3
    assert len(skewed.features.unique(dim=0)) == int(skewed.is_clean.sum())
    duplicates = parts["near_duplicates"]
    assert int(duplicates.is_clean.sum()) == 50
    distances = original_of(duplicates.features[duplicates.is_clean], duplicates.features).values
    assert distances[~duplicates.is_clean].mean() == pytest.approx(0.05 * 1.88, rel=0.1)


def test_the_same_seed_deals_the_same(dealt):
    features, labels, parts = dealt
    again = make_sources(features, labels, CLASSES, seed=0)
    assert all(torch.equal(again[name].features, parts[name].features) for name in parts)


def test_digits_end_to_end(tmp_path):
    problem = deal_out(digits(), seed=1, n_val=150, budget=0.2, batch_size=16, steps=600)
    result = compare(problem, tmp_path, seed=1)
    assert result.closed > 0.5
    assert result.later_shares["many_wrong_labels"] < 0.05
    assert result.n_selected == round(0.2 * 1194)
    text = report(problem, [result], tmp_path)
    assert "many_wrong_labels" in text
    assert (tmp_path / "selection_1.parquet").exists()
    assert (tmp_path / "metrics" / "seed_1" / "metrics.csv").exists()


def test_tuning_leaves_the_test_rows_alone():
    data = digits()
    problem = deal_out(data, 0, n_val=100, budget=0.1, tuning=True)
    pool = torch.cat([problem.parts["clean"].features, problem.test.tensors[0]])
    assert original_of(data.features[data.n_train :], pool).values.min() > 0


def test_an_existing_project_before_and_after(capsys):
    existing_before.main()
    existing_after.main()
    shares = capsys.readouterr().out.split("share of the selection: ")[1]
    assert "'north'" in shares
    archive = float(shares.split("'archive': ")[1].rstrip("}\n")) if "'archive'" in shares else 0.0
    assert archive < 0.1


@pytest.mark.slow
def test_regression(capsys):
    regression.main()
    words = capsys.readouterr().out.split()
    error = float(words[words.index("DVC") + 1])
    assert error < float(words[words.index("selection") + 1])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mnist\.npz"):
        mnist(tmp_path)
    assert "mnist" in LOADERS
