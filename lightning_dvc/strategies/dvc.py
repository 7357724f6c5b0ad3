"""Data value contribution: the paper's method, as one strategy.

A round examines what is selected and held out, draws candidates as the bandit says, scores them
with the six metrics, chooses the best under the diversification rules, and learns which sources
were worth it. No variant measured better than the defaults on more than a part of the data sets
(docs/results.md).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import Tensor

from lightning_dvc.errors import check_settings
from lightning_dvc.policy.bandit import SourceBandit
from lightning_dvc.policy.belief import (
    conformal_p_values,
    disbelieved,
    least_believed,
    like_reference,
    peer_p_values,
)
from lightning_dvc.policy.budget import bounds_by_yield
from lightning_dvc.policy.diversify import class_ceilings, diversify
from lightning_dvc.policy.layers import LayerWeighting, LayerWeights
from lightning_dvc.policy.weights import DEFAULT_WEIGHTS, FixedWeights, WeightPolicy, trusted
from lightning_dvc.pools import Pools
from lightning_dvc.records import Choice
from lightning_dvc.strategies.base import Round
from lightning_dvc.strategies.observer import Examined, Observer, ObserverSettings
from lightning_dvc.strategies.rewards import (
    NOT_JUDGED_BY,
    REWARDS,
    WORTHLESS,
    ArmRewards,
    MeasuredGain,
    Reward,
    mean_by_arm,
)
from lightning_dvc.strategies.scoring import Scores, join_scores, score

_TAKE_BACK_FROM: Final = 3
# Held-out samples times the rate: with fewer, 2% of wrong targets in a source cannot be told.
_TELLING: Final = 50
# Of the rate, for each of two tests that may both take a sample back: with all of it for each, 5%
# of the good samples of sources alike were taken back, with this 1.5%.
_OF_TWO: Final = 0.7


class DVC:
    """Chooses by data value contribution (arXiv 2510.21286).

    Held-out samples are what candidates are compared with. Where there are few, selected samples
    stand beside them in the reference, and where there are none, in their place. Relevance and
    gradient impact then count less, by the share of held-out samples in the reference: a selection
    that has yet to become good is nothing to agree with.

    Where sources have unequal :attr:`~lightning_dvc.pools.Source.cost`, the bandit divides the
    candidates by worth per cost. Worth is how far the mean reward is above that of a source of no
    use. Which candidates are chosen, and how many, does not depend on costs: the budget is a number
    of samples.

    Args:
        weights: How the six metrics are weighed: when not given, uncertainty by 1, relevance by
            0.7, quality by 0.3, diversity by 0.1, and the other two not at all; see
            :class:`~lightning_dvc.policy.weights.FixedWeights` and
            :class:`~lightning_dvc.policy.bayesian.BayesianWeights`.
        layer_weights: ``alpha`` of the paper's equation 5: ``"equal"``, ``"depth"``, ``"learned"``
            from what is taken back, or one number of at least 0 per captured layer; see
            :class:`~lightning_dvc.policy.layers.LayerWeights`.
        reward: What the bandit learns from: ``"alignment"`` of the mean gradient of a source's
            candidates, disbelieved ones left out, with the reference's; their mean DVC ``"value"``,
            their ``"acceptance"`` rate, or the ``"gain"`` of the monitored score after the source
            had added samples; see
            :mod:`lightning_dvc.strategies.rewards`.
        discount: What a past round counts for in the bandit, relative to the next; in ``(0, 1]``.
        window: How many of the last rounds count in the bandit, at least 1; all of them,
            discounted, when not given. Not together with a discount below 1.
        exploration: Weight of the bandit's confidence term, at least 0.
        temperature: How evenly the bandit divides candidates over the sources, above 0.
        allocation: ``"softmax"`` of that temperature, or ``"argmax"``: all to the best sources.
        refine: Whether to go on after the budget is full, taking back what the model has come to
            disbelieve and filling up with better, never beyond the budget.
        reference_size: Held-out samples that candidates are compared with, drawn once, at least 1.
        by_class: Whether relevance and gradient impact compare a sample with the reference
            samples of its own class, rather than with all of them, as equation 8 can also be read.
        blend: As how many reference samples the selected ones count together, at least 0, and each
            as one at most: they stand beside the held-out ones, in mean gradients and in the label
            mix, while there are fewer than twice as many of these.
        reservoir_size: Selected samples that stand for the selection, drawn afresh each round, at
            least 1: as the reference where there is no other, beside it where it is blended, and
            for diversity (with the exact density at most 256 of them).
        review_size: Selected samples looked at in each round, at least 1, to see whether the model
            still believes their labels: from the first one on, but not where nothing may be taken
            back in this round or a later one.
        stability_window: Earlier model states kept for the stability metric and the review, at
            least 0; each costs a copy of the trainable parameters and another forward pass of
            every candidate, but only where stability has a weight.
        take_back: Largest share of the selection that one round takes back, in ``[0, 1]``; from
            round 3 on, and not in the last unless ``refine`` goes on after it.
        disbelief_rate: Candidates whose targets the model finds implausible are passed over where
            their source has more of them than the held-out samples explain: of those passed over,
            the share that may be like held-out ones, in ``[0, 1]``; 0 for no such rule. Of fewer
            than ``1 / disbelief_rate - 1`` held-out samples none is rare enough to tell. See
            :func:`~lightning_dvc.policy.belief.disbelieved`.
        disown_rate: The same for selected samples, by what recent model states found: those are
            taken back; in ``[0, 1]``. Where nothing is held out, they are compared with each other.
            With ``50 / disbelief_rate`` held-out samples or more there is a second test, since the
            model is trained on them: beside the selected ones of sources of whose last candidates
            less than 2% were disbelieved. Either then has 0.7 of the rate. See
            :func:`~lightning_dvc.policy.belief.peer_p_values`.
        class_slack: How far a class may exceed its share of the reference's label mix in one round,
            at least 1; infinite for no such rule.
        duplicate_angle: Largest angle in radians between the features of near-duplicates, of which
            one is kept, in ``[0, pi]``. Set aside while more than a fifth of the held-out samples
            seem to repeat each other or selected ones, as in few dimensions, of very many samples,
            or where they do. For the least share of a source, and in the last round, once it has
            looked further, the rules for classes, near-duplicates and disbelief give way in this
            order where the quota would not be met otherwise.
        density: How the diversity metric estimates densities: ``"exact"``, or ``"lsh"``, which pays
            off for reservoirs of very many samples.
        cache_bytes: Memory for what was captured of candidates, in case they are drawn again, at
            least 0; above 0, a copy of the trainable parameters is kept too. Each of several
            processes keeps its own, and a checkpoint holds the first one's: after resuming, the
            others pass again through the model what only they had kept.
        cache_dtype: Floating type in which that is stored, as it came when not given.
        drift_tolerance: How far the parameters of a captured layer, or of all else together, may
            move, relative to their norm, before what was captured under them counts as outdated;
            at least 0.

    Raises:
        ConfigurationError: If a number is out of its range, or a window comes together with a
            discount below 1.

    Example:
        >>> DVC(review_size=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        lightning_dvc.errors.ConfigurationError: review_size must be at least 1, but is 0; ...
    """

    def __init__(
        self,
        weights: WeightPolicy | None = None,
        *,
        layer_weights: LayerWeighting | Sequence[float] = "equal",
        reward: Reward = "alignment",
        discount: float = 1.0,
        window: int | None = None,
        exploration: float = 0.05,
        temperature: float = 0.03,
        allocation: Literal["softmax", "argmax"] = "softmax",
        refine: bool = False,
        reference_size: int = 1000,
        by_class: bool = True,
        blend: int = 50,
        reservoir_size: int = 1000,
        review_size: int = 10_000,
        stability_window: int = 4,
        take_back: float = 0.1,
        disbelief_rate: float = 0.2,
        disown_rate: float = 0.5,
        class_slack: float = 1.5,
        duplicate_angle: float = 0.1,
        density: Literal["exact", "lsh"] = "exact",
        cache_bytes: int = 2**26,
        cache_dtype: torch.dtype | None = None,
        drift_tolerance: float = 0.01,
    ) -> None:
        check_settings(
            ("reference_size", reference_size, reference_size >= 1, "at least 1"),
            ("blend", blend, blend >= 0, "at least 0"),
            ("reservoir_size", reservoir_size, reservoir_size >= 1, "at least 1"),
            ("review_size", review_size, review_size >= 1, "at least 1"),
            ("stability_window", stability_window, stability_window >= 0, "at least 0"),
            ("take_back", take_back, 0 <= take_back <= 1, "in [0, 1]"),
            ("disbelief_rate", disbelief_rate, 0 <= disbelief_rate <= 1, "in [0, 1]"),
            ("disown_rate", disown_rate, 0 <= disown_rate <= 1, "in [0, 1]"),
            ("class_slack", class_slack, class_slack >= 1, "at least 1"),
            ("duplicate_angle", duplicate_angle, 0 <= duplicate_angle <= math.pi, "in [0, pi]"),
            ("reward", reward, reward in REWARDS, f"one of {REWARDS}"),
            ("density", density, density in ("exact", "lsh"), "'exact' or 'lsh'"),
        )
        self.weights: WeightPolicy = weights or FixedWeights(DEFAULT_WEIGHTS)
        self.layer_weights = LayerWeights(layer_weights)
        self.reward = reward
        self.take_back = take_back
        self.disbelief_rate = disbelief_rate
        self.disown_rate = disown_rate
        self.class_slack = class_slack
        self._new_bandit = partial(
            SourceBandit,
            discount=discount,
            window=window,
            exploration=exploration,
            temperature=temperature,
            allocation=allocation,
            worthless=WORTHLESS[reward],
        )
        self.refines = refine
        self._new_bandit(1)  # refuses settings that cannot be before training starts
        self._bandit: SourceBandit | None = None
        # Which sources had candidates like held-out samples in the last round.
        self._like_reference = torch.empty(0, dtype=torch.bool)
        self._observer = Observer(
            self.weights.measures,
            ObserverSettings(
                reference_size=reference_size,
                by_class=by_class,
                blend=blend,
                reservoir_size=reservoir_size,
                review_size=review_size,
                stability_window=stability_window,
                duplicate_angle=duplicate_angle,
                density=density,
                cache_bytes=cache_bytes,
                cache_dtype=cache_dtype,
                drift_tolerance=drift_tolerance,
            ),
        )
        # The weights in force and the progress at which they were asked for; the score since.
        self._asked: tuple[Tensor, float] | None = None
        self._score: float | None = None
        self._gain = MeasuredGain()

    @property
    def learns_from_score(self) -> bool:
        """Whether anything is learnt from the monitored validation score."""
        return self.weights.learns_from_score or self.reward == "gain"

    def choose(self, this: Round) -> Choice:
        """One round: examine, draw, score, choose, learn."""
        bandit = self._bandit = self._bandit_of(this.pools)
        with this.watch.section("weigh"):
            score, self._score = self._score, None
            weights = self._weigh(this, score)
            earned = self._gain.rewards(score, bandit.n_arms)
            if earned is not None:
                _learn(bandit, earned)
        with this.watch.section("examine"):
            examined = self._observer.examine(this, reviews=self._takes_back(this))
            # Decisions are the first process's: elsewhere samples may be augmented otherwise.
            removed = this.group.first(self._disowned(this, examined), this.probe.device)
            if self.layer_weights.learns:
                self.layer_weights.keep(this.selected)
                self.layer_weights.judge(removed)
            quota = this.quota(len(removed))
            weights = trusted(weights, examined.held_out)
            self._asked = (weights, this.progress)
        with this.watch.section("draw"):
            candidates = this.group.first(
                self._draw(this, bandit, quota, removed), this.probe.device
            )
        with this.watch.section("score"):
            alignment = None
            if self.reward == "alignment":
                alignment = ArmRewards(len(this.pools.names), examined.gradient)
            scores = self._score_candidates(this, candidates, examined, alignment)
            alpha = self.layer_weights.alpha(scores.layer_metrics.shape[1])
            if this.is_last:
                usable = self._usable(this, scores, scores.values(weights, alpha), examined)
                further = self._further(this, bandit, candidates, usable, quota, removed)
                further = this.group.first(further, this.probe.device)
                if len(further):
                    more = self._score_candidates(this, further, examined, alignment)
                    scores = join_scores([scores, more]).ordered()
        with this.watch.section("choose"):
            values = scores.values(weights, alpha)
            p_values = self._p_values(scores.confidence, examined)
            arms = this.pools.arms_of(scores.ids)
            doubted = disbelieved(p_values, arms, self.disbelief_rate)
            self._like_reference = like_reference(p_values, arms, doubted, bandit.n_arms)
            # A test that could hardly have told says nothing.
            self._like_reference &= self._tells(examined)
            choice, positions = self._pick(
                this, scores, values, weights, examined, doubted, quota, removed
            )
        with this.watch.section("learn"):
            chosen = scores.rows(positions)
            self._observer.remember(this, chosen, removed)
            if self.layer_weights.learns:
                self.layer_weights.note(chosen.ids, scores.layer_values(weights)[positions])
            if self.reward == "gain":  # known once the score is
                self._gain.added(torch.bincount(arms[positions], minlength=bandit.n_arms))
            else:
                if alignment is not None:
                    acquitted = (p_values <= self.disbelief_rate) & ~doubted
                    self._look_again(this, alignment, scores.ids[acquitted])
                earned = self._earned(this, arms, values, positions, alignment)
                # Of the first process, whose reference may be augmented otherwise.
                earned = this.group.first(earned, this.probe.device)
                _learn(bandit, earned)
        choice.figures.update(self._figures(this, earned, alpha))
        return choice

    def observe(self, score: float) -> None:
        """Note the validation score; it is told to the weights when the next round begins."""
        self._score = score

    def state_dict(self) -> dict[str, Any]:
        """Everything that was learnt or is remembered between rounds."""
        return {
            "weights": self.weights.state_dict(),
            "asked": self._asked,
            "score": self._score,
            "bandit": self._bandit and self._bandit.state_dict(),
            "like_reference": self._like_reference,
            "gain": self._gain.state_dict(),
            "layer_weights": self.layer_weights.state_dict(),
            "observer": self._observer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; settings stay this object's own."""
        self.weights.load_state_dict(state["weights"])
        self._asked, self._score = state["asked"], state["score"]
        self._like_reference = state["like_reference"]
        self._observer.load_state_dict(state["observer"])
        self._gain.load_state_dict(state["gain"])
        self.layer_weights.load_state_dict(state["layer_weights"])
        if state["bandit"]:
            self._bandit = self._new_bandit(len(state["bandit"]["counts"]))
            self._bandit.load_state_dict(state["bandit"])

    def _bandit_of(self, pools: Pools) -> SourceBandit:
        """All that was learnt, with the costs of these sources, which no state holds."""
        costs = [source.cost for source in pools.sources.values()]
        bandit = self._new_bandit(len(costs), costs=costs)
        if self._bandit:
            bandit.load_state_dict(self._bandit.state_dict())
        return bandit

    def _like_reference_of(self, pools: Pools) -> Tensor:
        """``(K,)`` bool, which had candidates like held-out samples last; no new source had."""
        known = torch.zeros(len(pools.names), dtype=torch.bool)
        known[: len(self._like_reference)] = self._like_reference
        return known

    def _weigh(self, this: Round, score: float | None) -> Tensor:
        """Tell the weight policy what followed its last answer, and ask for the next."""
        if self._asked is not None and score is not None:
            self.weights.tell(*self._asked, score)
        # Of the first process, since an answer may depend on the clock.
        return this.group.first(self.weights.ask(this.progress), this.probe.device)

    def _takes_back(self, this: Round) -> bool:
        """Whether selected samples may be taken back, now or by what is seen of them now.

        Not at the end, where they could not be replaced.
        """
        wanted = self.take_back > 0 and self.disown_rate > 0
        return wanted and (self.refines or not this.is_last)

    def _disowned(self, this: Round, examined: Examined) -> Tensor:
        """Selected samples that recent model states have come to disbelieve."""
        if this.number < _TAKE_BACK_FROM or not self._takes_back(this):
            return torch.empty(0, dtype=torch.int64)
        # Not more than can be replaced, beside what is still to be added.
        missing = this.budget - len(this.selected)
        _, room = this.arm_bounds(missing)
        spare = int(torch.minimum(this.pools.stock, room).sum()) - missing
        most = min(int(self.take_back * len(this.selected)), max(spare, 0))
        confidence, arms = examined.selected_confidence, this.pools.arms_of(this.selected)
        p_values = conformal_p_values(confidence, examined.reference_confidence)
        rate = self.disown_rate * (_OF_TWO if self._tells(examined) else 1.0)
        among = disbelieved(p_values, arms, rate)
        peers = confidence[self._like_reference_of(this.pools)[arms]]
        beside_peers = peer_p_values(confidence, peers)
        among |= disbelieved(beside_peers, arms, rate)
        p_values = p_values.fmin(beside_peers)
        return this.selected[least_believed(p_values, confidence, among, most)]

    def _draw(self, this: Round, bandit: SourceBandit, quota: int, removed: Tensor) -> Tensor:
        """Candidates ``(n,)``, ascending, divided over the sources as the bandit says."""
        wanted = min(math.ceil(this.oversample * quota), int(this.pools.stock.sum()))
        floor, ceiling = this.arm_bounds(quota, removed)
        # Candidates beyond what a source may add would be missing elsewhere.
        floor, ceiling = this.candidate_bounds(floor, ceiling)
        counts = bandit.allocate(wanted, this.pools.stock, floor, ceiling)
        return this.pools.draw_each(counts, "candidates", this.number)

    def _usable(self, this: Round, scores: Scores, values: Tensor, examined: Examined) -> Tensor:
        """``(K,)`` candidates of each source that neither repeat others nor are disbelieved."""
        arms, n_arms = this.pools.arms_of(scores.ids), len(this.pools.names)
        known, among = self._observer.duplicates(scores.codes)
        found = diversify(
            values,
            scores.ids,
            arms,
            scores.labels,
            quota=len(scores),
            arm_ceiling=torch.bincount(arms, minlength=n_arms),
            duplicate_of_known=known,
            repeats=among,
            disbelieved=disbelieved(
                self._p_values(scores.confidence, examined), arms, self.disbelief_rate
            ),
            relax=False,
        )
        return torch.bincount(arms[found.positions], minlength=n_arms)

    def _further(
        self,
        this: Round,
        bandit: SourceBandit,
        candidates: Tensor,
        usable: Tensor,
        quota: int,
        removed: Tensor,
    ) -> Tensor:
        """Ids ``(n,)`` to look at, too, before a last round gives way to its rules.

        None where the ``(K,)`` usable candidates suffice; otherwise as many again, divided by the
        bandit and by what the first ones of each source gave.
        """
        drawn = torch.bincount(this.pools.arms_of(candidates), minlength=len(usable))
        unseen = this.pools.stock - drawn
        least, most = this.arm_bounds(quota, removed)
        have = torch.minimum(usable, most)
        short = (least - have).clamp(min=0)
        if int(have.sum()) >= quota and not bool(short.any()):
            return torch.empty(0, dtype=torch.int64)
        wanted = min(math.ceil(this.oversample * quota), int(unseen.sum()))
        bounds = this.candidate_bounds(short, most - have)
        bounds = bounds_by_yield(usable, drawn, unseen, bounds, wanted)
        counts = bandit.allocate(wanted, unseen, *bounds)
        found = [torch.empty(0, dtype=torch.int64)]
        for arm in torch.nonzero(counts).flatten().tolist():
            free = this.pools.draw(arm, int(this.pools.stock[arm]), "further", this.number)
            free = free[~torch.isin(free, candidates)]
            found.append(this.some(free, int(counts[arm]), f"further {arm}"))
        return torch.cat(found)

    def _score_candidates(
        self, this: Round, candidates: Tensor, examined: Examined, rewards: ArmRewards | None
    ) -> Scores:
        """Metrics of candidates, over all processes; ``rewards`` takes in their gradients."""
        parts = [Scores.empty(len(examined.standards), self._observer.window)]
        for captured in self._observer.candidates(this, candidates):
            arms = this.pools.arms_of(captured.ids)
            suspect = self._p_values(captured.confidence, examined) <= self.disbelief_rate
            scores = score(
                captured,
                examined.standards,
                self._observer.codes(captured),
                arms.masked_fill(suspect, NOT_JUDGED_BY),
                needs=self.weights.measures,
                rewards=rewards,
            )
            parts.append(scores)
        return join_scores(parts).gather(this.group, this.probe.device)

    def _pick(
        self,
        this: Round,
        scores: Scores,
        values: Tensor,
        weights: Tensor,
        examined: Examined,
        doubted: Tensor,
        quota: int,
        removed: Tensor,
    ) -> tuple[Choice, Tensor]:
        """The best candidates under the diversification rules, and their positions."""
        floor, ceiling = this.arm_bounds(quota, removed)
        known, among = self._observer.duplicates(scores.codes)
        found = diversify(
            values,
            scores.ids,
            this.pools.arms_of(scores.ids),
            scores.labels,
            quota=quota,
            arm_ceiling=ceiling,
            arm_floor=floor,
            class_ceiling=class_ceilings(examined.labels, scores.labels, quota, self.class_slack),
            duplicate_of_known=known,
            repeats=among,
            disbelieved=doubted,
            # What a round leaves over, the next ones make up for with other candidates.
            relax=this.is_last,
        )
        places = this.group.first(found.positions, this.probe.device)
        figures = {f"passed_over/{rule}": float(n) for rule, n in found.passed_over.items()}
        figures |= {f"relaxed/{rule}": float(n) for rule, n in found.relaxed.items()}
        figures["candidates"] = float(len(scores))
        raw = scores.rows(places).raw()
        return Choice(scores.ids[places], values[places], raw, weights, removed, figures), places

    def _p_values(self, confidence: Tensor, examined: Examined) -> Tensor:
        """Of candidates, ``(n,)``; NaN without held-out samples."""
        return conformal_p_values(confidence[:, :1].float(), examined.held_out_confidence)

    def _tells(self, examined: Examined) -> bool:
        """Whether held-out samples are enough to tell which sources are like them."""
        return len(examined.held_out_confidence) * self.disbelief_rate >= _TELLING

    def _look_again(self, this: Round, rewards: ArmRewards, ids: Tensor) -> None:
        """Let suspects that are believed after all count for their sources.

        Whom to believe is known only after all have been looked at, and keeping the gradients of
        suspects until then would cost too much memory.
        """
        for captured in self._observer.again(this, ids):
            rewards.take_in(captured.gradients, this.pools.arms_of(captured.ids))

    def _figures(self, this: Round, earned: Tensor | None, alpha: Tensor) -> dict[str, float]:
        """What is told of a round beside what was chosen."""
        figures = {**self._observer.figures, **self.weights.figures}
        if earned is not None:
            named = zip(this.pools.names, earned.tolist(), strict=True)
            figures |= {f"reward/{name}": r for name, r in named if not math.isnan(r)}
        if self.layer_weights.learns:
            figures |= {f"layer_weight/{number}": a for number, a in enumerate(alpha.tolist())}
        return figures

    def _earned(
        self, this: Round, arms: Tensor, values: Tensor, chosen: Tensor, found: ArmRewards | None
    ) -> Tensor:
        """Rewards ``(K,)`` that are known as soon as a round is over."""
        n_arms = len(this.pools.names)
        if found is not None:
            rewards = found.rewards(this.group)
            # A source all of whose candidates are disbelieved is of no use, unless they are so few
            # that it may be chance.
            many = torch.bincount(arms, minlength=n_arms) * self.disbelief_rate >= 1
            return rewards.masked_fill(rewards.isnan() & many, 0.0)
        if self.reward == "acceptance":
            values = torch.zeros_like(values).index_fill(0, chosen, 1.0)
        return mean_by_arm(values, arms, n_arms)


def _learn(bandit: SourceBandit, earned: Tensor) -> None:
    """Tell what a round earned; one that looked at nothing is no reason to forget."""
    if not bool(earned.isnan().all()):
        bandit.update(earned)
