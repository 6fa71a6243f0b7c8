"""Every public callable of hdet, and for each a call that is as it should be."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hdet
from hdet.explore import Prior
from hdet.schedules.course import Course
from hdet.schedules.forecast import Forecast
from hdet.settings import Settings


class Call(NamedTuple):
    """One call."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    watched: tuple[Any, ...] = ()
    """What must be as before if it is refused."""
    theirs: frozenset[str] = frozenset()
    """Arguments that go to torch or to the user's own code, whose errors may stay as they are."""


# Records hold what they are given: they are what hdet hands out, and its functions check them where they are read.
RECORDS = {"Report", "controller.Belief", "controller.CentreState", "controller.ControllerState",
           "controller.Observation", "controller.ProbeLosses", "controller.Slopes"}  # fmt: skip
_NO_CALLS = {"Settings", "controller.Controller", "ops.Backend"}  # types


def public() -> dict[str, Any]:
    """Every public callable by its dotted name: functions, constructors, and the methods of classes."""
    found: dict[str, Any] = {}
    spaces: list[tuple[str, Any, list[str]]] = [("", hdet, hdet.__all__)]
    inner = [(name, getattr(hdet, name)) for name in hdet.__all__]
    spaces += [(f"{name}.", space, space.__all__) for name, space in inner if isinstance(space, types.ModuleType)]
    for prefix, space, names in spaces:
        for name in names:
            thing = getattr(space, name)
            if isinstance(thing, types.ModuleType) or prefix + name in _NO_CALLS | RECORDS:
                continue
            if isinstance(thing, type) and issubclass(thing, Exception):
                continue
            found[prefix + name] = thing
            if isinstance(thing, type):
                found |= {f"{prefix}{name}.{method}": f for method, f in _methods(thing)}
    found["Prior"] = Prior
    found |= {f"Prior.{method}": f for method, f in _methods(Prior)}
    return found


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Methods that hdet defines and that take an argument."""
    for name, _ in inspect.getmembers(kind, callable):
        owner = next((c for c in kind.__mro__ if name in vars(c)), object)
        if (name.startswith("_") and name != "__call__") or not owner.__module__.startswith("hdet"):
            continue
        function = inspect.getattr_static(kind, name)
        function = function.__func__ if isinstance(function, (staticmethod, classmethod)) else function
        if inspect.isfunction(function) and len(inspect.signature(function).parameters) > 0:
            yield name, getattr(kind, name)


def parameters(function: Any) -> dict[str, Any]:
    """The names and annotations of what it takes, each of the settings among them."""
    is_class = isinstance(function, type) and not is_dataclass(function)
    target: Any = vars(function)["__init__"] if is_class and "__init__" in vars(function) else function
    signature = inspect.signature(function)
    try:
        hints = typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    found: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if name == "self" or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= typing.get_type_hints(Settings, include_extras=True)
        else:
            found[name] = hints.get(name, Any)
    return found


def example(name: str, folder: Path) -> Call:
    """A call of a public callable that succeeds, on things of its own.

    Raises:
        KeyError: if there is none: a new callable needs one here.
    """
    return EXAMPLES[name](folder)


EXAMPLES: dict[str, Callable[[Path], Call]] = {}


def _example(*names: str) -> Callable[[Callable[[Path], Call]], Callable[[Path], Call]]:
    def add(make: Callable[[Path], Call]) -> Callable[[Path], Call]:
        EXAMPLES.update(dict.fromkeys(names, make))
        return make

    return add


def _add(name: str, make: Callable[[Path], Call]) -> None:
    EXAMPLES[name] = make


# ------------------------------------------------------------------------------------------------------------- things


def net() -> nn.Module:
    """A small model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1), nn.BatchNorm1d(3), nn.Linear(3, 1))


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Its optimizer, with two parameter groups."""
    first, *rest = model.parameters()
    groups: list[dict[str, Any]] = [
        {"params": [first], "name": "first"},
        {"params": rest, "lr": torch.tensor(0.02), "foreach": False},
    ]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def loss_fn(model: Any, batch: Tensor) -> Tensor:
    """A loss."""
    return model(batch).square().mean()


BATCHES = [torch.linspace(-1, 1, 12).view(4, 3) * (i + 1) for i in range(3)]


class World(NamedTuple):
    """A model that an earlier scheduler trains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    earlier: hdet.Ensemble


