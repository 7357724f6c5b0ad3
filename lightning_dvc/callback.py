"""Lightning's hooks turned into rounds of selection."""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_dvc import bars, logs, trainer_bridge
from lightning_dvc.capture.guard import undisturbed, unheard, unmoved
from lightning_dvc.capture.objective import UserObjective, resolve_objective
from lightning_dvc.capture.probe import Probe
from lightning_dvc.capture.sharding import unsharded
from lightning_dvc.capture.trial import keep_apart, try_out
from lightning_dvc.datamodule import DVCDataModule
from lightning_dvc.distributed import Group
from lightning_dvc.errors import (
    ConfigurationError,
    StateError,
    check_settings,
    is_number,
    is_whole,
)
from lightning_dvc.policy.plan import Plan, plan_rounds
from lightning_dvc.randomness import torch_stream
from lightning_dvc.records import BadSample, Choice
from lightning_dvc.strategies.base import Round, Stateless, Strategy
from lightning_dvc.strategies.dvc import DVC
from lightning_dvc.timing import Stopwatch

_TRIAL_SIZE: Final = 32
# Of a sample or two, anything can be dealt out, and seems to be theirs.
_FEWEST_TRIED: Final = 8
_LARGEST_BATCH: Final = 512
# Alone on an accelerator, where the number of calls is what costs. Several processes would have too
# few batches to divide, and worker processes hold several batches each.
_LARGEST_ON_DEVICE: Final = 2048
_Layers = dict[str, list[int]]
"""Names of the captured layers, in the order of the forward pass, and shapes of their gradients."""
# Attribute of a strategy: the datamodule whose samples it remembers.
_SERVES: Final = "_serves"


