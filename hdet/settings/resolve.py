"""From what a caller passes to complete and valid settings, before anything is changed."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.converge.optimizer_policy import policy_of
from hdet.errors import check_whole
from hdet.explore.identification import check_identified
from hdet.explore.prior import Prior
from hdet.explore.rates import share_memory
from hdet.model.exclusion import Exclusion
from hdet.model.gradients import check_gradients
from hdet.model.optimizers import inside
from hdet.model.sharding import check_sharding
from hdet.model.weights import Weights, weights_of
from hdet.monitor.base import Monitor, as_monitors
from hdet.observe.probe import Probe
from hdet.replicas.topology import Replicas
from hdet.settings.declared import DECLARED, GROUPS, Settings
from hdet.settings.groups import Averaging, Outer
from hdet.steer.controllers import Controller
from hdet.steer.posterior import Posterior
from hdet.steer.published import Published


def round_length(total_steps: int) -> int:
    """The default of ``converge_every``: a hundred rounds; of 100 steps, as soon as that makes more; at most four
    hundred. Every probe costs about as much as two steps."""
    return int(max(1, total_steps // 400, min(100, total_steps // 100)))


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """Complete and valid settings, and what follows from them."""

    given: Settings
    """Every one of :class:`Settings`, defaults filled in."""
    total_steps: int | None
    """Length of the run in scheduler steps."""
    converge_every: int
    """``T``; 1 where replicas do not differ and none was given."""
    controller: Controller
    probe: Probe | None
    prior: Prior | None
    modules: tuple[nn.Module, ...]
    exclusion: Exclusion
    """What of the modules is each rank's own."""
    outside: tuple[Tensor, ...]
    """Parameters that the optimizer trains and no module has."""
    monitors: tuple[Monitor, ...]
    replicas: Replicas
    optimizer: Optimizer
    """The one that was passed, or the one inside a wrapper."""
    optimizer_state: str
    """The policy that ``averaging.optimizer_state`` comes to with this optimizer."""

    @property
    def size(self) -> int:
        """Number of replicas, real times virtual."""
        return self.replicas.size * self.given["virtual_replicas"]

    @property
    def rolls_back(self) -> bool:
        """Whether a round that blew up is undone."""
        given = self.given
        return given["auto_lr"] and given["rollback"] is not False and not given["averaging"].overlap_steps

    @property
    def snapshot_device(self) -> torch.device | None:
        """Where the copy lies that a rollback needs; ``None`` for beside the original."""
        rollback = self.given["rollback"]
        return None if isinstance(rollback, bool) else torch.device(rollback)

    @functools.cached_property
    def plain(self) -> dict[str, Any]:
        """As plain values by name, for comparing ranks, for error messages and for TensorBoard's hparams."""
        given = self.given
        values: dict[str, Any] = {}
        for name, value in given.items():
            if name in ("model", "exclude", "monitor", "prior", "replicas"):
                continue  # objects, and what may differ between ranks
            if is_dataclass(value) and name in GROUPS:
                for inner in fields(value):
                    values[f"{name}.{inner.name}"] = getattr(value, inner.name)
            else:
                values[name] = value
        values |= {
            "converge_every": self.converge_every,
            "controller": self.controller,
            "hyperparameters": "; ".join(map(repr, given["hyperparameters"])),
            "probe": self.probe is not None,
            "rollback": self.rolls_back,
            "total_steps": self.total_steps,
        }
        explores = bool(given["hyperparameters"])
        for name in ("controller", "exploration.controller"):
            controller = values.pop(name)
            for inner in fields(controller) if explores or name == "controller" else ():
                value = getattr(controller, inner.name)
                values[f"{name}.{inner.name}"] = str(value) if isinstance(value, tuple) else value
        return values


