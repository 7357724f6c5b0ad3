"""A probe that looks up in a gradient cache before it runs the model (algorithm 2)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dvc.capture.gradients import LayerGradients
from lightning_dvc.capture.probe import Captured, Probe, rows
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.memory.gradient_cache import GradientCache

_PLAIN: Final = ("labels", "losses", "confidence", "predictive", "fingerprints")


class CachedProbe:
    """Captures samples, from the cache where it holds them.

    Args:
        probe: Runs samples through the model.
        cache: Holds what was captured while the model was about where it is now. Samples whose
            shapes differ from those it holds, such as sentences of another length, are not cached.
        window: Model states ``S`` that a sample is known in at most.
    """

    def __init__(self, probe: Probe, cache: GradientCache, window: int) -> None:
        self._probe = probe
        self._cache = cache
        self._window = window

    def capture(
        self,
        dataset: Dataset[Any],
        ids: Tensor,
        snapshots: Snapshots | None = None,
        keep: bool = True,
    ) -> Iterator[Captured]:
        """Pass samples through the model, or recall what an earlier pass showed.

        Args:
            dataset: Where the ids point.
            ids: ``(n,)`` samples to look at.
            snapshots: Earlier states of the model to run them through as well.
            keep: Whether to keep what the model shows. It does not pay while the model moves too
                fast for an entry to be valid by the time it could be used.

        Yields:
            As :meth:`lightning_dvc.capture.probe.Probe.capture`, with gradients, samples from the
            cache first. ``losses`` and ``confidence`` are ``(n, window)``, NaN for states in which
            a sample was not seen.
        """
        hit, fields = self._cache.get(ids)
        known = ids[hit]
        for start in range(0, len(known), self._probe.batch_size):
            some = slice(start, start + self._probe.batch_size)
            yield self._recalled(known[some], {name: x[some] for name, x in fields.items()})
        for captured in self._probe.capture(dataset, ids[~hit], snapshots):
            padded = replace(
                captured,
                losses=self._pad(captured.losses),
                confidence=self._pad(captured.confidence),
            )
            if keep:
                self._keep(padded)
            yield padded

    def _keep(self, captured: Captured) -> None:
        """Write what there is room for; the others would only push each other out."""
        numbers = sum(layer.numbers for layer in captured.gradients)
        numbers += sum(h.shape[1] for h in captured.representations)
        room = self._cache.max_bytes // max(1, numbers * self._cache.bytes_per_number)
        if room:
            some = (
                captured
                if room >= len(captured)
                else rows(captured, torch.arange(len(captured)) < room)
            )
            fields = _fields(some)
            if self._cache.accepts(fields):
                self._cache.put(some.ids, fields)

    def _pad(self, columns: Tensor) -> Tensor:
        return F.pad(columns, (0, self._window - columns.shape[1]), value=torch.nan)

    def _recalled(self, ids: Tensor, fields: dict[str, Tensor]) -> Captured:
        device = self._probe.device
        moved = {name: x if name == "labels" else x.to(device) for name, x in fields.items()}
        gradients: list[LayerGradients] = []
        for number, like in enumerate(self._probe.like):
            prefix = f"gradients.{number}."
            tensors = {n.removeprefix(prefix): x for n, x in moved.items() if n.startswith(prefix)}
            gradients.append(like.restored(tensors))
        representations = [moved[f"representations.{i}"] for i in range(len(gradients))]
        plain = {name: moved[name] for name in _PLAIN}
        return Captured(ids=ids, gradients=gradients, representations=representations, **plain)


def _fields(captured: Captured) -> dict[str, Tensor]:
    fields: dict[str, Tensor] = {name: getattr(captured, name) for name in _PLAIN}
    for number, layer in enumerate(captured.gradients):
        for name, tensor in layer.tensors().items():
            fields[f"gradients.{number}.{name}"] = tensor
    for number, representation in enumerate(captured.representations):
        fields[f"representations.{number}"] = representation
    return fields
