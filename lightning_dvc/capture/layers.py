"""Which layers are captured, and the hooks that capture them.

Forward hooks note what each layer received and where its output stands in the graph; the gradient
of the per-sample losses with respect to the outputs comes from one ``torch.autograd.grad``. No
gradient with respect to a parameter is ever computed, and no ``.grad`` is touched.
"""

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.parameter import is_lazy

from lightning_dvc.capture.convolution import CONVOLUTIONS
from lightning_dvc.capture.gradients import LayerGradients
from lightning_dvc.capture.kinds import (
    NORMS,
    LayerKind,
    averaged,
    computes_otherwise,
    kind_of,
    widened,
)
from lightning_dvc.capture.projection import Projection
from lightning_dvc.errors import CaptureError
from lightning_dvc.randomness import torch_stream

# A first layer's input is pooled to at most this many positions per axis before it is compared
# between samples: enough to tell near-repeats from neighbours, small for large images.
_FINGERPRINT_SIDE: Final = 8
_TOKEN_WIDTH: Final = 64
# Of a loss whose gradients pass through float16, which keeps its precision down to 6e-5 only: the
# mean over an image's pixels makes gradients smaller than that.
_SCALE: Final = 2.0**12
_AVERAGE: Final[dict[int, Callable[..., Tensor]]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}

_CAPTURED: Final = "Linear, Conv1d to Conv3d and Embedding"