def resolve(optimizer: Optimizer, total_steps: int | None, settings: Mapping[str, Any]) -> Resolved:
    """Complete the settings and make sure that they can be had together. Changes nothing and sends nothing.

    Raises:
        TypeError, ValueError: naming the setting, its value, the rule and the way out.
    """
    optimizer = inside(optimizer)
    _check_known(settings)
    checked = {name: setting.check(name, settings.get(name, setting.default)) for name, setting in DECLARED.items()}
    given = Settings(**checked)  # type: ignore[typeddict-item]
    if total_steps is not None:
        total_steps = check_whole("total_steps", total_steps, ">= 1 step", lambda steps: steps >= 1)

    spread, hyperparameters, converge_every = given["spread"], given["hyperparameters"], given["converge_every"]
    if converge_every is None and total_steps is not None:
        converge_every = round_length(total_steps)
    if converge_every is None and (spread > 0 or hyperparameters):
        raise ValueError("Pass converge_every, the round's length in steps, or total_steps, from which it follows.")
    given_probe = given["probe"]
    probe = given_probe if isinstance(given_probe, Probe) or given_probe is None else Probe(loss_fn=given_probe)
    modules = _modules(given["model"])
    outside = _outside(modules, optimizer)
    resolved = Resolved(
        given=given,
        total_steps=total_steps,
        converge_every=1 if converge_every is None else converge_every,
        controller=given["controller"] or (Posterior() if given["auto_lr"] else Published()),
        probe=probe,
        prior=None if given["prior"] is None else Prior.load(given["prior"]),
        modules=modules,
        exclusion=Exclusion(modules, given["exclude"], outside),
        outside=outside,
        monitors=as_monitors(given["monitor"]),
        replicas=Replicas(given["replicas"]),
        optimizer=optimizer,
        optimizer_state=policy_of(
            given["averaging"].optimizer_state,
            optimizer,
            hyperparameters,
            gradients=given["gradients"],
            overlap_steps=given["averaging"].overlap_steps,
        ),
    )
    _check_together(resolved)
    if given["per_group"]:
        _check_own_rates(optimizer)
    check_sharding(resolved.modules, resolved.replicas)
    _check_exclusion(resolved)
    check_gradients(given["gradients"], resolved.modules, resolved.replicas)
    return resolved


def _check_known(settings: Mapping[str, Any]) -> None:
    """Raise TypeError for a name that is no setting, as Python does for an unknown argument."""
    for name in settings:
        if name in DECLARED:
            continue
        inside = {
            **{f.name: (group, f.name) for group, kind in GROUPS.items() for f in fields(kind)},
            **{f"outer_{f.name}": ("outer", f.name) for f in fields(Outer)},
            "hyperparameter_controller": ("exploration", "controller"),
        }
        if name in inside:
            group, inner = inside[name]
            hint = f" Pass {group}=hdet.{GROUPS[group].__name__}({inner}=...)."
        else:
            close = difflib.get_close_matches(name, DECLARED, n=1)
            hint = f" Did you mean {close[0]}=?" if close else f" There are {', '.join(DECLARED)}."
        raise TypeError(f"Unknown setting {name}=.{hint}")


def _modules(model: Any) -> tuple[nn.Module, ...]:
    return () if model is None else (model,) if isinstance(model, nn.Module) else tuple(model)


def _outside(modules: tuple[nn.Module, ...], optimizer: Optimizer) -> tuple[Tensor, ...]:
    """Parameters of the optimizer that no module has; none where an adapter says what is trained."""
    if not modules or type(weights_of(modules)) is not Weights:
        return ()
    inside = {id(slot.tensor) for slot in Weights(modules).slots()}
    return tuple(p for group in optimizer.param_groups for p in group["params"] if id(p) not in inside)


def _check_exclusion(resolved: Resolved) -> None:
    weights = weights_of(resolved.modules, resolved.exclusion)
    if type(weights) is not Weights:
        if resolved.given["exclude"]:
            raise ValueError(
                "exclude= is not supported under DeepSpeed, whose masters hold several parameters each. Leave it out."
            )
    elif resolved.given["exclude"] and not weights.slots():
        raise ValueError("exclude= leaves nothing of model= to be averaged. Exclude less, or leave model= out.")


