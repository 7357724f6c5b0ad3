"""Per-sample losses and outputs of an arbitrary LightningModule, unmodified where possible."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Final, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_dvc.capture.decomposition import Term, main_call, terms_of
from lightning_dvc.capture.interception import INTERCEPTED, LossInterception, describe
from lightning_dvc.capture.outcome import Kind, Outcome, infer_kind
from lightning_dvc.errors import ObjectiveError, UnevenError

__all__ = ["Kind", "Objective", "Outcome", "UserObjective", "resolve_objective"]

UserObjective = Callable[[Any, Any], Any]
"""A function of the module and a batch that returns an :class:`Outcome`, ``(losses, outputs)`` or
``(losses, outputs, targets)``."""

_REMEDY: Final = (
    "pass objective=..., a function of the module and a batch that returns per-sample (losses, "
    "outputs, targets), or give the module a method per_sample_loss(batch) that does"
)

_RELATIVE: Final = 1e-3
_ABSOLUTE: Final = 1e-5


class Objective(Protocol):
    """Per-sample losses and outputs of a batch."""

    def __call__(self, module: nn.Module, batch: Any, n: int) -> Outcome:
        """Run a batch through a module.

        Args:
            module: The model; see :func:`lightning_dvc.capture.guard.undisturbed`.
            batch: What the user's collate function returned, on the module's device.
            n: Samples in the batch.

        Returns:
            The outcome of these ``n`` samples.

        Raises:
            ObjectiveError: If the losses or outputs are not those of ``n`` samples.
        """
        ...


def resolve_objective(
    module: nn.Module, objective: UserObjective | None = None, known: bool = False
) -> Objective:
    """Find out how to obtain per-sample losses from a module.

    In this order: the user's function; the module's method ``per_sample_loss(batch)``; the module's
    own ``training_step``, with the loss functions of ``torch.nn.functional`` (and so the modules of
    ``torch.nn`` built on them) intercepted. In the last case the mean of the samples' losses is
    the loss that the step returns, with three exceptions, each made so that a sample's loss does
    not depend on its batch mates: class weights are not divided by their sum over the batch, a
    sample's positions are averaged over its own non-ignored ones, and a sum that the step does not
    divide by the batch size stays undivided. With several losses in one step, outputs and targets
    are those of the largest classification loss, or of the largest loss if none classifies.

    Args:
        module: The user's LightningModule.
        objective: A function ``(module, batch)`` that returns an :class:`Outcome`, or a tuple
            ``(losses, outputs)`` or ``(losses, outputs, targets)``, with losses ``(n,)``.
        known: Whether the module was accepted before, by the run that this one goes on with: then
            even the first loss that is not accounted for is a warning.

    Returns:
        The objective. It expects to be called under
        :func:`lightning_dvc.capture.guard.undisturbed`.

    Raises:
        ObjectiveError: If there is no way, or only a step that optimises manually.

    Example:
        >>> class Net(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 3)
        ...
        ...     def training_step(self, batch):
        ...         return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        >>> net = Net()
        >>> outcome = resolve_objective(net)(net, (torch.ones(4, 2), torch.tensor([0, 1, 2, 0])), 4)
        >>> outcome.kind, outcome.losses.shape, outcome.labels().tolist()
        ('multiclass', torch.Size([4]), [0, 1, 2, 0])
    """
    if objective is not None:
        if not callable(objective):
            raise ObjectiveError(
                "objective was expected to be a function of the module and a batch, but is a "
                f"{type(objective).__name__}; pass a function, or None for the training_step"
            )
        return _Given(objective, "objective")
    if callable(getattr(module, "per_sample_loss", None)):
        return _Given(_own_per_sample_loss, "per_sample_loss")
    name = type(module).__name__
    step = getattr(module, "training_step", None)
    if step is None or getattr(step, "__func__", step) is LightningModule.training_step:
        raise ObjectiveError(
            f"{name} has neither a training_step nor a method per_sample_loss, so its losses are "
            f"unknown; define training_step, or {_REMEDY}"
        )
    if not getattr(module, "automatic_optimization", True):
        raise ObjectiveError(
            f"{name} optimises manually, so its training_step would train while samples are "
            f"scored; {_REMEDY}"
        )
    return _TrainingStep(known)


def _own_per_sample_loss(module: Any, batch: Any) -> Any:
    return module.per_sample_loss(batch)


class _Given:
    """Losses from a function that returns them per sample."""

    def __init__(self, function: UserObjective, name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, module: nn.Module, batch: Any, n: int) -> Outcome:
        graph = torch.is_grad_enabled()
        # With gradients on in any case, for the function may take some of its own.
        with nullcontext() if graph else _frozen(module), torch.enable_grad():
            returned = self._function(module, batch)
        if not isinstance(returned, Outcome):
            returned = self._from_tuple(returned)
        if n == returned.losses.numel() == 1:  # squeezed by one axis too many
            returned = replace(returned, losses=returned.losses.reshape(1))
        self._check(returned, n, graph)
        return returned

    def _from_tuple(self, returned: Any) -> Outcome:
        if not (isinstance(returned, tuple) and len(returned) in (2, 3)):
            size = f" of {len(returned)}" if isinstance(returned, tuple) else ""
            raise ObjectiveError(
                f"{self._name} was expected to return an Outcome, (losses, outputs) or (losses, "
                f"outputs, targets), but returned a {type(returned).__name__}{size}; return one of "
                "these, with one loss per sample"
            )
        losses, outputs, targets = (*returned, None)[:3]
        for part, value in (("losses", losses), ("outputs", outputs), ("targets", targets)):
            if not (isinstance(value, Tensor) or (value is None and part != "losses")):
                raise ObjectiveError(
                    f"{self._name} was expected to return tensors, but its {part} are a "
                    f"{type(value).__name__}; return a tensor with one row per sample"
                )
        return Outcome(losses, outputs, targets, infer_kind(outputs, targets))

    def _check(self, outcome: Outcome, n: int, graph: bool) -> None:
        losses = outcome.losses
        if losses.shape != (n,) or not losses.is_floating_point():
            raise UnevenError(
                f"{self._name} was expected to return losses of shape ({n},), one float per "
                f"sample, but they have shape {tuple(losses.shape)} and type {losses.dtype}; use "
                'reduction="none" and average over everything but the batch'
            )
        if graph and not losses.requires_grad:
            raise ObjectiveError(
                f"{self._name} was expected to return losses with a gradient, but they have none; "
                "compute them from the forward pass without detach() and torch.no_grad()"
            )
        for part in ("outputs", "targets", "variances"):
            value = getattr(outcome, part)
            if value is not None and (value.ndim == 0 or len(value) != n):
                raise UnevenError(
                    f"{self._name} was expected to return {part} with {n} rows, one per sample, "
                    f"but they have shape {tuple(value.shape)}; keep the batch as the first axis"
                )


class _TrainingStep:
    """Losses from the module's own ``training_step``, each of which is checked.

    The first finite one decides whether the module is accepted. A later one, to which a term may
    have come that was 0 at first, is no reason to stop a training.
    """

    def __init__(self, known: bool = False) -> None:
        self._accepted = known
        self._warned = False
        # By position of the call in the step. Kept from the first batch of several samples, so
        # that a short last batch is read like the others.
        self._divided: dict[int, bool] = {}

    def __call__(self, module: nn.Module, batch: Any, n: int) -> Outcome:
        # A look that needs no gradient needs no graph behind the losses either.
        graph = torch.is_grad_enabled()
        with ExitStack() as stack:
            if not graph:
                stack.enter_context(_frozen(module))
            stack.enter_context(torch.enable_grad())
            with LossInterception(leaves=not graph) as seen:
                loss = _loss_of(_run_step(module, batch))
            terms = terms_of(loss, seen.calls)
            self._check(loss.detach(), terms)
            shares = [term.per_sample(n, self._is_divided(term, n)) for term in terms]
            return describe(main_call(terms), torch.stack(shares).sum(0))

    def _is_divided(self, term: Term, n: int) -> bool:
        if n == 1 or term.call.reduction == "mean":
            return True
        return self._divided.setdefault(term.position, term.seems_divided(n))

    def _check(self, loss: Tensor, terms: list[Term]) -> None:
        returned, found = loss.item(), sum(term.value.item() for term in terms)
        finite = math.isfinite(returned)
        if terms and not (finite and abs(found - returned) > _tolerance(loss, terms)):
            self._accepted |= finite
            return
        trouble = (
            f"training_step returned the loss {returned:.6g}, but the loss functions of torch "
            f"that it called account for {found:.6g}, so part of the loss is computed by other "
            f"means, or is no weighted sum of these (understood: {', '.join(INTERCEPTED)})"
        )
        if not terms or not self._accepted:
            raise ObjectiveError(f"{trouble}; {_REMEDY}")
        if not self._warned:
            warnings.warn(
                f"{trouble}; it was accounted for before, and what came to it since does not count "
                f"in any score; so that it does, {_REMEDY}",
                stacklevel=2,
            )
        self._warned = True


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Make a forward pass build no graph, without switching gradients off."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _tolerance(loss: Tensor, terms: list[Term]) -> float:
    types = [loss.dtype, *(term.call.value.dtype for term in terms)]
    device = loss.device.type
    if torch.is_autocast_enabled(device):  # a step may cast its losses to the type of its outputs
        types.append(torch.get_autocast_dtype(device))
    relative = max(_RELATIVE, *(4 * torch.finfo(dtype).eps for dtype in types))
    return _ABSOLUTE + relative * abs(loss.item())


def _run_step(module: Any, batch: Any) -> Any:
    """Call ``training_step`` with the arguments that Lightning would give it."""
    args: list[int] = []
    kwargs: dict[str, int] = {}
    for parameter in list(inspect.signature(module.training_step).parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY:
            if parameter.name == "batch_idx":
                kwargs["batch_idx"] = 0
        elif parameter.kind is not parameter.VAR_KEYWORD:
            # Lightning gives the second argument whatever its name; later ones keep defaults.
            required = parameter.default is parameter.empty
            if not args or (required and parameter.kind is not parameter.VAR_POSITIONAL):
                args.append(0)
    return module.training_step(batch, *args, **kwargs)


def _loss_of(returned: Any) -> Tensor:
    """The scalar loss in what a ``training_step`` returned."""
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor):
        raise UnevenError(
            'training_step was expected to return a loss, or a dict with the key "loss", but '
            f"returned {_name(returned)}, so it skips this batch or returns no loss; {_REMEDY}"
        )
    if loss.numel() != 1 or not loss.requires_grad:
        raise ObjectiveError(
            "training_step was expected to return one number with a gradient, but returned a "
            f"tensor of shape {tuple(loss.shape)} with requires_grad={loss.requires_grad}; "
            f"mend it, or {_REMEDY}"
        )
    return loss.squeeze()


def _name(returned: Any) -> str:
    if isinstance(returned, Mapping):
        return f"a {type(returned).__name__} with the keys {sorted(map(str, returned))}"
    return "None" if returned is None else f"a {type(returned).__name__}"
