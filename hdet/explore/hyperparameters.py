r"""Hyperparameters beside the learning rate: any scalar that leaves the architecture alone.

Replica ``r`` holds the value at ``centre + spread * z_r`` in the hyperparameter's own **space**, with ``z_r`` its level
in [-1, 1] (:mod:`hdet.explore.design`)::

    "log"           value = centre * exp(spread * z)                weight decay, eps, a loss weight
    "linear"        value = centre + spread * z                     dropout, label smoothing
    "complement"    1 - value = (1 - centre) * exp(-spread * z)     momentum, betas: what matters is how far from 1

What the losses say about it depends on how it acts:

- Through the **update** (weight decay, momentum, betas, eps): replicas differ under any gradients.
- Through the **gradient** (dropout, label smoothing, a loss weight): under shared gradients every replica applies the
  mean of all gradients, so that its parameters do not depend on its own value, while its training loss depends on
  nothing else. That is no signal but a confounded one. It takes ``gradients="local"`` or ``"grouped"``, and a probe.
- One that only **regularises** (weight decay, dropout, label smoothing) makes training data fit worse by design: it
  takes a probe on held-out data.

:func:`check_identified` refuses the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Space = Literal["log", "linear", "complement"]

_SPACES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "log": (math.log, math.exp),
    "linear": (float, float),
    "complement": (lambda value: -math.log1p(-value), lambda place: -math.expm1(-place)),
}
_RANGES = {"log": (0.0, math.inf), "linear": (-math.inf, math.inf), "complement": (-math.inf, 1.0)}
_MARGIN = 0.1
"""Spreads that the centre keeps from its bounds, so that replicas always differ."""
_REGULARISERS = ("weight_decay",)


class Hyperparameter:
    """One explored scalar. Made by :func:`param_group`, :func:`module_attribute` and :func:`scalar`.

    It may have several **places** (parameter groups, modules) with values of their own: these keep their distances, in
    the hyperparameter's space, and move together.

    Raises:
        TypeError, ValueError: for a bad argument.
    """

    def __init__(
        self,
        name: str,
        *,
        spread: float,
        space: Space,
        bounds: tuple[float, float] | None,
        acts_on: Literal["update", "gradient"],
        regularises: bool,
        move: bool,
    ) -> None:
        if space not in _SPACES:
            raise ValueError(f"Invalid {space=} of {name}. Must be one of {', '.join(_SPACES)}.")
        if not 0 < spread < math.inf:
            raise ValueError(f"Invalid {spread=} of {name}. Must be > 0, in the space {space!r}.")
        widest = _RANGES[space]
        low, high = widest if bounds is None else bounds
        if not widest[0] <= low < high <= widest[1]:
            raise ValueError(
                f"Invalid {bounds=} of {name}. Must satisfy {widest[0]} <= low < high <= {widest[1]} in the space "
                f"{space!r}."
            )
        self.name, self.spread, self.space, self.bounds = name, float(spread), space, (low, high)
        self.acts_on, self.regularises, self.move = acts_on, regularises, move
        self.starts: list[float] = []
        """By place, in the space: where the centre began."""

    def attach(self, optimizer: Optimizer) -> None:
        """Find the places, and take the values there as the centre."""
        values = self._read(optimizer)
        into, _ = _SPACES[self.space]
        low, high = self.bounds
        for value in values:
            if not low <= value <= high or value in _RANGES[self.space]:
                hint = ": 0 has no logarithm, pass space='linear'" if self.space == "log" and value == 0 else ""
                raise ValueError(f"{self.name} is {value}. Must be in its bounds {self.bounds}{hint}.")
        self.starts = [into(value) for value in values]

    def value(self, position: float, level: float = 0.0) -> float:
        """The value at the first place, of a replica at ``level``, with the centre ``position`` away from its start."""
        return self._values(position, level)[0]

    def position_of(self, value: float) -> float:
        """The position at which the first place holds ``value``, inside the bounds."""
        into, _ = _SPACES[self.space]
        return self.clamped(into(value) - self.starts[0])

    def reach(self, position: float) -> float:
        """Spread in force with the centre at ``position``: smaller than ``spread`` close to a bound."""
        low, high = self._range()
        return min(self.spread, position - low, high - position)

    def clamped(self, position: float) -> float:
        """The nearest position whose replicas lie inside the bounds."""
        low, high = self._range()
        margin = min(_MARGIN * self.spread, (high - low) / 2)
        return min(max(position, low + margin), high - margin)

    def write(self, position: float, level: float = 0.0) -> None:
        """Set every place to what a replica at ``level`` holds."""
        self._write(self._values(position, level))

    @contextmanager
    def neutral(self, position: float) -> Iterator[None]:
        """The value under which replicas are compared, meanwhile: by default the centre."""
        before = self._now()
        self._write(self._neutral(position))
        try:
            yield
        finally:
            self._write(before)

    def _values(self, position: float, level: float) -> list[float]:
        _, back = _SPACES[self.space]
        low, high = self.bounds
        shift = position + self.reach(position) * level
        return [min(max(back(start + shift), low), high) for start in self.starts]

    def _range(self) -> tuple[float, float]:
        into, _ = _SPACES[self.space]
        low, high = self.bounds
        widest = _RANGES[self.space]
        lowest = -math.inf if low == widest[0] else into(low) - min(self.starts)
        highest = math.inf if high == widest[1] else into(high) - max(self.starts)
        return lowest, highest

    def _neutral(self, position: float) -> list[float]:
        return self._values(position, 0.0)

    def _read(self, optimizer: Optimizer) -> list[float]:
        raise NotImplementedError

    def _now(self) -> list[float]:
        raise NotImplementedError

    def _write(self, values: Sequence[float]) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return (
            f"{self.name}: {self.space}, spread {self.spread:g}, bounds {self.bounds}, acts on the {self.acts_on}"
            f"{', regularises' if self.regularises else ''}{'' if self.move else ', does not move'}"
        )


class ParamGroupField(Hyperparameter):
    """See :func:`param_group`."""

    def __init__(self, field: str, groups: Sequence[int | str] | None, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", field)
        if match is None or field == "lr" or match[1] == "params":
            raise ValueError(
                f"Invalid {field=}. Must be a field of the optimizer's parameter groups, such as 'weight_decay' or "
                "'betas[0]'; learning rates have spread= and per_group=."
            )
        self.key, self._index = match[1], None if match[2] is None else int(match[2])
        self._wanted = groups
        self._groups: list[dict[str, Any]] = []
        self._numbers: list[int] = []

    @property
    def is_momentum(self) -> bool:
        """Whether a schedule that cycles momentum writes the same field."""
        return self.key == "momentum" or (self.key == "betas" and self._index == 0)

    def _read(self, optimizer: Optimizer) -> list[float]:
        numbers = []
        for i, group in enumerate(optimizer.param_groups):
            if self._wanted is not None and i not in self._wanted and group.get("name") not in self._wanted:
                continue
            if self.key not in group:
                raise ValueError(
                    f"{type(optimizer).__name__} has no {self.key!r} in its parameter groups. It has "
                    f"{', '.join(sorted(set(group) - {'params', 'lr', 'initial_lr', 'name'}))}."
                )
            if self._wanted is None and self.space == "log" and self._get(group) == 0:
                continue  # off in this group, and stays off
            numbers.append(i)
        if not numbers:
            raise ValueError(
                f"No parameter group to explore {self.name} in: it is 0 in all, or groups={self._wanted} names none. "
                "From 0 it can only be explored in space='linear'."
            )
        self._optimizer, self._numbers = optimizer, numbers
        return self._now()

    def _now(self) -> list[float]:
        # Looked up each time: load_state_dict() replaces the groups' dictionaries.
        return [self._get(self._optimizer.param_groups[i]) for i in self._numbers]

    def _write(self, values: Sequence[float]) -> None:
        self._write_groups(self._optimizer.param_groups, values, _written)

    def write_centre(self, groups: Sequence[dict[str, Any]], position: float) -> None:
        """Put the centre into the groups of a saved state, which shares its tensors with the optimizer."""
        self._write_groups(groups, self._values(position, 0.0), _replaced)

    def _write_groups(
        self, groups: Sequence[dict[str, Any]], values: Sequence[float], written: Callable[[Any, float], Any]
    ) -> None:
        for i, value in zip(self._numbers, values, strict=True):
            group = groups[i]
            now = group[self.key]
            if self._index is not None:
                group[self.key] = type(now)(
                    written(old, value) if j == self._index else old for j, old in enumerate(now)
                )
            else:
                group[self.key] = written(now, value)

    def _get(self, group: dict[str, Any]) -> float:
        value = group[self.key] if self._index is None else group[self.key][self._index]
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"{self.name} is {value!r}. Must be a number to be explored.")
        return float(value)


class ModuleAttribute(Hyperparameter):
    """See :func:`module_attribute`."""

    def __init__(self, modules: Sequence[nn.Module], attribute: str, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._modules, self._attribute = list(modules), attribute

    def _read(self, optimizer: Optimizer) -> list[float]:
        return self._now()

    def _now(self) -> list[float]:
        return [float(getattr(module, self._attribute)) for module in self._modules]

    def _write(self, values: Sequence[float]) -> None:
        for module, value in zip(self._modules, values, strict=True):
            now = getattr(module, self._attribute)
            if isinstance(now, Tensor):
                now.fill_(value)
            else:
                setattr(module, self._attribute, value)


class Scalar(Hyperparameter):
    """See :func:`scalar`.

    Attributes:
        value_now: this replica's value at the moment, a float.
    """

    def __init__(self, name: str, value: float, neutral: float | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.value_now, self._neutral_value = float(value), neutral
        self._tensor: Tensor | None = None

    def __float__(self) -> float:
        return self.value_now

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """The value as a 0-dim fp32 tensor that changes in place: under ``torch.compile`` a float that changes would
        compile the model anew."""
        if self._tensor is None:
            self._tensor = torch.tensor(self.value_now, dtype=torch.float32, device=device)
        return self._tensor

    def _read(self, optimizer: Optimizer) -> list[float]:
        return self._now()

    def _now(self) -> list[float]:
        return [self.value_now]

    def _neutral(self, position: float) -> list[float]:
        return super()._neutral(position) if self._neutral_value is None else [self._neutral_value]

    def _write(self, values: Sequence[float]) -> None:
        (self.value_now,) = values
        if self._tensor is not None:
            self._tensor.fill_(self.value_now)


class Dropout(nn.Module):
    """``nn.Dropout`` whose ``p`` is a 0-dim tensor, written in place: a compiled model does not compile anew for it.

    To be explored with ``hdet.module_attribute(model, hdet.Dropout, "p", ...)``. ``p`` lies on the CPU wherever the
    model is, and is not part of its state.

    Raises:
        ValueError: for ``p`` outside [0, 1).
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"Invalid {p=}. Must be in [0, 1).")
        self.p = torch.tensor(float(p))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` with a share ``p`` of its elements zero and the others larger by ``1 / (1 - p)``; in eval ``x``."""
        if not self.training:
            return x
        keep = torch.rand_like(x) >= self.p
        return torch.where(keep, x / (1 - self.p), 0.0).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``repr()``."""
        return f"p={float(self.p):g}"


def param_group(
    field: str,
    *,
    spread: float,
    space: Space | None = None,
    bounds: tuple[float, float] | None = None,
    groups: Sequence[int | str] | None = None,
    regularises: bool | None = None,
    move: bool = True,
    name: str | None = None,
) -> Hyperparameter:
    """Explore a field of the optimizer's parameter groups, such as ``"weight_decay"``, ``"momentum"``, ``"betas[0]"``.

    Args:
        field: its key, with an index if it holds several numbers.
        spread: largest distance from the centre, in ``space``; > 0.
        space: default ``"complement"`` for momentum and betas, else ``"log"``.
        bounds: smallest and largest value.
        groups: indices or names of the parameter groups; default all, but for those where a field in log space is 0.
        regularises: whether it can only be judged on held-out data; default: for ``weight_decay``.
        move: whether its centre moves by what the probe says. If not, replicas just differ.
        name: in reports and saved state; default ``field``.

    Raises:
        TypeError, ValueError: for a bad argument. A field that the optimizer does not have is found when the scheduler
            is built.

    Examples:
        >>> import hdet
        >>> hdet.param_group("weight_decay", spread=0.5)
        weight_decay: log, spread 0.5, bounds (0.0, inf), acts on the update, regularises
    """
    key = field.partition("[")[0]
    return ParamGroupField(
        field,
        groups,
        name or field,
        spread=spread,
        space=space or ("complement" if key in ("momentum", "betas") else "log"),
        bounds=bounds,
        acts_on="update",
        regularises=key in _REGULARISERS if regularises is None else regularises,
        move=move,
    )


def module_attribute(
    model: nn.Module | Iterable[nn.Module],
    kind: type[nn.Module],
    attribute: str,
    *,
    spread: float,
    space: Space = "linear",
    bounds: tuple[float, float] | None = None,
    regularises: bool = True,
    move: bool = True,
    name: str | None = None,
) -> Hyperparameter:
    """Explore an attribute of all modules of one kind in a model, such as ``nn.Dropout``'s ``p``.

    An attribute that is a 0-dim tensor is written in place. Under ``torch.compile`` one that is a float makes the model
    compile anew when it changes; see docs/hyperparameters.md.

    Args:
        model: the module or modules to search.
        kind: which modules.
        attribute: which attribute of theirs: a float or a 0-dim tensor.
        spread, space, bounds, regularises, move, name: as for :func:`param_group`; ``name`` is by default
            ``"Dropout.p"`` and the like. ``p`` of dropout modules has the bounds (0, 1).

    Raises:
        TypeError, ValueError: for a bad argument, or if the model has no such module or attribute.

    Examples:
        >>> import torch, hdet
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2))
        >>> hdet.module_attribute(model, torch.nn.Dropout, "p", spread=0.1)
        Dropout.p: linear, spread 0.1, bounds (0, 1), acts on the gradient, regularises
    """
    models = (model,) if isinstance(model, nn.Module) else tuple(model)
    modules = [module for one in models for module in one.modules() if isinstance(module, kind)]
    if not modules:
        raise ValueError(f"The model has no {kind.__name__} whose {attribute!r} could be explored.")
    for module in modules:
        value = getattr(module, attribute, None)
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            raise TypeError(f"{kind.__name__}.{attribute} is {value!r}. Must be a number to be explored.")
    if bounds is None and attribute == "p" and issubclass(kind, (nn.modules.dropout._DropoutNd, Dropout)):
        bounds = (0, 1)
    return ModuleAttribute(
        modules,
        attribute,
        name or f"{kind.__name__}.{attribute}",
        spread=spread,
        space=space,
        bounds=bounds,
        acts_on="gradient",
        regularises=regularises,
        move=move,
    )


def scalar(
    name: str,
    value: float,
    *,
    spread: float,
    space: Space = "linear",
    bounds: tuple[float, float] | None = None,
    neutral: float | None = None,
    regularises: bool = True,
    move: bool = True,
) -> Scalar:
    """Explore a number that your own code reads, such as a label smoothing or the weight of a loss.

    Read ``float(it)`` at every step; under ``torch.compile`` read ``it.tensor()``.

    Args:
        name: in reports and saved state.
        value: the centre at the start.
        neutral: its value while the probe compares replicas: 0 for a label smoothing. Default: the centre.
        spread, space, bounds, regularises, move: as for :func:`param_group`.

    Raises:
        ValueError: for a bad argument.

    Examples:
        >>> import hdet
        >>> smoothing = hdet.scalar("label_smoothing", 0.1, spread=0.05, bounds=(0, 0.5), neutral=0.0)
        >>> float(smoothing)
        0.1
    """
    return Scalar(
        name,
        value,
        neutral,
        spread=spread,
        space=space,
        bounds=bounds,
        acts_on="gradient",
        regularises=regularises,
        move=move,
    )


def check_identified(hyperparameters: Sequence[Hyperparameter], *, gradients: str, probe: bool, held_out: bool) -> None:
    """Refuse what the losses could not tell.

    Raises:
        ValueError: naming the hyperparameter, the reason and a combination that would work.
    """
    names = [h.name for h in hyperparameters]
    for name in names:
        if names.count(name) > 1 or name == "lr":
            raise ValueError(f"Two hyperparameters are called {name!r}. Pass name= to tell them apart.")
    for h in hyperparameters:
        if not h.move:
            continue
        wants = 'gradients="local"' if h.acts_on == "gradient" and gradients == "shared" else ""
        data = "probe=hdet.Probe(loss_fn=..., batches=held_out_loader, held_out=True)"
        if h.acts_on == "gradient" and gradients == "shared":
            raise ValueError(
                f"{h.name} acts through the gradient, and gradients='shared' gives all replicas the same one: no "
                f"replica's parameters depend on its own {h.name}, so nothing can be learned about it. Pass "
                f'{wants} (or "grouped") and {data}; or move=False to let it vary without moving.'
            )
        if not probe:
            raise ValueError(
                f"Whether {h.name} should be larger or smaller cannot be read off the replicas' training losses"
                f"{', which it changes directly' if h.acts_on == 'gradient' else ''}. Pass {data}; or move=False."
            )
        if h.regularises and not held_out:
            raise ValueError(
                f"{h.name} makes training data fit worse by design, so only held-out data can say what it is good for. "
                f"Pass {data}; or regularises=False if it does more than that."
            )


def _written(old: Any, value: float) -> Any:
    if isinstance(old, Tensor):  # in place: compiled optimizers and CUDA graphs hold on to the tensor
        return old.fill_(value)
    return value


def _replaced(old: Any, value: float) -> Any:
    return torch.full_like(old, value) if isinstance(old, Tensor) else value
