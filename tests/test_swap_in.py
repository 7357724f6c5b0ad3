"""Datamodules in the styles that public projects have, each wrapped and trained from as it is."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.problems import CLASSES, WIDTH, Net, generator, good, labelled, trainer, wrong
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.demos.mnist_datamodule import MNISTDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
    random_split,
)

from lightning_dvc import DVCCallback, DVCDataModule, Source, split_by
from lightning_dvc.errors import ConfigurationError
from lightning_dvc.loaders import LoaderSettings


def fit(model, datamodule, monitor=None, max_epochs=2, **settings):
    run = trainer(max_epochs=max_epochs, callbacks=[DVCCallback(monitor=monitor)], **settings)
    run.fit(model, datamodule)
    return run


# -- Lightning's own tutorials: images on disk, a transform, a random split in setup


class Images(Dataset):
    """As torchvision's: arrays, a transform, and who drew each."""

    def __init__(self, train, transform=None):
        self.data, self.targets = labelled(120 if train else 30, seed=0 if train else 5)
        self.writer = ["pupil" if i % 3 else "clerk" for i in range(len(self.targets))]
        self.transform = transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x = self.data[index]
        return (self.transform(x) if self.transform else x), int(self.targets[index])


class MNISTStyle(LightningDataModule):
    def __init__(self, data_dir="somewhere", batch_size=16):
        super().__init__()
        self.save_hyperparameters()
        self.transform = lambda x: (x - 0.5) / 2
        self.dims = (WIDTH,)
        self.n_classes = CLASSES
        self.stages = []

    def prepare_data(self):
        assert self.trainer is not None
        self.stages.append("prepare_data")

    def setup(self, stage):
        self.stages.append(stage)
        if stage == "fit":
            full = Images(train=True, transform=self.transform)
            parts = random_split(full, [100, 20], generator=generator(42))
            self.images_train, self.images_val = parts
        if stage in ("test", "predict"):
            self.images_test = Images(train=False, transform=self.transform)

    def train_dataloader(self):
        return DataLoader(self.images_train, batch_size=self.hparams.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.images_val, batch_size=self.hparams.batch_size)

    def test_dataloader(self):
        return DataLoader(self.images_test, batch_size=10)

    def predict_dataloader(self):
        return DataLoader(self.images_test, batch_size=10)

    def teardown(self, stage):
        self.stages.append("end of " + stage)
        if stage == "fit":
            del self.images_train, self.images_val


class AsksTheDataModule(Net):
    """Its head is made for the classes that the trainer's datamodule knows of."""

    def configure_model(self):
        self.head = nn.Linear(16, self.trainer.datamodule.n_classes)

    def predict_step(self, batch, batch_idx):
        return self(batch[0]).argmax(1)


def test_images_with_a_random_split_in_setup():
    theirs = MNISTStyle()
    datamodule = DVCDataModule.wrap(theirs, sources="writer", budget=0.3)
    model = AsksTheDataModule()
    run = fit(model, datamodule, monitor="val_acc")
    assert sorted(datamodule.pools.names) == ["clerk", "pupil"]
    assert sum(datamodule.pools.sizes) == 100
    for name in ("clerk", "pupil"):
        part = datamodule.pools.sources[name].dataset
        kept = part.dataset.indices
        assert {part.dataset.dataset.writer[kept[i]] for i in part.indices} == {name}
    assert len(datamodule.reference) == 20
    run.test(model, datamodule, verbose=False)
    assert len(torch.cat(run.predict(model, datamodule))) == 30
    assert theirs.stages == [
        "prepare_data",
        "fit",
        "end of fit",
        "prepare_data",
        "test",
        "end of test",
        "prepare_data",
        "predict",
        "end of predict",
    ]
    assert datamodule.dims == (WIDTH,)
    with pytest.raises(AttributeError, match=r"MNISTStyle.* has no attribute 'height'"):
        _ = datamodule.height


