"""A Gaussian process of the validation score, and the weights that it proposes (5.1).

Kept apart from :mod:`lightning_dvc.policy.bayesian` so that only a run that learns weights imports
BoTorch.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

with warnings.catch_warnings():
    # linear_operator, which BoTorch imports, still decorates functions with torch.jit.script.
    # Up to torch 2.13 that is a DeprecationWarning, from 2.14 on a FutureWarning.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script")
    from botorch.acquisition.acquisition import AcquisitionFunction
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.exceptions.errors import BotorchError, ModelFittingError
    from botorch.exceptions.warnings import OptimizationWarning
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
    from botorch.optim.optimize import optimize_acqf
    from botorch.sampling.normal import SobolQMCNormalSampler
    from gpytorch.constraints import GreaterThan
    from gpytorch.kernels import Kernel, RBFKernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.priors import GammaPrior, LogNormalPrior
    from linear_operator.utils.warnings import NumericalWarning

_RESTARTS: Final = 4
_FIT_OPTIONS: Final = {"ftol": 1e-6, "gtol": 1e-3}
"""With 1e-9 and 1e-5 fits take half as long again, for a log density per observation that is higher
by up to 0.004; with 1e-5 and 1e-2 it is lower by up to 0.04 (8 data sets of 24 observations)."""
_DRAWS: Final = 256
"""Draws with which the acquisition is estimated."""
_LEAST_LENGTH: Final = 0.025
"""BoTorch's own bound of length scales; below, kernel matrices get close to singular."""
_LEAST_SPREAD: Final = 1e-9


class FitError(Exception):
    """No weights could be proposed from these observations."""


def propose(
    weights: Tensor,
    past: Tensor,
    scores: Tensor,
    ago: Tensor,
    progress: float,
    starts: Tensor,
    seed: int,
) -> Tensor:
    """The weights of the greatest expected improvement at the present progress.

    A validation score rises with training whatever the weights are. So progress is an input of the
    model with a trend of its own, the proposal is made at the present progress, and what is to be
    improved on is the best of the weights so far *at the present progress*, not the best score
    seen. See :func:`acquisition`.

    Args:
        weights: ``(n, d)`` float64 on the simplex, ``n >= 2``.
        past: ``(n, 1)`` progress of each observation, in ``[0, 1]``.
        scores: ``(n, 1)`` finite scores, the greater the better.
        ago: ``(n, 1)`` how many runs ago each was observed, 0 in this run. The level of the scores
            may differ between runs.
        progress: Present progress, in ``[0, 1]``.
        starts: ``(s, d)`` points on the simplex from which to start looking, besides ``weights``.
        seed: Of draws and of retries of the fit; the global generators are left as they were.

    Returns:
        ``(d,)`` float64 on the simplex.

    Raises:
        FitError: If the scores of a run are (nearly) all equal in every run, or the fit fails.

    Example:
        >>> weights = torch.eye(2, dtype=torch.float64)
        >>> zeros, scores = torch.zeros(2, 1).double(), torch.tensor([[0.0], [1.0]]).double()
        >>> propose(weights, zeros, scores, zeros, 0.0, weights, seed=0).shape
        torch.Size([2])
    """
    scores = _standardised(scores, ago)
    try:
        with _isolated(seed):
            model = _fitted(torch.cat([weights, past, ago], 1), scores)
            now = _at(weights, progress)
            return _maximum(acquisition(model, now, seed), torch.cat([now, _at(starts, progress)]))
    except (BotorchError, ModelFittingError, RuntimeError, ValueError, ArithmeticError) as error:
        raise FitError(f"the model could not be fitted ({error})") from error


def acquisition(model: SingleTaskGP, now: Tensor, seed: int) -> AcquisitionFunction:
    """What the proposal maximises: qLogNEI over the weights so far, at the present progress.

    What the best score so far would be at the present progress is uncertain: scores are noisy, the
    trend goes on, and the level of a run just begun is not known. qLogNEI (Ament et al., NeurIPS
    2023) draws both sides of the improvement together, so that what all weights share cancels out.

    Measured with ``python -m examples.weights --seeds 12``: median simple regret after 30 asks, and
    in brackets the mean regret of the last five, against LogEI over the posterior mean of the best:

    ======  ===============  ===============  ===============
    noise   random           qLogNEI          LogEI
    ======  ===============  ===============  ===============
    0.005   0.0101 (0.0735)  0.0014 (0.0074)  0.0018 (0.0067)
    0.02    0.0101 (0.0735)  0.0049 (0.0376)  0.0054 (0.0292)
    0.05    0.0101 (0.0735)  0.0110 (0.1064)  0.0201 (0.0464)
    ======  ===============  ===============  ===============

    It finds better weights; LogEI asks for better ones late, clearly so where noise is great. Noise
    of 0.05 is more than weights drawn at random spread the score by (0.04): there neither beats the
    best of 30 random weights, which random search could not tell from the others.

    Args:
        model: Of weights, progress and run.
        now: ``(n, d + 2)`` inputs of the model: all weights so far, at the present progress.
        seed: Of the draws.

    Returns:
        A function of ``(b, 1, d + 2)`` inputs, with ``(b,)`` values.
    """
    sampler = SobolQMCNormalSampler(torch.Size([_DRAWS]), seed=seed % 2**31)
    return qLogNoisyExpectedImprovement(model, now, sampler)


