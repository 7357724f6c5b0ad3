"""What only a GPU shows; `pytest --accelerator gpu` trains the small runs of other tests on one."""

import pytest
import torch
from helpers.problems import Net, good, repeated, trainer, wrong
from torch import nn
from torch.utils.data import TensorDataset, default_collate

from lightning_dvc import DVC, DVCCallback, DVCDataModule, FixedWeights
from lightning_dvc.capture.guard import undisturbed
from lightning_dvc.capture.objective import resolve_objective
from lightning_dvc.capture.probe import Probe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Image(Net):
    """Convolutions with batch normalisation, and what they are followed by."""

    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(
            nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU()
        )
        self.body = nn.Linear(48, 16)

    def forward(self, x):
        return self.head(self.body(self.image(x).flatten(1)).relu())


def select(net, accelerator, **settings):
    sources = {"good": good(), "wrong": wrong(), "repeated": repeated()}
    datamodule = DVCDataModule(
        sources, val=good(90, seed=50), budget=120, batch_size=16, rounds=4, warmup=0.2
    )
    callback = DVCCallback(DVC(FixedWeights()), monitor="val_acc")
    run = trainer(accelerator=accelerator, callbacks=[callback], max_epochs=6, **settings)
    run.fit(net, datamodule)
    assert callback._probe.batch_size == (2048 if accelerator == "gpu" else 512)
    return datamodule.selection


@pytest.mark.parametrize("net", [Net, Image])
def test_a_gpu_selects_what_a_cpu_selects(net):
    on_cpu, on_gpu = (
        select(net(), accelerator, precision="64-true") for accelerator in ("cpu", "gpu")
    )
    assert on_gpu.index.tolist() == on_cpu.index.tolist()
    assert on_gpu.source == on_cpu.source
    torch.testing.assert_close(on_gpu.raw, on_cpu.raw, rtol=1e-4, atol=1e-6, equal_nan=True)


def test_what_is_left_of_the_memory_is_enough():
    """Memory for 100 samples or so, of which 512 are tried at first."""
    wide = 2**17
    net = Net()
    net.body, net.head = nn.Linear(8, wide), nn.Linear(wide, 3)
    net.to("cuda")

    def to_gpu(batch):
        return [x.to("cuda") for x in batch]

    probe = Probe(
        net, resolve_objective(net), default_collate, prepare=to_gpu, batch_size=512, adapts=True
    )
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(x, torch.arange(512) % 3)
    torch.cuda.empty_cache()
    free_for_all = torch.cuda.memory_allocated() + 100 * 6 * 4 * wide
    whole = torch.cuda.get_device_properties(0).total_memory
    sizes = []
    torch.cuda.set_per_process_memory_fraction(free_for_all / whole)
    try:
        with undisturbed(net):
            for captured in probe.capture(dataset, torch.arange(512)):
                sizes.append(len(captured))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum(sizes) == 512
    assert 1 <= max(sizes) < 512
    assert probe.bad == []