def _check_together(resolved: Resolved) -> None:
    """Raise ValueError for settings that exclude one another."""
    given, probe = resolved.given, resolved.probe
    spread, auto_lr, hyperparameters = given["spread"], given["auto_lr"], given["hyperparameters"]
    averaging, outer, gradients = given["averaging"], given["outer"], given["gradients"]
    check_identified(
        hyperparameters,
        gradients=gradients,
        probe=probe is not None,
        held_out=probe is not None and probe.held_out,
    )
    if (spread > 0 or hyperparameters) and not resolved.modules:
        raise ValueError(
            "To let replicas differ hdet needs model=: its parameters and buffers are averaged every "
            "converge_every steps."
        )
    if auto_lr:
        _check_controller(resolved)
    if probe is not None and not (auto_lr or any(h.move for h in hyperparameters)):
        raise ValueError("probe= does nothing without auto_lr=True or hyperparameters= that move.")
    if averaging.overlap_steps >= resolved.converge_every:
        raise ValueError(
            f"Invalid overlap_steps={averaging.overlap_steps}. Must be in [0, converge_every="
            f"{resolved.converge_every}): an average must land before the next is sent."
        )
    if probe is not None and averaging.overlap_steps:
        raise ValueError(
            "probe= and overlap_steps > 0 exclude one another: the probe needs the mean at the round's end."
        )
    if not outer.is_plain:
        _check_outer(outer, gradients, averaging, resolved.modules)
    if given["virtual_replicas"] > 1:
        _check_virtual(given["virtual_replicas"], given)


def _check_controller(resolved: Resolved) -> None:
    given, controller = resolved.given, resolved.controller
    name = type(controller).__name__
    if given["spread"] == 0 and isinstance(controller, Published):
        raise ValueError(
            "auto_lr=True with controller=Published() needs spread > 0: with spread=0 all replicas train under the "
            "same learning rate and their losses say nothing about it. Pass for example spread=1/9."
        )
    if controller.needs_length and resolved.total_steps is None:
        raise ValueError(
            f"auto_lr=True with controller={name}() must know how long the run is: pass total_steps, or "
            "controller=hdet.controller.Published()."
        )
    if controller.needs_movement and not resolved.modules:
        raise ValueError("auto_lr=True needs model=: the controller goes by how far its weights move.")
    if controller.needs_movement and given["averaging"].overlap_steps:
        raise ValueError(
            f"auto_lr=True with controller={name}() and overlap_steps={given['averaging'].overlap_steps} exclude one "
            "another: how far the weights move is measured at the mean at the round's end. Pass overlap_steps=0, or "
            "controller=hdet.controller.Published()."
        )


def _check_own_rates(optimizer: Optimizer) -> None:
    """Raise ValueError if parameter groups that are to have multipliers of their own share a learning rate."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for i, rate in enumerate(rates):
        first = next((j for j in range(i) if share_memory(rates[j], rate)), None)
        if first is not None:
            raise ValueError(
                f"per_group=True gives every parameter group a learning rate of its own, and groups {first} and {i} "
                "share one tensor. Give each a tensor of its own: group['lr'] = group['lr'].clone(), or leave out "
                "per_group."
            )


def _check_outer(outer: Outer, gradients: str, averaging: Averaging, modules: Sequence[nn.Module]) -> None:
    if gradients != "local":
        raise ValueError(
            f'outer={outer} needs gradients="local": where gradients are shared, the optimizer\'s own momentum sees '
            "all of them already."
        )
    if averaging.overlap_steps:
        raise ValueError(
            f"outer={outer} excludes overlap_steps={averaging.overlap_steps} > 0: the outer optimizer needs the mean "
            "at the round's end."
        )
    if not modules:
        raise ValueError(f"outer={outer} needs model=: it moves its averaged parameters.")


def _check_virtual(count: int, given: Settings) -> None:
    if given["spread"] == 0:
        raise ValueError(
            f"virtual_replicas={count} needs spread > 0: with spread=0 they are all at the same point. Pass for "
            "example spread=1/9."
        )
    if given["hyperparameters"]:
        raise ValueError(
            f"virtual_replicas={count} and hyperparameters= exclude one another: virtual replicas share one "
            "optimizer, which takes its step at one value. Start real replicas with torchrun."
        )
    if given["gradients"] != "shared":
        raise ValueError(
            f"virtual_replicas={count} needs gradients='shared', not {given['gradients']!r}: only under a shared "
            "gradient do replicas lie on a line, on which they can be visited."
        )
    if given["averaging"].overlap_steps:
        raise ValueError(
            f"virtual_replicas={count} and overlap_steps={given['averaging'].overlap_steps} exclude one another."
        )
