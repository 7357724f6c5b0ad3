"""Which source deserves the next candidates: a bandit of upper confidence bounds (5.5).

The arms are the sources. A source's worth drifts while the model learns, hence the discount or the
sliding window: Garivier and Moulines, "On upper-confidence bound policies for switching bandit
problems", ALT 2011. Without either it is UCB1: Auer, Cesa-Bianchi and Fischer, "Finite-time
analysis of the multiarmed bandit problem", Machine Learning 47, 2002. Arms of unequal cost are
ordered by upper confidence bound over cost, as KUBE does: Tran-Thanh, Chapman, Rogers and Jennings,
"Knapsack based optimal policies for budget-limited multi-armed bandits", AAAI 2012; of the bound,
what counts is how far it is above the reward of an arm of no use.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from lightning_dvc.errors import ConfigurationError, StateError, check_settings
from lightning_dvc.policy.apportion import apportion

_ALLOCATIONS: Final = ("softmax", "argmax")
_LEAST_COST: Final = 1e-100


class SourceBandit:
    r"""UCB over sources that may forget, and the division of a round's candidates among them.

    With ``discount=1``, no window, equal costs, ``exploration=1`` and one pull of the arm of the
    greatest index per round this is UCB1, and the expected regret after ``T`` rounds is bounded by
    Theorem 6.1 (eq 14),

    .. math:: \sum_{k: \Delta_k > 0} \frac{8 \ln T}{\Delta_k}
        + \left(1 + \frac{\pi^2}{3}\right) \Delta_k,

    where ``Delta_k`` is how much less arm ``k`` yields on average than the best arm.

    Args:
        n_arms: Number of sources ``K``, at least 1.
        discount: What a past round counts for, relative to the round after it; in ``(0, 1]``.
        exploration: Weight of the confidence term, at least 0. The default was measured for rounds
            in which the reward of an arm is already a mean over many candidates.
        allocation: ``"softmax"``, or ``"argmax"`` to give all to the arms of the greatest index.
        temperature: Of the softmax that divides a round's candidates, greater than 0; the smaller,
            the more the best arm gets.
        window: How many of the last rounds count, at least 1. An arm that was not observed in them
            counts as never observed. None: all rounds, discounted.
        costs: What one candidate of each arm costs, ``K`` positive and finite numbers in any unit:
            only their ratios count. None: all alike.
        worthless: Reward of an arm of no use, in ``[0, 1)``. Costs are held against what is above
            it only, so that a low cost does not make up for being of no use.

    Raises:
        ConfigurationError: If an argument is out of its range, or a window comes together with a
            discount below 1.

    Example:
        >>> bandit = SourceBandit(2)
        >>> bandit.update(torch.tensor([0.9, 0.6]))
        >>> bandit.allocate(10, torch.tensor([100, 100])).tolist()
        [10, 0]
        >>> dear = SourceBandit(2, costs=[2.0, 1.0])
        >>> dear.update(torch.tensor([0.9, 0.6]))
        >>> dear.allocate(10, torch.tensor([100, 100])).tolist()
        [0, 10]
    """

    def __init__(
        self,
        n_arms: int,
        discount: float = 1.0,
        exploration: float = 0.05,
        temperature: float = 0.03,
        allocation: Literal["softmax", "argmax"] = "softmax",
        window: int | None = None,
        costs: Sequence[float] | None = None,
        worthless: float = 0.0,
    ) -> None:
        each = f"None, or a positive and finite number for each of {n_arms} arms"
        check_settings(
            ("n_arms", n_arms, n_arms >= 1, "at least 1"),
            ("discount", discount, 0 < discount <= 1, "greater than 0 and at most 1"),
            ("exploration", exploration, 0 <= exploration < math.inf, "at least 0 and finite"),
            ("temperature", temperature, 0 < temperature < math.inf, "greater than 0 and finite"),
            ("allocation", allocation, allocation in _ALLOCATIONS, "'softmax' or 'argmax'"),
            ("window", window, window is None or window >= 1, "None, or at least 1"),
            ("costs", costs, costs is None or _are_costs(costs, n_arms), each),
            ("worthless", worthless, 0 <= worthless < 1, "at least 0 and less than 1"),
        )
        if window is not None and discount < 1:
            raise ConfigurationError(
                "past rounds can be forgotten by a window or by a discount, but not by both, and "
                f"both were given: window={window}, discount={discount}; leave one out"
            )
        self.n_arms = n_arms
        self.discount = discount
        self.exploration = exploration
        self.temperature = temperature
        self.allocation = allocation
        self.window = window
        self.worthless = worthless
        self._relative_costs = _relative_to_mean([1.0] * n_arms if costs is None else costs)
        self._counts = torch.zeros(n_arms, dtype=torch.float64)
        self._sums = torch.zeros(n_arms, dtype=torch.float64)
        # Rewards (rounds, K) of the rounds in the window; none are kept without one.
        self._recent = torch.empty(0, n_arms, dtype=torch.float64)

    def update(self, rewards: Tensor) -> None:
        """Learn what one round yielded.

        Every round discounts what went before it, or moves the window on, for all arms, observed
        or not.

        Args:
            rewards: ``(K,)`` reward of each arm in ``[0, 1]``; NaN for an arm not observed.

        Raises:
            ConfigurationError: If the shape is wrong or a reward is outside ``[0, 1]``.

        Example:
            >>> bandit = SourceBandit(2)
            >>> bandit.update(torch.tensor([0.5, torch.nan]))
            >>> bandit.index().tolist()[1]
            inf
        """
        if rewards.shape != (self.n_arms,):
            raise ConfigurationError(
                f"expected one reward for each of {self.n_arms} arms, but the shape of rewards is "
                f"{tuple(rewards.shape)}; use NaN for an arm that was not observed"
            )
        rewards = rewards.detach().to("cpu", torch.float64)
        observed = ~rewards.isnan()
        if not ((rewards[observed] >= 0) & (rewards[observed] <= 1)).all():
            raise ConfigurationError(
                f"rewards must be in [0, 1], but are {rewards.tolist()}; rescale or clamp them, "
                "and use NaN for an arm that was not observed"
            )
        if self.window is None:
            self._counts = self.discount * self._counts + observed
            self._sums = self.discount * self._sums + rewards.nan_to_num()
        else:
            self._look_back(torch.cat([self._recent, rewards[None]]), self.window)

    def index(self) -> Tensor:
        r"""Upper confidence index of each arm, what is above ``worthless`` per unit of cost.

        .. math:: B_k = \hat\mu_k + c \sqrt{2 \ln(t + 1) / N_k}, \qquad
            I_k = \begin{cases}
                w + (B_k - w) \Big/ \frac{\mathrm{cost}_k}{\frac{1}{K} \sum_j \mathrm{cost}_j}
                & \text{if } B_k > w \\
                B_k & \text{otherwise}
            \end{cases}

        with the mean reward and the count ``N_k``, both discounted or within the window, ``t`` the
        sum of the counts, ``c`` the exploration and ``w`` the reward ``worthless``. Without a
        discount or window and with one pull per round, ``t + 1`` is the number of the pull that is
        being decided, as the proof of the regret bound has it. Costs are relative to their mean, so
        that equal ones change nothing and the temperature keeps its meaning. An arm that is of no
        use, even by its bound, is not made better or worse by its cost.

        Returns:
            ``(K,)`` float64, at least 0; ``inf`` for an arm never observed.

        Example:
            >>> bandit = SourceBandit(1, exploration=1)
            >>> bandit.update(torch.tensor([0.5]))
            >>> round(bandit.index().item(), 4) == round(0.5 + math.sqrt(2 * math.log(2)), 4)
            True
            >>> bandit = SourceBandit(2, exploration=0, costs=[3, 1], worthless=0.5)
            >>> bandit.update(torch.tensor([0.8, 0.5]))
            >>> [round(index, 4) for index in bandit.index().tolist()]
            [0.7, 0.5]
        """
        observed = self._counts > 0
        counts = torch.where(observed, self._counts, 1.0)
        width = (2 * torch.log1p(self._counts.sum()) / counts).sqrt()
        bound = self._sums / counts + self.exploration * width
        per_cost = self.worthless + (bound - self.worthless) / self._relative_costs
        # At the mean cost nothing is to change, not even by rounding.
        cost_matters = (bound > self.worthless) & (self._relative_costs != 1)
        index = torch.where(cost_matters, per_cost, bound)
        return torch.where(observed, index, torch.inf)

    def allocate(
        self,
        quota: int,
        stock: Tensor,
        floor: Tensor | None = None,
        ceiling: Tensor | None = None,
    ) -> Tensor:
        """Divide the candidates of one round among the arms.

        An arm never observed gets an equal share of the quota, ``quota / K``, within its bounds: as
        many candidates as each of ``K`` new arms gets are enough to observe one, and more would
        waste a round on an arm that may be bad. The rest is divided among the observed arms, in
        proportion to ``softmax(index / temperature)``, or goes to them in the order of their index,
        each as much as it may get. What either kind cannot take goes to the other.

        Args:
            quota: Candidates to divide, at least 0.
            stock: ``(K,)`` integers, samples left in each source.
            floor: ``(K,)`` integers, the least that an arm gets as long as its stock and ceiling
                allow. Where the quota is less than all floors, it is divided in proportion to them.
                None: no floors.
            ceiling: ``(K,)`` integers, the most that an arm gets. None: its stock.

        Returns:
            ``(K,)`` int64, at most ``min(stock, ceiling)``; the sum is the quota, or everything
            there is if that is less. What arms never observed get together is rounded up, so that a
            small quota puts none off for ever; within either kind, parts are rounded by the largest
            remainder, ties to the lower arm.

        Raises:
            ConfigurationError: If an argument is negative or has the wrong shape.

        Example:
            >>> bandit = SourceBandit(3)
            >>> bandit.update(torch.tensor([0.5, 0.5, torch.nan]))
            >>> bandit.allocate(9, torch.tensor([50, 50, 4]), torch.tensor([1, 1, 1])).tolist()
            [3, 3, 3]
        """
        zeros = torch.zeros(self.n_arms, dtype=torch.int64)
        stock = self._limit("stock", stock)
        upper = stock if ceiling is None else torch.minimum(stock, self._limit("ceiling", ceiling))
        lower = zeros if floor is None else torch.minimum(upper, self._limit("floor", floor))
        if quota < 0:
            raise ConfigurationError(f"quota must be at least 0, but is {quota}; pass 0 for none")
        if quota <= int(lower.sum()):
            return apportion(quota, lower, zeros, lower)
        index = self.index()
        new = index.isinf()
        first = _equal_shares(quota, new, lower, upper)
        rest = quota - int(first.sum())
        # The bounds of those that have their part, and their index, are out of the way.
        lower, upper, index = (limits.masked_fill(new, 0) for limits in (lower, upper, index))
        if self.allocation == "argmax":
            return first + _best_first(rest, index, lower, upper)
        return first + apportion(rest, torch.softmax(index / self.temperature, 0), lower, upper)

    def state_dict(self) -> dict[str, Tensor]:
        """What was learnt: counts and reward sums, each ``(K,)``.

        They are discounted, or those of the window; then ``recent`` holds the rewards
        ``(rounds, K)`` of the rounds in it, the last one last.

        Example:
            >>> sorted(SourceBandit(2).state_dict())
            ['counts', 'sums']
            >>> SourceBandit(2, window=5).state_dict()["recent"].shape
            torch.Size([0, 2])
        """
        state = {"counts": self._counts.clone(), "sums": self._sums.clone()}
        if self.window is not None:
            state["recent"] = self._recent.clone()
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; settings stay this object's own.

        Under another window, what fits is kept: as many of the saved rounds as the window holds, or
        without a window their counts and sums. Sums saved without a window cannot be told apart
        into rounds, so a bandit with a window begins anew after them.

        Args:
            state: From :meth:`state_dict` of a bandit with at most as many arms: those that this
                one has beyond them count as never observed.

        Raises:
            StateError: If it has more arms than this bandit.

        Example:
            >>> bandit, grown = SourceBandit(1), SourceBandit(2)
            >>> bandit.update(torch.tensor([0.5]))
            >>> grown.load_state_dict(bandit.state_dict())
            >>> grown.index().isinf().tolist()
            [False, True]
        """
        shape = tuple(state["counts"].shape)
        if len(shape) != 1 or shape[0] > self.n_arms:
            raise StateError(
                f"expected the state of a bandit with at most {self.n_arms} arms, but its counts "
                f"have the shape {shape}; load it with the sources that it was saved with, which "
                "only new ones may follow"
            )
        self._counts = self._widened(state["counts"], 0.0)
        self._sums = self._widened(state["sums"], 0.0)
        if self.window is not None:
            rounds = state.get("recent", torch.empty(0, self.n_arms))
            self._look_back(self._widened(rounds, torch.nan), self.window)

    def _widened(self, saved: Tensor, unknown: float) -> Tensor:
        """A copy of ``(..., k)`` saved numbers with a column for each of the ``K >= k`` arms."""
        wide = torch.full((*saved.shape[:-1], self.n_arms), unknown, dtype=torch.float64)
        wide[..., : saved.shape[-1]] = saved
        return wide

    def _look_back(self, rounds: Tensor, window: int) -> None:
        """Let the last ``window`` of the rewards ``(rounds, K)`` count, and nothing before."""
        self._recent = rounds[-window:].clone()
        self._counts = (~self._recent.isnan()).sum(0, dtype=torch.float64)
        self._sums = self._recent.nansum(0)

    def _limit(self, name: str, limit: Tensor) -> Tensor:
        if limit.shape != (self.n_arms,) or limit.is_floating_point() or bool((limit < 0).any()):
            raise ConfigurationError(
                f"{name} must hold one integer, at least 0, for each of {self.n_arms} arms, but is "
                f"{limit}; pass an int64 tensor of shape ({self.n_arms},)"
            )
        return limit.to("cpu", torch.int64)


