"""What values hold, noted so that it can be put back in place."""

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Restore = Callable[[], Any]
"""Puts back what was noted of a value, and returns the value."""

# Counters, running means and confusion matrices are smaller; a whole data set that somebody keeps
# as an attribute is not, and is not copied each time.
LARGEST: Final = 2**20
"""Most elements of tensors and arrays in one value that are copied, unless told otherwise."""

# Containers, objects and tensors in one value that are noted: a list of more may be a data set, and
# each takes some microseconds.
_MOST_PARTS: Final = 2**12

_SIMPLE: Final = (
    *(int, float, complex, str, bytes, tuple, type(None)),
    *(np.generic, torch.dtype, torch.device),
)
_CONTAINERS: Final = (list, dict, set, deque)
_STREAMS: Final = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_PLAIN: Final = (*_SIMPLE, *_CONTAINERS, *_STREAMS, Tensor, np.ndarray)


class Notes:
    """Notes what values hold, each once, though several may hold the same.

    Lists, dicts, sets and deques are noted with all that is in them, and so are objects whose
    attributes are nothing but these, numbers, text, tensors, arrays and random streams. Any other
    object may stand for a file, a thread or a process, and is left alone. Of tensors and arrays,
    contents are noted as far as they are small; of parameters, never. Of more than some thousand
    parts of a value the rest is left alone, too.

    Example:
        >>> value = {"seen": [1, 2], "mean": torch.zeros(2)}
        >>> restore = Notes().of(value)
        >>> value["seen"].append(3)
        >>> _ = value["mean"].add_(1)
        >>> restore() is value
        True
        >>> value
        {'seen': [1, 2], 'mean': tensor([0., 0.])}
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()  # containers may contain each other
        self._room = 0.0
        self._parts = 0

    def of(self, value: Any, most: float = LARGEST) -> Restore:
        """Note a value.

        Args:
            value: Anything.
            most: Elements of its tensors and arrays, all together, that are copied at most.
        """
        self._room, self._parts = most, _MOST_PARTS
        return self._of(value)

    def _of(self, value: Any) -> Restore:
        self._parts -= 1
        kind = type(value)  # what stands in for another may raise when asked for its class
        if issubclass(kind, _SIMPLE) or id(value) in self._seen or self._parts < 0:
            return lambda: value
        if issubclass(kind, Tensor):
            fits = _has_contents(value) and self._takes(value, value.numel())
            return _of_tensor(value) if fits else lambda: value
        if issubclass(kind, np.ndarray):
            # Rows of text may be wide.
            fits = value.flags.writeable and self._takes(value, max(value.size, value.nbytes // 8))
            return _of_array(value) if fits else lambda: value
        self._seen.add(id(value))
        if issubclass(kind, _STREAMS):
            return _of_stream(value)
        return self._of_container(value) if issubclass(kind, _CONTAINERS) else self._of_rest(value)

    def _takes(self, value: Tensor | np.ndarray, size: int) -> bool:
        if size > self._room:
            return False
        self._seen.add(id(value))
        self._room -= size
        return True

    def _of_container(self, value: Any) -> Restore:
        keys, items = list(value), _values(value)  # the same but of a dict
        parts = (item for item in items if not issubclass(type(item), _SIMPLE))
        members = [self._of(item) for item in islice(parts, max(self._parts, 0))]

        def restore() -> Any:
            for member in members:
                member()
            # Left alone if unchanged: some kinds of dict and list refuse to be written to.
            if not (_same(list(value), keys) and _same(_values(value), items)):
                _refill(value, keys, items)
            return value

        return restore

    def _of_rest(self, value: Any) -> Restore:
        try:
            own = vars(value)
        except Exception:  # there are none, or whatever it may raise
            return lambda: value
        if not isinstance(own, dict) or not all(issubclass(type(x), _PLAIN) for x in own.values()):
            return lambda: value
        attributes = self._of(own)

        def restore() -> Any:
            attributes()
            return value

        return restore


def _has_contents(tensor: Tensor) -> bool:
    """Whether a tensor has numbers of its own, each of which can be written to."""
    if isinstance(tensor, nn.Parameter) or is_lazy(tensor) or tensor.is_meta or tensor.is_nested:
        return False
    is_expanded = tensor.layout is torch.strided and 0 in tensor.stride()
    return not (is_expanded and tensor.numel() > 1)


def _of_tensor(tensor: Tensor) -> Restore:
    copy, version = tensor.detach().clone(), _version(tensor)

    def restore() -> Tensor:
        if tensor.shape != copy.shape:
            tensor.data = copy.clone()
        # Changes through `.data` do not show in the version, and sparse values cannot be compared.
        compared = tensor.layout is torch.strided
        if not torch.equal(tensor, copy) if compared else _version(tensor) != version:
            # One that was made in inference mode can be written to only there.
            with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                tensor.copy_(copy)
        return tensor

    return restore


def _version(tensor: Tensor) -> object:
    """A number that changes with the tensor; never the same where torch does not count."""
    return object() if tensor.is_inference() else tensor._version


def _of_array(array: np.ndarray) -> Restore:
    copy = array.copy()

    def restore() -> np.ndarray:
        if array.shape != copy.shape:
            array.resize(copy.shape, refcheck=False)
        # As bytes, in which NaN equals itself, and objects are told apart by identity.
        if array.tobytes() != copy.tobytes():
            array[...] = copy
        return array

    return restore


def _of_stream(stream: Any) -> Restore:
    if isinstance(stream, random.SystemRandom):  # has no state
        return lambda: stream
    if isinstance(stream, np.random.Generator):
        bits = stream.bit_generator
        return _of_state(stream, lambda: bits.state, partial(setattr, bits, "state"))
    if isinstance(stream, random.Random):
        return _of_state(stream, stream.getstate, stream.setstate)
    return _of_state(stream, stream.get_state, stream.set_state)


def _of_state(stream: Any, get: Callable[[], Any], put: Callable[[Any], Any]) -> Restore:
    state = get()

    def restore() -> Any:
        put(state)
        return stream

    return restore


def _values(container: Any) -> list[Any]:
    return list(container.values() if isinstance(container, dict) else container)


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _refill(container: Any, keys: list[Any], items: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        for key, item in zip(keys, items, strict=True):
            container[key] = item
    elif isinstance(container, set):
        container.update(items)
    else:
        container.extend(items)