class DVCCallback(Callback):
    """Selects training samples for a :class:`~lightning_dvc.DVCDataModule` while a model trains.

    A round takes place at the start of an epoch, beginning with the first, and what it selects is
    trained on in that very epoch. The user's module is looked at as it is, and left as it was; what
    a ``training_step`` may change that is not put back is in docs/compatibility.md.

    Another fit with the same callback and datamodule goes on with what is selected, and with what
    was learnt about it, so it is meant for the same model: for another one, make both anew.

    Args:
        strategy: How to choose; :class:`~lightning_dvc.DVC` with its defaults when not given.
        monitor: Name of the validation metric that the strategy learns from, as logged by the
            module. Only strategies that learn from a score need it, such as
            ``DVC(BayesianWeights())``; where it is given, the module must log it.
        mode: Whether a greater (``"max"``) or a smaller (``"min"``) value is better.
        every_n_epochs: Epochs from one round to the next, at least 1. When not given, so many that
            all rounds take place in the first two thirds of the run, as ``max_epochs`` or
            ``max_steps`` ends it;
            1 in a run of fewer epochs, or one that neither of them ends. ``max_time`` does not
            count.
        max_overhead: Share of the run's wall time that selection may take, in ``(0, 1]``. While it
            has taken more, a round that is due is left out, and those that follow add more; the
            first and the last always take place. The log says how many were left out; which ones
            depends on the clock, so such a run cannot be repeated exactly. On small models, where
            every round takes too long, it costs much of the gain (docs/tried.md). No limit when
            not given.
        objective: A function ``(module, batch)`` that returns per-sample ``(losses, outputs)`` or
            ``(losses, outputs, targets)``; needed only for a ``training_step`` whose loss is not
            made of functions of torch that are understood (the error names them), or that
            optimises manually. A method ``per_sample_loss(batch)`` of the module does the same.
        layers: Names of the layers to capture, as in ``named_modules()``; every trainable
            ``Linear``, ``Conv1d`` to ``Conv3d`` and ``Embedding`` when not given.
        score_batch_size: Samples scored in one pass, at least 1; ``"auto"`` begins with 512
            (2048 on an accelerator that one process uses, without workers) and goes on with half as
            many whenever memory runs out.
        exact_numbers: Most numbers in the weight gradients of all captured layers together, at
            least 0. Several such sets are kept while scoring. The largest layers beyond it are
            scored by a random projection of their gradients; :attr:`layer_forms` says which.
        on_bad_sample: What to do about a sample that cannot be read or whose loss or features are
            not finite: ``"set_aside"``, or ``"raise"``.

    Raises:
        ConfigurationError: If a setting cannot work, or the strategy learns from a score and
            ``monitor`` is not given. When a fit begins, if trainer, datamodule or module cannot
            work with selection.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=30, callbacks=[DVCCallback()], logger=False)
    """

    def __init__(
        self,
        strategy: Strategy | None = None,
        *,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        every_n_epochs: int | None = None,
        max_overhead: float | None = None,
        objective: UserObjective | None = None,
        layers: Sequence[str] | None = None,
        score_batch_size: int | Literal["auto"] = "auto",
        exact_numbers: int = 2**23,
        on_bad_sample: Literal["set_aside", "raise"] = "set_aside",
    ) -> None:
        check_settings(
            (
                "strategy",
                strategy,
                strategy is None or _chooses(strategy),
                "an object that chooses, such as DVC() or Random(), or None",
            ),
            ("mode", mode, mode in ("max", "min"), "'max' or 'min'"),
            (
                "every_n_epochs",
                every_n_epochs,
                every_n_epochs is None or is_whole(every_n_epochs, least=1),
                "at least 1, a whole number, or None",
            ),
            (
                "max_overhead",
                max_overhead,
                max_overhead is None or (is_number(max_overhead) and 0 < max_overhead <= 1),
                "in (0, 1], or None",
            ),
            (
                "layers",
                layers,
                layers is None or _are_names(layers),
                "a list of names, at least one, or None for all",
            ),
            (
                "score_batch_size",
                score_batch_size,
                score_batch_size == "auto" or is_whole(score_batch_size, least=1),
                "at least 1, or 'auto', and a whole number",
            ),
            (
                "exact_numbers",
                exact_numbers,
                is_number(exact_numbers) and exact_numbers >= 0,
                "at least 0",
            ),
            (
                "on_bad_sample",
                on_bad_sample,
                on_bad_sample in ("set_aside", "raise"),
                "'set_aside' or 'raise'",
            ),
        )
        self.strategy: Strategy = DVC() if strategy is None else strategy
        if self.strategy.learns_from_score and monitor is None:
            raise ConfigurationError(
                f"{type(self.strategy).__name__} learns from the validation score, but monitor is "
                "None; pass monitor='...', the name of a metric that the module logs"
            )
        self.monitor = monitor
        self.mode = mode
        self.every_n_epochs = None if every_n_epochs is None else int(every_n_epochs)
        self.max_overhead = max_overhead
        self.objective = objective
        self.layers = layers
        self.score_batch_size = score_batch_size
        self.exact_numbers = exact_numbers
        self.on_bad_sample = on_bad_sample
        self.watch = Stopwatch()
        self.rounds_done = 0
        self.rounds_left_out = 0
        self._last_epoch = -1
        self._plan: Plan | None = None
        self._n_rounds = 0  # of the plan, without those that were left out
        self._owner: DVCDataModule | None = None
        self._stage: str | None = None
        self._probe: Probe | None = None
        self._moving: set[str] = set()  # parameters that a look at the model moves
        # Of the run that was resumed: the budget, samples that memory took, captured layers; these
        # also of the fit before this one.
        self._layers_before: _Layers | None = None
        self._budget_before = 0
        self._fits: int | None = None
        self._short_epochs = ExitStack()
        self._started = 0.0
        self._seconds_before = 0.0  # of training, in the run that was resumed
        self._warned = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before anything else happens, what selection cannot work with."""
        self._stage = stage
        if stage != "fit":
            return
        if trainer_bridge.is_overfitting(trainer):
            raise ConfigurationError(
                "overfit_batches replaces the sampler that selection needs; leave it at 0, or "
                "leave DVCCallback out"
            )
        if (reason := trainer_bridge.unfit_processes(trainer)) is not None:
            raise ConfigurationError(reason)
        datamodule = self._datamodule(trainer)
        served = getattr(self.strategy, _SERVES, datamodule)
        if self._owner not in (None, datamodule) or served is not datamodule:
            raise ConfigurationError(
                "this DVCCallback, or its strategy, has selected for another DVCDataModule, whose "
                "samples it remembers; make a new callback, with a new strategy, for each "
                "datamodule"
            )
        self._owner = datamodule
        setattr(self.strategy, _SERVES, datamodule)
        self._follow(self._new_plan(trainer, datamodule))
        # A second fit counts its epochs anew; a resumed one overwrites this with what was saved.
        self._last_epoch = -1
        if self._probe is not None:
            goes_by_it = self.rounds_done and not isinstance(self.strategy, Stateless)
            selects = goes_by_it and self._has_rounds_left(datamodule)
            self._layers_before = self._probe.shapes if selects else None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how to look at the model: its layers and its per-sample losses."""
        datamodule = self._datamodule(trainer)
        validates = trainer.limit_val_batches and is_overridden("val_dataloader", datamodule)
        if self.strategy.learns_from_score and not validates:
            raise ConfigurationError(
                f"{type(self.strategy).__name__} learns from {self.monitor!r}, but nothing is "
                "validated: there is no val dataset, or limit_val_batches=0; give and use one"
            )
        adapts = self.score_batch_size == "auto"
        alone = trainer.world_size == 1 and datamodule.loading.num_workers == 0
        on_device = alone and pl_module.device.type != "cpu"
        largest = _LARGEST_ON_DEVICE if on_device else _LARGEST_BATCH
        most = largest if adapts else int(self.score_batch_size)
        # Under spectral norm, to read a weight in training mode changes it.
        with undisturbed(pl_module):
            self._probe = Probe(
                pl_module,
                resolve_objective(pl_module, self.objective, known=self.rounds_done > 0),
                datamodule.loading.collate_fn,
                prepare=partial(trainer_bridge.to_model, trainer, pl_module),
                context=partial(trainer_bridge.forward_context, trainer),
                layers=self.layers,
                batch_size=most,
                fits=self._fits if adapts else None,
                adapts=adapts,
                exact_numbers=self.exact_numbers,
                num_workers=datamodule.loading.num_workers,
                worker_settings=datamodule.loading.of_workers(most),
                on_bad_sample=self.on_bad_sample,
            )
        if self.rounds_done == 0:  # anew, since a tuner may have changed the batch size
            self._follow(self._new_plan(trainer, datamodule))
        # Until Lightning has set up its loader.
        n_batches = self._n_batches(datamodule)
        self._short_epochs.enter_context(trainer_bridge.short_epochs(trainer, n_batches))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try the look at the model on a few samples, so that what fails, fails early."""
        self._started = time.perf_counter()
        self._short_epochs.close()
        trainer_bridge.validate_where_saved(trainer)
        datamodule = self._datamodule(trainer)
        if self.rounds_done >= self._n_rounds and datamodule.budget > self._budget_before > 0:
            self._follow(self._plan_of_the_rest(trainer, datamodule))
            # Another fit is not to plan as many again.
            self._budget_before = datamodule.budget
        probe = self._ready_probe
        ids = datamodule.selected_ids
        if len(ids) < _FEWEST_TRIED:
            ids = torch.arange(datamodule.pools.n_samples)
        # Of all sources, whose samples are neighbours.
        ids = ids[:: -(-len(ids) // _TRIAL_SIZE)]
        group = self._group(trainer)
        with (
            group.agreeing(),
            unsharded(pl_module),
            unheard(trainer),
            undisturbed(pl_module),
            unmoved(pl_module) as self._moving,
        ):
            own = try_out(probe, datamodule.pools.dataset, ids)
            # All leave out the same layers, though some may read these samples and others not.
            keep_apart(probe, group.gather_objects([own])[0])
        self._check_layers(probe.shapes)

    def _check_layers(self, layers: _Layers) -> None:
        """Refuse to go on with what was learnt of other layers, in a checkpoint or another fit."""
        before = self._layers_before
        # None are known where not one of the samples tried could be read.
        if not layers or before is None or list(layers.items()) == list(before.items()):
            return
        raise ConfigurationError(
            f"expected to go on where the layers {list(before)} were captured, but now these are: "
            f"{list(layers)}; the shapes of their gradients were {before}, and now are {layers}. "
            "Go on with the same model and the same layers=..., or start selection anew, with a "
            "new callback and a new datamodule"
        )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Run a round, if one is due, and train on what it selects from this epoch on."""
        datamodule = self._datamodule(trainer)
        epoch = trainer.current_epoch
        if not self._is_due(datamodule, epoch):
            return
        probe = self._ready_probe
        group = self._group(trainer)
        if self._is_too_dear(group):
            self._leave_out(trainer, epoch)
            return
        number = self.rounds_done + 1
        this = Round(
            number=number,
            n_rounds=self._n_rounds,
            budget=datamodule.budget,
            oversample=datamodule.oversample,
            pools=datamodule.pools,
            selected=datamodule.selected_ids,
            probe=probe,
            reference=datamodule.reference,
            seed=datamodule.seed,
            group=group,
            watch=self.watch,
        )
        of_all = f"/{self._n_rounds}" if number <= self._n_rounds else ""
        with bars.telling(trainer, f"Selecting (round {number}{of_all})"):
            # Randomly augmented samples then look the same in a resumed run.
            seed = torch_stream(datamodule.seed, "augmentation", number).initial_seed()
            with (
                group.agreeing(),
                unsharded(pl_module),
                unheard(trainer),
                undisturbed(pl_module, seed),
                unmoved(pl_module, self._moving),
                probe.reader.often(this.pools.dataset, this.reference),
            ):
                group.share_buffers(pl_module)
                choice = self.strategy.choose(this)
            bad = self._take_bad(group)
            with self.watch.section("apply"):
                datamodule.apply(choice, number, bad)
                # Before the first round, the loader stood in for one of the full selection.
                if number == 1 or bad or len(choice.add) or len(choice.remove):
                    trainer_bridge.renew_train_batches(trainer, self._n_batches(datamodule))
        self.rounds_done, self._last_epoch = number, epoch
        self._warn_of(datamodule, bad)
        self._log(trainer, datamodule, choice)

    @property
    def layer_forms(self) -> dict[str, str]:
        """How the gradients of each captured layer are kept and used; known once training runs."""
        return {} if self._probe is None else self._probe.forms

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the monitored score to the strategy."""
        if self.monitor is None or not trainer_bridge.is_fitting(trainer):
            return
        with self._group(trainer).agreeing():
            self._check_logged(trainer)
        if not trainer.sanity_checking:
            value = trainer.strategy.reduce(
                trainer.callback_metrics[self.monitor], reduce_op="mean"
            )
            self.strategy.observe(float(value) if self.mode == "max" else -float(value))

    def _check_logged(self, trainer: Trainer) -> None:
        if self.monitor not in trainer.callback_metrics:
            raise ConfigurationError(
                f"DVCCallback(monitor={self.monitor!r}) expects a validation metric of that name, "
                f"but the module logged {sorted(trainer.callback_metrics)}; log it with "
                f"self.log({self.monitor!r}, ...) in validation_step, or monitor one of these. If "
                "the module logs only after the sanity check, set num_sanity_val_steps=0"
            )

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if the run was too short to spend the budget."""
        self._short_epochs.close()  # where nothing was trained
        has_trained = self._started > 0
        self._seconds_before, self._started = self._training_seconds, 0.0
        datamodule = self._datamodule(trainer)
        n_selected = len(datamodule.selected_ids)
        was_to_select = has_trained and not trainer_bridge.is_trial_run(trainer)
        if was_to_select and n_selected < datamodule.budget:
            rank_zero_warn(
                f"The run ended with {n_selected} of a budget of {datamodule.budget} samples "
                f"selected, after {self.rounds_done} of {self._n_rounds} rounds. "
                f"{self._remedy(trainer)}"
            )

    def _remedy(self, trainer: Trainer) -> str:
        """What would have spent the budget."""
        if self.rounds_done >= self._n_rounds:
            return (
                "There was no more to select: look at max_share of the sources, and at "
                "selection.set_aside of the datamodule."
            )
        fewer = "set rounds= of the datamodule or every_n_epochs= of the callback lower."
        if trainer.should_stop and trainer.current_epoch != trainer.max_epochs:
            return (
                "Give it more epochs: it was stopped before its last one, as by EarlyStopping, so "
                f"set min_epochs= of the Trainer, or more patience. Or {fewer}"
            )
        return f"Give it more epochs, or {fewer}"

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the trainer's settings as they were."""
        self._short_epochs.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was learnt, and which round is over, as tensors and plain containers."""
        return {
            "strategy": self.strategy.state_dict(),
            "strategy_name": type(self.strategy).__name__,
            "datamodule_name": type(self._owner).__name__,
            "selected": len(self._owner.selected_ids) if self._owner else 0,
            "budget": self._owner.budget if self._owner else 0,
            "rounds_done": self.rounds_done,
            "n_rounds": self._n_rounds,
            "plan": self._plan and asdict(self._plan),
            "last_epoch": self._last_epoch,
            "rounds_left_out": self.rounds_left_out,
            "layers": self._probe.shapes if self._probe else None,
            "fits": self._probe.fitting if self._probe else None,
            "seconds": dict(self.watch.seconds),
            "training_seconds": self._training_seconds,
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the last round of a saved run; to validate or test changes nothing."""
        if self._stage not in (None, "fit"):
            return
        self._check_state(state_dict)
        self.strategy.load_state_dict(state_dict["strategy"])
        self.rounds_done = state_dict["rounds_done"]
        if state_dict["plan"]:
            self._follow(Plan(**state_dict["plan"]))
        self._n_rounds = state_dict["n_rounds"]
        self._last_epoch = state_dict["last_epoch"]
        self.rounds_left_out = state_dict["rounds_left_out"]
        self._layers_before = state_dict["layers"] or None
        self.watch.seconds = dict(state_dict["seconds"])
        self._seconds_before = state_dict["training_seconds"]
        self._budget_before = state_dict["budget"]
        self._fits = state_dict["fits"]

    def _check_state(self, state: Mapping[str, Any]) -> None:
        saved, present = state["strategy_name"], type(self.strategy).__name__
        if saved != present:
            raise StateError(
                f"expected a checkpoint of the strategy {present}, but it was made with {saved}; "
                f"pass DVCCallback({saved}(...)), or start selection anew"
            )
        n_selected = len(self._owner.selected_ids) if self._owner else state["selected"]
        if n_selected != state["selected"]:
            raise StateError(
                f"expected {state['selected']} selected samples, as in the checkpoint of a "
                f"{state['datamodule_name']}, but the {type(self._owner).__name__} of this run has "
                f"{n_selected}. Lightning restores a datamodule by the name of its class: resume "
                "with the class that it was saved with, or start selection anew"
            )

    @property
    def _ready_probe(self) -> Probe:
        assert self._probe is not None, "made in on_fit_start"
        return self._probe

    def _group(self, trainer: Trainer) -> Group:
        return Group(trainer.global_rank, trainer.world_size, self._ready_probe.device)

    def _datamodule(self, trainer: Trainer) -> DVCDataModule:
        datamodule = trainer_bridge.datamodule_of(trainer)
        if not isinstance(datamodule, DVCDataModule):
            raise ConfigurationError(
                "DVCCallback selects from the sources of a DVCDataModule, but the trainer has "
                f"{type(datamodule).__name__}; call trainer.fit(model, datamodule=DVCDataModule("
                "...)), or wrap your own with DVCDataModule.wrap(...)"
            )
        return datamodule

    def _new_plan(self, trainer: Trainer, datamodule: DVCDataModule) -> Plan:
        """When this fit is to have its rounds; one after another goes on with the same."""
        n_selected = len(datamodule.selected_ids)
        if self._plan is not None and self.rounds_done:
            # A round that only refines fills up what an earlier one has left short.
            done = min(self.rounds_done, self._n_rounds - self.strategy.refines)
            return Plan(n_selected, self._n_rounds, self._plan.period, done)
        run = trainer_bridge.run_of(trainer, datamodule.loading)
        if trainer_bridge.is_trial_run(trainer):
            run = replace(run, max_epochs=None, max_steps=None)
        return plan_rounds(
            datamodule.rounds, self.every_n_epochs, n_selected, datamodule.budget, run
        )

    def _plan_of_the_rest(self, trainer: Trainer, datamodule: DVCDataModule) -> Plan:
        """More rounds, after all of the saved run's, for a budget that is larger than its was."""
        run = trainer_bridge.run_of(trainer, datamodule.loading)
        n_selected = len(datamodule.selected_ids)
        rest = plan_rounds(
            datamodule.rounds,
            self.every_n_epochs,
            n_selected,
            datamodule.budget,
            run.without(trainer.current_epoch, trainer.global_step),
        )
        n_rounds = self.rounds_done + rest.n_rounds
        return Plan(n_selected, n_rounds, rest.period, self.rounds_done)

    def _follow(self, plan: Plan) -> None:
        self._plan, self._n_rounds = plan, plan.n_rounds
        if self._owner is not None:
            self._owner.attach(plan, grows_first=self.rounds_done == 0)

    def _n_batches(self, datamodule: DVCDataModule) -> int:
        n_batches = len(datamodule.train_dataloader())
        if n_batches == 0:  # Lightning would end the run as finished
            raise ConfigurationError(
                f"drop_last leaves no batch of {datamodule.batch_size} of the "
                f"{len(datamodule.selected_ids)} samples that are selected; lower the batch size, "
                "or raise the budget or warmup"
            )
        return n_batches

    def _is_due(self, datamodule: DVCDataModule, epoch: int) -> bool:
        assert self._plan is not None, "made in setup"
        is_time = epoch != self._last_epoch and epoch % self._plan.period == 0
        return is_time and self._has_rounds_left(datamodule)

    def _has_rounds_left(self, datamodule: DVCDataModule) -> bool:
        planned = self.rounds_done < self._n_rounds
        wanted = planned and len(datamodule.selected_ids) < datamodule.budget
        return not datamodule.is_adopted and (wanted or self.strategy.refines)

    @property
    def _training_seconds(self) -> float:
        """Wall time since training began, without the time between a run and its resumption."""
        now = time.perf_counter() - self._started if self._started else 0.0
        return self._seconds_before + now

    @property
    def _time_share(self) -> float:
        return self.watch.total / max(self._training_seconds, self.watch.total, 1e-9)

    @property
    def _time_figures(self) -> dict[str, float]:
        return {
            "selection_time_share": self._time_share,
            "rounds_left_out": self.rounds_left_out,
        }

    def _is_too_dear(self, group: Group) -> bool:
        """Whether to leave out a round that is due; all processes come to the same answer."""
        is_first, is_last = self.rounds_done == 0, self.rounds_done == self._n_rounds - 1
        if self.max_overhead is None or is_first or is_last:
            return False
        share = torch.tensor(self._time_share, device=self._ready_probe.device)
        return float(group.sum(share)) > self.max_overhead * group.world_size

    def _leave_out(self, trainer: Trainer, epoch: int) -> None:
        """Skip a round; what it would have added is left to those that follow."""
        self._last_epoch = epoch
        if self.rounds_done < self._n_rounds:  # later ones only refine
            self._n_rounds -= 1
        self.rounds_left_out += 1
        logs.tell(trainer, self._time_figures)

    def _take_bad(self, group: Group) -> list[BadSample]:
        """Samples that could not be scored on any process, each once."""
        found = [(sample.id, sample.reason) for sample in self._ready_probe.bad]
        self._ready_probe.bad.clear()
        everywhere = dict(group.gather_objects(found))
        return [BadSample(i, reason) for i, reason in sorted(everywhere.items())]

    def _warn_of(self, datamodule: DVCDataModule, bad: list[BadSample]) -> None:
        if bad and not self._warned:
            first = datamodule.selection.set_aside[-len(bad)]
            rank_zero_warn(
                f"{len(bad)} samples could not be scored and are set aside, for example number "
                f"{first.index} of source {first.source!r}: {first.reason}. All are listed in "
                "datamodule.selection.set_aside; later ones are added there without a warning."
            )
            self._warned = True

    def _log(self, trainer: Trainer, datamodule: DVCDataModule, choice: Choice) -> None:
        counts = datamodule.arm_counts()
        figures = {
            "round": self.rounds_done,
            "selected": int(counts.sum()),
            "set_aside": datamodule.n_set_aside,
            "selection_seconds": self.watch.total,
            **self._time_figures,
            **logs.figures_of(choice, datamodule.pools.names, counts),
        }
        logs.tell(trainer, figures)


def _chooses(strategy: object) -> bool:
    """Whether this is a strategy, and not the class of one."""
    return callable(getattr(strategy, "choose", None)) and not isinstance(strategy, type)


def _are_names(layers: Any) -> bool:
    several = isinstance(layers, Collection) and not isinstance(layers, str)
    return several and len(layers) > 0 and all(isinstance(name, str) for name in layers)
