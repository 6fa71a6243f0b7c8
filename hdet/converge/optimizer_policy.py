r"""What a converge does with the optimizer's state, where the user has not said it: ``optimizer_state="auto"``.

Under shared gradients an optimizer's state is the same in all replicas if it is made of gradients alone: the learning
rate does not enter Adam's moments. It differs where the state has seen the parameters, which differ: through weight
decay that is added to the gradient, or because it holds weights or steps. Under local gradients it always differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.kinds import ParamGroupField

# torch's optimizers whose state is made of gradients alone; by what turns weight decay into a part of the gradient.
_NEVER_COUPLED = {"AdamW", "Adafactor", "Muon", "SparseAdam"}
_COUPLED_UNLESS_DECOUPLED = {"Adam", "NAdam", "RAdam"}
_COUPLED = {"SGD", "Adagrad", "Adadelta", "Adamax", "RMSprop"}
# The rest of torch's: ASGD averages weights, Rprop's step sizes begin at the learning rate. Both are averaged.

_ROTATED = {"SOAP"}
"""Optimizers with an eigenbasis in their state: a mean of two is none, and moments live in it."""
_HOLD_WEIGHTS = ("schedulefree", "asgd")


def policy_of(
    wanted: str,
    optimizer: Optimizer,
    hyperparameters: Sequence[Hyperparameter] = (),
    *,
    gradients: str,
    overlap_steps: int,
) -> str:
    """``"verify"``, ``"average"``, ``"keep"`` or ``"reset"``: what ``optimizer_state=wanted`` comes to.

    Raises:
        ValueError: for a combination that cannot be right, before anything is changed.
    """
    name = type(optimizer).__name__
    if overlap_steps and any(kind in name.lower() for kind in _HOLD_WEIGHTS):
        raise ValueError(
            f"{name} keeps weights in its state, which must be averaged together with the parameters: "
            f"overlap_steps={overlap_steps} cannot be. Pass overlap_steps=0."
        )
    if wanted == "reset" and name != "Adagrad" and _made_at_once(optimizer):
        raise ValueError(
            f'optimizer_state="reset" drops the state, which {name} has made in its constructor and would miss. Pass '
            '"average" or "keep".'
        )
    if wanted != "auto":
        return wanted
    if name == "LBFGS":
        return "reset"
    if name in _ROTATED:
        return "keep"
    explored = any(isinstance(h, ParamGroupField) and not _stays_out(h, name, optimizer) for h in hyperparameters)
    agrees = gradients == "shared" and not explored and _is_made_of_gradients(optimizer)
    return "verify" if agrees else "average"


def _is_made_of_gradients(optimizer: Optimizer) -> bool:
    """Whether nothing of the parameters enters the state. Unknown optimizers: no."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim"):
        return False
    return kind.__name__ in _NEVER_COUPLED | _COUPLED_UNLESS_DECOUPLED | _COUPLED and not any(
        float(group.get("weight_decay", 0)) and _is_coupled(kind.__name__, group) for group in optimizer.param_groups
    )


def _is_coupled(name: str, group: dict[str, object]) -> bool:
    if name in _NEVER_COUPLED:
        return False
    if name in _COUPLED_UNLESS_DECOUPLED:
        return not group.get("decoupled_weight_decay", False)
    return name != "SGD" or bool(group["momentum"])  # without momentum SGD has no state


def _stays_out(h: ParamGroupField, name: str, optimizer: Optimizer) -> bool:
    """Whether a hyperparameter leaves the state as it is: decoupled weight decay does."""
    return h.key == "weight_decay" and not any(_is_coupled(name, group) for group in optimizer.param_groups)


def _made_at_once(optimizer: Optimizer) -> bool:
    """Whether the state of an optimizer that has taken no step yet is there already."""
    steps = [state["step"] for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    return bool(steps) and all(float(step) == 0 for step in steps)
