"""AutoLRS (Jin et al., arXiv 2105.10762): learning rates found by Bayesian optimisation on short pieces of the run.

The run is a row of stages, each twice as long as the one before. In a stage of ``n`` steps, 10 learning rates are tried
for ``n / 10`` steps each, from the same parameters; an exponential through the losses of a trial forecasts the loss
after all ``n``. Each is the one with the lowest confidence bound of a Gaussian process, over the log learning rate,
through the forecasts so far. The best of the 10 is then trained with for the stage. The steps of the trials count as
steps of the run, so that half of it is left for training. Learning rates are within a factor of 100 of the one given.
"""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hdet.bench.regret import peers
from hdet.bench.regret.workloads import Workload

_TRIALS = 10
_FIRST, _LONGEST = 100, 8000
"""Steps of the first stage, so that a trial has 10, and of the longest. The paper has 1,000, for longer runs."""
_RANGE = math.log(100)
_BOUND = 2.0
"""Standard deviations between a Gaussian process's mean and its confidence bound."""
_CANDIDATES = 201


def autolrs(workload: Workload, max_lr: float, seed: int) -> float:
    """AutoLRS: per stage, the learning rate that Bayesian optimisation finds with exponential forecasts of short
    trials, within a factor of 100 of the start; trials take half of the steps."""
    model = peers.build(workload, seed)
    optimizer = peers.optimizer_of(workload, model, max_lr)
    generator = peers.batches(seed)
    left, stage = workload.steps, _FIRST
    while left > 0:
        trial = stage // _TRIALS
        steps = left - _TRIALS * trial if left < 2 * (stage + _TRIALS * trial) else stage
        if steps < 1:  # too little is left for a stage: with the last learning rate to the end
            _steps(workload, model, optimizer, generator, left)
            break
        best = _search(workload, model, optimizer, generator, max_lr, trial, steps)
        for group in optimizer.param_groups:
            group["lr"] = best
        if not math.isfinite(_steps(workload, model, optimizer, generator, steps)[-1]):
            return math.nan
        left -= _TRIALS * trial + steps
        stage = min(2 * stage, _LONGEST)
    return peers.evaluate(workload, model, workload.validation())


def _steps(
    workload: Workload, model: nn.Module, optimizer: torch.optim.Optimizer, generator: torch.Generator, steps: int
) -> list[float]:
    """Train, and return the losses; the last is NaN or infinite if one was."""
    losses = []
    for _ in range(steps):
        losses.append(peers.backward(workload, model, workload.draw(workload.batch_size, generator)))
        if not math.isfinite(losses[-1]):
            break
        optimizer.step()
    return losses


def _search(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    max_lr: float,
    trial: int,
    steps: int,
) -> float:
    """The learning rate for a stage. Model and optimizer are as before."""
    kept = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    grid = np.linspace(-_RANGE, _RANGE, _CANDIDATES)
    tried: list[float] = []
    found: list[float] = []
    for _ in range(_TRIALS):
        at = _next(grid, tried, found)
        for group in optimizer.param_groups:
            group["lr"] = max_lr * math.exp(at)
        losses = _steps(workload, model, optimizer, generator, trial)
        tried.append(at)
        found.append(forecast(losses, steps) if math.isfinite(losses[-1]) else math.inf)
        model.load_state_dict(kept[0])
        optimizer.load_state_dict(copy.deepcopy(kept[1]))
    return max_lr * math.exp(tried[int(np.argmin(found))])


def _next(grid: NDArray[np.float64], tried: list[float], found: list[float]) -> float:
    """Where to try next: the middle, then where the confidence bound is lowest. A forecast that is not finite counts as
    the worst that is."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    finite = [value for value in found if math.isfinite(value)]
    if not finite:
        return 0.0 if not tried else min(tried) - _RANGE / _TRIALS
    values = np.array([value if math.isfinite(value) else max(finite) for value in found])
    values = (values - values.mean()) / (values.std() or 1.0)
    kernel = Matern(nu=2.5, length_scale_bounds=(0.3, 10.0)) + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(np.array(tried)[:, None], values)
    mean, deviation = process.predict(grid[:, None], return_std=True)
    return float(grid[int(np.argmin(mean - _BOUND * deviation))])


def forecast(losses: list[float], steps: int) -> float:
    """The loss after ``steps`` steps by the exponential ``a exp(-b t) + c`` that is nearest to the losses, with
    ``a > 0`` and a decay that can be seen in them, ``b >= 1 / len(losses)``; their mean where their last third is not
    below the first loss. It falls at most once more by what lies between these: a spike forecasts nothing."""
    seen = np.array(losses)
    third = max(1, len(seen) // 3)
    first, last = float(seen[0]), float(np.median(seen[-third:]))
    if not last < first:
        return float(seen.mean())
    t = np.arange(len(seen))
    best = (math.inf, last)
    for rate in np.geomspace(1 / len(seen), 3.0, 40):
        falling = np.exp(-rate * t)
        design = np.stack([falling, np.ones_like(falling)], 1)
        (a, c), *_ = np.linalg.lstsq(design, seen, rcond=None)
        error = float(((design @ (a, c) - seen) ** 2).sum())
        if a > 0 and error < best[0]:
            best = error, float(a * math.exp(-rate * steps) + c)
    return max(best[1], last - (first - last))
