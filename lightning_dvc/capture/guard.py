"""Looking at a model in the middle of its training, without leaving a trace."""

import math
import random
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from typing import Any, Final, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_dvc.capture.notes import LARGEST, Notes, Restore

# Attributes that belong to torch and Lightning: flags, hooks, parameters, trainer. Buffers and
# training flags are looked after separately; which buffers are saved is a set like any other.
_INTERNAL: Final = frozenset(vars(LightningModule())) - {"_non_persistent_buffers_set"}

# How the names begin of what loggers, and what they write with, take something down with.
_TAKE_DOWN: Final = ("log", "add_", "track", "report_")

# A gigabyte in single precision.
_LARGEST_MODEL: Final = 2**28


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
    module and its submodules, such as counters, running means, random streams of its own, and lists
    of outputs, with their identity. ``log`` and ``log_dict`` do nothing inside. Parameters are put
    back by :func:`unmoved`; their ``.grad`` is not touched.

    Args:
        module: The user's model. Values nested in a plain attribute's containers are restored as
            far as these are lists, dicts, sets and deques, or objects that hold nothing but these,
            numbers, text, tensors, arrays and random streams, as a meter does; other objects are
            put back but not what they hold. So are tensors and arrays of more than ``2**20``
            elements, alone or in one attribute together.
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
        notes = Notes()
        for part in module.modules():
            for restore in (_note_attributes(part, notes), _note_buffers(part, notes)):
                stack.callback(restore)
            stack.callback(setattr, part, "training", part.training)
            # Not eval(): some modules override train(), to merge weights for example.
            part.training = False
            if isinstance(part, LightningModule):
                stack.callback(_silence(part, "log", "log_dict"))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def unmoved(module: nn.Module, names: Set[str] | None = None) -> Iterator[set[str]]:
    """Put parameters back that were moved inside, as those of a momentum encoder may be.

    Args:
        module: The user's model.
        names: Which parameters, as in ``named_parameters()``. Each is copied to the CPU meanwhile.
            When not given, all of a model of at most ``2**28`` numbers, and none of a larger one,
            for which there may be no room.

    Yields:
        A set that is empty, and on leaving gets the names of the parameters that had moved.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> with unmoved(net) as moved:
        ...     _ = net.bias.data.add_(1)
        >>> moved
        {'bias'}
    """
    plain = {name: p for name, p in module.named_parameters() if _is_plain(p)}
    if names is None:
        fits = sum(parameter.numel() for parameter in plain.values()) <= _LARGEST_MODEL
        names = plain.keys() if fits else frozenset()
    before = {name: _note_parameter(p) for name, p in plain.items() if name in names}
    moved: set[str] = set()
    try:
        yield moved
    finally:
        moved.update([name for name, restore in before.items() if restore()])


@contextmanager
def unheard(trainer: Trainer) -> Iterator[None]:
    """Let what a ``training_step`` asks of its trainer have no effect.

    Inside, loggers take nothing down and learning rates are not scheduled. On leaving, the
    settings of the optimisers, such as learning rates, are as they were.

    Args:
        trainer: The trainer, in the middle of a fit.
    """
    with ExitStack() as stack:
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        trainer.loggers = [cast("Logger", _Deaf(logger)) for logger in trainer.loggers]
        for config in trainer.lr_scheduler_configs:
            stack.callback(_silence(config.scheduler, "step"))
        notes = Notes()
        for optimizer in trainer.optimizers:
            stack.callback(notes.of(optimizer.param_groups))
        yield


class _Deaf:
    """A logger, or what one writes with, that takes nothing down and is the same otherwise."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    @property  # type: ignore[misc]  # Python asks it for isinstance(); mypy allows no property
    def __class__(self) -> Any:
        """That of the other, since a module may look for one of a kind."""
        return type(self._thing)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._thing, name)
        if name == "experiment":
            return _Deaf(value)
        return _ignore if callable(value) and name.startswith(_TAKE_DOWN) else value

    def __getitem__(self, key: Any) -> Any:
        return self._thing[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take nothing down, as some experiments do this way."""


def _silence(thing: Any, *names: str) -> Restore:
    """Make methods do nothing until the returned function is called."""
    own = vars(thing)
    before: dict[str, Any] = {name: own[name] for name in names if name in own}
    own.update(dict.fromkeys(names, _ignore))

    def restore() -> None:
        for name in names:
            own.pop(name, None)
        own.update(before)

    return restore


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for a method that does something."""


def _note_buffers(module: nn.Module, notes: Notes) -> Restore:
    """Note a module's own buffers, of any size."""
    before = {name: notes.of(buffer, math.inf) for name, buffer in module._buffers.items()}

    def restore() -> None:
        own = module._buffers
        if list(own.keys()) != list(before):
            own.clear()
        for name, recall in before.items():
            buffer = recall()
            # Only what changed: the buffers of TorchScript can be neither removed nor None.
            if name not in own or own[name] is not buffer:
                own[name] = buffer

    return restore


def _note_attributes(module: nn.Module, notes: Notes) -> Restore:
    """Note a module's plain attributes, metric states included, which may have any size."""
    own = vars(module)
    of_metric = isinstance(module, Metric)
    before = {
        name: notes.of(value, math.inf if of_metric and isinstance(value, Tensor) else LARGEST)
        for name, value in own.items()
        if name not in _INTERNAL
    }

    def restore() -> None:
        for name in [name for name in own if name not in _INTERNAL and name not in before]:
            del own[name]
        for name, recall in before.items():
            own[name] = recall()

    return restore


def _note_parameter(parameter: nn.Parameter) -> Callable[[], bool]:
    """Note a parameter; the returned function puts it back, and tells whether it had changed."""
    # Assigning to `.data` would leave what is noted here as it is.
    data = parameter.data
    copy = data.to("cpu", copy=True)

    def restore() -> bool:
        replaced = parameter.data_ptr() != data.data_ptr() or parameter.shape != data.shape
        if replaced:
            parameter.data = data
        overwritten = not torch.equal(data, copy.to(data.device))
        if overwritten:
            data.copy_(copy)
        return replaced or overwritten

    return restore


def _is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is an ordinary tensor that has values."""
    if is_lazy(parameter) or parameter.is_meta or parameter.layout is not torch.strided:
        return False
    return type(parameter.data) is Tensor  # neither quantised in a way of its own, nor sharded