def world() -> World:
    """One."""
    model = net()
    optimizer = adamw(model)
    return World(model, optimizer, hdet.Ensemble(optimizer, model=model, spread=0.1, converge_every=2))


def one_cycle(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, hdet.OneCycleLR]:
    """A scheduler with an ensemble that has done some steps."""
    model = net()
    optimizer = adamw(model)
    given = {"model": model, "spread": 0.1, "converge_every": 2, "auto_lr": True, **settings}
    scheduler = hdet.OneCycleLR(optimizer, 0.1, 100, **given)
    for _ in range(5):
        loss_fn(model, BATCHES[0]).backward()
        optimizer.step()
        scheduler.step(0.5)
    return model, optimizer, scheduler


def ensemble() -> tuple[nn.Module, torch.optim.Optimizer, hdet.Ensemble]:
    """The same of :class:`hdet.Ensemble`, around a function."""
    model = net()
    optimizer = adamw(model)
    probe = hdet.Probe(loss_fn=loss_fn, batches=BATCHES)
    built = hdet.Ensemble(
        optimizer, hdet.schedules.cosine(total_steps=100), total_steps=100, model=model, spread=0.1, converge_every=2,
        auto_lr=True, probe=probe,
    )  # fmt: skip
    for _ in range(5):
        loss_fn(model, BATCHES[0]).backward()
        optimizer.step()
        built.step(0.5)
    return model, optimizer, built


def attached() -> hdet.Hyperparameter:
    """A hyperparameter with a centre."""
    one = hdet.param_group("weight_decay", spread=0.5)
    one.attach(adamw(net()))
    return one


def report() -> hdet.Report:
    """One of a real run."""
    model, optimizer, scheduler = one_cycle()
    loss_fn(model, BATCHES[0]).backward()
    optimizer.step()
    scheduler.step(0.5)
    assert scheduler.ensemble.last_report is not None
    return scheduler.ensemble.last_report


# ------------------------------------------------------------------------------------------- schedulers and schedules

_TORCHS = frozenset({"total_steps", "epochs", "steps_per_epoch", "pct_start", "anneal_strategy", "cycle_momentum",
                     "base_momentum", "max_momentum", "div_factor", "final_div_factor", "three_phase", "last_epoch",
                     "max_lr", "optimizer"})  # fmt: skip


def _settings(model: nn.Module) -> dict[str, Any]:
    return {"model": model, "spread": 0.1, "converge_every": 3, "auto_lr": True,
            "hyperparameters": [hdet.param_group("weight_decay", spread=0.5, move=False)]}  # fmt: skip


@_example("OneCycleLR")
def _(folder: Path) -> Call:
    w = world()
    given = _settings(w.model)
    arguments = {"optimizer": w.optimizer, "max_lr": 0.1, "total_steps": 100, **given}
    return Call(hdet.OneCycleLR, arguments, (*w, given["hyperparameters"]), _TORCHS)


@_example("Ensemble")
def _(folder: Path) -> Call:
    w = world()
    given = _settings(w.model)
    arguments = {"optimizer": w.optimizer, "schedule": hdet.schedules.constant(), "total_steps": 100, **given}
    return Call(hdet.Ensemble, arguments, (*w, given["hyperparameters"]))


def _scheduler_method(name: str, /, **arguments: Any) -> None:
    for kind, make in (("OneCycleLR", one_cycle), ("Ensemble", ensemble)):

        def build(folder: Path, make: Callable[[], Any] = make) -> Call:
            model, optimizer, built = make()
            return Call(getattr(built, name), dict(arguments), (model, optimizer, built))

        _add(f"{kind}.{name}", build)


_scheduler_method("step", loss=0.5)
_scheduler_method("converge")
_scheduler_method("close")
_scheduler_method("get_last_lr")
_scheduler_method("state_dict")
_scheduler_method("each", micro_batches=[1])


