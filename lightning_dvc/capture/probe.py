"""A look at samples through the user's model, as it is now and as it recently was."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_dvc.capture.gradients import LayerGradients
from lightning_dvc.capture.kinds import full_shape
from lightning_dvc.capture.layers import LayerCapture, find_layers
from lightning_dvc.capture.loading import Collate, LoadedBatch, Reader, copied
from lightning_dvc.capture.objective import Objective, Outcome
from lightning_dvc.capture.projection import plan_projections
from lightning_dvc.capture.snapshots import Snapshots
from lightning_dvc.errors import (
    BadSampleError,
    CaptureError,
    DVCError,
    UnevenError,
)
from lightning_dvc.records import BadSample


@dataclass(frozen=True)
class Captured:
    """What one pass over ``n`` samples showed; ids and labels on the CPU, the rest on the device.

    Attributes:
        ids: ``(n,)`` sample ids.
        labels: ``(n,)`` classes, -1 where there is none.
        losses: ``(n, S)`` each sample's loss in the present state and the ``S - 1`` before it.
        confidence: ``(n, S)`` how plausible the model finds the target in each of these states.
        predictive: ``(n,)`` uncertainty of the prediction, NaN where the task gives none.
        gradients: Per layer, the samples' gradients; empty when not asked for.
        representations: Per layer, ``(n, d)``.
        fingerprints: ``(n, d)`` what the first layer received.
    """

    ids: Tensor
    labels: Tensor
    losses: Tensor
    confidence: Tensor
    predictive: Tensor
    gradients: list[LayerGradients]
    representations: list[Tensor]
    fingerprints: Tensor

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class Probe:
    """Runs samples through a model and captures what the metrics need.

    Args:
        module: The model, in ``eval()`` and undisturbed by what happens here; see
            :func:`lightning_dvc.capture.guard.undisturbed`.
        objective: Per-sample losses of a batch.
        collate: The user's collate function.
        prepare: Moves a batch to the model as the training loop would.
        context: Where forward passes run, such as autocast.
        layers: Names of the layers to capture, or None for all that can be.
        batch_size: Samples in one pass.
        fits: How many memory is known to take at once, if fewer do.
        adapts: Whether to halve that and go on when memory runs out, rather than raise.
        exact_numbers: Most numbers in the full gradients of all layers together; the largest layers
            beyond it are projected, see :mod:`lightning_dvc.capture.projection`.
        num_workers: Loader processes.
        worker_settings: Further arguments of ``DataLoader`` that concern these.
        on_bad_sample: ``"set_aside"`` or ``"raise"``.
    """

    module: nn.Module
    objective: Objective
    collate: Collate
    prepare: Callable[[Any], Any] = lambda batch: batch
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    layers: Sequence[str] | None = None
    batch_size: int = 512
    fits: int | None = None
    adapts: bool = True
    exact_numbers: int = 2**23
    num_workers: int = 0
    worker_settings: Mapping[str, Any] = field(default_factory=dict)
    on_bad_sample: str = "set_aside"
    bad: list[BadSample] = field(default_factory=list, init=False)
    takes_gradients: bool = field(default=False, init=False)
    """Whether the losses cannot be computed without a graph, since the step takes gradients."""
    like: list[LayerGradients] = field(default_factory=list, init=False)
    """Gradients of no samples, per layer, as the last pass with gradients captured them."""

    def __post_init__(self) -> None:
        self.reader = Reader(self.collate, self.num_workers, **self.worker_settings)
        self._found = find_layers(self.module, self.layers)
        self._shapes = {name: full_shape(layer) for name, layer in self._found.items()}
        self._projections = plan_projections(self._found, self.exact_numbers)
        self._order: list[str] = []
        self._passed: LoadedBatch | None = None  # the last time
        self._failed = 0  # samples since then
        self._refused: UnevenError | None = None  # the first time
        self._most = min(self.batch_size, self.fits or self.batch_size)
        self._tried = 0
        self._overwritten: set[str] = set()
        # cuDNN refuses to differentiate a recurrent layer in eval().
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in self.module.modules())

    @property
    def fitting(self) -> int | None:
        """Samples that memory is known to take at once; None while it took as many as wanted."""
        return self._most if self._most < self.batch_size else None

    @property
    def device(self) -> torch.device:
        """Where the captured layers live."""
        return next(p for layer in self._found.values() for p in layer.parameters()).device

    @property
    def diverged(self) -> list[str]:
        """Names of the parameters that are not finite."""
        named = self.module.named_parameters()
        return [name for name, parameter in named if not bool(parameter.isfinite().all())]

    @property
    def captured_layers(self) -> dict[str, nn.Module]:
        """Layers that the forward pass reaches, in its order; known after the first batch."""
        return {name: self._found[name] for name in self._order}

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the full gradients of the captured layers; known as these are."""
        return {name: list(self._shapes[name]) for name in self._order}

    @property
    def forms(self) -> dict[str, str]:
        """How each layer's gradients are kept: in factors, scattered, formed or projected.

        Known after the first batch with gradients.
        """
        names = self._order if self.like else []
        return {
            name: "projected" if name in self._projections else like.form
            for name, like in zip(names, self.like, strict=True)
        }

    def leave_out(self, names: Sequence[str]) -> None:
        """Stop capturing some of the layers.

        Args:
            names: Names of captured layers, not all of them.
        """
        self._found = {name: x for name, x in self._found.items() if name not in names}
        pairs = zip(self._order, self.like, strict=True) if self.like else ()
        self.like = [like for name, like in pairs if name not in names]
        self._order = [name for name in self._order if name not in names]

    def capture(
        self,
        dataset: Dataset[Any],
        ids: Tensor,
        snapshots: Snapshots | None = None,
        gradients: bool = True,
    ) -> Iterator[Captured]:
        """Pass samples through the model, batch by batch.

        Args:
            dataset: Where the ids point.
            ids: ``(n,)`` samples to look at.
            snapshots: Earlier states of the model to run them through as well.
            gradients: Whether to take gradients with respect to the layers' outputs.

        Yields:
            Batches of samples that could be read and had finite losses and features. The others
            are added to :attr:`bad`.

        Raises:
            BadSampleError: If a sample fails and ``on_bad_sample`` is ``"raise"``.
            CaptureError: If a named layer is never reached.
            ObjectiveError: If no sample has losses of its own.
        """
        for loaded in self.reader.batches(dataset, ids, min(self.batch_size, self._most)):
            self._note_bad(loaded.bad)
            if len(loaded.ids):
                yield from self.look(loaded, snapshots, gradients)
        self.check_any_passed()

    def capture_all(
        self,
        dataset: Dataset[Any],
        ids: Tensor,
        take: Callable[[Captured], None] | None = None,
    ) -> Captured:
        """The same as :meth:`capture`, joined into one, without gradients.

        Args:
            dataset: Where the ids point.
            ids: ``(n,)`` samples to look at.
            take: Gets each batch with its gradients, which are together too large to be kept; when
                not given, none are taken.

        Raises:
            CaptureError: If not one sample could be used.
        """
        parts = []
        for captured in self.capture(dataset, ids, gradients=take is not None):
            if take is not None:
                take(captured)
            parts.append(replace(captured, gradients=[]))
        if not parts:
            self.give_up(len(ids))
        return join(parts)

    def give_up(self, n_samples: int) -> NoReturn:
        """Tell why not one of so many samples could be used.

        Raises:
            CaptureError: Always.
        """
        reasons = "; ".join(entry.reason for entry in self.bad[-3:])
        if "the model raised" in reasons:
            reasons += (
                "; samples are scored in eval(), so if the module returns something else there, "
                "give it a method per_sample_loss(batch), or pass objective=..."
            )
        if self.diverged:
            reasons += (
                f"; the parameters {self.diverged[:3]} are not finite, so training had diverged "
                "before: lower the learning rate, or raise eps of Adam, which is 0 in float16"
            )
        raise CaptureError(
            f"none of {n_samples} samples could be passed through the model; the last reasons: "
            f"{reasons or 'no samples were given'}"
        )

    def look(
        self,
        loaded: LoadedBatch,
        snapshots: Snapshots | None = None,
        gradients: bool = True,
    ) -> Iterator[Captured]:
        """Look at one batch; where it fails, at its halves, down to the sample at fault.

        Args:
            loaded: The batch.
            snapshots: Earlier states of the model to run it through as well.
            gradients: Whether to take gradients with respect to the layers' outputs.

        Yields:
            As :meth:`capture`.
        """
        if len(loaded.ids) > self._most:
            yield from self._look_at_halves(loaded, snapshots, gradients)
            return
        captured, reason, full, uneven = None, "", False, None
        try:
            captured = self._pass(loaded, snapshots, gradients)
            self._try_parts(captured)
        except Exception as error:
            if self._ends_here(error, len(loaded.ids), snapshots, gradients):
                raise
            reason = f"the model raised {type(error).__name__}: {error}"
            full = is_oom_error(error)
            if isinstance(error, UnevenError):
                uneven = error.with_traceback(None)  # which keeps what is in memory
                self._refused = self._refused or uneven
        if full:
            # Only here is the traceback gone, and with it what it keeps in memory.
            garbage_collection_cuda()
        if not reason:
            self._passed, self._failed = replace(loaded, batch=None), 0
            if captured is not None:
                yield captured
        elif len(loaded.ids) == 1:
            self._note_bad([BadSample(int(loaded.ids[0]), reason)])
        else:
            parts = self._look_at_halves(loaded, snapshots, gradients)
            yield from parts if uneven is None else self._not_each(parts, len(loaded.ids), uneven)

    def _ends_here(
        self, error: Exception, n: int, snapshots: Snapshots | None, gradients: bool
    ) -> bool:
        """Whether looking at ``n`` samples failed in a way that looking at fewer does not mend.

        Raises:
            CaptureError: If memory ran out, and no smaller batch may be tried.
        """
        if is_oom_error(error):
            self._make_smaller(n, error)
            return False
        # Collating may leave samples out, and a step may skip a batch for one of them.
        if isinstance(error, DVCError) and not isinstance(error, UnevenError):
            return True
        if n > 1:
            return False
        self._failed += 1
        # Then it is the model that is broken.
        return self._failed > self.batch_size and not self._works(snapshots, gradients)

    def _not_each(
        self, parts: Iterator[Captured], n: int, error: UnevenError
    ) -> Iterator[Captured]:
        """Parts of a batch of ``n`` samples that came out uneven, of which one must be at fault.

        Raises:
            UnevenError: If of two samples, which do not go together, each is fine alone.
        """
        found = 0
        for part in parts:
            found += len(part)
            if n == found == 2:
                raise error
            yield part

    def check_any_passed(self) -> None:
        """Tell a model that takes no sample from bad samples, at the end of a pass.

        Raises:
            UnevenError: If no batch ever passed, and one came out uneven.
        """
        if self._passed is None and self._refused is not None:
            self.bad.clear()
            raise self._refused

    def _works(self, snapshots: Snapshots | None, gradients: bool) -> bool:
        """Whether the model takes a sample that it took before."""
        self._failed = 0
        if self._passed is None:
            return False
        (loaded,) = self._passed.again(self._passed.ids[:1], 1)
        try:
            if len(loaded.ids):  # else it cannot be read any more, and nothing is known
                self._pass(loaded, snapshots, gradients)
        except Exception as error:  # whatever a user's model may raise
            return is_oom_error(error)
        return True

    def _look_at_halves(
        self, loaded: LoadedBatch, snapshots: Snapshots | None, gradients: bool
    ) -> Iterator[Captured]:
        # Read again, and both before either is looked at, which may need the reader, too.
        half = min(-(-len(loaded.ids) // 2), self._most)
        for piece in list(loaded.again(loaded.ids, half)):
            self._note_bad(piece.bad)
            if len(piece.ids):
                yield from self.look(piece, snapshots, gradients)

    def _try_parts(self, captured: Captured | None) -> None:
        """Form what scoring will, once for each size of batch, to see whether memory lasts."""
        if captured is None or len(captured) <= self._tried:
            return
        for layer in captured.gradients:
            next(iter(layer.parts()))
        self._tried = len(captured) if captured.gradients else self._tried

    def _make_smaller(self, size: int, error: Exception) -> None:
        """Note that so many samples at once are too many for the memory."""
        if not self.adapts or size == 1:
            raise CaptureError(
                f"scoring {size} samples at once needs more memory than there is; set "
                'score_batch_size="auto", or smaller, or name fewer layers=[...]'
            ) from error
        self._most = size // 2

    def _pass(
        self, loaded: LoadedBatch, snapshots: Snapshots | None, gradients: bool
    ) -> Captured | None:
        n = len(loaded.ids)
        batch = self.prepare(loaded.batch)
        # For the earlier states, since a step may change its batch.
        kept = copied(batch) if snapshots else None
        recorder = LayerCapture(self._found, self._projections, self._overwritten)
        with ExitStack() as stack:
            stack.enter_context(self._forward())
            stack.enter_context(torch.set_grad_enabled(gradients or self.takes_gradients))
            if self._recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            stack.enter_context(recorder.recording(gradients))
            outcome = self.objective(self.module, batch, n)
        if gradients and recorder.overwritten:
            self._overwritten.update(recorder.overwritten)
            (loaded,) = loaded.again(loaded.ids, n)  # since the step may have changed the batch
            return self._pass(loaded, snapshots, gradients)
        if not self._order:
            self._settle_layers(recorder, n)
        elif recorder.reached != self._order:
            raise CaptureError(
                f"the forward pass called the layers {recorder.reached}, but {self._order} before; "
                "name layers that every batch calls with layers=[...]"
            )
        captured = _assemble(
            loaded.ids,
            outcome,
            [self._outcome(copied(kept), n, snapshots, age) for age in range(len(snapshots or ()))],
            recorder.gradients(outcome.losses) if gradients else [],
            recorder.representations(n),
            recorder.fingerprints(n),
        )
        nothing = torch.empty(0, dtype=torch.int64)  # by index, as a slice would keep it all
        self.like = [layer.rows(nothing) for layer in captured.gradients] or self.like
        return self._keep_finite(captured)

    def _outcome(self, batch: Any, n: int, snapshots: Snapshots | None, age: int) -> Outcome:
        assert snapshots is not None
        graph = torch.set_grad_enabled(self.takes_gradients)
        with snapshots.applied(self.module, age), self._forward(), graph:
            return self.objective(self.module, batch, n)

    @contextmanager
    def _forward(self) -> Iterator[None]:
        """Where forward passes run, without what ``torch.compile`` made of them.

        Compiled code calls neither hooks nor the loss functions that are intercepted, and would be
        compiled anew for each set of hooks until torch gives up.
        """
        with self.context(), torch.compiler.set_stance("force_eager"):
            yield

    def _settle_layers(self, recorder: LayerCapture, n: int) -> None:
        """From the first batch on: which layers a forward pass calls, with a batch to deal out."""
        shared, untracked = recorder.forget_shared(n), recorder.forget_untracked()
        missed = [name for name in self.layers or () if name not in recorder.reached]
        if missed or not recorder.reached:
            raise CaptureError(
                f"the forward pass never called the layers {missed or list(self._found)} with a "
                f"batch as the first axis and with gradients; name layers that it does, or leave "
                f"layers=None (it called {recorder.reached}); activation checkpointing needs "
                "use_reentrant=False"
            )
        if untracked:
            warnings.warn(
                f"the layers {untracked} run without gradients, under torch.no_grad() or in "
                "activation checkpointing, so they are not captured and do not count in any "
                "metric; for checkpointing, use_reentrant=False helps",
                stacklevel=2,
            )
        self._order = recorder.reached
        self._found = {name: self._found[name] for name in self._order}
        if shared:
            warnings.warn(
                f"the layers {shared} do not return one output for each sample along their first "
                "axis, so they are not captured and do not count in any metric; where another "
                "axis comes first, batch_first=True helps",
                stacklevel=2,
            )

    def _keep_finite(self, captured: Captured) -> Captured | None:
        # Sums are a tenth of the work of looking at every number, and finite only if all are.
        total = captured.losses.sum(1) + captured.fingerprints.sum(1)
        for representation in captured.representations:
            total = total + representation.sum(1)
        for layer in captured.gradients:
            total = total + layer.bound()
        finite = total.isfinite()
        if not bool(finite.all()):
            finite = self._finite_after_all(captured, finite)
        if bool(finite.all()):
            return captured
        reason = "its loss, a feature or a gradient is not finite"
        self._note_bad([BadSample(int(i), reason) for i in captured.ids[~finite.cpu()]])
        return rows(captured, finite) if bool(finite.any()) else None

    def _finite_after_all(self, captured: Captured, finite: Tensor) -> Tensor:
        """Where only a sum or a bound overflows, the numbers themselves decide."""
        doubtful = (~finite).nonzero().squeeze(1)
        fine = captured.losses[doubtful].isfinite().all(1)
        fine &= captured.fingerprints[doubtful].isfinite().all(1)
        for representation in captured.representations:
            fine &= representation[doubtful].isfinite().all(1)
        for layer in captured.gradients:
            fine &= layer.rows(doubtful).squared_norms().isfinite()
        finite = finite.clone()
        finite[doubtful] = fine
        return finite

    def _note_bad(self, found: list[BadSample]) -> None:
        if found and self.on_bad_sample == "raise":
            raise BadSampleError(
                f"sample {found[0].id} cannot be scored: {found[0].reason}; mend it, or set "
                'on_bad_sample="set_aside" to leave such samples out'
            )
        self.bad.extend(found)


def _assemble(
    ids: Tensor,
    present: Outcome,
    earlier: list[Outcome],
    gradients: list[LayerGradients],
    representations: list[Tensor],
    fingerprints: Tensor,
) -> Captured:
    outcomes = [present, *earlier]
    entropy = present.entropy()
    return Captured(
        ids=ids,
        labels=present.labels().cpu(),
        losses=torch.stack([outcome.losses.detach().float() for outcome in outcomes], dim=1),
        confidence=torch.stack([outcome.confidence().float() for outcome in outcomes], dim=1),
        predictive=torch.full_like(present.losses, torch.nan) if entropy is None else entropy,
        gradients=gradients,
        representations=representations,
        fingerprints=fingerprints,
    )


def rows(captured: Captured, keep: Tensor) -> Captured:
    """Some of the samples of a pass.

    Args:
        captured: The pass.
        keep: ``(n,)`` mask.
    """
    on_cpu = keep.cpu()
    return Captured(
        ids=captured.ids[on_cpu],
        labels=captured.labels[on_cpu],
        losses=captured.losses[keep],
        confidence=captured.confidence[keep],
        predictive=captured.predictive[keep],
        gradients=[layer.rows(keep) for layer in captured.gradients],
        representations=[h[keep] for h in captured.representations],
        fingerprints=captured.fingerprints[keep],
    )


def join(parts: Sequence[Captured]) -> Captured:
    """Several passes over the same layers as one, without their gradients.

    Args:
        parts: At least one.
    """
    return Captured(
        ids=torch.cat([part.ids for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        losses=torch.cat([part.losses for part in parts]),
        confidence=torch.cat([part.confidence for part in parts]),
        predictive=torch.cat([part.predictive for part in parts]),
        gradients=[],
        representations=[
            torch.cat(layer) for layer in zip(*(p.representations for p in parts), strict=True)
        ],
        fingerprints=torch.cat([part.fingerprints for part in parts]),
    )