def _are_costs(costs: Sequence[float], n_arms: int) -> bool:
    return len(costs) == n_arms and all(0 < cost < math.inf for cost in costs)


def _relative_to_mean(costs: Sequence[float]) -> Tensor:
    """Costs ``(K,)`` with the mean 1."""
    # By the greatest first: the sum cannot overflow, and equal costs become 1 to the last bit.
    relative = torch.tensor(costs, dtype=torch.float64) / max(costs)
    # An arm next to free of cost may not have an infinite index: that marks arms never observed.
    return (relative / relative.mean()).clamp(min=_LEAST_COST)


def _equal_shares(quota: int, new: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """What each arm never observed gets of the quota, 0 for the others; ``(K,)`` int64.

    Each ``clamp(quota / K, lower, upper)``, together rounded up; less where the least of the others
    leaves less, and more where the most of the others does not use up the rest.
    """
    n_arms = len(new)
    wanted = torch.full_like(lower, quota).clamp(n_arms * lower, n_arms * upper)[new].sum()
    least_left = quota - int(upper[~new].sum())
    most_left = quota - int(lower[~new].sum())
    total = min(max(-(-int(wanted) // n_arms), least_left), most_left)
    bounds = (limits.masked_fill(~new, 0) for limits in (lower, upper))
    return apportion(total, torch.ones(n_arms), *bounds)


def _best_first(quota: int, index: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Serve the lower bounds, then the arms one after the other, the greatest index first."""
    counts = lower.clone()
    for arm in index.argsort(descending=True, stable=True).tolist():
        room = int(upper[arm] - counts[arm])
        counts[arm] += min(room, quota - int(counts.sum()))
    return counts