def _state(make: Callable[[], Any]) -> Callable[[Path], Call]:
    def build(folder: Path) -> Call:
        state = make()[2].state_dict()
        model, optimizer, built = make()
        return Call(built.load_state_dict, {"state_dict": state}, (model, optimizer, built))

    return build


_add("OneCycleLR.load_state_dict", _state(one_cycle))
_add("Ensemble.load_state_dict", _state(ensemble))


def _ensemble_method(name: str, make_arguments: Callable[[hdet.Ensemble, Path], dict[str, Any]]) -> None:
    def build(folder: Path) -> Call:
        model, optimizer, built = ensemble()
        return Call(getattr(built, name), make_arguments(built, folder), (model, optimizer, built))

    _add(f"Ensemble.{name}", build)


_ensemble_method("multipliers", lambda e, folder: {"group": 0})
_ensemble_method("save_prior", lambda e, folder: {"path": folder / "prior.yaml"})
_ensemble_method("check_state", lambda e, folder: {"state": e.state_dict()})
_ensemble_method("load_own_state", lambda e, folder: {"state": e.own_state()})
_ensemble_method("resume_at", lambda e, folder: {"steps": 3, "base_lr": e.get_base_lr()})
_ensemble_method("look_ahead", lambda e, folder: {"ahead": Forecast(0.1, (1.0, 0.0))})
_ensemble_method("summary", lambda e, folder: {"kind": "hdet.OneCycleLR"})
_ensemble_method("recomputed_by", lambda e, folder: {"name": "OneCycleLR"})
for _name in ("found_schedule", "get_base_lr", "own_state", "rate_was_found"):
    _ensemble_method(_name, lambda e, folder: {})


def _plain(name: str, function: Callable[..., Any], /, **arguments: Any) -> None:
    _add(name, lambda folder: Call(function, dict(arguments)))


_SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"warmup_steps": 2},
    "linear": {"total_steps": 10}, "cosine": {"total_steps": 10}, "rex": {"total_steps": 10},
    "uba": {"total_steps": 10, "phi": 1.0},
    "warmup_stable_decay": {"total_steps": 10, "decay_steps": 2},
    "power": {"batch_size": 8, "sequence_length": 16},
    "infinite": {"cooldown_steps": 5, "constant_factor": 0.5},
    "one_cycle": {"total_steps": 10},
}  # fmt: skip
for _name, _given in _SCHEDULES.items():
    _kind = getattr(hdet.schedules, _name)
    _plain(f"schedules.{_name}", _kind, **_given)
    _plain(f"schedules.{_name}.__call__", _kind(**_given), step=3)

_FOUND = hdet.FoundSchedule(("a", "b"), (0, 5), ((0.1, 0.2), (0.1, 0.2)))
_plain("FoundSchedule", hdet.FoundSchedule, groups=("a",), steps=(0, 5), lrs=((0.1, 0.2),))
_plain("FoundSchedule.lr", _FOUND.lr, step=3, group=1)
_plain("FoundSchedule.refined", hdet.FoundSchedule.refined, norms=[1.0, 2.0, 1.0], max_lr=0.1)


@_example("FoundSchedule.scheduler")
def _(folder: Path) -> Call:
    w = world()
    return Call(_FOUND.scheduler, {"optimizer": w.optimizer}, tuple(w))


_add("FoundSchedule.save", lambda folder: Call(_FOUND.save, {"path": folder / "found.json"}))


@_example("FoundSchedule.load")
def _(folder: Path) -> Call:
    _FOUND.save(folder / "found.json")
    return Call(hdet.FoundSchedule.load, {"path": folder / "found.json"})


_plain("Prior", Prior, gains={"a": 2.0}, hyperparameters={"weight_decay": 0.1})
_add("Prior.save", lambda folder: Call(Prior({"a": 2.0}).save, {"path": folder / "prior.yaml"}))
_plain("Prior.check", Prior({"a": 2.0}).check, groups=["a"], hyperparameters=[], per_group=False)