def _at(weights: Tensor, progress: float) -> Tensor:
    """Inputs ``(n, d + 2)`` of the model: weights ``(n, d)`` at one progress of this run."""
    column = torch.ones_like(weights[:, :1])
    return torch.cat([weights, progress * column, 0 * column], 1)


def _fitted(inputs: Tensor, scores: Tensor) -> SingleTaskGP:
    several_runs = len(inputs[:, -1].unique()) > 1
    covariance = _kernel(inputs.shape[1] - 2, several_runs)
    model = SingleTaskGP(inputs, scores, covar_module=covariance, outcome_transform=None)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": _FIT_OPTIONS})
    return model


def _maximum(improvement: AcquisitionFunction, candidates: Tensor) -> Tensor:
    """Weights ``(d,)`` of the greatest improvement, sought from the best of the candidates.

    Candidates are ``(n, d + 2)``, all of one progress and one run.
    """
    d = candidates.shape[1] - 2
    with torch.no_grad():
        values = improvement(candidates[:, None])
    promising = values.topk(min(_RESTARTS, len(candidates))).indices
    found, _ = optimize_acqf(
        improvement,
        bounds=torch.tensor([[0.0], [1.0]], dtype=candidates.dtype).expand(2, d + 2),
        q=1,
        num_restarts=len(promising),
        equality_constraints=[(torch.arange(d), torch.ones(d, dtype=candidates.dtype), 1.0)],
        fixed_features={i: candidates[0, i].item() for i in (d, d + 1)},
        batch_initial_conditions=candidates[promising, None],
        retry_on_optimization_warning=False,
    )
    found = found[0, :d].clamp(min=0)
    if not found.isfinite().all():
        raise FitError("the optimiser of the acquisition returned numbers that are not finite")
    return found / found.sum()


def _standardised(scores: Tensor, ago: Tensor) -> Tensor:
    """Scores with the mean 0 in each run, and unit variance over all of them."""
    centred = scores.clone()
    for number in ago.unique():
        centred[ago == number] -= centred[ago == number].mean()
    # Refused here, since a spread that vanishes cannot be divided by.
    spread = centred.std()
    if not _LEAST_SPREAD * (1 + scores.abs().max()) < spread < torch.inf:
        raise FitError(f"the scores do not differ enough, their standard deviation is {spread}")
    return centred / spread


def _kernel(d: int, several_runs: bool) -> Kernel:
    """A trend in progress, an effect of weights and progress, and a level of each run.

    Each has its own amplitude: with one kernel over all inputs the trend dictates it. The priors of
    the amplitudes, in units of the scores' variance, say that trend and level are the greater part.

    The weights have one length scale together, because thirty noisy scores do not tell six apart:
    on the response of ``examples/weights.py`` the median simple regret after 30 asks was 0.0009
    rather than 0.0028 with noise of 0.005, and 0.0046 rather than 0.0063 with 0.02 (6 seeds).
    """
    trend = get_covar_module_with_dim_scaled_prior(ard_num_dims=1, active_dims=[d])
    drift = get_covar_module_with_dim_scaled_prior(ard_num_dims=1, active_dims=[d])
    prior = LogNormalPrior(0.0, 1.0)
    length = GreaterThan(_LEAST_LENGTH, transform=None, initial_value=prior.mode)
    effect = RBFKernel(
        active_dims=list(range(d)), lengthscale_prior=prior, lengthscale_constraint=length
    )
    kernel = ScaleKernel(trend, outputscale_prior=GammaPrior(2.0, 0.5)) + ScaleKernel(
        effect * drift, outputscale_prior=GammaPrior(2.0, 2.0)
    )
    if several_runs:
        # So short that it is 1 within a run and 0 between runs.
        same_run = RBFKernel(active_dims=[d + 1])
        same_run.lengthscale = 0.1
        same_run.requires_grad_(requires_grad=False)
        kernel += ScaleKernel(same_run, outputscale_prior=GammaPrior(2.0, 0.5))
    return kernel


@contextmanager
def _isolated(seed: int) -> Iterator[None]:
    """Seed what BoTorch draws from, restore it afterwards, and drop warnings nobody can act on.

    Only the CPU generator is used, so only that is forked: ``torch.manual_seed`` would reseed the
    accelerators too.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # An optimiser that stops early or jitter on a kernel matrix cost a little precision of the
        # proposal, nothing else.
        warnings.simplefilter("ignore", OptimizationWarning)
        warnings.simplefilter("ignore", NumericalWarning)
        torch.default_generator.manual_seed(seed)
        yield
