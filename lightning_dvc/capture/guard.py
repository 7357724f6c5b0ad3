"""Looking at a model in the middle of its training, without leaving a trace."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

_Restore = Callable[[], Any]

# Attributes that belong to torch and Lightning: flags, hooks, parameters, trainer. Buffers and
# training flags are looked after separately; which buffers are saved is a set like any other.
_INTERNAL: Final = frozenset(vars(LightningModule())) - {"_non_persistent_buffers_set"}

# Counters, running means and confusion matrices are smaller; a whole data set that somebody keeps
# as an attribute is not, and is not copied each time.
_LARGEST_ATTRIBUTE: Final = 2**20


@contextmanager
def preserve_random_state(seed: int | None = None) -> Iterator[None]:
    """Leave the global random streams as they were, also after an exception.

    The streams of torch (the CPU's and, once CUDA is in use, every device's), numpy and
    ``random``.

    Args:
        seed: Of all of them in the meantime; they go on when not given.

    Example:
        >>> state = torch.get_rng_state()
        >>> with preserve_random_state():
        ...     noise = torch.randn(3)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    on_cuda: bool = torch.cuda.is_initialized()
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if on_cuda else []
    numpy_state = np.random.get_state()  # noqa: NPY002 - somebody else's stream, only put back
    python = random.getstate()
    try:
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if on_cuda:
                torch.cuda.manual_seed_all(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 - somebody else's stream
            random.seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu)
        if on_cuda:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy_state)  # noqa: NPY002 - somebody else's stream, only put back
        random.setstate(python)


@contextmanager
def undisturbed(module: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Put a module into ``eval()`` with gradients enabled; leave everything as it was.

    Restored on leaving, also after an exception: the training flag of every submodule one by one,
    the global random streams, buffers, the states of torchmetrics, and the plain attributes of the
    module and its submodules, such as counters and lists of outputs, with their identity.
    ``log`` and ``log_dict`` do nothing inside. Parameters, their ``.grad``, the trainer and the
    optimisers are not touched.

    Args:
        module: The user's model. Values nested in a plain attribute's containers are restored as
            far as these are lists, dicts, sets and deques; tensors in them, and plain tensors of
            more than ``2**20`` elements, are put back but not their contents.
        seed: Of the global random streams inside, as for :func:`preserve_random_state`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with undisturbed(net):
        ...     net.training
        False
        >>> net.training, net[1].training
        (True, True)
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_random_state(seed))
        for part in module.modules():
            for restore in (_remember_attributes(part), _remember_buffers(part)):
                stack.callback(restore)
            stack.callback(setattr, part, "training", part.training)
            # Not eval(): some modules override train(), to merge weights for example.
            part.training = False
            if isinstance(part, LightningModule):
                stack.callback(_silence(part))
        stack.enter_context(torch.enable_grad())
        yield


def _silence(module: LightningModule) -> _Restore:
    """Make ``log`` and ``log_dict`` do nothing until the returned function is called."""
    own = vars(module)
    before: dict[str, Any] = {name: own[name] for name in ("log", "log_dict") if name in own}
    own.update(log=_ignore, log_dict=_ignore)

    def restore() -> None:
        for name in ("log", "log_dict"):
            own.pop(name, None)
        own.update(before)

    return restore


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``LightningModule.log`` and ``log_dict``."""


def _remember_buffers(module: nn.Module) -> _Restore:
    """Note a module's own buffers; contents are copied back only if they changed."""
    before = {
        name: buffer if buffer is None else _remember_tensor(buffer)
        for name, buffer in module._buffers.items()
    }

    def restore() -> None:
        own = module._buffers
        if list(own.keys()) != list(before):
            own.clear()
        for name, recall in before.items():
            buffer = recall and recall()
            # Only what changed: the buffers of TorchScript can be neither removed nor None.
            if name not in own or own[name] is not buffer:
                own[name] = buffer

    return restore


def _remember_attributes(module: nn.Module) -> _Restore:
    """Note a module's plain attributes, metric states included."""
    own = vars(module)
    copied = own.keys() if isinstance(module, Metric) else _small_tensors(own)
    seen: set[int] = set()
    before = {
        name: _remember_tensor(value)
        if isinstance(value, Tensor) and name in copied
        else _remember(value, seen)
        for name, value in own.items()
        if name not in _INTERNAL
    }

    def restore() -> None:
        for name in [name for name in own if name not in _INTERNAL and name not in before]:
            del own[name]
        for name, recall in before.items():
            own[name] = recall()

    return restore


def _small_tensors(attributes: dict[str, Any]) -> set[str]:
    return {
        name
        for name, value in attributes.items()
        if isinstance(value, Tensor) and value.numel() <= _LARGEST_ATTRIBUTE
    }


def _remember_tensor(tensor: Tensor) -> Callable[[], Tensor]:
    copy, version = tensor.detach().clone(), _version(tensor)

    def recall() -> Tensor:
        # Changes through `.data` do not show in the version, and sparse values cannot be compared.
        compared = tensor.layout is torch.strided
        if not torch.equal(tensor, copy) if compared else _version(tensor) != version:
            # One that was made in inference mode can be written to only there.
            with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                tensor.copy_(copy)
        return tensor

    return recall


def _version(tensor: Tensor) -> object:
    """A number that changes with the tensor; never the same where torch does not count."""
    return object() if tensor.is_inference() else tensor._version


def _remember(value: Any, seen: set[int]) -> _Restore:
    """Note the contents of nested containers; the returned function puts them back in place."""
    if not isinstance(value, list | dict | set | deque) or id(value) in seen:
        return lambda: value
    seen.add(id(value))  # containers may contain each other
    keys = list(value)  # of a dict; elsewhere the members themselves
    members = [_remember(item, seen) for item in _values(value)]

    def recall() -> Any:
        items = [member() for member in members]
        # Left alone if unchanged: some kinds of dict and list refuse to be written to.
        if not (_same(list(value), keys) and _same(_values(value), items)):
            _refill(value, keys, items)
        return value

    return recall


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