@_example("Prior.load")
def _(folder: Path) -> Call:
    Prior({"a": 2.0}).save(folder / "prior.yaml")
    return Call(Prior.load, {"path": folder / "prior.yaml"})


# --------------------------------------------------------------------------------------------- settings, controllers

_plain("Averaging", hdet.Averaging)
_plain("Outer", hdet.Outer)
_plain("Exploration", hdet.Exploration)
_plain("Probe", hdet.Probe, loss_fn=loss_fn, batches=BATCHES)

_STATE, _CENTRE = hdet.controller.ControllerState(), hdet.controller.CentreState()
_BELIEF = hdet.controller.Belief()
_LOSSES = hdet.controller.ProbeLosses(*[(1.0, 2.0)] * 5)
_SEEN = hdet.controller.Observation((1.0, 2.0), (0.9, 1.1), 0.1, progress=0.1, probe=_LOSSES)
for _kind in (hdet.controller.Published, hdet.controller.Posterior):
    _name = f"controller.{_kind.__name__}"
    _plain(_name, _kind)
    _plain(f"{_name}.wants_probe", _kind().wants_probe, progress=0.1, until=1.0)
    _plain(f"{_name}.begin", _kind().begin, gain=2.0)
    _plain(f"{_name}.restored", _kind().restored, controller=[2.0, 0.5, 3, 0.5, 0.5][: len(_kind().begin(1.0))])
    _plain(f"{_name}.rests_after", _kind().rests_after, course=Course(2, 100))
_plain("controller.Published.cut", hdet.controller.Published().cut, state=_STATE, factor=3.0)
_plain("controller.Posterior.cut", hdet.controller.Posterior().cut, belief=_BELIEF, factor=3.0)
_plain("controller.Published.update", hdet.controller.Published().update, state=_STATE, observation=_SEEN)
_plain("controller.Posterior.update", hdet.controller.Posterior().update, belief=_BELIEF, observation=_SEEN)
_plain("controller.Posterior.judge", hdet.controller.Posterior().judge, belief=_BELIEF, observation=_SEEN)
_plain("controller.OneSlope", hdet.controller.OneSlope)
_plain("controller.OneSlope.update", hdet.controller.OneSlope().update, state=_CENTRE, effect=0.1, spread=0.1)
_plain("controller.hypergradient", hdet.controller.hypergradient, losses=(1.0, 2.0), values=(0.9, 1.1), temperature=1.0)
_plain("controller.slopes_of", hdet.controller.slopes_of, probe=_LOSSES, multipliers=(0.9, 1.1), lag=1.0)

# ---------------------------------------------------------------------------------------------------- hyperparameters

_plain("param_group", hdet.param_group, field="weight_decay", spread=0.5)
_plain("scalar", hdet.scalar, name="smoothing", value=0.1, spread=0.05)
_plain(
    "Hyperparameter", hdet.Hyperparameter, name="x", spread=0.1, space="linear", bounds=None, acts_on="update",
    regularises=False, move=True,
)  # fmt: skip


@_example("module_attribute")
def _(folder: Path) -> Call:
    model = net()
    return Call(hdet.module_attribute, {"model": model, "kind": nn.Dropout, "attribute": "p", "spread": 0.1}, (model,))


@_example("Hyperparameter.attach")
def _(folder: Path) -> Call:
    one, w = attached(), world()
    return Call(one.attach, {"optimizer": w.optimizer}, (one, *w))


def _hyperparameter_method(name: str, /, **arguments: Any) -> None:
    def build(folder: Path) -> Call:
        one = attached()
        return Call(getattr(one, name), dict(arguments), (one,))

    _add(f"Hyperparameter.{name}", build)


_hyperparameter_method("value", position=0.1, level=0.5)
_hyperparameter_method("write", position=0.1, level=0.5)
_hyperparameter_method("position_of", value=0.2)
_hyperparameter_method("spread_at", position=0.1)
_hyperparameter_method("clamped", position=0.1)
_hyperparameter_method("keep")
_hyperparameter_method("check_place", starts=[-2.3, -2.3], position=0.0)


