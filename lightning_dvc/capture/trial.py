"""A trial before training: which layers do not keep the batch as their first axis."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from lightning_dvc.capture.loading import Entry, LoadedBatch, Reader, TolerantCollate
from lightning_dvc.capture.probe import Captured, Probe


@dataclass(frozen=True)
class Trial:
    """What a few looks at the same samples showed.

    Attributes:
        mixed: Layers in which the gradients of a sample change when the samples of a batch change
            places, that is, whose activations were dealt out to the wrong samples.
        random: Layers in which they change from one look to the next, as under a loss that is
            random. Of these it cannot be told whether they mix samples.
    """

    mixed: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)


def try_out(probe: Probe, dataset: Dataset[Any], ids: Tensor) -> Trial:
    """Look at samples three times: twice in order, once in reverse.

    They are read once, since whoever augments them at random returns others each time.

    Args:
        probe: Looks at samples through the model; what it finds bad here is forgotten again.
        dataset: Where the ids point.
        ids: ``(n,)`` samples to look at.
    """
    mixed, random = set(), set()
    collate = TolerantCollate(probe.collate)
    reader = Reader(
        _sent if probe.num_workers else list, probe.num_workers, **probe.worker_settings
    )
    for read in reader.batches(dataset, ids, probe.batch_size):
        samples = dict(zip(read.ids.tolist(), _received(read.batch), strict=True))
        again = partial(Reader(probe.collate).batches, _Read(samples))
        entries: list[Entry] = [(sample_id, sample, None) for sample_id, sample in samples.items()]
        loaded, turned = (LoadedBatch(again, *collate(some)) for some in (entries, entries[::-1]))
        if not len(loaded.ids):
            continue
        seen, repeated = list(probe.look(loaded)), list(probe.look(loaded))
        names = list(probe.captured_layers)
        changing = differing(names, seen, repeated)
        random.update(changing)
        other = list(probe.look(turned))
        mixed.update(set(differing(names, seen, other)) - set(changing))
    probe.bad.clear()
    in_order = list(probe.captured_layers)
    return Trial(
        [name for name in in_order if name in mixed - random],
        [name for name in in_order if name in random],
    )


class _Read(Dataset[Any]):
    """Samples by id that have been read."""

    def __init__(self, samples: Mapping[int, Any]) -> None:
        self._samples = samples

    def __getitem__(self, sample_id: int) -> Any:
        return self._samples[sample_id]


def _sent(samples: list[Any]) -> bytes:
    """Single samples in a form in which no tensor of a worker's keeps a file open."""
    buffer = io.BytesIO()
    # Else a view would take all along that it is a view of.
    torch.save(tree_map_only(Tensor, Tensor.clone, samples), buffer)
    return buffer.getvalue()


def _received(samples: bytes | list[Any] | None) -> list[Any]:
    if isinstance(samples, bytes):
        return list(torch.load(io.BytesIO(samples), weights_only=False))
    return samples or []


def differing(
    names: Sequence[str],
    seen: Sequence[Captured],
    again: Sequence[Captured],
    tolerance: float = 0.05,
) -> list[str]:
    """Find layers in which two looks at the same samples differ.

    Args:
        names: Names of the ``L`` captured layers.
        seen: A look at some samples, with gradients, in one or more parts.
        again: Another look at them.
        tolerance: Largest difference between the two, relative to the largest gradient norm.

    Returns:
        Names of the layers in which the gradient norm of some sample differs.
    """
    if not seen or not again:
        return []
    (ids, norms), (other_ids, others) = _norms_by_id(seen), _norms_by_id(again)
    # Where samples are mixed, one that is not finite also spoils others, each time different ones.
    norms, others = norms[torch.isin(ids, other_ids)], others[torch.isin(other_ids, ids)]
    if not len(norms):
        return []
    difference = (norms - others).abs().amax(0)
    differs = difference > tolerance * norms.amax(0)
    return [
        name for name, is_different in zip(names, differs.tolist(), strict=True) if is_different
    ]


def _norms_by_id(parts: Sequence[Captured]) -> tuple[Tensor, Tensor]:
    """Ids ``(n,)`` in order, and gradient norms ``(n, L)``, on the CPU."""
    norms = [
        torch.stack([layer.squared_norms().sqrt().cpu() for layer in part.gradients], dim=1)
        for part in parts
    ]
    ids, order = torch.cat([part.ids for part in parts]).sort()
    return ids, torch.cat(norms)[order]