def find_layers(module: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Find the layers to capture.

    Args:
        module: The model.
        names: Names as in ``module.named_modules()``. When not given, every ``Linear``, ``Conv1d``
            to ``Conv3d`` and ``Embedding`` with a trainable weight; a warning names what else
            trains and is left out, other than normalisations. A named layer may be frozen, or a
            ``LayerNorm``, ``RMSNorm``, ``GroupNorm`` or ``BatchNorm``.

    Returns:
        Name to layer, in the order of definition, or of the names.

    Raises:
        CaptureError: If a named layer does not exist or cannot be captured, or none is found.

    Example:
        >>> list(find_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))))
        ['0', '2']
    """
    if names is not None:
        modules = dict(module.named_modules(remove_duplicate=False))
        return {name: _named_layer(modules, name) for name in names}
    modules = dict(module.named_modules())
    found, left_out = {}, []
    for name, layer in modules.items():
        own = any(p.requires_grad for p in layer.parameters(recurse=False))
        if not (own or _trains(layer)) or ".parametrizations." in f".{name}.":
            continue
        reason = _refusal(layer)
        if reason is None and not isinstance(layer, NORMS) and _trains(layer):
            found[name] = layer
        elif not isinstance(layer, NORMS):
            left_out.append(f"{name or 'the module itself'} ({reason or 'its weight is frozen'})")
    if not found:
        raise CaptureError(
            f"{type(module).__name__} has no trainable layer to capture among {_CAPTURED}; name "
            "the layers with layers=[...] if they are frozen, or train a model that has some"
        )
    by_weight: dict[int, list[str]] = {}
    for name, layer in found.items():
        by_weight.setdefault(id(layer.weight), []).append(name)
    tied = [names for names in by_weight.values() if len(names) > 1]
    if tied:
        warnings.warn(
            f"the layers {tied} share one weight; the gradient of each is captured by itself, as "
            "if they did not",
            stacklevel=2,
        )
    if left_out:
        warnings.warn(
            f"trainable parameters of {', '.join(left_out)} are not captured and do not count in "
            "any metric",
            stacklevel=2,
        )
    return found


def _trains(layer: nn.Module) -> bool:
    weight = getattr(layer, "weight", None)
    return isinstance(weight, Tensor) and weight.requires_grad


def _refusal(layer: nn.Module) -> str | None:
    """Why a layer cannot be captured, or None."""
    kind = kind_of(layer)
    if kind is None:
        return f"a {type(layer).__name__}"
    if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
        return "it is not initialised"
    if computes_otherwise(layer):
        return f"a {type(layer).__name__} with a forward pass of its own"
    return kind.refusal(layer)


def _named_layer(modules: dict[str, nn.Module], name: str) -> nn.Module:
    layer = modules.get(name)
    if layer is None:
        known = [key for key, value in modules.items() if _refusal(value) is None]
        raise CaptureError(f"layer {name!r} does not exist; layers that can be captured: {known}")
    reason = _refusal(layer)
    if reason is not None:
        raise CaptureError(
            f"layer {name!r} is a {type(layer).__name__} and cannot be captured ({reason}); name "
            f"layers among {_CAPTURED}, or normalisations"
        )
    return layer


@dataclass
class _Calls:
    """What one layer received and returned in one forward pass, call by call."""

    kind: LayerKind
    inputs: list[Tensor]
    versions: list[int]
    outputs: list[Tensor]
    edges: list[GradientEdge]
    returned: Tensor


class LayerCapture:
    """Notes inputs and outputs of layers while a forward pass runs.

    Args:
        layers: Name to layer, from :func:`find_layers`.
        projections: Name to projection, of layers whose gradients are too large.
        copied: Names of layers whose inputs are copied, because they would be overwritten.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> capture = LayerCapture(find_layers(net))
        >>> with capture.recording():
        ...     losses = net(torch.ones(4, 2)).square().squeeze(1)
        >>> [len(g) for g in capture.gradients(losses)]
        [4, 4]
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        projections: Mapping[str, Projection] | None = None,
        copied: Collection[str] = (),
    ) -> None:
        self._layers = layers
        self._projections = projections or {}
        self._copied = copied
        self._calls: dict[str, _Calls] = {}
        self._untracked: list[str] = []

    @property
    def reached(self) -> list[str]:
        """Names of the layers in the order in which the last forward pass reached them."""
        return list(self._calls)

    @property
    def overwritten(self) -> list[str]:
        """Names of layers whose input was overwritten later in the last forward pass.

        A model may do that where autograd does not need the input as it was: where the layer's
        weight is frozen, or under autocast, which keeps a copy of its own.
        """
        return [
            name
            for name, calls in self._calls.items()
            if [x._version for x in calls.inputs] != calls.versions
        ]

    def forget_shared(self, n: int) -> list[str]:
        """Drop what was recorded of layers whose outputs cannot be dealt out to ``n`` samples.

        An embedding of positions is one, whose output is the same for all samples.

        Returns:
            Their names.
        """
        shared = [
            name
            for name, calls in self._calls.items()
            if any(output.ndim < 2 or len(output) % n for output in calls.outputs)
        ]
        for name in shared:
            del self._calls[name]
        return shared

    def forget_untracked(self) -> list[str]:
        """Drop what was recorded of layers that ran without a graph while there was to be one.

        Returns:
            Their names.
        """
        for name in self._untracked:
            self._calls.pop(name, None)
        return list(self._untracked)

    @contextmanager
    def recording(self, gradients: bool = True) -> Iterator[None]:
        """Record inside the block; hooks are gone afterwards, also after an exception.

        Args:
            gradients: Whether :meth:`gradients` will be asked for.
        """
        self._calls, self._untracked = {}, []
        handles = [
            layer.register_forward_hook(self._hook(name, gradients), with_kwargs=True)
            for name, layer in self._layers.items()
        ]
        try:
            yield
        finally:
            # Removed before any gradient is taken: activation checkpointing would fire them again.
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, gradients: bool) -> Callable[..., Tensor | None]:
        kind = kind_of(self._layers[name])
        assert kind is not None

        def note(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
        ) -> Tensor | None:
            received = args[0] if args else kwargs["input"]
            calls = self._calls.setdefault(name, _Calls(kind, [], [], [], [], out))
            received = received.detach().clone() if name in self._copied else received.detach()
            calls.inputs.append(received)
            calls.versions.append(received._version)
            calls.outputs.append(out.detach())
            # Averaged at once, since an in-place activation would overwrite it.
            calls.returned = _averaged_output(kind, self._layers[name], out.detach())
            if not gradients:
                return None
            if not torch.is_grad_enabled() and name not in self._untracked:
                self._untracked.append(name)
            frozen = not out.requires_grad  # as every layer before it
            if frozen:
                out = out.detach().requires_grad_()
            # The place in the graph, not the tensor, which an in-place activation would overwrite.
            place = _whole(out)
            calls.edges.append(get_gradient_edge(place))
            return out.clone() if frozen or place._base is not None else None

        return note

    def gradients(self, losses: Tensor) -> list[LayerGradients]:
        """Per-sample gradients of each layer reached.

        Args:
            losses: ``(n,)`` each sample's own loss, from the recorded forward pass.

        Returns:
            One entry per layer, in the order of :attr:`reached`.
        """
        edges = [edge for calls in self._calls.values() for edge in calls.edges]
        halves = any(
            x.dtype == torch.float16 for calls in self._calls.values() for x in calls.outputs
        )
        deltas = iter(_scaled_grad(losses.sum(), edges) if halves else _grad(losses.sum(), edges))
        found = []
        for name, calls in self._calls.items():
            own = [
                torch.zeros_like(output) if delta is None else delta.reshape(output.shape)
                for output, delta in zip(calls.outputs, deltas, strict=False)
            ]
            layer = calls.kind.gradients(self._layers[name], calls.inputs, own, len(losses))
            projection = self._projections.get(name)
            found.append(layer if projection is None else projection(layer))
        return found

    def representations(self, n: int) -> list[Tensor]:
        """The representation after each layer: what the next captured layer receives.

        The last layer's is its own output, as is that of a layer before an embedding. Positions
        are averaged.

        Args:
            n: Samples in the recorded batch.

        Returns:
            One ``(n, d)`` tensor per layer, in the order of :attr:`reached`.
        """
        names = self.reached
        found = []
        for name, following in zip(names, [*names[1:], None], strict=True):
            after = None
            if following is not None:
                calls = self._calls[following]
                after = calls.kind.received(self._layers[following], calls.inputs[0], n)
            found.append(averaged(self._calls[name].returned, n) if after is None else after)
        return found

    def fingerprints(self, n: int) -> Tensor:
        """What the first captured layer receives, pooled to few positions, ``(n, d)``.

        Images are averaged to at most 8 positions along each axis, sequences to 8; a series that is
        shorter before a ``Conv1d`` is followed by zeros. Of tokens it is the mean of fixed random
        vectors, one for each token, padding left out.

        For a model that starts with a captured layer these are the features themselves, so they do
        not change while the model trains.
        """
        name, calls = next(iter(self._calls.items()))
        layer, x = self._layers[name], calls.inputs[0]
        if isinstance(layer, nn.Embedding):
            return _words(layer, x.reshape(n, -1))
        x = widened(x)
        if isinstance(layer, CONVOLUTIONS):
            sides = [min(_FINGERPRINT_SIDE, size) for size in x.shape[2:]]
            x = _AVERAGE[len(sides)](x, sides).flatten(1)
            x = x.reshape(n, -1, x.shape[-1]).mean(1)
            # Batches of series of other lengths, too, can be compared then. At the end of it all,
            # zeros leave the hash codes of a series as they are without.
            missing = _FINGERPRINT_SIDE - sides[0] if len(sides) == 1 else 0
            return F.pad(x, (0, missing * layer.in_channels))
        if x.ndim == 2 and len(x) == n:
            return x
        x = x.reshape(n, -1, x.shape[-1])
        # Always as many, so that batches of sequences of other lengths can be compared.
        return F.adaptive_avg_pool1d(x.transpose(1, 2), _FINGERPRINT_SIDE).flatten(1)