@_example("Hyperparameter.neutral")
def _(folder: Path) -> Call:
    one = attached()

    def enter(position: float) -> None:
        with one.neutral(position):
            pass

    return Call(enter, {"position": 0.1}, (one,))


@_example("Dropout")
def _(folder: Path) -> Call:
    return Call(hdet.Dropout, {"p": 0.5})


_add("Dropout.extra_repr", lambda folder: Call(hdet.Dropout(0.5).extra_repr, {}))
_add("Dropout.forward", lambda folder: Call(hdet.Dropout(0.5).eval(), {"x": torch.ones(2)}, (), frozenset({"x"})))


@_example("warm_noisy_start")
def _(folder: Path) -> Call:
    model = net()
    return Call(hdet.warm_noisy_start, {"model": model, "nu": 0.01}, (model,))


# -------------------------------------------------------------------------------------------------- find_lr, monitors


@_example("find_lr")
def _(folder: Path) -> Call:
    w = world()
    arguments = {"model": w.model, "optimizer": w.optimizer, "loss_fn": loss_fn, "batches": BATCHES,
                 "low": 1e-3, "high": 1e-2, "steps": 4}  # fmt: skip
    # What a loss function raises of its own is raised.
    return Call(hdet.find_lr, arguments, tuple(w), frozenset({"model", "loss_fn", "batches"}))


_FINDING: dict[str, Any] = {
    "max_lr": 0.1, "lrs": (0.1, 1.0), "losses": (1.0, 2.0), "errors": (0.1, 0.1), "start_loss": 2.0,
    "conclusive": True, "steps": 40,
}  # fmt: skip
_plain("LRFinding", hdet.LRFinding, **_FINDING)
_add("LRFinding.plot", lambda folder: Call(hdet.LRFinding(**_FINDING).plot, {"path": folder / "lr.png"}))

_add("Monitor", lambda folder: Call(hdet.Monitor, {}))
_add("JsonLines", lambda folder: Call(hdet.JsonLines, {"path": folder / "rounds.jsonl"}))
_add("TensorBoard", lambda folder: Call(hdet.TensorBoard, {"log_dir": folder / "board"}))


def _monitor_method(kind: str, name: str, make: Callable[[Path], dict[str, Any]], *, started: bool) -> None:
    def build(folder: Path) -> Call:
        monitor: Any = {
            "Monitor": hdet.Monitor,
            "JsonLines": lambda: hdet.JsonLines(folder / "rounds.jsonl"),
            "TensorBoard": lambda: hdet.TensorBoard(folder / "board"),
        }[kind]()
        if started:
            monitor.start({"a": 1}, step=0, writer=False)
        return Call(getattr(monitor, name), make(folder))

    _add(f"{kind}.{name}", build)


for _name in ("Monitor", "JsonLines", "TensorBoard"):
    _monitor_method(_name, "start", lambda folder: {"config": {"a": 1}, "step": 0, "writer": False}, started=False)
    _monitor_method(_name, "report", lambda folder: {"report": report()}, started=True)
    _monitor_method(_name, "close", lambda folder: {}, started=True)
_monitor_method("TensorBoard", "add_scalar", lambda folder: {"tag": "x", "value": 1.0, "step": 3}, started=False)

# ----------------------------------------------------------------------------------------------------------------- ops

_add("ops.backend", lambda folder: Call(hdet.ops.backend, {}))
_add("ops.pack", lambda folder: Call(hdet.ops.pack, {"wire": torch.empty(4), "pieces": [torch.ones(4)]}))
_add("ops.unpack", lambda folder: Call(hdet.ops.unpack, {"wire": torch.ones(4), "pieces": [torch.ones(4)]}))
_add("ops.all_finite", lambda folder: Call(hdet.ops.all_finite, {"pieces": [torch.ones(4)]}))
_RATES: dict[str, Any] = {"lrs": [torch.zeros(())], "schedule": [0.1], "gain": [2.0], "multiplier": [1.1]}
_add("ops.scale_rates", lambda folder: Call(hdet.ops.scale_rates, _RATES | {"lrs": [torch.zeros(())]}))
