"""Kinds of hyperparameters: fields of parameter groups, attributes of modules, numbers that the user's code reads."""

from __future__ import annotations

import numbers
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hdet.errors import check_list, check_number, check_text, plain, shown
from hdet.explore.dropout import Dropout
from hdet.explore.hyperparameters import Hyperparameter, Space
from hdet.model.devices import check_device
from hdet.model.weights import check_modules

_FIELD_RULE = (
    "a field of the optimizer's parameter groups, such as 'weight_decay' or 'betas[0]'; learning rates have spread= "
    "and per_group="
)
_REGULARISERS = ("weight_decay",)
"""Fields that only regularise."""


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
        groups: indices or names of the parameter groups; default all, except those where a field in log space is 0.
        regularises: whether it can only be judged on held-out data; by default true for ``weight_decay`` alone.
        move: whether its centre moves by what the probe says. If not, replicas differ around a fixed centre.
        name: in reports and saved state; default ``field``.

    Raises:
        TypeError, ValueError: for a bad argument. A field that the optimizer does not have is found when the scheduler
            is built.

    Examples:
        >>> import hdet
        >>> hdet.param_group("weight_decay", spread=0.5)
        weight_decay: log, spread 0.5, bounds (0.0, inf), acts on the update, regularises
    """
    key = check_text("field", field, _FIELD_RULE).partition("[")[0]
    return ParamGroupField(
        field,
        groups,
        field if name is None else name,
        spread=spread,
        space=("complement" if key in ("momentum", "betas") else "log") if space is None else space,
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
    compile anew when it changes; see docs/guides/hyperparameters.md.

    Args:
        model: the module or modules to search.
        kind: which modules.
        attribute: its name; a float or a 0-dim tensor.
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
    models = check_modules("model", model)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        raise TypeError(f"Invalid kind={shown(kind)}. Must be a class of modules, such as torch.nn.Dropout.")
    check_text("attribute", attribute, "the name of an attribute, such as 'p'")
    modules = [module for one in models for module in one.modules() if isinstance(module, kind)]
    if not modules:
        raise ValueError(f"The model has no {kind.__name__} whose {attribute!r} could be explored.")
    for module in modules:
        where = f"attribute={shown(attribute)} of a {kind.__name__}"
        _number(where, getattr(module, attribute, None), "; pass another attribute=, or another kind=")
    if bounds is None and attribute == "p" and issubclass(kind, (nn.modules.dropout._DropoutNd, Dropout)):
        bounds = (0, 1)
    return ModuleAttribute(
        modules,
        attribute,
        f"{kind.__name__}.{attribute}" if name is None else name,
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


class ParamGroupField(Hyperparameter):
    """See :func:`param_group`.

    Args:
        field, groups, name: as there.
        settings: the other arguments of :class:`Hyperparameter`.
    """

    def __init__(self, field: str, groups: Sequence[int | str] | None, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        match = re.fullmatch(r"(\w+)(?:\[(\d+)\])?", field)
        if match is None or field == "lr" or match[1] == "params":
            raise ValueError(f"Invalid {field=}. Must be {_FIELD_RULE}.")
        self.key, self._index = match[1], None if match[2] is None else int(match[2])
        self._chosen = None if groups is None else _chosen(groups)
        self._indices: list[int] = []  # of the parameter groups explored

    @property
    def places(self) -> list[tuple[int, str, int | None]]:
        """Where it is: (parameter group, key, index in a setting of several numbers)."""
        return [(i, self.key, self._index) for i in self._indices]

    @property
    def is_momentum(self) -> bool:
        """Whether a schedule that cycles momentum writes the same field."""
        return self.key == "momentum" or (self.key == "betas" and self._index == 0)

    def _find_targets(self, optimizer: Optimizer) -> list[float]:
        indices = []
        for i, group in enumerate(optimizer.param_groups):
            if self._chosen is not None and i not in self._chosen and group.get("name") not in self._chosen:
                continue
            if self.key not in group:
                raise ValueError(
                    f"{type(optimizer).__name__} has no {self.key!r} in its parameter groups. It has "
                    f"{', '.join(sorted(set(group) - {'params', 'lr', 'initial_lr', 'name'}))}."
                )
            if self._chosen is None and self.space == "log" and self._get(group) == 0:
                continue  # 0 turns it off in this group, and it stays off
            indices.append(i)
        if not indices:
            raise ValueError(
                f"The optimizer has no parameter group to explore {self.name} in: it is 0 in all, or groups="
                f"{self._chosen} names none. From 0 it can only be explored in space='linear'."
            )
        self._optimizer, self._indices = optimizer, indices
        return self._current_values()

    def _current_values(self) -> list[float]:
        # load_state_dict() replaces the groups' dictionaries, so that they cannot be kept.
        return [self._get(self._optimizer.param_groups[i]) for i in self._indices]

    def _write(self, values: Sequence[float]) -> None:
        self._write_groups(self._optimizer.param_groups, values, _set_in_place)

    def write_centre(self, groups: Sequence[dict[str, Any]], position: float) -> None:
        """Put the centre into the parameter groups of a saved state. Its tensors are the optimizer's: not changed."""
        self._write_groups(groups, self._values(position, 0.0), _new_value)

    def _write_groups(
        self, groups: Sequence[dict[str, Any]], values: Sequence[float], set_value: Callable[[Any, float], Any]
    ) -> None:
        for i, value in zip(self._indices, values, strict=True):
            group = groups[i]
            current = group[self.key]
            if self._index is not None:
                group[self.key] = type(current)(
                    set_value(old, value) if j == self._index else old for j, old in enumerate(current)
                )
            else:
                group[self.key] = set_value(current, value)

    def _get(self, group: dict[str, Any]) -> float:
        value = group[self.key]
        if self._index is not None:
            if not isinstance(value, (list, tuple)) or self._index >= len(value):
                raise ValueError(
                    f"The optimizer's {self.key} is {shown(value)}, which has no number {self._index}. Name one that "
                    "it has."
                )
            value = value[self._index]
        elif isinstance(value, (list, tuple)):
            raise TypeError(f"{self.name} is {shown(value)}, {len(value)} numbers. Name one of them: '{self.key}[0]'.")
        return _number(self.name, value)


