"""Which hyperparameters the losses of a run can say anything about."""

from __future__ import annotations

from collections.abc import Sequence

from hdet.explore.hyperparameters import Hyperparameter


def check_identified(hyperparameters: Sequence[Hyperparameter], *, gradients: str, probe: bool, held_out: bool) -> None:
    """Refuse hyperparameters whose effect the losses could not show.

    Args:
        hyperparameters: what is explored beside the learning rate.
        gradients: ``"shared"``, ``"local"`` or ``"grouped"``.
        probe: whether there is a paired probe.
        held_out: whether it uses held-out data.

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
        data = "probe=hdet.Probe(loss_fn=..., batches=held_out_loader, held_out=True)"
        if h.acts_on == "gradient" and gradients == "shared":
            raise ValueError(
                f"{h.name} acts through the gradient, and gradients='shared' gives all replicas the same one: no "
                f"replica's parameters depend on its own {h.name}, so nothing can be learned about it. Pass "
                f'gradients="local" (or "grouped") and {data}; or move=False to let it vary without moving.'
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
