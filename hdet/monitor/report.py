"""What one converge says. Plain Python values, the same on every rank but for ``writer``, ``converge_ms`` and, where
replicas are sharded, ``converge_bytes``."""

from __future__ import annotations

from dataclasses import dataclass

from hdet.observe.slopes import Slopes


@dataclass(frozen=True, kw_only=True)
class HyperparameterReport:
    """One hyperparameter beside the learning rate, in one converge."""

    name: str
    """As passed, or the default."""
    centre: float
    """Its centre in the round."""
    values: tuple[float, ...]
    """[r] each replica's value."""
    effect: float
    """By how much the probe's loss rises from the centre to one spread above it; NaN where nothing was said."""
    error: float
    """Standard error of ``effect``; NaN with no more replicas than factors."""
    next_centre: float
    """The centre from here on."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """One converge. ``[g]`` is a parameter group, ``[r]`` a replica; a loss or slope that is not known is NaN.

    Everything up to ``losses`` describes the round that just ended (or, for a converge inside a round, the round so
    far): the learning rates under which its last step was taken, and the losses met under them.
    """

    step: int
    """Scheduler steps taken so far."""
    round: int
    """Index of the round, from 0."""
    complete: bool
    """Whether this converge ends its round. ``scheduler.converge()`` inside a round averages, and nothing else."""
    replicas: int
    """Number of replicas ``N``."""
    groups: tuple[str, ...]
    """Names of the parameter groups."""
    schedule_lr: tuple[float, ...]
    """[g] the base schedule alone."""
    gain: tuple[float, ...]
    """[g] the gain in force."""
    base_lr: tuple[float, ...]
    """[g] schedule x gain, the centre of the spread."""
    replica_lr: tuple[tuple[float, ...], ...]
    """[g][r] schedule x gain x multiplier."""
    losses: tuple[float, ...]
    """[r] mean training loss over the round."""
    mean_loss: float
    """Mean of the finite ``losses``."""
    hypergradient: tuple[float, ...]
    """[g] what the losses say: > 0 for "a larger learning rate did better"."""
    probe: Slopes
    """What the paired probe said: raw slope, debiased slope, noise."""
    velocity: tuple[float, ...]
    """[g] the controller's momentum after this round."""
    next_gain: tuple[float, ...]
    """[g] the gain from here on."""
    hyperparameters: tuple[HyperparameterReport, ...] = ()
    """What else was explored."""
    distance: tuple[float, ...]
    """[r] Euclidean distance of the replica's parameters from their mean, before averaging."""
    excluded: tuple[int, ...]
    """Replicas left out of the average because they held a non-finite value."""
    rolled_back: bool
    """Whether the round blew up and was undone."""
    converge_ms: float
    """Wall-clock time of this converge on this rank, in milliseconds."""
    converge_bytes: int
    """Bytes this rank handed to the collectives in this converge."""
    writer: bool
    """True on exactly one rank: the one that writes files."""