class ModuleAttribute(Hyperparameter):
    """See :func:`module_attribute`. All of ``modules`` have the ``attribute``."""

    def __init__(self, modules: Sequence[nn.Module], attribute: str, name: str, **settings: Any) -> None:
        super().__init__(name, **settings)
        self._modules, self._attribute = list(modules), attribute

    def _current_values(self) -> list[float]:
        return [float(getattr(module, self._attribute)) for module in self._modules]

    def _write(self, values: Sequence[float]) -> None:
        for module, value in zip(self._modules, values, strict=True):
            current = getattr(module, self._attribute)
            if isinstance(current, Tensor):
                current.fill_(value)
            else:
                setattr(module, self._attribute, value)


class Scalar(Hyperparameter):
    """See :func:`scalar`.

    Attributes:
        value_now: this replica's current value, a float.
    """

    def __init__(self, name: str, value: float, neutral: float | None, **settings: Any) -> None:
        super().__init__(name, **settings)
        self.value_now = float(check_number("value", value))
        self._neutral_value = None if neutral is None else float(check_number("neutral", neutral))
        self._tensor: Tensor | None = None

    def __float__(self) -> float:
        return self.value_now

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """The value as a 0-dim fp32 tensor that changes in place. Under ``torch.compile`` a float that changes makes
        the model compile anew."""
        if device is not None:
            check_device("device", device)
        if self._tensor is None:
            self._tensor = torch.tensor(self.value_now, dtype=torch.float32, device=device)
        return self._tensor

    def _current_values(self) -> list[float]:
        return [self.value_now]

    def _neutral_values(self, position: float) -> list[float]:
        return super()._neutral_values(position) if self._neutral_value is None else [self._neutral_value]

    def _write(self, values: Sequence[float]) -> None:
        (self.value_now,) = values
        if self._tensor is not None:
            self._tensor.fill_(self.value_now)


def _chosen(groups: Any) -> tuple[int | str, ...]:
    rule = "a list of indices or names of the optimizer's parameter groups"
    chosen = [plain(one) for one in check_list("groups", groups, rule)]
    for one in chosen:
        if isinstance(one, bool) or not isinstance(one, (int, str)):
            raise TypeError(f"Invalid groups={shown(groups)}. Must be {rule}.")
    return tuple(chosen)


def _number(name: str, value: Any, way_out: str = "") -> float:
    """The number that is explored: an int, a float, or a tensor of one element."""
    is_number = isinstance(value, (numbers.Real, Tensor)) and not isinstance(value, bool)
    if not is_number or (isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex() or value.is_meta)):
        raise TypeError(f"{name} is {shown(value)}. Must be a number to be explored{way_out}.")
    return float(value)


def _set_in_place(old: Any, value: float) -> Any:
    # Compiled optimizers and CUDA graphs keep the tensor.
    return old.fill_(value) if isinstance(old, Tensor) else value


def _new_value(old: Any, value: float) -> Any:
    return torch.full_like(old, value) if isinstance(old, Tensor) else value
