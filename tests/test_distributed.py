import pytest
import torch
import torch.multiprocessing as mp
from helpers.problems import Net, good, repeated, trainer, wrong
from lightning.pytorch.callbacks import Callback

from lightning_dvc import DVCCallback, DVCDataModule
from lightning_dvc.distributed import Group
from lightning_dvc.errors import ProcessError

WORLD = 3


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (1, 4), (10, 4), (12, 4), (13, 1), (3, 100)])
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_shards_are_whole_batches_of_everything_in_order(n, batch_size, world_size):
    ids = torch.arange(n)
    parts = [Group(rank, world_size).shard(ids, batch_size) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), ids)
    starts = [int(part[0]) for part in parts if len(part)]
    assert all(start % batch_size == 0 for start in starts)
    batches = [-(-len(part) // batch_size) for part in parts]
    assert max(batches) - min(batches) <= 1


def _work(rank, port, queue):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD
    )
    group = Group(rank, WORLD)
    rows = torch.arange(rank * 10, rank * 10 + rank)[:, None].repeat(1, 2)  # 0, 1 and 2 rows
    big = torch.tensor([2**53 + rank])  # no float holds it
    queue.put(
        (
            rank,
            group.gather(rows).tolist(),
            group.gather(big).tolist(),
            group.sum(torch.tensor([1.0, rank])).tolist(),
            group.gather_objects([f"from {rank}"] * rank),
            group.first(torch.tensor([rank + 0.5], dtype=torch.float64)).tolist(),
            group.first(torch.arange(2 - rank)).tolist(),
            _shared_buffers(group),
            _failing(group),
        )
    )
    torch.distributed.destroy_process_group()


def _shared_buffers(group):
    """What becomes of buffers that hold the rank, of the usual kinds."""
    net, rank = torch.nn.BatchNorm1d(2), group.rank
    net.running_mean += rank
    net.num_batches_tracked += rank
    net.register_buffer("table", torch.zeros(1 + rank))  # grows as needed
    net.register_buffer("none", None)
    net.register_buffer("view", torch.full((2, 3), float(rank)).T, persistent=False)
    address = net.running_mean.data_ptr()
    group.share_buffers(net)
    assert net.running_mean.data_ptr() == address
    return {name: buffer.tolist() for name, buffer in net.named_buffers()}


def _failing(group):
    """What each rank is told when the others wait in other exchanges than the one that failed."""
    found = []
    for waits in (group.gather, group.sum, group.first, lambda x: group.gather_objects([x]), None):
        try:
            with group.agreeing():
                if group.rank == 1:
                    raise ValueError("no luck")
                if waits is not None:
                    waits(torch.zeros(2))
        except (ValueError, ProcessError) as error:
            found.append(f"{type(error).__name__}: {error}")
    try:
        with group.agreeing():
            raise ValueError(f"of {group.rank}")  # all at once: each keeps its own
    except ValueError as error:
        found.append(str(error))
    with group.agreeing():
        group.sum(torch.zeros(1))  # and it goes on
    return found


# Python 3.12 warns about fork in a process with threads, which torch always has.
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_every_rank_gathers_the_same(unused_port):
    queue = mp.get_context("fork").SimpleQueue()
    # Spawned, each process would import everything anew, which takes far longer than this.
    mp.start_processes(_work, args=(unused_port, queue), nprocs=WORLD, start_method="fork")
    for _ in range(WORLD):
        rank, rows, big, total, objects, first, shorter, buffers, told = queue.get()
        assert rows == [[10, 10], [20, 20], [21, 21]]
        assert big == [2**53, 2**53 + 1, 2**53 + 2]
        assert total == [3.0, 3.0]
        assert first == [0.5]
        assert shorter == [0, 1]
        assert buffers == {
            "running_mean": [0.0, 0.0],
            "running_var": [1.0, 1.0],
            "num_batches_tracked": 0,
            "table": [0.0] * (1 + rank),
            "view": [[0.0, 0.0]] * 3,
        }
        other = (
            "ProcessError: selection stops, because it failed on process 1 (ValueError: no luck)"
        )
        said = "ValueError: no luck" if rank == 1 else f"{other}; see there"
        assert told == [said] * 5 + [f"of {rank}"]
        assert objects == ["from 1", "from 2", "from 2"], rank


def test_one_process_needs_no_group():
    rows = torch.ones(2, 3)
    assert Group().gather(rows) is rows
    assert Group().sum(rows) is rows
    assert Group().first(rows) is rows
    assert Group().gather_objects([1]) == [1]


class AgreedIds(Callback):
    """Every rank checks, inside the run, that all ranks selected the same, and writes it down."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        ids = trainer.datamodule.selected_ids
        group = Group(trainer.global_rank, trainer.world_size)
        assert group.gather_objects([ids.tolist()]) == [ids.tolist()] * trainer.world_size
        if trainer.is_global_zero and trainer.current_epoch == 0:
            torch.save(ids, self.path)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*sync_dist=True:UserWarning")
def test_two_processes_select_what_one_selects(tmp_path):
    def first_round(path, **settings):
        sources = {"good": good(), "wrong": wrong(), "repeated": repeated()}
        datamodule = DVCDataModule(sources, good(90, seed=50), budget=121, batch_size=16, rounds=3)
        callback = DVCCallback(monitor="val_acc", score_batch_size=32)
        callbacks = [callback, AgreedIds(path)]
        run = trainer(callbacks=callbacks, max_epochs=3, accelerator="cpu", **settings)
        run.fit(Net(), datamodule)
        return torch.load(path)

    alone = first_round(tmp_path / "one.pt")
    together = first_round(tmp_path / "two.pt", devices=2, strategy="ddp_fork")
    # Equal after the round of epoch 0, which starts from equal models; training then differs.
    assert torch.equal(alone, together)
