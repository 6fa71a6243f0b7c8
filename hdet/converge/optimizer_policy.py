r"""The policy for the optimizer's state that ``optimizer_state="auto"`` selects.

Under shared gradients an optimizer's state is the same in all replicas if it is computed from gradients alone: the
learning rate does not enter Adam's moments. It differs where it depends on the parameters, which differ: through weight
decay that is added to the gradient, or because it holds weights or steps. Under local gradients it always differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from hdet.explore.hyperparameters import Hyperparameter
from hdet.explore.kinds import ParamGroupField

# torch's optimizers whose state is computed from gradients alone; by whether weight decay is added to the gradient.
_NEVER_COUPLED = {"AdamW", "Adafactor", "Muon", "SparseAdam"}
_COUPLED_UNLESS_DECOUPLED = {"Adam", "NAdam", "RAdam"}
_COUPLED = {"SGD", "Adagrad", "Adadelta", "Adamax", "RMSprop"}
# The rest of torch's: ASGD averages weights, Rprop's step sizes begin at the learning rate. Both are averaged.

_ROTATED = {"SOAP"}
"""Optimizers whose moments are expressed in an eigenbasis of their own: the mean of two bases is no basis."""
_HOLD_WEIGHTS = ("schedulefree", "asgd")
"""Parts of the lower-case names of optimizers with weights in their state."""


def policy_of(
    wanted: str,
    optimizer: Optimizer,
    hyperparameters: Sequence[Hyperparameter] = (),
    *,
    gradients: str,
    overlap_steps: int,
) -> str:
    """The policy that ``optimizer_state=wanted`` means: ``"verify"``, ``"average"``, ``"keep"`` or ``"reset"``.

    Raises:
        ValueError: for a combination that cannot work, before anything is changed.
    """
    name = type(optimizer).__name__
    if overlap_steps and any(kind in name.lower() for kind in _HOLD_WEIGHTS):
        raise ValueError(
            f"{name} keeps weights in its state, which must be averaged together with the parameters: "
            f"overlap_steps={overlap_steps} cannot be. Pass overlap_steps=0."
        )
    if wanted == "reset" and name != "Adagrad" and _is_made_in_constructor(optimizer):
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
    explored = any(isinstance(h, ParamGroupField) and not _leaves_state(h, name, optimizer) for h in hyperparameters)
    agrees = gradients == "shared" and not explored and _depends_on_gradients_alone(optimizer)
    return "verify" if agrees else "average"


def _depends_on_gradients_alone(optimizer: Optimizer) -> bool:
    """Whether the state does not depend on the parameters. False for optimizers that are not torch's."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim"):
        return False
    return kind.__name__ in _NEVER_COUPLED | _COUPLED_UNLESS_DECOUPLED | _COUPLED and not any(
        float(group.get("weight_decay", 0)) and _is_coupled(kind.__name__, group) for group in optimizer.param_groups
    )


def _is_coupled(name: str, group: dict[str, object]) -> bool:
    """Whether weight decay would enter the state."""
    if name in _NEVER_COUPLED:
        return False
    if name in _COUPLED_UNLESS_DECOUPLED:
        return not group.get("decoupled_weight_decay", False)
    return name != "SGD" or bool(group["momentum"])  # without momentum SGD has no state


def _leaves_state(h: ParamGroupField, name: str, optimizer: Optimizer) -> bool:
    """Whether the state does not depend on a hyperparameter: so it is with decoupled weight decay."""
    return h.key == "weight_decay" and not any(_is_coupled(name, group) for group in optimizer.param_groups)


def _is_made_in_constructor(optimizer: Optimizer) -> bool:
    """Whether an optimizer that has taken no step has state."""
    steps = [state["step"] for state in optimizer.state.values() if isinstance(state, dict) and "step" in state]
    return bool(steps) and all(float(step) == 0 for step in steps)
