"""A Gaussian process of the validation score, and the weights that it proposes (5.1).

Kept apart from :mod:`lightning_dvc.policy.weights` because importing BoTorch takes seconds.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

with warnings.catch_warnings():
    # linear_operator, which BoTorch imports, still decorates functions with torch.jit.script.
    warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)
    from botorch.acquisition.analytic import LogExpectedImprovement
    from botorch.exceptions.errors import BotorchError, ModelFittingError
    from botorch.exceptions.warnings import OptimizationWarning
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.utils.gpytorch_modules import get_covar_module_with_dim_scaled_prior
    from botorch.optim.optimize import optimize_acqf
    from gpytorch.kernels import Kernel, ScaleKernel
    from gpytorch.mlls import ExactMarginalLogLikelihood
    from gpytorch.priors import GammaPrior
    from linear_operator.utils.warnings import NumericalWarning

_RESTARTS: Final = 4
_FIT_OPTIONS: Final = {"ftol": 1e-6, "gtol": 1e-3}
"""Measured as in :func:`_kernel`: with 1e-5 fits stop too early (0.13 rather than 0.034); with
BoTorch's own tolerances they take several times as long for the same weights."""
_LEAST_SPREAD: Final = 1e-9


class FitError(Exception):
    """No weights could be proposed from these observations."""


def propose(
    weights: Tensor, past: Tensor, scores: Tensor, progress: float, starts: Tensor, seed: int
) -> Tensor:
    """The weights of the greatest expected improvement at the present progress.

    A validation score rises with training whatever the weights are. So progress is an input of the
    model with a trend of its own, the proposal is made at the present progress, and the score to
    improve on is what the model expects *at the present progress* from the best weights so far, not
    the best score seen. That expectation is the posterior mean, so noise of the scores is averaged
    out of it; this allows the analytic LogEI (Ament et al., NeurIPS 2023), which needs no Monte
    Carlo draws as qLogNEI does.

    Args:
        weights: ``(n, d)`` float64 on the simplex, ``n >= 2``.
        past: ``(n, 1)`` progress of each observation, in ``[0, 1]``.
        scores: ``(n, 1)`` finite scores, the greater the better.
        progress: Present progress, in ``[0, 1]``.
        starts: ``(s, d)`` points on the simplex from which to start looking, besides ``weights``.
        seed: Of retries of the fit; the global generators are left as they were.

    Returns:
        ``(d,)`` float64 on the simplex.

    Raises:
        FitError: If the scores are (nearly) all equal or the fit fails.

    Example:
        >>> weights = torch.eye(2, dtype=torch.float64)
        >>> past, scores = torch.zeros(2, 1).double(), torch.tensor([[0.0], [1.0]]).double()
        >>> propose(weights, past, scores, 0.0, weights, seed=0).shape
        torch.Size([2])
    """
    # Standardised here, since a spread that vanishes has to be refused first.
    spread = scores.std()
    if not _LEAST_SPREAD * (1 + scores.abs().max()) < spread < torch.inf:
        raise FitError(f"the scores do not differ enough, their standard deviation is {spread}")
    scores = (scores - scores.mean()) / spread
    try:
        with _isolated(seed):
            model = _fitted(torch.cat([weights, past], 1), scores)
            return _optimum(model, weights, progress, starts)
    except (BotorchError, ModelFittingError, RuntimeError, ValueError, ArithmeticError) as error:
        raise FitError(f"the model could not be fitted ({error})") from error


def _fitted(inputs: Tensor, scores: Tensor) -> SingleTaskGP:
    model = SingleTaskGP(
        inputs, scores, covar_module=_kernel(inputs.shape[1] - 1), outcome_transform=None
    )
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": _FIT_OPTIONS})
    return model


def _kernel(d: int) -> Kernel:
    """A trend in progress plus an effect of weights and progress, each with its own amplitude.

    With one kernel over all inputs the trend dictates the amplitude. The priors of the amplitudes,
    in units of the scores' variance, say that the trend is the greater part. Measured on a
    quadratic response to six weights under a trend of 80 times the noise, 25 asks: mean squared
    distance of the last five asks from the best weights 0.034 (6 seeds), with one kernel 0.10, at
    random 0.22 (8 seeds).
    """
    trend = get_covar_module_with_dim_scaled_prior(ard_num_dims=1, active_dims=[d])
    effect = get_covar_module_with_dim_scaled_prior(ard_num_dims=d + 1)
    return ScaleKernel(trend, outputscale_prior=GammaPrior(2.0, 0.5)) + ScaleKernel(
        effect, outputscale_prior=GammaPrior(2.0, 2.0)
    )


def _optimum(model: SingleTaskGP, weights: Tensor, progress: float, starts: Tensor) -> Tensor:
    d = weights.shape[1]
    now = torch.cat([weights, torch.full_like(weights[:, :1], progress)], 1)
    candidates = torch.cat([starts, torch.full_like(starts[:, :1], progress)], 1)
    candidates = torch.cat([candidates, now])
    with torch.no_grad():
        best = model.posterior(now).mean.max()
        improvement = LogExpectedImprovement(model, best_f=best)
        promising = improvement(candidates[:, None]).topk(min(_RESTARTS, len(candidates))).indices
    found, _ = optimize_acqf(
        improvement,
        bounds=torch.tensor([[0.0], [1.0]], dtype=weights.dtype).expand(2, d + 1),
        q=1,
        num_restarts=len(promising),
        equality_constraints=[(torch.arange(d), torch.ones(d, dtype=weights.dtype), 1.0)],
        fixed_features={d: progress},
        batch_initial_conditions=candidates[promising, None],
        retry_on_optimization_warning=False,
    )
    found = found[0, :d].clamp(min=0)
    if not found.isfinite().all():
        raise FitError("the optimiser of the acquisition returned numbers that are not finite")
    return found / found.sum()


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
