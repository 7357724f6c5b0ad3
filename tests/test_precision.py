"""Small runs in every precision, and what torch.compile makes of a module."""

import pytest
import torch
from helpers import problems
from helpers.problems import WIDTH, Net, good, trainer, wrong
from torch import nn

from lightning_dvc import DVC, DVCCallback, DVCDataModule, FixedWeights, Random
from lightning_dvc.errors import CaptureError


def fit(net, callback=None, **settings):
    datamodule = DVCDataModule(
        {"good": good(), "wrong": wrong()},
        val=good(90, seed=50),
        budget=120,
        batch_size=16,
        rounds=4,
    )
    callback = callback or DVCCallback(every_metric(), monitor="val_acc")
    trainer(callbacks=[callback], **{"max_epochs": 6, **settings}).fit(net, datamodule)
    return datamodule, callback


def every_metric(**settings):
    # What is drawn again comes from the cache.
    return DVC(FixedWeights(), drift_tolerance=10.0, **settings)


def share_of_wrong(table):
    later = [s for s, r in zip(table.source, table.round.tolist(), strict=True) if r > 0]
    return later.count("wrong") / len(later)


class Mixed(Net):
    """Layers of every kind that is captured."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(500, 4)
        self.image = nn.Conv1d(1, 4, 3)
        self.norm = nn.LayerNorm(16)
        self.body = nn.Linear(8 + WIDTH, 16)

    def forward(self, x):
        words = self.words((x * 50).long().abs() % 500).mean(1)
        image = self.image(x.unsqueeze(1)).relu().mean(2)
        return self.head(self.norm(self.body(torch.cat([x, words, image], 1))).relu())


# --- precision ---------------------------------------------------------------------------------

# Lightning trains with bf16 instead of 16-mixed on a CPU.
PRECISIONS = ["bf16-mixed", "bf16-true", "64-true", "16-mixed", "16-true"]


def with_eps(net):
    """A module whose optimiser divides by what is not 0 in float16."""
    optimizer = net.configure_optimizers()
    optimizer.param_groups[0]["eps"] = 1e-4
    net.configure_optimizers = lambda: optimizer
    return net


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning")
@pytest.mark.parametrize("net", [Net, Mixed])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_selection_in_every_precision(precision, net):
    layers = None if net is Net else ["words", "image", "norm", "body", "head"]
    callback = DVCCallback(every_metric(), monitor="val_acc", layers=layers)
    model = with_eps(net()) if precision == "16-true" else net()
    datamodule, _ = fit(model, callback, precision=precision)
    table = datamodule.selection
    assert table.raw[table.round > 0].isfinite().all()
    assert share_of_wrong(table) < 0.15  # half of what is drawn at first
    assert table.set_aside == ()
    assert callback.strategy._observer.figures["cache_hit_rate"] > 0


class Typed(Net):
    """Notes the types of inputs and outputs, in training and while it is scored."""

    def __init__(self, noted):
        super().__init__()
        self.note = noted.add

    def training_step(self, batch, batch_idx):
        logits = self(batch[0])
        self.note((self.training, batch[0].dtype, logits.dtype))
        return nn.functional.cross_entropy(logits, batch[1])


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_samples_are_scored_in_the_precision_of_training(precision):
    noted = set()
    fit(with_eps(Typed(noted)), precision=precision, max_epochs=2)
    wide, half = torch.float32, torch.bfloat16
    # On a CPU Lightning takes bfloat16 for the mixed precision of float16.
    short = half if problems.ACCELERATOR == "cpu" else torch.float16
    types = {
        "bf16-mixed": (wide, half),
        "16-mixed": (wide, short),
        "bf16-true": (half, half),
        "16-true": (torch.float16, torch.float16),
        "64-true": (torch.float64, torch.float64),
    }[precision]
    assert noted == {(True, *types), (False, *types)}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_densities_and_caches_take_every_precision(precision):
    strategy = every_metric(density="lsh", cache_dtype=torch.float16)
    callback = DVCCallback(strategy, monitor="val_acc", exact_numbers=1000)
    datamodule, _ = fit(Mixed(), callback, precision=precision)
    table = datamodule.selection
    assert table.raw[table.round > 0].isfinite().all()
    assert "projected" in callback.layer_forms.values()


def test_training_that_has_diverged_is_told_apart_from_bad_samples():
    # Adam's eps of 1e-8 is 0 in float16, so that training divides by 0.
    message = r"'body.weight', .* are not finite, so training had diverged .* raise eps of Adam"
    with pytest.raises(CaptureError, match=message):
        fit(Net(), precision="16-true")


# --- torch.compile -----------------------------------------------------------------------------


class Part(Net):
    """Compiled in part, if a backend is named."""

    def __init__(self, backend=None):
        super().__init__()
        body = nn.Sequential(self.body, nn.ReLU(), nn.Linear(16, 16))
        self.body = torch.compile(body, backend=backend) if backend else body


class InPlace(Net):
    def __init__(self, backend=None):
        super().__init__()
        if backend:
            self.compile(backend=backend)


def whole(backend=None):
    return torch.compile(Net(), backend=backend) if backend else Net()


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("make", [Part, InPlace, pytest.param(whole, marks=pytest.mark.slow)])
def test_a_compiled_module_is_scored_as_it_was_before(make, caplog):
    plain, _ = fit(make(), max_epochs=3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    datamodule, _ = fit(make("aot_eager"), max_epochs=3)
    assert datamodule.selected_ids.tolist() == plain.selected_ids.tolist()
    assert torch.equal(datamodule.selection.raw.nan_to_num(), plain.selection.raw.nan_to_num())
    # Scoring adds no graph to those of training, and so never meets the limit of them.
    assert "recompile_limit" not in caplog.text
    found = compiled_graphs()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fit(make("aot_eager"), DVCCallback(Random()), max_epochs=3)
    assert found == compiled_graphs() > 0


def test_layers_of_a_compiled_part_can_be_named():
    named = ["body._orig_mod.2", "head"]
    callback = DVCCallback(layers=named)
    fit(Part("eager"), callback, max_epochs=2)
    assert list(callback.layer_forms) == named