def _grad(loss: Tensor, edges: Sequence[GradientEdge], **options: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, edges, allow_unused=True, **options))


def _scaled_grad(loss: Tensor, edges: Sequence[GradientEdge]) -> list[Tensor | None]:
    """Gradients through float16, which has no small numbers; unscaled if large ones overflow."""
    scale = torch.full_like(loss, _SCALE)
    deltas = _grad(loss, edges, grad_outputs=scale, retain_graph=True)
    if all(delta is None or bool(delta.isfinite().all()) for delta in deltas):
        return [delta if delta is None else widened(delta) / _SCALE for delta in deltas]
    return _grad(loss, edges)


def _averaged_output(kind: LayerKind, layer: nn.Module, output: Tensor) -> Tensor:
    """The mean over positions, a copy; frames folded into the batch stay apart."""
    if output.ndim < 2:  # no batch, see forget_shared
        return output.clone()
    after = kind.received(layer, output, len(output))
    return (averaged(output, len(output)) if after is None else after).clone()


def _whole(out: Tensor) -> Tensor:
    """The tensor of which an output is a view in another shape, or else the output.

    A linear layer with many positions returns such a view. An in-place activation moves a view to
    another place in the graph, so the loss no longer depends on the old one, but on the whole's.
    """
    base = out._base
    if base is None or base.numel() != out.numel() or not base.is_contiguous():
        return out
    return base if out.is_contiguous() else out


def _words(layer: nn.Embedding, tokens: Tensor) -> Tensor:
    """Mean over ``(n, T)`` tokens of random vectors, ``(n, 64)``."""
    table = _token_vectors(layer.num_embeddings).to(tokens.device)
    counts = torch.ones_like(tokens, dtype=table.dtype)
    if layer.padding_idx is not None:
        counts = (tokens != layer.padding_idx).to(table)
    total = (F.embedding(tokens, table) * counts[:, :, None]).sum(1)
    return total / counts.sum(1, keepdim=True).clamp(min=1)


@lru_cache(maxsize=1)
def _token_vectors(n_tokens: int) -> Tensor:
    return torch.randn(n_tokens, _TOKEN_WIDTH, generator=torch_stream(0, "tokens"))
