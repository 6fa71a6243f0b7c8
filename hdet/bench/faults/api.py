"""Malformed calls of everything that is public, and damaged states to load: refused by name, with nothing changed."""

from __future__ import annotations

import copy
import logging
import math
import os
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import hdet
from hdet.bench.faults._examples import Call, example, parameters, public
from hdet.bench.faults._values import HOSTILE, forbids, picture, random_state
from hdet.bench.faults.sections import Outcome, cases

FULL = 5000
_STATES = 0.3
"""Share of damaged states among the calls."""
_CLEAN = (TypeError, ValueError, hdet.HdetError)
_ANYTHING = {"Monitor.start", "Monitor.report", "OneCycleLR.each", "Ensemble.each"}
"""Methods that do nothing, for others to override, or take what can be iterated over, texts too."""
_FILES = {"path", "log_dir", "prior"}
"""Arguments that name files: the system's errors name them, too."""
_MAY_BE_NAN = {
    ("FoundSchedule", "lrs"),
    ("OneCycleLR.step", "loss"), ("Ensemble.step", "loss"), ("TensorBoard.add_scalar", "value"),
    ("controller.OneSlope.update", "effect"), ("controller.Published.wants_probe", "progress"),
    ("controller.Posterior.wants_probe", "progress"), ("LRFinding", "start_loss"),
}  # fmt: skip
_LOADING = ("OneCycleLR.load_state_dict", "Ensemble.load_state_dict")


def run(share: float, seed: int) -> Outcome:
    """Try the share of them."""
    chance, outcome = random.Random(seed), Outcome()
    count = cases(FULL, share)
    pairs = [(name, argument) for name, f in public().items() for argument in parameters(f)]
    grid = [(name, argument, value) for name, argument in pairs for value in HOSTILE]
    chance.shuffle(grid)
    # Every argument at least once, then at random.
    first = {(name, argument): (name, argument, value) for name, argument, value in grid}
    chosen = [*first.values(), *grid][: count - round(_STATES * count)]
    before, logger = os.getcwd(), logging.getLogger("hdet")
    level = logger.level
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        os.chdir(directory)  # where a path is taken that is none
        try:
            for name, argument, value in chosen:
                _record(outcome, f"{name}({argument}={value})", *try_call(name, argument, value, Path(directory)))
            for _ in range(count - len(chosen)):
                name = chance.choice(_LOADING)
                where, fault = try_state(name, chance, Path(directory))
                _record(outcome, f"{name}: {where}", fault, "a damaged state")
        finally:
            os.chdir(before)
            logger.setLevel(level)
    return outcome


def try_call(name: str, argument: str, value: str, folder: Path) -> tuple[str | None, str | None]:
    """Make one call with a hostile value in place of one argument. What went wrong, and by what rule it was refused."""
    call = example(name, folder)
    hostile = HOSTILE[value]()
    annotation = parameters(public()[name])[argument]
    bad = forbids(annotation, hostile) and name not in _ANYTHING and argument not in call.theirs
    if isinstance(hostile, float) and math.isnan(hostile) and (name, argument) in _MAY_BE_NAN:
        bad = False
    before, generators = picture(*call.watched), random_state()
    try:
        result = call.function(**{**call.arguments, argument: hostile})
        if hasattr(result, "__next__") and name.endswith(".each"):
            list(result)
    except _CLEAN as error:
        changed = _changed(call, before, generators)
        if changed:
            return changed, None
        known = argument in call.theirs or argument in _FILES
        if not known and argument.rstrip("s") not in str(error):
            return f"{type(error).__name__} does not name {argument}: {error}", None
        return None, type(error).__name__
    except Exception as error:
        if argument in _FILES and isinstance(error, OSError):
            return None, "OSError"
        if argument in call.theirs and not _changed(call, before, generators):
            return None, "torch's error"
        return f"{type(error).__name__}: {error}", None
    finally:
        _close(call)
    return ("accepted", None) if bad else (None, None)


def try_state(name: str, chance: random.Random, folder: Path) -> tuple[str, str | None]:
    """Load a state of which one value is another. Where it is, and what went wrong."""
    call = example(name, folder)
    state = copy.deepcopy(call.arguments["state_dict"])
    places = list(_places(state))
    holder, key, path = chance.choice(places)
    if chance.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
        where = f"{path} is missing"
    else:
        value = chance.choice(list(HOSTILE))
        holder[key] = HOSTILE[value]()
        where = f"{path} = {value}"
    before, generators = picture(*call.watched), random_state()
    model, optimizer, scheduler = call.watched
    try:
        call.function(state)
    except _CLEAN:
        return where, _changed(call, before, generators)
    except Exception as error:
        return where, f"{type(error).__name__}: {error}"
    return where, _wrong_run(model, optimizer, scheduler)


def _wrong_run(model: Any, optimizer: Any, scheduler: Any) -> str | None:
    """What is wrong with a run that has gone on from a state."""
    try:
        for _ in range(4):
            model(torch.ones(4, 3)).square().mean().backward()
            optimizer.step()
            scheduler.step(0.5)
            optimizer.zero_grad()
        scheduler.state_dict()
    except _CLEAN as error:  # the end of a run is an error of its own
        return None if "total" in str(error) else f"afterwards {type(error).__name__}: {error}"
    except Exception as error:
        return f"afterwards {type(error).__name__}: {error}"
    ensemble = getattr(scheduler, "ensemble", scheduler)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if not all(math.isfinite(lr) and lr >= 0 for lr in rates):
        return f"accepted, then learning rates {rates}"
    if not all(math.isfinite(gain) and gain > 0 for gain in ensemble.gains):
        return f"accepted, then gains {ensemble.gains}"
    if not isinstance(ensemble.steps, int) or ensemble.steps < 4:
        return f"accepted, then steps {ensemble.steps}"
    return None


def _places(value: Any, path: str = "state") -> Iterator[tuple[Any, Any, str]]:
    """Every place of a nested value that can be set."""
    if isinstance(value, dict):
        items: Any = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, inner in items:
        yield value, key, f"{path}[{key!r}]"
        yield from _places(inner, f"{path}[{key!r}]")


def _changed(call: Call, before: list[Any], generators: tuple[Any, ...]) -> str | None:
    if random_state() != generators:
        return "a global random number generator has moved"
    if picture(*call.watched) != before:
        return "refused, and something has changed"
    return None


def _close(call: Call) -> None:
    monitor = getattr(call.function, "__self__", None)
    if isinstance(monitor, hdet.Monitor):
        monitor.close()


def _record(outcome: Outcome, what: str, fault: str | None, rule: str | None) -> None:
    outcome.tried += 1
    if fault:
        outcome.failures.append(f"{what}: {fault}")
    elif rule:
        outcome.refused[rule] += 1


def main() -> int:
    """Run this section alone."""
    outcome = run(1.0, 0)
    print(outcome.tried, outcome.held, Counter(outcome.refused), *outcome.failures, sep="\n")
    return int(bool(outcome.failures))


if __name__ == "__main__":
    raise SystemExit(main())