class Images28(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 5, stride=4), nn.Linear(144, 10)

    def forward(self, x):
        return self.head(self.conv(x).relu().flatten(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning", "ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_mnist_datamodule_of_lightnings_demos(tmp_path, monkeypatch, num_workers):
    monkeypatch.setenv("PL_USE_MOCKED_MNIST", "1")  # reads files, rather than torchvision's
    folder = tmp_path / "MNIST" / "complete"
    folder.mkdir(parents=True)
    for name, n in (("training", 120), ("test", 32)):
        digits = torch.arange(n) % 10
        images = torch.randint(64, (n, 28, 28), generator=generator(n), dtype=torch.uint8)
        images[torch.arange(n), 2 * digits] = 255
        torch.save((images, digits), folder / f"{name}.pt")
    theirs = MNISTDataModule(
        str(tmp_path), val_split=20, num_workers=num_workers, normalize=True, batch_size=8
    )
    datamodule = DVCDataModule.wrap(theirs, sources="targets", budget=0.4, rounds=2)
    model = Images28()
    run = fit(model, datamodule, monitor="val_acc", max_epochs=3)
    assert len(datamodule.selection.set_aside) == 0
    assert sorted(datamodule.pools.names) == [str(digit) for digit in range(10)]
    assert len(datamodule.selection) == 40
    assert datamodule.reference is theirs.dataset_val
    loader = datamodule.train_dataloader()
    assert (loader.batch_size, loader.drop_last, loader.pin_memory) == (8, True, True)
    assert loader.num_workers == num_workers
    assert datamodule.num_classes == 10
    (figures,) = run.test(model, datamodule, verbose=False)
    assert figures["val_acc"] > 0.2  # of ten digits


def test_training_goes_on_in_another_fit_with_the_datasets_made_anew():
    theirs = MNISTStyle()
    datamodule = DVCDataModule.wrap(theirs, sources="writer", budget=0.3)
    callback = DVCCallback(monitor="val_acc")
    trainer(max_epochs=2, callbacks=[callback]).fit(Net(), datamodule)
    before, selected = datamodule.pools.dataset, datamodule.selected_ids
    datamodule.add_source("new", good(20, seed=7))
    trainer(max_epochs=2, callbacks=[callback]).fit(Net(), datamodule)
    assert datamodule.pools.names[-1] == "new"
    assert datamodule.pools.dataset is not before
    assert datamodule.reference is not None
    assert torch.equal(datamodule.selected_ids[: len(selected)], selected)
    assert datamodule.budget == len(datamodule.selection) == 30


def test_an_attribute_can_be_read_from_a_copy_and_from_a_pickle():
    theirs = MNISTStyle()
    theirs.transform = None  # a lambda, which cannot be pickled
    datamodule = DVCDataModule.wrap(theirs, sources="writer", budget=0.3)
    for again in (
        copy.copy(datamodule),
        copy.deepcopy(datamodule),
        pickle.loads(pickle.dumps(datamodule)),
    ):
        assert again.n_classes == CLASSES
        assert again.hparams == {"data_dir": "somewhere", "batch_size": 16}
        assert not hasattr(again, "_n_classes")
    assert not hasattr(DVCDataModule.wrap(BoringDataModule(), budget=2), "n_classes")


# -- Lightning's demo classes


def test_the_boring_datamodule():
    datamodule = DVCDataModule.wrap(BoringDataModule(), budget=0.5, rounds=2)
    run = fit(BoringModel(), datamodule, max_epochs=3)
    assert len(datamodule.selection) == 32
    assert datamodule.reference is datamodule.random_val
    run.test(BoringModel(), datamodule, verbose=False)


def test_a_datamodule_made_of_datasets():
    theirs = LightningDataModule.from_datasets(
        ConcatDataset([good(60), wrong(40)]), val_dataset=good(30, seed=5), batch_size=16
    )
    theirs.val_dataloader().pin_memory = False
    datamodule = DVCDataModule.wrap(theirs, {"good": range(60), "wrong": range(60, 100)}, budget=20)
    with pytest.warns(UserWarning, match="pin_memory"):
        fit(Net(), datamodule, monitor="val_acc")
    assert len(datamodule.selection) == 20


@pytest.mark.parametrize("kind", [list, tuple, dict, CombinedLoader])
def test_several_training_loaders_are_refused(kind):
    class Several(BoringDataModule):
        def train_dataloader(self):
            loaders = {"a": super().train_dataloader(), "b": super().train_dataloader()}
            if kind is CombinedLoader:
                return CombinedLoader(loaders)
            return loaders if kind is dict else kind(loaders.values())

    with pytest.raises(
        ConfigurationError, match=f"returned a {kind.__name__}; return one loader over a torch"
    ):
        fit(BoringModel(), DVCDataModule.wrap(Several(), budget=0.5))


# -- texts: a table of columns, a tokenizer's dict per sample, and batches padded by a collator


class Table(Dataset):
    """As a Hugging Face dataset: ``table[3]`` is a row, ``table["label"]`` a column.

    Both have only the columns of the format that was set, although ``column_names`` tells all.
    """

    def __init__(self, columns, shown=None):
        self._columns, self._shown = columns, shown

    @property
    def column_names(self):
        return list(self._columns)

    def set_format(self, columns):
        self._shown = columns

    def with_format(self, kind):
        assert kind is None
        return Table(self._columns)

    def __len__(self):
        return len(self._columns["label"])

    def __getitem__(self, key):
        shown = {name: self._columns[name] for name in self._shown or self._columns}
        return shown[key] if isinstance(key, str) else {name: c[key] for name, c in shown.items()}

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def texts(n, seed, words=30, length=6):
    """The label is whether more of the words are from the second half of the vocabulary."""
    numbers = np.random.default_rng(seed)
    ids = [numbers.integers(1, words, numbers.integers(2, length)).tolist() for _ in range(n)]
    domains = ["reviews" if i % 2 else "forum" for i in range(n)]
    label = [int(np.mean(np.array(text) > words // 2) > 0.5) for text in ids]
    label = [1 - y if d == "forum" else y for y, d in zip(label, domains, strict=True)]
    mask = [[1] * len(text) for text in ids]
    return Table({"input_ids": ids, "attention_mask": mask, "label": label, "domain": domains})


class PaddingCollator:
    def __call__(self, features):
        longest = max(len(feature["input_ids"]) for feature in features)

        def padded(name):
            return [f[name] + [0] * (longest - len(f[name])) for f in features]

        batch = {name: torch.tensor(padded(name)) for name in ("input_ids", "attention_mask")}
        return {**batch, "labels": torch.tensor([f["label"] for f in features])}


class TextDataModule(LightningDataModule):
    def __init__(self, train_batch_size=16, eval_batch_size=32):
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.collator = PaddingCollator()
        self.num_labels = 2

    def setup(self, stage):
        self.dataset = {
            "train": texts(120, seed=0),
            "validation": texts(40, seed=1),
            "validation_mismatched": texts(30, seed=2),
        }
        for table in self.dataset.values():
            table.set_format(columns=["input_ids", "attention_mask", "label"])
        self.eval_splits = [name for name in self.dataset if "validation" in name]

    def train_dataloader(self):
        return DataLoader(
            self.dataset["train"],
            batch_size=self.hparams.train_batch_size,
            shuffle=True,
            collate_fn=self.collator,
        )

    def val_dataloader(self):
        return [
            DataLoader(
                self.dataset[name],
                batch_size=self.hparams.eval_batch_size,
                collate_fn=self.collator,
            )
            for name in self.eval_splits
        ]


class TextModel(LightningModule):
    """As a transformer for sequences: takes a batch as keyword arguments, returns its loss."""

    def __init__(self, num_labels=2):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 8)
        self.head = nn.Linear(8, num_labels)

    def forward(self, input_ids, attention_mask, labels=None):
        mask = attention_mask.unsqueeze(2)
        logits = self.head((self.embed(input_ids) * mask).sum(1) / mask.sum(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}

    def training_step(self, batch, batch_idx):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        return self(**batch)["loss"]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        hits = (self(**batch)["logits"].argmax(1) == batch["labels"]).float().mean()
        self.log("val_acc", hits)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05)


def test_texts_in_dicts_padded_by_a_collator_with_several_validation_sets():
    theirs = TextDataModule()
    datamodule = DVCDataModule.wrap(theirs, sources="domain", budget=0.5, rounds=2)
    run = fit(
        TextModel(),
        datamodule,
        monitor="val_acc/dataloader_idx_0",
        max_epochs=4,
        num_sanity_val_steps=0,
    )
    assert sorted(datamodule.pools.sizes) == [60, 60]
    assert len(datamodule.selection) == 60
    assert datamodule.train_dataloader().collate_fn is theirs.collator
    assert len(datamodule.reference) == 70
    assert set(run.callback_metrics) == {"val_acc/dataloader_idx_0", "val_acc/dataloader_idx_1"}


def test_a_table_of_hugging_face_whose_format_hides_the_column():
    tables = pytest.importorskip("datasets")

    class Glue(LightningDataModule):
        """As in Lightning's tutorial on text."""

        def setup(self, stage):
            made = {"train": texts(90, seed=0), "validation": texts(40, seed=1)}
            self.dataset = tables.DatasetDict(
                {name: tables.Dataset.from_dict(table._columns) for name, table in made.items()}
            )
            for table in self.dataset.values():
                table.set_format(columns=["input_ids", "attention_mask", "label"])

        def train_dataloader(self):
            loads = {"batch_size": 16, "shuffle": True, "collate_fn": PaddingCollator()}
            return DataLoader(self.dataset["train"], **loads)

        def val_dataloader(self):
            table = self.dataset["validation"]
            return DataLoader(table, batch_size=32, collate_fn=PaddingCollator())

    datamodule = DVCDataModule.wrap(Glue(), sources="domain", budget=0.5, rounds=2)
    fit(TextModel(), datamodule, monitor="val_acc", max_epochs=3)
    assert sorted(datamodule.pools.names) == ["forum", "reviews"]
    assert len(datamodule.selection) == 45
    assert len(datamodule.reference) == 40


# -- tables: continuous and categorical features under names, workers


class TableRows(Dataset):
    def __init__(self, n, seed):
        self.continuous, self.target = labelled(n, seed)
        self.categorical = torch.randint(5, (n, 2), generator=generator(seed + 3))
        self.region = torch.arange(n) % 3

    def __len__(self):
        return len(self.target)

    def __getitem__(self, index):
        names = ("continuous", "categorical", "target")
        return {name: getattr(self, name)[index] for name in names}


def _seed_worker(number):
    np.random.seed(number)  # noqa: NPY002


class TabularDataModule(LightningDataModule):
    def __init__(self, num_workers=1):
        super().__init__()
        self.num_workers = num_workers

    def setup(self, stage=None):
        self.train_dataset, self.validation_dataset = TableRows(90, seed=0), TableRows(30, seed=5)
        self.categorical_cardinality = [5, 5]

    def train_dataloader(self):
        return DataLoader(
            self.train_dataset,
            16,
            shuffle=True,
            drop_last=True,
            num_workers=self.num_workers,
            worker_init_fn=_seed_worker,
            multiprocessing_context="fork",
        )

    def val_dataloader(self):
        return CombinedLoader({"all": DataLoader(self.validation_dataset, 16)}, "sequential")


class TabularModel(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.ModuleList(nn.Embedding(5, 3) for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Sequential(nn.Linear(WIDTH + 6, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x):
        parts = [e(x["categorical"][:, i]) for i, e in enumerate(self.embeddings)]
        return self.head(torch.cat([self.norm(x["continuous"]), *parts], dim=1))

    def training_step(self, batch, batch_idx):
        return nn.CrossEntropyLoss()(self(batch), batch["target"])

    def validation_step(self, batch, batch_idx):
        self.log("valid_loss", nn.CrossEntropyLoss()(self(batch), batch["target"]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_tables_with_mixed_features_and_workers():
    datamodule = DVCDataModule.wrap(TabularDataModule(), sources="region", budget=30)
    fit(TabularModel(), datamodule, monitor="valid_loss")
    assert datamodule.pools.names == ["0", "1", "2"]
    assert len(datamodule.selection) == 30
    assert datamodule.reference is datamodule.validation_dataset
    loader = datamodule.train_dataloader()
    assert (loader.num_workers, loader.worker_init_fn.function) == (1, _seed_worker)


class Frame(Dataset):
    """Rows of a DataFrame of pandas, by the names of their columns."""

    def __init__(self, frame, continuous, categorical, target):
        self.y = frame[target].to_numpy()
        self.continuous = frame[continuous].to_numpy(dtype=np.float32, copy=True)
        self.categorical = frame[categorical].to_numpy(dtype=np.int64, copy=True)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        parts = (self.continuous[index], self.categorical[index], self.y[index])
        return dict(zip(("continuous", "categorical", "target"), parts, strict=True))


class FrameDataModule(LightningDataModule):
    def __init__(self, train, validation, batch_size=16):
        super().__init__()
        self.train, self.validation, self.batch_size = train, validation, batch_size

    def setup(self, stage=None):
        columns = ([f"c{i}" for i in range(WIDTH)], ["k0", "k1"], "target")
        self.train_dataset = Frame(self.train, *columns)
        self.validation_dataset = Frame(self.validation, *columns)

    def train_dataloader(self):
        return DataLoader(self.train_dataset, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.validation_dataset, self.batch_size)


@pytest.mark.parametrize("given", ["series", "categories", "groups", "function"])
def test_tables_that_come_from_a_data_frame(given):
    pandas = pytest.importorskip("pandas")

    def frame(n, seed):
        rows = TableRows(n, seed)
        made = pandas.DataFrame(rows.continuous.numpy(), columns=[f"c{i}" for i in range(WIDTH)])
        made["k0"], made["k1"] = rows.categorical.numpy().T
        made["target"] = rows.target.numpy()
        made["region"] = ["north", "south", "west"] * (n // 3)
        return made

    train = frame(90, 0).sample(frac=1.0, random_state=3)  # its index is out of order
    sources = {
        "series": train["region"],
        "categories": train["region"].astype("category"),
        "groups": train.groupby("region").indices,
        "function": lambda dataset: train["region"].tolist(),
    }
    datamodule = DVCDataModule.wrap(FrameDataModule(train, frame(30, 5)), sources[given], budget=30)
    fit(TabularModel(), datamodule, monitor="valid_loss")
    assert sorted(datamodule.pools.names) == ["north", "south", "west"]
    for name in datamodule.pools.names:
        indices = datamodule.pools.sources[name].dataset.indices
        assert set(train["region"].iloc[indices]) == {name}
    assert len(datamodule.selection) == 30


# -- validation in a CombinedLoader


class Combined(LightningDataModule):
    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def setup(self, stage):
        self.train = ConcatDataset([good(60), wrong(40)])
        self.held_out = {"near": good(20, seed=5), "far": good(30, seed=6)}

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16, shuffle=True)

    def val_dataloader(self):
        loaders = {name: DataLoader(held, batch_size=10) for name, held in self.held_out.items()}
        return CombinedLoader(loaders, self.mode)


class ValidatingBoth(Net):
    """Its batches are those of all loaders at once, unless one comes after the other."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        self.sizes.append([0 if part is None else len(part[0]) for part in parts])


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        ("sequential", [[10]] * 5),
        ("min_size", [[10, 10]] * 2),
        ("max_size_cycle", [[10, 10]] * 3),
        ("max_size", [[10, 10], [10, 10], [0, 10]]),
    ],
)
def test_validation_in_a_combined_loader_goes_on_as_it_did(mode, sizes):
    model = ValidatingBoth()
    sources = {"good": range(60), "wrong": range(60, 100)}
    datamodule = DVCDataModule.wrap(Combined(mode), sources, budget=0.3)
    fit(model, datamodule, num_sanity_val_steps=0)
    assert model.sizes == sizes * 2
    assert len(datamodule.reference) == 50
    assert len(datamodule.selection) == 30


# -- hooks and workers


class Hooked(Combined):
    """Its batches become what the model takes only on their way to it."""

    def __init__(self):
        super().__init__("sequential")
        self.prepare_data_per_node = False
        self.failures = []

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return {"x": x, "y": y}

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {**batch, "device": device}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "x": 10 * batch["x"]}

    def on_exception(self, exception):
        self.failures.append(exception)


class TakesHooked(Net):
    def training_step(self, batch, batch_idx):
        assert batch["device"] == self.device
        assert batch["x"].abs().mean() > 12
        return F.cross_entropy(self(batch["x"]), batch["y"])

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        assert batch["x"].abs().mean() > 12

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.current_epoch == 1:
            raise RuntimeError("enough")


def test_what_is_scored_comes_through_the_hooks_of_the_datamodule():
    theirs = Hooked()
    datamodule = DVCDataModule.wrap(theirs, budget=0.3)
    assert datamodule.prepare_data_per_node is False
    with pytest.raises(RuntimeError, match="enough"):
        fit(TakesHooked(), datamodule)
    assert len(datamodule.selection) == 30
    assert [str(error) for error in theirs.failures] == ["enough"]


class InAFile(Dataset):
    """Opens its file in each worker, as one does with HDF5: it cannot be read before."""

    def __init__(self, path):
        self.path, self.rows = path, None

    def __len__(self):
        return 60

    def __getitem__(self, index):
        return tuple(column[index] for column in self.rows)


def _open_file(worker):
    dataset = get_worker_info().dataset
    dataset.rows = torch.load(dataset.path)


class FromAFile(Combined):
    def __init__(self, path):
        super().__init__("sequential")
        self.path = path

    def setup(self, stage):
        super().setup(stage)
        self.train = InAFile(self.path)

    def train_dataloader(self):
        return DataLoader(
            self.train,
            batch_size=2,
            num_workers=1,
            worker_init_fn=_open_file,
            multiprocessing_context="fork",
            timeout=60,
            prefetch_factor=3,
            persistent_workers=True,
        )

    def val_dataloader(self):
        return DataLoader(self.held_out["near"], batch_size=10)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("sources", [None, {"a": range(30), "b": range(30, 60)}])
def test_a_worker_is_set_up_to_read_also_what_is_scored(tmp_path, sources):
    torch.save(good(60).tensors, tmp_path / "samples.pt")
    theirs = FromAFile(tmp_path / "samples.pt")
    datamodule = DVCDataModule.wrap(theirs, sources, budget=30, rounds=1)
    looks, before = [], []

    class Looked(Net):
        def training_step(self, batch, batch_idx):
            looks.append(len(batch[0]))
            return super().training_step(batch, batch_idx)

    class Trial(Callback):
        def on_train_start(self, *args):
            before.extend(looks)

    trainer(max_epochs=1, callbacks=[DVCCallback(), Trial()]).fit(Looked(), datamodule)
    assert before == [30, 2, 30, 30]  # the trial, of the pool, as the warm-up is too small
    assert len(datamodule.selection.set_aside) == 0
    assert len(datamodule.selection) == 30
    loader = datamodule.train_dataloader()
    assert (loader.timeout, loader.prefetch_factor, loader.persistent_workers) == (60, 3, True)
    assert loader.multiprocessing_context.get_start_method() == "fork"


def test_a_worker_that_is_spawned_is_set_up_too(tmp_path):
    theirs = FromAFile(tmp_path / "samples.pt")
    datamodule = set_up(theirs, {"a": range(30), "b": range(30, 60)})
    loader = datamodule.train_dataloader()
    # Sent together, as torch sends them to a worker.
    served, init = pickle.loads(pickle.dumps((loader.dataset, loader.worker_init_fn)))
    init.dataset.rows = good(60).tensors
    assert torch.equal(served[40][0], good(60).tensors[0][40])


def test_a_larger_batch_may_take_longer_to_read():
    settings = LoaderSettings(batch_size=8, num_workers=1, timeout=5, prefetch_factor=9)
    assert settings.of_workers(64)["timeout"] == 40
    assert settings.of_workers(4)["timeout"] == 5
    assert "prefetch_factor" not in settings.of_workers(64)


def test_a_loader_that_changes_its_batches_is_replaced_with_a_warning():
    class Halving(DataLoader):
        def __iter__(self):
            return (batch[::2] for batch in super().__iter__())

    class Own(Combined):
        def train_dataloader(self):
            return Halving(self.train, batch_size=16)

    with pytest.warns(UserWarning, match="is a Halving, which goes over its batches in a way of"):
        set_up(Own("sequential"))


# -- what the reference is made of


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class NoLength(Dataset):
    """Samples like those of training, without end."""

    def __getitem__(self, index):
        return torch.zeros(WIDTH), torch.tensor(0)


class Validating(BoringDataModule):
    """Its validation loaders are made of what it is given, out of the training set."""

    def __init__(self, datasets):
        super().__init__()
        self.datasets = datasets

    def setup(self, stage):
        self.train = good(60)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=16)

    def val_dataloader(self):
        return [DataLoader(dataset) for dataset in self.datasets(self.train)]


def set_up(theirs, sources=None, **settings):
    datamodule = DVCDataModule.wrap(theirs, sources, **{"budget": 0.5, **settings})
    datamodule.setup("fit")
    return datamodule


class Renamed(Dataset):
    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"x": torch.zeros(WIDTH), "y": 0}


def test_several_validation_sets_are_the_reference_but_not_the_training_set():
    assert set_up(Validating(lambda train: [])).reference is None
    both = set_up(Validating(lambda train: [train, good(20, 5), good(10, 6)]))
    assert len(both.reference) == 30
    one = good(20, 5)
    assert set_up(Validating(lambda train: [train, one])).reference is one
    given = set_up(Validating(lambda train: [Renamed(), Stream()]), reference=one)
    assert given.reference is one


@pytest.mark.parametrize(
    ("datasets", "kinds"),
    [
        (lambda train: [Stream()], r"\(Stream\)"),
        (lambda train: [good(20, 5), Renamed()], r"\(TensorDataset, Renamed\)"),
        (lambda train: [good(20, 5), Stream()], r"\(TensorDataset, Stream\)"),
        (lambda train: [train], r"\(TensorDataset\)"),
        (lambda train: [NoLength()], r"\(NoLength\)"),
    ],
)
def test_validation_data_that_cannot_be_the_reference_is_told(datasets, kinds):
    with pytest.warns(UserWarning, match=f"{kinds} is not held out.*as reference=dataset"):
        assert set_up(Validating(datasets)).reference is None


# -- one dataset for both, told apart by samplers


class SplitBySamplers(LightningDataModule):
    def __init__(self, sampler=SubsetRandomSampler):
        super().__init__()
        self.sampler = sampler
        self.data = good(50)
        self.data.source = ["even", "odd"] * 25

    def train_dataloader(self):
        return DataLoader(self.data, sampler=self.sampler(list(range(40))), batch_size=8)

    def val_dataloader(self):
        return DataLoader(self.data, sampler=self.sampler(list(range(40, 50))), batch_size=8)


@pytest.mark.parametrize("sampler", [SubsetRandomSampler, list])
def test_what_the_sampler_leaves_to_validation_is_not_trained_on(sampler):
    datamodule = set_up(SplitBySamplers(sampler), "source")
    assert datamodule.pools.sizes == [20, 20]
    assert isinstance(datamodule.reference, Subset)
    assert datamodule.reference.indices == list(range(40, 50))


def test_a_sampler_of_their_own_is_replaced_with_a_warning():
    class Mine(Sampler):
        def __init__(self, indices):
            self.indices = indices

        def __len__(self):
            return len(self.indices)

        def __iter__(self):
            return iter(self.indices)

    with (
        pytest.warns(UserWarning, match="draws with a Mine. Selection replaces"),
        pytest.warns(UserWarning, match="is not held out"),
    ):
        set_up(SplitBySamplers(Mine))


# -- sources


def test_sources_are_told_by_a_function_once_the_datamodule_is_set_up():
    class Sizes(MNISTStyle):
        def setup(self, stage):
            super().setup(stage)
            self.half = len(self.images_train) // 2

    theirs = Sizes()

    def bounded(train):
        parts = split_by(train, {"first": range(theirs.half), "rest": range(theirs.half, 100)})
        return {"first": Source(parts["first"], max_share=0.2), "rest": parts["rest"]}

    datamodule = set_up(theirs, bounded)
    assert datamodule.pools.sizes == [50, 50]
    assert datamodule.pools.sources["first"].max_share == 0.2
    assert set_up(theirs, lambda train: np.arange(100) % 4).pools.sizes == [25] * 4
    assert (
        set_up(theirs, lambda train: "writer").pools.sizes == set_up(theirs, "writer").pools.sizes
    )


def test_a_column_is_found_in_parts_and_in_what_was_put_together():
    table = texts(6, seed=0)
    both = ConcatDataset([Subset(table, [1, 0, 3]), table])
    parts = split_by(both, "domain")
    assert {name: list(part.indices) for name, part in parts.items()} == {
        "reviews": [0, 2, 4, 6, 8],
        "forum": [1, 3, 5, 7],
    }


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("bank", r"a column 'bank'.* a Table, has \['input_ids', 'attention_mask', 'label', 'dom"),
        ([[0, 1, 2], [3, 4, 5]], r"for indices, give them by name"),
        ([(0, 2), (2, 6)], r"for indices, give them by name"),
        ([range(2), [2, 3, 4, 5]], r"for indices, give them by name"),
        ([range(2), range(1, 6)], r"in more than one source"),
        ([range(2), range(2, 7)], r"in 0 \.\. 5, but go from 0 to 6"),
        ({"a": np.array([True, False] * 3)}, r"give np.flatnonzero\(mask\)"),
    ],
)
def test_sources_that_are_not_told_are_refused(groups, message):
    with pytest.raises(ConfigurationError, match=message):
        split_by(texts(6, seed=0), groups)


def test_names_may_be_missing_and_indices_numbers_of_numpy():
    parts = split_by(list("abcd"), np.array(["x", None, "x", 3], dtype=object))
    assert {name: list(part.indices) for name, part in parts.items()} == {
        "x": [0, 2],
        "None": [1],
        "3": [3],
    }
    datamodule = set_up(Validating(lambda train: []), {"a": list(np.arange(60))})
    assert datamodule.pools.sizes == [60]


# -- state, hyperparameters, and a saved selection


class Stateful(MNISTStyle):
    def __init__(self, data_dir="somewhere", batch_size=16):
        super().__init__(data_dir, batch_size)
        self.save_hyperparameters()
        self.fits = 0

    def setup(self, stage):
        super().setup(stage)
        if stage == "validate":
            self.images_val = Images(train=False)

    def train_dataloader(self):
        self.fits += 1
        return super().train_dataloader()

    def state_dict(self):
        return {"fits": self.fits}

    def load_state_dict(self, state_dict):
        self.fits = 100 + state_dict["fits"]


def test_state_and_hyperparameters_are_those_of_the_wrapped_one(tmp_path):
    datamodule = DVCDataModule.wrap(Stateful(batch_size=8), "writer", budget=0.3)
    model = Net()
    run = fit(model, datamodule, monitor="val_acc")
    run.save_checkpoint(tmp_path / "saved.ckpt")
    assert datamodule.wrapped.fits == 1
    assert Stateful.load_from_checkpoint(tmp_path / "saved.ckpt").hparams == datamodule.hparams

    again = DVCDataModule.wrap(Stateful(batch_size=8), "writer", budget=0.3)
    callback = DVCCallback(monitor="val_acc")
    longer = trainer(max_epochs=3, callbacks=[callback])
    longer.fit(model, again, ckpt_path=tmp_path / "saved.ckpt")
    assert again.wrapped.fits == 101
    assert torch.equal(again.selected_ids, datamodule.selected_ids)

    validated = DVCDataModule.wrap(Stateful(batch_size=8), "writer", budget=0.3)
    run = trainer(callbacks=[DVCCallback(monitor="val_acc")])
    run.validate(model, validated, ckpt_path=tmp_path / "saved.ckpt", verbose=False)
    assert validated.wrapped.fits == 101


def test_hyperparameters_are_logged_as_the_wrapped_one_would():
    for theirs, logs in ((MNISTStyle(), True), (BoringDataModule(), False)):
        datamodule = DVCDataModule.wrap(theirs, budget=0.5)
        assert datamodule._log_hyperparams is logs
        assert datamodule.hparams_initial == theirs.hparams_initial


@pytest.mark.parametrize("suffix", [".parquet", ".csv", None])
def test_what_was_selected_is_trained_on_again_without_selecting(tmp_path, suffix):
    first = DVCDataModule.wrap(MNISTStyle(), "writer", budget=0.3)
    fit(Net(), first, monitor="val_acc")
    saved = first.selection
    if suffix:
        saved = tmp_path / f"selected{suffix}"
        first.selection.to_csv(saved) if suffix == ".csv" else first.selection.to_parquet(saved)
    again = DVCDataModule.wrap(MNISTStyle(), "writer", selection=saved)
    model = Net()
    trainer(max_epochs=2).fit(model, again)
    assert torch.equal(again.selected_ids, first.selected_ids)
    assert [sum(model.seen[epoch]) for epoch in (0, 1)] == [30, 30]
    trainer(max_epochs=1).fit(model, again)
    assert torch.equal(again.selected_ids, first.selected_ids)


@pytest.mark.parametrize(
    ("theirs", "settings", "message"),
    [
        (BoringDataModule(), {}, "but got neither; pass budget=... or selection=..."),
        (BoringDataModule(), {"budget": 3, "selection": "a.csv"}, "but got both"),
        (BoringDataModule, {"budget": 3}, "to wrap, but got a type"),
        (BoringModel(), {"budget": 3}, "to wrap, but got a BoringModel of lightning.pytorch.demos"),
        (DVCDataModule({"a": good(9)}, budget=3), {"budget": 3}, "but got a DVCDataModule"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_at_once(theirs, settings, message):
    with pytest.raises(ConfigurationError, match=message):
        DVCDataModule.wrap(theirs, **settings)


def test_a_count_may_have_been_read_as_a_float():
    assert set_up(BoringDataModule(), budget=20.0).budget == 20
    with pytest.raises(ConfigurationError, match=r"but is 1\.5"):
        set_up(BoringDataModule(), budget=1.5)
    with pytest.raises(ConfigurationError, match=r"or a count .* 'many'"):
        set_up(BoringDataModule(), budget="many")


def test_separate_datasets_need_not_be_in_the_training_set():
    datasets = {"good": good(30), "other": TensorDataset(*labelled(20, 3))}
    assert set_up(Validating(lambda train: []), datasets).pools.sizes == [30, 20]
