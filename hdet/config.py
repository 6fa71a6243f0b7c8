"""The settings of an ensemble: frozen, validated once, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field

from hdet.explore.design import Design
from hdet.explore.spread import check_spread
from hdet.steer.controllers import Controller
from hdet.steer.one_slope import OneSlope
from hdet.steer.published import Published
from hdet.steer.two_slope import TwoSlope

OPTIMIZER_STATES = ("auto", "verify", "average", "keep", "reset")
GRADIENTS = ("shared", "local", "grouped")


@dataclass(frozen=True, kw_only=True)
class EnsembleConfig:
    """What every replica must agree on. :class:`hdet.Ensemble` documents the arguments these come from.

    Raises:
        ValueError: for a value outside its range.
        TypeError: for a value of the wrong type.
    """

    spread: float = 0.0
    """``alpha`` in [0, 1): multipliers span ``[1 - alpha, 1 + alpha]``."""
    converge_every: int = 1
    """``T``, the round's length in scheduler steps, >= 1."""
    auto_lr: bool = False
    """Whether the controller moves the gain."""
    controller: Controller = field(default_factory=Published)
    """How the gain moves."""
    per_group: bool = False
    """Whether every parameter group has a gain and levels of its own."""
    hyperparameters: tuple[str, ...] = ()
    """What else is explored, in words."""
    hyperparameter_controller: OneSlope = field(default_factory=OneSlope)
    """How its centres move."""
    design: Design = "orthogonal"
    """How levels are assigned to replicas when there are several factors."""
    virtual_replicas: int = 1
    """``K``: points of the spread that one device visits in turn."""
    moves: bool = False
    """Whether anything moves by what the losses say: learning rates or other hyperparameters."""
    total_steps: int | None = None
    """Length of the run in scheduler steps, for controllers that must know it."""
    probe: bool = False
    """Whether there is a paired probe."""
    rollback: bool = False
    """Whether a run that blew up goes back to its last good converged state."""
    seed: int = 0
    """Seeds the permutations, and nothing else."""
    bucket_mib: float = 64.0
    """Size of a communication bucket in MiB, > 0."""
    overlap_steps: int = 0
    """``tau``: steps by which the average lags behind the round's end, in [0, T)."""
    gradients: str = "shared"
    """Over whom gradients are averaged: ``shared``, ``local`` or ``grouped``."""
    outer_momentum: float = 0.0
    """``mu``, in [0, 1): of the outer optimizer. Only with local gradients."""
    outer_lr: float = 1.0
    """``nu``, > 0: of the outer optimizer; 1 without momentum is the plain average."""

    optimizer_state: str = "auto"
    """What a converge does with the optimizer's state: ``auto``, ``verify``, ``average``, ``keep`` or ``reset``."""

    wire_dtype: str = "own"
    """In what trainable parameters travel: ``bfloat16``, as differences, or their ``own``: fp32, fp64 for fp64."""

    def __post_init__(self) -> None:
        check_spread(self.spread)
        if isinstance(self.converge_every, bool) or not isinstance(self.converge_every, int):
            raise TypeError(f"Invalid converge_every={self.converge_every!r}. Must be a whole number of steps.")
        if self.converge_every < 1:
            raise ValueError(
                f"Invalid converge_every={self.converge_every}. Must be >= 1 step: the replicas are averaged every "
                "converge_every calls of scheduler.step()."
            )
        if not isinstance(self.controller, (Published, TwoSlope)):
            raise TypeError(
                f"Invalid controller={self.controller!r}. Must be an instance of hdet.controller.TwoSlope or Published."
            )
        if isinstance(self.controller, TwoSlope) and self.auto_lr:
            if not self.probe:
                raise ValueError("controller=TwoSlope() needs the paired probe: pass probe=loss_fn.")
            if self.total_steps is None:
                raise ValueError("controller=TwoSlope() must know how long the run is: pass total_steps.")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"Invalid total_steps={self.total_steps}. Must be >= 1.")
        if self.probe and not self.moves:
            raise ValueError("probe= does nothing without auto_lr=True or hyperparameters= that move.")
        if not isinstance(self.hyperparameter_controller, OneSlope):
            raise TypeError(
                f"Invalid hyperparameter_controller={self.hyperparameter_controller!r}. Must be an instance of "
                "hdet.steer.controller.OneSlope."
            )
        if self.design not in ("orthogonal", "independent"):
            raise ValueError(f"Invalid design={self.design!r}. Must be 'orthogonal' or 'independent'.")
        self._check_virtual_replicas()
        if self.probe and self.overlap_steps:
            raise ValueError(
                "probe= and overlap_steps > 0 exclude one another: the probe needs the mean at the round's end."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"Invalid seed={self.seed!r}. Must be an int, the same on every rank.")
        if not 0 < self.bucket_mib < float("inf"):
            raise ValueError(f"Invalid bucket_mib={self.bucket_mib}. Must be a positive number of MiB.")
        if isinstance(self.overlap_steps, bool) or not isinstance(self.overlap_steps, int):
            raise TypeError(f"Invalid overlap_steps={self.overlap_steps!r}. Must be a whole number of steps.")
        if not 0 <= self.overlap_steps < self.converge_every:
            raise ValueError(
                f"Invalid overlap_steps={self.overlap_steps}. Must be in [0, converge_every={self.converge_every}): an "
                "average must land before the next is sent."
            )
        if self.gradients not in GRADIENTS:
            raise ValueError(f"Invalid gradients={self.gradients!r}. Must be one of {', '.join(GRADIENTS)}.")
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(f"Invalid outer_momentum={self.outer_momentum}. Must be in [0, 1).")
        if not 0 < self.outer_lr < float("inf"):
            raise ValueError(f"Invalid outer_lr={self.outer_lr}. Must be > 0; 1 goes all the way to the average.")
        if self.outer and self.gradients != "local":
            raise ValueError(
                f'outer_momentum={self.outer_momentum}, outer_lr={self.outer_lr} need gradients="local": where '
                "gradients are shared, the optimizer's own momentum sees all of them already."
            )
        if self.outer and self.overlap_steps:
            raise ValueError(
                f"outer_momentum={self.outer_momentum}, outer_lr={self.outer_lr} exclude "
                f"overlap_steps={self.overlap_steps} > 0: the outer optimizer needs the mean at the round's end."
            )
        if self.optimizer_state not in OPTIMIZER_STATES:
            raise ValueError(
                f"Invalid optimizer_state={self.optimizer_state!r}. Must be one of {', '.join(OPTIMIZER_STATES)}."
            )
        if self.optimizer_state == "average" and self.overlap_steps:
            raise ValueError(
                f'optimizer_state="average" and overlap_steps={self.overlap_steps} exclude one another: moments cannot '
                'be corrected late. Pass "auto", which averages them in converge() only, or "keep" or "reset".'
            )
        if self.wire_dtype != "own" and self.overlap_steps:
            raise ValueError(
                f"wire_dtype={self.wire_dtype} and overlap_steps={self.overlap_steps} exclude one another: replicas "
                "send how far they moved since they were equal, and with overlap they never are."
            )
        if self.auto_lr and self.spread == 0:
            raise ValueError(
                "auto_lr=True needs spread > 0: with spread=0 all replicas train under the same learning rate and "
                "their losses say nothing about it. Pass for example spread=1/9."
            )

    @property
    def outer(self) -> bool:
        """Whether the outer optimizer does more than average."""
        return self.outer_momentum > 0 or self.outer_lr != 1

    def _check_virtual_replicas(self) -> None:
        count = self.virtual_replicas
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"Invalid virtual_replicas={count!r}. Must be a whole number.")
        if count < 1:
            raise ValueError(f"Invalid virtual_replicas={count}. Must be >= 1.")
        if count == 1:
            return
        if self.spread == 0:
            raise ValueError(
                f"virtual_replicas={count} needs spread > 0: with spread=0 they are all at the same point. Pass for "
                "example spread=1/9."
            )
        if self.hyperparameters:
            raise ValueError(
                f"virtual_replicas={count} and hyperparameters= exclude one another: virtual replicas share one "
                "optimizer, which takes its step at one value. Start real replicas with torchrun."
            )
        if self.gradients != "shared":
            raise ValueError(
                f"virtual_replicas={count} needs gradients='shared', not {self.gradients!r}: only under a shared "
                "gradient do replicas lie on a line, on which they can be visited."
            )
        if self.overlap_steps:
            raise ValueError(f"virtual_replicas={count} and overlap_steps={self.overlap_steps} exclude one another.")
